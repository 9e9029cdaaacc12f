"""A YAML file → a checked `Recipe`: what to fine-tune, compress and score, over which seeds."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.table import task_name
from hf_lowrank.training.distillation import Distillation
from hf_lowrank.training.settings import FinetuneConfig

Settings = dict[str, Any]
STATISTICS: dict[str, int | None] = {"samples": None, "batch_size": 16}  # None: as many as are enough
DISTILLATION = tuple(each.name for each in fields(Distillation) if each.name != "teacher")
PATHS = {1: "a compact model, fine-tuned", 2: "a large model, factorized", 3: "a compact model, factorized further"}


@dataclass(frozen=True)
class Model:
    """A folder, a Hub name or a packaged model; `layers` keeps its first ones only. `label` is its name in tables."""

    name: str
    layers: int | None = None
    label: str | None = None

    @property
    def title(self) -> str:
        """How it is called in tables and records: never a path."""
        short = Path(self.name).name
        return self.label or (short if self.layers is None else f"{short}, first {self.layers} layers")


@dataclass(frozen=True)
class TaskChoice:
    """A task by name; the rest is passed on to `get_task`. `data_dir` replaces the run's own."""

    name: str
    data_dir: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    max_length: int | None = None
    label: str | None = None

    @property
    def title(self) -> str:
        """How it is called in tables and records."""
        return self.label or self.name


@dataclass(frozen=True)
class Experiment:
    """One path of the papers over models, tasks, methods, budgets and seeds.

    Args:
        path: 1 fine-tunes compact models, 2 and 3 compress what is fine-tuned (see `PATHS`).
        table: the number of the table it goes into, by the path unless given; 3 is for models that share parameters.
        budgets: settings of `CompressionConfig`, one mapping for each budget, beside the method.
        methods: names of `METHODS`.
        finetune: settings of `FinetuneConfig`; None where the models are fine-tuned already.
        finetune_after: the same after compression, the missing ones as before it; None leaves it out. `distillation`
            in it holds the weights of a `Distillation` by the dense model.
        statistics: `samples` and `batch_size`.
    """

    path: int
    models: tuple[Model, ...]
    tasks: tuple[TaskChoice, ...]
    table: int
    methods: tuple[str, ...] = ()
    budgets: tuple[Settings, ...] = ()
    seeds: tuple[int, ...] = (0,)
    finetune: Settings | None = field(default_factory=dict)
    finetune_after: Settings | None = field(default_factory=dict)
    statistics: Settings = field(default_factory=lambda: dict(STATISTICS))


@dataclass(frozen=True)
class Recipe:
    """A name for its files, a title, and its experiments."""

    name: str
    title: str
    experiments: tuple[Experiment, ...]


