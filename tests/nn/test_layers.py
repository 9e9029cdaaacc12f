"""Factorized layers that are no two plain linears: the minimal form, and embeddings with what is tied to them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
)
from transformers.pytorch_utils import Conv1D

from hf_lowrank import CompressionConfig, CompressionReport, compress, compute_statistics
from hf_lowrank.compression.forms import to_form
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.densify import densify
from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.nn.layers_lowrank import InterpolativeLinear, LowRankEmbedding, LowRankTiedHead, dense_weight
from hf_lowrank.nn.modeling_lowrank import to_low_rank_class
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.interpolative import LARGEST_COEFFICIENT, interpolative
from tests.helpers import (
    HIDDEN,
    RANK,
    VOCABULARY,
    bert_config,
    block_linears,
    factorize,
    outputs,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_ids,
    truncated_svd,
)

# The interpolative form


def interpolated(linear: nn.Module, rank: int) -> InterpolativeLinear:
    factors = interpolative(Factors(*truncated_svd(dense_weight(linear), rank)))
    return InterpolativeLinear.from_factors(linear, factors.up, factors.down)


def with_interpolative_layers(model: Any, rank: int = RANK) -> Any:
    to_low_rank_class(model)
    for name in block_linears(model):
        replace_module(model, name, interpolated(model.get_submodule(name), rank))
    return model


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (64, 64)])
@pytest.mark.parametrize("rank", [1, 7, 20, 32])
def test_the_product_is_kept_with_the_parameters_of_its_rank_and_small_coefficients(
    shape: tuple[int, int], rank: int
) -> None:
    torch.manual_seed(0)
    scale = torch.logspace(0, -6, rank, dtype=torch.float64)  # ill conditioned
    factors = Factors(torch.randn(shape[0], rank).double() * scale, torch.randn(rank, shape[1]).double())
    found = interpolative(factors)
    torch.testing.assert_close(found.product(), factors.product(), rtol=1e-9, atol=1e-12)
    assert found.down.abs().max() <= LARGEST_COEFFICIENT
    columns = found.down.sort(dim=1)  # r columns are the identity, bitwise
    assert columns.values.shape == found.down.shape
    layer = InterpolativeLinear.from_factors(nn.Linear(shape[1], shape[0], bias=False).double(), found.up, found.down)
    assert sum(p.numel() for p in layer.parameters()) == rank * (sum(shape) - rank)
    torch.testing.assert_close(layer.product(), factors.product(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("linear", [nn.Linear(32, 48), nn.Linear(48, 32, bias=False), Conv1D(48, 32)], ids=repr)
def test_an_interpolative_layer_computes_what_plain_factors_compute(linear: nn.Module) -> None:
    input = torch.randn(2, 5, dense_weight(linear).shape[1])
    up, down = truncated_svd(dense_weight(linear), 9)
    layer = interpolated(linear, 9)
    expected = input @ down.T @ up.T + (0 if linear.bias is None else linear.bias)
    torch.testing.assert_close(layer(input), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight @ torch.eye(input.shape[-1]), up @ down, rtol=1e-4, atol=1e-5)
    low = layer.bfloat16()
    assert low.down.order.dtype == torch.int32
    torch.testing.assert_close(low(input.bfloat16()).float(), expected, rtol=3e-2, atol=3e-2)


def test_a_models_form_is_changed_and_changed_back() -> None:
    model = factorize(tiny_bert())
    expected, before = outputs(model), model.num_parameters()
    model.bert.encoder.layer[0].output.dense.requires_grad_(False)
    assert to_form(model, "interpolative") is model
    assert before - model.num_parameters() == 12 * RANK**2
    assert set(model.config.forms.values()) == {"interpolative"}
    assert not model.bert.encoder.layer[0].output.dense.up.weight.requires_grad
    assert model.bert.encoder.layer[1].output.dense.up.weight.requires_grad
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-6)
    to_form(model, "factors")
    assert (model.num_parameters(), model.config.forms) == (before, {})
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(LowRankError, match="unknown form 'thin'; there are factors, interpolative"):
        to_form(model, "thin")
    with pytest.raises(LowRankError, match="BertForSequenceClassification is not a low-rank model"):
        to_form(tiny_bert(), "interpolative")


def test_factors_without_the_identity_are_refused() -> None:
    with pytest.raises(ValueError, match="the identity in 4 of its columns"):
        InterpolativeLinear.from_factors(nn.Linear(32, 48), torch.randn(48, 4), torch.randn(4, 32))


@pytest.mark.parametrize(
    ("make", "auto_class"),
    [
        (tiny_bert, AutoModelForSequenceClassification),
        (tiny_gpt2, AutoModelForCausalLM),
        (tiny_llama, AutoModelForCausalLM),
    ],
)
def test_interpolative_models_survive_a_round_trip(make: Any, auto_class: Any, tmp_path: Path) -> None:
    model = with_interpolative_layers(make())
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["forms"] == dict.fromkeys(model.lowrank_ranks, "interpolative")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = auto_class.from_pretrained(tmp_path, dtype=dtype)
        expected, found = copy.deepcopy(model).to(dtype).state_dict(), loaded.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert torch.equal(outputs(auto_class.from_pretrained(tmp_path)), outputs(model))
    built = auto_class.from_config(AutoConfig.from_pretrained(tmp_path))  # random weights, of the size of the base's
    std = dense_weight(built.get_submodule(next(iter(model.lowrank_ranks)))).std()
    assert 0.012 < std < 0.03
    body = AutoModel.from_pretrained(tmp_path)
    assert len(body.lowrank_ranks) == len(model.lowrank_ranks)
    assert torch.equal(outputs(body), outputs(model.base_model))


def test_interpolative_layers_train_and_export() -> None:
    model = with_interpolative_layers(tiny_bert())
    exported = torch.export.export(model, (token_ids(),)).module()(token_ids()).logits
    torch.testing.assert_close(exported, outputs(model))
    model.train()(input_ids=token_ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
    layer = model.bert.encoder.layer[0].output.dense
    assert all(factor.weight.grad.abs().sum() > 0 for factor in layer.linear_factors())


def test_a_missing_part_of_an_interpolative_layer_is_an_error(tmp_path: Path) -> None:
    with_interpolative_layers(tiny_bert()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for part in ("down.rest.weight", "down.order"):
        key = f"bert.encoder.layer.1.output.dense.{part}"
        save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"layer\.1\.output\.dense has rank 8 .*lacks .*{part}"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"a.b": "thin"}, "'a.b' the form 'thin'; this code knows factors, interpolative: upgrade"),
        ({"c": "factors"}, "names 'c', which `ranks` does not"),
        (["a.b"], "maps module names to forms"),
    ],
)
def test_bad_forms_in_a_config_are_an_error(forms: Any, message: str, tmp_path: Path) -> None:
    with_interpolative_layers(tiny_bert()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ranks": {"a.b": 2}, "forms": forms}))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


# Embeddings


def masked_lm() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(bert_config()).eval()


def tied_llama() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def with_low_rank_embedding(model: Any, rank: int = RANK) -> Any:
    to_low_rank_class(model)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    factors = truncated_svd(dense_weight(embedding), rank)
    replace_module(model, name, LowRankEmbedding.from_factors(embedding, *factors))
    return model


EMBEDDED = [
    pytest.param(tiny_bert, AutoModelForSequenceClassification, id="bert"),
    pytest.param(masked_lm, AutoModelForMaskedLM, id="bert masked lm, tied with a bias"),
    pytest.param(tiny_gpt2, AutoModelForCausalLM, id="gpt2, tied"),
    pytest.param(tied_llama, AutoModelForCausalLM, id="llama, tied"),
    pytest.param(tiny_llama, AutoModelForCausalLM, id="llama"),
    pytest.param(tiny_t5, AutoModelForSeq2SeqLM, id="t5, three tied"),
]


@pytest.mark.parametrize(("make", "auto_class"), EMBEDDED)
def test_an_embedding_of_full_rank_and_what_is_tied_to_it_compute_the_same(make: Any, auto_class: Any) -> None:
    model = make()
    expected, before = outputs(model), model.num_parameters()
    with_low_rank_embedding(model, HIDDEN)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-3, atol=1e-4)
    assert model.num_parameters() == before + HIDDEN * HIDDEN  # the table is as large, and was counted once


@pytest.mark.parametrize(("make", "auto_class"), EMBEDDED)
def test_low_rank_embeddings_survive_a_round_trip(make: Any, auto_class: Any, tmp_path: Path) -> None:
    model = with_low_rank_embedding(make())
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.lowrank_ranks == model.lowrank_ranks == loaded.config.ranks
    assert len(loaded.lowrank_ranks) == 1
    assert (
        loaded.num_parameters()
        == model.num_parameters()
        == make().num_parameters() - (VOCABULARY * HIDDEN - RANK * (VOCABULARY + HIDDEN))
    )
    assert torch.equal(outputs(loaded), outputs(model))
    ids = lambda one: {key: id(value) for key, value in one.named_parameters(remove_duplicate=False)}  # noqa: E731
    assert len(set(ids(loaded).values())) == len(set(ids(model).values()))
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(value.numel() for value in stored.values()) == model.num_parameters()
    loaded.tie_weights()  # as after a change
    assert len(set(ids(loaded).values())) == len(set(ids(model).values()))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body.get_input_embeddings(), LowRankEmbedding)


def test_a_tied_head_shares_the_factors_and_trains_with_them() -> None:
    model = with_low_rank_embedding(tied_llama())
    assert isinstance(model.lm_head, LowRankTiedHead)
    assert model.lm_head.up.weight is model.model.embed_tokens.down.weight
    assert model.lm_head.down.weight is model.model.embed_tokens.up.weight
    torch.testing.assert_close(model.lm_head.product(), model.model.embed_tokens.product().T)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()  # PEFT unties what differs
    torch.optim.SGD(model.parameters(), 0.1).zero_grad()
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert model.model.embed_tokens.down.weight.grad.abs().sum() > 0
    other = copy.deepcopy(model)
    assert other.lm_head.up.weight is other.model.embed_tokens.down.weight
    generated = model.eval().generate(token_ids(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape[1] >= 4


@pytest.mark.parametrize("make", [tiny_bert, tied_llama, tiny_llama])
def test_tokens_can_be_added(make: Any, tmp_path: Path) -> None:
    model = with_low_rank_embedding(make())
    expected = model.get_input_embeddings()(token_ids())
    model.resize_token_embeddings(VOCABULARY + 3)
    embedding = model.get_input_embeddings()
    assert embedding.weight.shape == (VOCABULARY + 3, HIDDEN)
    assert torch.equal(embedding(token_ids()), expected)
    assert outputs(model, input_ids=token_ids() + 2).isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, input_ids=token_ids() + 2), outputs(model, input_ids=token_ids() + 2))


def test_code_that_reads_the_weight_of_an_embedding_gets_it() -> None:
    embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=0)
    layer = LowRankEmbedding.from_factors(embedding, *truncated_svd(dense_weight(embedding), HIDDEN))
    assert (layer.weight.shape, layer.weight.dtype, layer.padding_idx) == ((VOCABULARY, HIDDEN), torch.float32, 0)
    torch.testing.assert_close(layer.weight + 0, embedding.weight.detach() + 0, rtol=1e-4, atol=1e-5)
    weight: Tensor = layer.weight
    torch.testing.assert_close(nn.functional.embedding(token_ids(), weight), embedding(token_ids()), atol=1e-4, rtol=1)


def test_embeddings_that_cannot_be_replaced_are_refused() -> None:
    model = tiny_t5()
    with pytest.raises(ValueError, match="its weight is tied to shared.weight, replace that one"):
        replace_module(model, "encoder.embed_tokens", LowRankEmbedding.like(model.shared, 4))
    with pytest.raises(ValueError, match="rank 33 for an embedding of 64 inputs and 32 outputs"):
        LowRankEmbedding.like(model.shared, 33)


# In a compression


def compressed(form: str, **settings: Any) -> tuple[Any, CompressionReport]:
    config = CompressionConfig("svd", form=form, allocation="uniform", **settings)
    return compress(tiny_bert(), config, progress=False)


def test_the_interpolative_form_buys_rank_at_the_same_number_of_parameters(tmp_path: Path) -> None:
    (plain, plain_report), (model, report) = (
        compressed("factors", rank_ratio=0.4),
        compressed("interpolative", rank_ratio=0.4),
    )
    assert sum(report.ranks.values()) > 1.1 * sum(plain_report.ranks.values())
    assert model.num_parameters() == report.parameters_after <= plain.num_parameters()
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer in report.layers}
    assert report.targeted_after == sum(rank * (sum(shapes[name]) - rank) for name, rank in report.ranks.items())
    errors = [[layer.relative_error for layer in one.layers] for one in (plain_report, report)]
    assert all(more > less for more, less in zip(*errors, strict=True))
    assert set(model.config.forms) == set(report.ranks)
    budget = plain.num_parameters()
    model, report = compressed("interpolative", params=budget)
    assert 0.97 * budget < model.num_parameters() == report.parameters_after <= budget
    with pytest.raises(LowRankError, match="a latency budget is for plain factors"):
        compressed("interpolative", latency=0.9)


def test_layers_that_no_sample_reached_stay_dense_and_are_named() -> None:
    """Its zero Fisher information says that an expert nobody was routed to can go; it says so for want of data."""
    model = tiny_bert()
    attention = model.bert.encoder.layer[1].attention.self
    attention.register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))
    batch = {"input_ids": token_ids(), "labels": torch.tensor([0, 1, 0])}
    for method in ("kfac", "tfwsvd"):
        config = CompressionConfig(method, 0.25)
        statistics = compute_statistics(model, [batch], config.needs, progress=False)
        low_rank, report = compress(copy.deepcopy(model), config, statistics, progress=False)
        unreached = [layer for layer in report.layers if layer.note == "no sample reached it"]
        assert [layer.name.rpartition(".")[2] for layer in unreached] == ["query", "key", "value"]
        assert all(type(low_rank.get_submodule(layer.name)) is nn.Linear for layer in unreached)
        assert len(report.ranks) > 5


@pytest.mark.parametrize(("make", "auto_class"), EMBEDDED)
def test_a_model_with_a_low_rank_embedding_is_densified(make: Any, auto_class: Any, tmp_path: Path) -> None:
    model = with_low_rank_embedding(make())
    expected = outputs(model)
    dense = densify(model)
    assert type(dense) is type(make())
    assert dense.num_parameters() == make().num_parameters()
    torch.testing.assert_close(outputs(dense), expected, rtol=1e-3, atol=1e-4)
    dense.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(auto_class.from_pretrained(tmp_path)), outputs(dense))


# Statistics of embeddings


def naive_fisher(model: Any, name: str, batch: dict[str, Tensor]) -> Tensor:
    """Σ_n (∂ loss_n / ∂ weight)² [width, tokens], through all uses of the weight, by autograd alone."""
    weight = model.get_submodule(name).weight
    total = torch.zeros_like(weight)
    for n in range(len(batch["labels"])):
        model.zero_grad()
        model(**{key: value[n : n + 1] for key, value in batch.items()}).loss.backward()
        total += weight.grad**2
    return total.T


LABELLED = {"input_ids": token_ids(), "labels": token_ids(1)}
TABLES = [
    pytest.param(tiny_bert, "word_embeddings", LABELLED | {"labels": torch.tensor([0, 1, 0])}, id="bert"),
    pytest.param(tiny_bert, "position_embeddings", LABELLED | {"labels": torch.tensor([0, 1, 0])}, id="positions"),
    pytest.param(masked_lm, "word_embeddings", LABELLED, id="bert masked lm, tied"),
    pytest.param(tiny_gpt2, "wte", LABELLED, id="gpt2, tied"),
    pytest.param(tied_llama, "embed_tokens", LABELLED, id="llama, tied"),
    pytest.param(tiny_llama, "embed_tokens", LABELLED, id="llama"),
    pytest.param(tiny_t5, "shared", LABELLED, id="t5, three tied"),
]


@pytest.mark.parametrize(("make", "pattern", "batch"), TABLES)
def test_the_fisher_of_an_embedding_is_that_of_autograd(make: Any, pattern: str, batch: dict[str, Tensor]) -> None:
    model = make()
    found = compute_statistics(
        model, [batch], ["fisher", "fisher_rows", "activation_moment", "gradient_moment"], include=[pattern],
        progress=False,
    )  # fmt: skip
    ((name, fisher),) = found.sums["fisher"].items()
    expected = naive_fisher(model, name, batch)
    atol = 1e-5 * float(expected.max())
    torch.testing.assert_close(fisher, expected, rtol=1e-3, atol=atol)
    torch.testing.assert_close(found.sums["fisher_rows"][name], expected.sum(dim=0), rtol=1e-3, atol=10 * atol)
    assert found.sums["activation_moment"][name].shape == (fisher.shape[1],)
    assert found.sums["gradient_moment"][name].shape == (fisher.shape[0],) * 2


def test_the_moments_of_an_embedding_count_its_tokens() -> None:
    model, batch = tiny_bert(), LABELLED | {"labels": torch.tensor([0, 1, 0])}
    found = compute_statistics(model, [batch], ["activation_moment", "active_tokens"], include=["word_embeddings"])
    (counts,) = found.sums["activation_moment"].values()
    assert torch.equal(counts, token_ids().flatten().bincount(minlength=VOCABULARY).float())
    (tokens,) = found.sums["active_tokens"].values()
    assert tokens == token_ids().numel()


def test_moments_through_a_tied_head_have_unit_mass_for_every_token() -> None:
    model = tied_llama()
    found = compute_statistics(model, [LABELLED], ["activation_moment", "active_tokens"], include=["embed_tokens"])
    (mass,), (tokens,) = found.sums["activation_moment"].values(), found.sums["active_tokens"].values()
    assert mass.sum() == pytest.approx(float(tokens), rel=1e-4)
    read, predicted = token_ids().numel(), token_ids().numel() - len(token_ids())
    assert tokens == read + predicted - len(token_ids())  # the last token of a text is read, but predicts nothing


@pytest.mark.parametrize("method", ["svd", "fwsvd", "fwsvd2", "tfwsvd", "asvd", "whiten", "whiten-diag", "kfac"])
@pytest.mark.parametrize(("make", "pattern"), [(tiny_bert, "word_embeddings"), (tied_llama, "embed_tokens")])
def test_every_method_in_one_pass_factorizes_embeddings(method: str, make: Any, pattern: str, tmp_path: Path) -> None:
    model = make()
    batch = LABELLED if make is tied_llama else LABELLED | {"labels": torch.tensor([0, 1, 0])}
    config = CompressionConfig(method, 0.5, allocation="uniform", include=(pattern, "layer.*", "layers.*")[:1])
    statistics = compute_statistics(model, [batch], config.needs, include=config.include) if config.needs else None
    low_rank, report = compress(model, config, statistics, progress=False)
    (layer,) = report.layers
    assert (layer.rank, layer.parameters_after) == (HIDDEN // 2, HIDDEN // 2 * (HIDDEN + VOCABULARY))
    assert low_rank.num_parameters() == report.parameters_after
    low_rank.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(low_rank).from_pretrained(tmp_path)), outputs(low_rank))


def test_tokens_that_are_read_keep_their_vectors() -> None:
    """By the counts alone, eight tokens that are all that is read keep their vectors at rank eight."""
    model, ids = tiny_bert(), torch.arange(5, 13)[None]
    vectors = model.bert.embeddings.word_embeddings.weight.detach().clone()
    batch = {"input_ids": ids, "labels": torch.tensor([1])}
    config = CompressionConfig("whiten", 0.25, include=("word_embeddings",))
    statistics = compute_statistics(model, [batch], config.needs, include=config.include, progress=False)
    low_rank, _ = compress(model, config, statistics, progress=False)
    change = (low_rank.bert.embeddings.word_embeddings.weight - vectors).norm(dim=1) / vectors.norm(dim=1)
    assert change[5:13].max() < 0.05
    assert change[13:].mean() > 0.5


def test_what_embeddings_cannot_have_is_refused() -> None:
    batch = LABELLED | {"labels": torch.tensor([0, 1, 0])}
    with pytest.raises(LowRankError, match="word_embeddings: kronecker_in cannot be measured of an embedding"):
        compute_statistics(tiny_bert(), [batch], ["kronecker_in"], include=["word_embeddings"])
    with pytest.raises(LowRankError, match="interpolative form is for linear layers"):
        compressed("interpolative", include=("word_embeddings",))
