"""The flow in one object: what it does is what its parts do by hand, and what the command does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_lowrank import CompressionConfig, LowRankError, Pipeline, compress, compute_statistics
from hf_lowrank.folder.loading import load_model
from hf_lowrank.folder.saving import read_record
from hf_lowrank.tasks import get_task
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.evaluate import evaluate
from tests.helpers import bert_config
from tests.tiny_task import run, tiny_tokenizer, write_cola


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny classifier, `model`, and `data` for it."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    names = {"id2label": {0: "unacceptable", 1: "acceptable"}, "label2id": {"unacceptable": 0, "acceptable": 1}}
    BertForSequenceClassification(bert_config(**names)).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    write_cola(place / "data")
    return place


def loaded(place: Path, **options: Any) -> Pipeline:
    return Pipeline.load(str(place / "model"), "cola", place / "data", **options)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(("allocation", "sequential"), [("greedy", False), ("knapsack", False), ("greedy", True)])
def test_it_compresses_as_its_parts_do(place: Path, allocation: str, sequential: bool) -> None:
    pipeline = loaded(place, samples=24, seed=3)
    report = pipeline.compress(keep=0.5, allocation=allocation, sequential=sequential)
    again = loaded(place, samples=24, seed=3)
    config = CompressionConfig(keep=0.5, allocation=allocation, sequential=sequential)
    loader = calibration_loader(again.model, again.tokenizer, get_task("cola"), place / "data", 24, 16, 3, "model")
    statistics = compute_statistics(again.model, loader, config.needs, origin=again.origin, labels="model")
    profile = again.profile(config, statistics)
    assert (profile is None) == (allocation == "greedy")
    by_hand, expected = compress(again.model, config, statistics, profile=profile, batches=loader)
    assert equal(weights(pipeline.model), weights(by_hand))
    assert report.parameters_after == expected.parameters_after < expected.parameters_before


def test_what_it_saves_scores_the_same_and_is_what_the_command_saves(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = loaded(place, samples=24)
    assert pipeline.compress(rank_ratio=0.4).settings["sequential"]
    pipeline.save(tmp_path / "small", note="by hand")
    task = get_task("cola")
    model, tokenizer = load_model(str(tmp_path / "small"), task)
    assert evaluate(model, tokenizer, task, place / "data") == pipeline.score()
    record = read_record(tmp_path / "small") or {}
    assert (record["base_model"], record["task"], record["data"], record["note"]) == (
        "model",
        "cola",
        "data",
        "by hand",
    )
    words = ["compress", place / "model", "--task", "cola", "--data-dir", place / "data", "--rank-ratio", "0.4"]
    code, _, err = run(monkeypatch, capfd, *words, "--samples", "24", "--output", tmp_path / "commanded")
    assert code == 0, err
    commanded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "commanded")
    assert equal(weights(model), weights(commanded))


def test_a_method_without_statistics_needs_no_training_rows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = loaded(place)
    monkeypatch.setattr(pipeline, "rows", lambda *args: pytest.fail("rows were read"))
    assert pipeline.compress(method="svd", rank_ratio=0.3).layers


def test_what_is_wrong_is_said(place: Path, tmp_path: Path) -> None:
    pipeline = loaded(place)
    with pytest.raises(LowRankError, match="call compress first"):
        pipeline.save(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(LowRankError, match="a config or settings, not both: keep"):
        pipeline.compress(CompressionConfig(), keep=0.5)
    with pytest.raises(LowRankError, match="unknown task 'stbs'"):
        Pipeline.load(str(place / "model"), "stbs")
