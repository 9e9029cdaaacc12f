"""Configs of low-rank models: the base model's own config, plus the rank of every factorized layer.

A low-rank BERT has a `LowRankBertConfig(BertConfig)`. In memory its `model_type` stays "bert", so that code which looks
at it keeps working; in `config.json` it is "lowrank", so that a plain `BertConfig` does not claim the folder.

This file travels with saved checkpoints as remote code: it imports nothing but the standard library and transformers.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

MODEL_TYPE = "lowrank"
FORMAT_VERSION = 1
FORM_NAMES = ("factors", "interpolative")
SOURCE_FILES = tuple(
    f"{part}_lowrank.py"
    for part in (
        *("auto", "configuration", "editing", "engines", "experts", "layers"),
        *("matching", "modeling", "parents", "publishing"),
    )
)

_MODULE_NAME = re.compile(r"[^\s./\\]+(\.[^\s./\\]+)*")  # as `named_modules` makes them; no path can be one

# A plain mixin for Python (as a config it would bring its own defaults in front of the base's, such as T5's
# `is_encoder_decoder`); a config for the type checker, which has to know what it is mixed into.
if TYPE_CHECKING:
    _ConfigBase = PreTrainedConfig
else:
    _ConfigBase = object


def validate_ranks(ranks: Any) -> dict[str, int]:
    """A checked copy of {module name: rank}. That they fit the model is checked when its layers are replaced.

    Raises:
        ValueError: not a mapping, a name that cannot be a module's, or a rank that is not a positive integer.
    """
    if not isinstance(ranks, Mapping):
        raise ValueError(f"`ranks` of a low-rank config maps module names to ranks, but it is {reprlib.repr(ranks)}")
    for name, rank in ranks.items():
        if not isinstance(name, str) or not _MODULE_NAME.fullmatch(name):
            raise ValueError(
                f"`ranks` of a low-rank config has the key {reprlib.repr(name)}: module names are words joined by dots"
            )
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"`ranks` gives {name!r} the rank {reprlib.repr(rank)}: ranks are positive integers")
    return dict(ranks)


def validate_forms(forms: Any, ranks: Mapping[str, int]) -> dict[str, str]:
    """A checked copy of {module name: form}, of modules that `ranks` names.

    Raises:
        ValueError: not a mapping, another module, or a form that this code does not know.
    """
    if not isinstance(forms, Mapping):
        raise ValueError(f"`forms` of a low-rank config maps module names to forms, but it is {forms!r}")
    for name, form in forms.items():
        if name not in ranks:
            raise ValueError(f"`forms` of a low-rank config names {name!r}, which `ranks` does not")
        if form not in FORM_NAMES:
            raise ValueError(
                f"`forms` gives {name!r} the form {form!r}; this code knows {', '.join(FORM_NAMES)}: upgrade hf_lowrank"
            )
    return dict(forms)


def validate_format_version(version: Any) -> None:
    """Refuse a `config.json` of a format this code does not know.

    Raises:
        ValueError: a version newer than `FORMAT_VERSION`, or something that is no version.
    """
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"`lowrank_format_version` is {version!r}, not a positive integer: is config.json damaged?")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"This checkpoint has low-rank format {version}, and this code reads up to {FORMAT_VERSION}: upgrade "
            "hf_lowrank, or load the checkpoint's own code with `trust_remote_code=True`, without importing hf_lowrank"
        )


class LowRankConfigMixin(_ConfigBase):
    """Mixed in front of a base config class: adds `ranks`, and translates between memory and `config.json`."""

    base_config_class: ClassVar[type[PreTrainedConfig]]
    ranks: dict[str, int]
    forms: dict[str, str]  # of the layers of another form than two plain factors

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Here, not in `from_dict`: every way from a dict to a config ends in the constructor.
        ranks = validate_ranks(kwargs.pop("ranks", {}))
        forms = validate_forms(kwargs.pop("forms", {}), ranks)
        validate_format_version(kwargs.pop("lowrank_format_version", FORMAT_VERSION))
        for key in ("model_type", "base_model_type"):
            kwargs.pop(key, None)  # the class knows both
        super().__init__(*args, **kwargs)
        self.ranks, self.forms = ranks, forms

    @property
    def base_model_type(self) -> str:
        """The `model_type` of the model that was factorized."""
        return self.base_config_class.model_type

    def to_json_string(self, use_diff: bool = True) -> str:
        content = json.loads(super().to_json_string(use_diff=use_diff))
        content["model_type"] = MODEL_TYPE
        content["base_model_type"] = self.base_model_type
        content["lowrank_format_version"] = FORMAT_VERSION
        if not content.get("forms"):
            content.pop("forms", None)
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        content, kwargs = super().get_config_dict(*args, **kwargs)
        if content.get("model_type") == MODEL_TYPE:
            # As it is in memory: `from_pretrained` compares this with the class and warns of another architecture.
            content["model_type"] = content.get("base_model_type", cls.model_type)
        return content, kwargs

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As `PreTrainedConfig.save_pretrained`; the source files named by `auto_map` are written first.

        They are written here and not by the model, so that no `config.json` lies next to missing code, and so that an
        upload which looks for files changed during the save finds them.
        """
        if getattr(self, "auto_map", None):
            copy_source_files(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


class LowRankConfig(PreTrainedConfig):
    """What AutoConfig knows as "lowrank". Its constructors return the config class of the factorized architecture."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `LowRank<Base>Config`, by `base_model_type`.

        Args:
            config_dict: the fields of a config.json.
            kwargs: as of `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: a base architecture that this version of transformers does not have, or a bad config.
        """
        # Before anything else: a newer format may name the base architecture in another way.
        validate_format_version(config_dict.get("lowrank_format_version", FORMAT_VERSION))
        base_model_type = config_dict.get("base_model_type")
        if not isinstance(base_model_type, str) or base_model_type not in {*CONFIG_MAPPING} - {MODEL_TYPE}:
            raise ValueError(
                "A low-rank config.json names the factorized architecture in `base_model_type`; this version of "
                f"transformers does not know {base_model_type!r}: upgrade transformers, or restore the file"
            )
        return config_class_for(CONFIG_MAPPING[base_model_type]).from_dict(dict(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """As `from_dict`, of a file.

        Args:
            json_file: a config.json.
        """
        return cls.from_dict(cls._dict_from_json_file(json_file))


_config_classes: dict[type[PreTrainedConfig], type[LowRankConfigMixin]] = {}
_creation_hooks: list[Callable[[type[LowRankConfigMixin]], None]] = []


def config_class_for(base_config_class: type[PreTrainedConfig]) -> type[LowRankConfigMixin]:
    """The low-rank class of a config class, made on the first call; a low-rank class is returned as it is."""
    if issubclass(base_config_class, LowRankConfigMixin):
        return base_config_class
    if base_config_class not in _config_classes:
        from . import modeling_lowrank  # noqa: F401  # it enters a new config's models into the Auto classes

        namespace = {
            "__module__": __name__,
            "__doc__": f"{base_config_class.__name__} of a model some of whose linear layers are factorized.",
            # Config classes are made dataclasses, which would put a generated constructor in front of the mixin's.
            "__init__": LowRankConfigMixin.__init__,
            "base_config_class": base_config_class,
            "model_type": base_config_class.model_type,
        }
        name = f"LowRank{base_config_class.__name__}"
        config_class = type(name, (LowRankConfigMixin, base_config_class), namespace)
        _config_classes[base_config_class] = config_class
        for hook in _creation_hooks:
            hook(config_class)
    return _config_classes[base_config_class]


def register() -> None:
    """Let AutoConfig load "lowrank" checkpoints, and with it every AutoModelFor…, in this process."""
    AutoConfig.register(MODEL_TYPE, LowRankConfig, exist_ok=True)


def on_config_class_created(hook: Callable[[type[LowRankConfigMixin]], None]) -> None:
    """Call `hook` with every low-rank config class, once: with those that there are, and with each that is made."""
    if hook not in _creation_hooks:
        _creation_hooks.append(hook)
        for config_class in list(_config_classes.values()):
            hook(config_class)


def copy_source_files(directory: Path) -> None:
    """Write the source files that travel with a checkpoint into `directory`, each of them whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in SOURCE_FILES:
        source, target = Path(__file__).with_name(name), directory / name
        if target.exists() and target.samefile(source):
            continue
        descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.")
        os.close(descriptor)
        try:
            shutil.copyfile(source, temporary)
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise


def __getattr__(name: str) -> type[LowRankConfigMixin]:
    """Generated classes by their name, which is how pickle looks them up."""
    import transformers

    base = getattr(transformers, name.removeprefix("LowRank"), None) if name.startswith("LowRank") else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return config_class_for(base)
    generated = [config_class for config_class in _config_classes.values() if config_class.__name__ == name]
    if not generated:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return generated[0]
