"""A model, dense and at a fifth of its ranks, in the engines of this machine's CPU → bytes, score and speed of each.

PyTorch runs the model as it is, ONNX Runtime what `export` and `export --int8` write, OpenVINO the same float32 graph
and what NNCF makes of it in 8 bits, with 128 texts to find the ranges of activations. Forms and scores are kept beside
the JSON, so that a run that ended early goes on there; times are taken at the end, of all forms in turn.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from benchmarks.harness import Lines, Options, Result, Row, alternate, ratio, repeats_for
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.card import weights_bytes
from hf_lowrank.folder.export import example_inputs, export_onnx
from hf_lowrank.folder.export_int8 import quantize_onnx
from hf_lowrank.folder.loading import load_trained
from hf_lowrank.folder.onnx_runtime import OnnxModel
from hf_lowrank.pipeline import Pipeline

RANK_RATIO, SAMPLES = 0.2, 1024
MODELS = ("dense", "low rank")
ENGINES = (
    ("PyTorch", "float32"),
    ("ONNX Runtime", "float32"),
    ("ONNX Runtime", "int8"),
    ("OpenVINO", "float32"),
    ("OpenVINO", "int8"),
)
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
    """A model in one engine: its megabytes and score, and what computes it."""

    engine: str
    bits: str
    model: str
    megabytes: float
    score: float
    computed: Any


def run(options: Options) -> Result:
    """The table: every engine, dense and low rank, float32 and int8."""
    if options.model is None or options.task is None:
        raise LowRankError("engines needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    _require_packages()
    settings: Any = {"seed": options.seed, "samples": SAMPLES, "progress": False}
    pipeline = Pipeline.load(options.model, options.task, options.data_dir, **settings)
    name = f"{Path(options.model).name}_engines_{options.seed}"
    (options.output / name).mkdir(parents=True, exist_ok=True)
    lines = Lines(options.output / f"{name}.jsonl")
    forms = [form for model in MODELS for form in forms_of(model, pipeline, options.output / name / model, lines)]
    return result(options, forms, {shape: timed(forms, shape, options.rounds) for shape in SHAPES})


def result(options: Options, forms: list[Form], speeds: dict[Shape, list[str]]) -> Result:
    """What was measured of every form, in its order."""
    rows = [_row(form, {shape: ratios[n] for shape, ratios in speeds.items()}) for n, form in enumerate(forms)]
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


def forms_of(name: str, pipeline: Pipeline, folder: Path, lines: Lines) -> list[Form]:
    """One model in every engine, as far as it is not there yet, each with its score."""
    if not lines.has(model=name):
        small = pipeline.candidate()
        if name != "dense":
            small.compress(rank_ratio=RANK_RATIO)
        small.model.save_pretrained(folder)
    small = copy.copy(pipeline)
    small.model = load_trained(str(folder), pipeline.reading[1]).eval()
    forms = []
    for engine, bits in ENGINES:
        known = {"model": name, "engine": engine, "bits": bits}
        if not lines.has(**known):
            size = _written(engine, bits, folder, small)
            lines.add(**known, megabytes=size, score=score(small, _computed(engine, bits, folder, small)))
        row = next(row for row in lines.rows() if row.items() >= known.items())
        forms.append(Form(**row, computed=_computed(engine, bits, folder, small)))
    return forms


def _written(engine: str, bits: str, folder: Path, pipeline: Pipeline) -> float:
    """Make the files of a form, if it has own ones; their megabytes."""
    if engine == "PyTorch":
        return weights_bytes(folder) / 1e6
    path = _path(engine, bits, folder)
    if engine == "ONNX Runtime" and bits == "float32":
        export_onnx(folder, path)
    elif engine == "ONNX Runtime":
        quantize_onnx(_path(engine, "float32", folder), path, pipeline.model.config)
    elif bits == "int8":
        _in_openvino_int8(_path(engine, "float32", folder), path, pipeline)
        path = path.with_suffix(".bin")
    return path.stat().st_size / 1e6


def _path(engine: str, bits: str, folder: Path) -> Path:
    """Of a form's graph; the one in float32 is both engines'."""
    return folder / ("openvino-int8.xml" if (engine, bits) == ("OpenVINO", "int8") else f"{bits}.onnx")


def _computed(engine: str, bits: str, folder: Path, pipeline: Pipeline) -> Any:
    """What computes a form."""
    if engine == "PyTorch":
        return pipeline.model
    path, config, threads = _path(engine, bits, folder), pipeline.model.config, torch.get_num_threads()
    return (OnnxModel if engine == "ONNX Runtime" else OpenVinoModel)(path, config, threads)


def _in_openvino_int8(source: Path, target: Path, pipeline: Pipeline) -> None:
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
    rounded = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(rounded, target, compress_to_fp16=False)


def score(pipeline: Pipeline, computed: Any) -> float:
    """Of one form on the validation data."""
    graph = copy.copy(pipeline)
    graph.model = computed
    return graph.score()["score"]


@torch.inference_mode()
def timed(forms: list[Form], shape: Shape, rounds: int) -> list[str]:
    """How many times as fast as the first form every one is, in one run, the forms taking turns.

    By the processor time of all threads, which other programs do not stretch, where each has one to compute with.
    """
    inputs = example_inputs(forms[0].computed.config, shape)
    calls: dict[int, Callable[[], Any]] = {n: _call(form.computed, inputs) for n, form in enumerate(forms)}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = alternate(calls, rounds, repeats_for(calls[0], seconds=0.3), clock)
    return [ratio(seconds[0], own).text() for own in seconds.values()]


def _call(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    return lambda: model(**inputs)


def _row(form: Form, speeds: dict[Shape, str]) -> Row:
    row = {"engine": form.engine, "bits": form.bits, "model": form.model, "MB": f"{form.megabytes:.1f}"}
    row |= {"score": f"{form.score:.2f}"}
    return row | {f"speed, {batch} × {length}": speed for (batch, length), speed in speeds.items()}
