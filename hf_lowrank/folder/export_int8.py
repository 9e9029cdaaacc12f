"""A model → ONNX whose matrix products take 8-bit weights and activations, by ONNX Runtime's quantizer."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.export import example_inputs, export_onnx, new_output
from hf_lowrank.folder.onnx_runtime import DECODER, DECODER_INPUTS, ENCODER, OnnxModel, megabytes, open_onnx
from hf_lowrank.folder.onnx_scales import Batch, even_channels
from hf_lowrank.folder.reading import read_config
from hf_lowrank.jobs.files import scratch_name

COMPARED = (16, 32)  # batch × length of the random tokens that channels are measured, and both graphs compared, on
Score = Callable[[Any], float]  # of a module that ONNX Runtime computes


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
    embeddings 8 bits with one scale, and activations are rounded as they come, with one scale per tensor, for which
    their channels are brought to like ranges where that saves much (see `even_channels`).

    Args:
        folder: of the model.
        output: the ONNX file to write, or of an encoder-decoder the folder.
        reduce_range: weights get 7 bits. x86 CPUs without VNNI (before about 2019) add products of 8 bits in 16, which
            may overflow; those with it, and ARM, do not, nor do those where `EXACT_SUMS` is set in ONNX Runtime.
        score: what to compute of both graphs, such as a task's score.

    Raises:
        LowRankError: as `export_onnx`; a score of an encoder-decoder.
    """
    if score is not None and read_config(folder).is_encoder_decoder:
        raise LowRankError("an encoder-decoder is scored by what it generates, which graphs without a cache do not")
    output = Path(output)
    with new_output(folder, output) as rounded:
        exact = rounded.with_name(f"exact-{output.name}")
        export_onnx(folder, exact)
        quantize_onnx(exact, rounded, read_config(folder), reduce_range)
        compared = _compared(folder, exact, rounded, score)
        _remove(exact)
    return compared


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def quantize_onnx(source: Path, target: Path, config: Any, reduce_range: bool = False) -> None:
    """What `export_onnx` wrote to `source` in int8 (see `export_int8`), written to `target`; a folder of two exists.

    Args:
        source: in float32.
        target: to write.
        config: of the model.
        reduce_range: see `export_int8`.
    """
    for graph, inputs in _examples(source, config).items():
        quantize_graph(graph, target / graph.name if target.is_dir() else target, [inputs], reduce_range)


def quantize_graph(source: Path, target: Path, batches: Sequence[Batch], reduce_range: bool = False) -> None:
    """One graph in int8.

    Args:
        source: in float32.
        target: to write.
        batches: of the graph's inputs, on which channels are measured; none to leave them as they are.
        reduce_range: see `export_int8`.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=scratch_name(target).name) as scratch, _without_advice():
        even = Path(scratch) / source.name
        even_channels(source, even, batches)
        quantize_dynamic(even, target, per_channel=True, reduce_range=reduce_range, weight_type=QuantType.QInt8)


def _examples(path: Path, config: Any) -> dict[Path, Batch]:
    """Inputs of each graph in `path`: random tokens, and for a decoder what the encoder says of them."""
    given = example_inputs(config, COMPARED)
    if not path.is_dir():
        return {path: _arrays(given)}
    (states,) = OnnxModel(path / ENCODER, config)(**given).values()
    values = (given["input_ids"], states, given["attention_mask"])
    return {
        path / ENCODER: _arrays(given),
        path / DECODER: _arrays(dict(zip(DECODER_INPUTS, values, strict=True))),
    }


def _arrays(given: dict[str, torch.Tensor]) -> Batch:
    return {name: value.numpy() for name, value in given.items()}


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
    models = [open_onnx(path, config) for path in (exact, rounded)]
    inputs = example_inputs(config, COMPARED)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    before, after = (torch.cat([value.flatten() for value in model(**inputs).values()]) for model in models)
    return Int8Export(
        float(torch.nn.functional.cosine_similarity(before, after, dim=0)),
        float((after - before).norm() / before.norm()),
        (megabytes(exact), megabytes(rounded)),
        None if score is None else (score(models[0]), score(models[1])),
    )
