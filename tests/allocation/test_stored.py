"""Choices of rank and bits together: what they cost in bytes, and that none is beaten by another."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank import CompressionConfig, LowRankError
from hf_lowrank.allocation.budget import parse_bytes
from hf_lowrank.allocation.stored import BITS, Packed, Stored, byte_choices


def test_a_matrix_is_whole_words_and_its_scales() -> None:
    packed = Packed((384, 1536), scale_bytes=4)
    assert packed.bytes(Stored(None, 8)) == 384 * (1536 + 4)
    assert packed.bytes(Stored(None, 4)) == 384 * (768 + 48 * 4)
    assert packed.bytes(Stored(9, 4)) == 9 * (768 + 48 * 4) + 384 * (8 + 4)  # 9 weights of 4 bits take two words
    assert Packed((16, 100), lookup=True).bytes(Stored(None, 8)) == 100 * (16 + 2)
    assert Packed((16, 100), lookup=True).bytes(Stored(4, 8)) == 100 * (4 + 2) + 16 * 4 * 2
    assert Packed((16, 100), dense=6400).bytes(Stored(None, 4)) == 6400


@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.floats(0.1, 3), st.floats(0, 1))
def test_no_choice_is_beaten_by_another(shape: tuple[int, int], decay: float, noise: float) -> None:
    packed = Packed(shape)

    def loss(stored: Stored) -> float:
        kept = min(shape) if stored.rank is None else stored.rank
        return math.exp(-decay * kept) + noise * 4.0**-stored.bits * kept

    ranks = range(1, min(shape) + 1)
    choices, meaning = byte_choices(packed, ranks, loss)
    assert list(choices.costs) == sorted(choices.costs)
    assert all(after < before for before, after in zip(choices.losses, choices.losses[1:], strict=False))
    assert [packed.bytes(stored) for stored in meaning] == list(choices.costs)
    every = [Stored(rank, bits) for rank in (*ranks, None) for bits in BITS]
    assert choices.costs[0] == min(map(packed.bytes, every))
    assert choices.losses[-1] == min(map(loss, every))


@pytest.mark.parametrize(
    ("text", "number"), [("12MB", 12e6), ("1.5 GB", 1.5e9), ("300k", 3e5), (7, 7), ("7", 7), ("7B", 7)]
)
def test_bytes_are_read(text: str | int, number: float) -> None:
    assert parse_bytes(text) == number


def test_what_is_no_number_of_bytes_is_refused() -> None:
    for text in ("much", "MB", "12 MiB"):
        with pytest.raises(LowRankError, match="is no number of bytes such as"):
            CompressionConfig(bytes=text)
    for settings in ({"allocation": "uniform"}, {"floor": 0.5}, {"form": "interpolative"}):
        with pytest.raises(LowRankError, match="spread greedily over plain factors"):
            CompressionConfig(bytes="12MB", **settings)  # type: ignore[arg-type]
