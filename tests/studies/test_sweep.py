"""A sweep's folder holds results of one model and one set of data, whatever their folders are called."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file

from hf_lowrank import Statistics
from tests.launches import Job, hf_lowrank, make_model
from tests.tiny_task import run, write_cola


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three places with a "model" and "data": two of them the same, but for an embedding, or one row."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("first", "embedding", "row"):
        (folder / name).mkdir()
        make_model(folder / name / "model")
        write_cola(folder / name / "data")
    path = folder / "embedding/model/model.safetensors"
    weights = load_file(path)
    weights["bert.embeddings.word_embeddings.weight"] += torch.tensor(1e-3)
    save_file(weights, path, metadata={"format": "pt"})
    path = folder / "row/data/validation.parquet"
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    rows.map(lambda row, n: {"label": 1 - row["label"] if n == 3 else row["label"]}, with_indices=True).to_parquet(path)
    return folder


def words(place: Path, out: Path) -> list[Any]:
    chosen = ["--method", "svd", "--value", "0.4", "--samples", "8", "--output", out]
    return ["sweep", place / "model", "--task", "cola", "--data-dir", place / "data", *chosen]


def test_another_model_or_data_of_the_same_names_are_refused(
    places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    assert run(monkeypatch, capfd, *words(places / "first", tmp_path))[0] == 0
    results = (tmp_path / "results.jsonl").read_text()
    for place, what in (("embedding", "model weights"), ("row", "validation data")):
        code, _, error = run(monkeypatch, capfd, *words(places / place, tmp_path))
        assert code == 2
        assert f"holds a sweep with {what}" in error
    assert run(monkeypatch, capfd, *words(places / "first", tmp_path))[0] == 0
    assert (tmp_path / "results.jsonl").read_text() == results


@pytest.mark.slow
def test_several_processes_are_refused(places: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job(tmp_path / "job", hf_lowrank, *words(places / "first", out), processes=2)
    assert job.wait() == [2, 2]
    assert "a sweep runs in one process; start it without accelerate launch" in job.printed()
    assert not out.exists()


def test_divergence_and_labels_are_noted(places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    given = [*words(places / "first", tmp_path), "--method", "kfac"]
    code, table, error = run(monkeypatch, capfd, *given, "--labels", "model")
    assert code == 0, error
    dense, svd, kfac = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert "divergence" not in dense
    assert [svd["labels"], kfac["labels"]] == [None, "model"]
    assert [each["divergence"]["count"] for each in (svd, kfac)] == [20, 20]
    assert "KL to dense (nats)" in table
    assert Statistics.load(tmp_path / "statistics-model").labels == "model"
    code, _, error = run(monkeypatch, capfd, *given, "--labels", "data")
    assert code == 2
    assert "holds a sweep with labels 'model', this one has 'data'" in error
    code, _, error = run(monkeypatch, capfd, *given, "--labels", "model", "--no-sequential")
    assert code == 2
    assert "holds a sweep with sequential 'by method', this one has False" in error
