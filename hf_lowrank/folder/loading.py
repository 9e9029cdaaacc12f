"""MODEL, a folder or a Hub name → the model and tokenizer of a task, with nothing in them made up."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal
from unittest.mock import patch

import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
    set_seed,
)

from hf_lowrank.compression.memory import skeleton
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.hub_errors import hub_problem, one_line
from hf_lowrank.folder.packing import quiet, unpack
from hf_lowrank.folder.reading import load_own
from hf_lowrank.folder.tokenizers import load_tokenizer, stored_file
from hf_lowrank.jobs.progress import say_once
from hf_lowrank.jobs.settings import check_seed
from hf_lowrank.model.blocks import blocks_on_disk, has_stacked_experts
from hf_lowrank.model.locating import resolve
from hf_lowrank.tasks import Task
from hf_lowrank.tasks.labels import mapping_note

FLAGS: Literal["multi_label_classification"] = (
    "multi_label_classification"  # transformers' name of labels that may each apply
)
SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def load_model(name: str, task: Task, on_disk: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer called `name`, the model as by `load_trained`.

    Raises:
        LowRankError: as `load_trained` and `load_tokenizer`.
    """
    folder = resolve(name)
    _readable_config(folder, task)
    tokenizer = load_tokenizer(folder)  # first, as a model may take minutes
    return load_trained(name, task, on_disk), tokenizer


