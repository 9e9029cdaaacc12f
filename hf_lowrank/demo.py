"""The embedded default: a generated task, a small BERT trained on it, and the three methods of the papers compared.

Nothing is downloaded. The task is a toy language of reviews: a sentence is worth the sum of its opinion words, each turned around
by a negation or doubled by an intensifier right before it, and its label says whether the sum is positive. Words follow
Zipf's law, so that some of the signal sits in common words and some in rare ones.
"""

import copy
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lowrank.compress import CompressionConfig, compress
from hf_lowrank.errors import LowRankError
from hf_lowrank.evaluate import evaluate_rows
from hf_lowrank.files import refuse_existing
from hf_lowrank.progress import bar
from hf_lowrank.saving import save_compressed
from hf_lowrank.statistics import Statistics, compute_fisher
from hf_lowrank.tasks import Task, accuracy, collator, encode

RANK_RATIOS = (0.33, 0.2, 0.1)
METHODS = ("svd", "fwsvd", "tfwsvd")
TRAIN_ROWS, VALIDATION_ROWS, FISHER_ROWS = 48_000, 2_000, 1_024
LABELS = ("negative", "positive")
TASK = Task("demo", "classification", ("text",), "label", ("", None), "accuracy", accuracy, LABELS, max_length=32)


# --- the data ---


def make_vocabulary() -> dict[str, list[str]]:
    """The words of the language by their role; within a role the first is the most common."""
    return {
        "good": [f"good{n}" for n in range(150)],
        "bad": [f"bad{n}" for n in range(150)],
        "not": [f"not{n}" for n in range(8)],
        "very": [f"very{n}" for n in range(8)],
        "filler": [f"word{n}" for n in range(1_200)],
    }


def make_rows(count: int, seed: int) -> Dataset:
    """`count` labelled sentences of 5 to 12 words."""
    choose, vocabulary = random.Random(seed), make_vocabulary()
    weights = {role: [1 / (rank + 2) for rank in range(len(words))] for role, words in vocabulary.items()}
    rows: dict[str, list[Any]] = {"text": [], "label": []}
    while len(rows["text"]) < count:
        roles = choose.choices(list(vocabulary), (0.2, 0.2, 0.12, 0.08, 0.4), k=choose.randint(5, 12))
        if (worth := worth_of(roles)) != 0:
            rows["text"].append(" ".join(choose.choices(vocabulary[role], weights[role])[0] for role in roles))
            rows["label"].append(int(worth > 0))
    return Dataset.from_dict(rows)


def worth_of(roles: list[str]) -> int:
    """The sum of a sentence's opinion words; a negation or intensifier acts on one right after it.

    >>> worth_of(["good", "filler", "very", "bad", "not", "filler", "good"])
    0
    """
    total, before = 0, ""
    for role in roles:
        if role in ("good", "bad"):
            total += (1 if role == "good" else -1) * {"not": -1, "very": 2}.get(before, 1)
        before = role
    return total


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, with BERT's special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = special + [word for words in make_vocabulary().values() for word in words]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


# --- the run ---


def run_demo(output: Path, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Train, measure Fisher, compress by every method at every rank ratio, save the best and load it back.

    Returns:
        The dense score and parameters, and one record for each compression, plain JSON values.

    Raises:
        LowRankError: `output` exists and `overwrite` is off; or the saved model, loaded back, scores otherwise.
    """
    refuse_existing(output, overwrite)
    started = time.perf_counter()
    tokenizer = make_tokenizer()
    model = _new_model(tokenizer, seed)
    train, validation = (
        encode(make_rows(count, seed + part), TASK, tokenizer, model.config)
        for part, count in enumerate((TRAIN_ROWS, VALIDATION_ROWS))
    )
    _train(model, tokenizer, train, seed)
    dense_score = evaluate_rows(model, tokenizer, TASK, validation)["score"]
    sample = train.shuffle(seed=seed).select(range(FISHER_ROWS))
    fisher = compute_fisher(
        model,
        DataLoader(sample, batch_size=32, collate_fn=collator(TASK, tokenizer)),
        origin={"model": "demo", "seed": seed},
    )
    runs, best = _compare(model, tokenizer, validation, fisher)
    facts = {"base_model": "demo", "task": "demo", "score_dense": dense_score, "score_compressed": best[0]}
    save_compressed(best[1], tokenizer, best[2], output, overwrite, **facts)
    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    if evaluate_rows(loaded, tokenizer, TASK, validation, progress=False)["score"] != best[0]:
        raise LowRankError(f"{output} does not score what was measured before it was saved")
    dense = {"score": dense_score, "parameters": model.num_parameters()}
    return {"dense": dense, "runs": runs, "output": str(output), "seconds": time.perf_counter() - started}


def results_table(record: dict[str, Any]) -> Table:
    """The scores of `run_demo` by method and rank ratio."""
    dense = record["dense"]
    table = Table("rank ratio", "parameters", *METHODS, box=None, title=f"accuracy in %; dense {dense['score']:.1f}")
    for ratio in RANK_RATIOS:
        runs = {run["method"]: run for run in record["runs"] if run["rank_ratio"] == ratio}
        parameters = runs[METHODS[0]]["parameters"]
        scores = [f"{runs[method]['score']:.1f}" for method in METHODS]
        table.add_row(f"{ratio}", f"{parameters:,} ({parameters / dense['parameters']:.0%})", *scores)
    return table


def _new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> BertForSequenceClassification:
    set_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=32,
        id2label=dict(enumerate(LABELS)),
        label2id={name: n for n, name in enumerate(LABELS)},
    )
    return BertForSequenceClassification(config)


def _train(model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, rows: Dataset, seed: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            num_train_epochs=1,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            warmup_steps=150,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            seed=seed,
        )
        Trainer(model, arguments, train_dataset=rows, data_collator=collator(TASK, tokenizer)).train()


def _compare(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, validation: Dataset, fisher: Statistics
) -> tuple[list[dict[str, Any]], tuple[float, Any, Any]]:
    """Every run's record, and the (score, model, report) of the best one: of equal scores, the smaller model."""
    runs, best = [], None
    with bar("compressing", len(METHODS) * len(RANK_RATIOS), "models") as shown:
        for ratio in RANK_RATIOS:
            for method in METHODS:
                candidate, report = compress(
                    copy.deepcopy(model), CompressionConfig(method, ratio), fisher, progress=False
                )
                score = evaluate_rows(candidate, tokenizer, TASK, validation, progress=False)["score"]
                runs.append(
                    {"method": method, "rank_ratio": ratio, "score": score, "parameters": report.parameters_after}
                )
                if best is None or score >= best[0]:
                    best = score, candidate, report
                shown.update()
    assert best is not None
    return runs, best
