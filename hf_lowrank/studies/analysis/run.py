"""All studies of one model, one after the other: model + validation rows + statistics → an `Analysis`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.allocation import Budget
from hf_lowrank.compression.compress import unreached
from hf_lowrank.compression.config import CompressionConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.distributed import refuse_several
from hf_lowrank.jobs.progress import bar
from hf_lowrank.jobs.settings import check_settings
from hf_lowrank.model.targets import check_weights, find_targets, unstacked
from hf_lowrank.model.weights import model_digest
from hf_lowrank.solvers.family import COMPARED, get_method
from hf_lowrank.statistics import Statistics
from hf_lowrank.studies.analysis.evaluator import Baseline, Evaluator
from hf_lowrank.studies.analysis.findings import findings
from hf_lowrank.studies.analysis.journal import Journal, plain
from hf_lowrank.studies.analysis.layers import YARDSTICK, LayerAnalysis, analyze_layers, correlations
from hf_lowrank.studies.analysis.predictor import Correlation
from hf_lowrank.studies.analysis.rank_sweep import SweepPoint, rank_sweep
from hf_lowrank.studies.analysis.recommend import recommend_layers, recommend_model, recommended_point
from hf_lowrank.studies.analysis.study import Study
from hf_lowrank.studies.analysis.truncation import GroupTruncation, truncate_groups
from hf_lowrank.tasks import Task
from hf_lowrank.tasks.data import content_digest

SWEEP_RATIOS = (0.1, 0.2, 0.33, 0.5, 0.7)


@dataclass(frozen=True)
class AnalysisConfig:
    """What to analyse: methods (see `METHODS`), the rank ratio of the predictor, and the number of truncation groups.

    `sweep_ratios` are the sweep's, to which `rank_ratio` is added. `eval_samples` limits the validation rows.

    Raises:
        LowRankError: an unknown method, a ratio outside (0, 1], fewer than two groups or samples.
    """

    methods: tuple[str, ...] = COMPARED
    rank_ratio: float = 0.33
    groups: int = 10
    sweep_ratios: tuple[float, ...] = SWEEP_RATIOS
    eval_samples: int | None = None
    batch_size: int = 32
    seed: int = 0
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch_size < 1:
            raise LowRankError(f"a batch is at least 1 row, not {self.batch_size}")
        if not self.methods:
            raise LowRankError("there is no method to analyse; name one or more, such as svd and kfac")
        for method in self.methods:
            get_method(method)
        for ratio in self.ratios:
            Budget("rank_ratio", ratio)  # raises
        for value, what in ((self.groups, "groups"), (self.eval_samples, "evaluation samples")):
            if value is not None and value < 2:
                raise LowRankError(f"an analysis needs two {what} at least, not {value}")

    @property
    def ratios(self) -> tuple[float, ...]:
        """The sweep's ratios, rising."""
        return tuple(sorted({*self.sweep_ratios, self.rank_ratio}))


@dataclass(frozen=True)
class Analysis:
    """Everything that was found, in plain values; `hf_lowrank.studies.plots` draws it."""

    model: str
    task: str
    score_name: str
    damage_unit: str
    lower_is_better: bool
    methods: tuple[str, ...]
    rank_ratio: float
    dense: Baseline
    statistics: dict[str, Any]
    sweep: tuple[SweepPoint, ...]
    truncation: tuple[GroupTruncation, ...]
    layers: tuple[LayerAnalysis, ...]
    correlations: tuple[Correlation, ...]
    layer_recommendations: dict[str, str]
    recommendation: str
    recommended: SweepPoint

    @property
    def best_method(self) -> str:
        """The one that loses least at the rank ratio."""
        here = [point for point in self.sweep if point.rank_ratio == self.rank_ratio]
        return min(here, key=lambda point: point.measured.damage).method

    @property
    def findings(self) -> list[str]:
        """In plain words, most useful first."""
        return findings(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; numbers that are not finite are None."""
        return plain({"findings": self.findings, **asdict(self)})


def needed_statistics(methods: Sequence[str]) -> tuple[str, ...]:
    """The kinds to measure for an analysis of these methods: theirs, and those of the predictor."""
    compressed = (need for name in methods for need in CompressionConfig(name).needs)
    predicted = (need for name in ("tfwsvd", YARDSTICK) for need in get_method(name).needs)
    return tuple(dict.fromkeys((*compressed, *predicted)))


def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    validation: Sequence[Dataset],
    statistics: Statistics,
    config: AnalysisConfig | None = None,
    name: str = "",
    journal: Path | None = None,
    progress: bool = True,
) -> Analysis:
    """Run every study. The model is changed in place for each measurement, and is what it was afterwards, bit by bit.

    Args:
        validation: encoded splits (`load_validation`).
        statistics: `needed_statistics(config.methods)`, measured on this very model.
        name: what to call the model.
        journal: a file to which every measurement is appended, and from which a run that was interrupted goes on.

    Raises:
        LowRankError: statistics are missing or another model's; the journal is of other settings; several processes.
    """
    config = config or AnalysisConfig()
    refuse_several("an analysis")
    targets = find_targets(model, config.include, config.exclude)
    if factorized := sum(target.rank is not None for target in targets.values()):
        raise LowRankError(f"{factorized} layers are factorized, and an analysis changes whole weights: densify(model)")
    check_weights(targets)
    statistics.check(targets, needed_statistics(config.methods))
    left = unreached(targets, statistics)  # by compress, too
    targets = {name: target for name, target in targets.items() if name not in left}
    evaluator = Evaluator(model, tokenizer, task, validation, config.eval_samples, config.batch_size, config.seed)
    settings = {
        "model_weights": model_digest(model),
        "task": task.name,
        "layers": sorted(targets),
        "statistics": {"samples": statistics.samples, **statistics.origin},
        "validation_samples": evaluator.dense.samples,
        "validation_data": content_digest(evaluator.splits),
    }
    records = Journal(journal, settings)
    evaluations = _evaluations(config, len(targets))
    with unstacked(model, targets), bar("analysis", evaluations, "evaluations", progress) as shown:
        study = Study(targets, statistics, evaluator, records, shown.update)
        sweep = [point for method in config.methods for point in rank_sweep(study, method, config.ratios)]
        truncation = [truncate_groups(study, method, config.groups) for method in config.methods]
        layers = analyze_layers(study, config.methods, config.rank_ratio)
    return Analysis(
        name or type(model).__name__,
        task.name,
        task.score,
        "nats (log perplexity)" if task.lower_is_better else f"points of {task.score}",
        task.lower_is_better,
        config.methods,
        config.rank_ratio,
        evaluator.dense,
        {"samples": statistics.samples, "origin": statistics.origin},
        tuple(sweep),
        tuple(truncation),
        tuple(layers),
        tuple(correlations(layers)),
        recommend_layers(layers),
        recommend_model(sweep, config.rank_ratio, evaluator.dense, task),
        recommended_point(sweep, config.rank_ratio, evaluator.dense, task),
    )


def _evaluations(config: AnalysisConfig, layers: int) -> int:
    return len(config.methods) * (len(config.ratios) + config.groups + layers)
