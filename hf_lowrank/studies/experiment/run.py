"""A plan → fine-tune → statistics → compress → evaluate → fine-tune → evaluate, what is done already being skipped."""

import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.card import card_facts
from hf_lowrank.folder.facts import versions
from hf_lowrank.folder.loading import load_for_finetuning
from hf_lowrank.folder.saving import save_model
from hf_lowrank.folder.scores import with_divergence, with_score
from hf_lowrank.jobs.distributed import held_for_all
from hf_lowrank.model.targets import find_targets
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.statistics import Statistics
from hf_lowrank.studies.experiment.plan import Dense, Run, plan_of
from hf_lowrank.studies.experiment.recipe import Recipe, Settings, TaskChoice, compression_config
from hf_lowrank.studies.experiment.store import Record, Store
from hf_lowrank.studies.experiment.tables import write_tables
from hf_lowrank.tasks import Task, get_task
from hf_lowrank.training.distillation import Distillation
from hf_lowrank.training.divergence import Reference

Say = Callable[[str], None]


def run_recipe(
    recipe: Recipe, output: Path, data_dir: Path | None = None, keep_models: bool = False, say: Say = print
) -> None:
    """Do every step of a recipe that has no record in `output` yet, and write the tables after each one.

    `output` holds `records/`, the tables as `<recipe>.md` and `<recipe>.json`, and `work/` (dense models, statistics,
    checkpoints), which may be deleted when all is done. Recipes that share steps may share it.

    Args:
        data_dir: a folder with one folder for each task; without it data come from the Hub.
        keep_models: save every compressed model in `output/models`, before fine-tuning where there is none after it.
        say: is told of every step.

    Raises:
        LowRankError: a record of other settings lies in `output`; or steps failed, after all others were done.
    """
    plan, store = plan_of(recipe), Store(output)
    failed: list[str] = []
    with held_for_all(output):
        for dense, runs in plan:  # before hours of work, not after them
            for name, settings in steps_of(dense, runs):
                store.get(name, settings)
        for number, (dense, runs) in enumerate(plan, 1):
            say(f"{dense.name} ({number} of {len(plan)})")
            _Group(dense, runs, store, output, data_dir, keep_models, say, recipe, failed).run()
        if PartialState().is_main_process:
            write_tables(recipe, store, output)
    if failed:
        raise LowRankError(f"{len(failed)} steps failed and are tried again by the same command: {'; '.join(failed)}")


def steps_of(dense: Dense, runs: list[Run]) -> list[tuple[str, Settings]]:
    """The name and settings of every record of a dense model and its runs."""
    steps = [(dense.name, dense.settings)]
    for run in runs:
        steps.append((run.name, run.settings))
        if run.finetune is not None:
            steps.append((run.finetuned_name, run.finetuned_settings))
    return steps


def task_of(choice: TaskChoice, data_root: Path | None) -> tuple[Task, Path | None]:
    """The task and the folder of its data, None for the Hub.

    Raises:
        LowRankError: there is no such folder, or no such columns in it.
    """
    folder = Path(choice.data_dir) if choice.data_dir else data_root / choice.name if data_root else None
    if folder is not None and not folder.is_dir():
        raise LowRankError(f"there is no folder {folder} with the data of {choice.name}")
    task = get_task(
        choice.name,
        choice.max_length,
        data_dir=folder,
        text_columns=choice.text_columns,
        label_column=choice.label_column,
    )
    return task, folder


