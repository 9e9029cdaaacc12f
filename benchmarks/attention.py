"""Attention projections factorized together, against each for itself, at the same number of parameters of the model.

Three ways to use the structure of BERT's attention, per head or per layer, each by the Kronecker-factored objective:

- q, k and v read one input: one `down` for all three.
- v and o: an output is Σ_t a_t W_o W_v x_t, and only the product of the two matters in each head. Of its best rank-r
  approximation both factors have the width r: a head with fewer value dimensions.
- q and k: the same of the scores qᵀk, a head with fewer query and key dimensions.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Result, Row
from hf_lowrank import compute_statistics
from hf_lowrank.allocation import ALLOCATIONS
from hf_lowrank.allocation.choices import Choices, layer_choices
from hf_lowrank.allocation.costs import parameters
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.loading import load_model
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import find_targets
from hf_lowrank.solvers import METHODS
from hf_lowrank.solvers.methods import GRADIENT_DAMPING
from hf_lowrank.solvers.scaled import Scaled, WhiteningScaling
from hf_lowrank.tasks import get_task, load_validation
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.evaluate import evaluate_splits

PATTERNS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
SHARES = (0.66, 0.5, 0.33, 0.2, 0.1)  # of the parameters of all linears of the blocks
SAMPLES = 512


@dataclass(frozen=True)
class Unit:
    """What has one rank: its choices, and how it changes the model's weights at a rank."""

    choices: Choices
    change: Callable[[dict[str, Any], int], None]


