"""Hooks that hand over the inputs and output gradients of linear layers, and leave no trace on the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hf_lowrank.modeling_lowrank import tied_layers
from hf_lowrank.statistics.losses import NotSeparable

Deliver = Callable[[str, Tensor, Tensor], None]


@dataclass
class Recorder:
    """Collects (input, output gradient) of every call of the watched layers and delivers them once per batch and layer.

    A layer that is called once is delivered as soon as its gradient is there, so that its input is freed during the
    backward pass; one that is called several times (shared blocks) when the batch ends, its calls joined along tokens.
    """

    deliver: Deliver
    samples: int = 0
    inputs: dict[str, list[Any]] = field(default_factory=dict)  # the identity of every input of a layer in this batch
    arrived: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    numbers: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    counter: Iterator[int] = field(default_factory=count)

    def watch(self, name: str, module: nn.Module, tied_head: bool = False) -> torch.utils.hooks.RemovableHandle:
        """Start recording a layer, until the handle is removed.

        An embedding's inputs are its tokens [batch, tokens, 1], for one-hot vectors. A `tied_head` is recorded by the
        name of the embedding whose weight it has: its output gradient takes the place of the input, at unit length as a
        one-hot vector has, and its input that of the output gradient.
        """

        def forward_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            replaced = None
            if not output.requires_grad:  # the first layer on its path: the graph begins here
                output = replaced = output.detach().requires_grad_().clone()
            self.inputs.setdefault(name, []).append(self._identity(args[0]))
            x = args[0].detach()
            if isinstance(module, nn.Embedding):
                x = x[..., None]
            if tied_head:
                output.register_hook(lambda g: self._arrive(name, *_of_embedding(x, g)))
            else:
                output.register_hook(lambda g: self._arrive(name, x, g))
            return replaced

        return module.register_forward_hook(forward_hook)

    def begin_batch(self, samples: int) -> None:
        """Forget the calls of the last batch; the next one has this many samples."""
        self.samples = samples
        self.inputs.clear()
        self.arrived.clear()

    def end_batch(self) -> None:
        """Deliver the layers that were called several times."""
        for name, pairs in self.arrived.items():
            widest = max(x.shape[-1] for x, _ in pairs)
            if any(x.is_floating_point() for x, _ in pairs):  # tokens and the gradients of a tied head
                pairs = [(x if x.is_floating_point() else _one_hot(x, widest), g) for x, g in pairs]
            x, g = (torch.cat([self._by_token(t) for t in side], dim=1) for side in zip(*pairs, strict=True))
            self.deliver(name, x, g)

    def readers(self, name: str) -> tuple[str, ...]:
        """The layers that have read the same inputs as this one in this batch, itself included."""
        return tuple(other for other, inputs in self.inputs.items() if inputs == self.inputs[name])

    def _identity(self, tensor: Tensor) -> tuple[int, int]:
        """Equal for two inputs only if they are one tensor, not written to in between."""
        if tensor not in self.numbers:
            self.numbers[tensor] = next(self.counter)
        return self.numbers[tensor], tensor._version

    def _arrive(self, name: str, x: Tensor, g: Tensor) -> None:
        if len(self.inputs[name]) == 1:
            self.deliver(name, self._by_token(x), self._by_token(g))
        else:
            self.arrived.setdefault(name, []).append((x, g))

    def _by_token(self, tensor: Tensor) -> Tensor:
        """[batch, …, features] → [batch, tokens, features]."""
        if self.samples > 1 and tensor.shape[0] != self.samples:
            raise NotSeparable
        return tensor.reshape(self.samples, -1, tensor.shape[-1])


def _of_embedding(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(input, output gradient) of a linear layer → those of an embedding that has its weight."""
    length = g.norm(dim=-1, keepdim=True)
    return g / length.clamp_min(torch.finfo(g.dtype).tiny), x * length


def _one_hot(x: Tensor, size: int) -> Tensor:
    return nn.functional.one_hot(x[..., 0], size).float()


@contextmanager
def measuring(model: nn.Module, targets: dict[str, nn.Module], recorder: Recorder) -> Iterator[None]:
    """Within the block `model` is in evaluation mode without parameter gradients, and `recorder` watches its targets.

    Modes, `requires_grad`, hooks and config are as before afterwards, also after an exception.
    """
    modes = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    problem_type = getattr(config, "problem_type", None)  # which a model's own loss sets
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = []
    try:
        model.eval()  # no dropout
        for parameter in trainable:
            parameter.requires_grad_(False)  # autograd then skips the ordinary weight gradients
        for name, module in targets.items():
            handles.append(recorder.watch(name, module))
            for other in tied_layers(model, name) if isinstance(module, nn.Embedding) else ():
                tied = model.get_submodule(other)
                handles.append(recorder.watch(name, tied, tied_head=isinstance(tied, nn.Linear)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        if config is not None and getattr(config, "problem_type", None) != problem_type:
            config.problem_type = problem_type
        for module, training in modes.items():
            module.training = training
