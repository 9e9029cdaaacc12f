"""A model → its blocks in the order of a forward pass, run one at a time, their weights read from disk when needed."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader, has_offloaded_params
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from hf_lowrank.jobs.checkpoint import Store
from hf_lowrank.jobs.freed import give_back
from hf_lowrank.nn.experts_lowrank import is_stacked

# What two runs of a block on the same inputs may differ by, relative to the inputs: rounding.
AGREEMENT = 1e-4
PLAIN = (bool, int, float, str, type(None))  # what a block may give besides tensors


class NotAChain(Exception):
    """A model's blocks cannot be run one at a time; the message says why, as a part of a sentence."""


class Reached(Exception):
    """A run has come as far as it has to."""


def outer_blocks(model: nn.Module) -> dict[str, str]:
    """{entry: its list} of the module lists that are in no other."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {f"{name}.{n}": name for name in outer for n in range(len(model.get_submodule(name)))}  # type: ignore[arg-type]


def list_of(block: str) -> str:
    """The name of the list that a block is in."""
    return block.rpartition(".")[0]


def blocks_on_disk(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """A `device_map` of all parts of a model: its blocks stay on disk, all else goes to a device."""
    entries, rest = outer_blocks(model), "cpu" if device.type == "cpu" else device.index or 0

    def places(name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        if name in entries:
            yield name, "disk"
        elif name and not any(entry.startswith(f"{name}.") for entry in entries):
            yield name, rest
        else:
            around = f"{name}." if name else ""
            own = [*module._parameters, *module._buffers]
            yield from ((f"{around}{part}", rest) for part in own)
            for child, part in module.named_children():
                yield from places(f"{around}{child}", part)

    return dict(places("", model))


def has_stacked_experts(model: nn.Module) -> bool:
    """Whether there are experts whose weights are slices of one parameter, which cannot come from disk one by one."""
    return any(is_stacked(module) for module in model.modules())


def is_on_disk(model: nn.Module) -> bool:
    """Whether any of a model's parameters come only for the call that needs them."""
    return any(has_offloaded_params(module) for module in model.modules())


def block_bytes(model: nn.Module) -> dict[str, int]:
    """The bytes of the parameters of every block."""
    blocks = {name: model.get_submodule(name) for name in outer_blocks(model)}
    return {name: sum(parameter.nbytes for parameter in block.parameters()) for name, block in blocks.items()}


def shard_bytes(model: nn.Module) -> int:
    """How large a file of a model's weights may be that is never in memory whole: two blocks, and not too small."""
    return max(2**26, 2 * max(block_bytes(model).values(), default=0))


@contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """Within the block, offloaded parameters inside of these modules are there, and stay from call to call."""
    parts: list[Any] = [p for module in modules for p in module.modules() if has_offloaded_params(p)]
    parts = list(dict.fromkeys(parts))
    try:
        with _read_at_once(parts):
            for part in parts:
                part._hf_hook.pre_forward(part)
                part._hf_hook.offload = False  # so that a call neither loads nor drops them
        yield
    finally:
        for part in parts:
            part._hf_hook.offload = True
            part._hf_hook.post_forward(part, None)
        if parts:
            give_back()


@contextmanager
def _read_at_once(parts: list[Any]) -> Iterator[None]:
    """Within the block, what offloaded modules ask of weight files is there: every file is opened once."""
    files: dict[str, list[tuple[OffloadedWeightsLoader, str]]] = {}
    for loader, key in (entry for part in parts for entry in _in_files(part)):
        files.setdefault(loader.index[key]["safetensors_file"], []).append((loader, key))
    try:
        for file, wanted in files.items():
            with safe_open(file, "pt") as opened:
                for loader, key in wanted:
                    loader.state_dict[key] = _stored(opened, key, loader.index[key])
        yield
    finally:
        for loader, key in (entry for wanted in files.values() for entry in wanted):
            loader.state_dict.pop(key, None)


def _in_files(part: Any) -> Iterator[tuple[OffloadedWeightsLoader, str]]:
    """What knows of the parameters of an offloaded module that are in safetensors files, and by which keys."""
    held = part._hf_hook.weights_map
    loader = getattr(held, "dataset", None)
    if isinstance(loader, OffloadedWeightsLoader):
        for key in (f"{held.prefix}{name}" for name in part._parameters):
            if key not in loader.state_dict and loader.index.get(key, {}).get("safetensors_file") is not None:
                yield loader, key


def _stored(opened: Any, key: str, entry: Mapping[str, str]) -> Tensor:
    tensor = opened.get_tensor(entry.get("weight_name", key))
    return tensor.to(getattr(torch, entry["dtype"])) if "dtype" in entry else tensor


def dropped(model: nn.Module) -> None:
    """Let go of offloaded parameters that a call which did not end has left there."""
    for module in model.modules():
        if has_offloaded_params(module) and any(not p.is_meta for p in module.parameters(recurse=False)):
            module._hf_hook.post_forward(module, None)  # type: ignore[union-attr, operator]


@contextmanager
def giving(block: nn.Module, output: Any) -> Iterator[None]:
    """Within the block, a module gives the same output whatever it is asked."""
    before = vars(block).get("forward")
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


