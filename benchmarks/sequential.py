"""Factors behind the compressed prefix against those of one shot → scores, divergences and CPU seconds, over seeds."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean

import torch

from benchmarks.harness import Options, Result, Row, mean_of
from benchmarks.study import SEEDS, Figures, Study
from hf_lowrank import CompressionConfig
from hf_lowrank.jobs.progress import bar

RATIOS = (0.33, 0.2, 0.1)
SAMPLES_BEFORE = 512


def run(options: Options) -> Result:
    """Score, divergence from dense and CPU seconds of every variant, by share of the ranks, over calibration seeds."""
    study = Study(options, "sequential")
    found: dict[tuple[str, float], list[Figures]] = {}
    runs = [(ratio, seed, variant) for ratio in RATIOS for variant in VARIANTS for seed in _seeds(variant, ratio)]
    with bar("sequential", len(runs), "models") as shown:
        for ratio, seed, variant in runs:
            key = {"variant": variant, "seed": seed, "ranks": ratio}
            figures = study.row(key, lambda: VARIANTS[variant](study, seed, ratio))  # noqa: B023
            found.setdefault((variant, ratio), []).append(figures)
            shown.update()
    rows = [_row(study, variant, ratio, found) for ratio in RATIOS for variant in VARIANTS]
    measured = [study.statistics("model", seed) for seed in SEEDS]
    seconds, samples = fmean(each for _, each in measured), measured[0][0].samples
    return Result(
        f"{study.task.score} on {study.task.name} without fine-tuning; dense {study.dense:.2f}",
        rows,
        [
            f"kfac with greedy ranks by statistics of {samples:,} samples, which take {seconds:.0f} CPU seconds. "
            f"Before: labels of the data, inputs not centred, {SAMPLES_BEFORE} samples. Means ± standard errors over "
            f"seeds {', '.join(map(str, SEEDS))} of the calibration, without ± seed {SEEDS[0]}. From dense: "
            f"{found[next(iter(found))][0]['measure']}; × is the mean as a share of the first line's."
        ],
        {"model": study.name, "task": study.task.name, "dense": study.dense},
    )


def _seeds(variant: str, ratio: float) -> tuple[int, ...]:
    """All where differences are large enough to matter, or the first one."""
    return SEEDS[:1] if variant == "one shot" or ratio == RATIOS[0] else SEEDS


def _row(study: Study, variant: str, ratio: float, found: Mapping[tuple[str, float], list[Figures]]) -> Row:
    figures = found[variant, ratio]
    apart, before = ([each["divergence"] for each in of] for of in (figures, found[next(iter(VARIANTS)), ratio]))
    scores = [each["score"] for each in figures]
    return {
        "ranks": f"{ratio:.0%}",
        "factors": variant,
        "score": mean_of(scores, 2),
        "of dense": f"{fmean(scores) / study.dense:.1%}" if study.dense else "–",
        "from dense": mean_of(apart, 4),
        "×": f"{fmean(apart) / fmean(before[: len(apart)]):.2f}",
        "CPU seconds": f"{fmean(each['seconds'] for each in figures):.0f}",
    }


def _before(study: Study, seed: int, ratio: float) -> Figures:
    statistics, _ = study.statistics("data", seed, samples=SAMPLES_BEFORE)
    zeros = {name: torch.zeros_like(total) for name, total in statistics.sums["activation_mean"].items()}
    not_centred = replace(statistics, sums=statistics.sums | {"activation_mean": zeros})
    return study.measured(_config(ratio, False), not_centred)


def _one_shot(study: Study, seed: int, ratio: float) -> Figures:
    return study.measured(_config(ratio, False), study.statistics("model", seed)[0])


def _sequential(study: Study, seed: int, ratio: float) -> Figures:
    statistics, _ = study.statistics("model", seed)
    return study.measured(
        _config(ratio, True), statistics, study.marks.get(("model", seed)) or study.samples("model", seed)
    )


def _config(ratio: float, sequential: bool) -> CompressionConfig:
    return CompressionConfig("kfac", ratio, sequential=sequential)


VARIANTS: dict[str, Callable[[Study, int, float], Figures]] = {
    "before": _before,
    "one shot": _one_shot,
    "sequential": _sequential,
}
