"""ONNX files → a module that ONNX Runtime computes, for what else takes a model: `evaluate`, timing."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

# Of an encoder-decoder, named as Transformers.js and optimum look for them.
ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"
DECODER_INPUTS = ("input_ids", "encoder_hidden_states", "encoder_attention_mask")

# x86 CPUs without VNNI add two products of 8 bits in 16, which overflows, unless they are told to take slower, exact
# kernels; other CPUs take no notice.
EXACT_SUMS = "session.x64quantprecision"


def open_onnx(path: str | Path, config: Any, threads: int | None = None) -> "OnnxModel | OnnxEncoderDecoder":
    """What `export_onnx` or `export_int8` wrote, a file or a folder of two, as a module. Arguments: as `OnnxModel`."""
    return (OnnxEncoderDecoder if Path(path).is_dir() else OnnxModel)(path, config, threads)


def graphs_in(path: Path) -> list[Path]:
    """The file, or those of a folder, that `export_onnx` or `export_int8` wrote."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def megabytes(path: Path) -> float:
    """Of all `graphs_in` it."""
    return sum(graph.stat().st_size for graph in graphs_in(path)) / 1e6


class OnnxModel(nn.Module):
    """The graph in `path`, on the CPU, called as the model is that it was made of.

    Args:
        path: an ONNX file that `export_onnx` or `export_int8` wrote.
        config: that of the model.
        threads: of ONNX Runtime; None for all.
    """

    def __init__(self, path: str | Path, config: Any, threads: int | None = None) -> None:
        super().__init__()
        import onnxruntime  # here: an extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry(EXACT_SUMS, "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.config = config
        self.inputs = [known.name for known in self.session.get_inputs()]
        self.outputs = [known.name for known in self.session.get_outputs()]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, **inputs: Tensor) -> ModelOutput:
        """The model's outputs by name. Inputs that the graph lacks are left out; segments are zeros unless given."""
        given = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), **inputs}
        found = self.session.run(None, {name: given[name].numpy() for name in self.inputs})
        return ModelOutput(zip(self.outputs, map(torch.from_numpy, found), strict=True))


class OnnxEncoderDecoder(nn.Module):
    """The two graphs in a folder, on the CPU, called as the encoder-decoder is that they were made of."""

    def __init__(self, path: str | Path, config: Any, threads: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = OnnxModel(Path(path) / ENCODER, config, threads)
        self.decoder = OnnxModel(Path(path) / DECODER, config, threads)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> ModelOutput:
        """The decoder's output, by its name, for token ids [batch, length] of both sides."""
        (states,) = self.encoder(input_ids=input_ids, attention_mask=attention_mask).values()
        return self.decoder(**dict(zip(DECODER_INPUTS, (decoder_input_ids, states, attention_mask), strict=True)))
