"""hf-lowrank quantize and export --int8: what they print, record, and refuse, on a tiny task."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hf_lowrank.folder.quantizers import QUANTIZERS
from hf_lowrank.folder.saving import read_record
from tests.launches import make_data, make_model
from tests.tiny_task import run

HAS_QUANTIZERS = find_spec(QUANTIZERS["compressed-tensors"].package) is not None


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its data."""
    folder = tmp_path_factory.mktemp("places")
    make_model(folder / "model")
    make_data(folder / "cola")
    return folder


def task(places: Path) -> list[Any]:
    return ["--task", "cola", "--data-dir", places / "cola"]


@pytest.mark.skipif(not HAS_QUANTIZERS, reason="compressed-tensors is not installed")
def test_compress_quantize_and_what_looks_at_it(places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    small, few = tmp_path / "small", tmp_path / "few"
    code, _, error = run(monkeypatch, capfd, "compress", places / "model", *task(places), "--output", small)
    assert code == 0, error
    code, told, error = run(monkeypatch, capfd, "quantize", small, few, "--bits", 4, *task(places))
    assert code == 0, error
    assert "layers of 4 bits" in told
    assert "matthews" in told
    record = read_record(few)
    assert record is not None
    assert record["quantization"]["bits"] == 4
    assert record["scored_on"]["quantized"]["rows"] == 10
    code, scored, _ = run(monkeypatch, capfd, "evaluate", few, *task(places), "--json")
    assert code == 0
    assert f'"score": {record["score_quantized"]}' in scored
    assert run(monkeypatch, capfd, "verify", few)[0] == 0
    code, told, _ = run(monkeypatch, capfd, "inspect", few)
    assert code == 0
    assert "4 bits, weight-only, by compressed-tensors" in told
    assert run(monkeypatch, capfd, "card", few)[0] == 0
    shape = ["--rounds", 1, "--batch", 1, "--length", 8, "--json"]
    timed = [run(monkeypatch, capfd, "bench", folder, *shape) for folder in (few, small)]
    assert not any(code for code, _, _ in timed), timed[0][2]
    of_few, exact = (json.loads(told) for _, told, _ in timed)
    assert "float32, quantized by compressed-tensors, not compiled" in of_few["setup"]
    assert of_few["bytes"]["compressed"] == record["weights_bytes"]
    assert of_few["bytes"]["dense"] == exact["bytes"]["dense"]
    assert of_few["cases"][0]["operations"] == exact["cases"][0]["operations"]
    dense = tmp_path / "dense"
    assert run(monkeypatch, capfd, "quantize", places / "model", dense)[0] == 0
    by_blocks = ["compress", dense, *task(places), "--blockwise", "on"]
    for words in (["compress", few, *task(places)], by_blocks, ["finetune", few, *task(places)]):
        code, _, error = run(monkeypatch, capfd, *words, "--output", tmp_path / "no")
        assert code == 2
        assert "quantized" in error
    for words in (
        ["densify", few, tmp_path / "no"],
        ["export", few, tmp_path / "no.onnx"],
        ["quantize", few, tmp_path / "no"],
    ):
        code, _, error = run(monkeypatch, capfd, *words)
        assert code == 2
        assert "quantized" in error
    assert not list(tmp_path.glob("no*"))


@pytest.mark.skipif(not HAS_QUANTIZERS, reason="compressed-tensors is not installed")
def test_compress_to_bits_at_once(places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    words = ["compress", places / "model", *task(places), "--bits", 8, "--evaluate", "--output", tmp_path / "few"]
    code, told, error = run(monkeypatch, capfd, *words)
    assert code == 0, error
    assert "compressed" in told
    record = read_record(tmp_path / "few")
    assert record is not None
    assert record["quantization"]["rounding"] == "kfac"
    code, told, _ = run(monkeypatch, capfd, "inspect", tmp_path / "few")
    assert "rounded with the moments of kfac" in told
    record = read_record(tmp_path / "few")
    assert record is not None
    assert record["quantization"]["bits"] == 8
    assert "quantization_config" in (tmp_path / "few" / "config.json").read_text()
    assert run(monkeypatch, capfd, "verify", tmp_path / "few")[0] == 0
    words = ["compress", places / "model", *task(places), "--bits", 5, "--output", tmp_path / "no"]
    code, _, error = run(monkeypatch, capfd, *words)
    assert code == 2
    assert "does not quantize to 5 bits" in error


def test_what_cannot_be_done_is_one_line(places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr("hf_lowrank.folder.quantizers.find_spec", lambda name: None)
    expected = {
        ("--bits", 3): "does not quantize to 3 bits",
        ("--library", "gguf"): "unknown library 'gguf'",
        (): 'pip install "hf_lowrank[quantizers]"',
    }
    for options, message in expected.items():
        code, _, error = run(monkeypatch, capfd, "quantize", places / "model", tmp_path / "out", *options)
        assert code == 2
        assert len(error.strip().splitlines()) == 1
        assert message in error
    assert not list(tmp_path.iterdir())


def test_options_of_int8_go_with_it(places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    code, _, error = run(monkeypatch, capfd, "export", places / "model", tmp_path / "out.onnx", "--reduce-range")
    assert code == 2
    assert "--reduce-range and --task go with --int8" in error


@pytest.mark.slow
def test_export_in_int8_says_both_scores(places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    pytest.importorskip("onnxscript")
    words = ["export", places / "model", tmp_path / "out.onnx", "--int8", *task(places)]
    code, told, error = run(monkeypatch, capfd, *words)
    assert code == 0, error
    assert "in float32 →" in told
    assert "cosine 0.9" in told
    assert "matthews" in told
    assert (tmp_path / "out.onnx").is_file()
