"""The picture of score against bytes and time, from rows of several seeds."""

from typing import Any

import torch

from benchmarks.bytes_picture import SMALLER, bytes_figure, points
from benchmarks.quantized import HALF
from benchmarks.smaller import every_second
from tests.helpers import outputs, tiny_bert


def row(model: str, bits: str, megabytes: float, score: float, **more: Any) -> dict[str, Any]:
    return {"model": model, "bits": bits, "megabytes": megabytes, "score": score, **more}


BYTES = [
    row("10%", "int4", 7.0, 82.0),
    row("10%", "int4", 9.0, 84.0),
    row("33%", "int4", 10.0, 84.5),
    row("dense", "int4", 18.0, 82.4),
    row("10%", "int8", 14.0, 83.0),
]
TIMES = [
    row("dense", "int8, ONNX Runtime", 23.6, 82.9, speed=[1.5, 1.8, 1.6]),
    row("10%", "int8, ONNX Runtime", 14.6, 82.4, speed=[3.0]),
]


def test_points_are_means_over_seeds_and_the_dense_model_stands_apart() -> None:
    assert points(BYTES, "int4", "megabytes") == ([(18.0, 82.4)], [(10.0, 84.5), (8.0, 83.0)])
    assert points(TIMES, "int8, ONNX Runtime", "speed") == ([(1.6, 82.9)], [(3.0, 82.4)])


def test_there_is_a_second_panel_where_something_was_timed() -> None:
    assert len(bytes_figure(BYTES).axes) == 1
    assert len(bytes_figure([*BYTES, *TIMES]).axes) == 2


def test_a_smaller_model_of_the_family_stands_beside_the_low_rank_ones() -> None:
    rows = [*BYTES, row(HALF, "float32", 70.0, 80.0), row(HALF, "int8, to the nearest", 18.0, 79.9)]
    assert SMALLER == HALF
    assert points(rows, "float32", "megabytes") == ([], [])
    assert [line.get_label() for line in bytes_figure(rows).axes[0].lines].count("half the blocks, distilled") == 1
    model = tiny_bert(num_hidden_layers=4)
    small = every_second(model)
    model.bert.encoder.layer = torch.nn.ModuleList([model.bert.encoder.layer[n] for n in (1, 3)])
    torch.testing.assert_close(outputs(small), outputs(model))
