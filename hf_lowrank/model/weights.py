"""A model, wrapped, sharded or offloaded → its plain module, and the whole weight of each layer wherever it lies."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, cpu_offload
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader, align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.digests import digest_of
from hf_lowrank.jobs.freed import give_back
from hf_lowrank.model.checks import check_model
from hf_lowrank.nn.layers_lowrank import LowRankLayer, LowRankLinear, dense_weight, layer_class_for


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel or DataParallel, or itself.

    Raises:
        LowRankError: its parameters are in the hands of DeepSpeed ZeRO-3 or of the first version of FSDP; or as
            `check_model`.
    """
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    if isinstance(model, FullyShardedDataParallel):
        raise LowRankError(
            "the model is wrapped by FullyShardedDataParallel, which flattens its weights; shard it by FSDP2 "
            "(torch.distributed.fsdp.fully_shard, `fsdp_version: 2` of accelerate) instead"
        )
    check_model(model)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise LowRankError(
            "the model's weights are partitioned by DeepSpeed ZeRO-3, which is not supported; load it without "
            "DeepSpeed, one copy for each process, with device_map, or sharded by FSDP2"
        )
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (FSDP2), so that all must run the model at the same time."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_weight(module: nn.Module) -> Tensor:
    """A layer's dense weight [out, in]: read where it is offloaded, gathered where it is sharded, by all.

    The factors of one that is factorized are multiplied in float32 at least, now.
    """
    with readable(module):
        if isinstance(module, LowRankLayer):
            up, down = (_whole(factor.detach()) for factor in module.matrices())
            wide = torch.promote_types(up.dtype, torch.float32)
            return up.to(wide) @ down.to(wide)
        whole = _whole(dense_weight(module).detach())
        return whole.clone() if has_offloaded_params(module) else whole  # which leaves again


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def solving_device(weight: Tensor) -> torch.device:
    """Where a layer is factorized: where it lies, or on this process's accelerator if that is main memory."""
    here = PartialState().device
    can = here.type not in ("cpu", "mps")  # MPS has no float64
    return here if can and weight.device.type == "cpu" else weight.device


def stored_parts(layer: LowRankLayer) -> dict[str, Tensor]:
    """The parameters of a low-rank layer: `up` [out, r], `down` [r, in] and, where it has one, `bias`."""
    up, down = layer.matrices()
    bias = getattr(layer, "bias", None)
    return {"up": up, "down": down} | ({"bias": bias} if isinstance(bias, Tensor) else {})


def placed_like(linear: nn.Module, factors: Mapping[str, Tensor], file: Path | None = None) -> nn.Module:
    """A low-rank layer of its `stored_parts` in place of `linear`: offloaded to main memory if that was.

    If that was on disk, and a `file` holds these parts, they are read from there when they are needed.
    """
    offloaded = _offloaded_parts(linear)
    with readable(linear):
        layer = layer_class_for(linear).from_factors(linear, factors["up"], factors["down"])
    if "bias" in factors:
        layer.up.bias.data.copy_(factors["bias"])
    if offloaded:
        hook: Any = offloaded[0]._hf_hook
        on_disk = isinstance(getattr(hook.weights_map, "dataset", None), OffloadedWeightsLoader)
        if on_disk and file is not None and isinstance(layer, LowRankLinear):
            _read_from(file, layer, hook.execution_device)
        else:
            cpu_offload(layer, hook.execution_device)
    return layer


def _read_from(file: Path, layer: LowRankLinear, device: torch.device) -> None:
    """Drop the factors of a layer, and read them from a file when they are needed."""
    keys = {"up.weight": "up", "down.weight": "down"} | ({"up.bias": "bias"} if layer.bias is not None else {})
    dtype = str(layer.up.weight.dtype).removeprefix("torch.")
    where = {"safetensors_file": str(file), "dtype": dtype}
    index = {name: {**where, "weight_name": key} for name, key in keys.items()}
    attach_align_device_hook(layer, device, offload=True, weights_map=OffloadedWeightsLoader(index=index))


def read_as(model: nn.Module, dtype: torch.dtype) -> None:
    """From now on, parameters that come only for the call that needs them come in another dtype."""
    for module in model.modules():
        if has_offloaded_params(module):
            hook: Any = module._hf_hook
            held = hook.weights_map.dataset
            for key in [f"{hook.weights_map.prefix}{name}" for name, p in module._parameters.items() if p is not None]:
                if isinstance(held, OffloadedWeightsLoader):
                    held.index[key]["dtype"] = str(dtype).removeprefix("torch.")
                else:
                    held[key] = held[key].to(dtype)


def sums_device(module: nn.Module) -> torch.device:
    """Where sums over a linear's tokens are kept: beside its weight, in main memory where that is offloaded."""
    device = next(module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def digest(module: nn.Module) -> str:
    """A digest of a layer's weight, or factors, the same in float32 and in the half precision they were read from."""
    with readable(module):
        parts = module.matrices() if isinstance(module, LowRankLayer) else (dense_weight(module),)
        return digest_of([_whole(part.detach()).float() for part in parts])


def model_digest(model: nn.Module) -> str:
    """A digest of all parameters of a model, in their order, as they are loaded."""
    return digest_of(_parameters(model))


def _parameters(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        with readable(module):
            for parameter in module.parameters(recurse=False):
                yield _whole(parameter)


@contextmanager
def readable(module: nn.Module) -> Iterator[None]:
    """Within the block, offloaded parameters of the module are there, and the factors of a factorized layer."""
    with ExitStack() as stack:
        if parts := _offloaded_parts(module):
            stack.callback(give_back)  # once they are dropped
        for part in parts:
            stack.enter_context(align_module_device(part))
        yield


def _offloaded_parts(module: nn.Module) -> list[nn.Module]:
    """The layer, or of a factorized one its factors, where their parameters are offloaded."""
    parts = module.modules() if isinstance(module, LowRankLayer) else (module,)
    return [part for part in parts if has_offloaded_params(part)]
