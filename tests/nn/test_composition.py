"""Compressed models under the tools that others are used with: adapters, quantizers, pruning, half precision, FSDP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, QuantoConfig

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.compression.forms import to_form
from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.nn.layers_lowrank import LowRankEmbedding, LowRankLinear, dense_weight
from tests.helpers import HIDDEN, RANK, WIDE, factorize, outputs, tiny_bert, tiny_llama, token_ids, truncated_svd


def interpolative_bert() -> Any:
    return to_form(factorize(tiny_bert()), "interpolative")


def embedded_llama() -> Any:
    model = factorize(tiny_llama(tie_word_embeddings=True))
    embedding = model.model.embed_tokens
    low_rank = LowRankEmbedding.from_factors(embedding, *truncated_svd(dense_weight(embedding), RANK))
    replace_module(model, "model.embed_tokens", low_rank)
    return model


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "factors": (lambda: factorize(tiny_bert()), AutoModelForSequenceClassification),
    "interpolative": (interpolative_bert, AutoModelForSequenceClassification),
    "embedding and tied head": (embedded_llama, AutoModelForCausalLM),
}


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    make, auto_class = MODELS[request.param]
    return make(), auto_class


# Adapters


def test_adapters_on_all_linears_train_unload_and_merge(made: tuple[Any, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, auto_class = made
    dense_output = outputs(model)
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapters = [module for module in adapted.modules() if isinstance(module, peft.tuners.lora.Linear)]
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert len(adapters) >= 2 * len(layers)
    torch.testing.assert_close(outputs(adapted), dense_output)  # an adapter starts as nothing
    for adapter in adapters:
        nn.init.normal_(adapter.lora_B["default"].weight, std=0.1)
    expected = outputs(adapted)
    assert not torch.allclose(expected, dense_output)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    torch.testing.assert_close(outputs(again), expected)
    torch.testing.assert_close(outputs(again.unload()), dense_output)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = auto_class.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(loaded), outputs(merged))


# Precision and devices


@pytest.mark.parametrize("trained", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_factorized_embedding_and_its_head_that_adapters_trained_apart_are_saved_and_loaded(
    trained: list[str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model, _ = compress(
        tiny_llama(tie_word_embeddings=True),
        CompressionConfig("svd", keep=0.9, include=("embed_tokens",), align=1),
        progress=False,
    )
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=trained)).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(0.3)
    expected = outputs(adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert set(loaded.config.ranks) == {"model.embed_tokens", "lm_head"}
    for own in (loaded.eval(), merged):
        torch.testing.assert_close(outputs(own), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_models_dtype_is_changed_and_kept_on_disk(made: tuple[Any, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model, auto_class = made
    expected = outputs(model)
    changed = copy.deepcopy(model).to(dtype)
    assert {parameter.dtype for parameter in changed.parameters()} == {dtype}
    torch.testing.assert_close(outputs(changed).float(), expected, rtol=5e-2, atol=5e-2)
    changed.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    torch.testing.assert_close(outputs(loaded), outputs(changed), rtol=2e-2, atol=2e-2)
    there_and_back = model.to("meta").to_empty(device="cpu")
    assert all(not parameter.is_meta for parameter in there_and_back.parameters())


# Pruning


def test_masks_of_pruned_factors_survive(made: tuple[Any, Any], tmp_path: Path) -> None:
    model, auto_class = made
    layer = next(module for module in model.modules() if isinstance(module, LowRankLinear))
    for factor in layer.linear_factors():
        prune.random_unstructured(factor, "weight", amount=0.5)
    expected = outputs(model)
    product = layer.product()
    probe = torch.eye(layer.in_features)
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(layer(probe) - bias, product.mT, rtol=1e-4, atol=1e-5)
    if hasattr(model, "classifier"):
        model.train()(input_ids=token_ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        model.eval()
        expected = outputs(model)
    for factor in layer.linear_factors():
        assert (factor.weight == 0).float().mean() > 0.4
        prune.remove(factor, "weight")
        assert (factor.weight == 0).float().mean() > 0.4
    torch.testing.assert_close(outputs(model), expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(auto_class.from_pretrained(tmp_path)), expected)


# Quantizers


def test_torchao_quantizes_the_factors_after_and_at_loading(made: tuple[Any, Any], tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    model, auto_class = made
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    quantize_(model, Int8WeightOnlyConfig())
    layer = next(module for module in model.modules() if isinstance(module, LowRankLinear))
    kinds = {type(factor.weight).__module__.split(".")[0] for factor in layer.linear_factors()}
    assert kinds == {torchao.__name__}
    torch.testing.assert_close(outputs(model), expected, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(layer.product(), layer.product())
    loaded = auto_class.from_pretrained(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    torch.testing.assert_close(outputs(loaded), expected, rtol=5e-2, atol=5e-2)


def test_quanto_quantizes_the_factors_after_and_at_loading(made: tuple[Any, Any], tmp_path: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model, auto_class = made
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    loaded = auto_class.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    for quantized in (model, loaded):
        layer = next(module for module in quantized.modules() if isinstance(module, LowRankLinear))
        assert all(isinstance(factor, quanto.QLinear) for factor in layer.linear_factors())
        torch.testing.assert_close(outputs(quantized), expected, rtol=5e-2, atol=5e-2)


def test_bitsandbytes_quantizes_the_factors_at_loading(made: tuple[Any, Any], tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, auto_class = made
    model.save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_8bit=True)
    loaded = auto_class.from_pretrained(tmp_path / "plain", quantization_config=config)
    layer = next(module for module in loaded.modules() if isinstance(module, LowRankLinear))
    assert all(isinstance(factor, bitsandbytes.nn.Linear8bitLt) for factor in layer.linear_factors())
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=5e-2, atol=5e-2)
    loaded.save_pretrained(tmp_path / "quantized")
    assert torch.equal(outputs(auto_class.from_pretrained(tmp_path / "quantized")), outputs(loaded))


# FSDP


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fsdp_wraps_by_block(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = factorize(tiny_bert()).train()
    expected = outputs(model.eval())
    mesh = init_device_mesh("cpu", (1,))
    for block in model.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(outputs(model), expected)
    model(input_ids=token_ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
    factor = model.bert.encoder.layer[0].output.dense.down.weight
    assert (factor.shape, factor.grad.full_tensor().abs().sum() > 0) == ((RANK, WIDE), True)
    assert factor.full_tensor().shape == (RANK, 2 * HIDDEN)
