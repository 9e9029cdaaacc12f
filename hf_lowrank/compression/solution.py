"""One layer's weight and statistics → what its directions are worth, and its factors at a rank. Edits nothing."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowrank.allocation import parameters
from hf_lowrank.compression.directions import Directions
from hf_lowrank.compression.found import Iterated, Ordered
from hf_lowrank.compression.report import LayerReport
from hf_lowrank.compression.rounded import RoundedLoss
from hf_lowrank.model.targets import Target
from hf_lowrank.model.weights import readable, solving_device, whole_weight
from hf_lowrank.nn.layers_lowrank import LowRankLayer, layer_class_for
from hf_lowrank.solvers import Method, Objective, loss_per_error, with_optimizer
from hf_lowrank.solvers.decomposition import Decomposition
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.family import DEFAULT_GAUGE
from hf_lowrank.solvers.methods import Means, mean_input, rounding_sides
from hf_lowrank.solvers.scaled import Scaled
from hf_lowrank.statistics import Statistics


@dataclass(frozen=True)
class LayerSolver:
    """The layers of a model, one at a time, by a method and, where it iterates, an optimizer other than the default.

    `gauge` is the basis of the inner channels, a name in `GAUGES`.
    """

    targets: dict[str, Target]
    method: Method
    statistics: Statistics | None
    optimizer: str | None = None
    gauge: str = DEFAULT_GAUGE

    def behind(self, names: Sequence[str], sums: Mapping[str, Tensor]) -> "LayerSolver":
        """The same for layers that read one input behind a compressed prefix, which is known by its `sums`.

        See `hf_lowrank.statistics.prefix.Prefix.measure`.
        """
        assert self.statistics is not None
        known = {kind: dict.fromkeys(names, total) for kind, total in sums.items()}
        return replace(self, statistics=replace(self.statistics, sums={**self.statistics.sums, **known}))

    def spectrum(self, name: str) -> Tensor:
        """What discarding each direction of a layer adds to the expected loss [min(out, in)], largest first.

        A layer that is factorized already has as many as its rank, and 0 for the rest.
        """
        return self.weigh(name, 0)[0]

    @torch.no_grad()
    def weigh(self, name: str, most: int) -> tuple[Tensor, Decomposition | None]:
        """The `spectrum` of a layer, and what its factors of a rank up to `most` need.

        None for that where `most` is 0, and by methods whose best factors are not known in closed form.
        """
        weight = self._weight(name)
        objective = self._objective(name, weight.device)
        found = objective.decompose(weight, most) if most and isinstance(objective, Scaled) else None
        worth = found.worth if found is not None else objective.spectrum(weight)
        spectrum = worth * ((self._loss_per_error(name, found or objective) or 1.0) / 2)
        rank = self.targets[name].rank
        if rank is not None:
            spectrum[rank:] = 0  # but for rounding
        return spectrum, found

    @torch.no_grad()
    def rounded_loss(self, name: str) -> RoundedLoss:
        """What a layer loses that is kept in few bits, at every rank."""
        weight = self._weight(name)
        objective = self._objective(name, weight.device)
        unit = (self._loss_per_error(name, objective) or 1.0) / 2
        return RoundedLoss.of(weight, objective.two_sided(), unit, self.targets[name].kind == "embedding")

    @torch.no_grad()
    def low_rank(
        self, name: str, rank: int, decomposition: Decomposition | None = None
    ) -> tuple[LowRankLayer, LayerReport, Directions | None]:
        """The layer as factors of a rank, in its own dtype, what they cost and lose, and their directions.

        None for directions that have no order, as a method that iterates finds them. A `decomposition` that `weigh`
        found for the layer spares another one.
        """
        started = time.perf_counter()
        target, weight = self.targets[name], self._weight(name)
        solution = self._solved(name, weight, rank, decomposition)
        with readable(target.module):
            factors = solution.factors
            low_rank = layer_class_for(target.module).from_factors(target.module, factors.up, factors.down)
        up, down = low_rank.matrices()
        stored = Factors(up.to(weight), down.to(weight))  # with the rounding of their dtype
        delta = weight - stored.product()
        if (change := self._mean_change(name, weight, delta)) is not None:
            low_rank.up.bias.add_(change.to(low_rank.up.bias))
        error, unit = solution.error(stored, delta), self._loss_per_error(name, solution.objective)
        report = LayerReport(
            name,
            *target.shape,
            rank,
            parameters(target.shape, None),
            parameters(target.shape, rank),
            relative_error=_root_ratio(delta.square().sum(), weight.square().sum()),
            weighted_error=_root_ratio(error, solution.whole),
            expected_loss=None if unit is None else float(error) * unit / 2,
            seconds=time.perf_counter() - started,
            trace=factors.trace,
            fisher_cosine=self._fisher_cosine(name),
        )
        return low_rank, report, solution.directions((unit or 1.0) / 2, stored, self.mean_input(name))

    def _solved(self, name: str, weight: Tensor, rank: int, found: Decomposition | None) -> "Ordered | Iterated":
        """The factors of a layer's weight [out, in], and what is known of them."""
        if found is None or found.most < rank:
            objective = self._objective(name, weight.device)
            if not isinstance(objective, Scaled):
                return Iterated.at(weight, rank, objective, self.rounding_sides(name, weight.device), self.gauge)
            weight = self._wanted(name, weight, objective)
            found = objective.decompose(weight, rank)
        return Ordered.at(weight, rank, found.to(weight.device), self.mean_input(name), self.gauge)

    def _weight(self, name: str) -> Tensor:
        weight = whole_weight(self.targets[name].module)
        return weight.to(solving_device(weight)).float()

    def _objective(self, name: str, device: torch.device) -> Objective:
        objective = self.method.objective({kind: mean.to(device) for kind, mean in self._means(name).items()})
        return objective if self.optimizer is None else with_optimizer(objective, self.optimizer)

    def rounding_sides(self, name: str, device: torch.device) -> Scaled:
        """What counts on both sides of a layer when something is rounded (see `methods.rounding_sides`)."""
        return rounding_sides(self.method, {kind: mean.to(device) for kind, mean in self._means(name).items()})

    def sides(self, name: str, device: torch.device) -> Scaled:
        """The two-sided error of a layer, of its centred inputs where it has a bias (see `mean_input`)."""
        return self._objective(name, device).two_sided()

    def mean_input(self, name: str) -> Tensor | None:
        """μ [in] of a layer with a bias, in float64; None where the method counts it like any other part."""
        kinds = [kind for kind in ("activation_mean", "active_tokens") if kind in self.method.needs]
        return mean_input(self._known(name, kinds))

    def reaches(self, name: str) -> bool:
        """Whether anything is known of a layer that its method needs."""
        return self.statistics is None or not self.method.needs or self.statistics.reach(name)

    def _means(self, name: str) -> Means:
        """What the method knows of a layer."""
        return self._known(name, self.method.needs)

    def _known(self, name: str, kinds: Sequence[str]) -> Means:
        """The means of these kinds: that of the inputs only where a bias can make up for what becomes of it."""
        biased = isinstance(getattr(self.targets[name].module, "bias", None), Tensor)
        known = [kind for kind in kinds if biased or kind != "activation_mean"]
        return {kind: self.statistics.mean(kind, name) for kind in known} if self.statistics is not None else {}

    def _wanted(self, name: str, weight: Tensor, objective: Objective) -> Tensor:
        """The weight to factorize: the layer's own or, behind a compressed prefix, what answers there as it did."""
        if self.statistics is None or name not in self.statistics.sums.get("drift", ()):
            return weight
        drift, tokens = self.statistics.mean("drift", name), self.statistics.mean("active_tokens", name).clamp_min(1)
        drift = (drift / tokens).to(weight.device)
        if (mean := self.mean_input(name)) is not None:
            drift = drift.double() - self._mean_drift(name, weight).outer(mean.to(weight.device))
        return objective.anchored(weight, drift)  # type: ignore[attr-defined]

    def _mean_change(self, name: str, weight: Tensor, delta: Tensor) -> Tensor | None:
        """What becomes of the mean output [out] by a change Δ of the weight, and of the inputs; None without a bias."""
        mean = self.mean_input(name)
        if mean is None:
            return None
        change = delta.double() @ mean.to(delta.device)
        if self.statistics is not None and name in self.statistics.sums.get("mean_drift", ()):
            change = change + weight.double() @ self._mean_drift(name, weight)
        return change

    def _mean_drift(self, name: str, like: Tensor) -> Tensor:
        """E (x − x′) [in], in float64."""
        assert self.statistics is not None
        drift, tokens = (self.statistics.mean(kind, name) for kind in ("mean_drift", "active_tokens"))
        return (drift / tokens.clamp_min(1)).to(like.device, torch.float64)

    def _loss_per_error(self, name: str, objective: Objective | Decomposition) -> float | None:
        """Twice the expected loss per error of a layer's objective; None where the statistics do not say."""
        if self.statistics is None:
            return None
        if self.method.in_loss_units:
            return self.statistics.curvature
        if not self.statistics.has("fisher_rows"):
            return None
        rows = self.statistics.mean("fisher_rows", name)
        return loss_per_error(objective, rows, self.targets[name].shape) * self.statistics.curvature

    def _fisher_cosine(self, name: str) -> float | None:
        """How close the method's factors come to the Fisher information, if the method measures that."""
        if self.statistics is None or "fisher_sketch" not in self.method.needs:
            return None
        return self.statistics.fisher_cosine(name)


def kept_report(target: Target) -> LayerReport:
    """The report of a layer that stays as it is."""
    size = parameters(target.shape, None)
    if not isinstance(target.module, LowRankLayer):
        return LayerReport(target.name, *target.shape, None, size, size, note="factors save nothing")
    left = target.module.num_parameters()
    return LayerReport(target.name, *target.shape, target.rank, size, left, note="stays at its rank")


def _root_ratio(error: Tensor, whole: Tensor) -> float:
    return float((error / whole).sqrt()) if whole > 0 else 0.0
