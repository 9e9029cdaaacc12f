"""Which basis of the inner channels loses least under rounding: outputs and scores of a model, by gauge and scheme."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from scipy.linalg import hadamard
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from benchmarks.fake_quantization import Change, dynamic_int8, rounded_weights, stored_as, with_linears
from benchmarks.harness import Lines, Options, Result, Row
from hf_lowrank import METHODS, CompressionConfig, Statistics, compress
from hf_lowrank.compression.codes import coded, solver_for_codes
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import bar
from hf_lowrank.nn.layers_lowrank import LowRankLinear
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.gauge import Channels, balanced, flat, mean_metric, power, random_rotation, rotation
from hf_lowrank.solvers.methods import rounding_sides
from hf_lowrank.solvers.rounding import Grid
from hf_lowrank.solvers.scaled import Scaled
from hf_lowrank.tasks import collator, get_task
from hf_lowrank.training.evaluate import evaluate_splits

RATIOS, STUDIED = (0.33, 0.2, 0.1), (0.2, 0.1)
COMPARED_ROWS = 96

Gauge = Callable[[Factors, Scaled, int], Factors]

SCHEMES: dict[str, Change] = {
    "int8": dynamic_int8(),
    "int8, saturating": dynamic_int8(saturating=True),
    "int8 by token": dynamic_int8(per_token=True),
    "int8 weights": rounded_weights(Grid(8)),
    "int4 weights": rounded_weights(Grid(4)),
    "int4 by 32": rounded_weights(Grid(4, 32)),
    "float16": stored_as(torch.float16),
    "bfloat16": stored_as(torch.bfloat16),
}


def in_basis(metric: Callable[[Channels], Tensor], turn: Callable[[Tensor, int], Tensor]) -> Gauge:
    """The gauge R = H^½ Q for H = `metric` of the channels, and Q = `turn` of the inner moment in that basis."""

    def gauge(factors: Factors, sides: Scaled, seed: int) -> Factors:
        start = factors.balanced()
        channels = Channels.of(start, sides)
        basis = power(metric(channels), 0.5)
        basis = basis @ turn(channels.in_basis(basis).inputs, seed)
        up, down = start.up @ basis, torch.linalg.solve(basis, start.down)
        scale = (up.norm() / down.norm()).sqrt()
        return Factors(up / scale, down * scale)

    return gauge


def by_hadamard(moment: Tensor, seed: int) -> Tensor:
    """A Hadamard matrix of the largest power of two in r, times a random rotation of what remains."""
    size = len(moment)
    two = math.gcd(size, 1 << 30)
    signs = torch.from_numpy(hadamard(two) / two**0.5)
    return torch.kron(random_rotation(size // two, seed).contiguous(), signs)


def by_chance(moment: Tensor, seed: int) -> Tensor:
    """A random rotation."""
    return random_rotation(len(moment), seed)


def identity(channels: Channels) -> Tensor:
    """H = I: what balanced factors have."""
    return torch.eye(len(channels.inputs), dtype=torch.float64)


def importance(channels: Channels) -> Tensor:
    """H of equal moments on both sides."""
    return mean_metric(channels.outputs, channels.inputs)


GAUGES: dict[str, Gauge] = {
    "balanced": lambda factors, sides, seed: balanced(factors, sides),
    "balanced, rotated": in_basis(identity, by_chance),
    "balanced, Hadamard": in_basis(identity, by_hadamard),
    "whitened, rotated": in_basis(lambda channels: channels.inputs, by_chance),
    "half whitened, rotated": in_basis(lambda channels: power(channels.inputs, 0.5), by_chance),
    "equal moments, rotated": in_basis(importance, by_chance),
    "equal moments, Hadamard": in_basis(importance, by_hadamard),
    "equal moments, equal variances": in_basis(importance, rotation),
    "flat": flat,
}


def run(options: Options) -> Result:
    """What rounding changes in the outputs, by gauge; and scores of balanced and flat factors."""
    if options.model is None or options.task is None:
        raise LowRankError("gauge needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    study = Study(options)
    for ratio in STUDIED:
        study.changes(ratio)
    for ratio in RATIOS:
        study.scores(ratio)
    rows = study.lines.rows()
    changes, scores = ([row for row in rows if (kind in row)] for kind in ("gauge", "float"))
    title = f"Relative change of the outputs in percent by rounding, on {study.task.name}"
    notes = [
        "The mean of three rotations, or of --rounds. Weights and activations are rounded as quantizers do, in float.",
        "",
        Result(f"{study.task.score}, whole validation set", scores).markdown(),
    ]
    return Result(title, changes, notes, {"scores": scores})


def measured(pipeline: Pipeline) -> Statistics:
    """What kfac needs, on the samples that it would take."""
    found = pipeline.statistics(CompressionConfig("kfac"))
    assert found is not None
    return found


class Study:
    """The model, its data and its statistics, once; low-rank models by ratio and gauge."""

    def __init__(self, options: Options) -> None:
        pipeline = Pipeline.load(options.model or "", options.task or "", options.data_dir)
        self.model, self.tokenizer, self.task = pipeline.model, pipeline.tokenizer, get_task(options.task or "")
        self.validation = pipeline.validation
        self.statistics = measured(pipeline)
        self.seeds = range(min(3, options.rounds))
        options.output.mkdir(parents=True, exist_ok=True)
        self.lines = Lines(options.output / f"{Path(options.model or '').name}_gauge.jsonl")

    def changes(self, ratio: float) -> None:
        """A row for every gauge that has none: what every scheme changes in the outputs, and the dense model's."""
        ranks, dense = f"{ratio:.0%}", self.model.eval()
        missing = [name for name in ("(dense)", *GAUGES) if not self.lines.has(ranks=ranks, gauge=name)]
        start = self.low_rank(ratio) if missing else dense
        with bar("gauges", len(missing), "gauges") as shown:
            for name in missing:
                seeds = self.seeds if name != "balanced" else range(1)
                models = [dense] if name == "(dense)" else [self.turned(start, GAUGES[name], seed) for seed in seeds]
                self.lines.add(ranks=ranks, gauge=name, **self._change(models, dense if name == "(dense)" else start))
                shown.update()

    def scores(self, ratio: float) -> None:
        """The score of balanced and of flat factors in float, int8 and int4 weights, by nearest and by moments."""
        ranks = f"{ratio:.0%}"
        if self.lines.has(ranks=ranks, gauge=None):
            return
        start = self.low_rank(ratio)
        flats = [self.turned(start, flat, seed) for seed in self.seeds]
        int8, saturating, int4 = (SCHEMES[name] for name in ("int8", "int8, saturating", "int4 by 32"))
        figures = {
            "float": self.score(start),
            "int8, balanced": self.score(with_linears(start, int8)),
            "int8, flat": " / ".join(self.score(with_linears(model, int8)) for model in flats),
            "int8 by token, flat": self.score(with_linears(flats[0], SCHEMES["int8 by token"])),
            "int8 saturating, balanced": self.score(with_linears(start, saturating)),
            "int8 saturating, flat": self.score(with_linears(flats[0], saturating)),
            "int4 by 32, balanced": self.score(with_linears(start, int4)),
            "int4 by 32, flat": self.score(with_linears(flats[0], int4)),
            "the same by moments": self.score(self.by_moments(flats[0], Grid(4, 32))),
        }
        self.lines.add(ranks=ranks, **figures)

    def low_rank(self, ratio: float) -> PreTrainedModel:
        """The model at a share of its ranks, by kfac, with balanced factors."""
        config = CompressionConfig("kfac", ratio, gauge="balanced")
        return compress(copy.deepcopy(self.model), config, self.statistics, progress=False)[0].eval()

    @torch.no_grad()
    def turned(self, model: PreTrainedModel, gauge: Gauge, seed: int) -> PreTrainedModel:
        """A copy of a low-rank model in another gauge."""
        changed = copy.deepcopy(model)
        for name, layer in _low_rank_layers(changed):
            factors = gauge(Factors(layer.up.weight.double(), layer.down.weight.double()), self._sides(name), seed)
            _set_factors(layer, factors.up, factors.down)
        return changed

    @torch.no_grad()
    def by_moments(self, model: PreTrainedModel, grid: Grid) -> PreTrainedModel:
        """A copy with factors rounded by their moments; layers without statistics to the nearest."""
        changed = copy.deepcopy(model)
        factors = [f"{name}.{part}" for name, _ in _low_rank_layers(changed) for part in ("up", "down")]
        found = coded(changed, solver_for_codes(changed, "kfac", self.statistics), dict.fromkeys(factors, grid))
        for name, rounded in found.items():
            changed.get_submodule(name).weight.copy_(rounded.weight())
        return with_linears(changed, rounded_weights(grid))  # which leaves rounded weights as they are

    def score(self, model: PreTrainedModel) -> str:
        """On the whole validation set."""
        figures = evaluate_splits(model, self.tokenizer, self.task, self.validation, progress=False)
        return f"{figures['score']:.2f}"

    def _sides(self, name: str) -> Scaled:
        means = {kind: self.statistics.mean(kind, name) for kind in METHODS["kfac"].needs}
        return rounding_sides(METHODS["kfac"], means)

    def _change(self, models: list[PreTrainedModel], unrounded: PreTrainedModel) -> Row:
        expected = self._outputs(unrounded)
        return {
            name: f"{mean(self._relative(with_linears(model, change), expected) for model in models):.2f}"
            for name, change in SCHEMES.items()
        }

    def _relative(self, model: PreTrainedModel, expected: Tensor) -> float:
        change = self._outputs(model) - expected
        return 100 * float(change.norm() / (expected - expected.mean(dim=0)).norm())

    @torch.inference_mode()
    def _outputs(self, model: PreTrainedModel) -> Tensor:
        """The logits of some validation rows, [rows or tokens, n]."""
        rows = self.validation[0].select(range(min(COMPARED_ROWS, len(self.validation[0]))))
        outputs = []
        for batch in DataLoader(rows, batch_size=32, collate_fn=collator(self.task, self.tokenizer)):
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            outputs.append(logits[labels != -100] if logits.ndim > labels.ndim and labels.ndim > 1 else logits)
        return torch.cat([output.reshape(-1, output.shape[-1]) for output in outputs])


def _low_rank_layers(model: PreTrainedModel) -> list[tuple[str, LowRankLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


def _set_factors(layer: LowRankLinear, up: Tensor, down: Tensor) -> None:
    layer.up.weight.data, layer.down.weight.data = up.float().contiguous(), down.float().contiguous()
