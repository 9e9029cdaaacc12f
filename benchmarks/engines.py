"""A model, dense and at a fifth of its ranks, in the engines of this machine's CPU → bytes, score and speed of each.

PyTorch runs the model as it is, ONNX Runtime what `export` and `export --int8` write, OpenVINO the same float32 graph
and what NNCF makes of it in 8 bits, with 128 texts to find the ranges of activations.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from benchmarks.harness import Options, Result, Row, alternate, ratio, repeats_for
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.card import weights_bytes
from hf_lowrank.folder.export import example_inputs, export_onnx
from hf_lowrank.folder.export_int8 import quantize_onnx
from hf_lowrank.folder.onnx_runtime import OnnxModel
from hf_lowrank.pipeline import Pipeline

RANK_RATIO = 0.2
SHAPES = ((1, 16), (32, 128))  # sequences × tokens that are timed
Shape = tuple[int, int]
CALIBRATED = 8  # batches of 16 texts, for OpenVINO's int8


class OpenVinoModel(nn.Module):
    """The graph in `path`, an ONNX file or OpenVINO's own, called as the model is that it was made of."""

    def __init__(self, path: Path, config: Any, threads: int) -> None:
        super().__init__()
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = openvino.Core().compile_model(path, "CPU", settings)
        self.config, self.device = config, torch.device("cpu")
        self.inputs = [known.any_name for known in self.compiled.inputs]
        self.outputs = [known.any_name for known in self.compiled.outputs]

    def forward(self, **inputs: Tensor) -> ModelOutput:
        given = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), **inputs}
        found = self.compiled({name: given[name].numpy() for name in self.inputs})
        return ModelOutput({name: torch.from_numpy(found[name].copy()) for name in self.outputs})


@dataclass(frozen=True)
class Form:
    """A model in one engine: its megabytes, and what computes it."""

    engine: str
    bits: str
    model: str
    megabytes: float
    computed: Any


def run(options: Options) -> Result:
    """The table: every engine, dense and low rank, float32 and int8."""
    if options.model is None or options.task is None:
        raise LowRankError("engines needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    _require_packages()
    pipeline = Pipeline.load(options.model, options.task, options.data_dir, seed=options.seed, progress=False)
    with tempfile.TemporaryDirectory() as scratch:
        forms = list(all_forms(pipeline, Path(scratch), options.threads))
        scores = [score(pipeline, form) for form in forms]
        speeds = {shape: timed(forms, shape, options.rounds) for shape in SHAPES}
    return result(options, forms, scores, speeds)


def result(options: Options, forms: list[Form], scores: list[float], speeds: dict[Shape, list[str]]) -> Result:
    """What was measured of every form, in its order."""
    by_form = ({shape: ratios[n] for shape, ratios in speeds.items()} for n in range(len(forms)))
    rows = [_row(*measured) for measured in zip(forms, scores, by_form, strict=True)]
    name = Path(options.model or "").name
    return Result(
        f"Engines: {name}, dense and at {RANK_RATIO:.0%} of the ranks",
        rows,
        [
            f"{options.threads} thread(s). Speed: against PyTorch's dense float32 model in the same round, median "
            "(min–max). int8 of ONNX Runtime rounds activations as they come, that of OpenVINO by ranges found "
            f"beforehand on {16 * CALIBRATED} training texts without labels."
        ],
        {"model": name, "rows": rows, "seed": options.seed},
    )


def _require_packages() -> None:
    try:
        import nncf  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        raise LowRankError(f"{error}: pip install openvino nncf") from error


def all_forms(pipeline: Pipeline, scratch: Path, threads: int) -> Iterator[Form]:
    """Both models in every engine."""
    dense = pipeline.candidate()
    small = pipeline.candidate()
    small.compress(rank_ratio=RANK_RATIO)
    for name, made in (("dense", dense), ("low rank", small)):
        yield from forms_of(name, made, scratch / name, threads)


def forms_of(name: str, pipeline: Pipeline, folder: Path, threads: int) -> Iterator[Form]:
    """One model in every engine."""
    config = pipeline.model.config
    pipeline.model.save_pretrained(folder)
    yield Form("PyTorch", "float32", name, weights_bytes(folder) / 1e6, pipeline.model.eval())
    exact, rounded, ranged = (folder / f"{kind}.onnx" for kind in ("float32", "int8", "ranged"))
    export_onnx(folder, exact)
    quantize_onnx(exact, rounded, config)
    for bits, path in (("float32", exact), ("int8", rounded)):
        yield Form("ONNX Runtime", bits, name, path.stat().st_size / 1e6, OnnxModel(path, config, threads))
    yield Form("OpenVINO", "float32", name, exact.stat().st_size / 1e6, OpenVinoModel(exact, config, threads))
    stored = _in_openvino_int8(exact, ranged.with_suffix(".xml"), pipeline)
    size = stored.with_suffix(".bin").stat().st_size / 1e6
    yield Form("OpenVINO", "int8", name, size, OpenVinoModel(stored, config, threads))


def _in_openvino_int8(source: Path, target: Path, pipeline: Pipeline) -> Path:
    """NNCF's 8 bits of weights and activations."""
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    names = [known.any_name for known in model.inputs]
    texts = islice(pipeline.rows(16 * CALIBRATED, "model"), CALIBRATED)

    def inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
        given = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
        return {name: given[name].numpy() for name in names}

    data = nncf.Dataset(list(texts), inputs)
    openvino.save_model(
        nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER), target, compress_to_fp16=False
    )
    return target


def score(pipeline: Pipeline, form: Form) -> float:
    """Of one form on the validation data."""
    graph = copy.copy(pipeline)
    graph.model = form.computed
    return graph.score()["score"]


@torch.inference_mode()
def timed(forms: list[Form], shape: Shape, rounds: int) -> list[str]:
    """How many times as fast as the first form every one is, in one run, the forms taking turns."""
    inputs = example_inputs(forms[0].computed.config, shape)
    calls: dict[int, Callable[[], Any]] = {n: _call(form.computed, inputs) for n, form in enumerate(forms)}
    seconds = alternate(calls, rounds, repeats_for(calls[0], seconds=0.3))
    return [ratio(seconds[0], own).text() for own in seconds.values()]


def _call(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    return lambda: model(**inputs)


def _row(form: Form, score: float, speeds: dict[Shape, str]) -> Row:
    row = {"engine": form.engine, "bits": form.bits, "model": form.model, "MB": f"{form.megabytes:.1f}"}
    row |= {"score": f"{score:.2f}"}
    return row | {f"speed, {batch} × {length}": speed for (batch, length), speed in speeds.items()}
