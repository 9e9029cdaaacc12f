"""A module some of whose children are factorized is of a class of its own, and in all else what it was."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from torch import nn
from transformers import BertModel, OPTConfig, OPTForCausalLM

from hf_lowrank.nn.editing_lowrank import replace_module, replaced
from hf_lowrank.nn.layers_lowrank import LowRankLinear, dense_weight
from hf_lowrank.nn.modeling_lowrank import to_low_rank_class
from hf_lowrank.nn.parents_lowrank import dense_class_of
from tests.helpers import HIDDEN, WIDE, bert_config, factorize, outputs, tiny_gpt2, tiny_llama, token_ids, truncated_svd

QUERY, KEY, GATE = "self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"


def kind(module: nn.Module) -> tuple[type, tuple[str, ...]]:
    """What vLLM tells modules apart by (`key` in its transformers/fuser.py)."""
    return type(module), tuple(name for name, _ in module.named_children())


def llama(*blocks: tuple[str, ...]) -> Any:
    """A model in whose blocks the layers named are factorized."""
    names = [f"model.layers.{number}.{name}" for number, layers in enumerate(blocks) for name in layers]
    return factorize(tiny_llama(num_hidden_layers=len(blocks)), names=names)


def test_blocks_are_of_one_kind_only_if_the_same_layers_of_them_are_factorized() -> None:
    patterns = [p for n in range(4) for p in itertools.combinations([QUERY, KEY, GATE], n)]
    layers = llama(*patterns, *patterns).model.layers
    for part, own in (("self_attn", {QUERY, KEY}), ("mlp", {GATE})):
        kinds = [kind(layer.get_submodule(part)) for layer in layers]
        seen = [own & set(pattern) for pattern in (*patterns, *patterns)]
        for (one, of_one), (other, of_other) in itertools.combinations(zip(kinds, seen, strict=True), 2):
            assert (one == other) == (of_one == of_other)


def test_the_class_is_the_bases_but_for_its_identity() -> None:
    attention = llama((QUERY,)).model.layers[0].self_attn
    base = dense_class_of(attention)
    assert type(attention) is not base
    assert isinstance(attention, base)
    assert (type(attention).__name__, type(attention).__module__) == (base.__name__, base.__module__)
    assert repr(attention).startswith("LlamaAttention(")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles_keep_the_class(copied: Any) -> None:
    model = llama((QUERY,), (KEY, GATE))
    twin = copied(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(outputs(twin), outputs(model))
    assert twin.model.layers[0].self_attn.q_proj is not model.model.layers[0].self_attn.q_proj


def test_a_loaded_model_has_the_classes_of_the_saved_one(tmp_path: Any) -> None:
    model = llama((QUERY,), (KEY, GATE))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]


def test_a_module_without_factorized_children_has_its_class_again() -> None:
    model = llama((QUERY,))
    attention = model.model.layers[0].self_attn
    base = dense_class_of(attention)
    own = type(attention)
    replace_module(model, "model.layers.0.self_attn.q_proj", nn.Linear(HIDDEN, HIDDEN, bias=False))
    assert type(attention) is base
    low = LowRankLinear(HIDDEN, HIDDEN, 4, bias=False)
    with replaced(model, {"model.layers.0.self_attn.q_proj": low}):
        assert type(attention) is own
    assert type(attention) is base


def test_states_and_attentions_of_factorized_blocks_are_recorded() -> None:
    """transformers hooks the modules of certain classes."""
    dense, low = tiny_llama(attn_implementation="eager"), tiny_llama(attn_implementation="eager")
    to_low_rank_class(low)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        linear = low.get_submodule(name)
        replace_module(low, name, LowRankLinear.from_factors(linear, *truncated_svd(dense_weight(linear), HIDDEN)))
    recorded = [m(input_ids=token_ids(), output_attentions=True, output_hidden_states=True) for m in (dense, low)]
    for part in ("attentions", "hidden_states"):
        torch.testing.assert_close(recorded[1][part], recorded[0][part], atol=1e-5, rtol=1e-4)


def test_states_of_a_body_that_was_factorized_in_place_are_recorded() -> None:
    model = factorize(BertModel(bert_config()).eval())
    assert len(model(input_ids=token_ids(), output_hidden_states=True).hidden_states) == 3


def test_blocks_wrapped_by_their_class_are_wrapped_all() -> None:
    """FSDP looks a class up by its name, in the first block that has it, and wraps its instances."""
    sizes = {"hidden_size": HIDDEN, "ffn_dim": WIDE, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(**sizes, vocab_size=64, word_embed_proj_dim=HIDDEN))
    factorize(model, names=["model.decoder.layers.0.fc1", "model.decoder.layers.1.self_attn.q_proj"])
    block = get_module_class_from_name(model, "OPTDecoderLayer")
    assert all(isinstance(layer, block) for layer in model.model.decoder.layers)
    attentions = [layer.self_attn for layer in model.model.decoder.layers]
    assert len({kind(attention) for attention in attentions}) == 2


def test_layers_of_other_kinds_than_linear_are_told_apart_too() -> None:
    model = factorize(tiny_gpt2(), names=["transformer.h.1.attn.c_attn"])
    assert kind(model.transformer.h[0].attn) != kind(model.transformer.h[1].attn)
    assert kind(model.transformer.h[0].mlp) == kind(model.transformer.h[1].mlp)