@dataclass
class _Group:
    """A dense model and all that is made from it."""

    dense: Dense
    runs: list[Run]
    store: Store
    output: Path
    data_root: Path | None
    keep_models: bool
    say: Say
    recipe: Recipe
    failed: list[str]

    def run(self) -> None:
        done = {name: self.store.get(name, settings) for name, settings in steps_of(self.dense, self.runs)}
        if all(record is not None for record in done.values()):
            return
        try:
            self.task, self.data = task_of(self.dense.task, self.data_root)
            self.base = self._dense()
            self._refuse_other_data(done)
        except Exception as error:
            return self._fail(self.dense.name, error)
        for run in self.runs:
            wanted = [run.name] if run.finetune is None else [run.name, run.finetuned_name]
            if all(done[name] is not None for name in wanted):
                continue
            try:
                self._compressed(run)
            except Exception as error:
                self._fail(run.name, error)

    def _refuse_other_data(self, done: dict[str, Record | None]) -> None:
        """Raise where a record holds a score on other validation data than today's."""
        for name, record in done.items():
            digest = (record or {}).get("scored_on", {}).get("digest")
            if record is not None and digest != self.scored_on["digest"]:
                known = "other validation data" if digest else "validation data that were not noted"
                raise LowRankError(
                    f"{name} was scored on {known}, and is not to be compared with what is scored now; choose another "
                    f"output, or delete {self.store.path(name)}"
                )

    def _fail(self, name: str, error: Exception) -> None:
        """Note an error, and go on with what does not depend on it."""
        if not isinstance(error, LowRankError):
            self.say(traceback.format_exc())
        self.failed.append(f"{name} ({error})")
        self.say(f"{name} failed: {error}")

    # --- the dense model ---

    def _dense(self) -> tuple[Pipeline, Record]:
        """The fine-tuned model, as it was saved, and its record."""
        record = self.store.get(self.dense.name, self.dense.settings)
        folder = self.output / "work" / "dense" / self.dense.name
        name = self.dense.model.name if self.dense.finetune is None else str(folder)
        if self.dense.finetune is None:
            facts: Record = {}
        elif record is None or not folder.is_dir():
            facts = self._finetuned_dense(folder)
        pipeline = Pipeline.load(name, self.task, self.data, seed=self.dense.seed)
        pipeline.name, self.scored_on = self.dense.model.title, pipeline.scored_on
        self.reference = Reference(pipeline.model, *pipeline.reading, pipeline.validation)
        if record is None:
            record = self._add(self.dense.name, self.dense.settings, {**facts, **_figures(pipeline)})
        return pipeline, record

    def _finetuned_dense(self, folder: Path) -> Record:
        """Fine-tune the model of the recipe and save it in `folder`."""
        wanted = self.dense.model
        model, tokenizer, fresh = load_for_finetuning(wanted.name, self.task, self.dense.seed, wanted.layers)
        facts = self._train(
            self.dense.name, Pipeline(model, tokenizer, self.task, self.data), self.dense.finetune or {}
        )
        if PartialState().is_main_process:
            save_model(model, tokenizer, folder, overwrite=True)
        PartialState().wait_for_everyone()
        return {"finetuning": facts, "new_parameters": fresh}

    def _train(self, name: str, pipeline: Pipeline, settings: Settings) -> Record:
        """Fine-tune in place, going on from checkpoints of an interrupted run."""
        checkpoints = self.output / "work" / "checkpoints" / name
        weights = settings.get("distillation")
        facts = pipeline.finetune(
            distillation=Distillation(self.base[0].model, **weights) if weights is not None else None,
            checkpoints=checkpoints,
            resume=True,
            score=False,
            seed=self.dense.seed,
            **{key: value for key, value in settings.items() if key != "distillation"},
        )
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return facts

    # --- its compressions ---

    def _compressed(self, run: Run) -> None:
        """Compress, score, and fine-tune and score again; of what has a record, only what the next step needs."""
        pipeline, base = self.base
        statistics = self._statistics(run)
        candidate = pipeline.candidate(progress=True, **run.statistics)
        report = candidate.compress(compression_config(run.method, run.budget), statistics)
        facts: Record = {"base_model": pipeline.name, "task": self.task.name, "data": pipeline.origin["data"]}
        facts |= {**card_facts(candidate.model), **facts, "seed": self.dense.seed}
        facts |= with_score(facts, "dense", base["score"], self.scored_on)
        record = self.store.get(run.name, run.settings)
        if record is None:
            figures, found = self._compared(candidate, facts, "compressed")
            whole = {**facts, **found, **report.to_dict()}
            record = self._add(run.name, run.settings, {**figures, "compression": whole})
        whole = record["compression"]
        if run.finetune is not None and self.store.get(run.finetuned_name, run.finetuned_settings) is None:
            training = self._train(run.finetuned_name, candidate, run.finetune)
            figures, found = self._compared(candidate, whole, "finetuned")
            whole |= {**found, "finetuning": training}
            self._add(run.finetuned_name, run.finetuned_settings, {**figures, "compression": whole})
        if self.keep_models and PartialState().is_main_process:
            save_model(
                candidate.model, candidate.tokenizer, self.output / "models" / run.name, overwrite=True, record=whole
            )

    def _compared(self, candidate: Pipeline, facts: Record, kind: str) -> tuple[Record, Record]:
        """The score of a model and how far it is from the dense one, and the facts that note both."""
        figures, apart = _figures(candidate), self.reference.divergence(candidate.model, progress=False).to_dict()
        noted = with_score(facts, kind, figures["score"], self.scored_on)
        return figures | {"divergence": apart}, noted | with_divergence(facts, kind, apart, self.scored_on)

    def _statistics(self, run: Run) -> Statistics | None:
        """All that the runs of this model on the same layers need, measured once; kept for the next time."""
        own = compression_config(run.method, run.budget)
        include, exclude = own.include, own.exclude
        configs = [compression_config(it.method, it.budget) for it in self.runs if it.statistics == run.statistics]
        alike = [config for config in configs if (config.include, config.exclude) == (include, exclude)]
        needs = list(dict.fromkeys(need for config in alike for need in config.needs))
        if not needs:
            return None
        samples = run.statistics["samples"]
        folder = self.output / "work" / "statistics" / run.statistics_name
        pipeline = replace(self.base[0], **run.statistics)
        if (folder / "statistics.json").is_file():
            kept = Statistics.load(folder)
            if _fits(kept, pipeline.model, needs, include, exclude, samples):
                return kept
        started = time.perf_counter()
        measured = pipeline.measure(needs, include, exclude, samples=samples)
        if PartialState().is_main_process:
            folder.parent.mkdir(parents=True, exist_ok=True)
            measured.save(folder, overwrite=True)
        PartialState().wait_for_everyone()
        self.say(f"statistics ({', '.join(needs)}) in {time.perf_counter() - started:.0f} s")
        return measured

    def _add(self, name: str, settings: Settings, facts: Record) -> Record:
        record = self.store.add(name, settings, {**facts, "scored_on": self.scored_on, "versions": versions()})
        if PartialState().is_main_process:
            write_tables(self.recipe, self.store, self.output)
        self.say(f"{name}: {record['score']:.2f}, {record['parameters']:,} parameters")
        return record


def _figures(pipeline: Pipeline) -> Record:
    metrics = pipeline.score()
    return {"score": metrics["score"], "metrics": metrics, "parameters": pipeline.model.num_parameters()}


def _fits(kept: Statistics, model: PreTrainedModel, needs: list[str], include: Any, exclude: Any, samples: int) -> bool:
    """Whether saved statistics are of this very model and of as many samples, and hold what is needed."""
    try:
        kept.check(find_targets(model, include, exclude), tuple(needs))
    except LowRankError:
        return False
    return kept.origin.get("samples") == samples
