"""export --int8: a graph that ONNX Runtime quantized, near the one in float32, of compressed and dense models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_lowrank.folder.export import example_inputs, export_onnx
from hf_lowrank.folder.export_int8 import export_int8, quantize_graph, quantize_onnx
from hf_lowrank.folder.onnx_runtime import OnnxModel
from hf_lowrank.folder.reading import read_config
from tests.helpers import RANK, factorize, outputs, tiny_bert, token_ids

onnx = pytest.importorskip("onnx")
quantization = pytest.importorskip("onnxruntime.quantization")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.slow  # an export takes seconds

MAKES = {"dense": tiny_bert, "low-rank": lambda: factorize(tiny_bert())}


@pytest.fixture(params=MAKES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make: Callable[[], Any] = MAKES[request.param]
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights_of(path: Path) -> list[Any]:
    graph = onnx.load(path).graph
    matrices = {node.input[1] for node in graph.node if node.op_type == "MatMulInteger"}
    return [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in matrices]


def test_the_exported_graph_passes_the_quantizer_as_it_is(folder: Path, tmp_path: Path) -> None:
    export_onnx(folder, tmp_path / "model.onnx")
    quantization.quantize_dynamic(tmp_path / "model.onnx", tmp_path / "int8.onnx", per_channel=True)
    assert (tmp_path / "int8.onnx").stat().st_size < (tmp_path / "model.onnx").stat().st_size


def test_all_matrices_get_8_bits_and_the_outputs_stay_near(folder: Path, tmp_path: Path) -> None:
    told = export_int8(folder, tmp_path / "out" / "int8.onnx", score=lambda model: len(model.outputs))
    weights = weights_of(tmp_path / "out" / "int8.onnx")
    low_rank = any(RANK in weight.shape for weight in weights)
    assert len(weights) == (24 if low_rank else 12) + 2  # 12 layers, and pooler and classifier
    assert {weight.dtype for weight in weights} == {np.dtype("int8")}
    assert told.cosine > 0.99
    assert 0 < told.difference < 0.1
    assert told.megabytes[1] == (tmp_path / "out" / "int8.onnx").stat().st_size / 1e6 < told.megabytes[0]
    assert told.scores == (1, 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["int8.onnx"]


def test_outliers_of_hidden_states_cost_little(tmp_path: Path) -> None:
    model = factorize(tiny_bert())
    for name, weight in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            weight.data[3] *= 40
    model.save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    config = read_config(tmp_path / "model")
    inputs = example_inputs(config, (8, 32))
    exact = OnnxModel(tmp_path / "model.onnx", config)(**inputs).logits
    quantize_graph(tmp_path / "model.onnx", tmp_path / "plain.onnx", [])
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "even.onnx", config)
    plain, even = (
        float((OnnxModel(tmp_path / name, config)(**inputs).logits - exact).norm())
        for name in ("plain.onnx", "even.onnx")
    )
    assert even < plain / 2


def test_seven_bits_for_processors_whose_sums_overflow(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "model")
    largest = {}
    for reduce_range in (False, True):
        export_int8(tmp_path / "model", tmp_path / "int8.onnx", reduce_range=reduce_range)
        largest[reduce_range] = max(
            int(np.abs(weight.astype(int)).max()) for weight in weights_of(tmp_path / "int8.onnx")
        )
    assert largest[True] <= 64 < largest[False] <= 128


def test_the_graph_is_called_as_the_model_is(tmp_path: Path) -> None:
    model = factorize(tiny_bert())
    model.save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    found = OnnxModel(tmp_path / "model.onnx", model.config, threads=1)(
        input_ids=token_ids(), attention_mask=torch.ones_like(token_ids()), labels=torch.zeros(3)
    )
    torch.testing.assert_close(found.logits, outputs(model), rtol=1e-4, atol=1e-5)
