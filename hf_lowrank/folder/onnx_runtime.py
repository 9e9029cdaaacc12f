"""An ONNX file → a module that ONNX Runtime computes, for what else takes a model: `evaluate`, timing."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput


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
