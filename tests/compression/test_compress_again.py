"""Compressing a compressed model is compressing all of it, and everything said of it is relative to the dense one."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionReport, LowRankError, compress, compute_statistics
from hf_lowrank.allocation import BUDGETS, parameters
from hf_lowrank.compression.compress import check_possible
from hf_lowrank.compression.profiling import profile_losses
from hf_lowrank.compression.search import search_smallest
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.folder.card import render_card
from hf_lowrank.folder.densify import densify
from hf_lowrank.folder.earlier import of_original
from hf_lowrank.folder.inspect import inspect
from hf_lowrank.folder.saving import read_record, save_compressed
from hf_lowrank.folder.scores import comparable, with_score
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.model.targets import find_targets
from hf_lowrank.model.weights import digest, whole_weight
from hf_lowrank.nn.layers_lowrank import LowRankConv, LowRankEmbedding, LowRankLayer
from hf_lowrank.solvers import METHODS, get_method
from tests.helpers import outputs, tiny_albert, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from tests.nn.test_experts import mixtral
from tests.statistics.test_convolutions import images, tiny_resnet

ROWS = {"data": "rows", "splits": ["validation"], "rows": 20, "digest": "the same"}


def conv1d_and_tied_embedding() -> PreTrainedModel:
    return tiny_gpt2()


def tied_llama() -> PreTrainedModel:
    return tiny_llama(tie_word_embeddings=True)


def bert() -> PreTrainedModel:
    return tiny_bert(initializer_range=0.3)


# {what: (the model, what is targeted at first)}
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], tuple[str, ...] | None]] = {
    "linear": (bert, None),
    "shared": (tiny_albert, None),
    "Conv1D": (conv1d_and_tied_embedding, None),
    "embedding and tied head": (tied_llama, ("embed_tokens", "*_proj")),
    "Conv1D and tied embedding": (conv1d_and_tied_embedding, ("wte", "c_attn", "c_fc", "c_proj")),
    "convolution": (tiny_resnet, ("convolution",)),
    "experts": (lambda: mixtral(layers=1), None),
}


def batches(model: PreTrainedModel) -> list[dict[str, Any]]:
    if "pixel_values" in model.main_input_name:
        return [images()]
    ids = token_ids(batch=8)
    labels = torch.arange(8) % 2 if "SequenceClassification" in type(model).__name__ else ids
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}]


def computed(model: PreTrainedModel) -> Tensor:
    inputs = {key: value for key, value in batches(model)[0].items() if key != "labels"}
    return outputs(model, **inputs)


def step(model: PreTrainedModel, config: CompressionConfig, **more: Any) -> tuple[Any, CompressionReport]:
    chosen: Any = {"include": config.include, "exclude": config.exclude, "progress": False}
    statistics = compute_statistics(model, batches(model), config.needs, **chosen) if config.needs else None
    return compress(model, config, statistics, progress=False, **more)


def half(method: str = "kfac", include: tuple[str, ...] | None = None, **settings: Any) -> CompressionConfig:
    return CompressionConfig(method, include=include, **settings or {"keep": 0.5})


# -- in two steps and in one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_two_steps_cost_what_one_does_and_lose_about_as_much(kind: str, tmp_path: Path) -> None:
    build, include = MODELS[kind]
    dense = build()
    size, expected = dense.num_parameters(), computed(dense)
    at_once, single = step(copy.deepcopy(dense), half(include=include, keep=0.3))
    first, _ = step(dense, half(include=include))
    found = set(first.config.ranks)
    assert found <= set(find_targets(first))  # also what only a pattern had named
    again, report = step(first, half(include=include, keep=0.3))
    assert set(again.config.ranks) == set(report.ranks) >= found
    assert report.parameters_before == single.parameters_before == size
    assert report.parameters_after == again.num_parameters()
    assert report.targeted_before == single.targeted_before
    assert 0.27 < report.targeted_after / report.targeted_before <= 0.3
    lost, least = ((computed(model) - expected).norm() / expected.norm() for model in (again, at_once))
    assert lost < 1.3 * least + 1e-3
    again.save_pretrained(tmp_path / "again")
    auto = {"linear": AutoModelForSequenceClassification, "shared": AutoModelForSequenceClassification}
    loaded = auto.get(kind, AutoModelForCausalLM).from_pretrained(tmp_path / "again") if kind != "convolution" else None
    if loaded is not None:
        torch.testing.assert_close(computed(loaded), computed(again))
    low_rank = computed(again)
    restored = densify(again)
    assert restored.num_parameters() == size
    torch.testing.assert_close(computed(restored), low_rank, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("svd", "kfac")])
def test_every_method_compresses_further(method: str) -> None:
    dense = bert()
    expected = computed(dense)
    at_once, single = step(copy.deepcopy(dense), half(method, rank_ratio=0.2))
    first, _ = step(dense, half(method, rank_ratio=0.5))
    again, report = step(first, half(method, rank_ratio=0.2))
    allowed = sum(parameters(target.shape, round(0.2 * 32)) for target in find_targets(bert()).values())
    for each in (report, single):
        assert allowed - 96 < each.targeted_after <= allowed  # a step of the largest layer
    lost, least = ((computed(model) - expected).norm() for model in (again, at_once))
    assert lost < 1.5 * least


def test_plain_svd_in_two_steps_is_that_of_one() -> None:
    """The best approximation at rank 6 of the best one at rank 16 is the best one at rank 6."""
    at_once, single = step(bert(), half("svd", rank_ratio=0.2))
    again, report = step(step(bert(), half("svd", rank_ratio=0.5))[0], half("svd", rank_ratio=0.2))
    assert report.ranks == single.ranks
    torch.testing.assert_close(computed(again), computed(at_once), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("budget", [budget for budget in BUDGETS if budget != "bytes"])  # which test_bytes is about
def test_budgets_count_against_the_dense_model(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a layer that was factorized before and is no target now, whose parameters stay what they are."""
    monkeypatch.setattr("hf_lowrank.compression.latency.measured_latency", lambda layers, dtype, device: parameters)
    dense = tiny_bert()
    size = dense.num_parameters()
    first, _ = step(dense, half("svd", rank_ratio=0.4))
    query, other = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"
    layers = {name: target.shape for name, target in find_targets(first, exclude=(query,)).items()}
    assert other in layers
    whole = sum(parameters(shape, None) for shape in layers.values())
    values = {
        "rank_ratio": 0.2,
        "keep": 0.3,
        "keep_model": 0.55,
        "params": 0.55 * size,
        "flops": 2 * 0.3 * whole,
        "latency": 0.3,
    }
    again, report = step(first, half("svd", exclude=(query,), align=1, **{budget: values[budget]}))
    after, least = report.targeted_after, min(map(sum, layers.values()))
    allowed = {
        "rank_ratio": sum(parameters(shape, round(0.2 * min(shape))) for shape in layers.values()),
        "keep": 0.3 * whole,
        "keep_model": 0.55 * size - (again.num_parameters() - after),
        "params": 0.55 * size - (again.num_parameters() - after),
        "flops": 0.3 * whole,
        "latency": 0.3 * whole,
    }[budget]
    assert allowed - len(layers) * least < after <= allowed
    assert again.config.ranks[query] == 13
    assert report.parameters_before == size
    assert [(layer.name, layer.rank) for layer in report.untouched] == [(query, 13)]


