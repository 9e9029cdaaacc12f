"""What a model is measured on: data, tokenisation, labels, metric. A table of tasks, and four kinds of them."""

from hf_lowrank.tasks.data import load_split, load_validation
from hf_lowrank.tasks.encoding import IGNORED, collator, encode, label_ids_of
from hf_lowrank.tasks.table import TASKS, get_task
from hf_lowrank.tasks.task import KINDS, Task

__all__ = ["IGNORED", "KINDS", "TASKS", "Task", "collator", "encode", "get_task", "label_ids_of", "load_split"]
__all__ += ["load_validation"]
