"""The analysis against theory: what is removed, what is put back, and the numbers that predict."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_lowrank import METHODS, CompressionConfig, LowRankError, Statistics, cli, compress, compute_statistics
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.editing_lowrank import replaced
from hf_lowrank.nn.layers_lowrank import dense_weight, with_weight
from hf_lowrank.solvers.methods import ACTIVATION_DAMPING, GRADIENT_DAMPING
from hf_lowrank.studies.analysis import (
    Analysis,
    AnalysisConfig,
    Baseline,
    Evaluator,
    FisherShape,
    Group,
    GroupTruncation,
    Journal,
    LayerAnalysis,
    LayerMethod,
    Measurement,
    SweepPoint,
    analyze,
    effective_rank,
    fisher_shape,
    needed_statistics,
)
from hf_lowrank.studies.analysis.evaluator import _jackknife_error, curvature_of
from hf_lowrank.studies.analysis.findings import _misjudged
from hf_lowrank.studies.analysis.predictor import spearman
from hf_lowrank.studies.analysis.rank_sweep import rank_sweep
from hf_lowrank.studies.analysis.recommend import (
    LEAVE_DENSE,
    SVD_ENOUGH,
    USE_WEIGHTING,
    recommend_layers,
    recommend_model,
    recommended_point,
)
from hf_lowrank.studies.analysis.study import Study
from hf_lowrank.studies.analysis.truncation import directions, group_slice, truncate_groups
from hf_lowrank.tasks import TASKS, load_validation
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.evaluate import Predictions, evaluate_splits
from tests.helpers import bert_config, modules_of, tiny_bert

TASK = TASKS["stsb"]
WORDS = [f"w{n}" for n in range(40)]
CONFIG = AnalysisConfig(groups=4, rank_ratio=0.25, sweep_ratios=(0.25, 0.5))


# --- a tiny model of a task ---


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STS-B-like rows."""
    folder, choose = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 30)):
        texts = [[" ".join(choose.choice(WORDS, 5)) for _ in range(count)] for _ in range(2)]
        labels = choose.uniform(0, 5, count)
        Dataset.from_dict({"sentence1": texts[0], "sentence2": texts[1], "label": labels}).to_parquet(
            folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture(scope="module")
def model() -> BertForSequenceClassification:
    return tiny_bert(num_labels=1, problem_type="regression", initializer_range=0.2)


@pytest.fixture(scope="module")
def validation(model: Any, tokenizer: Any, data: Path) -> list[Dataset]:
    return load_validation(TASK, data, tokenizer, model.config)


@pytest.fixture(scope="module")
def statistics(model: Any, tokenizer: Any, data: Path) -> Statistics:
    loader = calibration_loader(model, tokenizer, TASK, data, 24, 8)
    return compute_statistics(model, loader, needed_statistics(CONFIG.methods), progress=False)


@pytest.fixture
def study(model: Any, tokenizer: Any, validation: list[Dataset], statistics: Statistics) -> Study:
    return Study(find_targets(model), statistics, Evaluator(model, tokenizer, TASK, validation))


@pytest.fixture(scope="module")
def analysis(model: Any, tokenizer: Any, validation: Any, statistics: Statistics) -> Analysis:
    return analyze(model, tokenizer, TASK, validation, statistics, CONFIG, "tiny", progress=False)


# --- in place and back ---


def test_an_analysis_leaves_the_model_as_it_was(model: Any, analysis: Analysis) -> None:
    fresh = tiny_bert(num_labels=1, problem_type="regression", initializer_range=0.2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))


# --- directions and groups ---


