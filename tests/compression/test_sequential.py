"""Sequential factors: the closed form is the least there is, what is measured is what two whole models read."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, LowRankError, Statistics, compress, compute_statistics
from hf_lowrank.compression.solution import LayerSolver
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.interrupts import Stopped
from hf_lowrank.model.targets import Target, find_targets
from hf_lowrank.solvers import get_method
from hf_lowrank.solvers.methods import ACTIVATION_DAMPING, GRADIENT_DAMPING
from hf_lowrank.solvers.scaled import RIDGE
from hf_lowrank.statistics.batches import Batch, Marks
from hf_lowrank.statistics.prefix import Prefix, marked_batches
from tests.helpers import tiny_albert, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids
from tests.launches import Job
from tests.statistics.test_labels import Interrupted

METHODS = ("whiten", "whiten-diag", "kfac")
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: tiny_bert(num_hidden_layers=3),
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "t5": tiny_t5,
}
ARCHITECTURES = [pytest.param(name, marks=pytest.mark.slow if name == "t5" else ()) for name in MODELS]


def batches(model: PreTrainedModel) -> list[Batch]:
    """Two of eight samples, of 9 and 6 tokens, the last two of which are padding for every third sample."""
    made = []
    for seed, length in ((0, 9), (1, 6)):
        ids = token_ids(seed, batch=8, length=length)
        mask = torch.ones_like(ids)
        mask[::3, -2:] = 0
        classes = "SequenceClassification" in type(model).__name__
        labels = torch.arange(8) % 2 if classes else ids.masked_fill(mask == 0, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def sequential(model: PreTrainedModel, method: str = "kfac", **settings: Any) -> tuple[PreTrainedModel, Any]:
    work = settings.pop("work", None)
    config = CompressionConfig(method, **{"rank_ratio": 0.25, "allocation": "uniform", "sequential": True} | settings)
    data = batches(model)
    statistics = compute_statistics(model, data, config.needs, include=config.include, progress=False)
    return compress(model, config, statistics, False, work=work, batches=data)


# --- the closed form ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_no_other_factors_and_bias_come_nearer_to_the_dense_output(method: str, bias: bool) -> None:
    """Gradient descent from the solution finds nothing better: E‖G^½ (V x′ + c − U D x′ − b)‖² and its damping.

    V x′ + c is the ridge regression of what the dense layer says on x′, found as least squares here.
    """
    torch.manual_seed(0)
    x = torch.randn(500, 12) @ torch.randn(12, 12) + 3 * torch.randn(12)
    y = x + 0.5 * torch.randn(500, 12) @ torch.randn(12, 12) + torch.randn(12)
    g = torch.randn(500, 10) @ torch.randn(10, 10)
    linear, rank = nn.Linear(12, 10, bias=bias), 4
    gradients = g.T @ g
    sums = {"gradient_moment": gradients, "active_tokens": torch.tensor(500.0), "activation_moment": y.T @ y}
    sums |= {"activation_mean": y.sum(0), "drift": (x - y).T @ y, "mean_drift": (x - y).sum(0)}
    statistics = Statistics({kind: {"layer": total} for kind, total in sums.items()}, 500, 500, {})
    solver = LayerSolver({"layer": Target.of("layer", linear)}, get_method(method), statistics)
    low_rank, *_ = solver.low_rank("layer", rank)

    weigh = {"whiten": torch.eye(10), "whiten-diag": gradients.diagonal().diag() / 500, "kfac": gradients / 500}[method]
    if method == "kfac":
        weigh = weigh + GRADIENT_DAMPING * weigh.diagonal().mean() * torch.eye(10)
    seen = y - y.mean(0) if bias else y
    damping = ACTIVATION_DAMPING * seen.square().mean()
    weight, said = linear.weight.detach(), linear(x).detach()
    near = ((ACTIVATION_DAMPING + RIDGE) * seen.square().mean()).sqrt() * torch.eye(12)
    centred = said - said.mean(0) if bias else said
    anchor = torch.linalg.lstsq(torch.cat([seen / 500**0.5, near]), torch.cat([centred / 500**0.5, near @ weight.T]))
    wanted = seen @ anchor.solution + said - centred

    def objective(up: Tensor, down: Tensor, added: Tensor | float) -> Tensor:
        change = wanted - y @ down.T @ up.T - added
        delta = anchor.solution.T - up @ down
        return torch.einsum("no,op,np->", change, weigh, change) / 500 + damping * torch.trace(delta.T @ weigh @ delta)

    found = [low_rank.up.weight, low_rank.down.weight, *([low_rank.up.bias] if bias else [])]
    start = [parameter.detach().clone().requires_grad_() for parameter in found]
    least = objective(*start, *([] if bias else [0.0])).item()
    optimizer = torch.optim.LBFGS(start, max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(*start, *([] if bias else [0.0]))
        value.backward()
        return value

    optimizer.step(closure)
    assert objective(*start, *([] if bias else [0.0])).item() >= least * (1 - 1e-4)
    one_shot = LayerSolver(
        {"layer": Target.of("layer", linear)}, get_method(method), without_drift(statistics)
    ).low_rank("layer", rank)[0]
    others = [one_shot.up.weight, one_shot.down.weight, one_shot.up.bias if bias else torch.zeros(10)]
    assert objective(*others).item() > 1.05 * least


def without_drift(statistics: Statistics) -> Statistics:
    sums = {kind: sums for kind, sums in statistics.sums.items() if "drift" not in kind}
    return Statistics(sums, statistics.samples, statistics.tokens, statistics.weights)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_what_nothing_is_compressed_before_is_factorized_as_in_one_shot(architecture: str, method: str) -> None:
    include = {"bert": ("layer.0.attention.self.*",), "llama": ("layers.0.self_attn.[qkv]_proj",)}[architecture]
    model = MODELS[architecture]()
    one_shot, _ = sequential(copy.deepcopy(model), method, include=include, sequential=False)
    found, _ = sequential(model, method, include=include)
    assert found.lowrank_ranks == one_shot.lowrank_ranks
    for name in found.lowrank_ranks:
        one, two = (each.get_submodule(name) for each in (one_shot, found))
        torch.testing.assert_close(two.product(), one.product(), rtol=1e-4, atol=1e-5)
        if one.bias is not None:
            torch.testing.assert_close(two.bias, one.bias, rtol=1e-4, atol=1e-6)


# --- what is measured ---


def inputs_of(model: PreTrainedModel, name: str, batch: Batch) -> Tensor:
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    with layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])), torch.no_grad():
        model(**batch)
    return seen[0]


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moments_are_those_of_a_dense_and_a_compressed_model(architecture: str, chained: bool) -> None:
    model = MODELS[architecture]()
    dense, targets = copy.deepcopy(model), find_targets(model)
    marked = marked_batches(model, targets, batches(model), progress=False)
    prefix = Prefix.of(model, targets, marked)
    assert prefix.chained
    prefix.chained = chained
    assert {name for step in prefix.order.steps for name in step.names} == set(targets)
    for step in prefix.order.steps:
        found = prefix.measure(step)
        pairs = [tuple(inputs_of(each, step.names[0], part.batch) for each in (dense, model)) for part in marked]
        active = [part.active[step.names[0]] for part in marked]
        x, y = (torch.cat([pair[n][kept] for pair, kept in zip(pairs, active, strict=True)]) for n in (0, 1))
        expected = {"activation_moment": y.T @ y, "activation_mean": y.sum(0), "mean_drift": (x - y).sum(0)}
        expected |= {"drift": (x - y).T @ y, "active_tokens": torch.tensor(float(len(y)))}
        for kind, total in expected.items():
            torch.testing.assert_close(found[kind], total, rtol=1e-3, atol=1e-4 * float(y.square().sum().sqrt()))
        for name in step.names:  # another layer, so that what follows reads something else
            prefix.dense[name] = model.get_submodule(name)
            changed = copy.deepcopy(prefix.dense[name])
            nn.init.normal_(changed.weight, std=0.1)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, changed)
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(prefix.dense) < len(targets) if chained else len(prefix.dense) == len(targets)


def test_what_measuring_the_statistics_marked_need_not_be_marked_again(tmp_path: Path) -> None:
    model, config, marks = tiny_bert(), CompressionConfig(rank_ratio=0.25), Marks()
    data, given = batches(model), {"labels": "model", "progress": False}
    statistics = compute_statistics(model, data, config.needs, marks=marks, **given)  # type: ignore[arg-type]
    assert marks.complete
    targets = find_targets(model)
    for one, two in zip(marks, marked_batches(model, targets, data, "model", progress=False), strict=True):
        assert all(torch.equal(one.batch[key], two.batch[key]) for key in two.batch)
        assert all(torch.equal(one.active[name], two.active[name]) for name in targets)
    expected, _ = compress(copy.deepcopy(model), config, statistics, False, batches=data)
    found, report = compress(model, config, statistics, False, batches=marks)
    assert report.settings["sequential"]
    assert torch.equal(outputs(found, data), outputs(expected, data))


def test_a_measurement_that_went_on_from_a_checkpoint_has_not_marked_all(tmp_path: Path) -> None:
    model, marks = tiny_bert(), Marks()
    broken, given = Interrupted(batches(model)), {"progress": False, "work": Work.open(tmp_path / "work", {})}
    with pytest.raises(Stopped):
        compute_statistics(model, broken, ["activation_moment"], **given)
    compute_statistics(model, broken, ["activation_moment"], marks=marks, **given)
    assert not marks.complete


class _Skipping(nn.Module):
    """A block that reads what the first block gave, behind the model's back."""

    def __init__(self, block: nn.Module, seen: list[Tensor]) -> None:
        super().__init__()
        self.block, self.seen = block, seen

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.block(x + self.seen[-1], *args, **kwargs)


