"""A language model and names of tasks → their figures by EleutherAI's lm-evaluation-harness, an extra."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.errors import LowRankError

FILES = (".yaml", ".yml")


def harness_tasks(given: str) -> list[str]:
    """The names in a list with commas: of tasks that the harness knows, or YAML files of one's own.

    Raises:
        LowRankError: there is none, a file is not there, or the harness is not installed.
    """
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise LowRankError("lm_eval takes names of tasks with commas between them, such as arc_easy,piqa")
    if find_spec("lm_eval") is None:
        raise LowRankError('lm-evaluation-harness is not installed: pip install "hf_lowrank[lm-eval]"')
    for name in names:
        if name.endswith(FILES) and not Path(name).is_file():
            raise LowRankError(f"the file {name} of a task of lm-evaluation-harness does not exist")
    return names


def lm_evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int = 32,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Every task's figures by their names, as the harness gives them: shares, not percent.

    Args:
        model: a causal language model, compressed or dense.
        tokenizer: the model's.
        tasks: names and files, as `harness_tasks` gives them.
        batch_size: requests at a time.
        limit: the first so many samples of each task; None for all.

    Raises:
        LowRankError: the harness knows no such task, or its data cannot be read.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = {name: Path(name).stem for name in tasks if name.endswith(FILES)}
    folders = sorted({str(Path(name).resolve().parent) for name in own})
    manager = TaskManager(include_path=folders or None, include_defaults=len(own) < len(tasks))
    names = [own.get(name, name) for name in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise LowRankError(
            f"lm-evaluation-harness knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and one's own task is "
            "called by its file, NAME.yaml, in which it has the same NAME"
        )
    harness: Any = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size)
    try:
        found: Any = simple_evaluate(harness, tasks=names, limit=limit, task_manager=manager, log_samples=False)
    except Exception as error:  # the harness raises what datasets and the tasks' own code raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LowRankError(f"lm-evaluation-harness cannot measure {', '.join(names)}: {lines[0]}") from error
    return {name: _figures(figures) for name, figures in found["results"].items()}


def _figures(figures: dict[str, Any]) -> dict[str, float]:
    """Those that are numbers, without the name of the filter where it is none: {"acc": 0.5, "acc_stderr": 0.1}."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in figures.items()
        if isinstance(value, (int, float)) and "," in key
    }