def load_as_saved(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model called `name` as what it was saved as, where no data are to be read, and its tokenizer if it has one.

    Raises:
        LowRankError: as `load_own`.
    """
    folder, device = resolve(name), PartialState().device
    model = load_own(folder, torch.float32 if device.type == "cpu" else "auto").to(device)
    with suppress(LowRankError):
        return model, load_tokenizer(folder)
    return model, None


def load_trained(name: str, task: Task, on_disk: bool = False) -> PreTrainedModel:
    """The model called `name`, on this process's device, where no text is to be read.

    Half precision is computed in float32 on a CPU, which has no fast arithmetic for it, and as it is on an accelerator.
    The weights of its blocks may stay `on_disk`, from where they come for the calls that need them, but for models with
    stacked experts.

    Raises:
        LowRankError: no such model, one that cannot be read, or one without a trained head for the task.
    """
    name = resolve(name)
    config = _readable_config(name, task)
    device = PartialState().device
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    can = on_disk and not getattr(config, "quantization_config", None)  # such weights are of no use here
    empty = skeleton(name, task, device) if can else None
    in_memory = empty is None or has_stacked_experts(empty)
    places = {} if in_memory else {"device_map": blocks_on_disk(empty, device)}  # type: ignore[arg-type]
    try:
        with quiet(config), unmapped() if places else nullcontext():
            model, info = task.auto_class.from_pretrained(  # safetensors only: pickled weights are never read
                name, dtype=dtype, use_safetensors=True, output_loading_info=True, **places
            )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, safetensors its own
        raise LowRankError(f"{name} cannot be loaded as a model for {task.name}: {_first_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        bad = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        raise LowRankError(
            f"{name} is not trained for {task.name}: {bad[0]} is not in it or has another shape, and would be random; "
            "fine-tune it on the task first"
        )
    saved_as = (model.config.architectures or [type(model).__name__])[0]
    if saved_as.removeprefix("LowRank") != type(model).__name__.removeprefix("LowRank"):
        raise LowRankError(f"{name} is a {saved_as}, which is not a model for {task.name}")
    if task.kind == "multi_label":
        _check_flags(model.config, name, task)
    unpack(model)
    return model if places else model.to(device)


@contextmanager
def unmapped() -> Iterator[None]:
    """Within the block transformers reads weight files tensor by tensor, and holds none of them mapped.

    It converts those that stay on disk too, and all pages of a file that is mapped until the end count as resident.
    """

    def opened(file: Any, **options: Any) -> Any:
        try:
            return safe_open(file, **options | {"backend": "pread"})
        except TypeError:  # safetensors before 0.8, which always maps
            return safe_open(file, **options)

    with patch.object(modeling_utils, "safe_open", opened):
        yield


def load_for_finetuning(
    name: str, task: Task, seed: int = 0, layers: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """As `load_model` in float32, but a head that is missing or of other labels is made anew, drawn by `seed`.

    `layers` keeps that many of the first transformer layers of a dense model, and a new head. The list names the new
    parameters, none where the model was trained for the task already.

    Raises:
        LowRankError: no such model, one that cannot be read, or one that lacks more than a head.
    """
    folder = resolve(name)
    config = _readable_config(folder, task)
    if getattr(config, "quantization_config", None):
        raise LowRankError(
            f"{name} is quantized, and rounded weights are not trained: fine-tune it before, or an adapter"
        )
    tokenizer = load_tokenizer(folder)
    _cut(config, layers)
    kept = len(task.label_names) == config.num_labels  # else there is a new head, of the task's own labels
    matched = mapping_note(task, config) if kept else None
    _set_labels(config, task)
    check_seed(seed)
    set_seed(seed)
    try:
        model, info = task.auto_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise LowRankError(f"{name} cannot be loaded as a model for {task.name}: {_first_line(error)}") from error
    fresh = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    body = [key for key in fresh if not _in_head(model, key)]
    if body or (fresh and task.labels_are_tokens):
        raise LowRankError(
            f"{name} has not all weights of a {type(model).__name__}: {(body or fresh)[0]} is not in it or has another "
            "shape; only a head for the task is made anew"
        )
    if matched and not fresh:
        say_once(matched)
    return model.to(PartialState().device), tokenizer, fresh


def _check_flags(config: PreTrainedConfig, name: str, task: Task) -> None:
    """Raise where a model chooses one label of several; one that does not say is taken for what the task says."""
    if config.problem_type not in (None, FLAGS):
        raise LowRankError(
            f"{name} is trained for {config.problem_type}, which {task.name} is not; fine-tune it on the task first"
        )
    config.problem_type = FLAGS


def _cut(config: PreTrainedConfig, layers: int | None) -> None:
    if layers is None:
        return
    depth = getattr(config, "num_hidden_layers", 0)
    if getattr(config, "ranks", None) or not 1 <= layers <= depth:
        raise LowRankError(f"a dense model of {depth} layers is cut to 1 to {depth} of them, not to {layers}")
    config.num_hidden_layers = layers


def _set_labels(config: PreTrainedConfig, task: Task) -> None:
    """Give the config the labels of the task, unless it names them already."""
    if task.kind == "regression":
        if config.num_labels != 1:
            config.num_labels = 1
        config.problem_type = "regression"
    elif task.label_names:
        known = {str(label).lower() for label in (config.id2label or {}).values()}
        if not known >= {label.lower() for label in task.label_names}:
            config.id2label = dict(enumerate(task.label_names))
            config.label2id = {label: number for number, label in config.id2label.items()}
        config.problem_type = FLAGS if task.kind == "multi_label" else None


def _in_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a parameter belongs to the head: outside the base model, or in the pooler between them."""
    prefix = f"{model.base_model_prefix}."
    return not key.startswith(prefix) or key.removeprefix(prefix).startswith("pooler.")


def _readable_config(name: str, task: Task) -> PreTrainedConfig:
    """The config of a model whose weights may be read.

    Raises:
        LowRankError: no such model, or its weights are pickled: it says how to convert them.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError
        raise LowRankError(f"{name} cannot be loaded as a model for {task.name}: {_first_line(error)}") from error
    if type(config) not in set(task.auto_class._model_mapping.keys()):
        raise LowRankError(
            f"{name} is a {config.model_type}, and transformers has no {task.auto_class.__name__} of that kind: it is "
            f"no model for {task.name}"
        )
    pickled = [file for file in PICKLED if stored_file(name, file)]
    if pickled and not any(stored_file(name, file) for file in SAFE):
        raise LowRankError(
            f"the weights of {name} are pickled ({pickled[0]}), which may run any code, and are never read; if you "
            f"trust them: {task.auto_class.__name__}.from_pretrained({name!r}, use_safetensors=False)"
            ".save_pretrained(FOLDER) converts them"
        )
    return config


def stored_dtype(name: str) -> torch.dtype:
    """The dtype in which a model's weights are stored, float32 if its config does not say."""
    dtype = AutoConfig.from_pretrained(resolve(name)).dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def _first_line(error: Exception) -> str:
    return hub_problem(error) or one_line(error)
