"""Hooks that hand over the inputs and output gradients of layers, as linear ones, and leave no trace on the model."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hf_lowrank.model.targets import Target, tied_targets, unstacked
from hf_lowrank.nn.experts_lowrank import UnstackedExperts, projections, visits
from hf_lowrank.statistics.losses import NotSeparable
from hf_lowrank.statistics.patches import geometry, patches, reading

Deliver = Callable[[str, Tensor, Tensor, Tensor], None]
Read = Callable[[Hashable, tuple[str, ...], Tensor, Tensor], None]


@dataclass
class Recorder:
    """Collects (input, output gradient) of every call of the watched layers and delivers them once per batch and layer.

    A layer that is called once is delivered as soon as its gradient is there, so that its input is freed during the
    backward pass; one that is called several times (shared blocks) when the batch ends, its calls joined along tokens.
    `deliver` takes the layer's name, inputs x [batch, tokens, in], output gradients g [batch, tokens, out], and the
    largest entry of each token's gradient [batch, tokens]. `read` takes every call as its gradient comes: what tells
    its input from others of this batch, the names of all layers that read it, x, and those largest entries. Without
    them, as where a process only keeps in step, nothing is kept of a batch.
    """

    deliver: Deliver | None = None
    read: Read | None = None
    samples: int = 0
    calls: Counter[str] = field(default_factory=Counter)  # of a layer in this batch
    readers: dict[Hashable, tuple[str, ...]] = field(default_factory=dict)  # of every input in this batch
    arrived: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    numbers: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    counter: Iterator[int] = field(default_factory=count)
    rows: dict[nn.Module, "Rows"] = field(default_factory=dict)  # of the layers of experts, in their latest call
    convolutions: dict[str, nn.Module] = field(default_factory=dict)

    def watch(self, layer: Target, embedding: str | None = None) -> torch.utils.hooks.RemovableHandle:
        """Start recording a layer, until the handle is removed: by its own name, or that of its tied `embedding`.

        An embedding's inputs are its tokens [batch, tokens, 1], for one-hot vectors. Of a head that is tied to one the
        output gradient takes the place of the input, at unit length as a one-hot vector has, and its input that of the
        output gradient. A convolution's input is kept as it is until the layer is delivered, and then cut into patches.
        """
        name, looks_up = embedding or layer.name, layer.kind == "embedding"
        tied_head = embedding is not None and not looks_up
        if layer.kind == "convolution":
            self.convolutions[name] = reading(layer.module)

        def forward_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            replaced = None
            if not output.requires_grad:  # the first layer on its path: the graph begins here
                output = replaced = output.detach().requires_grad_().clone()
            self.calls[name] += 1
            key = self._key(name, args[0], alone=tied_head or looks_up)
            self.readers[key] = (*self.readers.get(key, ()), name)
            x = args[0].detach()
            if looks_up:
                x = x[..., None]
            rows = self.rows.get(module)
            if rows is not None:
                output.register_hook(lambda g: self._arrive(name, key, rows.by_sample(x), rows.by_sample(g)))
            elif tied_head:
                output.register_hook(lambda g: self._arrive(name, key, *_of_embedding(x, g)))
            else:
                output.register_hook(lambda g: self._arrive(name, key, x, g))
            return replaced

        return layer.module.register_forward_hook(forward_hook)

    def watch_routing(self, experts: UnstackedExperts) -> torch.utils.hooks.RemovableHandle:
        """Note which samples' tokens reach each expert, until the handle is removed."""

        def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            top_k_index = args[1]
            if len(top_k_index) % self.samples:
                raise NotSeparable
            for expert, tokens, _ in visits(top_k_index, experts.num_experts):
                rows = Rows.of(tokens // (len(top_k_index) // self.samples), self.samples)
                self.rows |= {getattr(experts, name)[expert]: rows for name in projections(experts)}

        return experts.register_forward_pre_hook(pre_hook)

    def begin_batch(self, samples: int, deliver: Deliver | None, read: Read | None) -> None:
        """Forget the calls of the last batch; the next one has this many samples, and goes to `deliver` and `read`."""
        self.samples, self.deliver, self.read = samples, deliver, read
        self.calls.clear()
        self.readers.clear()
        self.arrived.clear()
        self.rows.clear()

    def end_batch(self) -> None:
        """Deliver the layers that were called several times."""
        for name, calls in self.arrived.items():
            widest = max(x.shape[-1] for x, _, _ in calls)
            if any(x.is_floating_point() for x, _, _ in calls):  # tokens and the gradients of a tied head
                calls = [(x if x.is_floating_point() else _one_hot(x, widest), g, top) for x, g, top in calls]
            x, g, largest = (torch.cat(side, dim=1) for side in zip(*calls, strict=True))
            if self.deliver is not None:
                self.deliver(name, x, g, largest)

    def _key(self, name: str, tensor: Tensor, alone: bool) -> Hashable:
        """Equal for calls of two layers only if they read one tensor, not written to in between, in the same way.

        A layer `alone` shares with nobody: an embedding and its tied head keep something else than what they read.
        """
        if tensor not in self.numbers:
            self.numbers[tensor] = next(self.counter)
        cut = geometry(self.convolutions[name]) if name in self.convolutions else None
        key = (self.numbers[tensor], tensor._version, cut, name if alone else None)
        times = 0
        while name in self.readers.get((*key, times), ()):
            times += 1
        return (*key, times)

    def _arrive(self, name: str, key: Hashable, x: Tensor, g: Tensor) -> None:
        x, g = self._tokens(name, x, g)
        largest = g.abs().amax(dim=-1)
        if self.read is not None:
            self.read(key, self.readers[key], x, largest)
        if self.calls[name] == 1 and self.deliver is not None:
            self.deliver(name, x, g, largest)
        elif self.calls[name] > 1:
            self.arrived.setdefault(name, []).append((x, g, largest))

    def _tokens(self, name: str, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """One call of a layer: its inputs and output gradients by token."""
        if name in self.convolutions:
            x, g = patches(self.convolutions[name], x, g)
        return self._by_token(x), self._by_token(g)

    def _by_token(self, tensor: Tensor) -> Tensor:
        """[batch, …, features] → [batch, tokens, features]."""
        if self.samples > 1 and tensor.shape[0] != self.samples:
            raise NotSeparable
        return tensor.reshape(self.samples, -1, tensor.shape[-1])


@dataclass(frozen=True)
class Rows:
    """Which sample each row of an expert's input is of, and its place among the rows of that sample."""

    sample: Tensor  # [rows]
    place: Tensor  # [rows]
    shape: tuple[int, int]  # (samples, the most rows of one of them)

    @classmethod
    def of(cls, sample: Tensor, samples: int) -> "Rows":
        counts = (sample[:, None] == torch.arange(samples, device=sample.device)).cumsum(dim=0)
        place = counts.gather(1, sample[:, None])[:, 0] - 1
        return cls(sample, place, (samples, int(counts[-1].max())))

    def by_sample(self, rows: Tensor) -> Tensor:
        """[rows, features] → [samples, most rows, features], filled up with zeros, which no statistic counts."""
        filled = rows.new_zeros(*self.shape, rows.shape[-1])
        filled[self.sample, self.place] = rows
        return filled


def _of_embedding(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(input, output gradient) of a linear layer → those of an embedding that has its weight."""
    length = g.norm(dim=-1, keepdim=True)
    return g / length.clamp_min(torch.finfo(g.dtype).tiny), x * length


def _one_hot(x: Tensor, size: int) -> Tensor:
    return nn.functional.one_hot(x[..., 0], size).float()


@contextmanager
def measuring(model: nn.Module, targets: dict[str, Target], recorder: Recorder) -> Iterator[None]:
    """Within the block `model` is in evaluation mode without parameter gradients, and `recorder` watches its targets.

    Stacked experts are unstacked where some of their layers are targets. Modes, `requires_grad`, hooks, config and
    modules are as before afterwards, also after an exception.
    """
    tied = {name: tied_targets(model, target) for name, target in targets.items()}
    with unstacked(model, targets):
        modes = {module: module.training for module in model.modules()}
        config = getattr(model, "config", None)
        problem_type = getattr(config, "problem_type", None)  # which a model's own loss sets
        # by where they are, as those of offloaded layers are others after every call
        owned = [(module, name) for module in model.modules() for name in module._parameters]
        trainable = [
            (module, name) for module, name in owned if getattr(module._parameters[name], "requires_grad", False)
        ]
        handles = []
        try:
            model.eval()  # no dropout
            for module, name in trainable:
                getattr(module, name).requires_grad_(False)  # autograd then skips the ordinary weight gradients
            for target in targets.values():
                handles.append(recorder.watch(target))
                handles += [recorder.watch(other, embedding=target.name) for other in tied[target.name]]
            experts = [module for module in model.modules() if isinstance(module, UnstackedExperts)]
            handles += [recorder.watch_routing(module) for module in experts]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, name in trainable:
                getattr(module, name).requires_grad_(True)
            if config is not None and getattr(config, "problem_type", None) != problem_type:
                config.problem_type = problem_type
            for module, training in modes.items():
                module.training = training
