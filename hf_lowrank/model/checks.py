"""A model as a user hands it over → refused in one line where what this library makes of it would be wrong or lost."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError

ADAPTERS = "peft"  # the package whose layers wrap those of a model
QUANTIZERS = ("bitsandbytes", "torchao", "optimum")  # and those whose layers or tensors hold quantized weights

MERGING = "merge it (`merge_and_unload()` of its PeftModel), save it by `save_pretrained`, and pass that"


def check_model(model: Any) -> None:
    """Raise unless it is a transformers model with weights of its own, which this library knows.

    Raises:
        LowRankError: it is something else, has an adapter, is quantized, or is low-rank by code other than this.
    """
    if not isinstance(model, nn.Module):
        raise LowRankError(f"a transformers model is needed, and this is a {_named(model)}")
    refuse_adapter(model)
    if not isinstance(model, PreTrainedModel):
        raise LowRankError(
            f"only transformers models can be factorized, and this is a {_named(model)}: pass the transformers model "
            "inside of it"
        )
    if (quantizer := quantizer_of(model)) is not None:
        raise LowRankError(
            f"the {type(model).__name__} is quantized by {quantizer}, and its weights can be neither factorized nor "
            "trained: take the model that it was made from, and quantize last"
        )
    if type(model).__module__.startswith("transformers_modules.") and hasattr(model.config, "base_model_type"):
        raise LowRankError(
            f"the {type(model).__name__} was loaded with the code that travels with its weights: import hf_lowrank "
            "first and load it again without `trust_remote_code=True`"
        )


def refuse_adapter(model: nn.Module) -> None:
    """Raise where an adapter is attached: its layers would be taken for the model's, and saving keeps it alone.

    Raises:
        LowRankError: the message says how to merge it.
    """
    wrapped = next((name for name, part in model.named_modules() if _package(part) == ADAPTERS), None)
    if wrapped is not None or getattr(model, "_hf_peft_config_loaded", False):
        raise LowRankError(f"an adapter is attached to the {type(model).__name__}: {MERGING}")


def quantizer_of(model: PreTrainedModel) -> str | None:
    """What a model was quantized by, at loading or afterwards."""
    if "packed_by" in vars(model):  # in this process
        return "compressed-tensors"
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if config is not None and not getattr(config, "dequantize", False):
        return getattr(config.quant_method, "value", str(config.quant_method))
    parts = (*model.modules(), *model.parameters())
    return next((package for part in parts if (package := _package(part)) in QUANTIZERS), None)


def _package(part: Any) -> str:
    return type(part).__module__.partition(".")[0]


def _named(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
