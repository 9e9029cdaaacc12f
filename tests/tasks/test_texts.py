"""Texts without labels: from files and lists, for every kind of model; what is told of files that hold none."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering, PreTrainedTokenizerFast

from hf_lowrank import LowRankError, compute_statistics
from hf_lowrank.model.predictions import predict
from hf_lowrank.tasks import load_split
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.tasks.task import Task
from hf_lowrank.tasks.texts import given_texts, read_texts, texts_task
from hf_lowrank.training.evaluate import evaluate
from tests.helpers import bert_config, tiny_bert
from tests.statistics.test_statistics import token_classifier
from tests.tasks.test_kinds import bart as tiny_bart
from tests.tiny_task import WORDS, tiny_tokenizer

TEXTS = [" ".join(WORDS[(n * 7 + k) % 40] for k in range(n % 9 + 2)) for n in range(40)]


def config_of(architecture: str, **changes: Any) -> BertConfig:
    return bert_config(architectures=[architecture], **changes)


@pytest.mark.parametrize(
    ("architecture", "changes", "kind"),
    [
        ("BertForSequenceClassification", {}, "classification"),
        ("LowRankBertForSequenceClassification", {"num_labels": 1}, "regression"),
        ("BertForTokenClassification", {}, "token_classification"),
        ("BertLMHeadModel", {}, "causal_lm"),
        ("BertForMaskedLM", {}, "masked_lm"),
        ("BertModel", {}, "embedding"),
        ("BartForConditionalGeneration", {}, "masked_lm"),
    ],
)
def test_the_kind_is_what_the_model_was_saved_as(architecture: str, changes: dict[str, Any], kind: str) -> None:
    assert texts_task(given_texts(TEXTS), config_of(architecture, **changes)).kind == kind


def test_other_models_are_refused() -> None:
    with pytest.raises(LowRankError, match="a ViTForImageClassification reads more than texts"):
        texts_task(given_texts(TEXTS), config_of("ViTForImageClassification"))
    with pytest.raises(LowRankError, match="a model that marks answers reads pairs of texts"):
        texts_task(given_texts(TEXTS), config_of("BertForQuestionAnswering"))
    with pytest.raises(LowRankError, match="a T5ForConditionalGeneration takes pairs of texts: what it reads, and"):
        texts_task(given_texts(TEXTS), config_of("T5ForConditionalGeneration"))


@pytest.mark.parametrize("labels", ["data", "model"])
def test_an_encoder_decoder_reads_a_text_and_predicts_the_other(labels: str) -> None:
    model = tiny_bart()
    model.config.architectures = ["LowRankBartForConditionalGeneration"]
    task = texts_task(given_texts([(text, text.split()[0]) for text in TEXTS]), model.config)
    assert (task.kind, task.text, task.label) == ("seq2seq", ("text",), "text_pair")
    loader = calibration_loader(model, tiny_tokenizer(), task, batch_size=8, labels=labels)
    measured = compute_statistics(model, loader, ["fisher_rows"], labels=labels, progress=False)
    assert measured.samples == 36
    found = evaluate(model, tiny_tokenizer(), task, progress=False)
    assert found["score"] == pytest.approx(math.exp(found["loss"]))


def test_questions_and_texts_are_enough_to_mark_answers() -> None:
    task = texts_task(given_texts([(text.split()[0], text) for text in TEXTS]), config_of("BertForQuestionAnswering"))
    torch.manual_seed(0)
    model = BertForQuestionAnswering(bert_config())
    loader = calibration_loader(model, tiny_tokenizer(), task, batch_size=8)
    measured = compute_statistics(model, loader, ["fisher_rows"], labels="model", progress=False)
    assert measured.samples == 36  # every tenth is held out
    with pytest.raises(LowRankError, match="returned no loss for a batch"):
        compute_statistics(model, loader, ["fisher_rows"], progress=False)


def test_every_tenth_text_is_held_out_where_there_are_enough() -> None:
    task = texts_task(given_texts(TEXTS), config_of("BertModel"))
    train, held_out = (load_split(task, split, None)["text"] for split in ("train", "validation"))
    assert list(held_out) == TEXTS[9::10]
    assert sorted([*train, *held_out]) == sorted(TEXTS)
    few = texts_task(given_texts(TEXTS[:5]), config_of("BertModel"))
    assert [list(load_split(few, split, None)["text"]) for split in ("train", "validation")] == [TEXTS[:5]] * 2


def test_texts_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\n\nthree\n")
    assert read_texts(tmp_path / "a.txt").rows == (("one two",), ("three",))
    rows = {"sentence": ["a", "b"], "other": ["c", "d"], "label": [1, 0]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}).to_csv(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('{"text": "x", "title": "y"}\n')
    assert read_texts(tmp_path / "a.csv").columns == ("sentence",)
    assert read_texts(tmp_path / "a.jsonl").rows == (("x",),)
    assert read_texts(tmp_path / "a.parquet", ["sentence", "other"]).rows == (("a", "c"), ("b", "d"))
    with pytest.raises(LowRankError, match=r"which column of .*a.parquet holds the texts\? .* sentence, other, label"):
        read_texts(tmp_path / "a.parquet")
    with pytest.raises(LowRankError, match="has no column 'title'; its columns are sentence, other, label"):
        read_texts(tmp_path / "a.parquet", ["title"])
    with pytest.raises(LowRankError, match="holds no texts in label"):
        read_texts(tmp_path / "a.parquet", ["label"])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(LowRankError, match="empty.txt cannot be read: it has no rows"):
        read_texts(tmp_path / "empty.txt")
    with pytest.raises(LowRankError, match="nothing.txt is no file of texts"):
        read_texts(tmp_path / "nothing.txt")


@pytest.mark.parametrize("texts", [[], [1], ["a", ("b", "c")], [("a", "b", "c")]])
def test_lists_that_hold_something_else_are_refused(texts: list[Any]) -> None:
    with pytest.raises(LowRankError, match="texts are a list of texts, or of pairs of texts"):
        given_texts(texts)


def masking_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


@pytest.mark.parametrize("case", ["classes", "number", "pair", "tokens", "masked"])
def test_statistics_of_every_head_need_texts_alone(case: str) -> None:
    torch.manual_seed(0)
    model: Any = {
        "classes": lambda: tiny_bert(num_labels=3),
        "number": lambda: tiny_bert(num_labels=1),
        "pair": lambda: tiny_bert(num_labels=2),
        "tokens": token_classifier,
        "masked": lambda: BertForMaskedLM(bert_config()),
    }[case]()
    model.config.architectures = [type(model).__name__]
    texts = [(text, text) for text in TEXTS] if case == "pair" else TEXTS
    task = texts_task(given_texts(texts), model.config)
    loader = calibration_loader(model, masking_tokenizer(), task, samples=20, batch_size=5, labels="model")
    measured = compute_statistics(model, loader, ["fisher_rows"], labels="model", progress=False)
    assert measured.samples == 20
    if case == "masked":
        assert compute_statistics(model, loader, ["fisher_rows"], progress=False).samples == 20
        return
    with pytest.raises(LowRankError, match="these texts have no labels; take those of the model"):
        compute_statistics(model, loader, ["fisher_rows"], progress=False)
    with pytest.raises(LowRankError, match="texts have no labels to score by"):
        evaluate(model, masking_tokenizer(), task, progress=False)


def test_the_first_pieces_of_words_are_what_counts() -> None:
    """As with words and labels of the data: special tokens and padding are not predictions."""
    model = token_classifier().eval()
    model.config.architectures = ["BertForTokenClassification"]
    task = texts_task(given_texts(TEXTS), model.config)
    batch = next(iter(calibration_loader(model, tiny_tokenizer(), task, samples=8, batch_size=8)))
    assert predict(model, batch).counts.tolist() == (batch["attention_mask"].sum(dim=1) - 2).tolist()


def test_masks_are_the_same_in_every_order() -> None:
    model = BertForMaskedLM(bert_config())
    model.config.architectures = ["BertForMaskedLM"]
    tokenizer = masking_tokenizer()
    rows: list[dict[str, list[int]]] = []
    for seed in (0, 1):
        task = texts_task(given_texts(TEXTS), model.config)
        data: Any = calibration_loader(model, tokenizer, task, seed=seed).dataset
        rows.append(
            {
                str([i if y == -100 else y for i, y in zip(r["input_ids"], r["labels"], strict=True)]): r["labels"]
                for r in data
            }
        )
    assert rows[0] == rows[1]
    for labels in rows[0].values():
        asked = sum(label != -100 for label in labels)
        assert asked == max(1, round(0.15 * (len(labels) - 2)))
        assert labels[0] == labels[-1] == -100


def test_a_task_needs_no_labels_of_the_data_for_drawn_ones(tmp_path: Path) -> None:
    Dataset.from_dict({"sentence": TEXTS}).to_parquet(tmp_path / "train.parquet")
    task = Task("cola", "classification", ("sentence",), "label", ("", None), "matthews", label_names=("a", "b"))
    model = tiny_bert(num_labels=3)  # of another task even
    loader = calibration_loader(model, tiny_tokenizer(), task, tmp_path, samples=10, labels="model")
    assert compute_statistics(model, loader, ["fisher_rows"], labels="model", progress=False).samples == 10
    number = Task("stsb", "regression", ("sentence",), "label", ("", None), "pearson_spearman")
    row: Any = calibration_loader(tiny_bert(num_labels=1), tiny_tokenizer(), number, tmp_path, labels="model").dataset[
        0
    ]
    assert row["labels"] == -math.inf
