"""vLLM and SGLang, which run transformers' code with layers of their own: what they are told, and what they cannot run.

This file travels with saved checkpoints as remote code: see modeling_lowrank.py.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from .auto_lowrank import auto_classes_of
from .configuration_lowrank import LowRankConfigMixin, on_config_class_created, register
from .experts_lowrank import UnstackedExperts
from .layers_lowrank import LowRankEmbedding, LowRankTiedHead

_ENGINES = {"vllm": "vLLM", "vllm_mla": "vLLM", "sglang": "SGLang"}  # by the attention that they ask for
_CHECKED = {"vLLM": "0.33", "SGLang": "0.5"}  # the oldest whose source was read and tried: others may merge more layers


def register_in_engine() -> None:
    """What the engines call where this library is installed: its checkpoints then need no `--trust-remote-code`.

    They build a config by AutoConfig, and look for a model's class, by its name, in transformers itself. They may call
    this several times. Of an engine that is older than those that were checked a warning says so.
    """
    from . import modeling_lowrank  # noqa: F401  # which enters the models of a config into the Auto classes first

    warn_of_older_engines()

    register()
    on_config_class_created(_name_models_in_transformers)


def warn_of_older_engines() -> None:
    """Warn where an engine is installed that is older than those that were checked."""
    for engine, oldest in _CHECKED.items():
        try:
            found = version(engine.lower())
        except PackageNotFoundError:
            continue
        if Version(found) < Version(oldest):
            warnings.warn(
                f"{engine} {found} is older than {oldest}, with which low-rank models were checked, and may merge "
                "factorized layers as if they were dense: upgrade it, or serve the dense form (`hf-lowrank densify`)",
                stacklevel=2,
            )


def _name_models_in_transformers(config_class: type[LowRankConfigMixin]) -> None:
    import transformers  # now: while it is imported itself, its name stands for another module than afterwards

    for _, mapping in auto_classes_of(config_class.base_config_class):
        known = mapping[config_class]
        for model_class in known if isinstance(known, (list, tuple)) else (known,):
            setattr(transformers, model_class.__name__, model_class)


def refuse_what_engines_cannot_run(model: Any) -> None:
    """Tell a model that an engine is building from one that it has no layers for.

    Raises:
        ValueError: experts, an embedding or an output layer are factorized, and engines put their own in their place.
    """
    engine = _ENGINES.get(getattr(model.config.get_text_config(), "_attn_implementation", None) or "")
    if engine is None:
        return
    names = [name for name, module in model.named_modules() if isinstance(module, _NOT_IN_ENGINES)]
    names += [name for name in model.config.ranks if name.rpartition(".")[2] in ("lm_head", "embed_out")]
    if names:
        raise ValueError(
            f"{engine} has layers of its own for embeddings, output layers and experts, and {names[0]} is factorized: "
            "compress the model without, or serve its dense form (`hf-lowrank densify`)"
        )


_NOT_IN_ENGINES = (LowRankEmbedding, LowRankTiedHead, UnstackedExperts)
