"""A low-rank model → the ordinary dense model of its base class, in memory and as a folder, for engines that know no
factors."""

import copy
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.reading import load_low_rank, refuse_quantized
from hf_lowrank.jobs.files import atomic_folder, held, refuse_existing
from hf_lowrank.model.dense import dense_layer, refuse_wrapped_factors
from hf_lowrank.model.weightless import weightless
from hf_lowrank.nn.configuration_lowrank import SOURCE_FILES, LowRankConfigMixin
from hf_lowrank.nn.editing_lowrank import restack_experts, unstack_experts
from hf_lowrank.nn.layers_lowrank import LowRankLayer
from hf_lowrank.nn.modeling_lowrank import LowRankMixin
from hf_lowrank.nn.publishing_lowrank import CARD, PICTURE, RECORD

OURS = {*SOURCE_FILES, "config.json", RECORD, CARD, PICTURE}  # about the low-rank model, or made anew
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5")


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a low-rank model, in place, into one of its base class, and return it.

    Every factorized layer becomes the nn.Linear (Conv1D, nn.Embedding, nn.Conv2d) that it was, with the product of the
    factors as weight, formed in float32 and stored in the factors' dtype; shared layers stay shared, tied weights tied.
    One layer at a time is held twice.

    Raises:
        LowRankError: the model is not low-rank, or its factors are quantized or wrapped by an adapter.
    """
    if not isinstance(model, LowRankMixin):
        raise LowRankError(f"{type(model).__name__} is not a low-rank model: there is nothing to densify")
    refuse_wrapped_factors(model)
    base_layers = dict(_skeleton(model).named_modules(remove_duplicate=False))
    done: dict[int, nn.Module] = {}  # by the identity of what they replace, for shared layers
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, LowRankLayer):
            continue
        if id(layer) not in done:
            done[id(layer)] = dense_layer(layer, like=base_layers[name])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, done[id(layer)])
    restack_experts(model)
    _to_base_classes(model)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
    return model


def densify_folder(folder: str | Path, output: str | Path, overwrite: bool = False) -> PreTrainedModel:
    """Write the dense form of the low-rank model in `folder` to `output`, all of it or nothing; returns the model.

    Files that are neither weights nor about the compression (tokenizer, generation config, license, …) are copied.

    Raises:
        LowRankError: `folder` holds no low-rank model that is whole, or `output` exists and `overwrite` is off.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LowRankError(f"there is no folder {folder}; a model on the Hub is downloaded with: hf download {folder}")
    with held(output):
        refuse_existing(Path(output), overwrite)
        refuse_quantized(folder)
        model = densify(load_low_rank(folder))
        with atomic_folder(output, overwrite) as whole:
            _copy_other_files(folder, whole)
            model.save_pretrained(whole)
    return model


def _skeleton(model: LowRankMixin) -> nn.Module:
    """The base model without weights: it knows which layers are Conv1D. Factorized experts are layers of their own."""
    config = copy.deepcopy(model.config)
    _to_base_config(config)
    skeleton = weightless(model.base_model_class, config)
    unstack_experts(skeleton, model.lowrank_ranks)
    return skeleton


def _to_base_classes(model: PreTrainedModel) -> None:
    """Model, bodies within it and configs: what was `LowRank…` is of the base class again."""
    module: Any
    for module in list(model.modules()):
        for value in list(vars(module).values()):
            if isinstance(value, LowRankConfigMixin):
                _to_base_config(value)
        if isinstance(module, LowRankMixin):
            # Low-rank checkpoints are loaded without the base architecture's conversions; dense ones are saved by them.
            for attribute in ("_rank_match", "_weight_conversions", "_tied_weights_keys", "compression_report"):
                vars(module).pop(attribute, None)
            module.__class__ = type(module).base_model_class  # type: ignore[assignment]


def _to_base_config(config: Any) -> None:
    config.__class__ = config.base_config_class
    for key in ("ranks", "forms", "auto_map"):
        vars(config).pop(key, None)


def _copy_other_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.name in OURS or path.name.startswith(".") or path.name.endswith(WEIGHTS):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
