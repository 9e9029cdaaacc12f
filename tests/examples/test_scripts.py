"""The example scripts run, on tiny inputs, and what they save loads."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoConfig

from hf_lowrank import METHODS, CompressionConfig, compress, compute_statistics
from hf_lowrank.allocation import ALLOCATIONS
from hf_lowrank.model import targets
from hf_lowrank.model.targets import find_targets
from hf_lowrank.solvers.methods import OBJECTIVES
from hf_lowrank.tasks import TASKS, get_task
from tests.examples.inputs import NAMES, settings
from tests.helpers import tiny_bert, token_ids
from tests.launches import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _as_installed() -> Iterator[None]:
    """What an example adds to the registries is gone after its test."""
    known = [(registry, dict(registry)) for registry in (METHODS, OBJECTIVES, ALLOCATIONS, TASKS)]
    yield
    for registry, before in known:
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_compresses_and_saves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in settings(name, tmp_path).items():
        monkeypatch.setenv(key, value)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert AutoConfig.from_pretrained(tmp_path / "out").ranks


def test_a_method_in_one_file() -> None:
    runpy.run_path(str(EXAMPLES / "extend/method.py"))
    model, config = tiny_bert(), CompressionConfig("asvd1", 0.25)
    batch = {"input_ids": token_ids(), "labels": token_ids()[:, 0] % 2}
    statistics = compute_statistics(model, [batch], config.needs, progress=False)
    _, report = compress(model, config, statistics, progress=False)
    assert set(report.ranks.values()) == {8}


def test_an_allocation_in_one_file() -> None:
    runpy.run_path(str(EXAMPLES / "extend/allocation.py"))
    model = tiny_bert()
    with_fisher = CompressionConfig("svd", 0.25, allocation="energy")
    batch = {"input_ids": token_ids(), "labels": token_ids()[:, 0] % 2}
    statistics = compute_statistics(model, [batch], with_fisher.needs, progress=False)
    _, report = compress(model, with_fisher, statistics, progress=False)
    assert len(set(report.ranks.values())) > 1
    uniform = compress(tiny_bert(), CompressionConfig("svd", 0.25), progress=False)[1]
    assert report.targeted_after <= uniform.targeted_after


def test_a_task_in_one_file() -> None:
    runpy.run_path(str(EXAMPLES / "extend/task.py"))
    assert get_task("ag_news").validation == ("test",)


class OwnLinear(nn.Linear):
    """As modelling code may have it."""


def test_a_kind_of_layer_in_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "PLAIN_SUBCLASSES", targets.PLAIN_SUBCLASSES)  # as it was, afterwards
    model = tiny_bert()
    name = "bert.encoder.layer.0.intermediate.dense"
    model.bert.encoder.layer[0].intermediate.dense = OwnLinear(32, 64)
    assert name not in find_targets(model)
    runpy.run_path(str(EXAMPLES / "extend/layer.py"))["allow"](OwnLinear)
    assert name in compress(model, CompressionConfig("svd", 0.25), progress=False)[1].ranks