def means(out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    """Made-up statistics of one layer, of every kind that a method may need."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(200, in_features, generator=generator), torch.randn(200, out_features, generator=generator)
    x = x * torch.linspace(0.1, 2, in_features)
    fisher = (g.square().T @ x.square()) / 200 * torch.rand(out_features, in_features, generator=generator)
    return {
        "fisher": fisher,
        "fisher_rows": fisher.sum(dim=0),
        "activation_moment": x.T @ x,
        "gradient_moment": g.T @ g / 200,
        "active_tokens": torch.tensor(200.0),
        "activation_magnitude": x.abs().mean(dim=0),
        "fisher_in_eigenbasis": fisher,
    }


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("method", ["svd", "fwsvd", "tfwsvd", "whiten", "kfac", "ekfac"])
def test_directions_are_the_weight_in_falling_worth(method: str, shape: tuple[int, int]) -> None:
    weight, objective = torch.randn(shape), METHODS[method].objective(means(*shape))
    found = directions(objective, weight)
    torch.testing.assert_close(found.part(slice(None)), weight, rtol=1e-4, atol=1e-4)
    assert torch.all(found.worth.diff() <= 0)
    alone = torch.stack([objective.error(found.part(slice(k, k + 1))) for k in range(12)])
    torch.testing.assert_close(alone, found.worth.double(), rtol=1e-3, atol=1e-5 * float(alone.max()))


@pytest.mark.parametrize("method", ["svd", "fwsvd", "kfac"])
def test_the_directions_that_a_closed_form_keeps_are_its_factors(method: str) -> None:
    weight, objective = torch.randn(12, 20), METHODS[method].objective(means(12, 20))
    kept = directions(objective, weight).part(slice(0, 5))
    torch.testing.assert_close(kept, objective.factorize(weight, 5).product().float(), rtol=1e-3, atol=1e-4)


def test_groups_are_a_partition() -> None:
    for rank, groups in ((7, 3), (64, 10), (384, 10), (5, 5)):
        parts = [list(range(rank))[group_slice(rank, group, groups)] for group in range(groups)]
        assert [k for part in parts for k in part] == list(range(rank))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_group_is_removed_from_every_layer(study: Study, model: Any, tokenizer: Any, validation: Any) -> None:
    result = truncate_groups(study, "svd", 4)
    gone = copy.deepcopy(model)
    squares = np.zeros(2)
    for module in modules_of(find_targets(gone)).values():
        u, s, vh = torch.linalg.svd(module.weight.data, full_matrices=False)  # ranks are 32: groups of 8
        squares += [float(s[8:16].square().sum()), float(s.square().sum())]
        s[8:16] = 0
        module.weight.data = (u * s) @ vh
    score = evaluate_splits(gone, tokenizer, TASK, validation, progress=False)["score"]
    second = result.groups[1]
    assert second.measured.score == pytest.approx(score, abs=1e-2)
    assert second.measured.damage == pytest.approx(study.evaluator.dense.score - score, abs=1e-2)
    assert second.reconstruction_error == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-3)
    assert second.importance_share == pytest.approx(squares[0] / squares[1], rel=1e-3)  # svd's importance is its error
    damages = [group.measured.damage for group in result.groups]
    assert result.ideal == tuple(sorted(damages, reverse=True))
    assert result.monotonicity == pytest.approx(-(spearman([1, 2, 3, 4], damages)[0] or 0))
    assert result.concentration == pytest.approx(max(damages[0], 0) / sum(max(d, 0) for d in damages))
    assert sum(group.importance_share for group in result.groups) == pytest.approx(1)


def test_too_many_groups_name_the_layer(study: Study) -> None:
    with pytest.raises(LowRankError, match=r"query has 32 singular directions, too few for 33 groups"):
        truncate_groups(study, "svd", 33)


def test_directions_in_the_wrong_order_are_told() -> None:
    def group(number: int, damage: float, error: float) -> Group:
        return Group(number, Measurement(0.0, damage, error, 0.0, 0.0), 0.1, 0.1)

    groups = (group(1, 9.0, 1.0), group(2, 1.0, 0.1), group(3, 4.0, 0.5), group(4, -3.0, 0.1), group(5, -1.0, 0.1))
    told = list(_misjudged(GroupTruncation("svd", groups, 0.7, 0.7, 1.0), "points"))
    assert told == [
        "svd ranks some directions wrongly: removing group 3 of 5 costs 4 ± 0.5 points, removing group 2, which it "
        "takes to be more important, 1 ± 0.1."
    ]
    noisy = tuple(group(each.group, each.measured.damage, 2.0) for each in groups)
    assert not list(_misjudged(GroupTruncation("svd", noisy, 0.7, 0.7, 1.0), "points"))


# --- the sweep is what compress gives ---


@pytest.mark.parametrize("method", ["svd", "tfwsvd", "kfac"])
def test_the_sweep_scores_what_compress_makes(
    study: Study, model: Any, tokenizer: Any, validation: Any, statistics: Statistics, method: str
) -> None:
    points = rank_sweep(study, method, (0.25, 0.5))
    for point in points:
        config = CompressionConfig(method, point.rank_ratio)
        compressed, report = compress(copy.deepcopy(model), config, statistics, progress=False)
        score = evaluate_splits(compressed, tokenizer, TASK, validation, progress=False)["score"]
        assert point.measured.score == pytest.approx(score, abs=1e-2)
        assert point.targeted_share == report.targeted_after / report.targeted_before
    assert points[1].targeted_share > points[0].targeted_share


# --- measuring ---


def test_the_dense_model_has_no_damage(model: Any, tokenizer: Any, validation: Any) -> None:
    evaluator = Evaluator(model, tokenizer, TASK, validation)
    expected = evaluate_splits(model, tokenizer, TASK, validation, progress=False)["score"]
    assert evaluator.dense.score == expected
    assert evaluator.dense.score_error > 0
    assert evaluator.measure() == Measurement(expected, 0.0, 0.0, 0.0, 0.0)


def test_a_limit_chooses_rows_by_seed(model: Any, tokenizer: Any, validation: Any) -> None:
    few = [Evaluator(model, tokenizer, TASK, validation, limit=12, seed=seed) for seed in (0, 0, 1)]
    assert few[0].dense == few[1].dense != few[2].dense
    assert few[0].dense.samples == 12
    with pytest.raises(LowRankError, match="two validation samples"):
        Evaluator(model, tokenizer, TASK, validation, limit=1)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=40)
    left_out = np.array([np.delete(values, n).mean() for n in range(40)])
    assert _jackknife_error(left_out) == pytest.approx(values.std(ddof=1) / 40**0.5)


def test_the_loss_increase_is_that_of_the_model(model: Any, tokenizer: Any, validation: Any) -> None:
    evaluator = Evaluator(model, tokenizer, TASK, validation)
    targets = modules_of(find_targets(model))
    with replaced(model, {name: with_weight(m, torch.zeros_like(dense_weight(m))) for name, m in targets.items()}):
        measured = evaluator.measure()
        with torch.no_grad():
            logits = model(**tokenizer("w1 w2", return_tensors="pt")).logits.item()  # sees no input any more
    labels = np.array(validation[0]["labels"])
    assert measured.loss_increase == pytest.approx(np.mean((logits - labels) ** 2) - evaluator.dense.loss, rel=1e-3)


@pytest.mark.parametrize("tokens", [1, 16])
def test_fisher_times_the_factor_is_the_curvature_of_a_mean_over_tokens(tokens: int) -> None:
    """Bernoulli with logit θ and true labels: curvature σ(1 − σ), squared gradient of a mean of T losses 1/T of it."""
    choose, sigma = np.random.default_rng(0), 1 / (1 + np.exp(-0.3))
    gradient = (sigma - (choose.random((200_000, tokens)) < sigma)).mean(axis=1)
    outputs = Predictions([[0.0] * tokens] * 3, [None] * 3, [0.0] * 3)
    factor = curvature_of(TASKS["tinystories"], [outputs], 0.7)
    assert factor * np.mean(gradient**2) == pytest.approx(sigma * (1 - sigma), rel=0.02)


def test_fisher_times_the_factor_is_the_curvature_of_a_squared_error() -> None:
    residual = np.random.default_rng(0).normal(scale=0.6, size=200_000)  # of ŷ = θ, whose loss has curvature 2
    factor = curvature_of(TASK, [], float(np.mean(residual**2)))
    assert factor * np.mean((2 * residual) ** 2) == pytest.approx(2)
    assert curvature_of(TASKS["cola"], [], 0.3) == 1


# --- the predictor ---


def test_variation_is_split_by_the_law_of_total_variance() -> None:
    fisher = torch.rand(6, 9).exp()
    shape = fisher_shape(fisher)
    assert shape.variation == pytest.approx(float(fisher.std(correction=0) / fisher.mean()), rel=1e-5)
    assert shape.variation**2 == pytest.approx(shape.between_rows**2 + shape.within_rows**2)
    assert fisher_shape(1000 * fisher).variation == pytest.approx(shape.variation)


def test_a_row_is_an_input_feature() -> None:
    """FWSVD's one weight per input follows the first Fisher exactly, and nothing of the second."""
    by_input, by_output = torch.rand(1, 9).expand(6, 9), torch.rand(6, 1).expand(6, 9)
    first, second = fisher_shape(by_input), fisher_shape(by_output)
    assert first.within_rows == pytest.approx(0, abs=1e-9)
    assert first.between_rows > 0.1
    assert second.between_rows == pytest.approx(0, abs=1e-9)
    assert second.within_rows > 0.1
    assert first.rank1_share == pytest.approx(1)
    assert fisher_shape(torch.eye(4)).rank1_share == pytest.approx(1 / 4)


def test_effective_rank_is_between_one_and_full() -> None:
    spectrum = METHODS["svd"].objective({}).spectrum
    assert effective_rank(spectrum(torch.eye(8))) == pytest.approx(8)
    assert effective_rank(spectrum(torch.outer(torch.randn(8), torch.randn(5)))) == pytest.approx(1, abs=1e-3)
    falling = effective_rank(spectrum(torch.diag(torch.tensor([1.0, 0.5, 0.25]))))
    assert 1 < falling < 3
    assert effective_rank(100 * spectrum(torch.diag(torch.tensor([1.0, 0.5, 0.25])))) == pytest.approx(falling)


def test_a_constant_list_has_no_rank_correlation() -> None:
    assert spearman([1, 1, 1], [1, 2, 3]) == (None, None)
    assert spearman([1, 2, 4], [1, 2, 3])[0] == pytest.approx(1)


def damped(moment: torch.Tensor, share: float) -> torch.Tensor:
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment))


