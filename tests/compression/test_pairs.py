"""Where features cross: every pair of budget, allocation, kind of model, dtype and form, on one process and on two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from allpairspy import AllPairs

from hf_lowrank import CompressionConfig, LowRankError, compress, compute_statistics
from hf_lowrank.allocation import ALLOCATIONS, BUDGETS, parameters, parameters_at, uniform_ranks
from hf_lowrank.allocation.costs import flops, minimal_flops
from hf_lowrank.compression.profiling import profile_losses
from hf_lowrank.compression.uses import count_uses
from hf_lowrank.folder.densify import densify
from hf_lowrank.model.targets import find_targets
from hf_lowrank.model.weights import model_digest
from tests.helpers import tiny_albert, tiny_bert, tiny_llama, token_ids
from tests.launches import Job
from tests.nn.test_editing import output, tiny_mixtral, tiny_resnet

MODELS: dict[str, tuple[Any, tuple[str, ...] | None]] = {
    "plain": (tiny_bert, None),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), ("embed_tokens", "*_proj")),
    "shared": (tiny_albert, None),
    "experts": (tiny_mixtral, None),
    "convolution": (tiny_resnet, ("convolution",)),
}
DTYPES, FORMS = ("float32", "bfloat16"), ("factors", "interpolative")
PAIRED = [budget for budget in BUDGETS if budget != "bytes"]  # which test_bytes is about
CASES = [tuple(case) for case in AllPairs([PAIRED, list(ALLOCATIONS), list(MODELS), DTYPES, FORMS])]
SHARE = 0.7  # of what the targets cost


def refusal(budget: str, kind: str, form: str) -> str | None:
    """What is documented to be refused, in the words of the message."""
    if budget == "latency" and form == "interpolative":
        return "a latency budget is for plain factors"
    if form == "interpolative" and kind in ("tied", "convolution"):
        return "the interpolative form is for linear layers"
    if budget in ("flops", "latency") and kind in ("experts", "convolution"):
        return "what a convolution costs" if kind == "convolution" else f"a {budget} budget counts every layer"
    return None


def model_of(kind: str, dtype: str) -> Any:
    return MODELS[kind][0]().to(getattr(torch, dtype))


def budget_of(budget: str, model: Any, targets: dict[str, Any]) -> float:
    shapes = {name: target.shape for name, target in targets.items()}
    dense, whole = sum(out * inp for out, inp in shapes.values()), model.num_parameters()
    if budget == "flops":
        if any(target.kind in ("expert", "convolution") for target in targets.values()):
            return dense  # is refused, whatever its value
        uses = count_uses(model, targets)
        return SHARE * sum(flops(shape, None, uses[name]) for name, shape in shapes.items())
    left = whole - (1 - SHARE) * dense
    return {"params": left, "keep_model": left / whole, "rank_ratio": 0.4}.get(budget, SHARE)


def batches(kind: str, dtype: str) -> list[dict[str, torch.Tensor]]:
    """Four batches of a sample or two."""
    if kind == "convolution":
        images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
        whole = {"pixel_values": images, "labels": torch.arange(6) % 2}
    else:
        ids = token_ids(batch=6, length=9)
        whole = {"input_ids": ids, "labels": ids if kind in ("tied", "experts") else torch.arange(6) % 2}
    return [{key: value[n : n + 2] for key, value in whole.items()} for n in (0, 2, 4)]


def compressed(case: tuple[str, ...]) -> tuple[Any, Any]:
    """The model of a case and its report, each process measuring its share of the batches."""
    budget, allocation, kind, dtype, form = case
    state = PartialState()
    model, include = model_of(kind, dtype), MODELS[kind][1]
    mine = batches(kind, dtype)[state.process_index :: state.num_processes]
    value = budget_of(budget, model, find_targets(model, include))
    settings: dict[str, Any] = {"allocation": allocation, "form": form, "include": include, "align": 1}
    config = CompressionConfig("svd", **settings | {budget: value})
    statistics = (
        compute_statistics(model, mine, config.needs, include=include, progress=False) if config.needs else None
    )
    profile = None
    if allocation == "knapsack":
        profile = profile_losses(model, config, statistics, mine, ratios=(0.1, 0.3), progress=False)
    return compress(model, config, statistics, progress=False, profile=profile)


def found(case: tuple[str, ...]) -> dict[str, Any]:
    """The ranks and a digest of the weights, or what was refused."""
    try:
        model, report = compressed(case)
    except LowRankError as error:
        return {"refused": str(error)}
    return {"ranks": report.ranks, "digest": model_digest(model)}


def run_all(folder: Path) -> None:
    state = PartialState()
    result = [found(case) for case in CASES]
    (folder / f"{state.process_index}.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_all_pairs_on_two_processes_are_those_of_one(tmp_path: Path) -> None:
    Job(tmp_path / "job", run_all, tmp_path, processes=2).done()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for case, two in zip(CASES, first, strict=True):
        if case[0] != "latency":  # which is measured anew
            assert two == found(case), case


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_budget_is_kept_and_the_model_saved_loaded_and_made_dense(case: tuple[str, ...], tmp_path: Path) -> None:
    budget, _, kind, dtype, form = case
    dense = model_of(kind, dtype)
    targets = find_targets(dense, MODELS[kind][1])
    value, original = budget_of(budget, dense, targets), type(dense)
    if (expected := refusal(budget, kind, form)) is not None:
        with pytest.raises(LowRankError, match=expected):
            compressed(case)
        return
    if budget == "latency" and "cannot be met" in found(case).get("refused", ""):
        return  # tiny layers may be fastest dense
    model, report = compressed(case)
    assert_kept(budget, value, form, targets, dense, report)
    model.eval().save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, dtype=model.dtype, output_loading_info=True)
    assert not any(info.values())
    assert model_digest(loaded) == model_digest(model)
    before = output(model)
    close = 1e-4 if dtype == "float32" else 0.1  # buffers of positions are not rounded when they are loaded
    torch.testing.assert_close(output(loaded.eval()), before, rtol=close, atol=close * float(before.abs().max()))
    again = densify(model)
    assert type(again) is original
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in dense.state_dict().items()
    }
    torch.testing.assert_close(output(again), before, rtol=close, atol=close * float(before.abs().max()))


def assert_kept(budget: str, value: float, form: str, targets: dict[str, Any], dense: Any, report: Any) -> None:
    shapes = {name: target.shape for name, target in targets.items()}
    slack = 1 + 1e-6
    if budget == "keep":
        assert report.targeted_after <= value * report.targeted_before * slack
    elif budget in ("params", "keep_model"):
        assert report.parameters_after <= value * (dense.num_parameters() if budget == "keep_model" else 1) * slack
    elif budget == "rank_ratio":
        allowed = sum(parameters_at(shapes[name], rank) for name, rank in uniform_ranks(shapes, value).items())
        assert report.targeted_after <= allowed
        assert report.targeted_before == sum(parameters(shape, None) for shape in shapes.values())
    elif budget == "flops":
        cost, uses = flops if form == "factors" else minimal_flops, count_uses(dense, targets)
        spent = sum(cost(shape, report.ranks.get(name), uses[name]) for name, shape in shapes.items())
        assert spent <= value * slack
