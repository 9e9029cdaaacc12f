"""compress() edits nothing but linears, reports what it did, and refuses what it cannot do."""

import copy
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_lowrank import (
    CompressionConfig,
    CompressionReport,
    LowRankError,
    LowRankLinear,
    Statistics,
    compress,
    compute_fisher,
)
from hf_lowrank.allocation import uniform_ranks
from hf_lowrank.model.targets import factorizable_linears, find_targets
from hf_lowrank.nn.layers_lowrank import dense_weight
from tests.helpers import outputs, tiny_albert, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": tiny_bert,
    "albert": tiny_albert,
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "t5": tiny_t5,
}
METHODS = ("svd", "fwsvd", "tfwsvd")


def fisher_of(model: PreTrainedModel) -> Statistics:
    ids = token_ids(batch=4)
    labels = torch.tensor([0, 1, 1, 0]) if "SequenceClassification" in type(model).__name__ else ids
    return compute_fisher(
        model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}], progress=False
    )


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_only_targeted_linears_change_and_parameters_are_as_reported(architecture: str, method: str) -> None:
    model = MODELS[architecture]()
    dense, fisher, targets = copy.deepcopy(model), fisher_of(model), list(find_targets(model))
    low_rank, report = compress(model, CompressionConfig(method, 0.25), fisher, progress=False)
    assert low_rank is model
    assert [layer.name for layer in report.layers] == targets
    assert report.parameters_before == dense.num_parameters()
    assert report.parameters_after == low_rank.num_parameters() < dense.num_parameters()
    factorized = {name for name, module in low_rank.named_modules() if isinstance(module, LowRankLinear)}
    assert factorized == set(report.ranks) == set(low_rank.config.ranks)
    before, after = dense.state_dict(), low_rank.state_dict()
    for key in before.keys() & after.keys():
        assert torch.equal(before[key], after[key])
    for name in factorized:
        original = dense.get_submodule(name)
        if original.bias is not None:
            assert torch.equal(low_rank.get_submodule(name).bias, original.bias)


@pytest.mark.parametrize("architecture", MODELS)
def test_full_rank_factors_compute_the_same(architecture: str) -> None:
    """Where all ranks are kept the product is the weight: forced here, since such ranks save nothing."""
    model = MODELS[architecture]()
    expected = outputs(model)
    with pytest.MonkeyPatch.context() as patch:
        full = lambda layers, *rest: {name: min(layer.shape) for name, layer in layers.items()}  # noqa: E731
        patch.setattr(sys.modules["hf_lowrank.compression.compress"], "allocate", full)
        low_rank, report = compress(model, CompressionConfig("svd", 1.0), progress=False)
    assert report.layers
    assert all(layer.relative_error < 1e-5 for layer in report.layers)
    torch.testing.assert_close(outputs(low_rank), expected, rtol=1e-3, atol=1e-4)


def test_reported_errors_are_those_of_the_stored_factors() -> None:
    model = tiny_bert()
    fisher, dense = fisher_of(model), copy.deepcopy(model)
    low_rank, report = compress(model, CompressionConfig("tfwsvd", 0.25), fisher, progress=False)
    for layer in report.layers:
        weight = dense.get_submodule(layer.name).weight.detach()
        delta = weight - dense_weight(low_rank.get_submodule(layer.name)).detach()
        importance = fisher.mean("fisher", layer.name)
        assert layer.relative_error == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
        weighted = ((importance * delta**2).sum() / (importance * weight**2).sum()).sqrt()
        assert layer.weighted_error == pytest.approx(float(weighted), rel=1e-3)
        assert len(layer.trace) > 1