def test_layers_are_expected_to_lose_what_their_change_costs(
    analysis: Analysis, study: Study, statistics: Statistics
) -> None:
    assert [layer.name for layer in analysis.layers] == list(study.targets)
    assert sum(layer.share for layer in analysis.layers) == pytest.approx(1)
    for layer in analysis.layers:
        weight = study.weight(layer.name)
        assert layer.rank == 8
        for method, of in layer.methods.items():
            delta = weight - study.objective(method, layer.name).factorize(weight, 8).product().float()
            means_of = {kind: statistics.mean(kind, layer.name) for kind in METHODS["kfac"].needs}
            gradients = damped(means_of["gradient_moment"], GRADIENT_DAMPING)
            inputs = damped(means_of["activation_moment"] / means_of["active_tokens"], ACTIVATION_DAMPING)
            cost = float(torch.trace(delta.T @ gradients @ delta @ inputs))
            assert of.expected_increase == pytest.approx(cost / 2 * study.evaluator.curvature, rel=1e-3)
            elementwise = (statistics.mean("fisher", layer.name) * delta.square()).sum() / 2
            assert of.expected_elementwise == pytest.approx(float(elementwise) * study.evaluator.curvature, rel=1e-3)
            assert of.reconstruction_error == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-3)
            assert of.expected_increase >= layer.least_expected_increase * (1 - 1e-3)
        assert layer.methods["kfac"].expected_increase == pytest.approx(layer.least_expected_increase, rel=1e-3)
        assert layer.methods["svd"].reconstruction_error <= min(
            of.reconstruction_error for of in layer.methods.values()
        )


