"""A folder with a low-rank model → its config, its class, the model: nothing in them made up, nothing else executed."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

import hf_lowrank.nn.modeling_lowrank as modeling
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.packing import quiet, unpack
from hf_lowrank.model.locating import refuse_missing
from hf_lowrank.nn.modeling_lowrank import LowRankMixin


def read_low_rank_config(folder: str | Path) -> Any:
    """The config of the low-rank model in `folder` (or of that name on the Hub).

    Raises:
        LowRankError: no model, one whose config cannot be read, or one that is not low-rank.
    """
    config = read_config(folder)
    if not getattr(config, "ranks", None):
        raise LowRankError(f"{folder} is an ordinary {config.model_type} model: none of its layers is factorized")
    return config


def low_rank_class(config: Any) -> type[LowRankMixin]:
    """The model class that a config names in `architectures`.

    Raises:
        LowRankError: transformers has no such model; the name comes from a file, so nothing else is looked up by it.
    """
    architecture = (config.architectures or [""])[0]
    found = getattr(modeling, architecture, None) if architecture.startswith("LowRank") else None
    if not (isinstance(found, type) and issubclass(found, LowRankMixin) and found is not LowRankMixin):
        raise LowRankError(
            f"config.json names the architecture {architecture!r}, which this version of transformers does not have"
        )
    return found


def load_low_rank(folder: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The low-rank model in `folder`, on the CPU, in the dtype it is stored in or another.

    Raises:
        LowRankError: as `read_low_rank_config`; or weights that are missing, of other shapes or of other layers.
    """
    model_class = low_rank_class(read_low_rank_config(folder))
    return load_whole(model_class, folder, dtype)


def read_config(folder: str | Path) -> Any:
    """The config of any model in `folder` (or of that name on the Hub), dense or low-rank.

    Raises:
        LowRankError: no model, or one whose config cannot be read.
    """
    refuse_missing(str(folder))
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, …
        raise LowRankError(f"{folder} cannot be read as a model: {error}") from error


def quantized_by(folder: str | Path) -> str | None:
    """The library that quantized the model in a folder, as its config says; None of one that is not.

    Raises:
        LowRankError: as `read_config`.
    """
    known = getattr(read_config(folder), "quantization_config", None)
    if not known:
        return None
    method = known.get("quant_method") if isinstance(known, dict) else known.quant_method
    return str(getattr(method, "value", method))


def refuse_quantized(folder: str | Path) -> None:
    """Raise where the model in a folder has few bits already.

    Raises:
        LowRankError: it says by what it was quantized.
    """
    if library := quantized_by(folder):
        raise LowRankError(f"{folder} is quantized already, by {library}: start from the model it was made of")


def own_class(config: Any) -> Any:
    """The model class that a config names in `architectures`, dense or low-rank.

    Raises:
        LowRankError: it names none, or none of transformers.
    """
    if getattr(config, "ranks", None):
        return low_rank_class(config)
    architecture = (config.architectures or [""])[0]
    found = getattr(transformers, architecture, None) if architecture else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise LowRankError(
            f"config.json names the architecture {architecture!r}, which this version of transformers does not have"
        )
    return found


def load_own(folder: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model in `folder` as what it was saved as, dense or low-rank, on the CPU.

    Raises:
        LowRankError: as `read_config`, `own_class` and `load_whole`.
    """
    return load_whole(own_class(read_config(folder)), folder, dtype)


def load_whole(
    model_class: Any, folder: str | Path, dtype: torch.dtype | str = "auto", **options: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained(folder, **options)`, without a single weight that the checkpoint does not have.

    Raises:
        LowRankError: the checkpoint cannot be read, lacks weights of the model or, if low-rank, holds others.
    """
    try:
        with quiet(read_config(folder)):
            model, info = model_class.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, safetensors its own
        raise LowRankError(f"{folder} cannot be loaded: {error}") from error
    bad = ("missing", "mismatched", *(("unexpected",) if issubclass(model_class, LowRankMixin) else ()))
    for what in bad:
        if keys := sorted(map(str, info[f"{what}_keys"])):
            raise LowRankError(f"{folder} has {what} weights: {', '.join(keys[:3])}{' …' if len(keys) > 3 else ''}")
    unpack(model)
    return model.eval()
