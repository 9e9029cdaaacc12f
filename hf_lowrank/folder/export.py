"""A model, low-rank or dense → an ONNX file with free batch and length, checked in ONNX Runtime against the model."""

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.onnx_runtime import OnnxModel
from hf_lowrank.folder.reading import load_own, refuse_quantized
from hf_lowrank.jobs.files import flush, held, scratch_name
from hf_lowrank.nn.experts_lowrank import UnstackedExperts

TOLERANCE = 1e-3  # of outputs, relative to their norm
EXAMPLE, CHECKED = (2, 12), ((1, 7), (3, 16))  # batch × length: traced, and then tried


class _Outputs(nn.Module):
    """The model as a function of its token inputs alone (see `_input_names`), to a tuple of tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.names = _input_names(model.config)

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        # No cache: a graph that answers whole sequences has no use for one.
        options = {"use_cache": False} if self.model.can_generate() else {}
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)), **options)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(*inputs).values())


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

    Raises:
        LowRankError: the extra "export" is not installed, an encoder-decoder, factorized experts, a graph beyond one
            file's 2 GB, or outputs that differ.
    """
    _require_packages()
    output = Path(output)
    if output.suffix != ".onnx":
        raise LowRankError(f"{output} must end in .onnx")
    with held(output):
        return _exported(folder, output)


def _exported(folder: str | Path, output: Path) -> float:
    refuse_quantized(folder)
    model = load_own(folder, torch.float32)
    if model.config.is_encoder_decoder:
        raise LowRankError(
            f"{type(model).__name__} has an encoder and a decoder, which are two graphs: densify it "
            "and export it with optimum"
        )
    if any(isinstance(module, UnstackedExperts) for module in model.modules()):
        raise LowRankError(
            f"{type(model).__name__} has experts with layers of their own, and which of them a token reaches is no "
            "fixed graph: densify it, or compress it without its experts"
        )
    if sum(parameter.nbytes for parameter in model.parameters()) > 1.9e9:
        raise LowRankError(f"{folder} is larger than the 2 GB that an ONNX file holds")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=scratch_name(output).name) as scratch:
        written = Path(scratch) / output.name
        _to_onnx(model, written)
        difference = max(_difference(model, written, shape) for shape in CHECKED)
        if not difference <= TOLERANCE:
            raise LowRankError(f"ONNX Runtime computes something else than the model, by {difference:.1e} of its norm")
        flush(Path(scratch))
        os.replace(written, output)
    return difference


def _to_onnx(model: PreTrainedModel, path: Path) -> None:
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    wrapped, example = _Outputs(model).eval(), tuple(example_inputs(model.config, EXAMPLE).values())
    with torch.no_grad():
        names = list(wrapped.named(*example))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of packages that the graph does not need
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, of itself
        torch.onnx.export(
            wrapped,
            example,
            path,
            dynamo=True,
            external_data=False,
            input_names=wrapped.names,
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


def example_inputs(config: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Random token ids, a mask that leaves out the last token of every sequence but the first, random segments."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.get_text_config().vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, -1] = 0
    segments = torch.randint(2, shape, generator=generator)
    return dict(zip(_input_names(config), (ids, mask, segments), strict=False))


def _difference(model: PreTrainedModel, path: Path, shape: tuple[int, int]) -> float:
    """The largest ‖ONNX Runtime − model‖ / ‖model‖ of the outputs."""
    inputs = example_inputs(model.config, shape)
    found = OnnxModel(path, model.config)(**inputs).values()
    with torch.no_grad():
        expected = _Outputs(model)(*inputs.values())
    return max(float((output - wanted).norm() / wanted.norm()) for output, wanted in zip(found, expected, strict=True))


def _require_packages() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise LowRankError(f"{error}: ONNX needs more packages: pip install onnx onnxruntime onnxscript") from error
