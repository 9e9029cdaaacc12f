"""A compressed model cut further without data, against compressing the dense one anew: scores, and seconds."""

import copy
import time
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.harness import Options, Result, Row
from hf_lowrank import CompressionConfig
from hf_lowrank.allocation import ImpossibleBudget
from hf_lowrank.compression.shrink import shrink
from hf_lowrank.errors import LowRankError
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.training.evaluate import evaluate_splits

FROM, TO = 0.5, (0.3, 0.2, 0.1)  # shares of the targeted parameters


def run(options: Options) -> Result:
    """A row for each share: the default method anew, and shrunk from half of the parameters."""
    if options.model is None or options.task is None:
        raise LowRankError("shrink needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    large = Pipeline.load(options.model, options.task, options.data_dir)
    dense, best = copy.deepcopy(large.model), large.score()["score"]
    statistics = large.statistics(CompressionConfig(keep=FROM))
    report = large.compress(CompressionConfig(keep=FROM), statistics)
    rows: list[Row] = []
    for share in TO:
        anew = Pipeline(copy.deepcopy(dense), large.tokenizer, large.task, options.data_dir)
        anew.compress(CompressionConfig(keep=share), statistics)
        started, shrunk = time.process_time(), "impossible: too much stayed dense"
        with suppress(ImpossibleBudget):
            smaller, _ = shrink(copy.deepcopy(large.model), report.directions, CompressionConfig(keep=share))
            shrunk = f"{_score(large, smaller):.2f} in {time.process_time() - started:.1f} CPU seconds with its score"
        rows.append(
            {
                "keep": f"{share:.0%}",
                "anew": f"{anew.score()['score']:.2f}",
                f"shrunk from {FROM:.0%}": shrunk,
            }
        )
    assert large.task is not None
    return Result(
        f"{large.task.score} on {large.task.name}: compressed anew, and cut further without data; dense {best:.2f}",
        rows,
        ["No fine-tuning. Layers that stayed dense at half of the parameters stay so when the model is shrunk."],
        {"model": Path(options.model).name, "task": large.task.name, "dense": best},
    )


def _score(pipeline: Pipeline, model: PreTrainedModel) -> float:
    return evaluate_splits(model, *pipeline.reading, pipeline.validation, progress=False)["score"]
