"""What a model is measured on: data, tokenisation, labels, metric. A table of tasks, and four kinds of them."""

from typing import TYPE_CHECKING

from hf_lowrank.jobs.imports import lazily

if TYPE_CHECKING:
    from hf_lowrank.tasks.data import described, load_split, load_validation
    from hf_lowrank.tasks.encoding import IGNORED, collator, encode
    from hf_lowrank.tasks.labels import label_ids_of, label_mapping
    from hf_lowrank.tasks.table import TASKS, get_task
    from hf_lowrank.tasks.task import KINDS, Task

__all__ = ["IGNORED", "KINDS", "TASKS", "Task", "collator", "described", "encode", "get_task", "label_ids_of"]
__all__ += ["label_mapping", "load_split", "load_validation"]

__getattr__ = lazily(
    __name__,
    {
        "IGNORED": "encoding",
        "KINDS": "task",
        "TASKS": "table",
        "Task": "task",
        "collator": "encoding",
        "described": "data",
        "encode": "encoding",
        "get_task": "table",
        "label_ids_of": "labels",
        "label_mapping": "labels",
        "load_split": "data",
        "load_validation": "data",
    },
)
