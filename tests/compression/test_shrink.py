"""A compressed model is cut further without data, as compressing anew would, and only while its worth is known."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionReport, LowRankError, compress, compute_statistics, shrink_saved
from hf_lowrank.compression.shrink import shrink
from hf_lowrank.folder.directions import DIRECTIONS, load_directions
from hf_lowrank.folder.saving import save_compressed
from hf_lowrank.folder.verify import verify
from hf_lowrank.statistics import Statistics
from tests.helpers import tiny_bert, tiny_gpt2, token_ids


def batches() -> list[dict[str, Any]]:
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    return [{"input_ids": token_ids(seed, 6, 8), "labels": labels} for seed in range(4)]


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    kinds = ["activation_moment", "gradient_moment", "activation_mean", "active_tokens", "fisher_rows", "fisher"]
    return compute_statistics(tiny_bert(), batches(), kinds, progress=False)


def compressed(statistics: Statistics | None, **settings: Any) -> tuple[PreTrainedModel, CompressionReport]:
    return compress(tiny_bert(), CompressionConfig(**settings), statistics, progress=False)


def products(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: layer.product().detach() for name, layer in model.factorized_layers().items()}


def assert_same_functions(one: PreTrainedModel, other: PreTrainedModel, tolerance: float) -> None:
    theirs = products(other)
    for name, product in products(one).items():
        assert torch.dist(product, theirs[name]) <= tolerance * theirs[name].norm(), name
        bias, other_bias = (model.get_submodule(name).bias for model in (one, other))  # made up for the mean input
        torch.testing.assert_close(bias, other_bias, rtol=0.05, atol=tolerance)


@pytest.mark.parametrize("method", ["svd", "fwsvd", "whiten", "kfac"])
@pytest.mark.parametrize("gauge", ["flat", "balanced"])
def test_of_equal_ranks_it_is_what_compressing_anew_gives(statistics: Statistics, method: str, gauge: str) -> None:
    """Eckart & Young: the best factors of rank 6 are the leading directions of the best ones of rank 16."""
    rest = {"method": method, "allocation": "uniform", "gauge": gauge}
    model, report = compressed(statistics, rank_ratio=0.45, **rest)
    smaller, after = shrink(model, report.directions, CompressionConfig(rank_ratio=0.2, **rest))
    anew, expected = compressed(statistics, rank_ratio=0.2, **rest)
    assert after.ranks == expected.ranks
    assert after.parameters_after == expected.parameters_after == anew.num_parameters() == smaller.num_parameters()
    assert_same_functions(smaller, anew, 2e-3)  # the basis is kept in float16


def test_ranks_are_those_of_one_shot_and_the_expected_losses_add_up(statistics: Statistics) -> None:
    once, first = compressed(statistics, method="kfac", keep=0.5, align=1, cap=1.5)
    config = CompressionConfig("kfac", keep=0.2, align=1)
    anew, expected = compressed(statistics, method="kfac", keep=0.2, align=1)
    assert all(layer.rank is not None for layer in first.layers)
    smaller, after = shrink(once, first.directions, config)
    assert after.ranks == expected.ranks
    for before, between, end in zip(first.layers, after.layers, expected.layers, strict=True):
        lost = (before.expected_loss or 0) + (between.expected_loss or 0)
        assert lost == pytest.approx(end.expected_loss, rel=2e-2)
    assert_same_functions(smaller, anew, 5e-3)


def test_step_by_step_is_as_at_once(statistics: Statistics) -> None:
    rest = {"method": "kfac", "allocation": "uniform"}
    model, report = compressed(statistics, rank_ratio=0.45, **rest)
    other = copy.deepcopy(model)
    between, half_way = shrink(model, report.directions, CompressionConfig(rank_ratio=0.4, **rest))
    stepwise, _ = shrink(between, half_way.directions, CompressionConfig(rank_ratio=0.2, **rest))
    at_once, _ = shrink(other, report.directions, CompressionConfig(rank_ratio=0.2, **rest))
    assert_same_functions(stepwise, at_once, 5e-3)


def test_conv1d_experts_and_half_precision(statistics: Statistics) -> None:
    model = tiny_gpt2().bfloat16()
    small, report = compress(model, CompressionConfig("svd", 0.45), progress=False)
    small, after = shrink(small, report.directions, CompressionConfig("svd", 0.2))
    anew, expected = compress(tiny_gpt2().bfloat16(), CompressionConfig("svd", 0.2), progress=False)
    assert after.ranks == expected.ranks
    assert small.dtype == torch.bfloat16
    for name, product in products(small).items():
        assert torch.dist(product.float(), products(anew)[name].float()) < 0.03 * product.float().norm()


def test_layers_that_stayed_dense_stay_and_count(statistics: Statistics) -> None:
    model, report = compressed(statistics, method="kfac", keep=0.6)
    dense = {layer.name for layer in report.layers if layer.rank is None}
    assert dense
    _, after = shrink(model, report.directions, CompressionConfig("kfac", keep=0.5))
    assert {layer.name for layer in after.layers if layer.rank is None} == dense
    assert after.targeted_after <= 0.5 * after.targeted_before


def save(statistics: Statistics | None, folder: Path, **settings: Any) -> Path:
    model, report = compressed(statistics, **settings)
    save_compressed(model, None, report, folder, base_model="dense")
    return folder


def test_a_saved_model_is_shrunk_on_loading(statistics: Statistics, tmp_path: Path) -> None:
    folder = save(statistics, tmp_path / "half", method="kfac", keep=0.5, cap=1.5)
    assert [check.status for check in verify(folder)] == ["PASS"] * 4
    model, report = shrink_saved(folder, keep=0.2)
    assert report.settings["keep"] == 0.2
    assert report.settings["allocation"] == "greedy"
    assert report.statistics["samples"] == 24
    save_compressed(model, None, report, tmp_path / "fifth")
    again, _ = shrink_saved(tmp_path / "fifth", keep=0.15)
    assert again.num_parameters() < model.num_parameters()
    record = json.loads((tmp_path / "fifth" / "compression.json").read_text())
    assert record["earlier"][0]["settings"]["keep"] == 0.5
    assert record["base_model"] == "dense"
    assert "directions" not in record
    size = (folder / DIRECTIONS).stat().st_size
    assert size < 0.35 * sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def test_what_is_stale_or_missing_is_refused(statistics: Statistics, tmp_path: Path) -> None:
    folder = save(statistics, tmp_path / "half", method="kfac", keep=0.5, cap=1.5)
    with pytest.raises(LowRankError, match="how small"):
        shrink_saved(folder)
    with pytest.raises(LowRankError, match="a flops budget needs a measurement"):
        shrink_saved(folder, flops=1000)
    for keep in (0.9, 0.001):
        with pytest.raises(
            LowRankError, match=rf"^keep {keep} cannot be met: params [\d,]+ (would leave|cannot be met)"
        ):
            shrink_saved(folder, keep=keep)
    trained = tmp_path / "trained"
    shutil.copytree(folder, trained)
    model, _ = shrink_saved(folder, keep=0.4)
    model = type(model).from_pretrained(folder)
    layer = next(iter(model.factorized_layers().values()))
    with torch.no_grad():
        layer.up.weight += 0.01
    model.save_pretrained(trained)
    with pytest.raises(LowRankError, match="they were trained since"):
        shrink_saved(trained, keep=0.2)
    (trained / DIRECTIONS).unlink()
    record = json.loads((trained / "compression.json").read_text())
    (trained / "compression.json").write_text(json.dumps(record | {"healing": {}}))
    with pytest.raises(LowRankError, match="was healed after the compression"):
        shrink_saved(trained, keep=0.2)
    (folder / DIRECTIONS).write_bytes(b"nothing")
    with pytest.raises(LowRankError, match="is damaged"):
        shrink_saved(folder, keep=0.2)
    for name, settings in (("tfwsvd", {"method": "tfwsvd"}), ("form", {"method": "kfac", "form": "interpolative"})):
        other = save(statistics, tmp_path / name, rank_ratio=0.3, **settings)
        with pytest.raises(LowRankError, match=f"has no {DIRECTIONS} "):
            shrink_saved(other, rank_ratio=0.2)


def test_directions_come_back_as_they_were(statistics: Statistics, tmp_path: Path) -> None:
    model, report = compressed(statistics, method="kfac", keep=0.5, cap=1.5)
    save_compressed(model, None, report, tmp_path / "half")
    found = load_directions(model, str(tmp_path / "half"))
    assert found.keys() == report.directions.keys()
    for name, directions in report.directions.items():
        assert torch.equal(found[name].basis, directions.basis)
        assert torch.equal(found[name].worth, directions.worth)
        assert (directions.worth.diff() <= 0).all()
