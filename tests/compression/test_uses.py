"""Operations and time are counted per use: shared blocks, lookups and tied heads."""

from typing import Any

import pytest
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_lowrank import CompressionConfig, LowRankError, compress
from hf_lowrank.allocation.costs import Layer, Uses, flops, minimal_flops
from hf_lowrank.compression.latency import measured_latency
from hf_lowrank.compression.uses import count_uses
from hf_lowrank.model.targets import find_targets
from tests.helpers import HIDDEN, VOCABULARY, factorize, tiny_albert, tiny_bert, tiny_llama, tiny_t5


def uses(model: Any, *include: str) -> dict[str, Uses]:
    return count_uses(model, find_targets(model, include or None))


def test_what_runs_several_times_is_counted_several_times() -> None:
    assert set(uses(tiny_bert()).values()) == {Uses(1, 0)}
    assert set(uses(tiny_albert()).values()) == {Uses(3, 0)}  # three blocks with the same weights
    assert uses(tiny_bert(), "word_embeddings") == {"bert.embeddings.word_embeddings": Uses(0, 1)}
    tied = tiny_llama(tie_word_embeddings=True)
    assert uses(tied, "embed_tokens") == {"model.embed_tokens": Uses(1, 1)}
    assert uses(tiny_t5(), "shared") == {"shared": Uses(1, 2)}  # the encoder's and the decoder's tokens, and the head
    assert uses(factorize(tied, names=["model.layers.0.self_attn.q_proj"]), "embed_tokens")[
        "model.embed_tokens"
    ].lookups


def test_a_model_of_images_is_counted_by_an_image_and_left_in_its_mode() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).train().bfloat16()
    assert set(uses(model).values()) == {Uses(1, 0)}
    assert model.training


def test_what_a_lookup_and_a_product_cost() -> None:
    shape = (8, 100)  # of an embedding: width, tokens
    assert flops(shape, None, Uses(0, 1)) == 0
    assert flops(shape, 3, Uses(0, 1)) == 2 * 3 * 8
    assert flops(shape, None, Uses(1, 1)) == 2 * 800
    assert flops(shape, 3, Uses(1, 2)) == 2 * 3 * 108 + 2 * (2 * 3 * 8)
    assert flops((8, 16), 2, Uses(3, 0)) == 3 * 2 * 2 * 24
    assert minimal_flops((8, 16), 2, Uses(3, 0)) == 3 * 2 * 2 * 22


def test_a_budget_of_operations_is_that_of_the_whole_pass() -> None:
    """The shared block of ALBERT runs three times: its budget is three times that of one."""
    per_block = 2 * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * 64)
    with pytest.raises(LowRankError, match=rf"and {3 * per_block:,} \(all layers dense\)"):
        compress(tiny_albert(), CompressionConfig("svd", flops=4 * per_block), progress=False)
    _, report = compress(tiny_albert(), CompressionConfig("svd", flops=1.5 * per_block), progress=False)
    spent = sum(layer.parameters_after for layer in report.layers)
    assert 0.8 * 1.5 * per_block < 3 * 2 * spent <= 1.5 * per_block


def test_an_embedding_that_is_only_looked_up_saves_no_operations() -> None:
    include = ("word_embeddings", "*.dense")
    _, report = compress(tiny_bert(), CompressionConfig("svd", flops=20_000, include=include), progress=False)
    assert "bert.embeddings.word_embeddings" not in report.ranks
    head = CompressionConfig("svd", flops=VOCABULARY * HIDDEN, include=("embed_tokens",), align=1)
    _, report = compress(tiny_llama(tie_word_embeddings=True), head, progress=False)
    rank = report.ranks["model.embed_tokens"]
    assert flops((HIDDEN, VOCABULARY), rank, Uses(1, 1)) <= VOCABULARY * HIDDEN
    assert flops((HIDDEN, VOCABULARY), rank + 1, Uses(1, 1)) > VOCABULARY * HIDDEN


def test_the_time_of_a_lookup_is_that_of_an_embedding() -> None:
    shape = (256, 20_000)
    cost = measured_latency(
        [Layer(shape, uses=uses) for uses in (Uses(0, 1), Uses(1, 1))], torch.float32, torch.device("cpu")
    )
    lookup, both = (cost(shape, None, each) for each in (Uses(0, 1), Uses(1, 1)))
    assert 0 < lookup < 0.2 * both
    assert cost(shape, None, Uses(0, 2)) == 2 * lookup
    assert cost(shape, 64, Uses(0, 1)) < cost(shape, 64, Uses(1, 1))


def test_what_cannot_be_counted_is_refused() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **special))
    with pytest.raises(LowRankError, match="WhisperForConditionalGeneration uses its layers cannot be counted, as it"):
        compress(model, CompressionConfig("svd", flops=1000), progress=False)
    bert = tiny_bert()
    bert.unused = torch.nn.Linear(32, 32)
    with pytest.raises(LowRankError, match="unused is not reached by a forward pass over a fixed input"):
        compress(bert, CompressionConfig("svd", flops=1000, include=("unused",)), progress=False)
