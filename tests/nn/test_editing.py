"""Layers in the place of others for a while: afterwards the model is what it was, whatever its weights share."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, ResNetConfig, ResNetForImageClassification

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.compression.profiling import mean_loss, profile_losses
from hf_lowrank.model.targets import find_targets, unstacked
from hf_lowrank.nn.editing_lowrank import replaced
from hf_lowrank.nn.layers_lowrank import dense_weight, layer_class_for, with_weight
from tests.helpers import (
    VOCABULARY,
    factorize,
    modules_of,
    tiny_albert,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_ids,
)


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, vocab_size=VOCABULARY, intermediate_size=24, num_local_experts=4)
    return MixtralForCausalLM(config).eval()


def tiny_resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes)).eval()


MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...] | None]] = {
    "plain": (tiny_bert, None),
    "half precision": (lambda: tiny_bert().bfloat16(), None),
    "Conv1D": (tiny_gpt2, None),
    "shared": (tiny_albert, ("query", "ffn")),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), ("embed_tokens", "q_proj")),
    "tied twice": (tiny_t5, ("shared", "wi")),
    "experts": (tiny_mixtral, ("*.experts.down_proj.*", "q_proj")),
    "convolutions": (tiny_resnet, ("convolution",)),
    "low-rank": (lambda: factorize(tiny_llama(tie_word_embeddings=True)), ("embed_tokens",)),
}


def inputs(model: Any) -> dict[str, torch.Tensor]:
    if isinstance(model, ResNetForImageClassification):
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": images.to(model.dtype)}
    ids = {"input_ids": token_ids()}
    return ids | {"decoder_input_ids": token_ids()} if model.config.is_encoder_decoder else ids


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model))[0]


def everything(model: Any) -> Any:
    """Which objects a model consists of, under all their names and in their order, and what it says of itself."""
    modules = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(p), p._version) for name, p in model.named_parameters(remove_duplicate=False)]
    buffers = [(name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)]
    own = {name: copy.copy(vars(model).get(name)) for name in ("all_tied_weights_keys", "_tied_weights_keys")}
    return modules, tensors, buffers, list(model.state_dict()), own, "_tied_weights_keys" in vars(model), type(model)


def low_rank(module: nn.Module) -> nn.Module:
    """A layer of rank 2 that is far from `module`."""
    out_features, in_features = dense_weight(module).shape
    return layer_class_for(module).from_factors(module, torch.ones(out_features, 2), torch.ones(2, in_features))


def other_weight(module: nn.Module) -> nn.Module:
    return with_weight(module, torch.ones_like(dense_weight(module)))


@pytest.mark.parametrize("new", [low_rank, other_weight])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_what_it_was_after_its_layers_were_replaced(kind: str, new: Any, tmp_path: Path) -> None:
    make, include = MODELS[kind]
    model = make()
    before, config, expected = everything(model), copy.deepcopy(model.config), output(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for interrupted in (False, True):
        for name, module in modules_of(find_targets(model, include)).items():
            try:
                with replaced(model, {name: new(module)}):
                    assert everything(model) != before
                    if interrupted:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert interrupted
            assert everything(model) == before
    with replaced(model, {name: new(module) for name, module in modules_of(find_targets(model, include)).items()}):
        assert not torch.equal(output(model), expected)
    assert everything(model) == before
    assert model.config.to_dict() == config.to_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output(model), expected)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, dtype=model.dtype, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(output(again.eval()), expected)


@pytest.mark.parametrize("kind", ["tied", "tied twice"])
def test_other_weights_of_a_tied_embedding_are_those_of_its_head(kind: str) -> None:
    model = MODELS[kind][0]()
    name, embedding = next(iter(modules_of(find_targets(model, MODELS[kind][1])).items()))
    changed = copy.deepcopy(model)
    changed.get_submodule(name).weight.data.mul_(2)
    with replaced(model, {name: with_weight(embedding, 2 * dense_weight(embedding))}):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert torch.equal(output(model), output(changed))


def test_a_refused_replacement_leaves_the_model_alone() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = everything(model)
    new = {"model.layers.0.self_attn.q_proj": low_rank(model.model.layers[0].self_attn.q_proj)}
    with (
        pytest.raises(ValueError, match="its weight is tied"),
        replaced(model, new | {"lm_head": low_rank(model.lm_head)}),
    ):
        raise AssertionError
    assert everything(model) == before


@pytest.mark.parametrize("kind", MODELS)
def test_a_profile_leaves_the_model_as_it_was(kind: str, tmp_path: Path) -> None:
    make, include = MODELS[kind]
    model = make()
    classes = torch.arange(3 if kind != "convolutions" else 2) % 2
    batch = inputs(model) | {"labels": classes if hasattr(model, "classifier") else token_ids(1)}
    dense = mean_loss(model, [batch])  # which notes the kind of its problem in the config
    before, config = everything(model), copy.deepcopy(model.config)
    settings = CompressionConfig("svd", keep=0.9, include=include, align=1)
    profile = profile_losses(model, settings, None, [batch], ratios=(0.1,), progress=False)
    assert all(profile.values())
    assert everything(model) == before
    assert model.config.to_dict() == config.to_dict()
    assert mean_loss(model, [batch]) == dense
    knapsack = CompressionConfig("svd", keep=0.9, include=include, align=1, allocation="knapsack")
    compressed, report = compress(model, knapsack, progress=False, profile=profile)
    assert report.targeted_after <= 0.9 * report.targeted_before
    compressed.eval().save_pretrained(tmp_path)
    again, info = type(compressed).from_pretrained(tmp_path, dtype=model.dtype, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(output(again.eval()), output(compressed))


def test_experts_are_stacked_again_where_they_were_taken_apart() -> None:
    model = tiny_mixtral()
    targets = find_targets(model, MODELS["experts"][1])
    before = everything(model)
    with unstacked(model, targets):
        apart = everything(model)
        for name, module in modules_of(targets).items():
            with replaced(model, {name: low_rank(module)}):
                assert everything(model) != apart
            assert everything(model) == apart
    assert everything(model) == before
