"""A model and a task's data → statistics → ranks → factors → score → a saved folder: the flow, written once."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.allocation import Profile, get_allocation
from hf_lowrank.compression.blockwise import why_whole
from hf_lowrank.compression.codes import measured_to_round, solver_for_codes
from hf_lowrank.compression.compress import CompressionConfig, check_possible, checked_targets, compress
from hf_lowrank.compression.profiling import PROFILE_SAMPLES, profile_losses
from hf_lowrank.compression.report import CompressionReport
from hf_lowrank.compression.search import search_smallest
from hf_lowrank.compression.stored import with_embeddings
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.earlier import of_original
from hf_lowrank.folder.facts import public_name, versions
from hf_lowrank.folder.loading import load_as_saved, load_model, load_trained, stored_dtype
from hf_lowrank.folder.packing import alone
from hf_lowrank.folder.quantize import quantize_
from hf_lowrank.folder.quantizers import Quantization
from hf_lowrank.folder.quantizers import described as described_quantization
from hf_lowrank.folder.reading import read_config
from hf_lowrank.folder.saving import add_facts, save_compressed
from hf_lowrank.folder.scores import with_divergence, with_score
from hf_lowrank.folder.sentences import Sentences, embeds_sentences, read_sentences
from hf_lowrank.jobs.checkpoint import MINUTES, Work
from hf_lowrank.jobs.progress import say_once
from hf_lowrank.model.blocks import NotAChain
from hf_lowrank.model.locating import resolve
from hf_lowrank.model.predictions import Readout
from hf_lowrank.model.weights import model_digest
from hf_lowrank.nn.modeling_lowrank import LowRankMixin
from hf_lowrank.solvers import METHODS, get_method
from hf_lowrank.statistics import Statistics, compute_statistics
from hf_lowrank.statistics.batches import Marks
from hf_lowrank.statistics.blockwise import statistics_by_blocks
from hf_lowrank.statistics.container import statistics_digest
from hf_lowrank.statistics.labels import Labels, ModelLabels
from hf_lowrank.tasks import Task, collator, described, get_task, label_mapping, load_validation
from hf_lowrank.tasks.calibration import calibration_loader, data_digest
from hf_lowrank.tasks.data import data_name
from hf_lowrank.tasks.enough import enough_in_words
from hf_lowrank.tasks.task import KINDS, Texts
from hf_lowrank.tasks.texts import given_texts, read_texts, texts_task
from hf_lowrank.training.divergence import Divergence, Reference
from hf_lowrank.training.evaluate import evaluate_described, evaluate_splits, score_and_loss
from hf_lowrank.training.finetune import finetune
from hf_lowrank.training.heal import heal
from hf_lowrank.training.limits import limit_for
from hf_lowrank.training.similarity import agreement, evaluate_pairs


@dataclass
class Pipeline:
    """A model with its tokenizer and its task's data, on its way to a smaller one.

    Args:
        model: changed in place by `compress`.
        tokenizer: reads the task's texts; None only without a task.
        task: says which rows, labels and metric; None where nothing is measured.
        data_dir: a folder with train and validation files; None for the Hub's.
        name: what records call the model: a Hub name, or the last part of a folder's path.
        seed: which training rows statistics are measured on.
        samples: how many; None for as many as the model takes (see `enough_samples`).
        batch_size: how many at a time; of speed and memory, not of the result.
        labels: whose labels statistics are by, "data" or "model"; None for the method's own, or the model's where the
            task has none.
        dtype: in which weights are saved; None for that of the model in memory.
        device: where statistics are kept; None for beside the layers.
        work: where unfinished work is kept; None for nowhere (see `begin`).
        facts: what the record says besides what the pipeline knows by itself.
        progress: whether bars are shown.
        blockwise: whether the blocks of the model stay on disk, and are measured and factorized one at a time. Stacked
            experts do not stay there; they are measured so.
        sentences: of a sentence-transformers folder, what follows the transformer: its embeddings are what counts.
        quantization: how `save` stores weights; None for as they are, but where a budget in bytes chooses bits. What is
            measured for compressing is then measured of all layers that are rounded, and says how to round them.

    >>> pipeline = Pipeline.load("./bert-stsb", task="stsb")            # doctest: +SKIP
    >>> report = pipeline.compress(keep_model=0.6)                      # doctest: +SKIP
    >>> pipeline.score()["score"]                                       # doctest: +SKIP
    >>> pipeline.save("./bert-stsb-small")                              # doctest: +SKIP
    >>> unlabelled = Pipeline.load("./bert-stsb", texts="texts.txt")    # doctest: +SKIP
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    task: Task | None
    data_dir: Path | None = None
    name: str = ""
    seed: int = 0
    samples: int | None = None
    batch_size: int = 16
    labels: str | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    work: Work | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    progress: bool = True
    blockwise: bool = False
    sentences: Sentences | None = None
    quantization: Quantization | None = None
    report: CompressionReport | None = field(default=None, init=False)
    known: Statistics | None = field(default=None, init=False, repr=False)
    _marks: tuple[Statistics | None, Marks] = field(default=(None, Marks()), init=False)  # of what was measured last

    @classmethod
    def load(
        cls,
        name: str,
        task: str | Task | None = None,
        data_dir: str | Path | None = None,
        texts: str | Path | Sequence[Any] | None = None,
        **options: Any,
    ) -> "Pipeline":
        """The model called `name`, a folder or a Hub name, with its tokenizer, for a task. `options` are those above.

        Without a task it is what it was saved as, and only what needs no data can be done with it. In place of a task
        `texts` will do, without any label: a list of texts or of pairs, or a file of them (see `read_texts`).

        Args:
            name: a folder with a model, or its name on the Hub.
            task: the name of a task, or one of your own; None for what the model was saved as.
            data_dir: a folder with train and validation files; None for the Hub's.
            texts: in place of a task and its data.
            options: the other arguments of `Pipeline`.

        Raises:
            LowRankError: an unknown task, no such model, or one that is not trained for the task; both task and texts.
        """
        if texts is not None and (task is not None or data_dir is not None):
            raise LowRankError("give a task and its data, or texts, not both")
        data_dir = None if data_dir is None else Path(data_dir)
        the_task = get_task(task, data_dir=data_dir) if isinstance(task, str) else task
        if texts is not None:
            the_task = task_of_texts(
                name, read_texts(Path(texts)) if isinstance(texts, str | Path) else given_texts(texts)
            )
        the_task = the_task and fitting(name, the_task)
        options["sentences"] = read_sentences(name)
        model, tokenizer = (
            load_as_saved(name)
            if the_task is None
            else load_model(name, the_task, on_disk=options.get("blockwise", False))
        )
        return cls(model, tokenizer, the_task, data_dir, public_name(name), dtype=stored_dtype(name), **options)

    def labels_for(self, config: CompressionConfig) -> str:
        """Whose labels statistics for `config` are by.

        Args:
            config: its method has labels of its own.
        """
        if self.labels is None and self.task is not None and not self.task.has_labels:
            return "model"
        return self.labels or get_method(config.method).labels

    @property
    def origin(self) -> dict[str, Any]:
        """What statistics are measured on, in plain words."""
        _, task = self.reading
        data = data_name(task, self.data_dir)
        known = {"model": self.name, "task": task.name, "data": data, "split": task.training, "seed": self.seed}
        return known if self.samples is not None else known | {"enough": enough_in_words(self.model, task)}

    @property
    def reading(self) -> tuple[PreTrainedTokenizerBase, Task]:
        """What data are read with, where something is measured.

        Raises:
            LowRankError: there is no task.
        """
        if self.tokenizer is None or self.task is None:
            raise LowRankError("there is no task to measure on: load the model for one")
        return self.tokenizer, self.task

    @cached_property
    def validation(self) -> Sequence[Dataset]:
        """The task's validation splits, encoded.

        Raises:
            LowRankError: the data cannot be read or lack what the task needs.
        """
        tokenizer, task = self.reading
        return load_validation(task, self.data_dir, tokenizer, self.model.config)

    @cached_property
    def scored_on(self) -> dict[str, Any]:
        """What `score` is measured on: names, rows and a digest; scores are comparable where these are equal."""
        return described(self.validation, self.reading[1], self.data_dir)

    @cached_property
    def calibration(self) -> DataLoader:
        """The training rows that statistics are measured on, in batches: under several processes, a share.

        Raises:
            LowRankError: as `calibration_loader`.
        """
        return self.rows(self.samples, self.labels or "data")

    def rows(self, samples: int | None, labels: str = "data") -> DataLoader:
        """As `calibration`, of another number of training rows, and by whose labels they are to be used.

        Args:
            samples: how many rows; None for as many as the model takes.
            labels: "data" or "model".
        """
        tokenizer, task = self.reading
        rest = (self.data_dir, samples, self.batch_size, self.seed, labels)
        return calibration_loader(self.model, tokenizer, task, *rest)

    def batches(self, rows: Dataset, batch_size: int) -> DataLoader:
        """Encoded rows, such as a split of `validation`, in batches, in their order.

        Args:
            rows: encoded rows.
            batch_size: rows in a batch.
        """
        tokenizer, task = self.reading
        return DataLoader(rows, batch_size=batch_size, collate_fn=collator(task, tokenizer))

    def candidate(self, progress: bool = False, **calibration: Any) -> "Pipeline":
        """A pipeline of a copy of the model, on the same data, which are not read again.

        Args:
            progress: whether its bars are shown.
            calibration: `samples`, `batch_size` and `labels` of its statistics, where they are others.
        """
        other = copy.copy(self)
        other.model, other.facts, other.progress = copy.deepcopy(self.model), {**self.facts}, progress
        vars(other).update(calibration)
        if calibration:
            vars(other).pop("calibration", None)
        return other

    def settled(self, config: CompressionConfig) -> CompressionConfig:
        """The config with what depends on the model: a budget in bytes counts the input embedding too.

        Args:
            config: how to compress.
        """
        return with_embeddings(self.model, config)

    def prepared(self, config: CompressionConfig, statistics: Statistics | None = None) -> CompressionConfig:
        """The config as `settled`, once it is known that the model can be compressed so, before anything is measured.

        Whose labels statistics are by is from now on as the config's method asks, unless it was given.

        Args:
            config: how to compress.
            statistics: measured before; None where they will be.

        Raises:
            LowRankError: as `check_possible`; the statistics lack a layer, or are of another model.
        """
        self.labels = self.labels_for(config)
        config = self.settled(config)
        check_possible(self.model, config, self.dtype)
        if statistics is not None:
            statistics.check(checked_targets(self.model, config), config.needs)
        return config

    def check_dense(self) -> None:
        """Raise where the model was compressed before, and so is no teacher of what it becomes.

        Raises:
            LowRankError: it says how such a model is healed.
        """
        if isinstance(self.model, LowRankMixin):
            raise LowRankError(
                "the model was compressed before, and only a dense one can be the teacher of what becomes: compress "
                "it without healing, and heal the result with the dense model as teacher"
            )

    def check_losses(self, study: str) -> None:
        """Raise where the model has no losses to study, but embeddings of texts.

        Args:
            study: what needs them.

        Raises:
            LowRankError: it says what to do.
        """
        if self._readout is not None:
            raise LowRankError(
                f"{study} measures losses, and embeddings of sentence-transformers have none: compress the model to "
                "several sizes, scoring each"
            )

    def begin(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        statistics: Path | None = None,
        measures: bool = True,
        overwrite: bool = False,
        resume: bool = False,
        checkpoint_minutes: float = MINUTES,
    ) -> None:
        """Keep unfinished work in `folder` from now on, or go on with the work that is there.

        The job is known by the model's weights, the seed, versions, and what is given here.

        Args:
            folder: a place of its own.
            settings: what is to be done, in plain facts.
            statistics: where they are saved, if they were measured before.
            measures: whether something is measured on the calibration samples.
            overwrite: let go of work that is there.
            resume: go on with it.
            checkpoint_minutes: between two checkpoints of a pass over the data.

        Raises:
            LowRankError: as `Work.open`.
        """
        known = {"task": self.task and self.task.name, "batch_size": self.batch_size, "labels": self.labels}
        known |= {"blockwise": True} if self.blockwise else {}
        samples = data_digest(self.calibration) if measures and statistics is None else None
        key = {
            "model": model_digest(self.model),
            "data": statistics_digest(statistics) if statistics is not None else samples,
            "settings": {**settings, **known, "dtype": self.dtype and str(self.dtype)},
            "seed": self.seed,
            "versions": versions(),
        }
        self.work = Work.open(folder, key, resume, overwrite, checkpoint_minutes)

    def statistics(self, config: CompressionConfig) -> Statistics | None:
        """What `config` needs, measured on the calibration samples; None where it needs nothing.

        Args:
            config: how to compress; its method and allocation say what is needed.

        Raises:
            LowRankError: as `compute_statistics`.
        """
        if not config.needs:
            return None
        include, exclude = config.include, config.exclude
        if self._rounds(config):
            include, exclude = measured_to_round(self.model, config), None
        return self.measure(config.needs, include, exclude, self.labels_for(config))

    def measure(
        self,
        kinds: Sequence[str],
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        labels: str | None = None,
        **origin: Any,
    ) -> Statistics:
        """Statistics of these kinds, measured on the calibration samples by these labels, or the pipeline's.

        Args:
            kinds: names in `KINDS`, such as `CompressionConfig.needs` lists.
            include: name patterns of layers (see `find_targets`); None for the linears inside the blocks.
            exclude: name patterns of layers to leave out.
            labels: "data" or "model"; None for the pipeline's.
            origin: joins what the statistics note of the samples.

        Raises:
            LowRankError: as `compute_statistics`.
        """
        whose, marks = labels or self.labels or "data", Marks() if _go_on(kinds) else None
        rest = {"include": include, "exclude": exclude, "origin": self.origin | origin, "device": self.device}
        options: Any = {**rest, "progress": self.progress, "work": self.work, "marks": marks}
        measured = self._measured(self._rows_by(whose), kinds, labels=self._labels(whose), **options)
        self._marks = (measured, marks) if marks is not None else (None, Marks())
        return measured

    def _measured(self, rows: DataLoader, kinds: Sequence[str], **options: Any) -> Statistics:
        """Statistics, block by block if the pipeline is to go so, and the model's blocks can."""
        if self.blockwise:
            try:
                return statistics_by_blocks(self.model, rows, kinds, **options)
            except NotAChain as why:
                self._load_whole(str(why))
        return compute_statistics(self.model, rows, kinds, **options)

    def _load_whole(self, why: str) -> None:
        """From now on the whole model is in memory, and it is said why."""
        if self.blockwise:
            say_once(f"{self.name} does not go block by block, as {why}: the whole model is loaded")
            self.model, self.blockwise = load_trained(str(self.model.name_or_path), self.reading[1]), False

    def profile(self, config: CompressionConfig, statistics: Statistics | None) -> Profile | None:
        """The losses of single layers, measured, where the allocation of `config` asks for them.

        Args:
            config: how to compress.
            statistics: what its method needs; None where it needs nothing.

        Raises:
            LowRankError: as `profile_losses`.
        """
        if get_allocation(config.allocation or "").losses != "profile":
            return None
        return profile_losses(self.model, config, statistics, self.rows(PROFILE_SAMPLES), progress=self.progress)

    def compress(
        self,
        config: CompressionConfig | None = None,
        statistics: Statistics | None = None,
        profile: Profile | None = None,
        **settings: Any,
    ) -> CompressionReport:
        """Factorize the model in place, and say what became of it.

        Args:
            config: what to do; in its place `settings`, as keyword arguments of `CompressionConfig`.
            statistics: measured before; None to measure them now.
            profile: likewise, for the allocation "knapsack".
            settings: arguments of `CompressionConfig`, where no config is given.

        Raises:
            LowRankError: as `compute_statistics`, `profile_losses` and `compress`; or both config and settings.
        """
        if config is not None and settings:
            raise LowRankError(f"give a config or settings, not both: {', '.join(settings)}")
        config = self.settled(config or CompressionConfig(**settings))
        if self.blockwise and (why := "few bits need it" if self._rounds(config) else why_whole(self.model, config)):
            self._load_whole(why)
        measured = statistics or self.statistics(config)
        profile = profile or self.profile(config, measured)
        rest: Any = {"work": self.work, "profile": profile, "dtype": self.dtype, **self._rows_again(config, measured)}
        self.model, self.report = compress(self.model, config, measured, self.progress, **rest)
        self.known = measured if self._rounds(config) else None
        return self.report

    def search(
        self,
        config: CompressionConfig,
        statistics: Statistics | None = None,
        keep_score: float | None = None,
        max_loss_increase: float | None = None,
    ) -> CompressionReport:
        """As `compress`, at the smallest size that is good enough on the validation data, whatever the config's budget.

        Args:
            config: everything but the budget.
            statistics: measured before; None to measure them now.
            keep_score: the share of the dense model's score that is kept at least.
            max_loss_increase: in its place, how much the mean loss may rise at most.

        Raises:
            LowRankError: as `compress`, `limit_for` and `search_smallest`; no model is good enough.
        """
        self._load_whole("it is compressed many times")
        measured = statistics or self.statistics(config)
        profile = self.profile(config, measured)
        limit = limit_for(self.model, *self.reading, self.validation, keep_score, max_loss_increase)
        try:
            rest: Any = {"progress": self.progress, **self._rows_again(config, measured)}
            found = search_smallest(self.model, config, measured, limit.measure, limit.accepts, profile, **rest)
        except LowRankError as error:
            raise LowRankError(f"{error}; wanted {limit}") from None
        wanted = {"keep_score": keep_score, "max_loss_increase": max_loss_increase}
        self.model, self.report = found.model, found.report
        self.known = measured if self._rounds(config) else None
        self.facts["search"] = {**wanted, "tried": found.tried}
        return self.report

    def heal(self, teacher: PreTrainedModel, name: str = "", **settings: Any) -> dict[str, Any]:
        """Train the factors to say what the dense model says, without labels; what came of it, noted for the record.

        Args:
            teacher: the dense model that `compress` began with.
            name: what records call it; by default as the model itself.
            settings: those of `HealConfig`.

        Raises:
            LowRankError: as `heal`.
        """
        if self.blockwise:
            raise LowRankError("a model whose blocks stay on disk cannot be trained: save it, and heal what was saved")
        folder = None if self.work is None else self.work.folder / "healing"
        tokenizer, task = self.reading
        options: Any = {"dtype": self.dtype, "checkpoints": folder, "resume": True, **settings}
        shown: Any = {"progress": self.progress, "readout": self._readout}
        facts = heal(self.model, teacher, tokenizer, task, self.data_dir, **shown, **options)
        data = data_name(task, self.data_dir)
        if self.report is not None:
            self.report = replace(self.report, directions={})  # trained factors have others
        self.facts["healing"] = facts | {"teacher": name or self.name, "data": data, "versions": versions()}
        return facts

    def score(self) -> dict[str, float]:
        """The figures of the task's metrics, and `score`, on all validation rows."""
        return self._scored(self.model)

    def score_and_loss(self) -> dict[str, float]:
        """The `score`, and the mean `loss` of the validation rows, over several splits the means."""
        return score_and_loss(self.model, *self.reading, self.validation, self.progress)

    def score_dense(self) -> dict[str, float]:
        """As `score`, noted for the record as the score before compression."""
        return self._noted("dense")

    def score_compressed(self) -> dict[str, float]:
        """As `score`, noted for the record as the score after compression."""
        return self._noted("compressed")

    def divergence(self, dense: PreTrainedModel, model: PreTrainedModel | None = None) -> Divergence:
        """How far the predictions of this model, or another, are from a dense one's, on all validation rows.

        Args:
            dense: the model whose predictions count as right.
            model: another model to measure; None for the pipeline's.

        Raises:
            LowRankError: they predict different things.
        """
        reference = Reference(dense, *self.reading, self.validation, readout=self._readout)
        return reference.divergence(self.model if model is None else model)

    def compare_saved(self, folder: str | Path, name: str) -> Divergence:
        """How far the model saved in `folder` is from the one called `name` it was made from, noted in its record.

        Args:
            folder: where the model was saved.
            name: of the model that it was made from, a folder or a Hub name.
        """
        task = self.reading[1]
        with alone(self._packs):
            dense, saved = (load_trained(each, task, self.blockwise) for each in (name, str(folder)))
        found = self.divergence(dense, saved)
        if self._readout is not None and task.is_scored:
            self.facts["neighbours"] = agreement(dense, saved, *self.reading, self._readout, self.data_dir)
            add_facts(folder, neighbours=self.facts["neighbours"])
        noted = with_divergence(self.facts, "compressed", found.to_dict(), self.scored_on)
        self.facts |= noted
        add_facts(folder, **noted)
        return found

    def score_saved(self, folder: str | Path) -> dict[str, float]:
        """As `score`, of the model loaded back from the folder it was saved in, and noted in its record and card.

        Args:
            folder: where the model was saved.
        """
        _, task = self.reading
        with alone(self._packs):
            loaded, tokenizer = load_model(str(folder), task, self.blockwise)
        if self._readout is None:
            figures, scored_on = evaluate_described(loaded, tokenizer, task, self.data_dir)
        else:
            figures, scored_on = self._scored(loaded), self.scored_on
        found = with_score(self.facts, "compressed", figures["score"], scored_on)
        self.facts |= found
        add_facts(folder, **found)
        return figures

    def finetune(self, **options: Any) -> dict[str, Any]:
        """Train the model in place, as it is or compressed; `options` are those of `training.finetune.finetune`.

        Args:
            options: keyword arguments of `finetune`, such as `distillation`.

        Raises:
            LowRankError: as there.
        """
        return finetune(self.model, *self.reading, self.data_dir, progress=self.progress, **options)

    def save(self, folder: str | Path, overwrite: bool = False, **facts: Any) -> None:
        """Write model, tokenizer, record and card into a new folder, all of it or nothing; `facts` join the record.

        Weights are stored as `quantization` says, rounded with what was measured for compressing.

        Args:
            folder: a new one.
            overwrite: replace it, should it exist.
            facts: plain values that join the record.

        Raises:
            LowRankError: nothing was compressed yet; the folder exists and `overwrite` is off; as `quantize_`.
        """
        if self.report is None:
            raise LowRankError("there is nothing to save yet: call compress first")
        if self.work is not None:
            self.work.mark_saving()
        quantization = Quantization() if self.quantization is None and self.report.bits else self.quantization
        if quantization is not None:
            method = self.report.settings["method"]
            can = self.known is not None or not get_method(method).needs
            solver = solver_for_codes(self.model, method, self.known) if can else None
            with alone():
                quantize_(self.model, quantization, self.report.bits, solver, self.dtype)
            facts["quantization"] = described_quantization(quantization, method if can else None)
        known = self._known() | self.facts | facts
        self.report, self.facts = of_original(self.report, known, self.model.name_or_path)
        with alone(self._packs):
            save_compressed(self.model, self.tokenizer, self.report, folder, overwrite, self.dtype, **self.facts)

    def save_statistics(self, statistics: Statistics, folder: str | Path, overwrite: bool = False) -> None:
        """Write statistics into a new folder, all of it or nothing.

        Args:
            statistics: what `statistics` or `measure` gave.
            folder: a new one.
            overwrite: replace it, should it exist.

        Raises:
            LowRankError: the folder exists and `overwrite` is off.
        """
        if self.work is not None:
            self.work.mark_saving()
        statistics.save(folder, overwrite)

    def finish(self) -> None:
        """Let go of the unfinished work, the result being safe; to be called by the main process.

        The factors of a model that went block by block lie there: from now on it can only be loaded as it was saved.
        """
        if self.work is not None:
            self.work.remove()

    @property
    def _packs(self) -> bool:
        """Whether what was saved has few bits."""
        return self.quantization is not None or bool(self.report and self.report.bits)

    def _rounds(self, config: CompressionConfig) -> bool:
        """Whether `save` stores few bits."""
        return self.quantization is not None or config.budget.kind == "bytes"

    def _noted(self, kind: str) -> dict[str, float]:
        figures = self.score()
        self.facts |= with_score(self.facts, kind, figures["score"], self.scored_on)
        return figures

    def _known(self) -> dict[str, Any]:
        """What the record says of where the model comes from."""
        known: dict[str, Any] = {"base_model": self.name, "versions": versions()}
        if self.task is not None:
            known |= {"task": self.task.name, "data": self.origin["data"], "metric": self.task.score}
            known |= {"auto_class": KINDS[self.task.kind]}  # of several that load the model, the task's
            known |= {"dataset": self.task.hub[0]} if self.task.own_data and self.data_dir is None else {}
            if mapping := label_mapping(self.task, self.model.config):
                known |= {"labels": mapping}
        return known

    def _rows_again(self, config: CompressionConfig, statistics: Statistics | None) -> dict[str, Any]:
        """The samples of the statistics and their labels, for sequential factors."""
        wanted = get_method(config.method).sequential if config.sequential is None else config.sequential
        if statistics is None or not wanted:
            return {}
        measured, marks = self._marks
        if measured is statistics and marks.complete:
            return {"batches": marks}
        whose = "data" if statistics.labels == "data" else "model"
        return {"batches": self._rows_by(whose), "labels": self._labels(whose)}

    def _labels(self, whose: str) -> str | Labels:
        """Labels of that name, of what counts of the model's outputs."""
        return ModelLabels(readout=self._readout) if self._readout is not None and whose == "model" else whose

    @property
    def _readout(self) -> Readout | None:
        """What counts of the model's outputs, where it is not the outputs themselves."""
        return None if self.sentences is None else self.sentences.readout

    def _scored(self, model: PreTrainedModel) -> dict[str, float]:
        if self._readout is not None:
            return evaluate_pairs(model, *self.reading, self._readout, self.data_dir, progress=self.progress)
        return evaluate_splits(model, *self.reading, self.validation, progress=self.progress)

    def _rows_by(self, labels: str) -> DataLoader:
        """The calibration samples, to be used by these labels."""
        return self.calibration if labels == (self.labels or "data") else self.rows(self.samples, labels)


def _go_on(kinds: Sequence[str]) -> bool:
    """Whether these are all that a method needs whose sequential factors then go on with the samples."""
    return any(method.sequential and set(method.needs) <= {*kinds} for method in METHODS.values())


def fitting(name: str, task: Task) -> Task:
    """A task as the model called `name` is to read it: one of sentence-transformers embeds the texts of a pair apart.

    Raises:
        LowRankError: such a model is not scored by the task; or as `read_sentences`.
    """
    apart = task.kind not in ("embedding", "similarity") and embeds_sentences(name)
    return task.as_similarity() if apart else task


def task_of_texts(name: str, texts: Texts, max_length: int | None = None) -> Task:
    """The task of reading texts with the model called `name`, cut at `max_length` tokens if that is given.

    Raises:
        LowRankError: no such model, or one that reads more than texts.
    """
    task = texts_task(texts, read_config(resolve(name)))
    return replace(task, max_length=max_length, length_asked=True) if max_length else task