# -- layers that stay --------------------------------------------------------------------------------------------------


def test_layers_stay_at_the_rank_they_have_where_the_budget_allows_it() -> None:
    first, before = step(bert(), half(rank_ratio=0.4))
    kept = {name: first.get_submodule(name) for name in before.ranks}
    _, report = step(first, half("svd", rank_ratio=0.3))
    for layer in report.layers:
        assert layer.rank is not None
        assert layer.rank <= before.ranks.get(layer.name, 32)
        stays = first.get_submodule(layer.name) is kept.get(layer.name)
        assert stays == (layer.note == "stays at its rank") == (layer.rank == before.ranks.get(layer.name))
        assert (layer.relative_error == 0) == stays
        assert layer.parameters_before == layer.out_features * layer.in_features
        assert layer.parameters_after == layer.rank * (layer.out_features + layer.in_features)
    assert 0 < sum(bool(layer.note) for layer in report.layers) < len(report.layers)
    assert "left at the rank they had" in report.summary()
    assert "stays at its rank" in str(report)


@pytest.mark.parametrize("settings", [{"rank_ratio": 0.4}, {"rank_ratio": 0.25}, {"keep": 0.5}, {"params": 40_000}])
def test_a_budget_that_asks_for_nothing_is_refused(settings: dict[str, float]) -> None:
    first, _ = step(tiny_bert(), half("svd", rank_ratio=0.25))
    now = {"keep": ", to 0.4375", "params": f", to {first.num_parameters():,}"}.get(next(iter(settings)), "")
    with pytest.raises(LowRankError, match=f"would leave every layer as it is: the model was .* before{now}, and"):
        check_possible(first, half("svd", **settings))
    check_possible(first, half("svd", rank_ratio=0.2))


