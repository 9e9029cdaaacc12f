"""Experts whose weights are 3-D parameters → the same experts as linear layers of their own, and back.

transformers stacks the weights of all experts of a block, [experts, out, in], in the classes that it decorates with
`use_experts_implementation`. Layers of their own can be factorized one by one.

This file travels with saved checkpoints as remote code: it imports nothing but torch and the file of the layers
next to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layers_lowrank import is_plain_linear

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")  # set by the decorator
# What `vars` of a module hold besides its own settings: what every module has, and the traces of accelerate's hooks.
_MACHINERY = {*vars(nn.Module()), "forward", "_old_forward", "_hf_hook"}


class UnstackedExperts(nn.Module):
    """What an experts module of transformers computes, by an nn.Linear for every projection of every expert.

    They are in `gate_up_proj` (or `up_proj`) and `down_proj`, each a list with an entry for every expert, whose weight
    and bias are views of the stacked parameters, in their device, dtype and requires_grad. The gate, the activation and
    a norm are those of the class it was made from, and its settings are attributes here too. It is no instance of that
    class, whose models initialize and shard the stacked parameters of its instances.
    """

    stacked_class: type[nn.Module]
    num_experts: int
    has_gate: bool
    has_post_expert_norm: bool
    act_fn: Any
    post_expert_norm: Any

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        vars(self).update(_settings(experts), stacked_class=type(experts))
        for name, child in experts.named_children():
            self.add_module(name, child)
        for name in projections(experts):
            self.add_module(name, nn.ModuleList(_unbound(experts, name)))
        self.training = experts.training

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of every token's experts, weighted: tokens [tokens, hidden], the other two [tokens, k].

        It is summed in the wider of the two dtypes, as transformers' grouped_mm does.
        """
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        total = torch.zeros_like(hidden_states, dtype=dtype)
        first, second = (getattr(self, name) for name in projections(self))
        for expert, tokens, places in visits(top_k_index, self.num_experts):
            state = first[expert](hidden_states[tokens])
            state = self._apply_gate(state) if self.has_gate else self.act_fn(state)
            state = second[expert](state)
            if self.has_post_expert_norm:
                state = self.post_expert_norm(state)
            state = state * top_k_weights[tokens, places, None]
            total.index_add_(0, tokens, state.to(dtype))
        return total.to(hidden_states.dtype)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        stacked_class: Any = self.stacked_class
        return stacked_class._apply_gate(self, gate_up)

    @property
    def all_dense(self) -> bool:
        """Whether none of its layers is factorized, quantized or wrapped."""
        return all(is_plain_linear(layer) for layer in self.linears())

    def linears(self) -> Iterator[nn.Module]:
        """The layer of every projection of every expert."""
        for name in projections(self):
            yield from getattr(self, name)


def visits(top_k_index: Tensor, num_experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, their place among the token's experts) in the order in which they are computed.

    `top_k_index` [tokens, k] holds experts; numbers from `num_experts` on stand for none. Experts without a token are
    left out.
    """
    chosen = top_k_index.T.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.clamp(max=num_experts).bincount(minlength=num_experts + 1).tolist()
    parts = order.split(counts)[:num_experts]
    tokens = len(top_k_index)
    return [(expert, part % tokens, part // tokens) for expert, part in enumerate(parts) if len(part)]


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of an experts module's two projections."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def is_stacked(module: nn.Module) -> bool:
    """Whether a module is experts of the form that transformers' `use_experts_implementation` describes."""
    if isinstance(module, UnstackedExperts) or not all(isinstance(getattr(module, f, None), bool) for f in _FLAGS):
        return False
    found = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    first, second = projections(module)
    if len(found.get(second, ())) != 3 or any(True for _ in module.buffers(recurse=False)):
        return False
    width, inner = found[second][:0:-1] if module.is_transposed else found[second][1:]
    shapes = {first: (inner * (2 if module.has_gate else 1), width), second: (width, inner)}
    experts = getattr(module, "num_experts", None)
    expected: dict[str, tuple[int | None, ...]]
    expected = {name: (experts, *(shape[::-1] if module.is_transposed else shape)) for name, shape in shapes.items()}
    if module.has_bias:
        expected |= {f"{name}_bias": (experts, shape[0]) for name, shape in shapes.items()}
    return found == expected


def unstacked_names(model: nn.Module, remove_duplicate: bool = False) -> dict[str, nn.Module]:
    """{what a layer of stacked experts is called once they are unstacked: the experts}, for all of a model."""
    return {
        f"{prefix}.{name}.{number}": experts
        for prefix, experts in model.named_modules(remove_duplicate=remove_duplicate)
        if is_stacked(experts)
        for name in projections(experts)
        for number in range(len(getattr(experts, name)))
    }


@torch.no_grad()
def restack(experts: UnstackedExperts) -> nn.Module:
    """The module that unstacked experts were made of, of its own class, with their weights copied into 3-D parameters.

    Raises:
        ValueError: they are no longer all nn.Linear.
    """
    if not experts.all_dense:
        raise ValueError("experts with factorized or quantized layers cannot be stacked")
    stacked: Any = experts.stacked_class.__new__(experts.stacked_class)
    nn.Module.__init__(stacked)
    vars(stacked).update(_settings(experts))
    del stacked.stacked_class
    for name, child in experts.named_children():
        if name not in projections(experts):
            stacked.add_module(name, child)
    for name in projections(experts):
        layers = list(getattr(experts, name))
        weights = [layer.weight.mT if stacked.is_transposed else layer.weight for layer in layers]
        stacked.register_parameter(name, _stack(weights))
        if stacked.has_bias:
            stacked.register_parameter(f"{name}_bias", _stack([layer.bias for layer in layers]))
    stacked.training = experts.training
    return stacked


def own_memory(experts: UnstackedExperts) -> None:
    """Copy the weights that are still views of the stacked parameters, so that those can be freed."""
    for layer in filter(is_plain_linear, experts.linears()):
        for parameter in layer.parameters():
            if parameter.untyped_storage().nbytes() > parameter.nbytes:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _unbound(experts: nn.Module, name: str) -> Iterator[nn.Linear]:
    """A linear layer for every expert: views of its slices of the parameters called `name`."""
    stack, biases = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    weights = stack.detach().mT if experts.is_transposed else stack.detach()
    _, out_features, in_features = weights.shape
    for number, weight in enumerate(weights):
        linear = nn.Linear(in_features, out_features, bias=biases is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=stack.requires_grad)
        if biases is not None:
            linear.bias = nn.Parameter(biases.detach()[number], requires_grad=biases.requires_grad)
        if getattr(experts, "_is_hf_initialized", False):
            linear._is_hf_initialized = True  # type: ignore[assignment]  # its weights are: leave them alone
        yield linear.train(experts.training)


def _stack(tensors: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack(tensors), requires_grad=any(tensor.requires_grad for tensor in tensors))


def _settings(experts: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(experts).items() if name not in _MACHINERY}
