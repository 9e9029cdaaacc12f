"""Moments are centred where a layer has a bias: outputs keep their mean, and the mean of the inputs costs no rank."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification

from hf_lowrank import CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.folder.densify import densify
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.nn.layers_lowrank import dense_weight
from hf_lowrank.statistics.batches import Batch
from hf_lowrank.statistics.patches import patches
from tests.helpers import outputs, tiny_bert, tiny_gpt2, tiny_llama, token_ids

METHODS = ("whiten", "whiten-diag", "kfac")
RANK_RATIO = 0.25


def text_batch(model: PreTrainedModel) -> Batch:
    ids = token_ids(batch=16)
    labels = torch.arange(16) % 2 if "SequenceClassification" in type(model).__name__ else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def shifted(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose layer norms give inputs of a large mean, as trained ones do."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.bias, std=2.0)
    return model


def measured(model: PreTrainedModel, name: str, method: str, batch: Batch) -> Statistics:
    return compute_statistics(model, [batch], CompressionConfig(method).needs, include=[name], progress=False)


def read_by(model: nn.Module, name: str, batch: Batch) -> Tensor:
    """What a layer reads, by token [tokens, in], all of them active."""
    seen: list[Tensor] = []
    with (
        model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        torch.no_grad(),
    ):
        model(**batch)
    (x,) = seen
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Conv2d):
        x, _ = patches(layer, x, torch.zeros(len(x), layer.out_channels, 1, 1))
    return x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize("form", ["factors", "interpolative"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "name"), [(tiny_bert, "bert.encoder.layer.0.intermediate.dense"), (tiny_gpt2, "transformer.h.0.mlp.c_fc")]
)
def test_the_mean_output_stays(make: Callable[[], PreTrainedModel], name: str, method: str, form: str) -> None:
    model = shifted(make())
    batch = text_batch(model)
    dense, x = copy.deepcopy(model).get_submodule(name), read_by(model, name, batch)
    config = CompressionConfig(method, RANK_RATIO, include=(name,), form=form)
    compress(model, config, measured(model, name, method, batch), progress=False)
    low_rank = model.get_submodule(name)
    if make is tiny_gpt2:
        x = x.unflatten(0, (16, -1))[:, :-1].flatten(0, 1)  # the last token's loss is no one's
    with torch.no_grad():
        expected = dense(x)
        change = low_rank(x) - expected
    assert float(change.norm()) > 1e-2 * float(expected.norm())
    torch.testing.assert_close(change.mean(dim=0), torch.zeros_like(dense.bias), rtol=0, atol=1e-5)


def test_no_other_bias_and_rank_change_outputs_less() -> None:
    """The error of `whiten` is what an affine map of the rank can reach: Eckart and Young of the centred outputs."""
    name = "bert.encoder.layer.0.intermediate.dense"
    model = shifted(tiny_bert())
    batch = text_batch(model)
    dense, x = copy.deepcopy(model).get_submodule(name), read_by(model, name, batch)
    statistics = measured(model, name, "whiten", batch)
    compress(model, CompressionConfig("whiten", RANK_RATIO, include=(name,)), statistics, progress=False)
    with torch.no_grad():
        change = (model.get_submodule(name)(x) - dense(x)).square().sum()
        centred = (x - x.mean(dim=0)) @ dense.weight.T
    least = torch.linalg.svdvals(centred)[model.get_submodule(name).rank :].square().sum()
    assert float(least) <= float(change) <= 1.01 * float(least)


def test_a_convolution_keeps_the_mean_of_its_outputs() -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3))
    conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    name = next(name for name, module in model.named_modules() if module is conv)
    batch = {"pixel_values": torch.rand(16, 3, 16, 16) + 1, "labels": torch.arange(16) % 2}
    dense, x = copy.deepcopy(conv), read_by(model, name, batch)
    compress(model, CompressionConfig("kfac", 0.5, include=(name,)), measured(model, name, "kfac", batch), False)
    low_rank = model.get_submodule(name)
    with torch.no_grad():
        delta = dense_weight(dense) - low_rank.product()
        expected = dense.bias + delta @ x.mean(dim=0)
    torch.testing.assert_close(low_rank.bias.detach(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 1e-4


def test_without_a_bias_the_mean_counts() -> None:
    name = "model.layers.0.mlp.gate_proj"
    model = tiny_llama()
    batch = text_batch(model)
    x = read_by(model, name, batch).unflatten(0, (16, -1))[:, :-1].flatten(0, 1)
    dense = copy.deepcopy(model).get_submodule(name)
    statistics = measured(model, name, "whiten", batch)
    compress(model, CompressionConfig("whiten", RANK_RATIO, include=(name,)), statistics, progress=False)
    layer = model.get_submodule(name)
    assert layer.bias is None
    with torch.no_grad():
        change = (layer(x) - dense(x)).square().sum()
    least = torch.linalg.svdvals((x @ dense.weight.T).detach())[layer.rank :].square().sum()
    assert float(least) <= float(change) <= 1.01 * float(least)


def test_the_bias_is_saved_loaded_and_densified(tmp_path: Path) -> None:
    model = shifted(tiny_bert())
    statistics = compute_statistics(model, [text_batch(model)], CompressionConfig().needs, progress=False)
    before = copy.deepcopy(model)
    low_rank, _ = compress(model, CompressionConfig(rank_ratio=RANK_RATIO), statistics, progress=False)
    name = "bert.encoder.layer.0.intermediate.dense"
    assert not torch.equal(low_rank.get_submodule(name).bias, before.get_submodule(name).bias)
    expected = outputs(low_rank)
    low_rank.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(type(low_rank).from_pretrained(tmp_path)), expected, rtol=0, atol=0)
    torch.testing.assert_close(outputs(densify(low_rank)), expected, rtol=1e-4, atol=1e-5)


def test_kept_factors_have_their_bias_and_half_precision_stays(tmp_path: Path) -> None:
    model = shifted(tiny_bert()).bfloat16()
    statistics = compute_statistics(model, [text_batch(model)], CompressionConfig().needs, progress=False)
    first, again = copy.deepcopy(model), copy.deepcopy(model)
    work = Work.open(tmp_path / "work", {})
    compress(first, CompressionConfig(rank_ratio=RANK_RATIO), statistics, progress=False, work=work)
    compress(again, CompressionConfig(rank_ratio=RANK_RATIO), statistics, progress=False, work=work)  # reads all of it
    one, two = first.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == torch.bfloat16 for key in one)


@pytest.mark.parametrize("method", METHODS)
def test_the_gauge_is_of_whole_inputs_as_ranges_contain_their_mean(method: str) -> None:
    model = shifted(tiny_bert())
    name, batch = "bert.encoder.layer.0.intermediate.dense", text_batch(model)
    x = read_by(model, name, batch)
    statistics = measured(model, name, method, batch)
    config = CompressionConfig(method, RANK_RATIO, include=(name,))
    low_rank, _ = compress(copy.deepcopy(model), config, statistics, progress=False)
    moments = low_rank.get_submodule(name).down(x).square().mean(dim=0)
    assert moments.max() < 1.05 * moments.min()  # of every channel: they are the same, but for damping