def test_the_spectrum_has_as_many_values_as_the_rank() -> None:
    config = half("kfac", rank_ratio=0.25, allocation="uniform")
    first, _ = step(bert(), config)
    targets = find_targets(first)
    statistics = compute_statistics(first, batches(first), config.needs, progress=False)
    solver = LayerSolver(targets, get_method("kfac"), statistics)
    for name, target in targets.items():
        assert isinstance(target.module, LowRankLayer)
        assert int(solver.spectrum(name).count_nonzero()) == target.rank == 8


def test_layers_that_were_left_dense_are_targets_too() -> None:
    first, before = step(bert(), half("svd", include=("query",), rank_ratio=0.25))
    again, report = step(first, half("svd", rank_ratio=0.2))
    assert len(before.ranks) == 2
    assert len(report.ranks) == len(again.config.ranks) == 12
    assert not report.untouched


# -- what is measured of a layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "experts"])
def test_statistics_of_factors_are_those_of_the_dense_layer(kind: str) -> None:
    build, include = MODELS[kind]
    low_rank, _ = step(build(), half("svd", include))
    dense = densify(copy.deepcopy(low_rank))
    kinds = ("fisher", "fisher_rows", "activation_moment", "gradient_moment", "active_tokens")
    found = compute_statistics(low_rank, batches(low_rank), kinds, progress=False)
    expected = compute_statistics(dense, batches(dense), kinds, include=tuple(low_rank.config.ranks), progress=False)
    assert set(found.weights) == set(low_rank.config.ranks)
    for statistic in kinds:
        for name, total in found.sums[statistic].items():
            theirs = expected.sums[statistic][name]
            assert total.shape == theirs.shape
            torch.testing.assert_close(total, theirs, rtol=2e-3, atol=1e-4 * float(theirs.abs().max()))


def test_both_factors_decide_the_digest() -> None:
    low_rank, report = step(bert(), half("svd", rank_ratio=0.25))
    layer = low_rank.get_submodule(next(iter(report.ranks)))
    seen = {digest(layer)}
    for factor in layer.linear_factors():
        with torch.no_grad():
            factor.weight[0, 0] += 1
        seen.add(digest(layer))
    assert len(seen) == 3


def test_half_precision_factors_are_multiplied_in_single() -> None:
    low_rank, report = step(bert().bfloat16(), half("svd", rank_ratio=0.5))
    layer = low_rank.get_submodule(next(iter(report.ranks)))
    exact = layer.up.weight.double() @ layer.down.weight.double()
    torch.testing.assert_close(whole_weight(layer).double(), exact, rtol=1e-5, atol=1e-6)
    again, _ = step(low_rank, half("svd", rank_ratio=0.2))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


# -- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_form", ["factors", "interpolative"])
@pytest.mark.parametrize("form", ["factors", "interpolative"])
def test_the_result_has_the_form_that_was_asked_for(first_form: str, form: str, tmp_path: Path) -> None:
    first, _ = step(bert(), half("svd", form=first_form, rank_ratio=0.4))
    again, report = step(first, half("svd", form=form, rank_ratio=0.2))
    layers = [again.get_submodule(name) for name in report.ranks]
    assert len(layers) == 12
    assert {layer.form for layer in layers} == {form}
    assert report.targeted_after == sum(layer.num_parameters() for layer in layers)
    at_once, single = step(bert(), half("svd", form=form, rank_ratio=0.2))
    assert report.targeted_after == single.targeted_after
    torch.testing.assert_close(computed(again), computed(at_once), rtol=1e-2, atol=1e-3)
    again.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(computed(loaded), computed(again))


