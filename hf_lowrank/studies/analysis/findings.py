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
        told = ", ".join(f"{method} {share:.0%}" for method, share in first.items())
        yield (
            "Does a method know which parts of the weights matter? All singular directions were removed, one group at "
            f"a time. Of the damage that this did, the third that a method would keep first accounts for: {told}. At "
            "100% the method throws nothing away that matters."
        )
    order = {t.method: t.monotonicity for t in analysis.truncation if t.monotonicity is not None}
    if order:
        yield (
            "Does a group do less damage the later the method ranks it? Agreement of the two orders, 1 if always, 0 if "
            f"there is no relation, −1 if reversed: {_marks(order)}. Where the first groups do all the damage, the "
            "order of the others is chance, and a low number no fault."
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
            f"{truncation.method} ranks some directions wrongly: removing group {later.group} of "
            f"{len(truncation.groups)} costs {costs[later.group]} {unit}, removing group {earlier.group}, which it "
            f"takes to be more important, {costs[earlier.group]}."
        )


def _marks(values: Mapping[str, float]) -> str:
    return ", ".join(f"{method} {value:.2f}" for method, value in values.items())


def _redundancy(analysis: "Analysis") -> Iterator[str]:
    top = sorted(analysis.layers, key=lambda layer: layer.share, reverse=True)[:3]
    named = ", ".join(f"{layer.name} ({layer.share:.0%})" for layer in top)
    yield (
        f"Where does it hurt? If each of the {len(analysis.layers)} layers kept {analysis.rank_ratio:.0%} of its "
        f"ranks, the largest shares of the loss to be expected would come from {named}."
    )
    by_kind: dict[str, float] = defaultdict(float)
    for layer in analysis.layers:
        by_kind[kind_of(layer.name)] += layer.share
    ordered = sorted(by_kind.items(), key=lambda item: item[1], reverse=True)
    if 1 < len(ordered) < len(analysis.layers):
        yield "The same by type of layer: " + ", ".join(f"{kind} {share:.0%}" for kind, share in ordered) + "."


def _layers(analysis: "Analysis") -> Iterator[str]:
    advice = analysis.layer_recommendations
    counts = {
        what: sum(given == what for given in advice.values()) for what in (SVD_ENOUGH, USE_WEIGHTING, LEAVE_DENSE)
    }
    yield (
        "What would suit each layer, in comparison with the others (which ones: see the table of layers)? "
        + "; ".join(f"{what}: {count} of {len(analysis.layers)}" for what, count in counts.items())
        + "."
    )
    for method in dict.fromkeys(("svd", analysis.best_method)):
        means = [_mean_increase(analysis.layers, method, advice, what) for what in counts]
        if method in analysis.methods and sum(mean is not None for mean in means) > 1:
            told = ", ".join(
                f"{mean:+.2g} where the advice is '{what}'"
                for what, mean in zip(counts, means, strict=True)
                if mean is not None
            )
            yield f"Was that right? Compressing one layer alone by {method} changed the loss, on average, by {told}."


def _mean_increase(layers: Sequence[LayerAnalysis], method: str, advice: Mapping[str, str], what: str) -> float | None:
    chosen = [layer.methods.get(method) for layer in layers if advice[layer.name] == what]
    increases = [of.measured.loss_increase for of in chosen if of is not None]
    return float(np.mean(increases)) if increases else None


def _predictors(analysis: "Analysis") -> Iterator[str]:
    defined = [c for c in analysis.correlations if c.rho is not None]
    known = [c for c in defined if c.outcome.endswith("loss increase")]
    own = {c.outcome.split(":")[0]: c.rho or 0.0 for c in known if c.predictor == EXPECTED}
    if own:
        yield (
            "Can it be known beforehand which layers cost most? Agreement between the expected order of the layers and "
            "that of the loss measured with each compressed alone (Spearman's ρ: 1 the same order, 0 no relation, "
            f"−1 reversed): {_marks(own)}."
        )
    spread = [c for c in defined if c.predictor == EXPECTED and c.outcome.endswith(SPREAD)]
    if spread:
        marks = _marks({c.outcome.split(":")[0]: c.rho or 0.0 for c in spread})
        yield f"Agreement with how far compressing a layer moves the losses of single samples, up or down: {marks}."
    for outcome in dict.fromkeys(c.outcome for c in known if c.predictor == VARIATION):
        rivals = [c for c in known if c.outcome == outcome]
        variation = next(c for c in rivals if c.predictor == VARIATION)
        what = outcome.removesuffix(": loss increase")
        saved = f"{what.removeprefix('rescue by ')} saves over plain SVD"
        verdict = _verdict(variation, "plain SVD loses" if what == "svd" else saved)
        yield f"{verdict} {_best(max(rivals, key=lambda c: c.rho or 0.0))}"


def _verdict(correlation: Correlation, loss: str) -> str:
    """Whether the variation of Fisher information, the papers' predictor, holds for an outcome."""
    claim = (
        "The more unevenly a layer's Fisher information (how much the loss depends on each weight) is spread, the more"
    )
    told = f"(ρ = {correlation.rho:.2f}, {correlation.matrices} layers)"
    if not _certain(correlation):
        return f"{claim} {loss}? These layers do not say so with any certainty {told}."
    if (correlation.rho or 0.0) > 0:
        return f"{claim} {loss}: so it is here {told}."
    return f"{claim} {loss}? Here it is the reverse, against the papers' claim {told}."


def _best(correlation: Correlation) -> str:
    if not _certain(correlation):
        return "Nothing that was computed beforehand foretells it."
    return f"What foretells it best is the {correlation.predictor} (ρ = {correlation.rho:.2f})."


def _certain(correlation: Correlation) -> bool:
    return correlation.p_value is not None and correlation.p_value <= SIGNIFICANT
