"""A model, low-rank or dense → ONNX with free batch and length, checked in ONNX Runtime against the model.

One graph, or of an encoder-decoder two in a folder. Generation with a cache is no fixed graph, and is not exported.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.onnx_runtime import DECODER, DECODER_INPUTS, ENCODER, OnnxModel
from hf_lowrank.folder.reading import load_own, read_config, refuse_quantized
from hf_lowrank.jobs.files import atomic_folder, flush, held, scratch_name
from hf_lowrank.nn.experts_lowrank import UnstackedExperts

TOLERANCE = 1e-3  # of outputs, relative to their norm
EXAMPLE, CHECKED = (2, 12), ((1, 7), (3, 16))  # batch × length: traced, and then tried

Shape = tuple[int, int]


class _Outputs(nn.Module):
    """The model as a function of its token inputs alone, to a tuple of tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # No cache: a graph that answers whole sequences has no use for one.
        self.options = {"use_cache": False} if model.can_generate() else {}

    def example(self, shape: Shape) -> dict[str, Tensor]:
        return example_inputs(self.model.config, shape)

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        outputs = self.model(**dict(zip(_input_names(self.model.config), inputs, strict=True)), **self.options)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(*inputs).values())


class _Encoder(_Outputs):
    """The encoder of an encoder-decoder: to its last hidden state."""

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        encoded = self.model.get_encoder()(**dict(zip(_input_names(self.model.config), inputs, strict=True)))
        return {"last_hidden_state": encoded.last_hidden_state}


class _Decoder(_Outputs):
    """The decoder of an encoder-decoder, of any text before the next token: to the model's first output."""

    def example(self, shape: Shape) -> dict[str, Tensor]:
        given = _Encoder(self.model).example((shape[0], shape[1] + 2))
        with torch.no_grad():
            (states,) = _Encoder(self.model)(*given.values())
        own = example_inputs(self.model.config, shape)["input_ids"]
        return dict(zip(DECODER_INPUTS, (own, states, given["attention_mask"]), strict=True))

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        ids, states, mask = inputs
        encoded = BaseModelOutput(last_hidden_state=states)
        given: Any = {"encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": ids}
        outputs = self.model(**given, **self.options)
        name = "logits" if "logits" in outputs else "last_hidden_state"
        return {name: outputs[name]}


def _input_names(config: Any) -> list[str]:
    """Token ids, mask and, of models that tell a pair's sentences apart, the segments."""
    names = ["input_ids", "attention_mask"]
    return [*names, "token_type_ids"] if (getattr(config, "type_vocab_size", 0) or 0) > 1 else names


def export_onnx(folder: str | Path, output: str | Path) -> float:
    """Write the model in `folder`, low-rank or dense, as ONNX, in float32, and return its largest relative difference.

    Inputs: input_ids, attention_mask and, where the model has segments, token_type_ids, int64 [batch, length], both
    sizes free; outputs: the model's own ("logits", "last_hidden_state", …). The factors stay factors. The file is run
    in ONNX Runtime at shapes other than those it was traced with, with padding, and only put in its place if it
    computes what the model does.

    An encoder-decoder becomes a folder of two graphs, called as other programs look for them: `ENCODER`, from
    input_ids and attention_mask to last_hidden_state, and `DECODER`, from `DECODER_INPUTS` to logits. No cache.

    Args:
        folder: of the model.
        output: a file that ends in .onnx; of an encoder-decoder a folder. It is replaced.

    Raises:
        LowRankError: as `new_output`; the extra "export" is not installed, a model that reads other than tokens,
            factorized experts, a graph beyond one file's 2 GB, or outputs that differ.
    """
    _require_packages()
    with new_output(folder, Path(output)) as path:
        return _written_to(path, folder)


@contextmanager
def new_output(folder: str | Path, output: Path) -> Iterator[Path]:
    """Where to write what becomes `output` if the block ends well: one file, or a folder of two of an encoder-decoder.

    Raises:
        LowRankError: `output` is not named as what the model in `folder` becomes, holds other things, or is held by
            another job; or as `read_config`.
    """
    _check_output(bool(read_config(folder).is_encoder_decoder), folder, output)
    if output.suffix != ".onnx":
        with atomic_folder(output, overwrite=True) as whole:
            yield whole
        return
    with held(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=scratch_name(output).name) as scratch:
        yield Path(scratch) / output.name
        flush(Path(scratch))
        os.replace(Path(scratch) / output.name, output)