def test_a_layer_that_stays_does_not_grow_by_its_form() -> None:
    first, before = step(bert(), half(form="interpolative", keep=0.5))
    again, report = step(first, half("svd", form="factors", keep=0.45))
    stayed = [layer for layer in report.layers if layer.note]
    assert stayed
    for layer in stayed:
        assert again.get_submodule(layer.name).form == "interpolative"
        assert layer.parameters_after == again.get_submodule(layer.name).num_parameters()
    assert report.targeted_after <= 0.45 * report.targeted_before
    assert before.targeted_before == report.targeted_before


# -- ties, kinds, undone -----------------------------------------------------------------------------------------------


def test_an_embedding_stays_tied_to_its_head_and_keeps_its_kind() -> None:
    include = ("embed_tokens",)
    first, _ = step(tied_llama(), half("svd", include))
    again, _ = step(first, half("svd", include, keep=0.3))
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert type(embedding) is LowRankEmbedding
    assert head.up.weight is embedding.down.weight
    assert head.down.weight is embedding.up.weight
    torch.testing.assert_close(head.product(), embedding.product().mT)


def test_a_convolution_keeps_its_geometry() -> None:
    dense = tiny_resnet()
    first, _ = step(copy.deepcopy(dense), half("svd", ("convolution",)))
    again, report = step(first, half("svd", keep=0.3))
    for name in report.ranks:
        was, layer = dense.get_submodule(name), again.get_submodule(name)
        assert type(layer) is LowRankConv
        for what in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
            assert getattr(layer, what) == getattr(was, what)


@pytest.mark.parametrize("kind", ["linear", "embedding and tied head"])
def test_profiles_are_of_ranks_below_and_leave_the_model_whole(kind: str) -> None:
    build, include = MODELS[kind]
    first, _ = step(build(), half("svd", include, rank_ratio=0.4))
    config = half("svd", rank_ratio=0.2, allocation="knapsack", align=1)
    state, ranks, expected = copy.deepcopy(first.state_dict()), dict(first.config.ranks), computed(first)
    statistics = compute_statistics(first, batches(first), config.needs or ("fisher_rows",), progress=False)
    profile = profile_losses(first, config, statistics, batches(first), progress=False)
    assert all(profile[name] and max(profile[name]) < rank for name, rank in ranks.items())
    assert all(torch.equal(state[key], value) for key, value in first.state_dict().items())
    assert torch.equal(computed(first), expected)
    again, report = compress(first, config, statistics, progress=False, profile=profile)
    assert report.parameters_after == again.num_parameters()
    assert all(rank <= ranks[name] for name, rank in again.config.ranks.items())


def test_the_search_for_the_smallest_begins_at_what_is_there() -> None:
    first, before = step(bert(), half("svd", rank_ratio=0.3))
    share = before.targeted_after / before.targeted_before
    found = search_smallest(first, half("svd"), None, lambda model: float(model.num_parameters()), lambda size: True)
    assert found.report.parameters_before == before.parameters_before
    assert all(keep < share for keep, _ in found.tried)
    assert found.report.targeted_after < 0.1 * found.report.targeted_before


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def first_folder(tmp_path: Path) -> Path:
    """A compressed model with its record, from a model called original."""
    bert().save_pretrained(tmp_path / "original")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "original")
    model, report = step(model, half(keep=0.5))
    scores = with_score(with_score({}, "dense", 80.0, ROWS), "compressed", 79.0, ROWS)
    scores |= {"score_dense": 80.0, "task": "cola"}
    save_compressed(model, None, report, tmp_path / "first", base_model="original", **scores)
    return tmp_path / "first"


