"""A config class of transformers → a model of it that is small, and inputs that it takes."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

LARGEST = 50_000_000  # parameters of a model that is still built

Shrink = Callable[[str, int], int]  # a field's name and value → a smaller value

_VOCABULARY = re.compile(r"(.*_)?(vocab_size|n_token|vocab|n_words|num_embeddings)")
_DEPTHS = re.compile(
    r"(?!num_feat_extract)(.*(num_|n_)(.*_)?layers?|.*_layers|layers|depth|num_blocks|num_hidden_groups)"
)

# Field name → small value, by the first pattern that matches the whole name.
_SIZES = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (_VOCABULARY.pattern, 128),
        (r".*(num_key_value|kv)_heads|n_head_kv", 2),
        (r".*(num_|n_)(.*_)?heads?|.*attention_heads|heads|n_head", 4),
        (r".*head_dim|d_kv|d_head|.*head_size|kv_channels", 8),
        (_DEPTHS.pattern, 2),
        (r".*(intermediate_size|ffn_dim|ffn_size|d_ff|d_inner|n_inner|feed_forward_dim|intermediate_dim)", 64),
        (r".*ffn_hidden_size", 64),
        (r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|d_embed|embd_dim|emb_dim)|dim|width", 32),
        (r"(num_|n_).*experts", 4),
        (r"num_experts_per_tok|.*top_?k.*", 2),
        (r"(.*_)?(max_position_embeddings|n_positions|max_.*positions|n_ctx|max_.*length)", 64),
        (r"(.*_)?image_size", 32),
        (r"(.*_)?patch_size", 8),
    )
)
_BY_LAYER = {"layer_types", "mlp_layer_types", "layers_block_type", "per_layer_config"}
_BY_LAYER |= {"out_features", "out_indices", "stage_names"}


def tiny_models(model_class: type[PreTrainedModel]) -> Iterator[tuple[PreTrainedModel, dict[str, Any] | None]]:
    """Small models of a class with random weights, each with inputs that it takes (None if none are found).

    The config's sizes are shrunk by their names; where that does not fit, only the number of layers and tokens is.

    Raises:
        Exception: whatever transformers raises where the class cannot be built, from its default config either.
    """
    failure: Exception = ValueError(f"the default {model_class.__name__} is too large to be built here")
    built = 0
    for shrink, kinds in ((_all_sizes, False), (_all_sizes, True), (_depth_only, False), (_nothing, False)):
        if built and shrink is not _all_sizes:
            return
        try:
            with torch.device("meta"):
                skeleton = model_class._from_config(small_config(model_class.config_class, shrink, kinds))
            if sum(p.numel() for p in skeleton.parameters()) > LARGEST:
                continue
            torch.manual_seed(0)
            model = model_class(small_config(model_class.config_class, shrink, kinds)).eval()
        except Exception as error:
            failure = error
            continue
        _fill_in(model)
        built += 1
        yield model, accepted_inputs(model)
    if not built:
        raise failure


def small_config(config_class: Any, shrink: Shrink, one_of_each_kind: bool) -> PreTrainedConfig:
    """The default config with its numbers shrunk, those of its parts too.

    Where a config lists the kind of every layer, the list is made again for the new number of layers, or there is one
    layer of each kind.
    """
    content = config_class().to_dict()
    content.pop("transformers_version", None)
    if content.get("prediction_length", 0) is None:  # of a time series
        content["prediction_length"] = 8
    return config_class(**_shrunk(content, shrink, one_of_each_kind))


def _shrunk(content: dict[str, Any], shrink: Shrink, one_of_each_kind: bool) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in content.items():
        if key in _BY_LAYER:
            continue
        if isinstance(value, dict) and key.endswith("config"):
            small[key] = _shrunk(value, shrink, one_of_each_kind)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = shrink(key, value)
        else:
            small[key] = value
    kinds = content.get("layer_types")
    if one_of_each_kind and isinstance(kinds, list):
        small["layer_types"] = list(dict.fromkeys(kinds))
        small.update({key: len(small["layer_types"]) for key in small if key == "num_hidden_layers"})
    vocabulary = next((value for key, value in small.items() if _VOCABULARY.fullmatch(key)), None)
    if isinstance(vocabulary, int):  # special tokens lie in the vocabulary
        tokens = {key: value for key, value in small.items() if key.endswith("token_id") and isinstance(value, int)}
        small.update({key: value % vocabulary for key, value in tokens.items() if value > 0})
    return small


def _all_sizes(key: str, value: int) -> int:
    return next((min(value, size) for pattern, size in _SIZES if pattern.fullmatch(key)), value)


def _depth_only(key: str, value: int) -> int:
    if _DEPTHS.fullmatch(key):
        return min(value, 2)
    return min(value, 1024) if _VOCABULARY.fullmatch(key) else value


def _nothing(key: str, value: int) -> int:
    return value


def _fill_in(model: nn.Module) -> None:
    """Random numbers for parameters and buffers that transformers left as they came from the allocator."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not (torch.isfinite(tensor).all() and tensor.abs().max() < 1e6)
        ):
            with torch.no_grad():
                tensor.normal_(std=0.02)