def test_each_method_is_best_under_its_own_weights() -> None:
    model = tiny_bert()
    fisher = fisher_of(model)
    errors = {}
    for method in METHODS:
        dense = copy.deepcopy(model)
        low_rank, _ = compress(copy.deepcopy(model), CompressionConfig(method, 0.25), fisher, progress=False)
        for name in find_targets(model):
            delta = (dense_weight(dense.get_submodule(name)) - dense_weight(low_rank.get_submodule(name))).detach()
            importance = fisher.mean("fisher", name)
            figures = {
                "svd": delta.square(),
                "fwsvd": importance.sum(0) * delta.square(),
                "tfwsvd": importance * delta.square(),
            }
            errors.setdefault(name, {})[method] = {key: float(value.sum()) for key, value in figures.items()}
    for by_method in errors.values():
        for method in METHODS:
            assert by_method[method][method] <= min(figures[method] for figures in by_method.values()) * 1.0001


def test_ranks_that_save_nothing_leave_the_layer_dense_and_say_so() -> None:
    model = tiny_bert()
    low_rank, report = compress(model, CompressionConfig("svd", 0.6), progress=False)
    square = [layer for layer in report.layers if layer.out_features == layer.in_features]
    assert square
    assert all(layer.rank is None and layer.note == "factors save nothing" for layer in square)
    assert all(isinstance(low_rank.get_submodule(layer.name), torch.nn.Linear) for layer in square)
    assert "factors save nothing" in str(report)


def test_every_dense_layer_is_let_go_before_the_next_is_solved() -> None:
    model = tiny_bert()
    dense = [weakref.ref(target.module) for target in find_targets(model).values()]
    alive: list[int] = []
    factorize = LowRankLinear.from_factors.__func__

    def count(cls: type, *arguments: torch.Tensor) -> LowRankLinear:
        alive.append(sum(reference() is not None for reference in dense))
        return factorize(cls, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRankLinear, "from_factors", classmethod(count))
        compress(model, CompressionConfig("svd", 0.25), progress=False)
    assert alive[::2] == list(range(12, 0, -1))  # factors are made once to be solved and once to be put in place


def test_half_precision_models_keep_their_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        low_rank, report = compress(tiny_bert().to(dtype), CompressionConfig("svd", 0.25), progress=False)
        assert {parameter.dtype for parameter in low_rank.parameters()} == {dtype}
        assert all(0 < layer.relative_error < 1 for layer in report.layers)


def test_include_and_exclude_choose_layers() -> None:
    def chosen(**patterns: tuple[str, ...]) -> set[str]:
        _, report = compress(tiny_bert(), CompressionConfig("svd", 0.25, **patterns), progress=False)
        return set(report.ranks)

    everything = chosen()
    assert len(everything) == 12
    assert chosen(include=("query", "*.1.output.*")) == {
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.output.dense",
    }
    assert chosen(exclude=("attention.*",)) == {name for name in everything if "attention" not in name}
    assert chosen(include=("pooler.dense",)) == {"bert.pooler.dense"}


def test_heads_poolers_and_tied_layers_are_not_targets() -> None:
    assert not any("pooler" in name or "classifier" in name for name in find_targets(tiny_bert()))
    assert "lm_head" not in factorizable_linears(tiny_llama())
    assert not any("embeddings" in name or "lm_head" in name for name in find_targets(tiny_gpt2()))


def test_a_shared_layer_is_factorized_once_and_stays_shared() -> None:
    model = tiny_albert()
    low_rank, report = compress(model, CompressionConfig("svd", 0.25), progress=False)
    assert len(report.ranks) == 6  # one group of one layer, used three times
    assert report.parameters_after == sum(p.numel() for p in low_rank.parameters())


def test_a_compressed_model_can_be_compressed_further() -> None:
    model, first = compress(tiny_bert(), CompressionConfig("svd", 0.25, include=("query",)), progress=False)
    again, second = compress(model, CompressionConfig("svd", 0.25, include=("intermediate.dense",)), progress=False)
    assert set(again.config.ranks) == set(first.ranks) | set(second.ranks)


