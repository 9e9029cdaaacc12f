"""The generated task is what its description says; the demo saves what it measured. Quality is not asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from hf_lowrank.errors import LowRankError
from hf_lowrank.studies import demo
from hf_lowrank.tasks import encode
from hf_lowrank.training.evaluate import evaluate_rows

WORTHS = {"food": {"food0": 2.0, "food3": -0.5}, "room": {"room1": 9.0}}


@pytest.mark.parametrize(
    ("question", "review", "worth"),
    [
        ("food", "food3 word8 room1 food3 food0", 1.0),
        ("room", "food3 word8 room1 food3 food0", 9.0),
        ("room", "food0 food3", 0.0),
        ("food", "word1 food0", 2.0),
        ("food", "", 0.0),
    ],
)
def test_a_review_is_worth_its_words_about_the_question(question: str, review: str, worth: float) -> None:
    assert demo.worth_of(question, review, WORTHS) == worth


def test_the_data_follow_from_the_seed() -> None:
    worths = demo.make_worths(3)
    rows = demo.make_rows(50, [3, 0], worths, demo.ASPECTS)[:]
    assert rows == demo.make_rows(50, [3, 0], demo.make_worths(3), demo.ASPECTS)[:]
    assert rows != demo.make_rows(50, [3, 1], worths, demo.ASPECTS)[:]
    assert worths != demo.make_worths(4)


def test_ratings_are_worths_plus_noise() -> None:
    worths = demo.make_worths(0)
    rows = demo.make_rows(2_000, 0, worths, demo.ASKED)
    noise = [row["rating"] - demo.worth_of(row["question"], row["review"], worths) for row in rows]
    assert np.std(noise) == pytest.approx(demo.NOISE, rel=0.1)
    assert abs(np.mean(noise)) < 0.05
    assert set(rows["question"]) == set(demo.ASKED)


def test_common_words_are_common_and_rare_words_occur() -> None:
    rows = demo.make_rows(5_000, 0, demo.make_worths(0), demo.ASPECTS)
    words = " ".join(rows["review"]).split()
    rarest = words.count(f"food{demo.WORDS_PER_ASPECT - 1}")
    assert words.count("food0") > 4 * rarest > 0


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = demo.make_tokenizer()
    row = demo.make_rows(1, 0, demo.make_worths(0), demo.ASPECTS)[0]
    encoded = tokenizer(row["question"], row["review"])
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    assert tokenizer.decode(encoded["input_ids"]) == f"[CLS] {row['question']} [SEP] {row['review']} [SEP]"
    assert encoded["token_type_ids"] == [0] * 3 + [1] * (len(encoded["input_ids"]) - 3)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"PRETRAINING_ROWS": 320, "TRAIN_ROWS": 160, "VALIDATION_ROWS": 64, "FISHER_ROWS": 32}
    for name, value in {**sizes, "HIDDEN": 16}.items():
        monkeypatch.setattr(demo, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_the_best_model_loads_back_with_its_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = demo.run_demo(tmp_path / "best", seed=5)
    assert capsys.readouterr().out == ""  # stdout is for the result
    assert json.loads(json.dumps(record)) == record
    assert [(run["rank_ratio"], run["method"]) for run in record["runs"]] == [
        (ratio, method) for ratio in demo.RANK_RATIOS for method in demo.METHODS
    ]
    assert all(run["parameters"] < record["dense"]["parameters"] for run in record["runs"])
    loaded, tokenizer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best"), demo.make_tokenizer()
    rows = demo.make_rows(64, [5, 2], demo.make_worths(5), demo.ASKED)
    score = evaluate_rows(loaded, tokenizer, demo.TASK, encode(rows, demo.TASK, tokenizer, loaded.config))["score"]
    assert score == max(run["score"] for run in record["runs"])
    assert loaded.num_parameters() in {run["parameters"] for run in record["runs"] if run["score"] == score}


@pytest.mark.usefixtures("tiny")
def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(demo, "make_tokenizer", lambda: pytest.fail("work was begun"))
    with pytest.raises(LowRankError, match="exists"):
        demo.run_demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_table_shows_every_run() -> None:
    runs = [
        {"method": method, "rank_ratio": ratio, "score": 10.0 * n + m, "parameters": 700 + n}
        for n, ratio in enumerate(demo.RANK_RATIOS)
        for m, method in enumerate(demo.METHODS)
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(demo.results_table({"dense": {"score": 90.04, "parameters": 1_000}, "runs": runs}))
    text = captured.get()
    assert "dense 90.0" in text
    assert all(f"{run['score']:.1f}" in text for run in runs)
    assert "702 (70%)" in text
