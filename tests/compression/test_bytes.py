"""A budget in bytes: ranks and bits of every layer and of the embedding, in a file of that size."""

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hf_lowrank import CompressionConfig, LowRankError, compress, compute_statistics
from hf_lowrank.allocation.stored import Stored, group_of
from hf_lowrank.compression.compress import check_possible
from hf_lowrank.compression.rounded import RoundedLoss, rotated_pivots
from hf_lowrank.compression.stored import with_embeddings
from hf_lowrank.folder.quantize import quantize_
from hf_lowrank.folder.quantizers import QUANTIZERS, Quantization
from hf_lowrank.solvers.gauge import flat, random_rotation
from hf_lowrank.solvers.rounded_factors import Grids, round_factors, round_weight
from hf_lowrank.solvers.rounding import Grid, unit_upper
from hf_lowrank.solvers.scaled import Scaled, whitening
from tests.helpers import factorize, tiny_bert, tiny_llama, token_ids

HAS_QUANTIZERS = find_spec(QUANTIZERS["compressed-tensors"].package) is not None


def moment(size: int) -> torch.Tensor:
    """A second moment of quickly falling eigenvalues."""
    mixed = torch.randn(size, size, dtype=torch.float64) * (torch.arange(size) + 1.0) ** -0.5
    return mixed @ mixed.T / size


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("lookup", [False, True])
def test_the_expected_loss_is_what_rounding_brings_about(bits: int, rank: int, lookup: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128, dtype=torch.float64)
    inputs = torch.rand(128, dtype=torch.float64) if lookup else moment(128)
    sides = Scaled(whitening(moment(96), 1e-2), whitening(inputs, 1e-3))
    expected = RoundedLoss.of(weight, sides, 1.0, lookup)
    factors = flat(sides.factorize(weight, rank), sides)
    truncated = sides.error(weight - factors.product())
    torch.testing.assert_close(expected.tails[rank], truncated, rtol=1e-6, atol=1e-9)
    by_width = {width: Grid(bits, group_of(width, bits), clipped=True) for width in (rank, 96, 128)}
    grids = Grids(None if lookup else by_width[rank], by_width[rank if lookup else 128], lookup)
    noise = sides.error(round_factors(factors, sides, grids).factors.product() - factors.product())
    assert 0.5 < (expected(Stored(rank, bits)) - float(truncated)) / float(noise) < 3
    dense = round_weight(weight, sides, by_width[96 if lookup else 128], lookup).weight()
    lost = sides.error((dense.T if lookup else dense) - weight)
    assert 0.5 < expected(Stored(None, bits)) / float(lost) < 1.6


def test_pivots_of_a_random_rotation_are_what_is_expected() -> None:
    values = torch.linspace(1, 40, 96, dtype=torch.float64) ** -1.5
    expected = rotated_pivots(values)
    for rank in (16, 48, 96):
        rotation = random_rotation(rank)
        moment = rotation @ values[:rank].diag() @ rotation.T
        assert expected[rank] == pytest.approx(float(unit_upper(moment)[1].sum() / moment.trace()), rel=0.06)
    assert expected[0] == 1
    for same in (torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)):
        assert float((rotated_pivots(same) - 1).abs().max()) < 1e-3


def wide_bert() -> Any:
    """Large enough for more than headers."""
    return tiny_bert(vocab_size=2000, hidden_size=64, intermediate_size=128, num_attention_heads=2)


def small(model: Any, budget: float | str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model within the budget, embedding included, and the report."""
    config = with_embeddings(model, CompressionConfig(bytes=budget))
    batches = [{"input_ids": token_ids(seed), "labels": torch.tensor([0, 1, 0])} for seed in range(6)]
    statistics = compute_statistics(model, batches, config.needs, include=config.include, progress=False)
    return compress(model, config, statistics, progress=False, dtype=dtype)


@pytest.mark.skipif(not HAS_QUANTIZERS, reason="compressed-tensors is not installed")
@pytest.mark.parametrize(
    ("budget", "dtype"), [(120_000, None), (180_000, None), (250_000, None), (150_000, torch.float16)], ids=str
)
def test_the_file_has_the_bytes_that_were_asked_for(budget: int, dtype: torch.dtype | None, tmp_path: Path) -> None:
    model, report = small(wide_bert(), budget, dtype)
    assert "bert.embeddings.word_embeddings" in report.bits
    assert set(report.bits.values()) <= {4, 8}
    quantize_(model, Quantization(), report.bits, dtype=dtype)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0.85 * budget < size <= budget


def test_more_bytes_lose_less() -> None:
    losses = []
    for budget in (120_000, 180_000, 250_000):
        _, report = small(wide_bert(), budget)
        losses.append((report.expected_loss, -sum(report.bits.values())))
    assert losses[0] > losses[1] > losses[2]


def test_what_is_possible_is_said_where_a_budget_is_not() -> None:
    with pytest.raises(LowRankError, match=r"bytes 1,000 cannot be met: it must be between \d+,\d+ \("):
        small(tiny_bert(), 1000)
    with pytest.raises(LowRankError, match="cannot be met") as told:
        small(tiny_bert(), "1GB")
    least = int(re.findall(r"between ([\d,]+)", str(told.value))[0].replace(",", ""))
    assert small(tiny_bert(), least)[1].bits
    with pytest.raises(LowRankError, match="cannot be met"):
        small(tiny_bert(), least - 1)
    with pytest.raises(LowRankError, match="was factorized before"):
        small(factorize(tiny_bert()), "20KB")
    for budget in (1000, "1GB"):  # and before anything is measured
        with pytest.raises(LowRankError, match="cannot be met"):
            check_possible(tiny_bert(), CompressionConfig("svd", bytes=budget, allocation="greedy"))
    check_possible(tiny_bert(), CompressionConfig("svd", bytes="36KB", allocation="greedy"))


def test_experts_are_refused_in_a_line_and_can_be_left_out() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2, num_key_value_heads=2, vocab_size=64))
    config = CompressionConfig("svd", bytes="66KB", allocation="greedy")
    with pytest.raises(
        LowRankError, match=r"experts\.gate_up_proj\.0 is a layer of the kind expert, .* exclude it, or"
    ):
        check_possible(model, with_embeddings(model, config))
    check_possible(model, with_embeddings(model, replace(config, exclude=("*experts*",))))


def test_an_embedding_that_is_tied_is_left_out() -> None:
    config = CompressionConfig("svd", bytes="1MB", allocation="greedy")
    tied, apart = (with_embeddings(tiny_llama(tie_word_embeddings=tie), config) for tie in (True, False))
    assert tied.include == ("model.layers.*",)
    assert apart.include == ("model.layers.*", "model.embed_tokens")
