"""Tensor parallelism: what two processes compute with the plan is what one computes, and engines read it right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.nn.layers_lowrank import LowRankEmbedding
from hf_lowrank.nn.modeling_lowrank import to_low_rank_class
from tests.helpers import RANK, factorize, tiny_llama, token_ids
from tests.launches import Job

# Of which layers some are dense in one block and factorized in the other.
SOME = {
    *("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"),
    *("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
}


def saved(folder: Path, names: list[str] | None) -> Path:
    factorize(tiny_llama(attention_bias=True), names=names).save_pretrained(folder)
    return folder


def compute(model: Any) -> dict[str, Any]:
    """The logits, the gradient of every parameter, and a few tokens with a cache of fixed size."""
    input = token_ids()
    model(input_ids=input, labels=input).loss.backward()
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        logits = model(input_ids=input).logits
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    return {"logits": logits, **gradients, "tokens": model.generate(input_ids=input[:1], **options)}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(folder: Path) -> None:
    """In each of two processes: the model whole, and the model over both of them."""
    plan = DistributedConfig(tp_size=2, tp_plan="auto")
    alone = compute(AutoModelForCausalLM.from_pretrained(folder))
    together = compute(AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    if distributed.get_rank() == 0:
        (folder / "compared").touch()


@pytest.mark.parametrize("names", [None, sorted(SOME)], ids=["all", "some"])
def test_two_processes_compute_what_one_does(names: Any, tmp_path: Path) -> None:
    Job(tmp_path / "log", compare, saved(tmp_path / "model", names), processes=2).done()
    assert (tmp_path / "model" / "compared").exists()


def first_style(plan: dict[str, str], name: str) -> str | None:
    """What vLLM (transformers/base.py) and SGLang (models/transformers.py) take for a layer's."""
    return next((style for pattern, style in plan.items() if re.match(pattern, name)), None)


def test_engines_that_match_patterns_shard_one_factor_and_keep_the_other_whole(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path, sorted(SOME)))
    for name in SOME:
        rowwise = name.endswith(("o_proj", "down_proj"))
        sharded, whole = ("down", "up") if rowwise else ("up", "down")
        assert first_style(model.tp_plan, f"{name}.{sharded}") == ("rowwise" if rowwise else "colwise")
        assert first_style(model.tp_plan, f"{name}.{whole}") in ("replicate", "replicated_with_grad_allreduce")
        dense = re.sub(r"\d", lambda number: str(1 - int(number[0])), name)
        assert first_style(model.tp_plan, dense) == ("rowwise" if rowwise else "colwise")


def test_a_factorized_embedding_and_its_head_stay_whole() -> None:
    model = to_low_rank_class(tiny_llama(tie_word_embeddings=True))
    replace_module(model, "model.embed_tokens", LowRankEmbedding.like(model.model.embed_tokens, RANK))
    built = AutoModelForCausalLM.from_config(model.config)
    assert not {name for name in built.tp_plan if name.startswith(("lm_head", "model.embed_tokens"))}
