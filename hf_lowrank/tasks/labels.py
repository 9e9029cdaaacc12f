"""The names of labels in data and in a model → which label of the model each label of the data is."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.task import Task

MOST_SHOWN = 10


def label_ids_of(task: Task, config: PreTrainedConfig) -> list[int]:
    """The model's label for each label of the data; none where they are not classes.

    By name where the model has all the names (in whatever case), else by position.

    Raises:
        LowRankError: the counts differ, or the names that agree stand at other positions.
    """
    names = list(task.label_names)
    if not names:
        return []
    by_name = _by_name(task, config)
    if by_name is not None:
        return by_name
    own = _own_names(config)
    if len(own) != len(names):
        raise LowRankError(
            f"the model has {len(own)} labels ({_listed(own)}), {task.name} has {len(names)} ({_listed(names)})"
        )
    folded = [name.lower() for name in own]
    moved = [] if _are_generic(own) else [n for n, name in enumerate(names) if name.lower() in folded]
    for number in moved:
        if folded[number] != names[number].lower():
            raise LowRankError(
                f"{task.name} calls label {number} {names[number]!r}, which is label "
                f"{folded.index(names[number].lower())} of the model, and other labels have no name in common "
                f"({_listed(own)} and {_listed(names)}); name them alike in the data or in id2label of config.json"
            )
    return list(range(len(names)))


def label_mapping(task: Task, config: PreTrainedConfig) -> dict[str, Any] | None:
    """For records: the model's name of each label of the data, and whether they were matched by "name" or "position".

    None for a task without classes.
    """
    if not task.label_names:
        return None
    own = _own_names(config)
    matched = "position" if _by_name(task, config) is None else "name"
    ids = label_ids_of(task, config)
    return {"matched_by": matched, "labels": dict(zip(task.label_names, [own[number] for number in ids], strict=True))}


def mapping_note(task: Task, config: PreTrainedConfig) -> str | None:
    """What is to be said where labels are matched by position; None where they are matched by name."""
    mapping = label_mapping(task, config)
    if mapping is None or mapping["matched_by"] == "name":
        return None
    pairs = _listed([f"{name} = {own}" for name, own in mapping["labels"].items()])
    return f"labels of {task.name} are matched by position, as the model has other names for them: {pairs}"


def _own_names(config: PreTrainedConfig) -> list[str]:
    """The model's names of its labels, in order."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _by_name(task: Task, config: PreTrainedConfig) -> list[int] | None:
    """The model's number of each name of the data; None where it does not have all of them, or two alike."""
    for spelled in (str, str.lower):
        own, names = [spelled(name) for name in _own_names(config)], [spelled(name) for name in task.label_names]
        if set(names) <= set(own) and len(set(own)) == len(own) and len(set(names)) == len(names):
            return [own.index(name) for name in names]
    return None


def _are_generic(names: list[str]) -> bool:
    """Whether a model's names say nothing: LABEL_0, LABEL_1, … or 0, 1, …"""
    return all(name.lower() in (f"label_{number}", str(number)) for number, name in enumerate(names))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:MOST_SHOWN])}{' …' if len(names) > MOST_SHOWN else ''}"
