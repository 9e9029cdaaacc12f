"""The language model of `lm_train` at shares of its ranks: once, today, layer behind layer, healed → KL to dense."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.harness import Lines, Options, Result, Row, mean_of
from benchmarks.lm import SAMPLES, Study
from benchmarks.lm_text import Windows
from benchmarks.lm_train import Recipe, cache_folder
from benchmarks.sequential import RATIOS
from hf_lowrank import CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.tasks import Task
from hf_lowrank.tasks.texts import given_texts, texts_task
from hf_lowrank.training.heal import heal

LEARNT_FROM = 4096  # windows of the training text that healing chooses from

Made = tuple[PreTrainedModel, dict[str, Any]]


def run(options: Options) -> Result:
    """The rows of one seed that the file has not yet; the table of all its seeds."""
    study = Study(cache_folder(options.cache), Recipe())
    lines = Lines(study.folder / "ranks.jsonl")
    for name in VARIANTS:
        for ratio in RATIOS:
            measure(study, lines, name, ratio, options.seed)
    rows, dense = lines.rows(), study.dense_figures
    return Result(
        f"lm_ranks: a Llama of {study.model.num_parameters():,} parameters after {study.tokens / 1e6:.1f}M tokens of "
        f"Python; dense perplexity {dense['perplexity']:.2f}",
        [_row(rows, ratio, name) for ratio in RATIOS for name in VARIANTS],
        [
            f"kfac with greedy ranks by {SAMPLES} windows of {study.length} tokens; before: labels of the data, inputs "
            "not centred; healed: what is sequential, by the defaults of healing. On packages held out; mean and "
            "standard error over calibration seeds; × is a share of the same seeds' before. CPU seconds are those of "
            "the step alone, of the last call where it was interrupted."
        ],
        {"dense": dense, "tokens": study.tokens, "rows": rows},
    )


def measure(study: Study, lines: Lines, name: str, ratio: float, seed: int) -> None:
    """Add the row of one of `VARIANTS`, if it is not known."""
    if lines.has(variant=name, ranks=ratio, seed=seed):
        return
    started = time.process_time()
    model, facts = VARIANTS[name](study, ratio, seed)
    seconds = round(time.process_time() - started, 1)
    figures = study._compared(model, study.dense)[0]
    lines.add(variant=name, ranks=ratio, seed=seed, seconds=seconds, **figures, **facts)


def _before(study: Study, ratio: float, seed: int) -> Made:
    """What the default once was, by the statistics of the methods that take the data's labels."""
    place = study.folder / f"statistics-data-{seed}"
    if not place.is_dir():
        compute_statistics(study.model, study.calibration(seed), CompressionConfig().needs, labels="data").save(place)
    known = Statistics.load(place)
    zeros = {name: torch.zeros_like(total) for name, total in known.sums["activation_mean"].items()}
    not_centred = replace(known, sums=known.sums | {"activation_mean": zeros})
    config = CompressionConfig(rank_ratio=ratio, sequential=False)
    return compress(copy.deepcopy(study.model), config, not_centred, progress=False)[0], {}


def _one_shot(study: Study, ratio: float, seed: int) -> Made:
    config = CompressionConfig(rank_ratio=ratio, sequential=False)
    return compress(copy.deepcopy(study.model), config, study._statistics(config, seed), progress=False)[0], {}


def _sequential(study: Study, ratio: float, seed: int) -> Made:
    """Kept, to be healed."""
    config = CompressionConfig(rank_ratio=ratio, sequential=True)
    known: dict[str, Any] = {"statistics": study._statistics(config, seed), "batches": study.marks(seed)}
    model, _ = compress(copy.deepcopy(study.model), config, progress=False, **known)
    model.save_pretrained(_place(study, ratio, seed))
    return model, {}


def _healed(study: Study, ratio: float, seed: int) -> Made:
    """By the defaults; what was interrupted goes on."""
    place = _place(study, ratio, seed)
    model = AutoModelForCausalLM.from_pretrained(place).eval()
    kept: dict[str, Any] = {"checkpoints": place.with_name(f"{place.name}.checkpoints"), "resume": True}
    facts = heal(model, study.model, study.tokenizer, _new_text(study, seed), seed=seed, **kept)
    said = ("divergence_before", "divergence_after", "learning_rate", "steps", "best_step", "samples")
    return model, {name: facts[name] for name in said}


def _new_text(study: Study, seed: int) -> Task:
    """Training text that the statistics were not measured on."""
    windows, draw = Windows(study.training, study.length), np.random.default_rng(seed)
    measured = draw.choice(len(windows), min(SAMPLES, len(windows)), replace=False)  # as `Study.calibration` chooses
    others = np.sort(draw.permutation(np.setdiff1d(np.arange(len(windows)), measured))[:LEARNT_FROM])
    texts = [study.tokenizer.decode(windows[number]["input_ids"], skip_special_tokens=True) for number in others]
    return replace(texts_task(given_texts(texts), study.model.config), packed=True, max_length=study.length)


def _place(study: Study, ratio: float, seed: int) -> Path:
    """Where a model that is to be healed is."""
    return study.folder / f"ranks-{ratio:g}-{seed}"


VARIANTS: dict[str, Callable[[Study, float, int], Made]] = {
    "before": _before,
    "one shot": _one_shot,
    "sequential": _sequential,
    "healed": _healed,
}


def _row(rows: list[dict[str, Any]], ratio: float, name: str) -> Row:
    """The figures of all seeds."""
    found = [row for row in rows if (row["ranks"], row["variant"]) == (ratio, name)]
    seeds = [row["seed"] for row in found]
    before = [row for row in rows if (row["ranks"], row["variant"]) == (ratio, "before") and row["seed"] in seeds]
    apart, then = (sum(row["divergence"] for row in of) for of in (found, before))
    return {
        "ranks": f"{ratio:.0%}",
        "factors": name,
        "seeds": ", ".join(map(str, seeds)),
        "perplexity": mean_of([row["perplexity"] for row in found], 2) if found else "–",
        "KL": mean_of([row["divergence"] for row in found], 4) if found else "–",
        "×": f"{apart / then:.2f}" if len(before) == len(found) > 0 else "–",
        "CPU seconds": mean_of([row["seconds"] for row in found], 0) if found else "–",
    }