def test_correlations_are_of_what_the_table_shows(analysis: Analysis) -> None:
    found = {(c.predictor, c.outcome): c for c in analysis.correlations}
    variation = [layer.fisher.variation for layer in analysis.layers]
    plain = [layer.methods["svd"].measured.damage for layer in analysis.layers]
    weighted = [layer.methods["tfwsvd"].measured.damage for layer in analysis.layers]
    assert found["variation of Fisher", "svd: damage"].rho == pytest.approx(spearman(variation, plain)[0])
    rescue = np.subtract(plain, weighted).tolist()
    assert found["variation of Fisher", "rescue by tfwsvd: damage"].rho == pytest.approx(spearman(variation, rescue)[0])
    assert {c.matrices for c in analysis.correlations} == {len(analysis.layers)}


# --- advice ---


def point(method: str, damage: float, error: float = 0.1) -> SweepPoint:
    return SweepPoint(method, 0.33, 0.5, Measurement(80 - damage, damage, error, 0.0, 0.0))


@pytest.mark.parametrize(
    ("damages", "advice"),
    [
        ({"svd": 0.5, "kfac": 0.1}, "plain SVD is enough"),
        ({"svd": 5.0, "fwsvd": 2.0, "kfac": 0.5}, "use weighting by kfac"),
        ({"svd": 50.0, "kfac": 5.0}, "even the best method, kfac, is not free: it loses 5 ± 0.1 points"),
        ({"fwsvd": 0.3, "kfac": 0.5}, "use weighting by fwsvd"),
    ],
)
def test_the_model_is_advised_by_what_was_measured(damages: dict[str, float], advice: str) -> None:
    points = [point(method, damage) for method, damage in damages.items()]
    assert advice in recommend_model(points, 0.33, Baseline(80.0, 1.0, 0.5, 100), TASK)


