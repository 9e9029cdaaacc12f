"""The embedded default: a generated task, a small BERT trained on it, the papers' methods and the default compared.

Nothing is downloaded. **The task** is a toy language of reviews. A row is a question, one of ten aspects ("room"), and
a review, a handful of opinion words ("food3 room11 price0") among fillers. Every opinion word speaks of one aspect and
is worth a fixed number; the rating to predict is the sum of the worths of the words about the aspect that is asked,
plus noise, as raters differ. Aspects, and words within an aspect, follow Zipf's law: some of the signal sits in common
words, which matter in many rows, some in rare ones. Scored as STS-B is, by the mean of Pearson and Spearman.

**Why importance matters.** A small network trained from a small random start learns weights of low rank, so that any
method may drop most ranks for free and there is nothing to compare. Pretrained models are otherwise: their weights are
near full rank, they know far more than the task needs, and fine-tuning moves them little. The demo has both in small.
The model starts from large random weights (`INITIALIZER_RANGE`), is pretrained to answer about all ten aspects, and is
then fine-tuned at a lower rate to answer about two (`ASKED`), on which alone it is measured. Most of the energy of its
weights, which plain SVD keeps, no longer serves the task; Fisher information says which part still does.

The effect grows with `INITIALIZER_RANGE`: at BERT's 0.02 no method loses much, and 0.2 was chosen for showing the
mechanism. It says nothing of how large the effect is on a real model. Of seeds 0, 1 and 2 every one has TFWSVD ahead of
SVD and FWSVD at the two lower ranks, and seed 1 has FWSVD behind SVD at the lowest; at half of the ranks all are level.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.files import held, refuse_existing
from hf_lowrank.jobs.progress import bar
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.solvers import get_method
from hf_lowrank.solvers.family import COMPARED as METHODS
from hf_lowrank.tasks import TASKS, collator, encode

RANK_RATIOS = (0.5, 0.33, 0.2)
PRETRAINING_ROWS, TRAIN_ROWS, VALIDATION_ROWS, FISHER_ROWS = 24_000, 6_000, 2_000, 2_048
PRETRAINING_RATE, LEARNING_RATE, BATCH_SIZE = 2e-3, 3e-4, 32
HIDDEN, LAYERS = 64, 2
INITIALIZER_RANGE = 0.2  # BERT's own is 0.02; see above

# The first is the most common.
ASPECTS = ("food", "room", "price", "staff", "view", "bed", "bath", "pool", "wifi", "noise")
ASKED = ("room", "view")
WORDS_PER_ASPECT, FILLERS = 20, 200
NOISE = 0.5  # standard deviation of the raters' disagreement; that of a single word's worth is 1
TASK = replace(
    TASKS["stsb"], name="demo", text=("question", "review"), label="rating", hub=("made-up rows", None), max_length=32
)

Worths = dict[str, dict[str, float]]


# --- the data ---


def make_worths(seed: int) -> Worths:
    """What every opinion word is worth, by aspect and word; within an aspect the first word is the most common."""
    draws = np.random.default_rng(seed).normal(size=(len(ASPECTS), WORDS_PER_ASPECT))
    return {
        aspect: {f"{aspect}{n}": float(worth) for n, worth in enumerate(row)}
        for aspect, row in zip(ASPECTS, draws, strict=True)
    }


def worth_of(question: str, review: str, worths: Worths) -> float:
    """The sum of the worths of the words of `review` that speak of the aspect asked.

    >>> worths = {"food": {"food0": 2.0, "food3": -0.5}, "room": {"room1": 9.0}}
    >>> worth_of("food", "food3 word8 room1 food3 food0", worths)
    1.0
    """
    return sum(worths[question].get(word, 0.0) for word in review.split())


def make_rows(count: int, seed: int | Sequence[int], worths: Worths, asked_about: Sequence[str]) -> Dataset:
    """`count` rated rows with questions of `asked_about`, the first the most common.

    A review has 3 to 6 opinion words, two in five of them meant for the question, and up to 3 fillers.
    """
    choose = np.random.default_rng(seed)
    asked = np.array([ASPECTS.index(aspect) for aspect in asked_about])[_zipf(choose, len(asked_about), (count, 1))]
    aspects = np.where(choose.random((count, 6)) < 0.4, asked, _zipf(choose, len(ASPECTS), (count, 6)))
    words, fillers = _zipf(choose, WORDS_PER_ASPECT, (count, 6)), _zipf(choose, FILLERS, (count, 3))
    opinions, padding = choose.integers(3, 7, count), choose.integers(0, 4, count)
    rows: dict[str, list[Any]] = {"question": [], "review": [], "rating": []}
    for n, noise in enumerate(choose.normal(scale=NOISE, size=count)):
        review = [f"{ASPECTS[a]}{w}" for a, w in zip(aspects[n, : opinions[n]], words[n], strict=False)]
        review += [f"word{filler}" for filler in fillers[n, : padding[n]]]
        choose.shuffle(review)
        question, text = ASPECTS[int(asked[n, 0])], " ".join(review)
        rows["question"].append(question)
        rows["review"].append(text)
        rows["rating"].append(worth_of(question, text, worths) + noise)
    return Dataset.from_dict(rows)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, with BERT's special tokens."""
    opinions = [f"{aspect}{n}" for aspect in ASPECTS for n in range(WORDS_PER_ASPECT)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ASPECTS, *opinions, *(f"word{n}" for n in range(FILLERS))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _zipf(choose: np.random.Generator, kinds: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers below `kinds`, the n-th with a frequency in proportion to 1 / (n + 2)."""
    frequency = 1 / (np.arange(kinds) + 2)
    return choose.choice(kinds, shape, p=frequency / frequency.sum())


# --- the run ---


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small lose time when they are shared out, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run_demo(output: Path, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Train, measure Fisher, compress by every method at every rank ratio, save the best and load it back.

    Returns:
        The dense score and parameters, and one record for each compression, plain JSON values.

    Raises:
        LowRankError: `output` exists and `overwrite` is off; or the saved model, loaded back, scores otherwise.
    """
    with held(output):
        refuse_existing(output, overwrite)
        return _run(output, seed, overwrite)


def _run(output: Path, seed: int, overwrite: bool) -> dict[str, Any]:
    started = time.perf_counter()
    tokenizer = make_tokenizer()
    model, worths = _new_model(tokenizer, seed), make_worths(seed)
    parts = ((PRETRAINING_ROWS, ASPECTS), (TRAIN_ROWS, ASKED), (VALIDATION_ROWS, ASKED), (FISHER_ROWS, ASKED))
    pretraining, train, validation, sample = (
        encode(make_rows(count, [seed, part], worths, asked_about), TASK, tokenizer, model.config)
        for part, (count, asked_about) in enumerate(parts)
    )
    _train(model, tokenizer, pretraining, PRETRAINING_RATE, seed)
    _train(model, tokenizer, train, LEARNING_RATE, seed)
    pipeline = Pipeline(model, tokenizer, TASK, name="demo", seed=seed, samples=FISHER_ROWS, batch_size=BATCH_SIZE)
    pipeline.validation, pipeline.calibration = [validation], pipeline.batches(sample, BATCH_SIZE)
    dense_score = pipeline.score_dense()["score"]
    expected = pipeline.candidate(labels="model")
    expected.calibration = pipeline.calibration
    runs, best = _compare({"data": pipeline, "model": expected})
    best.save(output, overwrite)
    loaded = replace(best, model=AutoModelForSequenceClassification.from_pretrained(output))
    loaded.validation = [validation]
    if loaded.score()["score"] != best.facts["score_compressed"]:
        raise LowRankError(f"{output} does not score what was measured before it was saved")
    dense = {"score": dense_score, "parameters": model.num_parameters()}
    return {"dense": dense, "runs": runs, "output": str(output), "seconds": time.perf_counter() - started}


def results_table(record: dict[str, Any]) -> Table:
    """The scores of `run_demo` by method and rank ratio."""
    dense = record["dense"]
    title = f"Pearson–Spearman correlation in %; dense {dense['score']:.1f} with {dense['parameters']:,} parameters"
    table = Table("rank ratio", "parameters", *METHODS, box=None, title=title)
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
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=TASK.max_length,
        initializer_range=INITIALIZER_RANGE,
        hidden_dropout_prob=0.0,  # no row is seen twice: there is nothing to regularise
        attention_probs_dropout_prob=0.0,
        id2label={0: "rating"},
        label2id={"rating": 0},
        problem_type="regression",
    )
    return BertForSequenceClassification(config)


def _train(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, rows: Dataset, rate: float, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=rate,
            warmup_steps=100,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        collate = collator(TASK, tokenizer)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[_Bar()])
        trainer.remove_callback(PrinterCallback)  # it would print figures to stdout, which is for the result
        trainer.train()


class _Bar(TrainerCallback):
    """Our progress bar, on stderr, instead of the Trainer's own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown = bar("training", state.max_steps, "steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown.close()


def _compare(dense: dict[str, Pipeline]) -> tuple[list[dict[str, Any]], Pipeline]:
    """Every run's record, and the best one's pipeline: of equal scores, that of the smaller model.

    `dense` is the model, by whose labels its statistics are measured.
    """
    measured = {whose: pipeline.measure(_kinds(whose)) for whose, pipeline in dense.items()}
    runs, best = [], None
    with bar("compressing", len(METHODS) * len(RANK_RATIOS), "models") as shown:
        for ratio in RANK_RATIOS:
            for method in METHODS:
                whose = get_method(method).labels
                candidate = dense[whose].candidate()
                report = candidate.compress(CompressionConfig(method, ratio), measured[whose])
                score = candidate.score_compressed()["score"]
                parameters = report.parameters_after
                runs.append({"method": method, "rank_ratio": ratio, "score": score, "parameters": parameters})
                if best is None or score >= best.facts["score_compressed"]:
                    best = candidate
                shown.update()
    assert best is not None
    return runs, best


def _kinds(whose: str) -> list[str]:
    """What the methods need that measure by these labels."""
    methods = (get_method(name) for name in METHODS)
    return sorted({kind for method in methods if method.labels == whose for kind in method.needs})