# --- inputs ---


def accepted_inputs(model: PreTrainedModel) -> dict[str, Any] | None:
    """Made-up inputs with which the model's forward pass runs, or None."""
    names = set(inspect.signature(model.forward).parameters)
    known = {key: value for key, value in _made_up(model).items() if key in names}
    main = model.main_input_name
    choices = [
        {key: value for key, value in known.items() if key in (main, "decoder_input_ids")},
        {key: value for key, value in known.items() if key != "decoder_input_ids"},
        {key: value for key, value in known.items() if key != "decoder_input_ids" and key != "input_ids"},
        {key: value for key, value in known.items() if key in ("input_ids", "decoder_input_ids")},
        {key: value[:1] for key, value in known.items() if key == main},  # heads that need padding to take a batch
        {key: value[None] for key, value in known.items() if key == main},  # multiple choice
        {key: _ended(value, model) for key, value in known.items() if key == "input_ids"},
        {"pixel_values": known["pixel_values"][:, None]} if "pixel_values" in known else {},  # video
        known,
    ]
    for inputs in choices:
        if inputs and outputs(model, inputs) is not None:
            return inputs
    return None


def _ended(tokens: Tensor, model: PreTrainedModel) -> Tensor:
    """Tokens that end with the token of the end, which some heads look for."""
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    return torch.cat([tokens[:, :-1], torch.full_like(tokens[:, :1], end)], dim=1) if isinstance(end, int) else tokens


def outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Tensor] | None:
    """All tensors that the model returns, the same for the same weights; None if it does not run."""
    torch.manual_seed(0)  # some models draw random numbers when evaluated, too
    try:
        with torch.no_grad():
            found = model(**inputs)
    except Exception:
        return None
    leaves = torch.utils._pytree.tree_leaves(dict(found) if hasattr(found, "items") else found)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors or None


def _made_up(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, min(100, _number(text, "vocab_size", 100)), (2, 12), generator=generator)
    vision = getattr(config, "vision_config", config)
    side = _number(vision, "image_size", 32)
    channels = _number(vision, "num_channels", 3)
    mels = next((_number(config, name, 0) for name in ("num_mel_bins", "feature_size", "input_feat_per_channel")), 80)
    frames = 2 * _number(config, "max_source_positions", 50)
    return {
        "input_ids": tokens,
        "decoder_input_ids": tokens,
        "pixel_values": torch.randn(2, channels, side, side, generator=generator),
        "input_features": torch.randn(2, mels or 80, frames, generator=generator),
        "input_values": torch.randn(2, 8000, generator=generator),
    }


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, default)
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and math.isfinite(value) else default
