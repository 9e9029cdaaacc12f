"""The commands on a model that was compressed before: they take it as a whole, and speak of the dense original."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_lowrank import CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.model.weights import model_digest
from tests.helpers import outputs, tiny_bert, tiny_llama
from tests.launches import Job, hf_lowrank, make_data, make_model
from tests.statistics.test_statistics import padded_batch
from tests.tiny_task import run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an `original`, the model `first` that was made of half its targeted parameters, and `data`."""
    folder = tmp_path_factory.mktemp("again")
    make_model(folder / "original", initializer_range=0.3)
    make_data(folder / "data")
    Job(folder / "job", hf_lowrank, "compress", folder / "original", *task(folder), "--keep", 0.5, "--evaluate",
        "--output", folder / "first").done()  # fmt: skip
    return folder


def task(place: Path) -> list[Any]:
    return ["--task", "cola", "--data-dir", place / "data"]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compression.json").read_text())


def test_compress_and_inspect_speak_of_the_original(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*task(place), "--keep", "0.3", "--evaluate", "--output", tmp_path / "second"]
    code, out, err = run(monkeypatch, capfd, "compress", place / "first", *words)
    assert code == 0, err
    first, second = record_of(place / "first"), record_of(tmp_path / "second")
    assert second["base_model"] == "original"
    assert second["parameters_before"] == first["parameters_before"]
    assert 0.28 < second["targeted_after"] / first["targeted_before"] <= 0.3
    assert second["score_dense"] == first["score_dense"]
    assert second["score_given"] == first["score_compressed"]
    assert [step["settings"]["keep"] for step in second["earlier"]] == [0.5]
    assert "compressed before by kfac, keep 0.5, to" in out
    assert f"{second['score_given']:.2f} given → {second['score_compressed']:.2f} compressed" in out
    code, out, err = run(monkeypatch, capfd, "inspect", tmp_path / "second")
    assert code == 0, err
    assert "compressed before by kfac, keep 0.5, to" in out
    assert "made from original for cola by kfac, keep 0.3" in out
    assert f"of the dense model's {first['parameters_before']:,}" in out


@pytest.mark.slow
def test_two_processes_make_what_one_does(place: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        words = ["compress", place / "first", *task(place), "--keep", 0.3, "--no-sequential"]
        words += ["--output", tmp_path / str(processes)]
        Job(tmp_path / f"job-{processes}", hf_lowrank, *words, processes=processes).done()
    one, two = (record_of(tmp_path / str(processes)) for processes in (1, 2))
    assert [(layer["name"], layer["rank"]) for layer in one["layers"]] == [
        (layer["name"], layer["rank"]) for layer in two["layers"]
    ]
    assert one["earlier"] == two["earlier"]
    weights = [load_file(tmp_path / str(processes) / "model.safetensors") for processes in (1, 2)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        if name.endswith(".up.bias"):  # which holds the mean's change
            torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)
        elif not name.endswith((".up.weight", ".down.weight")):
            assert torch.equal(weights[0][name], weights[1][name])
    for name in [name.removesuffix(".up.weight") for name in weights[0] if name.endswith(".up.weight")]:
        products = [part[f"{name}.up.weight"] @ part[f"{name}.down.weight"] for part in weights]
        torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4)


def test_a_sweep_counts_against_the_original(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--method", "svd", "--budget", "keep", "--value", "0.5", "--value", "0.3", "--output", tmp_path / "sweep"]
    code, out, err = run(monkeypatch, capfd, "sweep", place / "first", *task(place), *chosen)
    assert code == 0, err
    lines = (tmp_path / "sweep/results.jsonl").read_text().splitlines()
    given, same, smaller = map(json.loads, lines)
    first = record_of(place / "first")
    assert given["method"] == "given"
    assert (given["parameters"], given["parameters_dense"]) == (first["parameters_after"], first["parameters_before"])
    assert given["targeted"] == pytest.approx(first["targeted_after"] / first["targeted_before"])
    assert "would leave every layer as it is" in same["impossible"]
    assert 0.2 < smaller["targeted"] <= 0.3  # by whole ranks of layers that have different ones
    assert "| given |" in out


@pytest.mark.slow
def test_an_analysis_is_of_whole_weights(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--method", "svd", "--groups", "2", "--output", tmp_path / "analysis"]
    code, _, err = run(monkeypatch, capfd, "analyze", place / "first", *task(place), *chosen, "--rank-ratio", "0.25")
    assert code == 0, err
    found = json.loads((tmp_path / "analysis/analysis.json").read_text())
    ranks = {layer["name"]: layer["rank"] for layer in record_of(place / "first")["layers"]}
    assert {layer["name"] for layer in found["layers"]} == set(ranks)
    for layer in found["layers"]:
        whole = layer["out_features"] * layer["in_features"]
        assert layer["parameters_saved"] == whole - 8 * (layer["out_features"] + layer["in_features"])
        if ranks[layer["name"]] is not None and ranks[layer["name"]] <= 8:
            assert layer["methods"]["svd"]["reconstruction_error"] < 1e-3  # there is nothing more to discard


def test_offloaded_factors_come_are_solved_and_leave() -> None:
    def first() -> Any:
        return compress(tiny_bert(), CompressionConfig("svd", 0.4), progress=False)[0]

    model = cpu_offload(first(), torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    batches = [padded_batch(torch.tensor([0, 1]), lengths=(9, 8))]
    statistics = compute_statistics(model, batches, ["fisher"], progress=False)
    config = CompressionConfig("tfwsvd", 0.2)
    compressed, report = compress(model, config, statistics, progress=False)
    plain, expected = compress(first(), config, statistics, progress=False)
    assert report.ranks == expected.ranks
    assert {parameter.device.type for parameter in compressed.parameters()} == {"meta"}
    assert model_digest(compressed) == model_digest(plain)
    torch.testing.assert_close(outputs(compressed), outputs(plain), rtol=1e-5, atol=1e-6)


def measure_sharded(folder: Path) -> None:
    """Statistics of a compressed model that is sharded over the processes, the batches divided among them."""
    rank = torch.distributed.get_rank()
    model, _ = compress(tiny_llama(), CompressionConfig("svd", 0.4), progress=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    lengths = ((9, 7), (8, 3))[rank]
    measured = compute_statistics(model, [padded_batch(lengths=lengths)], ["fisher_rows"], progress=False)
    if rank == 0:
        measured.save(folder)


def test_a_sharded_compressed_model_is_measured_where_it_is(tmp_path: Path) -> None:
    Job(tmp_path / "job", measure_sharded, tmp_path / "measured", processes=2).done()
    model, _ = compress(tiny_llama(), CompressionConfig("svd", 0.4), progress=False)
    batches = [padded_batch(lengths=lengths) for lengths in ((9, 7), (8, 3))]
    expected = compute_statistics(model, batches, ["fisher_rows"], progress=False)
    found = Statistics.load(tmp_path / "measured")
    assert found.weights == expected.weights
    for name, total in expected.sums["fisher_rows"].items():
        torch.testing.assert_close(found.sums["fisher_rows"][name], total, rtol=1e-3, atol=1e-6)
