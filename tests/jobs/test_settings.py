"""Settings hold what their annotations allow; a list will do for a tuple, a text is no list of texts."""

import math
from typing import Any

import numpy as np
import pytest

from hf_lowrank import CompressionConfig, LowRankError
from hf_lowrank.studies.sweep_settings import SweepConfig
from hf_lowrank.training.settings import FinetuneConfig


@pytest.mark.parametrize(
    ("kind", "chosen", "message"),
    [
        (CompressionConfig, {"include": "query"}, "include must be a list, each a text; it is 'query'"),
        (CompressionConfig, {"keep": "0.5"}, "keep must be a number; it is '0.5'"),
        (CompressionConfig, {"align": True}, "align must be a whole number; it is True"),
        (CompressionConfig, {"floor": math.nan}, "floor must be a number; it is nan"),
        (CompressionConfig, {"params": math.inf}, "params must be a positive number"),
        (CompressionConfig, {"method": ["svd"]}, r"method must be a text; it is \['svd'\]"),
        (SweepConfig, {"methods": ()}, "a sweep needs one method, one value"),
        (SweepConfig, {"epochs": -1}, "epochs must be at least 0; they are -1"),
        (FinetuneConfig, {"epochs": "many"}, "epochs must be a number; it is 'many'"),
        (FinetuneConfig, {"learning_rate": math.inf}, "epochs and learning rate must be above 0"),
        (FinetuneConfig, {"seed": -3}, "a seed is a whole number from 0 to 4,294,967,295; it is -3"),
    ],
)
def test_a_value_of_another_kind_is_named(kind: type, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        kind(**chosen)


def test_numbers_of_numpy_and_lists_are_taken() -> None:
    config = CompressionConfig("svd", keep=np.float32(0.5), align=np.int64(4), include=["query"])  # type: ignore[arg-type]
    assert config.budget.value == 0.5
