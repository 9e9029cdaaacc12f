"""Whichever name is imported first: the package is whole, and the Auto classes know its checkpoints."""

import subprocess
import sys

import pytest

KNOWN = "; from transformers import AutoConfig; print(AutoConfig.for_model('lowrank').model_type)"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LowRankConfig", "LowRankLinear", "METHODS", "Pipeline", "push_folder"])
def test_any_name_may_be_the_first(name: str) -> None:
    assert printed(f"from hf_lowrank import {name}{KNOWN}") == "lowrank\n"


@pytest.mark.slow
def test_all_names_at_once() -> None:
    assert printed(f"from hf_lowrank import *{KNOWN}") == "lowrank\n"


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
