"""Channels of like ranges: the same function in float32, and nearer to it in int8."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_lowrank.folder.export_int8 import quantize_graph
from hf_lowrank.folder.onnx_runtime import OnnxModel
from hf_lowrank.folder.onnx_scales import Batch, even_channels, rounded

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TOKENS, CHANNELS, OUT = 64, 32, 16


def graph_of(nodes: list[Any], weights: dict[str, Any], path: Path) -> Path:
    """A graph from x [tokens, CHANNELS] to y [tokens, OUT]."""
    helper = onnx.helper
    shapes = {"x": CHANNELS, "y": OUT}
    inputs, outputs = ([helper.make_tensor_value_info(name, 1, ["tokens", shapes[name]])] for name in "xy")
    tensors = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    named = [helper.make_node(op, ins, outs, name=f"{op}-{place}") for place, (op, ins, outs) in enumerate(nodes)]
    opset = [helper.make_opsetid("", 18)]
    onnx.save(
        helper.make_model(helper.make_graph(named, "g", inputs, outputs, tensors), opset_imports=opset, ir_version=10),
        path,
    )
    return path


def inputs(outlier: float) -> list[Batch]:
    """Two batches whose channel 3 is `outlier` times as large as the others."""
    scales = np.where(np.arange(CHANNELS) == 3, outlier, 1.0)
    return [
        {"x": (np.random.default_rng(seed).normal(size=(TOKENS, CHANNELS)) * scales).astype(np.float32)}
        for seed in (0, 1)
    ]


def weight(seed: int, rows: int = CHANNELS) -> Any:
    return np.random.default_rng(seed).normal(size=(rows, OUT))


def outputs(path: Path, batch: Batch) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, batch)[0]


def divisions(path: Path) -> int:
    return sum(node.op_type == "Mul" and node.name.endswith(".divided") for node in onnx.load(path).graph.node)


TWO = [("MatMul", ["x", "a"], ["p"]), ("Gemm", ["x", "b"], ["q"]), ("Add", ["p", "q"], ["y"])]


def test_the_graph_computes_the_same_and_its_int8_is_much_nearer(tmp_path: Path) -> None:
    source = graph_of(TWO, {"a": weight(2), "b": weight(3)}, tmp_path / "source.onnx")
    batches = inputs(outlier=60)
    assert even_channels(source, tmp_path / "even.onnx", batches) == 1  # one division for both products
    assert divisions(tmp_path / "even.onnx") == 1
    exact = outputs(source, batches[1])
    np.testing.assert_allclose(outputs(tmp_path / "even.onnx", batches[1]), exact, rtol=1e-4, atol=1e-3)
    errors = []
    for given in ((), batches[:1]):
        quantize_graph(source, tmp_path / "int8.onnx", given)
        errors.append(np.linalg.norm(outputs(tmp_path / "int8.onnx", batches[1]) - exact))
    assert errors[1] < errors[0] / 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["even.onnx", "int8.onnx", "source.onnx"]


def test_channels_that_are_alike_are_left(tmp_path: Path) -> None:
    source = graph_of(TWO, {"a": weight(2), "b": weight(3)}, tmp_path / "source.onnx")
    assert even_channels(source, tmp_path / "even.onnx", inputs(outlier=1)) == 0
    assert even_channels(source, tmp_path / "even.onnx", []) == 0
    assert divisions(tmp_path / "even.onnx") == 0


def test_weights_that_are_used_elsewhere_too_stay_once(tmp_path: Path) -> None:
    nodes = [("MatMul", ["x", "a"], ["p"]), ("Abs", ["x"], ["z"]), ("MatMul", ["z", "a"], ["q"]), TWO[2]]
    source = graph_of(nodes, {"a": weight(2)}, tmp_path / "source.onnx")
    assert even_channels(source, tmp_path / "even.onnx", inputs(outlier=60)) == 0
    assert [tensor.name for tensor in onnx.load(tmp_path / "even.onnx").graph.initializer] == ["a"]


@pytest.mark.parametrize("empty", [CHANNELS - 2, CHANNELS])
def test_channels_of_nothing_do_no_harm(empty: int, tmp_path: Path) -> None:
    source = graph_of(TWO, {"a": weight(2), "b": weight(3)}, tmp_path / "source.onnx")
    batches = inputs(outlier=60)
    for batch in batches:
        batch["x"][:, CHANNELS - empty :] = 0
    even_channels(source, tmp_path / "even.onnx", batches)
    given = inputs(outlier=1)[0]
    np.testing.assert_allclose(outputs(tmp_path / "even.onnx", given), outputs(source, given), rtol=1e-4, atol=1e-3)


def test_activations_are_rounded_as_onnx_runtime_does(tmp_path: Path) -> None:
    helper, x = onnx.helper, inputs(outlier=5)[0]["x"]
    nodes = [
        ("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        ("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    source = graph_of(nodes, {}, tmp_path / "rounding.onnx")
    model = onnx.load(source)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, ["tokens", CHANNELS]))
    onnx.save(model, source)
    np.testing.assert_allclose(rounded(x), outputs(source, {"x": x}), rtol=1e-5, atol=1e-5)


def test_sums_are_exact_on_processors_that_would_overflow(tmp_path: Path) -> None:
    source = graph_of(TWO, {"a": weight(2), "b": weight(3)}, tmp_path / "source.onnx")
    options = OnnxModel(source, config=None).session.get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