@pytest.mark.parametrize(
    ("damages", "recommended"),
    [
        ({0.33: {"svd": 0.5, "kfac": 0.1}, 0.5: {"svd": 0.1, "kfac": 0.0}}, ("svd", 0.33)),
        ({0.33: {"svd": 5.0, "kfac": 0.5}, 0.5: {"svd": 0.1, "kfac": 0.0}}, ("kfac", 0.33)),
        ({0.2: {"kfac": 0.1}, 0.33: {"svd": 50.0, "kfac": 5.0}, 0.5: {"kfac": 4.0}, 0.6: {"kfac": 0.3}}, ("kfac", 0.6)),
        ({0.33: {"svd": 50.0, "kfac": 5.0}, 0.5: {"svd": 9.0, "kfac": 3.0}, 1.0: {"kfac": 0.0}}, ("kfac", 0.33)),
    ],
)
def test_what_is_recommended_was_measured_to_be_good_enough(
    damages: dict[float, dict[str, float]], recommended: tuple[str, float]
) -> None:
    points = [
        replace(point(method, damage), rank_ratio=ratio, targeted_share=ratio)
        for ratio, by_method in damages.items()
        for method, damage in by_method.items()
    ]
    dense = Baseline(80.0, 1.0, 0.5, 100)
    found = recommended_point(points, 0.33, dense, TASK)
    assert (found.method, found.rank_ratio) == recommended
    told = recommend_model(points, 0.33, dense, TASK)
    assert told.startswith("Keeping 33% of the ranks, ")
    assert (f"keep {found.rank_ratio:.0%} of the ranks by {found.method}" in told) == (found.rank_ratio != 0.33)


def test_what_the_samples_cannot_tell_is_tolerated() -> None:
    dense = Baseline(80.0, 1.0, 0.5, 100)
    assert "plain SVD is enough" in recommend_model([point("svd", 1.5, 0.8)], 0.33, dense, TASK)
    assert "not free" in recommend_model([point("svd", 1.5, 0.5)], 0.33, dense, TASK)


def layer(name: str, plain: float, weighted: float, saved: int = 100) -> LayerAnalysis:
    shape, nothing = FisherShape(1.0, 0.5, 0.5, 0.5), Measurement(80.0, 0.0, 0.0, 0.0, 0.0)
    methods = {m: LayerMethod(cost, cost, 0.5, nothing) for m, cost in (("svd", plain), ("kfac", weighted))}
    return LayerAnalysis(name, 32, 32, 8, saved, shape, 30.0, 20.0, weighted, 0.2, methods)


def test_layers_are_advised_by_price() -> None:
    """Four layers that save alike, at a mean price of 2 by the best method."""
    layers = [layer("a", 1.9, 0.5), layer("b", 9.0, 0.5), layer("c", 9.0, 0.9), layer("d", 9.0, 6.1)]
    advice = recommend_layers(layers)
    assert advice == {"a": SVD_ENOUGH, "b": USE_WEIGHTING, "c": USE_WEIGHTING, "d": LEAVE_DENSE}
    assert recommend_layers([*layers, layer("e", 0.1, 0.1, saved=0)])["e"] == LEAVE_DENSE


# --- resuming ---


def test_a_journal_goes_on_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"task": "stsb"})
    assert not path.exists()
    journal.add({"n": 1}, {"value": 0.1})
    journal.add({"n": 2}, {"value": 0.2})
    with path.open("a") as file:
        file.write('{"key": {"n": 3}, "rec')  # the power went
    again = Journal(path, {"task": "stsb"})
    assert (again.get({"n": 1}), again.get({"n": 3})) == ({"value": 0.1}, None)
    again.add({"n": 3}, {"value": 0.3})
    assert Journal(path, {"task": "stsb"}).get({"n": 3}) == {"value": 0.3}


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"task": "stsb", "validation_samples": 300}).add({"n": 1}, {})
    with pytest.raises(LowRankError, match="another validation samples: 300 then, 100 now"):
        Journal(path, {"task": "stsb", "validation_samples": 100})
    path.write_text("not JSON\n")
    with pytest.raises(LowRankError, match="damaged"):
        Journal(path, {})