def _check_output(two_graphs: bool, folder: str | Path, output: Path) -> None:
    if two_graphs and output.suffix == ".onnx":
        raise LowRankError(
            f"{folder} has an encoder and a decoder, which are two graphs: give a folder for them, such as "
            f"{output.with_suffix('')}"
        )
    if not two_graphs and output.suffix != ".onnx":
        raise LowRankError(f"{output} must end in .onnx")
    if two_graphs and output.is_dir() and {path.name for path in output.iterdir()} - {ENCODER, DECODER}:
        raise LowRankError(f"{output} holds other files than graphs; choose a new folder")


def _written_to(output: Path, folder: str | Path) -> float:
    refuse_quantized(folder)
    model = load_own(folder, torch.float32)
    _refuse_other_graphs(model, folder)
    return max(_written(graph, path) for path, graph in _graphs(model, output).items())


def _refuse_other_graphs(model: PreTrainedModel, folder: str | Path) -> None:
    if model.main_input_name != "input_ids":
        raise LowRankError(f"{type(model).__name__} reads {model.main_input_name}; only models of tokens are exported")
    if any(isinstance(module, UnstackedExperts) for module in model.modules()):
        raise LowRankError(
            f"{type(model).__name__} has experts with layers of their own, and which of them a token reaches is no "
            "fixed graph: densify it, or compress it without its experts"
        )
    if sum(parameter.nbytes for parameter in model.parameters()) > 1.9e9:
        raise LowRankError(f"{folder} is larger than the 2 GB that an ONNX file holds")


def _graphs(model: PreTrainedModel, output: Path) -> dict[Path, _Outputs]:
    """What is written where."""
    if not model.config.is_encoder_decoder:
        return {output: _Outputs(model).eval()}
    model.set_attn_implementation("eager")  # T5's views of what the fused one returns are none that PyTorch exports
    return {output / ENCODER: _Encoder(model).eval(), output / DECODER: _Decoder(model).eval()}


def _written(graph: _Outputs, path: Path) -> float:
    """Write a graph, and return its largest relative difference.

    Raises:
        LowRankError: it computes something else.
    """
    _to_onnx(graph, path)
    difference = max(_difference(graph, path, shape) for shape in CHECKED)
    if not difference <= TOLERANCE:
        raise LowRankError(f"ONNX Runtime computes something else than the model, by {difference:.1e} of its norm")
    return difference


def _to_onnx(graph: _Outputs, path: Path) -> None:
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = graph.example(EXAMPLE)
    with torch.no_grad():
        names = list(graph.named(*example.values()))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of packages that the graph does not need
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, of itself
        torch.onnx.export(
            graph,
            tuple(example.values()),
            path,
            dynamo=True,
            external_data=False,
            input_names=list(example),
            output_names=names,
            dynamic_shapes=((sizes,) * len(example),),
            verbose=False,
        )
    _drop_stale_shapes(path)


def _drop_stale_shapes(path: Path) -> None:
    """Of values within the graph: PyTorch leaves those from before its optimizations; ONNX Runtime infers its own."""
    import onnx

    graph = onnx.load(path)
    del graph.graph.value_info[:]
    onnx.save(graph, path)


def example_inputs(config: Any, shape: Shape) -> dict[str, Tensor]:
    """Random token ids, a mask that leaves out the last token of every sequence but the first, random segments."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.get_text_config().vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    segments = torch.randint(2, shape, generator=generator)
    return dict(zip(_input_names(config), (ids, mask, segments), strict=False))


def _difference(graph: _Outputs, path: Path, shape: Shape) -> float:
    """The largest ‖ONNX Runtime − model‖ / ‖model‖ of the outputs."""
    inputs = graph.example(shape)
    found = OnnxModel(path, graph.model.config)(**inputs).values()
    with torch.no_grad():
        expected = graph(*inputs.values())
    return max(float((output - wanted).norm() / wanted.norm()) for output, wanted in zip(found, expected, strict=True))


def _require_packages() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise LowRankError(f"{error}: ONNX needs more packages: pip install onnx onnxruntime onnxscript") from error
