"""A model and its task's data, loaded once; statistics and rows of figures are kept and not measured twice."""

import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from benchmarks.harness import Lines, Options
from hf_lowrank import CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.loading import load_model
from hf_lowrank.statistics.batches import Marks
from hf_lowrank.statistics.labels import Labels
from hf_lowrank.tasks import get_task, load_validation
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.evaluate import evaluate_splits

SEEDS = (0, 1, 2)
BATCH_SIZE = 16

Figures = dict[str, Any]


class Study:
    """The dense model, the validation data, and what has been measured so far, in JSON lines beside statistics.

    Args:
        options: the benchmark's; `output` is where what was measured is kept, so that a run that was ended goes on.
        name: of the benchmark.
    """

    def __init__(self, options: Options, name: str) -> None:
        if options.model is None or options.task is None:
            raise LowRankError(f"{name} needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
        self.task, self.data_dir = get_task(options.task), options.data_dir
        self.name, self.folder = Path(options.model).name, options.output
        self.lines = Lines(self.folder / f"{name}-{self.name}.jsonl")
        self.model, self.tokenizer = load_model(options.model, self.task)
        self.validation = load_validation(self.task, self.data_dir, self.tokenizer, self.model.config)
        self.reference = Reference(self.model, self.tokenizer, self.task, self.validation)
        self.marks: dict[tuple[str, int], Marks] = {}  # of what was measured by this process
        self.dense = self.row({"model": "dense"}, lambda: {"score": self.score(self.model)})["score"]

    def row(self, key: Mapping[str, Any], measure: Callable[[], Figures]) -> Figures:
        """The figures of a key, measured unless they were before."""
        known = [row for row in self.lines.rows() if all(row.get(name) == value for name, value in key.items())]
        if not known:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lines.add(**key, **measure())
            known = self.lines.rows()[-1:]
        return known[-1]

    def samples(self, labels: str, seed: int, samples: int | None = None) -> DataLoader:
        """Calibration samples, as many as are enough unless said."""
        rest: Any = (self.data_dir, samples, BATCH_SIZE, seed, labels)
        return calibration_loader(self.model, self.tokenizer, self.task, *rest)

    def statistics(
        self, labels: str | Labels, seed: int, kind: str = "", samples: int | None = None
    ) -> tuple[Statistics, float]:
        """What kfac needs, by these labels, called `kind`, and the CPU seconds that measuring it took."""
        place = self.folder / "statistics" / f"{self.name}-{kind or labels}-{seed}-{samples or 'enough'}"
        if not place.is_dir():
            started, rows = time.process_time(), self.samples("data" if labels == "data" else "model", seed, samples)
            marks = self.marks[kind or str(labels), seed] = Marks()
            options: Any = {"origin": {"seed": seed}, "progress": False, "labels": labels, "marks": marks}
            found = compute_statistics(self.model, rows, CompressionConfig().needs, **options)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_suffix(".json").write_text(json.dumps(time.process_time() - started), encoding="utf-8")
            found.save(place)
        return Statistics.load(place), json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))

    def measured(
        self, config: CompressionConfig, statistics: Statistics, samples: DataLoader | Marks | None = None
    ) -> Figures:
        """A copy of the model, compressed: its score, how far it is from dense, and the CPU seconds of compressing."""
        started = time.process_time()
        low_rank, _ = compress(copy.deepcopy(self.model), config, statistics, progress=False, batches=samples)
        seconds, outputs = time.process_time() - started, list[Any]()
        kept = low_rank.register_forward_hook(lambda module, args, output: outputs.append(output))
        score = self.score(low_rank)
        kept.remove()
        low_rank.forward = lambda **batch: outputs.pop(0)  # for the same batches in the same order
        apart = self.reference.divergence(low_rank, progress=False)
        return {"score": score, "divergence": apart.mean, "measure": apart.measure, "seconds": seconds}

    def score(self, model: PreTrainedModel) -> float:
        """On the whole validation data."""
        return evaluate_splits(model, self.tokenizer, self.task, self.validation, progress=False)["score"]
