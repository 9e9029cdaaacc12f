"""An ONNX graph and inputs → the same function, with channels of like ranges where products lose most by rounding.

ONNX Runtime rounds the input x of a matrix product in 8 bits between its least and its largest value, so that a few
channels of large values leave little of the others. x W = (x / s) (s W) for any scales s of the channels, and the
columns of s W, each rounded by a scale of its own, bear it. Dividing by a power of the ranges is SmoothQuant (Xiao et
al., 2023); the power that loses least is searched as by AWQ (Lin et al., 2024).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = Any  # of numpy
Batch = dict[str, Array]

EXPONENTS = (0.25, 0.5, 0.75, 1.0)  # that are tried, of the ranges of channels above the median one

# By how much of their own size the products must come nearer for a division to be worth its time.
WORTH = 0.005

TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Site:
    """An activation and the products with weights that it goes into.

    Args:
        name: of the activation in the graph.
        nodes: the products.
        weights: [n, out], of all products side by side.
        inputs: values of the activation [tokens, n], of several batches.
    """

    name: str
    nodes: list[Any]
    weights: Array
    inputs: list[Array]

    def scales(self) -> Array | None:
        """Those of the channels [n] by which products lose least; None where dividing is not worth it."""
        exact = [x @ self.weights for x in self.inputs]
        peaks = np.max([np.abs(x).max(axis=0) for x in self.inputs], axis=0)
        if not peaks.any():
            return None
        above = np.maximum(peaks / np.median(peaks[peaks > 0]), 1)
        lost = {exponent: self._lost(above**exponent, exact) for exponent in (0.0, *EXPONENTS)}
        best = min(lost, key=lost.__getitem__)
        return above**best if lost[0.0] - lost[best] > WORTH else None

    def _lost(self, scales: Array, exact: list[Array]) -> float:
        """‖rounded - exact‖ / ‖exact - mean‖ of the products."""
        weights = rounded_weights(self.weights * scales[:, None])
        products = np.concatenate([rounded(x / scales) @ weights for x in self.inputs])
        wanted = np.concatenate(exact)
        size = np.linalg.norm(wanted - wanted.mean(axis=0))
        return float(np.linalg.norm(products - wanted) / max(size, TINY))


def rounded(x: Array) -> Array:
    """As ONNX Runtime rounds it: to 256 values from the least to the largest, with 0 among them."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = max((high - low) / 255, TINY)
    zero = np.round(-low / step)
    return (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step


def rounded_weights(weights: Array) -> Array:
    """[n, out] in 8 bits, with a scale for each of `out`."""
    step = np.maximum(np.abs(weights).max(axis=0) / 127, TINY)
    return np.round(weights / step) * step


def even_channels(source: Path, target: Path, batches: Sequence[Batch]) -> int:
    """Write the graph in `source` to `target` with divisions where they are worth it, and return how many.

    Args:
        source: an ONNX file, in float32.
        target: to write.
        batches: of its inputs, on which channels are measured; without any nothing is divided.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    graph = ONNXModel(onnx.load(source))
    graph.replace_gemm_with_matmul()
    found = [(site, scales) for site in _sites(graph.model, batches) if (scales := site.scales()) is not None]
    for site, scales in found:
        _divide(graph.model.graph, site, scales.astype(np.float32))
    graph.clean_initializers()
    onnx.save(graph.model, target)
    return len(found)


def _sites(model: Any, batches: Sequence[Batch]) -> Iterator[Site]:
    """Activations that are multiplied with weights, unless those are used elsewhere too, with the values they take."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    used = Counter(name for node in model.graph.node for name in node.input)
    nodes: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            nodes.setdefault(node.input[0], []).append(node)
    alone = {name: own for name, own in nodes.items() if all(used[node.input[1]] == 1 for node in own)}
    values = _values(model, [*alone], batches) if alone and batches else {}
    for name, inputs in values.items():
        parts = [numpy_helper.to_array(weights[node.input[1]]) for node in alone[name]]
        yield Site(name, alone[name], np.concatenate(parts, axis=1), inputs)


def _values(model: Any, names: list[str], batches: Sequence[Batch]) -> dict[str, list[Array]]:
    """What activations [..., n] are within a graph, as [tokens, n] for each batch."""
    import onnx
    import onnxruntime

    telling = onnx.ModelProto()
    telling.CopyFrom(model)
    of_float = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    telling.graph.output.extend(of_float)
    session = onnxruntime.InferenceSession(telling.SerializeToString(), providers=["CPUExecutionProvider"])
    known = {given.name for given in session.get_inputs()}
    found: dict[str, list[Array]] = {name: [] for name in names}
    for batch in batches:
        given = {name: value for name, value in batch.items() if name in known}
        for name, value in zip(names, session.run(names, given), strict=True):
            found[name].append(value.reshape(-1, value.shape[-1]))
    return found


def _divide(graph: Any, site: Site, scales: Array) -> None:
    """Put x / s in front of the products of a site, and s W into them."""
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    inverse, divided = f"{site.name}.inverse_scales", f"{site.name}.divided"
    graph.initializer.append(numpy_helper.from_array(1 / scales, inverse))
    first = next(place for place, node in enumerate(graph.node) if site.name in node.input and node in site.nodes)
    graph.node.insert(first, helper.make_node("Mul", [site.name, inverse], [divided], name=divided))
    for node in site.nodes:
        tensor = weights[node.input[1]]
        own = numpy_helper.to_array(tensor) * scales[:, None]
        tensor.CopyFrom(numpy_helper.from_array(own, tensor.name))
        node.input[0] = divided
