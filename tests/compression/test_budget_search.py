"""The search for the smallest good model, profiles of single layers, and sweeps that go on where they were."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, PreTrainedModel, YolosConfig, YolosForObjectDetection

from hf_lowrank import CompressionConfig, LowRankError, compress, compute_statistics
from hf_lowrank.compression.profiling import mean_loss, profile_losses
from hf_lowrank.compression.search import search_smallest
from hf_lowrank.statistics import Statistics
from tests.helpers import bert_config, tiny_bert, tiny_llama, token_ids
from tests.statistics.test_statistics import padded_batch
from tests.tiny_task import run, tiny_tokenizer, write_cola

CONFIG = CompressionConfig("kfac", keep=0.5)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": token_ids(batch=16, length=9), "labels": torch.arange(16) % 2}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Not a fresh one: its classes depend on its input."""
    model = tiny_bert()
    for parameter in model.parameters():
        parameter.data *= 4
    return model


@pytest.fixture(scope="module")
def statistics(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Statistics:
    return compute_statistics(model, [batch], CONFIG.needs, progress=False)


def test_the_smallest_accepted_size_is_found(model: PreTrainedModel, statistics: Statistics) -> None:
    """Where quality is the size itself, the smallest that is accepted is known."""
    before = copy.deepcopy(model.state_dict())
    size = lambda candidate: float(candidate.num_parameters())  # noqa: E731
    limit = 0.6 * model.num_parameters()
    found = search_smallest(model, CONFIG, statistics, size, lambda value: value >= limit, progress=False)
    assert limit <= found.measured == found.model.num_parameters() < limit + 0.02 * model.num_parameters()
    assert found.report.parameters_after == found.measured
    assert len(found.tried) <= 8
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_search_that_cannot_succeed_ends_after_the_largest_candidate(
    model: PreTrainedModel, statistics: Statistics
) -> None:
    measured: list[int] = []

    def measure(candidate: PreTrainedModel) -> float:
        measured.append(candidate.num_parameters())
        return 1.0

    with pytest.raises(LowRankError, match=r"no smaller model is good enough; the largest, keep 0\.990, measured 1"):
        search_smallest(model, CONFIG, statistics, measure, lambda value: value > 1, progress=False)
    assert len(measured) == 1
    assert 0.97 * model.num_parameters() < measured[0] < model.num_parameters()


def test_profiles_are_what_each_layer_loses_alone(
    model: PreTrainedModel, statistics: Statistics, batch: dict[str, torch.Tensor]
) -> None:
    before = copy.deepcopy(model.state_dict())
    profile = profile_losses(model, CONFIG, statistics, [batch], ratios=(0.1, 0.4), progress=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    name = "bert.encoder.layer.0.output.dense"
    assert list(profile[name]) == [3, 13]
    alone = CompressionConfig("kfac", 0.1, "uniform", include=(name,))
    low_rank, _ = compress(copy.deepcopy(model), alone, statistics, progress=False)
    assert profile[name][3] == pytest.approx(mean_loss(low_rank, [batch]) - mean_loss(model, [batch]), abs=1e-6)
    knapsack = CompressionConfig("kfac", keep=0.6, allocation="knapsack")
    _, report = compress(copy.deepcopy(model), knapsack, statistics, progress=False, profile=profile)
    assert set(report.ranks.values()) <= {3, 13}
    assert report.targeted_after <= 0.6 * report.targeted_before
    with pytest.raises(LowRankError, match="the profile has no measured loss"):
        compress(copy.deepcopy(model), knapsack, statistics, progress=False)


def alone(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of batches, each a batch of its own."""
    return [{k: v[n : n + 1] for k, v in batch.items()} for batch in batches for n in range(len(batch["labels"]))]


def test_losses_do_not_depend_on_how_samples_are_put_into_batches() -> None:
    texts = [padded_batch(lengths=lengths) for lengths in ((9, 2, 8), (3, 5))]
    model = tiny_llama()
    assert mean_loss(model, texts) == pytest.approx(mean_loss(model, alone(texts)), rel=1e-6)
    expected = [model(**sample).loss.item() for sample in alone(texts)]
    assert mean_loss(model, texts) == pytest.approx(sum(expected) / 5, rel=1e-6)


def test_losses_with_labels_that_are_lists() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = YolosConfig(**sizes, image_size=[32, 32], patch_size=16, num_detection_tokens=4, num_labels=3)
    model = YolosForObjectDetection(config).eval()
    labels = [{"class_labels": torch.arange(n), "boxes": torch.rand(n, 4) / 4 + 0.3} for n in (1, 3, 2)]
    batch: dict[str, Any] = {"pixel_values": torch.rand(3, 3, 32, 32), "labels": labels}
    expected = sum(model(**sample).loss.item() for sample in alone([batch])) / 3
    assert mean_loss(model, [batch]) == pytest.approx(expected, rel=1e-6)
    found = profile_losses(model, CompressionConfig("svd", keep=0.5), None, [batch], ratios=(0.1,), progress=False)
    assert all(found.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a classifier and one with its data."""
    folder = tmp_path_factory.mktemp("sweep")
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(num_labels=2)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder / "model", write_cola(folder / "data")


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    model, data = trained
    out = tmp_path / "sweep"
    words = ["sweep", model, "--task", "cola", "--data-dir", data, "--output", out, "--samples", "16"]
    words += ["--value", "0.4", "--value", "0.2", "--method", "svd"]
    code, text, _ = run(monkeypatch, capfd, *words)
    assert code == 0
    assert "| svd | uniform | rank_ratio 0.2 |" in text
    first = (out / "results.jsonl").read_text()
    assert len(first.splitlines()) == 3
    with (out / "results.jsonl").open("a") as file:
        file.write('{"method": "kfac", "cut off')
    code, text, _ = run(monkeypatch, capfd, *words, "--method", "kfac", "--allocation", "knapsack", "--json")
    assert code == 0
    records = json.loads(text)["records"]
    assert (out / "results.jsonl").read_text().startswith(first)
    assert [(r["method"], r.get("value")) for r in records] == [
        ("dense", None), ("svd", 0.4), ("svd", 0.2), ("kfac", 0.4), ("kfac", 0.2)
    ]  # fmt: skip
    smaller = [record["parameters"] for record in records]
    assert smaller[0] > smaller[1] > smaller[2]
    for name in ("pareto.png", "loss.png", "summary.md", "statistics-model", "profile-kfac.json"):
        assert (out / name).exists()
    code, _, error = run(monkeypatch, capfd, *words, "--seed", "1")
    assert code == 2
    assert "holds a sweep with seed 0, this one has 1" in error
    other = tmp_path / data.name
    shutil.copytree(data, other)
    shutil.copy(data / "train.parquet", other / "validation.parquet")
    code, _, error = run(monkeypatch, capfd, *[other if word is data else word for word in words])
    assert code == 2
    assert "holds a sweep with validation data '" in error


def test_all_models_of_a_sweep_have_its_layers_ranks_and_form(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    model, data = trained
    out = tmp_path / "sweep"
    words = ["sweep", model, "--task", "cola", "--data-dir", data, "--output", out, "--samples", "16", "--json"]
    words += ["--method", "kfac", "--value", "0.4", "--align", "4", "--form", "interpolative", "--include", "dense"]
    code, text, _ = run(monkeypatch, capfd, *words, "--exclude", "pooler.dense")
    assert code == 0
    _, record = json.loads(text)["records"]
    assert len(record["ranks"]) == 6
    assert all(name.endswith(".dense") and "pooler" not in name for name in record["ranks"])
    assert all(rank is None or rank % 4 == 0 for rank in record["ranks"].values())
    code, _, error = run(monkeypatch, capfd, *words)
    assert code == 2
    assert "holds a sweep with " in error


def test_budgets_and_searches_from_the_command(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    model, data = trained
    words = ["compress", model, "--task", "cola", "--data-dir", data, "--samples", "16", "--json"]
    code, text, _ = run(monkeypatch, capfd, *words, "--output", tmp_path / "a", "--params", "18k", "--align", "2")
    assert code == 0
    record = json.loads(text)
    assert record["parameters_after"] <= 18_000
    assert all(layer["rank"] is None or layer["rank"] % 2 == 0 for layer in record["layers"])
    code, text, _ = run(
        monkeypatch, capfd, *words, "--output", tmp_path / "b", "--max-loss-increase", "0.01", "--allocation", "uniform"
    )
    assert code == 0
    assert json.loads(text)["search"]["tried"]
    for wrong, message in (
        (("--params", "18k", "--keep", "0.5"), "give one budget, not 2: keep, params"),
        (("--keep-score", "0.9", "--keep", "0.5"), "give one budget, not 2: keep, --keep-score"),
        (("--params", "100"), "params 100 cannot be met: it must be between"),
        (("--max-loss-increase", "-9"), "--max-loss-increase must be a number from 0"),
        (("--keep-score", "1.2"), "--keep-score is a share of the dense model's score, in (0, 1]"),
    ):
        code, _, error = run(monkeypatch, capfd, *words, "--output", tmp_path / "c", *wrong)
        assert code == 2
        assert message in error
        assert not (tmp_path / "c").exists()


def test_a_form_that_does_not_fit_is_refused_before_anything_is_measured(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    model, data = trained
    common = [model, "--task", "cola", "--data-dir", data, "--samples", "16", "--include", "word_embeddings"]
    for command in ("compress", "sweep"):
        words = [command, *common, "--form", "interpolative", "--method", "kfac", "--output", tmp_path / command]
        code, _, error = run(monkeypatch, capfd, *words)
        assert code == 2
        assert "the interpolative form is for linear layers" in error
        assert "statistics:" not in error  # the progress bar of the measurement
        assert not (tmp_path / command).exists()
