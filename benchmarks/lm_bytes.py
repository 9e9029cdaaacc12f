"""The language model of `lm_train` in few bits, dense, with fewer ranks, within bytes → what that adds to its loss."""

import copy
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.harness import Lines, Options, Result, Row, mean_of
from benchmarks.lm import Study
from benchmarks.lm_train import Recipe, cache_folder
from benchmarks.quantized import CHOSEN, FORMS, STORED_IN, to_few_bits
from hf_lowrank import CompressionConfig, compress
from hf_lowrank.allocation.budget import ImpossibleBudget
from hf_lowrank.compression.stored import with_embeddings
from hf_lowrank.folder.card import weights_bytes

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "60%": {"keep": 0.6},
    "6 MB": {"bytes": "6MB"},
    "5 MB": {"bytes": "5MB"},
    "4.6 MB": {"bytes": "4.6MB"},
    "4 MB": {"bytes": "4MB"},
}


def run(options: Options) -> Result:
    """The forms of one seed that the file has not yet; the table of all its seeds."""
    study = Study(cache_folder(options.cache), Recipe())
    lines = Lines(study.folder / "bytes.jsonl")
    for name in MODELS:
        measure(study, lines, name, options.seed)
    dense = study.dense_figures
    keys = dict.fromkeys((row["model"], row["bits"]) for row in lines.rows())
    return Result(
        f"lm_bytes: a Llama of {study.model.num_parameters():,} parameters after {study.tokens / 1e6:.1f}M tokens of "
        f"Python; dense perplexity {dense['perplexity']:.2f}",
        [_row(*key, [row for row in lines.rows() if (row["model"], row["bits"]) == key]) for key in keys],
        [
            "`kfac`; weights rounded with its moments, what is not rounded in float16. Nats added to the loss on "
            "packages held out, and KL to dense: mean and standard error over calibration seeds."
        ],
        {"dense": dense, "tokens": study.tokens, "rows": lines.rows()},
    )


def measure(study: Study, lines: Lines, name: str, seed: int) -> None:
    """Add the forms of one of `MODELS` that are not known yet."""
    forms = [CHOSEN] if "bytes" in MODELS[name] else FORMS
    missing = [form for form in forms if not lines.has(model=name, bits=form, seed=seed)]
    if not missing:
        return
    try:
        model = _made(study, name, seed)
    except ImpossibleBudget as error:
        print(f"{name} left out: {error}")
        return
    for form in missing:
        megabytes, figures = _stored(study, copy.deepcopy(model), form, seed)
        figures["added"] = figures["loss"] - study.dense_figures["loss"]
        lines.add(model=name, bits=form, seed=seed, megabytes=round(megabytes, 2), **figures)


def _made(study: Study, name: str, seed: int) -> Any:
    """A copy of the model, compressed if its settings say so."""
    model = copy.deepcopy(study.model)
    if not MODELS[name]:
        return model
    config = with_embeddings(model, CompressionConfig(**MODELS[name]))
    rest: dict[str, Any] = {"progress": False, "dtype": STORED_IN, "batches": study.marks(seed)}
    return compress(model, config, study._statistics(config, seed), **rest)[0]


def _stored(study: Study, model: Any, form: str, seed: int) -> tuple[float, dict[str, float]]:
    """The megabytes of a form, and its figures after it was written and loaded again."""
    if form != "float32":
        to_few_bits(model, form, study._statistics(CompressionConfig(), seed))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        return weights_bytes(Path(folder)) / 1e6, study._compared(loaded, study.dense)[0]


def _row(model: str, bits: str, rows: list[dict[str, Any]]) -> Row:
    """The figures of all seeds."""
    said = {"added": 4, "divergence": 4, "perplexity": 2}
    means = {name: mean_of([row[name] for row in rows], digits) for name, digits in said.items()}
    return {"model": model, "bits": bits, "MB": mean_of([row["megabytes"] for row in rows], 1), **means}
