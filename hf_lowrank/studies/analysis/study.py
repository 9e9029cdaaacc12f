"""What every study works with: the layers and their objectives, and measurements that are made once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_lowrank.model.targets import Target
from hf_lowrank.nn.editing_lowrank import replaced
from hf_lowrank.nn.layers_lowrank import dense_weight, with_weight
from hf_lowrank.solvers import Objective, get_method
from hf_lowrank.statistics import Statistics
from hf_lowrank.studies.analysis.evaluator import Evaluator, Measurement
from hf_lowrank.studies.analysis.journal import Journal

Change = tuple[Mapping[str, Tensor | nn.Module], dict[str, float]]  # new weights or layers, and facts to keep of them


@dataclass
class Study:
    """A model's targeted layers with their statistics, its evaluator, and the journal of what was measured."""

    targets: dict[str, Target]
    statistics: Statistics
    evaluator: Evaluator
    journal: Journal = field(default_factory=lambda: Journal(None, {}))
    advance: Callable[[], Any] = lambda: None

    def weight(self, name: str) -> Tensor:
        """A layer's own weight [out, in] in float32."""
        return dense_weight(self.targets[name].module).detach().float()

    def objective(self, method: str, name: str) -> Objective:
        """What a method minimises for a layer whose bias stays as it is, so that the mean input counts."""
        chosen, device = get_method(method), self.weight(name).device
        known = [kind for kind in chosen.needs if kind != "activation_mean"]
        return chosen.objective({kind: self.statistics.mean(kind, name).to(device) for kind in known})

    def measure(self, key: dict[str, Any], change: Callable[[], Change]) -> tuple[Measurement, dict[str, float]]:
        """The model with changed weights, from the journal or by evaluating it, and the facts of the change."""
        record = self.journal.get(key)
        if record is None:
            changed, facts = change()
            layers = {name: self._layer(name, new) for name, new in changed.items()}
            with replaced(self.evaluator.model, layers):
                measured = self.evaluator.measure()
            record = {"measured": asdict(measured), "facts": facts}
            self.journal.add(key, record)
        self.advance()
        return Measurement(**record["measured"]), record["facts"]

    def _layer(self, name: str, new: Tensor | nn.Module) -> nn.Module:
        return with_weight(self.targets[name].module, new) if isinstance(new, Tensor) else new


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """‖Δ‖ / ‖W‖ over all layers together, from the pairs (Δ, W) of each."""
    squares = [(float(delta.double().square().sum()), float(whole.double().square().sum())) for delta, whole in pairs]
    return float((sum(d for d, _ in squares) / max(sum(w for _, w in squares), 1e-300)) ** 0.5)
