"""Every kind of task from its data to statistics and a score: against naive gradients, and against answers by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_lowrank import LowRankError, compute_fisher, compute_statistics
from hf_lowrank.jobs.progress import say_once
from hf_lowrank.model.predictions import TARGETS, divergences, predict
from hf_lowrank.model.targets import find_targets
from hf_lowrank.tasks import Task, collator, encode, get_task, load_split, load_validation, sequences
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.tasks.metrics import squad
from hf_lowrank.tasks.questions import answers_of, best_spans, unfolded
from hf_lowrank.training.distillation import Distillation
from hf_lowrank.training.evaluate import evaluate, predict_rows, score_predictions
from hf_lowrank.training.readers import Predictions
from tests.helpers import bert_config, modules_of, tiny_bert
from tests.tiny_task import WORDS, tiny_tokenizer

ROWS = 9


def sentence(number: int, length: int = 6) -> str:
    return " ".join(WORDS[(number * 7 + k) % 40] for k in range(length))


def question_rows() -> list[dict[str, Any]]:
    """A question names a word, and the answer is the word behind it; one in four has no answer."""
    rows = []
    for n in range(ROWS):
        words = sentence(n, 14).split()
        asked, answer, start = words[4], words[5], len(" ".join(words[:5])) + 1
        known = {"text": [answer], "answer_start": [start]} if n % 4 else {"text": [], "answer_start": []}
        rows.append({"query": f"{asked} w39", "passage": " ".join(words), "answers": known})
    return rows


DATA: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "fill-mask": lambda: [{"id": str(n), "sentence": sentence(n, n + 2)} for n in range(ROWS)],
    "question-answering": question_rows,
    "multi-label": lambda: [
        {"review": sentence(n, n + 2), "tags": [tag for k, tag in enumerate(("bad", "good", "old")) if n >> k & 1]}
        for n in range(ROWS)
    ],
    "summarization": lambda: [
        {"article": sentence(n, n + 4), "highlights": sentence(n, n % 3 + 1)} for n in range(ROWS)
    ],
}


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    sizes |= {
        f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("ffn_dim", 64), ("attention_heads", 4))
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3, "vocab_size": 64}
    return BartForConditionalGeneration(BartConfig(**sizes, **tokens, forced_eos_token_id=3, init_std=0.3)).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "fill-mask": lambda: BertForMaskedLM(bert_config(initializer_range=0.3)).eval(),
    "question-answering": lambda: BertForQuestionAnswering(bert_config(initializer_range=0.3)).eval(),
    "multi-label": lambda: tiny_bert(num_labels=3, problem_type="multi_label_classification", initializer_range=0.3),
    "summarization": bart,
}


def masking_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "w39"
    return tokenizer


def written(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        lines = "".join(json.dumps(row) + "\n" for row in DATA[name]())
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


def task_and_model(folder: Path, name: str) -> tuple[Task, PreTrainedModel]:
    torch.manual_seed(0)
    limit = 16 if name == "question-answering" else None
    return get_task(name, limit, data_dir=written(folder, name)), MODELS[name]()


def alone(batch: dict[str, Any], number: int) -> dict[str, Any]:
    """A sample of a batch without its padding."""
    length = int(batch["attention_mask"][number].sum())
    sample = {key: value[number : number + 1] for key, value in batch.items()}
    return {
        key: value[:, :length] if value.shape == batch["attention_mask"][:1].shape and key != "labels" else value
        for key, value in sample.items()
    }


def naive_fisher(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Σ_n (∂ loss_n / ∂ W)² by the model's own loss, one unpadded sample at a time."""
    targets = modules_of(find_targets(model))
    total = {name: torch.zeros(module.weight.shape) for name, module in targets.items()}
    for n in range(len(batch["input_ids"])):
        sample = alone(batch, n)
        if sample.get("labels") is not None and sample["labels"].shape == batch["input_ids"][:1].shape:
            sample["labels"] = sample["labels"][:, : sample["input_ids"].shape[1]]
        model.zero_grad()
        model(**sample).loss.backward()
        for name, module in targets.items():
            total[name] += module.weight.grad**2
    return total


