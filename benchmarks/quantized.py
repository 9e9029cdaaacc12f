"""Low rank and few bits together: score against bytes, and against time, of a model's dense and compressed forms.

Each model is written in four ways: float32 and int8 as ONNX, 8 and 4 bits as folders of compressed-tensors.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from benchmarks.harness import Options, Result, Row, alternate, ratio
from hf_lowrank import CompressionConfig, compress
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.card import weights_bytes
from hf_lowrank.folder.export import example_inputs, export_onnx
from hf_lowrank.folder.export_int8 import quantize_onnx
from hf_lowrank.folder.loading import load_model
from hf_lowrank.folder.onnx_runtime import OnnxModel
from hf_lowrank.folder.quantize import quantize_, quantize_folder
from hf_lowrank.folder.quantizers import Quantization
from hf_lowrank.folder.style import BLACK, BLUE, GREEN, PURPLE, VERMILLION, new_figure, save_png, styled
from hf_lowrank.model.targets import find_targets
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.training.evaluate import evaluate_splits

BATCH = (32, 128)  # sequences × tokens that are timed
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "33%": {"rank_ratio": 0.33},
    "20%": {"rank_ratio": 0.2},
    "10%": {"rank_ratio": 0.1},
    "45% of all, embeddings too": {"keep_model": 0.45},
    "30% of all, embeddings too": {"keep_model": 0.3},
    "12 MB": {"bytes": "12MB"},
    "9 MB": {"bytes": "9MB"},
    "6 MB": {"bytes": "6MB"},
    "4 MB": {"bytes": "4MB"},
}
CHOSEN = "chosen by layer"
LOOKS = {
    CHOSEN: (PURPLE, "*"),
    "float32": (BLACK, "o"),
    "int8": (BLUE, "s"),
    "int4": (VERMILLION, "^"),
    "int8, ONNX Runtime": (GREEN, "D"),
}


@dataclass(frozen=True)
class Form:
    """A model written in one way: its megabytes, its score, and its graph where it is timed."""

    model: str
    bits: str
    megabytes: float
    score: float
    graph: OnnxModel | None = None


def run(options: Options) -> Result:
    """The table, and its picture beside the JSON."""
    if options.model is None or options.task is None:
        raise LowRankError("bytes needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
    pipeline = Pipeline.load(options.model, options.task, options.data_dir, seed=options.seed, progress=False)
    with tempfile.TemporaryDirectory() as scratch:
        forms = [form for name in MODELS for form in forms_of(name, pipeline, Path(scratch))]
        speed = _speeds(forms, options.rounds)
    rows = [_row(form, speed.get((form.model, form.bits), "")) for form in forms]
    name = f"{Path(options.model).name}_bytes.png"
    options.output.mkdir(parents=True, exist_ok=True)
    save_png(bytes_figure(forms), options.output / name)
    return Result(
        f"{pipeline.task.score if pipeline.task else ''} of {Path(options.model).name} by bytes and bits",
        rows,
        [
            "No fine-tuning, whole validation set. float32 and int8 by ONNX Runtime, one graph with everything in it; "
            "int8 and int4 are folders of weights, computed in float32 after widening, what is not quantized in "
            f"float16. Speed: ONNX Runtime, one thread, {BATCH[0]} × {BATCH[1]} tokens, against dense float32."
        ],
        {"model": Path(options.model).name, "rows": rows, "seed": options.seed},
    )


def forms_of(name: str, pipeline: Pipeline, scratch: Path) -> Iterator[Form]:
    """The four forms of one of `MODELS`, or the one that a budget in bytes gives it."""
    folder, model = scratch / name.split(",")[0].replace(" ", "-"), _made(name, pipeline)
    assert pipeline.tokenizer is not None
    pipeline.tokenizer.save_pretrained(folder)
    if "bytes" in MODELS[name]:
        quantize_(model, Quantization(), model.compression_report.bits)
        model.save_pretrained(folder)
        yield _stored(name, CHOSEN, folder, pipeline)
        return
    model.save_pretrained(folder)
    exact, rounded = folder.with_suffix(".f32.onnx"), folder.with_suffix(".int8.onnx")
    export_onnx(folder, exact)
    quantize_onnx(exact, rounded)
    for bits, path in (("float32", exact), ("int8, ONNX Runtime", rounded)):
        graph: Any = OnnxModel(path, pipeline.model.config, threads=1)
        yield Form(name, bits, path.stat().st_size / 1e6, _score(pipeline, graph), graph)
    for bits in (8, 4):
        embeddings = 8 if name == "dense" else bits
        stored = folder.with_suffix(f".{bits}")
        quantize_folder(folder, stored, Quantization(bits, embedding_bits=embeddings, dtype="float16"))
        yield _stored(name, f"int{bits}", stored, pipeline)


def _stored(name: str, bits: str, folder: Path, pipeline: Pipeline) -> Form:
    assert pipeline.task is not None
    model, _ = load_model(str(folder), pipeline.task)
    return Form(name, bits, weights_bytes(folder) / 1e6, _score(pipeline, model))


def _made(name: str, pipeline: Pipeline) -> Any:
    """The model itself, or a copy compressed; the statistics of all layers are measured once."""
    if not MODELS[name]:
        return pipeline.model
    blocks, embedding = (*find_targets(pipeline.model),), _input_embedding(pipeline.model)
    if "measured" not in pipeline.facts:
        needs = CompressionConfig(keep_model=0.5).needs
        pipeline.facts["measured"] = pipeline.measure(needs, include=(*blocks, embedding))
    chosen = blocks if "rank_ratio" in MODELS[name] else (*blocks, embedding)
    config = CompressionConfig(include=chosen, **MODELS[name])
    return compress(copy.deepcopy(pipeline.model), config, pipeline.facts["measured"], progress=False)[0]


def _input_embedding(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())


def _score(pipeline: Pipeline, model: Any) -> float:
    return evaluate_splits(model, *pipeline.reading, pipeline.validation, progress=False)["score"]


def _speeds(forms: list[Form], rounds: int) -> dict[tuple[str, str], str]:
    """How many times as fast as the dense model in float32, in one run, the graphs taking turns."""
    graphs = {(form.model, form.bits): form.graph for form in forms if form.graph is not None}
    inputs = example_inputs(next(iter(graphs.values())).config, BATCH)
    calls: dict[Any, Callable[[], Any]] = {key: _call(graph, inputs) for key, graph in graphs.items()}
    seconds = alternate(calls, rounds)
    return {key: ratio(seconds["dense", "float32"], own).text() for key, own in seconds.items()}


def _call(graph: OnnxModel, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    return lambda: graph(**inputs)


def _row(form: Form, speed: str) -> Row:
    return {
        "model": form.model,
        "bits": form.bits,
        "MB": f"{form.megabytes:.1f}",
        "score": f"{form.score:.2f}",
        "speed": speed,
    }


@styled
def bytes_figure(forms: list[Form]) -> Figure:
    """Score against megabytes, one mark for each form; the dense model's are hollow."""
    figure = new_figure()
    axes = figure.subplots()
    for bits, (color, marker) in LOOKS.items():
        for dense in (True, False):
            of = sorted((f.megabytes, f.score) for f in forms if f.bits == bits and (f.model == "dense") == dense)
            look = {"color": color, "marker": marker, "linestyle": "none" if dense else "-"}
            face = {"markerfacecolor": "none"} if dense else {"label": f"low rank, {bits}"}
            if of:
                axes.plot(*zip(*of, strict=True), **look, **face)
    axes.set_xscale("log")
    axes.set_xticks([5, 10, 20, 40, 80], ["5", "10", "20", "40", "80"])
    axes.minorticks_off()
    axes.set_xlabel("megabytes of weights (hollow: the dense model)")
    axes.set_ylabel("score")
    axes.legend()
    return figure