def test_factors_are_not_factorized_on_their_own(tmp_path: Path) -> None:
    model, first = compress(tiny_bert(), CompressionConfig("svd", 0.25, include=("query",)), progress=False)
    model, second = compress(model, CompressionConfig("svd", 0.2), progress=False)
    assert set(first.ranks) < set(second.ranks)
    assert not any(name.endswith((".up", ".down")) for name in second.ranks)
    model.save_pretrained(tmp_path)
    assert (
        AutoModelForSequenceClassification.from_pretrained(tmp_path).config.ranks == model.config.ranks == second.ranks
    )


def test_reports_survive_json() -> None:
    model = tiny_bert()
    _, report = compress(model, CompressionConfig("tfwsvd", 0.25), fisher_of(model), progress=False)
    assert CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()
    assert "12 layers factorized by tfwsvd" in report.summary()
    assert report.targeted_after == sum(layer.parameters_after for layer in report.layers) < report.targeted_before


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_rank_ratios_outside_the_interval_are_refused(ratio: float) -> None:
    with pytest.raises(LowRankError, match="rank_ratio must be "):
        CompressionConfig("svd", ratio)


def test_bad_input_is_refused_before_anything_is_edited() -> None:
    model = tiny_bert()
    state = str(model)
    with pytest.raises(LowRankError, match="unknown method 'fsvd'"):
        CompressionConfig("fsvd")
    with pytest.raises(LowRankError, match="pattern 'quary' matches none of the 14 linear layers"):
        compress(model, CompressionConfig("svd", include=("quary",)))
    with pytest.raises(LowRankError, match="no linear layer to factorize"):
        compress(model, CompressionConfig("svd", exclude=("*",)))
    with pytest.raises(LowRankError, match="'fwsvd' needs statistics"):
        compress(model, CompressionConfig("fwsvd"))
    with pytest.raises(LowRankError, match="measured on other weights"):
        compress(model, CompressionConfig("fwsvd"), fisher_of(tiny_bert(seed=1)))
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(LowRankError, match=r"layer\.1\.output\.dense: 1 of its \d+ weights are not finite"):
        compress(model, CompressionConfig("svd"))
    assert str(model) == state


def test_uniform_ranks_are_shares_of_the_smaller_side() -> None:
    ranks = uniform_ranks({"a": (384, 1536), "b": (10, 3)}, 0.33)
    assert ranks == {"a": 127, "b": 1}


@pytest.mark.parametrize("architecture", MODELS)
def test_the_gauge_changes_factors_and_no_output(architecture: str) -> None:
    dense = MODELS[architecture]()
    flat, balanced = (
        compress(copy.deepcopy(dense), CompressionConfig("svd", 0.25, gauge=gauge), progress=False)[0].double()
        for gauge in ("flat", "balanced")
    )
    torch.testing.assert_close(outputs(flat), outputs(balanced), rtol=1e-4, atol=1e-5)
    name, layer = next((name, m) for name, m in flat.named_modules() if isinstance(m, LowRankLinear))
    assert not torch.allclose(layer.down.weight, balanced.get_submodule(name).down.weight)
    norms = layer.down.weight.norm(dim=1)
    assert norms.max() / norms.min() < 1.5  # of the channels: no one stands out


def test_the_gauge_of_an_embedding_and_its_tied_head_keeps_the_tie() -> None:
    dense = tiny_gpt2()
    config = CompressionConfig("svd", 0.25, include=("wte",))
    flat, _ = compress(copy.deepcopy(dense), config, progress=False)
    balanced, _ = compress(dense, CompressionConfig("svd", 0.25, include=("wte",), gauge="balanced"), progress=False)
    torch.testing.assert_close(outputs(flat), outputs(balanced), rtol=1e-4, atol=1e-5)
    embedding, head = flat.get_input_embeddings(), flat.get_output_embeddings()
    assert head.up.weight is embedding.down.weight
    assert head.down.weight is embedding.up.weight
