"""A recipe → its steps, each with a name and with the settings that its result depends on."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.claims import differences
from hf_lowrank.solvers.family import get_method
from hf_lowrank.studies.experiment.recipe import Experiment, Model, Recipe, Settings, TaskChoice


@dataclass(frozen=True)
class Run:
    """One compression of one dense model, and its fine-tuning afterwards, if any."""

    dense: "Dense"
    method: str
    budget: Settings
    finetune: Settings | None
    statistics: Settings

    @property
    def name(self) -> str:
        """Of its record without fine-tuning."""
        return f"{self.dense.name}--{_slug(self.method, budget_title(self.budget))}"

    @property
    def settings(self) -> Settings:
        """What its result depends on, without fine-tuning."""
        chosen = {"method": self.method, "budget": self.budget, "statistics": self.statistics}
        own = {"sequential": True} if get_method(self.method).sequential and "sequential" not in self.budget else {}
        return {"step": "compress", **_without_step(self.dense.settings), **chosen, **own}

    @property
    def statistics_name(self) -> str:
        """Of the statistics that it shares with runs on the same layers, by the same labels."""
        layers = {key: self.budget[key] for key in ("include", "exclude") if self.budget.get(key)}
        chosen = [hashlib.blake2b(repr(layers).encode(), digest_size=4).hexdigest()] if layers else []
        chosen += [f"labels-{self.statistics['labels']}"] if "labels" in self.statistics else []
        return "--".join([self.dense.name, str(self.statistics["samples"] or "enough"), *chosen])

    @property
    def finetuned_name(self) -> str:
        """Of its record after fine-tuning."""
        return f"{self.name}--finetuned"

    @property
    def finetuned_settings(self) -> Settings:
        """What its result after fine-tuning depends on."""
        return {**self.settings, "step": "finetune after", "finetune_after": self.finetune}


@dataclass(frozen=True)
class Dense:
    """A model fine-tuned on a task with a seed: where every run begins."""

    model: Model
    task: TaskChoice
    seed: int
    finetune: Settings | None

    @property
    def name(self) -> str:
        """Of its record."""
        return _slug(self.model.title, self.task.title, f"seed{self.seed}")

    @property
    def settings(self) -> Settings:
        """What its result depends on."""
        task = {key: value for key, value in vars(self.task).items() if key not in ("data_dir", "label")}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in task.items()}
        return {
            "step": "dense",
            "model": self.model.title,
            "layers": self.model.layers,
            "task": plain,
            "seed": self.seed,
            "finetune": self.finetune,
        }


def plan_of(recipe: Recipe) -> list[tuple[Dense, list[Run]]]:
    """Every dense model once, in the order of the recipe, with its runs.

    Raises:
        LowRankError: two experiments give the same name to different things.
    """
    dense_of: dict[str, tuple[Dense, dict[str, Run]]] = {}
    for experiment in recipe.experiments:
        for dense in denses(experiment):
            known, runs = dense_of.setdefault(dense.name, (dense, {}))
            _refuse_other(dense.name, known.settings, dense.settings)
            for run in runs_of(experiment, dense):
                other = runs.setdefault(run.name, run)
                _refuse_other(run.name, other.finetuned_settings, run.finetuned_settings)
    return [(dense, list(runs.values())) for dense, runs in dense_of.values()]


def denses(experiment: Experiment) -> Iterator[Dense]:
    """The dense models of an experiment."""
    for seed in experiment.seeds:
        for model in experiment.models:
            for task in experiment.tasks:
                yield Dense(model, task, seed, experiment.finetune)


def runs_of(experiment: Experiment, dense: Dense) -> Iterator[Run]:
    """The compressions of one dense model."""
    for budget in experiment.budgets:
        for method in experiment.methods:
            labels = get_method(method).labels
            statistics = experiment.statistics | ({} if labels == "data" else {"labels": labels})
            yield Run(dense, method, budget, experiment.finetune_after, statistics)


def budget_title(budget: Settings) -> str:
    """A budget in words: `rank ratio 0.33, allocation uniform`."""
    return ", ".join(f"{key.replace('_', ' ')} {_title(value)}" for key, value in budget.items())


def _refuse_other(name: str, known: Settings, new: Settings) -> None:
    for part, now, before in differences(new, known):
        raise LowRankError(
            f"two experiments mean different things by {name}: {part} is {before!r} and {now!r}; "
            "give the model or the task of one of them a label"
        )


def _without_step(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key != "step"}


def _title(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _slug(*parts: str) -> str:
    return "--".join(re.sub(r"[^\w.=]+", "-", part).strip("-") for part in parts)
