"""Loading a low-rank model copies no weights and draws no random ones."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowrank.folder.reading import load_low_rank
from tests.helpers import factorize, tiny_bert, tiny_gpt2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_weights_are_pages_of_the_file(make: Any, tmp_path: Path) -> None:
    factorize(make()).save_pretrained(tmp_path)
    model = load_low_rank(tmp_path)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if str(tmp_path) in line]
    mapped = [(int(low, 16), int(high, 16)) for low, high in ranges]
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in mapped), name


def test_nothing_is_initialized_that_is_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    factorize(tiny_bert()).save_pretrained(tmp_path)
    drawn: list[torch.Size] = []
    draw = nn.init.kaiming_uniform_
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda weight, **how: drawn.append(weight.shape) or draw(weight))
    nn.Linear(3, 4)
    assert drawn == [(4, 3)]  # so it would be seen
    load_low_rank(tmp_path)
    assert drawn == [(4, 3)]
