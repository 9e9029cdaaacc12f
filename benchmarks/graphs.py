"""Graphs of ONNX Runtime, dense and low-rank, in float32 and int8: bytes, scores, and speed in one run.

Rows join those of `bytes`, of which the picture is made.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Result, alternate, ratio, steady_clock
from benchmarks.quantized import MODELS, Study
from hf_lowrank.folder.export import example_inputs, export_onnx
from hf_lowrank.folder.export_int8 import quantize_graph, quantize_onnx
from hf_lowrank.folder.onnx_runtime import OnnxModel, megabytes

BATCH = (32, 128)  # sequences × tokens that are timed
NAMES = [name for name, settings in MODELS.items() if "bytes" not in settings]
EXACT, INT8, PLAIN = "float32, ONNX Runtime", "int8, ONNX Runtime", "int8, ONNX Runtime, inputs as they are"

Key = tuple[str, str]


def run(options: Options) -> Result:
    """The graphs of one seed, all timed in turn."""
    study = Study.begin(options)
    with tempfile.TemporaryDirectory() as scratch:
        paths = {key: path for name in NAMES for key, path in _written(study, name, Path(scratch))}
        measure(study, paths, options.rounds)
    return study.result()


def measure(study: Study, paths: dict[Key, Path], rounds: int) -> None:
    """Note bytes, score and speed of graphs, by model and form; the dense one in float32 is among them."""
    config = study.pipeline.model.config
    graphs = {key: OnnxModel(path, config, threads=1) for key, path in paths.items()}
    inputs = example_inputs(config, BATCH)
    seconds = alternate({key: _call(graph, inputs) for key, graph in graphs.items()}, rounds, clock=steady_clock())
    for (model, form), own in seconds.items():
        speed = ratio(seconds["dense", EXACT], own).values
        if not study.lines.has(model=model, bits=form, seed=study.seed):
            score = study.scored(graphs[model, form])
            study.add(model, form, megabytes(paths[model, form]), score, speed=speed)


def _written(study: Study, name: str, scratch: Path) -> Iterator[tuple[Key, Path]]:
    """A model's graphs."""
    folder = scratch / name
    study.made(name).save_pretrained(folder)
    study.pipeline.reading[0].save_pretrained(folder)
    exact, int8, plain = (folder.with_suffix(f".{form}.onnx") for form in ("exact", "int8", "plain"))
    export_onnx(folder, exact)
    quantize_onnx(exact, int8, study.pipeline.model.config)
    quantize_graph(exact, plain, [])
    yield from {(name, EXACT): exact, (name, INT8): int8, (name, PLAIN): plain}.items()


def _call(graph: OnnxModel, inputs: Any) -> Callable[[], Any]:
    return lambda: graph(**inputs)
