"""MLPs made narrower: idle channels cost nothing, others are made up for, and what is left is a plain model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_lowrank import LowRankError, compute_statistics
from hf_lowrank.compression.narrow import LAYERS, NEEDS, gated_mlps, narrow
from hf_lowrank.solvers.nystrom import nystrom
from tests.helpers import WIDE, tiny_bert, tiny_llama

IDS = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS, "labels": IDS}]


def statistics(model: Any) -> Any:
    return compute_statistics(model, BATCHES, NEEDS, include=LAYERS, progress=False)


def test_channels_follow_from_those_kept_as_far_as_the_moment_says() -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 5, dtype=torch.float64) @ torch.randn(5, 12, dtype=torch.float64)
    kept, mixed = nystrom(x.T @ x, 5)
    torch.testing.assert_close(x[:, kept] @ mixed.T, x, rtol=1e-4, atol=1e-4)
    x += torch.randn_like(x)
    moment = x.T @ x
    kept, mixed = nystrom(moment, 5)
    expected = torch.linalg.lstsq(x[:, kept], x).solution.T
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)
    left = (x - x[:, kept] @ mixed.T).square().sum()
    assert left < (x - torch.where(torch.isin(torch.arange(12), kept), x, 0.0)).square().sum()
    torch.testing.assert_close(nystrom(1e-6 * moment, 5)[1], mixed)  # of any scale


def test_an_mlp_that_never_says_anything_is_made_narrower_too() -> None:
    kept, mixed = nystrom(torch.zeros(12, 12), 5)
    assert torch.equal(mixed, torch.eye(12, dtype=torch.float64)[:, kept])


def test_a_model_with_idle_channels_says_the_same_when_they_are_gone(tmp_path: Path) -> None:
    model, half = tiny_llama(), WIDE // 2
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[::2] = 0  # every other channel is idle
        before = model(IDS).logits
    parameters = model.num_parameters()
    narrow(model, statistics(model), half)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-4)
    assert model.num_parameters() == parameters - 2 * 3 * 32 * half
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (type(loaded), loaded.config.intermediate_size) == (type(model), half)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_at_full_width_nothing_changes() -> None:
    model = tiny_llama()
    with torch.no_grad():
        before = model(IDS).logits
        torch.testing.assert_close(narrow(model, statistics(model), WIDE)(IDS).logits, before)


def test_what_cannot_be_narrower_is_refused() -> None:
    model = tiny_llama()
    measured = statistics(model)
    with pytest.raises(LowRankError, match="of 64 channels 1 to 64 can be kept, not 65"):
        narrow(model, measured, 65)
    with pytest.raises(LowRankError, match="BertForSequenceClassification with no MLPs of gate_proj, up_proj and"):
        narrow(tiny_bert(), measured, 8)
    assert len(gated_mlps(tiny_llama(mlp_bias=True))) == 2
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": WIDE, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 2, "num_experts_per_tok": 1}
    config = Qwen2MoeConfig(**sizes, moe_intermediate_size=8, shared_expert_intermediate_size=WIDE)
    with pytest.raises(LowRankError, match="not all of the config's intermediate_size, such as shared experts"):
        gated_mlps(Qwen2MoeForCausalLM(config))
    sizes |= {"num_hidden_layers": 5, "num_attention_heads": 4, "num_kv_shared_layers": 0, "laurel_rank": 4}
    own = Gemma3nTextConfig(**sizes, vocab_size_per_layer_input=64, activation_sparsity_pattern=[0.0] * 5)
    with pytest.raises(LowRankError, match="not all of the config's intermediate_size.* or a list of sizes"):
        gated_mlps(Gemma3nForCausalLM(own))
    shared = tiny_llama()
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(LowRankError, match="a LlamaForCausalLM with MLPs that share weights cannot be made narrower"):
        narrow(shared, measured, 8)


def test_one_module_in_every_block_is_made_narrower_once() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2] = 0
        before = model(IDS).logits
        narrow(model, statistics(model), WIDE // 2)
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-4)