@pytest.mark.slow
def test_an_analysis_is_resumed_without_measuring_again(
    model: Any, tokenizer: Any, validation: Any, statistics: Any, analysis: Analysis, tmp_path: Path, monkeypatch: Any
) -> None:
    path, real, count = tmp_path / "journal.jsonl", Evaluator.measure, 0

    def until_interrupted(self: Evaluator) -> Measurement:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return real(self)

    arguments = (model, tokenizer, TASK, validation, statistics, CONFIG, "tiny", path)
    monkeypatch.setattr(Evaluator, "measure", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyze(*arguments, progress=False)
    whole = analyze(*arguments, progress=False)
    total = len(CONFIG.methods) * (len(CONFIG.ratios) + CONFIG.groups + len(analysis.layers))
    assert count == total + 1  # the interrupted one twice
    assert whole == analysis
    assert analyze(*arguments, progress=False) == analysis
    assert count == total + 1
    changed = copy.deepcopy(model)
    changed.classifier.bias.data += 1
    with pytest.raises(LowRankError, match="another model weights"):
        analyze(changed, *arguments[1:], progress=False)


# --- the command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(num_labels=1)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(monkeypatch: Any, capfd: Any, *words: Any) -> tuple[int, str, str]:
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["hf-lowrank", "analyze", *map(str, words)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    out, err = capfd.readouterr()
    return int(exit_info.value.code or 0), out, err


@pytest.mark.slow
def test_the_command_writes_a_report(folder: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    out = tmp_path / "out"
    words = (
        folder,
        "--task",
        "stsb",
        "--data-dir",
        data,
        "--output",
        out,
        "--method",
        "svd",
        "--method",
        "kfac",
        "--groups",
        4,
    )
    words = (*words, "--rank-ratio", 0.25, "--eval-samples", 20, "--samples", 16)
    code, printed, _ = run(monkeypatch, capfd, *words, "--json")
    assert code == 0
    record = json.loads(printed)
    assert record == json.loads((out / "analysis.json").read_text())
    assert record["dense"]["samples"] == 20
    assert record["methods"] == ["svd", "kfac"]
    assert [len(truncation["groups"]) for truncation in record["truncation"]] == [4, 4]
    assert sorted(path.name for path in out.glob("*.png")) == [
        f"{name}.png"
        for name in ("correlation", "expectation", "fisher", "group_truncation", "rank_sweep", "redundancy")
    ]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in page
    last = run(monkeypatch, capfd, *words)[1].strip().splitlines()[-1]  # its measurements are kept
    advised = record["recommended"]
    assert last == (
        f"hf-lowrank compress {folder} --task stsb --method {advised['method']} --rank-ratio {advised['rank_ratio']} "
        f"--data-dir {data} --samples 16 --output model-lowrank"
    )
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 6
    assert page.index("<h2>Findings") < page.index("<h2>Plots") < page.index("<h2>Tables")
    assert str(tmp_path) not in page + printed
    assert not list(out.glob(".*"))
    monkeypatch.setattr(Evaluator, "measure", lambda self: pytest.fail("measured again"))
    code, printed, _ = run(monkeypatch, capfd, *words)
    assert code == 0
    assert "• Keeping 25% of the ranks, " in printed.replace("\n", " ")
    code, _, err = run(monkeypatch, capfd, *words, "--eval-samples", 10)
    assert code == 2
    assert "another validation samples: 20 then, 10 now" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--method": "fsvd"}, "unknown method 'fsvd'"),
        ({"--rank-ratio": 1.5}, "--rank-ratio must be in (0, 1]"),
        ({"--output": "FULL"}, "holds no analysis to go on with; choose another folder or pass --overwrite"),
        ({"--groups": 33}, "too few for 33 groups"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    options = {"--task": "stsb", "--data-dir": data, "--output": tmp_path / "out", "--method": "svd"} | change
    words = [tmp_path / "full" if word == "FULL" else word for item in options.items() for word in item]
    code, printed, err = run(monkeypatch, capfd, folder, *words)
    assert (code, printed) == (2, "")
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("hf-lowrank: ")
    assert message in last