def test_squads_own_files_are_read_as_rows(tmp_path: Path) -> None:
    rows = question_rows()
    asked = [
        {"id": str(n), "question": row["query"], "is_impossible": not row["answers"]["text"]}
        | {"answers": [{"text": t, "answer_start": a} for t, a in zip(*row["answers"].values(), strict=True)]}
        for n, row in enumerate(rows)
    ]
    asked[0]["plausible_answers"] = [{"text": "w1", "answer_start": 0}]
    paragraphs = [{"context": row["passage"], "qas": [question]} for row, question in zip(rows, asked, strict=True)]
    articles = [{"title": "a", "paragraphs": paragraphs[:3]}, {"title": "b", "paragraphs": paragraphs[3:]}]
    (tmp_path / "train.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    flat = get_task("question-answering", data_dir=written(tmp_path / "flat", "question-answering"))
    nested = get_task("question-answering", data_dir=tmp_path)
    known, found = load_split(flat, "train", tmp_path / "flat"), load_split(nested, "train", tmp_path)
    assert (found["context"], found["question"]) == (known["passage"], known["query"])
    assert [{**row} for row in found["answers"]] == [{**row} for row in known["answers"]]
    del paragraphs[4]["context"]
    (tmp_path / "train.json").write_text(json.dumps({"data": articles}))
    with pytest.raises(LowRankError, match="nested as SQuAD's, but not all of them: "):
        get_task("question-answering", data_dir=tmp_path)


@pytest.mark.parametrize("values", [[1, 2], ["a", "b"], [["a"], None]])
def test_another_column_called_data_is_left_alone(values: list[Any]) -> None:
    rows = Dataset.from_dict({"data": values, "question": ["q", "r"]})
    assert unfolded(rows) is rows


@pytest.mark.parametrize("name", DATA)
def test_fisher_is_that_of_a_naive_loop_over_samples(tmp_path: Path, name: str) -> None:
    task, model = task_and_model(tmp_path, name)
    loader = calibration_loader(model, masking_tokenizer(), task, tmp_path, batch_size=64)
    expected = naive_fisher(model, next(iter(loader)))
    measured = compute_fisher(model, loader, progress=False)
    for layer, total in expected.items():
        found = measured.mean("fisher", layer) * measured.samples
        torch.testing.assert_close(found, total, rtol=2e-4, atol=1e-6 * float(total.max()))


@pytest.mark.parametrize("name", DATA)
def test_drawn_labels_need_none_of_the_data(tmp_path: Path, name: str) -> None:
    task, model = task_and_model(tmp_path, name)
    tokenizer = masking_tokenizer()
    rows = [calibration_loader(model, tokenizer, task, tmp_path, batch_size=size, labels="model") for size in (4, 1)]
    known = {key for batch in rows[0] for key in batch} & {*TARGETS}
    assert known <= {"labels"}
    layer = list(find_targets(model))[-1]
    several, single = (compute_statistics(model, found, ["fisher"], labels="model", progress=False) for found in rows)
    torch.testing.assert_close(several.mean("fisher", layer), single.mean("fisher", layer), rtol=1e-3, atol=1e-9)
    assert float(several.mean("fisher", layer).sum()) > 0


# --- columns ---


def test_columns_are_found_by_type_and_name(tmp_path: Path, capfd: Any) -> None:
    say_once.cache_clear()
    tasks = {name: get_task(name, data_dir=written(tmp_path, name)) for name in DATA}
    assert {name: (*task.text, task.label) for name, task in tasks.items()} == {
        "fill-mask": ("sentence", None),
        "question-answering": ("query", "passage", "answers"),
        "multi-label": ("review", "tags"),
        "summarization": ("article", "highlights"),
    }
    assert tasks["multi-label"].label_names == ("bad", "good", "old")
    assert "columns of multi-label: text = review, labels = tags\n" in capfd.readouterr().err


def test_translations_have_a_column_for_each_language(tmp_path: Path) -> None:
    row = json.dumps({"id": "1", "translation": {"de": "ein Haus", "en": "a house"}})
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(f"{row}\n{row}\n")
    columns: dict[str, Any] = {"text_columns": ["translation.de"], "label_column": "translation.en"}
    task = get_task("translation", data_dir=tmp_path, **columns)
    assert load_split(task, "train", tmp_path)["translation.de"][0] == "ein Haus"


@pytest.mark.parametrize(
    ("name", "row", "given", "message"),
    [
        (
            "fill-mask",
            {"a": "x", "b": "y"},
            {},
            "does not find text: several columns fit; name it in text_columns",
        ),
        ("question-answering", {"question": "x", "context": "y"}, {}, "does not find answers: no column fits"),
        (
            "multi-label",
            {"text": "x", "labels": "y"},
            {},
            "does not find labels: no column fits; .* label_column",
        ),
        ("multi-label", {"text": "x", "labels": ["y"]}, {}, "holds 1 different labels"),
        ("summarization", {"text": "x", "sum": "y"}, {"label_column": "summary"}, "'summary', which is not there"),
        ("summarization", {"text": 1, "summary": "y"}, {"text_columns": ["text"]}, "'text', which is of another type"),
        ("image-classification", {"text": "x", "label": 1}, {}, "does not find image: no column fits"),
        ("fill-mask", {"text": "x"}, {"label_column": "text"}, "fill-mask has no labels"),
        ("fill-mask", {"text": "x"}, {"text_columns": ["text", "b"]}, r"reads 1 columns \(text\), not 2"),
    ],
)
def test_columns_that_cannot_be_told_are_named(
    tmp_path: Path, name: str, row: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(LowRankError, match=message):
        get_task(name, data_dir=tmp_path, **given)


def test_data_must_be_given_once() -> None:
    with pytest.raises(LowRankError, match="fill-mask has no data of its own"):
        get_task("fill-mask")
    with pytest.raises(LowRankError, match="not both"):
        get_task("fill-mask", data_dir=Path(), dataset="squad")
    with pytest.raises(LowRankError, match="cola is the data set nyu-mll/glue"):
        get_task("cola", dataset="squad")


def test_a_data_set_in_place_of_a_folder_is_validated_on_what_it_holds_out(tmp_path: Path) -> None:
    written(tmp_path, "fill-mask")
    (tmp_path / "validation.jsonl").rename(tmp_path / "test.jsonl")
    task = get_task("fill-mask", dataset=str(tmp_path))
    assert task.validation == ("test",)
    assert len(load_split(task, "test", None)) == ROWS
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(LowRankError, match="has the splits train; it takes train, and validation or test"):
        get_task("fill-mask", dataset=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "multi-label",
            {"text": "w1", "labels": ["bad", "bad"]},
            "the labels that apply there, each of them once",
        ),
        (
            "question-answering",
            {"question": "w1", "context": "w2", "answers": {"text": ["w2"], "answer_start": []}},
            "equally",
        ),
        ("summarization", {"document": "w1", "summary": None}, "summarization needs a text there"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    whole = {**row, "labels": ["bad", "good"], "summary": "w1"} | {"answers": {"text": ["w2"], "answer_start": [0]}}
    lines = [json.dumps({key: value for key, value in each.items() if key in row}) for each in (whole, row)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    config = bert_config(num_labels=2, problem_type="multi_label_classification")
    with pytest.raises(LowRankError, match=message):
        encode(load_split(task := get_task(name, data_dir=tmp_path), "train", tmp_path), task, tiny_tokenizer(), config)


# --- scores ---


@torch.no_grad()
def test_masked_tokens_have_a_perplexity_and_an_accuracy(tmp_path: Path) -> None:
    task, model = task_and_model(tmp_path, "fill-mask")
    tokenizer = masking_tokenizer()
    (rows,) = load_validation(task, tmp_path, tokenizer, model.config)
    losses, hits = [], []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        kept = torch.tensor(row["labels"]) != -100
        losses.append(F.cross_entropy(logits[kept], torch.tensor(row["labels"])[kept], reduction="none"))
        hits.append(logits[kept].argmax(-1) == torch.tensor(row["labels"])[kept])
    found = evaluate(model, tokenizer, task, tmp_path, progress=False)
    assert found["score"] == found["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert found["accuracy"] == pytest.approx(100 * float(torch.cat(hits).float().mean()))


def test_an_answer_is_the_likeliest_of_all_windows(tmp_path: Path) -> None:
    """A model whose marks are where the answer is finds it in whatever window, and nothing where there is none."""
    task, model = task_and_model(tmp_path, "question-answering")
    tokenizer = masking_tokenizer()
    (rows,) = load_validation(task, tmp_path, tokenizer, model.config)
    assert len(rows) > ROWS  # windows
    spans, known = [], []
    for row in rows:
        logits = torch.zeros(1, 2, len(row["input_ids"]))
        inside = row["start_positions"] > 0
        logits[0, 0, row["start_positions"]] = logits[0, 1, row["end_positions"]] = 9.0 if inside else 5.0
        spans += best_spans(logits, {key: [value] for key, value in row.items()})
        known.append(row["known_answers"])
    predicted, right = answers_of(spans, known)
    assert len(predicted) == ROWS
    assert [[text] if text else [] for text in predicted] == right
    assert squad(predicted, right) == {"exact_match": 100.0, "squad_f1": 100.0}


def test_marks_stay_where_they_are_whatever_side_is_padded(tmp_path: Path) -> None:
    task, model = task_and_model(tmp_path, "question-answering")
    tokenizer = masking_tokenizer()
    tokenizer.padding_side = "left"
    (rows,) = load_validation(task, tmp_path, tokenizer, model.config)
    batch = collator(task, tokenizer)([rows[0], rows[-1]])
    assert batch["start_positions"].tolist() == [rows[0]["start_positions"], rows[-1]["start_positions"]]
    assert batch["input_ids"][0, : len(rows[0]["input_ids"])].tolist() == rows[0]["input_ids"]
    assert len(rows[0]["input_ids"]) < batch["input_ids"].shape[1]


def test_a_question_that_leaves_no_room_is_named(tmp_path: Path) -> None:
    row = {"question": sentence(0, 10), "context": sentence(1, 30), "answers": {"text": [], "answer_start": []}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    task = get_task("question-answering", 16, data_dir=tmp_path)
    with pytest.raises(LowRankError, match="is 10 tokens long, which leaves too little of 16 to its text"):
        encode(load_split(task, "train", tmp_path), task, tiny_tokenizer(), bert_config())


def test_answers_are_compared_as_squad_does() -> None:
    assert squad(["a big dog!", "cat", "x"], [["Dog", "the big dog"], ["cat nap"], []]) == pytest.approx(
        {"exact_match": 100 / 3, "squad_f1": 100 * (1 + 2 / 3 + 0) / 3}
    )


def test_several_labels_are_scored_by_those_of_the_data(tmp_path: Path) -> None:
    """The model has them in another order."""
    task, model = task_and_model(tmp_path, "multi-label")
    model.config.id2label = {0: "old", 1: "bad", 2: "good"}
    tokenizer = masking_tokenizer()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([-1.0, 1.0, -1.0]))  # always bad, and nothing else
    found = evaluate(model, tokenizer, task, tmp_path, progress=False)
    right = [row["tags"] for row in DATA["multi-label"]()]
    hits, all_right = sum("bad" in tags for tags in right), sum(map(len, right))
    assert found["score"] == pytest.approx(100 * 2 * hits / (ROWS + all_right))
    assert found["exact_match"] == pytest.approx(100 * sum(tags == ["bad"] for tags in right) / ROWS)


@torch.no_grad()
def test_a_written_text_is_scored_by_rouge_or_by_its_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model = task_and_model(tmp_path, "summarization")
    tokenizer = masking_tokenizer()
    (rows,) = load_validation(task, tmp_path, tokenizer, model.config)
    found = predict_rows(model, tokenizer, task, rows, 4, progress=False)
    assert sorted(found.labels) == sorted(row["highlights"] for row in DATA["summarization"]())
    assert score_predictions(Predictions(found.labels, found.labels, found.losses), task, model.config)["score"] == 100
    monkeypatch.setattr(sequences, "find_spec", lambda name: None)
    bare = get_task("summarization", data_dir=tmp_path)
    scored = evaluate(model, tokenizer, bare, tmp_path, progress=False)
    assert (bare.score, scored["tokens"]) == ("perplexity", sum(len(row["labels"]) for row in rows))
    batch = collator(bare, tokenizer)([rows[0]])
    assert found.losses[0] == pytest.approx(float(model(**batch).loss), rel=1e-4)


@pytest.mark.parametrize("name", ["question-answering", "multi-label", "summarization"])
def test_a_teacher_s_predictions_are_learnt_of_every_head(tmp_path: Path, name: str) -> None:
    task, teacher = task_and_model(tmp_path, name)
    (batch,) = calibration_loader(teacher, masking_tokenizer(), task, tmp_path, batch_size=64)
    torch.manual_seed(1)
    student, one = MODELS[name](), torch.ones(())
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.1 * torch.randn_like(weight)
        learning = Distillation(teacher, temperature=1.0, logits=1.0, hidden=0.0)
        assert float(learning.loss(one, teacher(**batch), batch)) == pytest.approx(0, abs=1e-6)
        told, said = (predict(model, batch) for model in (teacher, student))
        expected = float(divergences(told, said).mean())
        assert expected > 0
        assert float(learning.loss(one, student(**batch), batch)) == pytest.approx(expected, rel=1e-4)
