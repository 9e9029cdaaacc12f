"""A model and a task's data → statistics → ranks → factors → score → a saved folder: the flow, written once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.allocation import Profile, get_allocation
from hf_lowrank.compression.compress import CompressionConfig, compress
from hf_lowrank.compression.profiling import PROFILE_SAMPLES, profile_losses
from hf_lowrank.compression.report import CompressionReport
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.facts import public_name, versions
from hf_lowrank.folder.loading import load_model, stored_dtype
from hf_lowrank.folder.saving import save_compressed
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.statistics import Statistics, compute_statistics
from hf_lowrank.tasks import Task, described, get_task, load_validation
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.evaluate import evaluate_splits


@dataclass
class Pipeline:
    """A model with its tokenizer and its task's data, on its way to a smaller one.

    Args:
        model: changed in place by `compress`.
        task: says which rows, labels and metric.
        data_dir: a folder with train and validation files; None for the Hub's.
        name: what records call the model: a Hub name, or the last part of a folder's path.
        samples: training rows that statistics are measured on, chosen by `seed`, in batches of `batch_size`.
        dtype: in which weights are saved; None for that of the model in memory.

    >>> pipeline = Pipeline.load("./bert-stsb", task="stsb")            # doctest: +SKIP
    >>> report = pipeline.compress(keep_model=0.6)                      # doctest: +SKIP
    >>> pipeline.score()["score"]                                       # doctest: +SKIP
    >>> pipeline.save("./bert-stsb-small")                              # doctest: +SKIP
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    data_dir: Path | None = None
    name: str = ""
    seed: int = 0
    samples: int = 512
    batch_size: int = 16
    dtype: torch.dtype | None = None
    report: CompressionReport | None = field(default=None, init=False)

    @classmethod
    def load(cls, name: str, task: str | Task, data_dir: str | Path | None = None, **options: Any) -> "Pipeline":
        """The model called `name`, a folder or a Hub name, with its tokenizer, for a task. `options` are those above.

        Raises:
            LowRankError: an unknown task, no such model, or one that is not trained for the task.
        """
        data_dir = None if data_dir is None else Path(data_dir)
        the_task = get_task(task, data_dir=data_dir) if isinstance(task, str) else task
        model, tokenizer = load_model(name, the_task)
        return cls(model, tokenizer, the_task, data_dir, public_name(name), dtype=stored_dtype(name), **options)

    @property
    def origin(self) -> dict[str, Any]:
        """What statistics are measured on, in plain words."""
        data = self.task.hub[0] if self.data_dir is None else self.data_dir.resolve().name
        return {"model": self.name, "task": self.task.name, "data": data, "split": "train", "seed": self.seed}

    @cached_property
    def validation(self) -> Sequence[Dataset]:
        """The task's validation splits, encoded.

        Raises:
            LowRankError: the data cannot be read or lack what the task needs.
        """
        return load_validation(self.task, self.data_dir, self.tokenizer, self.model.config)

    @cached_property
    def scored_on(self) -> dict[str, Any]:
        """What `score` is measured on: names, rows and a digest; scores are comparable where these are equal."""
        return described(self.validation, self.task, self.data_dir)

    def loader(self, samples: int | None = None) -> DataLoader:
        """Batches of `samples` training rows (by default those of the pipeline): under several processes, a share."""
        count = self.samples if samples is None else samples
        rest = (self.data_dir, count, self.batch_size, self.seed)
        return calibration_loader(self.model, self.tokenizer, self.task, *rest)

    def statistics(self, config: CompressionConfig, **options: Any) -> Statistics | None:
        """What `config` needs, measured on the training rows; None where it needs nothing.

        `options` are those of `compute_statistics` (`work`, `device`, …).

        Raises:
            LowRankError: as `compute_statistics`.
        """
        if not config.needs:
            return None
        chosen = {"include": config.include, "exclude": config.exclude, "origin": self.origin}
        return compute_statistics(self.model, self.loader(), config.needs, **chosen | options)

    def profile(self, config: CompressionConfig, statistics: Statistics | None, **options: Any) -> Profile | None:
        """The losses of single layers, measured, where the allocation of `config` asks for them.

        Raises:
            LowRankError: as `profile_losses`.
        """
        if get_allocation(config.allocation or "").losses != "profile":
            return None
        return profile_losses(self.model, config, statistics, self.loader(PROFILE_SAMPLES), **options)

    def compress(
        self,
        config: CompressionConfig | None = None,
        statistics: Statistics | None = None,
        work: Work | None = None,
        **settings: Any,
    ) -> CompressionReport:
        """Factorize the model in place, and say what became of it.

        Args:
            config: what to do; in its place `settings`, as keyword arguments of `CompressionConfig`.
            statistics: measured before; None to measure them now.
            work: where unfinished work is kept (see `Work.open`).

        Raises:
            LowRankError: as `compute_statistics`, `profile_losses` and `compress`; or both config and settings.
        """
        if config is not None and settings:
            raise LowRankError(f"give a config or settings, not both: {', '.join(settings)}")
        config = config or CompressionConfig(**settings)
        measured = statistics or self.statistics(config, work=work)
        profile = self.profile(config, measured)
        self.model, self.report = compress(self.model, config, measured, work=work, profile=profile)
        return self.report

    def score(self, model: PreTrainedModel | None = None, progress: bool = True) -> dict[str, float]:
        """The figures of the task's metrics, and `score`, on all validation rows: of this model, or of another."""
        chosen = self.model if model is None else model
        return evaluate_splits(chosen, self.tokenizer, self.task, self.validation, progress=progress)

    def save(self, folder: str | Path, overwrite: bool = False, **facts: Any) -> None:
        """Write model, tokenizer, record and card into a new folder, all of it or nothing; `facts` join the record.

        Raises:
            LowRankError: nothing was compressed yet; the folder exists and `overwrite` is off.
        """
        if self.report is None:
            raise LowRankError("there is nothing to save yet: call compress first")
        known = {"base_model": self.name, "task": self.task.name, "data": self.origin["data"], "versions": versions()}
        save_compressed(self.model, self.tokenizer, self.report, folder, overwrite, self.dtype, **known | facts)