def test_record_card_and_inspect_speak_of_the_original(first_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(first_folder)
    size = bert().num_parameters()
    query = "bert.encoder.layer.0.attention.self.query"
    model, report = step(model, half(keep=0.3, exclude=(query,)))
    report, facts = of_original(report, {"task": "cola", **with_score({}, "dense", 79.0, ROWS)}, model.name_or_path)
    facts |= with_score(facts, "compressed", 75.0, ROWS)
    save_compressed(model, None, report, tmp_path / "second", **facts)
    record = read_record(tmp_path / "second")
    assert record is not None
    assert record["base_model"] == "original"
    assert record["base"]["weights_bytes"] == (tmp_path / "original" / "model.safetensors").stat().st_size
    assert (record["score_dense"], record["score_given"], record["score_compressed"]) == (80.0, 79.0, 75.0)
    assert record["parameters_before"] == size
    assert [(each["settings"]["keep"], each["score_compressed"]) for each in record["earlier"]] == [(0.5, 79.0)]
    card = (tmp_path / "second" / "README.md").read_text(encoding="utf-8")
    assert card == render_card(record, "second")
    share = 100 * record["parameters_after"] / size
    assert "`original` made smaller by low-rank factorization: 12 of its layers are each" in card
    assert f"{share:.1f}% of the dense model's {size:,}" in card
    assert "compressed before by kfac, keep 0.5, to" in card
    assert "| 80.00 | 75.00 |" in card
    seen = inspect(str(tmp_path / "second"))
    assert seen["parameters_dense"] == size
    assert len(seen["layers"]) == 12
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    third, last = step(loaded, half(keep=0.2))
    save_compressed(third, None, last, tmp_path / "third")
    record = read_record(tmp_path / "third")
    assert record is not None
    assert [each["settings"]["keep"] for each in record["earlier"]] == [0.5, 0.3]
    assert record["base_model"] == "original"
    assert record["score_dense"] == 80.0
    assert CompressionReport.from_dict(json.loads(json.dumps(record))).earlier == tuple(record["earlier"])


def test_scores_of_other_data_are_not_compared(first_folder: Path, tmp_path: Path) -> None:
    other = ROWS | {"digest": "other"}
    model, report = step(AutoModelForSequenceClassification.from_pretrained(first_folder), half(keep=0.3))
    report, facts = of_original(report, {"task": "cola", **with_score({}, "dense", 70.0, other)}, model.name_or_path)
    save_compressed(model, None, report, tmp_path / "second", **facts | with_score(facts, "compressed", 65.0, other))
    record = read_record(tmp_path / "second")
    assert record is not None
    assert (record["score_dense"], record["score_given"]) == (80.0, 70.0)
    assert comparable(record, "given", "compressed")
    assert not comparable(record, "dense", "compressed")


def test_steps_in_one_process_are_all_recorded(tmp_path: Path) -> None:
    model, _ = step(bert(), half(keep=0.5))
    model, report = step(model, half("svd", keep=0.3))
    assert [each["settings"]["method"] for each in report.earlier] == ["kfac"]
    assert "compressed before by kfac, keep 0.5, to" in report.summary()
    save_compressed(model, None, report, tmp_path / "both", base_model="original")
    record = read_record(tmp_path / "both")
    assert record is not None
    assert record["base_model"] == "original"


def test_a_model_without_a_record_has_an_unknown_original(tmp_path: Path) -> None:
    step(bert(), half(keep=0.5))[0].save_pretrained(tmp_path / "bare")
    model, report = step(AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare"), half(keep=0.3))
    save_compressed(model, None, report, tmp_path / "second", base_model="bare")
    record = read_record(tmp_path / "second")
    assert record is not None
    assert record["base_model"] is None
    card = (tmp_path / "second" / "README.md").read_text(encoding="utf-8")
    assert "A model made smaller" in card
    assert "compressed before, to" in card


# -- resumed -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_second_step_goes_on_to_the_same_bits(
    first_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(first_folder)

    config = half(keep=0.3)
    expected, _ = step(loaded(), config)
    statistics = compute_statistics(loaded(), batches(loaded()), config.needs, progress=False)
    work = Work.open(tmp_path / "work", {"job": 1})
    low_rank, calls = LayerSolver.low_rank, []

    def fails(self: LayerSolver, name: str, *rest: Any) -> Any:
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return low_rank(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LayerSolver, "low_rank", fails)
        with pytest.raises(KeyboardInterrupt):
            compress(loaded(), config, statistics, progress=False, work=work)
    resumed, report = compress(loaded(), config, statistics, progress=False, work=work)
    assert sum(layer.note == "" for layer in report.layers) == len(report.layers)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), expected.parameters(), strict=True))
