"""What every method keeps of a real model's score at several rank ratios, without fine-tuning afterwards."""

import copy
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness import Options, Result, Row
from hf_lowrank import METHODS, CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.calibration import calibration_loader
from hf_lowrank.errors import LowRankError
from hf_lowrank.evaluate import evaluate_splits
from hf_lowrank.loading import load_model
from hf_lowrank.progress import bar
from hf_lowrank.tasks import get_task, load_validation

RANK_RATIOS = (0.5, 0.33, 0.2, 0.1)
SAMPLES = 512


def run(options: Options) -> Result:
    """Score every method at every ratio, by its own allocation and by the uniform one."""
    if options.model is None or options.task is None:
        raise LowRankError("quality needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    task = get_task(options.task)
    model, tokenizer = load_model(options.model, task)
    validation = load_validation(task, options.data_dir, tokenizer, model.config)

    def score(candidate: PreTrainedModel) -> float:
        return evaluate_splits(candidate, tokenizer, task, validation, progress=False)["score"]

    dense = score(model)
    statistics = _statistics(options, model, tokenizer)
    runs = [(name, how) for name, method in METHODS.items() for how in dict.fromkeys(("uniform", method.allocation))]
    rows: list[Row] = []
    scores: dict[str, dict[str, float]] = {}
    parameters: dict[str, int] = {}
    with bar("quality", len(runs) * len(RANK_RATIOS), "models") as shown:
        for name, allocation in runs:
            kept = scores.setdefault(f"{name}, {allocation}", {})
            for ratio in RANK_RATIOS:
                config = CompressionConfig(name, ratio, allocation)
                candidate, report = compress(copy.deepcopy(model), config, statistics, progress=False)
                kept[str(ratio)] = score(candidate)
                parameters.setdefault(str(ratio), report.parameters_after)
                shown.update()
            rows.append(
                {"method": name, "ranks": allocation} | {f"{float(r):.0%}": f"{v:.2f}" for r, v in kept.items()}
            )
    sizes = ", ".join(f"{count / 1e6:.2f}M at {float(ratio):.0%}" for ratio, count in parameters.items())
    return Result(
        f"{task.score} on {task.name} by share of the ranks kept; dense {dense:.2f}",
        rows,
        [
            f"Parameters: {model.num_parameters() / 1e6:.2f}M dense, {sizes}. "
            f"Statistics of {statistics.samples} training samples, seed 0; no fine-tuning."
        ],
        {
            "model": Path(options.model).name,
            "task": task.name,
            "dense": dense,
            "scores": scores,
            "parameters": parameters,
        },
    )


def _statistics(options: Options, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Statistics:
    """What all methods need, in one go."""
    needs = list(dict.fromkeys(need for method in METHODS.values() for need in method.needs))
    loader = calibration_loader(model, tokenizer, get_task(options.task or ""), options.data_dir, SAMPLES)
    return compute_statistics(model, loader, needs)
