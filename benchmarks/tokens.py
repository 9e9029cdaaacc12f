"""Which tokens a model's moments are made of, and what leaving out, clipping or evening out some of them does → nats.

For the trained model of `lm`, or a real one. Rows are written as they come, and read again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import Lines, Options, Result, Row
from benchmarks.lm import Study as Trained
from benchmarks.lm_train import Recipe, cache_folder
from hf_lowrank import METHODS, CompressionConfig, Pipeline, Statistics, compress, compute_statistics
from hf_lowrank.model.targets import find_targets
from hf_lowrank.statistics.kinds import KINDS
from hf_lowrank.tasks import get_task
from hf_lowrank.training.divergence import Reference

SHARES = (0.9, 0.8, 0.6, 0.4)  # of the parameters of the blocks that are kept
WINDOWS, TESTED = 64, 32  # that statistics are measured on, and that are compared with the dense model
OUTER, MANY, FEW = 0.125, 2.0, 0.01  # left out at each end; clipped beyond so many medians; the share of large tokens
INPUTS = ("activation_moment", "activation_mean", "active_tokens")


def plain(x: Tensor) -> Tensor:
    """Every token as it is: of x [windows, tokens, n] a factor for every token [windows, tokens]."""
    return x.new_ones(x.shape[:2])


def first(x: Tensor) -> Tensor:
    """The first token of a window left out."""
    factor = plain(x)
    factor[:, 0] = 0
    return factor


def outer(x: Tensor) -> Tensor:
    """Of every window the shortest and the longest tokens left out, `OUTER` of them at each end (LEMS)."""
    length = x.norm(dim=-1)
    low, high = (length.quantile(q, dim=1, keepdim=True) for q in (OUTER, 1 - OUTER))
    return ((length >= low) & (length <= high)).to(x.dtype)


def clipped(x: Tensor) -> Tensor:
    """No token longer than `MANY` times the median one of its window."""
    length = x.norm(dim=-1)
    most = MANY * length.median(dim=1, keepdim=True).values
    return (most / length.clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)


def even(x: Tensor) -> Tensor:
    """All tokens at one length."""
    length = x.norm(dim=-1)
    return torch.where(length > 0, 1 / length.clamp_min(torch.finfo(x.dtype).tiny), 0)


TREATMENTS: dict[str, Callable[[Tensor], Tensor]] = {f.__name__: f for f in (plain, first, outer, clipped, even)}
METHODS_TREATED = ("kfac", "whiten", "fwsvd")
SIDES = ("x", "g", "x and g")  # whose tokens are treated: of inputs, of output gradients, of both


def run(options: Options) -> Result:
    """The shares of first and of large tokens by kind of layer, and a row for each method and treatment."""
    study = Study(options)
    wanted = [(m, t, s) for m in _methods(options) for t in TREATMENTS for s in _sides(m, t)]
    for method, treatment, side in wanted:
        for share in SHARES:
            study.measure(method, treatment, side, share)
    rows = [_row(study.lines.rows(), *which) for which in wanted]
    return Result(
        f"tokens: {study.name}; nats from dense by what becomes of tokens before moments are added up",
        rows,
        [
            f"Factors of one shot on {WINDOWS} samples, KL to dense on {TESTED} others by the share of the blocks' "
            "parameters kept. Moments are scaled back to the trace that they had. Sums of squares by token:",
            *[f"- {line}" for line in study.shares()],
        ],
        {"rows": study.lines.rows()},
    )


def _methods(options: Options) -> list[str]:
    """Those that are asked for."""
    return [method for method in METHODS_TREATED if options.methods is None or method in options.methods]


def _sides(method: str, treatment: str) -> tuple[str, ...]:
    return SIDES[:1] if treatment == "plain" or method == "whiten" else SIDES if method == "kfac" else SIDES[2:]


def _row(lines: list[dict[str, Any]], method: str, treatment: str, side: str) -> Row:
    known = {(row["method"], row["treatment"], row["side"], row["share"]): row["nats"] for row in lines}
    shown = {f"{share:.0%} kept": f"{known[method, treatment, side, share]:.4f}" for share in SHARES}
    return {"method": method, "tokens": treatment, "of": "" if treatment == "plain" else side, **shown}


@dataclass
class Study:
    """A model with its samples, and the rows that there are."""

    options: Options

    @cached_property
    def name(self) -> str:
        """What the model is called."""
        if self.options.model is not None:
            return Path(self.options.model).name
        return f"the Llama of lm after {self._trained.tokens / 1e6:.1f}M tokens"

    @cached_property
    def lines(self) -> Lines:
        """The rows, beside the model or the results."""
        if self.options.model is None:
            return Lines(self._trained.folder / "tokens.jsonl")
        self.options.output.mkdir(parents=True, exist_ok=True)
        return Lines(self.options.output / f"tokens_{self.name}.jsonl")

    @cached_property
    def pipeline(self) -> Pipeline:
        """The model and its data."""
        if self.options.model is not None:
            rest: Any = {"samples": WINDOWS, "progress": False, "seed": self.options.seed}
            return Pipeline.load(self.options.model, self.options.task, self.options.data_dir, **rest)
        return Pipeline(self._trained.model, self._trained.tokenizer, get_task("text"), progress=False)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """What statistics are measured on."""
        if self.options.model is not None:
            return list(self.pipeline.calibration)
        return self._trained.calibration(self.options.seed, WINDOWS)

    @cached_property
    def reference(self) -> Reference:
        """The dense model's predictions of other samples."""
        if self.options.model is not None:
            rows = [split.select(range(min(TESTED, len(split)))) for split in self.pipeline.validation]
            return Reference(self.pipeline.model, *self.pipeline.reading, rows)
        ids = [window.tolist() for window in self._trained.test[:: max(1, len(self._trained.test) // TESTED)]]
        rows = [Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": ids})]
        return Reference(self.pipeline.model, *self.pipeline.reading, rows)

    def measure(self, method: str, treatment: str, side: str, share: float) -> None:
        """Compress with moments treated so, and add how far that is from the dense model, unless that was done."""
        key: dict[str, Any] = {"method": method, "treatment": treatment, "side": side, "share": share}
        if self.lines.has(**key):
            return
        statistics = self._treated(METHODS[method].labels, treatment, side)
        config = CompressionConfig(method, keep=share, sequential=False)
        small, _ = compress(deepcopy(self.pipeline.model), config, statistics, progress=False)
        self.lines.add(**key, nats=self.reference.divergence(small, progress=False).mean)

    def shares(self) -> Iterator[str]:
        """By kind of layer what share of the squares of inputs and gradients first and large tokens have."""
        found: dict[str, list[tuple[float, ...]]] = {}
        for name, sides in _energies(self.pipeline.model, self.batches).items():
            figures = [part for side in sides for part in (float(side[:, 0].sum() / side.sum()), _of_largest(side))]
            found.setdefault(name.rpartition(".")[2], []).append(tuple(figures))
        for kind, rows in found.items():
            a, b, c, d = (f"{median(values):.1%} (at most {max(values):.1%})" for values in zip(*rows, strict=True))
            yield f"`{kind}`: inputs, first token {a}, largest {FEW:.0%} {b}; gradients, first token {c}, largest {d}"

    @cached_property
    def _trained(self) -> Trained:
        return Trained(cache_folder(self.options.cache), Recipe())

    @cached_property
    def _known(self) -> dict[tuple[str, str], Statistics]:
        return {}

    def _measured(self, labels: str, treatment: str) -> Statistics:
        """Everything that the methods with these labels need, of tokens treated so."""
        if (labels, treatment) not in self._known:
            kinds = [*INPUTS, "gradient_moment"] if labels == "model" else [*INPUTS, "fisher_rows"]
            with treating(TREATMENTS[treatment]):
                found = compute_statistics(self.pipeline.model, self.batches, kinds, labels=labels, progress=False)
            self._known[labels, treatment] = found
        return self._known[labels, treatment]

    def _treated(self, labels: str, treatment: str, side: str) -> Statistics:
        """The statistics with the treated moments of a side in the place of the plain ones, at their traces."""
        before, after = self._measured(labels, "plain"), self._measured(labels, treatment)
        sums = dict(before.sums)
        if "x" in side:
            sums |= {kind: dict(after.sums[kind]) for kind in INPUTS}
            for name in sums["activation_moment"]:
                scale = _mean_square(before, name) / _mean_square(after, name)
                sums["activation_moment"][name] = after.sums["activation_moment"][name] * scale
                sums["activation_mean"][name] = after.sums["activation_mean"][name] * scale**0.5
        if "g" in side and "gradient_moment" in sums:
            both = before.sums["gradient_moment"], after.sums["gradient_moment"]
            sums["gradient_moment"] = {n: both[1][n] * (both[0][n].trace() / both[1][n].trace()) for n in both[1]}
        if "fisher_rows" in sums:
            sums["fisher_rows"] = after.sums["fisher_rows"]
        return replace(before, sums=sums)


def _mean_square(statistics: Statistics, name: str) -> Tensor:
    return statistics.sums["activation_moment"][name].trace() / statistics.sums["active_tokens"][name]


@contextmanager
def treating(factor: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, inputs and output gradients are multiplied by a factor for each token before they count."""

    def inputs(add: Any, total: Tensor, x: Tensor, active: Tensor, context: Any = None) -> None:
        own = factor(x)
        add(total, x * own[..., None], active * (own > 0), context)

    def gradients(add: Any, total: Tensor, x: Tensor, g: Tensor, context: Any = None) -> None:
        add(total, x * factor(x)[..., None], g * factor(g)[..., None], context)

    before = dict(KINDS)
    try:
        for kind in (*INPUTS, "gradient_moment", "fisher_rows"):
            KINDS[kind] = replace(before[kind], add=partial(inputs if kind in INPUTS else gradients, before[kind].add))
        yield
    finally:
        KINDS.update(before)


def _energies(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """For every layer |x|² and |g|² of the tokens [samples, tokens], by the loss with the labels of the data."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def hook(name: str, module: Any, args: Any, output: Tensor) -> None:
        xs, gs = seen.setdefault(name, ([], []))
        xs.append(args[0].detach().square().sum(dim=-1))
        output.register_hook(lambda g: gs.append(g.square().sum(dim=-1)))

    handles = [target.module.register_forward_hook(partial(hook, name)) for name, target in find_targets(model).items()]
    try:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (_padded(xs), _padded(gs)) for name, (xs, gs) in seen.items()}


def _padded(parts: list[Tensor]) -> Tensor:
    widest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, widest - part.shape[1])) for part in parts])


def _of_largest(energy: Tensor) -> float:
    """The share that the largest `FEW` of the tokens have, of those that have any."""
    values = energy[energy > 0]
    return float(values.topk(max(1, round(FEW * len(values)))).values.sum() / values.sum())
