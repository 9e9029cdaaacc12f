"""Texts without labels on the command line: from a file to a compressed model, compared with the dense one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertModel

from hf_lowrank import LowRankError, Statistics
from hf_lowrank.pipeline import Pipeline
from tests.helpers import bert_config
from tests.launches import make_data, make_model
from tests.tiny_task import WORDS, run, tiny_tokenizer

TEXTS = [" ".join(WORDS[(n * 7 + k) % 40] for k in range(n % 9 + 2)) for n in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny classifier, `model`, its `data`, a tiny `encoder`, and texts."""
    place = tmp_path_factory.mktemp("texts")
    make_model(place / "model", initializer_range=0.3)  # for outputs that depend on the inputs
    make_data(place / "data")
    torch.manual_seed(0)
    BertModel(bert_config(initializer_range=0.3)).save_pretrained(place / "encoder")
    tiny_tokenizer().save_pretrained(place / "encoder")
    (place / "texts.txt").write_text("\n".join(TEXTS))
    return place


@pytest.mark.parametrize("model", ["model", "encoder"])
def test_a_file_of_texts_is_enough(
    model: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["compress", place / model, "--texts", place / "texts.txt", "--output", tmp_path / "small"]
    code, out, error = run(monkeypatch, capfd, *words, "--samples", 16, "--evaluate", "--json")
    assert code == 0, error
    record = json.loads(out)
    assert record["statistics"]["labels"] == "model"
    assert (record["statistics"]["samples"], record["data"]) == (16, "texts.txt")
    found = record["divergence"]["compressed"]
    assert found["mean"] > 0
    assert ("cosine" in found) == (model == "encoder")
    assert found["measure"] in (tmp_path / "small/README.md").read_text()
    assert "without their labels (by what the model itself expects)" in (tmp_path / "small/README.md").read_text()
    compared = ["evaluate", tmp_path / "small", "--texts", place / "texts.txt", "--against", place / model, "--json"]
    code, out, error = run(monkeypatch, capfd, *compared)
    assert code == 0, error
    again = json.loads(out)["divergence"]
    assert again["mean"] == pytest.approx(found["mean"], rel=1e-3)
    assert json.loads(out)["scored_on"]["rows"] == 4


def test_a_score_and_the_divergence_stand_side_by_side(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    task: list[Any] = ["--task", "cola", "--data-dir", place / "data"]
    words = ["compress", place / "model", *task, "--output", tmp_path / "small", "--samples", 16, "--evaluate"]
    code, out, error = run(monkeypatch, capfd, *words, "--labels", "model")
    assert code == 0, error
    assert "matthews" in out
    assert re.search(r"^KL to dense \(nats\) \S+ ± \S+$", out, re.MULTILINE)
    code, out, error = run(monkeypatch, capfd, "evaluate", tmp_path / "small", *task, "--against", place / "model")
    assert code == 0, error
    assert "(score)" in out
    assert "KL to dense (nats)" in out


def test_statistics_of_texts_are_by_the_models_labels_and_stay_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["statistics", place / "model", "--texts", place / "texts.txt", "--output", tmp_path / "statistics"]
    assert run(monkeypatch, capfd, *words)[0] == 0
    assert Statistics.load(tmp_path / "statistics").labels == "model"
    task = ["--task", "cola", "--data-dir", place / "data", "--statistics", tmp_path / "statistics"]
    words = ["compress", place / "model", *task, "--output", tmp_path / "small"]
    code, _, error = run(monkeypatch, capfd, *words, "--labels", "data")
    assert code == 2
    assert "these statistics were measured with the labels of the model, not of the data" in error
    assert run(monkeypatch, capfd, *words)[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compress", "MODEL", "--output", "OUT"], "compress needs a --task or --texts"),
        (["compress", "MODEL", "--task", "cola", "--texts", "TEXTS", "--output", "OUT"], "or --texts, not both"),
        (["compress", "MODEL", "--texts", "TEXTS", "--labels", "data", "--output", "OUT"], "texts have no labels"),
        (["compress", "MODEL", "--texts", "TEXTS", "--labels", "mine", "--output", "OUT"], "there are data, model"),
        (["compress", "MODEL", "--texts", "nothing.txt", "--output", "OUT"], "nothing.txt is no file of texts"),
        (["compress", "MODEL", "--texts", "TEXTS", "--keep-score", "0.9", "--output", "OUT"], "have no labels"),
        (["statistics", "MODEL", "--output", "OUT"], "statistics needs a --task or --texts"),
        (["evaluate", "MODEL", "--texts", "TEXTS"], "evaluate needs a --task to score on, or --texts and --against"),
    ],
)
def test_what_is_missing_or_too_much_is_said(
    words: list[str],
    said: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    paths = {"MODEL": place / "model", "TEXTS": place / "texts.txt", "OUT": tmp_path / "out"}
    code, _, error = run(monkeypatch, capfd, *(paths.get(word, word) for word in words))
    assert code == 2
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_list_of_texts_will_do(place: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(str(place / "model"), texts=TEXTS, samples=16)
    dense = AutoModelForSequenceClassification.from_pretrained(place / "model")
    assert pipeline.divergence(dense).mean == pytest.approx(0, abs=1e-6)
    pipeline.compress(keep=0.3)
    assert pipeline.divergence(dense).mean > 1e-6
    pipeline.save(tmp_path / "small")
    with pytest.raises(LowRankError, match="texts have no labels to score by"):
        pipeline.score()
    with pytest.raises(LowRankError, match="give a task and its data, or texts, not both"):
        Pipeline.load(str(place / "model"), "cola", texts=TEXTS)
