"""What a model is measured on: data, tokenisation, labels, metric. A table of tasks and four kinds of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_lowrank.errors import LowRankError

FILE_FORMATS = {"parquet": "parquet", "csv": "csv", "json": "json", "jsonl": "json"}
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """A task: its columns, its Hub data set, and how it is scored. `kind` is a key of `KINDS`.

    `label_names` are the meanings of integer labels in the data. `metrics` maps (predictions, labels) to figures, of
    which `score` names the one that counts; perplexity needs none.
    """

    name: str
    kind: str
    text: tuple[str, ...]
    label: str | None
    hub: tuple[str, str | None]
    score: str
    metrics: Callable[[Any, Any], dict[str, float]] | None = None
    label_names: tuple[str, ...] = ()
    validation: tuple[str, ...] = ("validation",)
    packed: bool = False  # texts are joined and cut into blocks of equal length, as is usual for running text
    max_length: int = 128

    @property
    def auto_class(self) -> Any:
        """The Auto class of models for this task."""
        return KINDS[self.kind]

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller score is a better one."""
        return self.score == "perplexity"


KINDS = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "causal_lm": AutoModelForCausalLM,
}


# --- metrics: all in percent, as GLUE tables give them ---


def _correlation(predictions: Any, labels: Any) -> dict[str, float]:
    if np.ptp(predictions) == 0:  # a constant prediction correlates with nothing
        return {"pearson": 0.0, "spearman": 0.0, "pearson_spearman": 0.0}
    pearson, spearman = pearsonr(predictions, labels)[0], spearmanr(predictions, labels)[0]
    return {"pearson": 100 * pearson, "spearman": 100 * spearman, "pearson_spearman": 50 * (pearson + spearman)}


def _matthews(predictions: Any, labels: Any) -> dict[str, float]:
    return {"matthews": 100 * matthews_corrcoef(labels, predictions), **accuracy(predictions, labels)}


def accuracy(predictions: Any, labels: Any) -> dict[str, float]:
    """Share of predictions that are right, in percent."""
    return {"accuracy": 100 * accuracy_score(labels, predictions)}


def _f1(predictions: Any, labels: Any) -> dict[str, float]:
    return {"f1": 100 * f1_score(labels, predictions), **accuracy(predictions, labels)}


def _entities(predictions: Any, labels: Any) -> dict[str, float]:
    return {"entity_f1": 100 * entity_f1(labels, predictions)}


# --- the table ---


def _glue(name: str, text: tuple[str, ...], score: str, metrics: Callable, names: tuple[str, ...], **rest: Any) -> Task:
    kind = "classification" if names else "regression"
    return Task(name, kind, text, "label", ("nyu-mll/glue", name), score, metrics, names, **rest)


_ENTAILMENT = ("entailment", "not_entailment")
_CONLL = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")

TASKS = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), "matthews", _matthews, ("unacceptable", "acceptable")),
        _glue("sst2", ("sentence",), "accuracy", accuracy, ("negative", "positive")),
        _glue("mrpc", ("sentence1", "sentence2"), "f1", _f1, ("not_equivalent", "equivalent")),
        _glue("stsb", ("sentence1", "sentence2"), "pearson_spearman", _correlation, ()),
        _glue("qqp", ("question1", "question2"), "f1", _f1, ("not_duplicate", "duplicate")),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            "accuracy",
            accuracy,
            ("entailment", "neutral", "contradiction"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        _glue("qnli", ("question", "sentence"), "accuracy", accuracy, _ENTAILMENT),
        _glue("rte", ("sentence1", "sentence2"), "accuracy", accuracy, _ENTAILMENT),
        Task(
            "conll2003",
            "token_classification",
            ("tokens",),
            "ner_tags",
            ("lhoestq/conll2003", None),
            "entity_f1",
            _entities,
            _CONLL,
        ),
        Task(
            "tinystories", "causal_lm", ("text",), None, ("roneneldan/TinyStories", None), "perplexity", max_length=512
        ),
        Task(
            "wikitext2",
            "causal_lm",
            ("text",),
            None,
            ("Salesforce/wikitext", "wikitext-2-raw-v1"),
            "perplexity",
            packed=True,
            max_length=1024,
        ),
    )
}


def get_task(name: str, max_length: int | None = None) -> Task:
    """The task called `name`, cut at another length if given.

    Raises:
        LowRankError: there is none; the message lists the names.
    """
    if name not in TASKS:
        raise LowRankError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    return replace(TASKS[name], max_length=max_length) if max_length else TASKS[name]


# --- data ---


