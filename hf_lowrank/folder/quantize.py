"""A folder with a model, compressed or dense → one with its weights in few bits, by a library that loads it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.compression.codes import coded, solver_for_codes
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.card import weights_bytes
from hf_lowrank.folder.packing import Rounding, pack, rounding_for
from hf_lowrank.folder.quantizers import Quantization, described
from hf_lowrank.folder.reading import load_own, load_whole, own_class, read_config, refuse_quantized
from hf_lowrank.folder.saving import read_record, save_model
from hf_lowrank.folder.tokenizers import load_tokenizer
from hf_lowrank.model.packable import packable
from hf_lowrank.model.targets import Target, check_weights
from hf_lowrank.nn.modeling_lowrank import LowRankMixin
from hf_lowrank.statistics import Statistics

FACTORS = ("", ".up", ".down", ".down.rest")  # where the weights of a layer are, dense or factorized


@dataclass(frozen=True)
class Quantized:
    """What came of it: the bytes of the weights before and after, and how many layers have few bits."""

    bytes_before: int
    bytes_after: int
    layers: int


def quantize_folder(
    source: str | Path,
    output: str | Path,
    quantization: Quantization | None = None,
    overwrite: bool = False,
    statistics: Statistics | None = None,
) -> Quantized:
    """Write the model in `source` to `output` with its linear layers, factors among them, and embeddings in few bits.

    Layers outside of the model's body (heads), those that share their weights with another, and those of kinds that
    the library does not know stay as they are. `from_pretrained` loads the result as it does the source, where the
    library that quantized it is installed.

    Args:
        source: of the model.
        output: a folder, written whole or not at all.
        quantization: how; 8 bits, weight-only, by compressed-tensors unless given.
        overwrite: whether `output` may be replaced.
        statistics: of the model, or of the dense one that it was made of: what the method it was compressed by needs,
            or of a dense model the default. Layers that they know are rounded so as to lose least by that method's
            objective; without, every weight is rounded to the nearest.

    Raises:
        LowRankError: the model is quantized already, cannot be read, or has nothing to quantize; the library is not
            installed, cannot run on this machine, or rounds by itself; the statistics are of another model.
    """
    quantization = quantization or Quantization()
    quantization.check_here()
    refuse_quantized(source)
    record, before = read_record(source), weights_bytes(Path(source))
    method = None if statistics is None else (record or {}).get("settings", {}).get("method", CompressionConfig.method)
    model, layers = _quantized(source, quantization, method, statistics)
    if record is not None:
        record |= {"quantization": described(quantization, method), "unquantized_bytes": before}
    save_model(model, _tokenizer(source), output, overwrite, record=record)
    return Quantized(before, weights_bytes(Path(output)), layers)


def _tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    with suppress(LowRankError):
        return load_tokenizer(str(folder))
    return None


def _quantized(
    source: str | Path, quantization: Quantization, method: str | None, statistics: Statistics | None
) -> tuple[Any, int]:
    """The quantized model and how many of its layers are."""
    stored = getattr(torch, quantization.dtype) if quantization.dtype else None
    if quantization.quantizer.config is None:
        model = load_own(source)
        solver = None if method is None else solver_for_codes(model, method, statistics)
        return model, quantize_(model, quantization, solver=solver, dtype=stored)
    dtype = stored or "auto"
    if statistics is not None:
        raise LowRankError(f"{quantization.library} rounds by itself: statistics are for compressed-tensors")
    model = load_own(source, dtype)
    layers = quantizable(model, quantization)
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in layers]
    config = quantization.quantizer.config(quantization.bits, quantization.scheme, left)
    return load_whole(own_class(read_config(source)), source, dtype, quantization_config=config), len(layers)


def quantize_(
    model: PreTrainedModel,
    quantization: Quantization,
    bits: Mapping[str, int] | None = None,
    solver: LayerSolver | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Round a model's weights in place, by the library that needs no loading; saving it stores few bits.

    Args:
        model: dense or low-rank.
        quantization: how.
        bits: of single layers by name, the factors of which have as many; others are as `quantization` says.
        solver: what is known of its layers, whose weights are rounded so as to make up for each other (see
            `compression.codes.coded`); all others are rounded to the nearest.
        dtype: of what is not rounded, scales among it; None for the model's.

    Returns:
        How many layers were rounded.

    Raises:
        LowRankError: as `quantizable`; a dense model's embeddings are to get 4 bits, or it is an encoder-decoder.
    """
    if quantization.of_embeddings == 4 and not isinstance(model, LowRankMixin):
        raise LowRankError(
            f"transformers cannot load a dense {type(model).__name__} with embeddings of 4 bits: give them 8"
        )
    if model.config.is_encoder_decoder and not isinstance(model, LowRankMixin):
        raise LowRankError(
            "transformers cannot run a dense encoder-decoder that compressed-tensors has packed: compress it first, or "
            'take the library "torchao"'
        )
    layers = quantizable(model, quantization)
    own = {f"{name}{factor}": few for name, few in (bits or {}).items() for factor in FACTORS}
    roundings = {name: _rounding(layer, quantization) for name, layer in layers.items()}
    roundings |= {name: rounding_for(layers[name], few) for name, few in own.items() if name in layers}
    scales_in = dtype or model.dtype
    grids = {name: rounding.grid(scales_in) for name, rounding in roundings.items()}
    known = {} if solver is None else coded(model, solver, grids)
    nn.Module.to(model, scales_in)
    pack(model, roundings, known)
    return len(layers)


def _rounding(layer: nn.Linear | nn.Embedding, quantization: Quantization) -> Rounding:
    if isinstance(layer, nn.Embedding):  # which reads no activations
        return rounding_for(layer, quantization.of_embeddings)
    return rounding_for(layer, quantization.bits, activations=quantization.scheme == "dynamic")


def quantizable(model: PreTrainedModel, quantization: Quantization) -> dict[str, nn.Linear | nn.Embedding]:
    """The layers that are quantized, by name: of those that are `packable`, without embeddings where they stay.

    Raises:
        LowRankError: there are none, or a weight of one is not finite.
    """
    embeddings = quantization.of_embeddings
    kept = {name: layer for name, layer in packable(model).items() if embeddings or type(layer) is nn.Linear}
    if not kept:
        raise LowRankError(f"{type(model).__name__} has no linear layers in its body that could be quantized")
    check_weights({name: Target.of(name, layer) for name, layer in kept.items()})
    return kept
