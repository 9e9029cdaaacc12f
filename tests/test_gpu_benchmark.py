"""The benchmark of GPUs runs through on a CPU, with tiny shapes, and keeps what it found where a section fails."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness import Options
from hf_lowrank.errors import LowRankError

TINY = gpu.Sizes(32, 64, 4, 2, 2, 64, windows=2, length=8, tokens=(1, 4), batches=(1, 2), prompt=6, rounds=2)


def test_every_section_has_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda layer: layer)  # a minute of compiler
    record = gpu.measure(TINY, torch.device("cpu"), tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"].keys() == record["sections"].keys()
    assert not [section["ended"] for section in record["sections"].values() if "ended" in section]
    rows = {name: section["rows"] for name, section in record["sections"].items()}
    assert [row["what"] for row in rows["statistics"]] == [
        "a training pass",
        "statistics for kfac",
        "statistics for tfwsvd",
    ]
    assert len(rows["factorization"]) == 2 * 4
    assert len(rows["layers"]) == len(rows["layers compiled"]) == 4 * 2
    assert all(row["realised"] == row["speedup"] / row["arithmetic"] for row in rows["layers"])
    parameters, *shapes = rows["model"]
    assert parameters["parameters"]["compressed"] < parameters["parameters"]["dense"]
    assert [(row["phase"], row["batch"]) for row in shapes] == [
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 2),
        ("decode", 2),
    ]


def test_what_was_measured_is_kept_when_a_section_fails_or_has_no_time(tmp_path: Path) -> None:
    run = gpu.Run(TINY, torch.device("cpu"), tmp_path / "gpu.json", {"sections": {}})

    def failing() -> Iterator[gpu.Figures]:
        yield {"first": 1}
        raise MemoryError("out of memory\nand much more")

    def endless() -> Iterator[gpu.Figures]:
        while True:
            yield {"again": 1}

    run.section("failing", 10, failing())
    run.section("endless", 0.01, endless())
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert (found["failing"]["rows"], found["failing"]["ended"]) == ([{"first": 1}], "MemoryError: out of memory")
    assert found["endless"]["ended"] == "its time was over"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(LowRankError, match="gpu needs an NVIDIA or AMD GPU that PyTorch sees"):
        gpu.run(Options())