def run(options: Options) -> Result:
    """Scores of a BERT-like model with all linears of its blocks factorized, without fine-tuning."""
    if options.model is None or options.task is None:
        raise LowRankError("attention needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    study = _Study(options)
    variants = {
        "each for itself": study.separate(),
        "one down for q, k, v": study.shared_down(),
        "v–o by head": study.values_and_outputs(),
        "v–o and q–k by head": study.values_and_outputs(with_queries=True),
    }
    rows: list[Row] = []
    with bar("attention", len(SHARES) * len(variants), "models") as shown:
        for share in SHARES:
            row = {"parameters kept": f"{share:.0%}"}
            for name, units in variants.items():
                row[name] = f"{study.score(units, share):.2f}"
                shown.update()
            rows.append(row)
    return Result(
        f"Attention projections together and apart: {study.task.score} on {study.task.name}, dense {study.dense:.2f}",
        rows,
        ["All linears of the blocks are factorized, those outside of attention each for itself; greedy ranks."],
        {"model": Path(options.model).name},
    )


class _Study:
    """A model, its data, and the statistics of the linears of its blocks."""

    def __init__(self, options: Options) -> None:
        self.task = get_task(options.task or "")
        self.model, self.tokenizer = load_model(options.model or "", self.task)
        self.validation = load_validation(self.task, options.data_dir, self.tokenizer, self.model.config)
        loader = calibration_loader(self.model, self.tokenizer, self.task, options.data_dir, SAMPLES, seed=0)
        batches = list(loader)
        self.statistics = compute_statistics(self.model, batches, METHODS["kfac"].needs, progress=False)
        self.layers = _linears(self.model)
        self.blocks = [name.removesuffix(f".{PATTERNS[0]}") for name in self.layers if name.endswith(PATTERNS[0])]
        self.heads = self.model.config.num_attention_heads
        self.queries = _output_moments(self.model, self._named(PATTERNS[0]), batches)
        self.total = sum(layer.weight.numel() for layer in self.layers.values())
        self.dense = self._evaluated(self.model)

    def separate(self, but: tuple[str, ...] = ()) -> list[Unit]:
        """A pair of factors for every linear, some projections apart."""
        return [self._linear((name,)) for name in self.layers if not name.endswith(but)]

    def shared_down(self) -> list[Unit]:
        """One `down` for q, k and v, which have an `up` each; o for itself."""
        joint = [self._linear(tuple(f"{block}.{pattern}" for pattern in PATTERNS[:3])) for block in self.blocks]
        return joint + self.separate(but=PATTERNS[:3])

    def values_and_outputs(self, with_queries: bool = False) -> list[Unit]:
        """Heads with fewer value dimensions, and with fewer query and key dimensions or q and k for themselves."""
        heads = [(block, head) for block in self.blocks for head in range(self.heads)]
        units = [self._value_head(block, head) for block, head in heads]
        if not with_queries:
            return units + self.separate(but=PATTERNS[2:])
        return units + [self._query_head(*each) for each in heads] + self.separate(but=PATTERNS)

    def score(self, units: list[Unit], share: float) -> float:
        """Of the model with ranks that together keep this share of the parameters."""
        choices = {str(n): unit.choices for n, unit in enumerate(units)}
        chosen = ALLOCATIONS["greedy"].decide(choices, share * self.total)
        model = copy.deepcopy(self.model)
        layers = _linears(model)
        with torch.no_grad():
            for unit, index in zip(units, chosen.values(), strict=True):
                if (rank := unit.choices.ranks[index]) is not None:
                    unit.change(layers, rank)
        return self._evaluated(model)

    def _linear(self, names: tuple[str, ...]) -> Unit:
        """Layers of one input as a single matrix, their outputs one below the other."""
        weight = torch.cat([self.layers[name].weight.detach() for name in names])
        gradients = torch.block_diag(*(_damped(self.statistics.mean("gradient_moment", name)) for name in names))
        right = self._objective(names[-1], self.statistics.mean("gradient_moment", names[-1])).right
        objective = Scaled(WhiteningScaling(gradients, 0.0), right)  # each damped by its own scale

        def change(layers: dict[str, Any], rank: int) -> None:
            product = objective.factorize(weight, rank).product()
            for name, part in zip(names, product.split([len(layers[name].weight) for name in names]), strict=True):
                layers[name].weight.copy_(part)

        shape = (weight.shape[0], weight.shape[1])
        spectrum = objective.spectrum(weight).tolist()
        return Unit(layer_choices(shape, parameters, spectrum=spectrum), change)

    def _value_head(self, block: str, head: int) -> Unit:
        """The best approximation of W_o W_v in one head: that of W_o for the mixed values it reads."""
        output, part = f"{block}.{PATTERNS[3]}", self._slice(head)
        objective = self._objective(output, self.statistics.mean("gradient_moment", output), part)
        weight = self.layers[output].weight.detach()[:, part]

        def change(layers: dict[str, Any], rank: int) -> None:
            layers[output].weight[:, part] = objective.factorize(weight, rank).product().to(weight)

        return Unit(self._head_choices(objective.spectrum(weight)), change)

    def _query_head(self, block: str, head: int) -> Unit:
        """The best projection of a head's queries, for the scores that they have with its keys."""
        query, part = f"{block}.{PATTERNS[0]}", self._slice(head)
        gradients = self.statistics.mean("gradient_moment", query)[part, part]
        means = {
            "gradient_moment": gradients,
            "activation_moment": self.queries[query][part, part],
            "active_tokens": torch.ones(()),
        }
        objective, identity = METHODS["kfac"].objective(means), torch.eye(len(gradients))

        def change(layers: dict[str, Any], rank: int) -> None:
            projection = objective.factorize(identity, rank).product().float()
            layers[query].weight[part] = projection @ layers[query].weight[part]
            layers[query].bias[part] = projection @ layers[query].bias[part]

        return Unit(self._head_choices(objective.spectrum(identity)), change)

    def _objective(self, name: str, gradients: Tensor, part: slice | None = None) -> Any:
        """That of a layer, or of some of its inputs, with a gradient moment [out, out]."""
        inputs, part = self.statistics.mean("activation_moment", name), part or slice(None)
        tokens = self.statistics.mean("active_tokens", name)
        means = {"gradient_moment": gradients, "activation_moment": inputs[part, part], "active_tokens": tokens}
        return METHODS["kfac"].objective(means)

    def _head_choices(self, spectrum: Tensor) -> Choices:
        """All widths of a head; each dimension is a row of one projection and a row or column of another."""
        losses = [float(spectrum[rank:].sum()) for rank in range(len(spectrum) + 1)]
        hidden = self.model.config.hidden_size
        costs = [2 * rank * hidden for rank in range(len(losses))]
        ranks: tuple[int | None, ...] = (*range(1, len(spectrum)), None)  # no head without any dimension
        return Choices((hidden, len(spectrum)), ranks, tuple(costs[1:]), tuple(losses[1:]))

    def _slice(self, head: int) -> slice:
        width = self.model.config.hidden_size // self.heads
        return slice(head * width, (head + 1) * width)

    def _named(self, pattern: str) -> list[str]:
        return [f"{block}.{pattern}" for block in self.blocks]

    def _evaluated(self, model: Any) -> float:
        return evaluate_splits(model, self.tokenizer, self.task, self.validation, progress=False)["score"]


def _damped(moment: Tensor) -> Tensor:
    return moment + GRADIENT_DAMPING * moment.diagonal().mean() * torch.eye(len(moment))


def _linears(model: Any) -> dict[str, Any]:
    layers = find_targets(model)
    if not any(name.endswith(PATTERNS[0]) for name in layers):
        raise LowRankError(f"{type(model).__name__} has no {PATTERNS[0]}: the study is of BERT-like attention")
    return {name: target.module for name, target in layers.items()}


@torch.no_grad()
def _output_moments(model: Any, names: list[str], batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """E y yᵀ of layers' outputs over the tokens that are no padding."""
    sums = {name: torch.zeros(()) for name in names}
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    mask = torch.zeros(())

    def add(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            kept = output[mask.bool()]
            sums[name] = sums[name] + kept.T @ kept / tokens

        return hook

    handles = [model.get_submodule(name).register_forward_hook(add(name)) for name in names]
    for batch in batches:
        mask = batch["attention_mask"]
        model(**{key: value for key, value in batch.items() if key != "labels"})
    for handle in handles:
        handle.remove()
    return sums