@dataclass(frozen=True)
class Form:
    """How what a block gives is made of tensors: a tensor, or tuples of tensors and plain values."""

    spec: TreeSpec
    leaves: tuple[Any, ...]  # Tensor for a tensor, else the value

    @classmethod
    def of(cls, output: Any) -> "Form":
        """That of an output.

        Raises:
            NotAChain: there is something else in it.
        """
        leaves, spec = tree_flatten(output)
        other = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))), None)
        if other is not None:
            raise NotAChain(f"a block gives a {type(other).__name__} besides tensors")
        return cls(spec, tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    def filled(self, tensors: list[Tensor]) -> Any:
        """An output of these tensors."""
        left = iter(tensors)
        return tree_unflatten([next(left) if leaf is Tensor else leaf for leaf in self.leaves], self.spec)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in what a block gives, in their order."""
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


class KeptOutputs(MutableMapping[tuple[Any, ...], Any]):
    """What blocks gave, by plain keys: on disk, and read from there whenever it is asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.forms: dict[tuple[Any, ...], tuple[Form, list[torch.device]]] = {}

    def __setitem__(self, key: tuple[Any, ...], output: Any) -> None:
        tensors = tensors_of(output)
        self.forms[key] = Form.of(output), [tensor.device for tensor in tensors]
        self.store.save(_file(key), ({str(n): tensor.clone() for n, tensor in enumerate(tensors)}, {}))

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        form, devices = self.forms[key]
        tensors, _ = self.store.load(_file(key))
        return form.filled([tensors[str(n)].to(device, copy=True) for n, device in enumerate(devices)])

    def __delitem__(self, key: tuple[Any, ...]) -> None:
        del self.forms[key]
        self.store.path(_file(key)).unlink()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)


def _file(key: tuple[Any, ...]) -> str:
    return "-".join(str(part).replace(" ", "_") for part in key)


@dataclass(frozen=True)
class Chain:
    """The blocks of a model in the order of a forward pass, each of which decides all that comes after it in its list.

    So the model can be run from any block on, if it is known what the last ones of all lists gave. Encoder-decoders
    have two lists, of which the first one's last block has many readers.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    forms: Mapping[str, Form]

    def last_behind(self, number: int) -> list[str]:
        """Of every list the last one of the first `number` blocks: what they gave is all that must be known of them."""
        return list({list_of(block): block for block in self.blocks[:number]}.values())

    def run(self, call: Callable[[], Any], number: int, given: Mapping[str, Any]) -> Any:
        """What block `number` gives when `call` runs the model; behind the last one, what `call` itself gives.

        Args:
            call: runs the model.
            number: of the block, from 0.
            given: what the blocks `last_behind` it gave.
        """
        seen: list[Any] = []

        def left(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output)
            raise Reached

        known = {list_of(block): tree_map(_copied, output) for block, output in given.items()}  # to be written to
        with ExitStack() as stack:
            for block in self.blocks[:number]:
                stack.enter_context(giving(self.model.get_submodule(block), known[list_of(block)]))
            if number == len(self.blocks):
                return call()
            handle = self.model.get_submodule(self.blocks[number]).register_forward_hook(left)
            stack.callback(handle.remove)
            with suppress(Reached):
                call()
        return seen[0]


@torch.no_grad()
def find_chain(model: nn.Module, call: Callable[[], Tensor]) -> Chain:
    """The blocks of a model, once running it on a sample has shown that they can be run one at a time.

    Args:
        model: in evaluation mode.
        call: runs it on a sample, and gives its losses.

    Raises:
        NotAChain: they cannot.
    """
    entries = outer_blocks(model)
    order: list[str] = []
    read: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in entries:
            stack.enter_context(_entering(model.get_submodule(name), name, order, read))
        expected = _figures(call())
    if not entries:
        raise NotAChain("it has no list of blocks")
    odd = next((name for name in entries if order.count(name) != 1), None)
    if odd is not None:
        raise NotAChain(f"{odd} is run {order.count(odd)} times in a forward pass")
    chain, given = Chain(model, tuple(order), {}), dict[str, Any]()
    forms: dict[str, Form] = {}
    for number, name in enumerate(order):
        block, again = model.get_submodule(name), dict[str, Tensor]()
        with loaded(block), _entering(block, name, [], again):
            output = chain.run(call, number, {last: given[list_of(last)] for last in chain.last_behind(number)})
        if not _same(again[name], read[name]):
            raise NotAChain(f"{name} reads something else than what the block before it gives")
        forms[name], given[list_of(name)] = Form.of(output), output
    found = chain.run(call, len(order), {last: given[list_of(last)] for last in chain.last_behind(len(order))})
    if not _same(_figures(found), expected):
        raise NotAChain("its head reads more than what the last block gives")
    return Chain(model, tuple(order), forms)


@contextmanager
def _entering(block: nn.Module, name: str, order: list[str], read: dict[str, Tensor]) -> Iterator[None]:
    """Within the block it is noted that a block is called, and what with."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        order.append(name)
        read[name] = _figures((args, kwargs))

    with block.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def _figures(values: Any) -> Tensor:
    """Three sums over every tensor of floats [tensors, 3], the second of absolute values: what tells them apart."""
    rows = [torch.zeros(3, dtype=torch.float64)]
    for tensor in tensors_of(values):
        if tensor.is_floating_point():
            flat = tensor.detach().flatten().double()
            ramp = torch.linspace(-1, 1, len(flat), dtype=flat.dtype, device=flat.device)
            rows.append(torch.stack([flat.sum(), flat.abs().sum(), flat @ ramp]).cpu())
    return torch.stack(rows)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two `_figures` are those of the same tensors, but for rounding."""
    if a.shape != b.shape:
        return False
    near = (a - b).abs() <= AGREEMENT * b[:, 1:2].abs()
    return bool((near | (a == b) | (a.isnan() & b.isnan())).all())