def test_blocks_that_are_no_chain_are_run_again() -> None:
    model = tiny_bert(num_hidden_layers=3)
    seen: list[Tensor] = []
    layers = model.bert.encoder.layer
    first = lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])  # noqa: E731
    layers[0].register_forward_hook(first)
    layers[2] = _Skipping(layers[2], seen)
    targets = find_targets(model)
    prefix = Prefix.of(model, targets, marked_batches(model, targets, batches(model), progress=False))
    assert not prefix.chained


# --- whole models ---


@pytest.mark.parametrize("form", ["factors", "interpolative"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_comes_nearer_to_the_dense_one(architecture: str, form: str) -> None:
    model = MODELS[architecture]()
    dense, data = copy.deepcopy(model), batches(model)
    one_shot, _ = sequential(copy.deepcopy(model), "whiten", sequential=False, form=form)
    found, report = sequential(model, "whiten", form=form)
    assert report.settings["sequential"]
    assert found.lowrank_ranks == one_shot.lowrank_ranks
    with torch.no_grad():
        expected = torch.cat([dense(**batch).logits.flatten() for batch in data])
        far, near = (
            float((torch.cat([each(**batch).logits.flatten() for batch in data]) - expected).norm())
            for each in (one_shot, found)
        )
    assert near < far


def outputs(model: PreTrainedModel, data: list[Batch]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten() for batch in data])


def by_default(model: PreTrainedModel, given: bool = True, **settings: Any) -> tuple[PreTrainedModel, bool]:
    """The model by the default of its method, with its samples or without, and whether that was sequential."""
    data, config = batches(model), CompressionConfig(**{"rank_ratio": 0.25, "allocation": "uniform"} | settings)
    statistics = compute_statistics(model, data, config.needs, include=config.include, progress=False)
    found, report = compress(model, config, statistics, False, batches=data if given else None)
    return found, report.settings["sequential"]


def test_the_default_method_is_sequential_where_it_can_be_and_says_so() -> None:
    data, (expected, _) = batches(tiny_bert()), sequential(tiny_bert())
    found, is_sequential = by_default(tiny_bert())
    assert is_sequential
    assert torch.equal(outputs(found, data), outputs(expected, data))
    one_shot, _ = sequential(tiny_bert(), sequential=False)
    found, is_sequential = by_default(tiny_bert(), given=False)
    assert not is_sequential
    assert torch.equal(outputs(found, data), outputs(one_shot, data))
    assert not by_default(tiny_bert(), method="whiten")[1]
    assert not by_default(tiny_albert())[1]
    assert not by_default(tiny_gpt2(), include=("wte", "h.*"))[1]


def answers_of(model: PreTrainedModel, name: str, batch: Batch) -> Tensor:
    """What a layer says of the tokens that are no padding."""
    layer = model.get_submodule(name)
    with torch.no_grad():
        return layer(inputs_of(model, name, batch))[batch["attention_mask"].bool()]


def test_what_comes_behind_a_compressed_embedding_mends_what_that_loses() -> None:
    """It reads the same tokens in both models, and is solved before all others."""
    model, data = tiny_bert(), batches(tiny_bert())
    given: Any = {"method": "whiten", "include": ("word_embeddings", "layer.*")}
    dense, (far, _) = copy.deepcopy(model), sequential(copy.deepcopy(model), sequential=False, **given)
    found, _ = sequential(model, **given)
    name = "bert.embeddings.word_embeddings"
    for part in ("up", "down"):
        one, two = (getattr(each.get_submodule(name), part).weight for each in (far, found))
        torch.testing.assert_close(two, one)
    value = "bert.encoder.layer.0.attention.self.value"
    said = [torch.cat([answers_of(each, value, batch) for batch in data]) for each in (dense, far, found)]
    assert (said[2] - said[0]).norm() < 0.97 * (said[1] - said[0]).norm()
    assert by_default(tiny_bert(), include=given["include"])[1]


def test_a_compressed_model_is_compressed_further_and_dtypes_stay() -> None:
    model, _ = sequential(tiny_bert().bfloat16(), rank_ratio=0.4)
    again, report = sequential(model, rank_ratio=0.2)
    assert all(parameter.dtype == torch.bfloat16 for parameter in again.parameters())
    assert report.earlier


def test_what_was_found_before_is_not_found_again(tmp_path: Path) -> None:
    """A job that goes on with some layers done ends with the same bits."""
    work = Work.open(tmp_path / "work", {})
    whole, _ = sequential(tiny_bert(num_hidden_layers=3), work=work)
    files = sorted((tmp_path / "work" / "factors").glob("*.safetensors"))
    for path in [path for path in files if "layer.1.output" in path.name or "layer.2" in path.name]:
        path.unlink()
    assert 0 < len(list((tmp_path / "work" / "factors").glob("*.safetensors"))) < len(files)
    again, _ = sequential(tiny_bert(num_hidden_layers=3), work=work)
    one, two = whole.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def compress_share(folder: Path) -> None:
    state, model = PartialState(), tiny_bert(num_hidden_layers=2)
    mine = batches(model)[state.process_index :: state.num_processes]
    config = CompressionConfig(rank_ratio=0.25, allocation="uniform", sequential=True)
    marks = Marks()
    statistics = compute_statistics(model, mine, config.needs, progress=False, marks=marks)
    compress(model, config, statistics, progress=False, batches=marks if state.num_processes > 1 else mine)
    with torch.no_grad():
        said = torch.cat([model(**batch).logits for batch in batches(model)])
    torch.save(model.state_dict() | {"said": said}, folder / f"{state.process_index}-of-{state.num_processes}.pt")


def test_processes_share_the_samples_and_the_layers(tmp_path: Path) -> None:
    """Three processes, one of them without samples, end with one model, which says what that of a single one says."""
    Job(tmp_path / "job", compress_share, tmp_path, processes=3).done()
    compress_share(tmp_path)
    expected = torch.load(tmp_path / "0-of-1.pt")
    shares = [torch.load(tmp_path / f"{rank}-of-3.pt") for rank in range(3)]
    assert all(torch.equal(share[key], shares[0][key]) for share in shares for key in expected)
    torch.testing.assert_close(shares[0]["said"], expected["said"], rtol=1e-4, atol=1e-6)


# --- what is refused ---


def test_what_cannot_be_sequential_is_refused_before_anything_is_edited() -> None:
    with pytest.raises(LowRankError, match=r"^tfwsvd does not count inputs by their moment; sequential is for whiten"):
        CompressionConfig("tfwsvd", sequential=True)
    with pytest.raises(LowRankError, match=r"^albert\..* is used 3 times in a forward pass"):
        sequential(tiny_albert())
    with pytest.raises(LowRankError, match=r"^transformer.wte reads tokens, and lm_head, which is tied to it, hidden"):
        sequential(tiny_gpt2(), include=("wte", "h.*"))
    model = tiny_bert()
    config = CompressionConfig(sequential=True)
    statistics = compute_statistics(model, batches(model), config.needs, progress=False)
    with pytest.raises(LowRankError, match=r"^sequential factors need the samples once more: give `batches`"):
        compress(model, config, statistics, progress=False)
    assert type(model).__name__ == "BertForSequenceClassification"
