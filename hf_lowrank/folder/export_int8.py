"""A model → an ONNX file whose matrix products take 8-bit weights and activations, by ONNX Runtime's quantizer."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_lowrank.folder.export import example_inputs, export_onnx
from hf_lowrank.folder.onnx_runtime import OnnxModel
from hf_lowrank.folder.reading import read_config
from hf_lowrank.jobs.files import flush, held, scratch_name

COMPARED = (16, 32)  # batch × length of the random tokens for which both graphs are run
Score = Callable[[OnnxModel], float]


@dataclass(frozen=True)
class Int8Export:
    """What rounding to int8 did: outputs for random tokens, and scores where they were asked for.

    `cosine` and `difference` (‖int8 − float32‖ / ‖float32‖) are of all outputs together; `megabytes` are of both files.
    """

    cosine: float
    difference: float
    megabytes: tuple[float, float]
    scores: tuple[float, float] | None


def export_int8(
    folder: str | Path, output: str | Path, reduce_range: bool = False, score: Score | None = None
) -> Int8Export:
    """Write the model in `folder`, low-rank or dense, as ONNX in int8, and say how far it is from the one in float32.

    The float32 graph is that of `export_onnx`, checked as there. Weights get 8 bits with one scale per output channel,
    embeddings 8 bits with one scale, and activations are rounded as they come, with one scale per tensor.

    Args:
        folder: of the model.
        output: the ONNX file to write.
        reduce_range: weights get 7 bits. x86 CPUs without VNNI (before about 2019) add products of 8 bits in 16, which
            may overflow; those with it, and ARM, do not.
        score: what to compute of both graphs, such as a task's score.

    Raises:
        LowRankError: as `export_onnx`.
    """
    output = Path(output)
    with held(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=scratch_name(output).name) as scratch:
        exact, rounded = Path(scratch) / "float32.onnx", Path(scratch) / f"int8{output.suffix}"
        export_onnx(folder, exact)
        quantize_onnx(exact, rounded, reduce_range)
        compared = _compared(folder, exact, rounded, score)
        exact.unlink()
        flush(Path(scratch))
        os.replace(rounded, output)
    return compared


def quantize_onnx(source: Path, target: Path, reduce_range: bool = False) -> None:
    """The graph in `source` in int8 (see `export_int8`), written to `target`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _without_advice():
        quantize_dynamic(source, target, per_channel=True, reduce_range=reduce_range, weight_type=QuantType.QInt8)


@contextmanager
def _without_advice() -> Iterator[None]:
    """ONNX Runtime tells of a preparation for image models by the root logger."""
    root = logging.getLogger()
    disabled = root.disabled
    try:
        root.disabled = True
        yield
    finally:
        root.disabled = disabled


@torch.no_grad()
def _compared(folder: str | Path, exact: Path, rounded: Path, score: Score | None) -> Int8Export:
    config = read_config(folder)
    models = [OnnxModel(path, config) for path in (exact, rounded)]
    inputs = example_inputs(config, COMPARED)
    before, after = (torch.cat([value.flatten() for value in model(**inputs).values()]) for model in models)
    return Int8Export(
        float(torch.nn.functional.cosine_similarity(before, after, dim=0)),
        float((after - before).norm() / before.norm()),
        (exact.stat().st_size / 1e6, rounded.stat().st_size / 1e6),
        None if score is None else (score(models[0]), score(models[1])),
    )
