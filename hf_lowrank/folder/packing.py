"""A model and how each of its layers is to be rounded → the same model in the format of compressed-tensors."""

import copy
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.allocation.stored import group_of
from hf_lowrank.solvers.rounding import Grid, Rounded, round_to_nearest


@dataclass(frozen=True)
class Rounding:
    """How a layer's weight [out, in] is rounded: to how many bits, and with one scale for how many weights of a row.

    `group` None is one scale for the row. `activations` are rounded too, to 8 bits with a scale for each token.
    """

    bits: int
    group: int | None = None
    activations: bool = False

    def grid(self, scales_in: torch.dtype | None = None) -> Grid:
        """What it rounds weights to, with scales of a dtype."""
        return Grid(self.bits, self.group, clipped=True, scales_in=scales_in)


def rounding_for(layer: nn.Linear | nn.Embedding, bits: int, activations: bool = False) -> Rounding:
    """The finest that engines read: rows of 8 bits; of 4, groups of `GROUP` where the rows divide into them."""
    return Rounding(bits, group_of(layer.weight.shape[1], bits), activations)


def pack(model: PreTrainedModel, roundings: Mapping[str, Rounding], known: Mapping[str, Rounded] | None = None) -> None:
    """Round the weights of nn.Linear and nn.Embedding layers, by name, in place; saving the model stores them packed.

    A forward pass widens them again, to the rounded values in the model's dtype. Weights are rounded to the nearest,
    but for those whose codes and scales are `known`.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config
    from transformers import CompressedTensorsConfig

    config = quantization_config(model, roundings)
    with quiet(), torch.no_grad():
        apply_quantization_config(model, config)
        for name, rounding in roundings.items():
            layer: Any = model.get_submodule(name)
            rounded = (known or {}).get(name) or round_to_nearest(
                layer.weight.float(), rounding.grid(layer.weight_scale.dtype)
            )
            layer.weight_scale.copy_(rounded.scales)
            layer.weight.data = rounded.weight().float()  # of which the library finds the same codes, in any dtype
        compressor = ModelCompressor(config)
        compressor.compress_model(model)
        vars(model)["packed_by"] = compressor  # for saving after a forward pass
    model.config.quantization_config = CompressedTensorsConfig(**config.model_dump())


def unpack(model: PreTrainedModel) -> None:
    """Widen the weights of a model that was loaded packed, now and not at the first forward pass; others stay."""
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None and hasattr(model, "ct_decompress_hook"):
        with quiet():
            compressor.decompress_model(model)


def widened(model: Any) -> Any:
    """A model that was loaded packed → one of the same class and values that no library ever quantized."""
    unpack(model)
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain, known = type(model)(config).to(model.dtype), model.state_dict()
    plain.load_state_dict({name: known[name] for name in plain.state_dict()})
    return plain.eval()


@contextmanager
def alone(packs: bool = True) -> Iterator[None]:
    """Within the block a process packs, loads and runs packed models for itself, where others of its job do not.

    compressed-tensors would divide the work among all processes, and wait for them.
    """
    if not packs:
        yield
        return
    from compressed_tensors.offload.utils import as_single_threaded

    with as_single_threaded():
        yield


def quiet(config: Any = None) -> AbstractContextManager:
    """Within the block quantizers' progress bars are not seen, where the model with this config, if given, has one."""
    silent = config is None or getattr(config, "quantization_config", None) is not None
    return redirect_stderr(io.StringIO()) if silent else nullcontext()


def quantization_config(model: nn.Module, roundings: Mapping[str, Rounding]) -> Any:
    """compressed-tensors' own config: the most frequent rounding of each class by the class, others before it by name.

    A layer counts for the first of the targets that fit it; of a name that comes later the library says that it fits
    none.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    groups: dict[str, Any] = {}
    for kind in (nn.Linear, nn.Embedding):
        names = {name: r for name, r in roundings.items() if isinstance(model.get_submodule(name), kind)}
        rarest_first = [rounding for rounding, _ in reversed(Counter(names.values()).most_common())]
        for place, rounding in enumerate(rarest_first):
            by_name = [name for name, own in names.items() if own == rounding]
            targets = [kind.__name__] if rounding == rarest_first[-1] else by_name
            groups[f"{kind.__name__.lower()}_{place}"] = QuantizationScheme(targets=targets, **_scheme(kind, rounding))
    known = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding)))
    left = [name for name in known if name not in roundings]
    return QuantizationConfig(config_groups=groups, ignore=left, format=_format([*groups.values()]))


def _scheme(kind: type[nn.Module], rounding: Rounding) -> dict[str, Any]:
    """Embeddings of 8 bits stay an integer `weight`: transformers initializes none that has another name."""
    from compressed_tensors.quantization import QuantizationArgs

    strategy = "channel" if rounding.group is None else "group"
    weights = QuantizationArgs(num_bits=rounding.bits, strategy=strategy, group_size=rounding.group)
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if rounding.activations else None
    whole = rounding.activations or (kind is nn.Embedding and rounding.bits == 8)
    return {
        "weights": weights,
        "input_activations": inputs,
        "format": "int-quantized" if whole else "pack-quantized",
    }


def _format(schemes: list[Any]) -> str:
    formats = {scheme.format for scheme in schemes}
    return formats.pop() if len(formats) == 1 else "mixed-precision"


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The values that a weight [out, in] has after rounding each to the nearest, in groups by `group_of`."""
    grid = Rounding(bits, group_of(weight.shape[1], bits)).grid()
    return round_to_nearest(weight, grid).weight()