KEYS = tuple(each.name for each in fields(Experiment))


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe. Its top level holds what all `experiments` share, or is the only one.

    Raises:
        LowRankError: the file cannot be read, or a key, name or value in it is not known; the message says where.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LowRankError(f"there is no recipe {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LowRankError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    try:
        return parse_recipe(content, Path(path).stem)
    except LowRankError as error:
        raise LowRankError(f"{path}: {error}") from None


def parse_recipe(content: Any, name: str) -> Recipe:
    """The content of a YAML file → a checked recipe.

    Raises:
        LowRankError: as `load_recipe`.
    """
    _check_keys(content, ("title", "experiments", *KEYS), "a recipe")
    shared = {key: value for key, value in content.items() if key in KEYS}
    parts = _list(content.get("experiments", [{}]), "experiments")
    experiments = []
    for number, part in enumerate(parts, 1):
        where = f"experiment {number}" if len(parts) > 1 else "the recipe"
        _check_keys(part, KEYS, where)
        try:
            experiments.append(_experiment({**shared, **part}))
        except LowRankError as error:
            raise LowRankError(f"{where}: {error}") from None
    return Recipe(name, str(content.get("title", name)), tuple(experiments))


def _experiment(given: Settings) -> Experiment:
    for key in ("path", "models", "tasks"):
        if key not in given:
            raise LowRankError(f"the key {key!r} is missing")
    if given["path"] not in list(PATHS):  # it may be anything, a mapping too
        known = "; ".join(f"{number}: {what}" for number, what in PATHS.items())
        raise LowRankError(f"path is {given['path']!r}; the paths are {known}")
    compresses = given["path"] != 1
    finetune = _training(given.get("finetune", {}), "finetune")
    after = _training(given.get("finetune_after", {}), "finetune_after", ("distillation",)) if compresses else None
    if after is not None:
        after = {**(finetune or {}), **after}
    statistics = given.get("statistics") or {}
    _check_keys(statistics, tuple(STATISTICS), "statistics")
    experiment = Experiment(
        path=given["path"],
        models=tuple(_model(each) for each in _list(given["models"], "models")),
        tasks=tuple(_task(each) for each in _list(given["tasks"], "tasks")),
        table=given.get("table", 2 if given["path"] == 3 else 1),
        methods=tuple(_list(given.get("methods", ["kfac"]), "methods")) if compresses else (),
        budgets=tuple(_list(given.get("budgets", [{"rank_ratio": 0.33}]), "budgets")) if compresses else (),
        seeds=tuple(_list(given.get("seeds", [0]), "seeds")),
        finetune=finetune,
        finetune_after=after,
        statistics={**STATISTICS, **statistics},
    )
    if experiment.path == 1 and finetune is None:
        raise LowRankError("path 1 is fine-tuning, so 'finetune' cannot be off")
    _check_values(experiment)
    return experiment


def _check_values(experiment: Experiment) -> None:
    for seed in experiment.seeds:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise LowRankError(f"the seed {seed!r} is not a whole number")
    if experiment.table not in (1, 2, 3):
        raise LowRankError(f"table is {experiment.table!r}; there are 1, 2 and 3")
    given = {name: value for name, value in experiment.statistics.items() if value is not STATISTICS[name]}
    if not all(isinstance(value, int) and value >= 1 for value in given.values()):
        raise LowRankError(f"statistics are {experiment.statistics}; they must be whole numbers, at least 1")
    for budget in experiment.budgets:
        _check_keys(budget, [each.name for each in fields(CompressionConfig) if each.name != "method"], "a budget")
        for method in experiment.methods:
            compression_config(method, budget)


def compression_config(method: str, budget: Settings) -> CompressionConfig:
    """The method and budget of a recipe as the settings of a compression.

    Raises:
        LowRankError: an unknown method, or a value that cannot be.
    """
    lists: Settings = {key: tuple(value) if isinstance(value, list) else value for key, value in budget.items()}
    return CompressionConfig(method, **lists)


def _training(given: Any, where: str, more: tuple[str, ...] = ()) -> Settings | None:
    """Checked settings of a fine-tuning; None for `false`."""
    if given is False:
        return None
    given = {} if given in (None, True) else given
    known = [each.name for each in fields(FinetuneConfig) if each.name != "seed"]
    _check_keys(given, [*known, *more], where)
    given = {key: _number(value) if key == "learning_rate" else value for key, value in given.items()}
    try:
        FinetuneConfig(**{key: value for key, value in given.items() if key in known})
    except LowRankError as error:
        raise LowRankError(f"{where}: {error}") from None
    if "distillation" in given:
        given["distillation"] = given["distillation"] or {}
        _check_keys(given["distillation"], DISTILLATION, "distillation")
    return given


def _number(value: Any) -> Any:
    """YAML takes 2e-5, without a point, for text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _model(given: Any) -> Model:
    if isinstance(given, str):
        return Model(given)
    _check_keys(given, [each.name for each in fields(Model)], "a model")
    if "name" not in given:
        raise LowRankError(f"the model {given} has no name")
    return Model(**given)


def _task(given: Any) -> TaskChoice:
    if isinstance(given, str):
        given = {"name": given}
    _check_keys(given, [each.name for each in fields(TaskChoice)], "a task")
    given = {**given, "name": task_name(str(given.get("name")))}
    columns = given.get("text_columns")
    return TaskChoice(**given | {"text_columns": tuple(_list(columns, "text_columns")) if columns else None})


def _list(given: Any, where: str) -> list[Any]:
    given = [given] if isinstance(given, (str, int, float, dict)) else given
    if not isinstance(given, list) or not given:
        raise LowRankError(f"{where} is {given!r}; it must be a list of at least one")
    return given


def _check_keys(given: Any, known: Any, where: str) -> None:
    if not isinstance(given, dict):
        raise LowRankError(f"{where} is {given!r}; it must be a mapping with keys out of {', '.join(known)}")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise LowRankError(f"unknown key {unknown[0]!r} in {where}; the keys are {', '.join(known)}")
