"""The fusers of vLLM's transformers backend, from its source package: what they need of the rest is stood in for.

`HF_LOWRANK_VLLM` names the folder that its source package unpacks to (see .ci/engines).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from torch import Tensor, nn

BACKEND = "vllm.model_executor.models.transformers"


def source() -> Path | None:
    """The folder with the package `vllm`, where there is one."""
    folder = Path(os.environ.get("HF_LOWRANK_VLLM", "/nowhere"))
    return folder if (folder / "vllm").is_dir() else None


class Merged(nn.Linear):
    """vLLM's merged layers on one device: one weight, for the rows of several."""

    def __init__(self, sizes: list[int], width: int, bias: bool) -> None:
        super().__init__(width, sum(sizes), bias=bias)
        self.output_sizes, self.tp_size = sizes, 1


class SiluAndMul(nn.Module):
    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def _qkv(hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int, bias: bool, **_: Any) -> Any:
    heads = (total_num_heads, total_num_kv_heads, total_num_kv_heads)
    return Merged([head_size * count for count in heads], hidden_size, bias)


def _cached(cache: Any, key: Any) -> Any:
    """As cachetools' `cached`: the first module of a key answers for all."""
    return lambda function: (
        lambda module: cache[key(module)] if key(module) in cache else cache.setdefault(key(module), function(module))
    )


STAND_INS = {
    "QKVParallelLinear": _qkv,
    "MergedColumnParallelLinear": lambda input_size, output_sizes, bias, **_: Merged(output_sizes, input_size, bias),
    "replace_linear_class": lambda linear, *_, **__: linear,
    "get_act_and_mul_fn": lambda name: SiluAndMul(),
    "RMSNorm": type("RMSNorm", (nn.Module,), {}),
    "GemmaRMSNorm": type("GemmaRMSNorm", (nn.Module,), {}),
    "_ACTIVATION_AND_MUL_REGISTRY": {"silu": SiluAndMul},
    "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
    "cached": _cached,
}


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return STAND_INS.get(name) or MagicMock(name=name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] not in ("vllm", "cachetools"):
            return None
        read = name.startswith(f"{BACKEND}.fuser") or name == f"{BACKEND}.fx_utils"
        place = (source() or Path()) / name.replace(".", "/")
        if not read:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        inside = [str(place)] if place.is_dir() else None
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)

    def create_module(self, spec: Any) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def fusers() -> Iterator[ModuleType]:
    """vLLM's `fuser` module, within the block."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module(f"{BACKEND}.fuser")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "cachetools")]:
            del sys.modules[name]


def fuse(fuser: ModuleType, model: Any) -> int:
    """Merge layers of a model as vLLM's `recursive_replace` does, and load their weights: how many it has merged."""
    parallel = SimpleNamespace(tensor_parallel_size=1)
    settings: Any = SimpleNamespace(quant_config=None, parallel_config=parallel, model_config=None)
    chosen, weights, merged = fuser.Fusers(model, settings), model.state_dict(), 0
    for prefix, module in list(model.named_modules()):
        for each_fuser in chosen[module]:
            if not hasattr(each_fuser, "shards"):
                continue  # norms and attention, which hold no linear layers
            each_fuser.fuse(module, prefix, settings)
            layer = module.get_submodule(each_fuser.merged_name)
            rows = layer.weight.data.split(layer.output_sizes)
            for (name, _), part in zip(each_fuser.shards, rows, strict=True):
                part.copy_(weights[f"{prefix}.{name}.weight"])
            merged += 1
    return merged
