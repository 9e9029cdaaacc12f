"""Targets say of a layer what a caller would otherwise ask its class."""

from dataclasses import FrozenInstanceError

import pytest

from hf_lowrank import CompressionConfig, LowRankError, compress
from hf_lowrank.compression.uses import as_layer
from hf_lowrank.model.targets import find_targets, tied_targets
from tests.helpers import HIDDEN, VOCABULARY, factorize, tiny_bert, tiny_llama
from tests.nn.test_editing import tiny_mixtral


def test_a_target_says_kind_shape_and_owner() -> None:
    model = tiny_mixtral()
    targets = find_targets(model, ["q_proj", "*.experts.*", "embed_tokens"])
    by_kind = {kind: [t for t in targets.values() if t.kind == kind] for kind in ("linear", "expert", "embedding")}
    assert all(by_kind.values())
    assert sum(map(len, by_kind.values())) == len(targets)
    assert {target.owner for target in by_kind["expert"]} == {layer.mlp.experts for layer in model.model.layers}
    assert all(target.owner is None for target in by_kind["linear"] + by_kind["embedding"])
    assert by_kind["embedding"][0].shape == (16, VOCABULARY)
    with pytest.raises(FrozenInstanceError):
        by_kind["linear"][0].name = "other"  # type: ignore[misc]


def test_what_is_tied_to_an_embedding_goes_with_it() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    (embedding,) = find_targets(model, ["embed_tokens"]).values()
    (head,) = tied_targets(model, embedding)
    assert (head.name, head.module, head.kind) == ("lm_head", model.lm_head, "linear")
    assert tied_targets(model, find_targets(model)["model.layers.0.self_attn.q_proj"]) == []


def test_a_factorized_layer_says_rank_and_form() -> None:
    model = factorize(tiny_bert(), names=["bert.encoder.layer.0.attention.self.query"])
    targets = find_targets(model)
    assert [target.rank for target in targets.values()] == [8, *[None] * 11]
    small, _ = compress(tiny_bert(), CompressionConfig("svd", 0.25, form="interpolative"), progress=False)
    layer = as_layer(find_targets(small)["bert.encoder.layer.0.attention.self.query"])
    assert (layer.shape, layer.rank, layer.form) == ((HIDDEN, HIDDEN), 9, "interpolative")  # of as many parameters


def test_a_budget_of_time_is_refused_for_another_form_before_anything_is_measured() -> None:
    with pytest.raises(LowRankError, match="a latency budget is for plain factors"):
        CompressionConfig("svd", latency=0.5, form="interpolative")