def load_split(task: Task, split: str, data_dir: Path | None) -> Dataset:
    """The rows of a split: of `data_dir/<split>*.{parquet,csv,json,jsonl}`, or of the task's Hub data set.

    Raises:
        LowRankError: no such file, an unreadable one, or columns of the task that are not there.
    """
    source = f"{task.hub[0]} ({split})" if data_dir is None else str(data_dir)
    try:
        if data_dir is None:
            rows = load_dataset(*task.hub, split=split)
        else:
            file_format, files = _local_files(data_dir, split)
            rows = load_dataset(file_format, data_files=files, split="train")
    except LowRankError:
        raise
    except Exception as error:  # datasets raises its own, pyarrow's, pandas' and network errors
        raise LowRankError(f"the data of {task.name} cannot be read from {source}: {error}") from error
    needed = [*task.text, *([task.label] if task.label else [])]
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        raise LowRankError(
            f"{task.name} needs the column {missing[0]!r}, which {source} has not for {split!r}; "
            f"its columns are {', '.join(rows.column_names)}"
        )
    return rows


def load_validation(
    task: Task, data_dir: Path | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[Dataset]:
    """The encoded rows of every validation split of the task."""
    return [encode(load_split(task, split, data_dir), task, tokenizer, config) for split in task.validation]


def _local_files(folder: Path, split: str) -> tuple[str, list[str]]:
    for suffix, file_format in FILE_FORMATS.items():
        files = sorted(str(path) for path in folder.glob(f"{split}*.{suffix}"))
        if files:
            return file_format, files
    raise LowRankError(f"{folder} has no {split}.parquet (or .csv, .json, .jsonl)")


def encode(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Dataset:
    """Rows as inputs of a model, shortest first, so that batches need little padding.

    The labels are those of the model: mapped by name where the model names its labels as the data do, else by position.

    Raises:
        LowRankError: labels that are missing, of another type, or that the model does not know.
    """
    length = min(task.max_length, getattr(config, "max_position_embeddings", None) or task.max_length)

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return _ENCODERS[task.kind](batch, task, tokenizer, length, label_ids)

    label_ids = label_ids_of(task, config)
    if task.label is not None:
        _check_labels(rows, task, len(label_ids))
    encoded = rows.map(tokenise, batched=True, remove_columns=rows.column_names, desc=f"tokenising {task.name}")
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return encoded.select(np.argsort(lengths, kind="stable"))


def collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What joins encoded rows into a padded batch."""
    if task.kind in ("classification", "regression"):
        return DataCollatorWithPadding(tokenizer)
    if tokenizer.pad_token is None:  # never seen: padding is masked, and its labels are ignored
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)


def _encode_sequence(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    encoded = dict(tokenizer(*(batch[column] for column in task.text), truncation=True, max_length=length))
    labels = batch[task.label]
    encoded["labels"] = [label_ids[label] for label in labels] if label_ids else [float(label) for label in labels]
    return encoded


def _encode_words(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    """A word's label goes to its first piece; the others, and special tokens, are ignored."""
    encoded = tokenizer(batch[task.text[0]], is_split_into_words=True, truncation=True, max_length=length)
    labels = []
    for row, tags in enumerate(batch[task.label]):
        words = encoded.word_ids(row)
        first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels.append([label_ids[tags[word]] if new else IGNORED for word, new in zip(words, first, strict=True)])
    return {**encoded, "labels": labels}


def _encode_text(batch: dict, task: Task, tokenizer: Any, length: int, label_ids: list[int]) -> dict[str, Any]:
    texts = [text for text in batch[task.text[0]] if text.strip()]
    if task.packed:
        ids = tokenizer("".join(texts))["input_ids"]
        blocks = [ids[start : start + length] for start in range(0, len(ids), length)]
    else:
        blocks = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    blocks = [block for block in blocks if len(block) > 1]  # a single token predicts nothing
    return {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks], "labels": blocks}


_ENCODERS = {
    "classification": _encode_sequence,
    "regression": _encode_sequence,
    "token_classification": _encode_words,
    "causal_lm": _encode_text,
}


def label_ids_of(task: Task, config: PreTrainedConfig) -> list[int]:
    """The model's label for each label of the data; none where they are not classes."""
    if not task.label_names:
        return []
    by_name = {str(name).lower(): int(label) for label, name in (config.id2label or {}).items()}
    names = [name.lower() for name in task.label_names]
    if all(name in by_name for name in names):
        return [by_name[name] for name in names]
    if len(by_name) != len(names):
        raise LowRankError(
            f"the model has {len(by_name)} labels ({', '.join(by_name)}), "
            f"{task.name} has {len(names)} ({', '.join(names)})"
        )
    return list(range(len(names)))


def _check_labels(rows: Dataset, task: Task, classes: int) -> None:
    labels = rows[task.label]
    if task.kind == "token_classification":
        labels = [label for row in labels for label in row]
    if task.kind == "regression":
        bad = [label for label in labels if not isinstance(label, (int, float)) or label != label]
    else:
        bad = [label for label in labels if not isinstance(label, int) or not 0 <= label < classes]
    if bad:
        raise LowRankError(
            f"{len(bad)} labels of {task.name} are not usable, such as {bad[0]!r} in column {task.label!r}"
            + (f"; they must be 0 to {classes - 1}" if classes else "; they must be numbers")
        )
