"""An analysis → its findings in plain words, most useful first."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from hf_lowrank.model.layer_names import kind_of
from hf_lowrank.studies.analysis.layers import EXPECTED, SPREAD, VARIATION, LayerAnalysis
from hf_lowrank.studies.analysis.predictor import Correlation
from hf_lowrank.studies.analysis.recommend import LEAVE_DENSE, SVD_ENOUGH, USE_WEIGHTING
from hf_lowrank.studies.analysis.truncation import GroupTruncation

if TYPE_CHECKING:
    from hf_lowrank.studies.analysis.run import Analysis

SIGNIFICANT = 0.05


def findings(analysis: "Analysis") -> list[str]:
    """Sentences for a person who has to decide; every number in them is in the tables."""
    return [
        analysis.recommendation,
        *_truncation(analysis),
        *_redundancy(analysis),
        *_layers(analysis),
        *_predictors(analysis),
    ]


def _truncation(analysis: "Analysis") -> Iterator[str]:
    first = {t.method: t.concentration for t in analysis.truncation if t.concentration is not None}
    if first:
        yield (
            "Share of the damage that the first third of the singular directions does, the third that a method would "
            f"keep (1 = nothing else matters): {_marks(first)}."
        )
    order = {t.method: t.monotonicity for t in analysis.truncation if t.monotonicity is not None}
    if order:
        yield (
            "How steadily damage falls from group to group of directions (1 = always; where the first groups do all of "
            f"it, the rest is noise): {_marks(order)}."
        )
    for truncation in analysis.truncation:
        yield from _misjudged(truncation, analysis.damage_unit)


def _misjudged(truncation: GroupTruncation, unit: str) -> Iterator[str]:
    """The pair of groups that is in the wrong order by most, if one is beyond two standard errors."""
    pairs = [
        (later.measured.damage - earlier.measured.damage, earlier, later)
        for earlier, later in combinations(truncation.groups, 2)
        if later.measured.damage > 2 * later.measured.damage_error
        and later.measured.damage - earlier.measured.damage
        > 2 * np.hypot(later.measured.damage_error, earlier.measured.damage_error)
    ]
    if pairs:
        _, earlier, later = max(pairs, key=lambda pair: pair[0])
        costs = {g.group: f"{g.measured.damage:.3g} ± {g.measured.damage_error:.2g}" for g in (earlier, later)}
        yield (
            f"{truncation.method} misjudges directions: group {later.group} of {len(truncation.groups)} costs "
            f"{costs[later.group]} {unit} when removed, group {earlier.group}, which it puts before, "
            f"{costs[earlier.group]}."
        )


def _marks(values: Mapping[str, float]) -> str:
    return ", ".join(f"{method} {value:.2f}" for method, value in values.items())


def _redundancy(analysis: "Analysis") -> Iterator[str]:
    top = sorted(analysis.layers, key=lambda layer: layer.share, reverse=True)[:3]
    named = ", ".join(f"{layer.name} ({layer.share:.0%})" for layer in top)
    yield (
        f"Of the {len(analysis.layers)} layers, those that carry most of the expected loss increase at "
        f"{analysis.rank_ratio:.0%} of the ranks are {named}."
    )
    by_kind: dict[str, float] = defaultdict(float)
    for layer in analysis.layers:
        by_kind[kind_of(layer.name)] += layer.share
    ordered = sorted(by_kind.items(), key=lambda item: item[1], reverse=True)
    if 1 < len(ordered) < len(analysis.layers):
        yield "By layer type: " + ", ".join(f"{kind} {share:.0%}" for kind, share in ordered) + "."


def _layers(analysis: "Analysis") -> Iterator[str]:
    advice = analysis.layer_recommendations
    counts = {
        what: sum(given == what for given in advice.values()) for what in (SVD_ENOUGH, USE_WEIGHTING, LEAVE_DENSE)
    }
    yield (
        "Layer by layer, held against each other: "
        + ", ".join(f"{what} for {count}" for what, count in counts.items())
        + "."
    )
    for method in dict.fromkeys(("svd", analysis.best_method)):
        means = [_mean_increase(analysis.layers, method, advice, what) for what in counts]
        if method in analysis.methods and sum(mean is not None for mean in means) > 1:
            told = ", ".join(
                f"{mean:.2g} where the advice is '{what}'"
                for what, mean in zip(counts, means, strict=True)
                if mean is not None
            )
            yield f"Measured loss increase per layer compressed alone by {method}, on average: {told}."


def _mean_increase(layers: Sequence[LayerAnalysis], method: str, advice: Mapping[str, str], what: str) -> float | None:
    chosen = [layer.methods.get(method) for layer in layers if advice[layer.name] == what]
    increases = [of.measured.loss_increase for of in chosen if of is not None]
    return float(np.mean(increases)) if increases else None


def _predictors(analysis: "Analysis") -> Iterator[str]:
    defined = [c for c in analysis.correlations if c.rho is not None]
    known = [c for c in defined if c.outcome.endswith("loss increase")]
    own = {c.outcome.split(":")[0]: c.rho or 0.0 for c in known if c.predictor == EXPECTED}
    if own:
        yield f"The expected loss increase orders layers as compressing each alone does, Spearman's ρ: {_marks(own)}."
    spread = [c for c in defined if c.predictor == EXPECTED and c.outcome.endswith(SPREAD)]
    if spread:
        marks = _marks({c.outcome.split(":")[0]: c.rho or 0.0 for c in spread})
        yield f"It orders them by how far the losses of single samples move, up or down, with ρ: {marks}."
    for outcome in dict.fromkeys(c.outcome for c in known if c.predictor == VARIATION):
        rivals = [c for c in known if c.outcome == outcome]
        variation = next(c for c in rivals if c.predictor == VARIATION)
        best = max(rivals, key=lambda c: c.rho or 0.0)
        what = outcome.removesuffix(": loss increase")
        loss = "the loss of plain SVD" if what == "svd" else f"the {what}"
        better = (
            f"best ordered by the {best.predictor} (ρ = {best.rho:.2f})"
            if _certain(best)
            else "predicted by nothing here"
        )
        yield f"The variation of Fisher information over a matrix {_verdict(variation, loss)}, which is {better}."


def _verdict(correlation: Correlation, loss: str) -> str:
    told = f"(ρ = {correlation.rho:.2f}, {correlation.matrices} matrices)"
    if not _certain(correlation):
        return f"says nothing certain {told} of {loss}"
    return (
        f"rises {told} with {loss}" if (correlation.rho or 0.0) > 0 else f"falls {told}, against the claim, with {loss}"
    )


def _certain(correlation: Correlation) -> bool:
    return correlation.p_value is not None and correlation.p_value <= SIGNIFICANT
