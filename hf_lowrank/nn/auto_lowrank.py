"""Which Auto classes know a model, and where a checkpoint's own code has what they load.

This file travels with saved checkpoints as remote code: see modeling_lowrank.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
    video_processing_auto,
)

from .configuration_lowrank import LowRankConfig

PREPROCESSOR_MAPPINGS = (
    tokenization_auto.TOKENIZER_MAPPING,
    processing_auto.PROCESSOR_MAPPING,
    image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
    video_processing_auto.VIDEO_PROCESSOR_MAPPING,
)


def auto_class_of(model: Any) -> str:
    """The name of the Auto class that loads a model as what it is."""
    names = []
    for name, mapping in auto_classes_of(model.config.base_config_class):
        known = mapping[model.config.base_config_class]
        if model.base_model_class in (known if isinstance(known, (list, tuple)) else (known,)):
            names.append(name)
    return min(names, key=lambda name: name == "AutoModelForPreTraining", default="AutoModel")


def auto_classes_of(base_config_class: type[PreTrainedConfig]) -> Iterator[tuple[str, Any]]:
    """(name, mapping) of every AutoModelFor… that knows the architecture."""
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and base_config_class in mapping:
            yield name, mapping


def auto_map_of(model_class: Any, config: Any) -> dict[str, str]:
    """{Auto class: its class in the source files of the checkpoint}, for loading with `trust_remote_code`.

    All of them from this file, the config too: transformers loads a local folder's code by a hash of the files that it
    imports, so by its own file the config class would be another one than that of the models.
    """
    auto_map = {"AutoConfig": f"modeling_lowrank.{LowRankConfig.__name__}"}
    for auto_name, mapping in auto_classes_of(config.base_config_class):
        known = mapping[config.base_config_class]
        classes = list(known) if isinstance(known, (list, tuple)) else [known]
        chosen = model_class.base_model_class if model_class.base_model_class in classes else classes[0]
        auto_map[auto_name] = f"modeling_lowrank.LowRank{chosen.__name__}"
    return auto_map
