"""Fisher information against a naive loop over single samples; a model left alone; statistics with an origin."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForTokenClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

from hf_lowrank import LowRankError, Statistics, compute_fisher, compute_statistics
from hf_lowrank.jobs import progress
from hf_lowrank.model.targets import Target, find_targets
from hf_lowrank.nn.layers_lowrank import dense_weight
from hf_lowrank.statistics import one_pass
from hf_lowrank.statistics.kinds import add_fisher, add_fisher_rows
from tests.helpers import (
    VOCABULARY,
    bert_config,
    factorize,
    modules_of,
    tiny_albert,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)

Batch = dict[str, Any]


def padded_batch(labels: torch.Tensor | None = None, lengths: tuple[int, ...] = (9, 4, 7, 1)) -> Batch:
    """Token ids of several lengths, padded on the right; without `labels`, those of a language model."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator) * mask
    if labels is None:
        labels = ids.masked_fill(~mask, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def token_batch() -> Batch:
    batch = padded_batch()
    labels = torch.randint(0, 5, batch["input_ids"].shape).masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 0] = -100  # as special tokens
    labels[3, 0] = 2
    return batch | {"labels": labels}


def token_classifier() -> BertForTokenClassification:
    torch.manual_seed(0)
    return BertForTokenClassification(bert_config(num_labels=5))


CASES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], Batch]]] = {
    "classification": (lambda: tiny_bert(num_labels=3), lambda: padded_batch(torch.tensor([0, 2, 1, 2]))),
    "regression": (lambda: tiny_bert(num_labels=1), lambda: padded_batch(torch.tensor([0.5, -1.0, 2.0, 3.0]))),
    "multi-label": (
        lambda: tiny_bert(num_labels=3, problem_type="multi_label_classification"),
        lambda: padded_batch(torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
    ),
    "token classification": (token_classifier, token_batch),
    "causal language model": (tiny_llama, padded_batch),
    "Conv1D": (tiny_gpt2, padded_batch),
    "shared blocks": (tiny_albert, lambda: padded_batch(torch.tensor([0, 1, 1, 0]))),
    "encoder-decoder": (tiny_t5, padded_batch),
}


def naive_fisher(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Σ_n (∂ loss_n / ∂ W)², one sample at a time, unpadded, by the model's own loss and autograd alone."""
    model = copy.deepcopy(model).eval()
    targets = modules_of(find_targets(model))
    total = {name: torch.zeros(dense_weight(module).shape) for name, module in targets.items()}
    for n in range(len(batch["labels"])):
        length = int(batch["attention_mask"][n].sum())
        sample = {key: value[n : n + 1] for key, value in batch.items()}
        sample = {
            key: v[:, :length] if v.ndim == 2 and v.shape == batch["input_ids"][:1].shape else v
            for key, v in sample.items()
        }
        model.zero_grad()
        loss = model(**sample).loss
        if not torch.isfinite(loss):  # a text of one token predicts nothing
            continue
        loss.backward()
        for name, module in targets.items():
            gradient = module.weight.grad
            total[name] += (gradient.T if isinstance(module, Conv1D) else gradient) ** 2
    return total


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["element", "row"])
def test_fisher_is_that_of_a_naive_loop_over_samples(case: str, form: str) -> None:
    make_model, make_batch = CASES[case]
    model, batch = make_model(), make_batch()
    if case in ("causal language model", "Conv1D", "encoder-decoder"):
        batch = {key: value[:3] for key, value in batch.items()}
    expected = naive_fisher(model, batch)
    statistics = compute_fisher(model, [batch], form=form, progress=False)
    kind = "fisher" if form == "element" else "fisher_rows"
    assert statistics.samples == len(batch["labels"])
    assert statistics.tokens == int(batch["attention_mask"].sum())
    for name, total in expected.items():
        total = total if form == "element" else total.sum(dim=0)
        assert total.sum() > 0
        torch.testing.assert_close(
            statistics.mean(kind, name) * statistics.samples, total, rtol=2e-4, atol=1e-6 * float(total.max())
        )


def test_the_mean_of_a_batch_is_not_what_is_squared() -> None:
    """(mean gradient)² is the commonest mistake, and a different thing."""
    model, batch = tiny_bert(num_labels=3), padded_batch(torch.tensor([0, 2, 1, 2]))
    fisher = compute_fisher(model, [batch], progress=False)
    model.eval()(**batch).loss.backward()
    name, target = next(iter(find_targets(model).items()))
    assert (target.module.weight.grad.square().sum() / fisher.mean("fisher", name).sum()) < 0.7


def test_batches_do_not_matter() -> None:
    model, batch = tiny_bert(num_labels=3), padded_batch(torch.tensor([0, 2, 1, 2]))
    parts = [{key: value[slice_] for key, value in batch.items()} for slice_ in (slice(0, 3), slice(3, 4))]
    whole, split = (compute_fisher(model, batches, progress=False) for batches in ([batch], parts))
    for name, total in whole.sums["fisher"].items():
        torch.testing.assert_close(split.sums["fisher"][name], total, rtol=1e-4, atol=1e-6 * float(total.max()))


def test_row_form_is_the_same_for_short_and_long_samples() -> None:
    torch.manual_seed(0)
    for tokens in (2, 50):
        x, g = torch.randn(4, tokens, 12), torch.randn(4, tokens, 20)
        rows, elements = torch.zeros(12), torch.zeros(20, 12)
        add_fisher_rows(rows, x, g)
        add_fisher(elements, x, g)
        torch.testing.assert_close(rows, elements.sum(dim=0), rtol=1e-4, atol=1e-4)


def test_known_losses_run_in_batches_and_others_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    original = one_pass.Pass._can_run_together
    monkeypatch.setattr(
        one_pass.Pass, "_can_run_together", lambda *given: chosen.append(original(*given)) or chosen[-1]
    )
    compute_fisher(tiny_bert(num_labels=3), [padded_batch(torch.tensor([0, 2, 1, 2]))], progress=False)
    compute_fisher(tiny_llama(), [padded_batch(lengths=(9, 4, 7))], progress=False)
    compute_fisher(tiny_t5(), [padded_batch(lengths=(9, 4, 7))], progress=False)
    unknown = tiny_bert(num_labels=3)
    unknown.register_forward_hook(lambda module, args, output: type(output)({**output, "loss": 2 * output.loss}))
    compute_fisher(unknown, [padded_batch(torch.tensor([0, 2, 1, 2]))], progress=False)
    assert chosen == [True, True, True, False]


def test_a_model_whose_samples_meet_is_run_one_sample_at_a_time() -> None:
    """A block that adds the mean over the batch: only single samples have gradients of their own."""
    model, batch = tiny_bert(num_labels=3), padded_batch(torch.tensor([0, 2, 1, 2]))
    first = model.bert.encoder.layer[0]
    first.register_forward_hook(lambda module, args, output: output + output.mean(dim=0, keepdim=True))
    expected = naive_fisher(model, batch)
    measured = compute_fisher(model, [batch], progress=False)
    for name, total in expected.items():
        torch.testing.assert_close(measured.sums["fisher"][name], total, rtol=2e-4, atol=1e-6 * float(total.max()))


def test_a_layer_that_sees_its_tokens_in_one_row_is_run_one_sample_at_a_time() -> None:
    model, batch = tiny_bert(num_labels=3), padded_batch(torch.tensor([0, 2, 1, 2]))
    dense = model.bert.encoder.layer[0].intermediate.dense
    shape: list[torch.Size] = []
    dense.register_forward_pre_hook(lambda module, args: shape.append(args[0].shape) or (args[0].flatten(0, 1),))
    dense.register_forward_hook(lambda module, args, output: output.unflatten(0, shape[-1][:2]))
    expected = naive_fisher(model, batch)
    measured = compute_fisher(model, [batch], progress=False)
    for name, total in expected.items():
        torch.testing.assert_close(measured.sums["fisher"][name], total, rtol=2e-4, atol=1e-6 * float(total.max()))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_afterwards(fails: bool) -> None:
    model, batch = tiny_bert(num_labels=3).train(), padded_batch(torch.tensor([0, 2, 1, 2]))
    model.bert.encoder.layer[1].eval()
    model.classifier.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    if fails:
        with pytest.raises(IndexError):
            compute_fisher(model, [batch, batch | {"input_ids": batch["input_ids"] + VOCABULARY}], progress=False)
    else:
        compute_fisher(model, [batch], progress=False)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_dropout_is_off() -> None:
    model, batch = tiny_bert(num_labels=3, hidden_dropout_prob=0.5).train(), padded_batch(torch.tensor([0, 2, 1, 2]))
    first, second = (compute_fisher(model, [batch], progress=False).sums["fisher"] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_half_precision_models_are_summed_in_float32() -> None:
    model, batch = tiny_bert(num_labels=3), padded_batch(torch.tensor([0, 2, 1, 2]))
    exact = compute_fisher(model, [batch], progress=False).sums["fisher"]
    half = compute_fisher(copy.deepcopy(model).bfloat16(), [batch], progress=False).sums["fisher"]
    for name, total in exact.items():
        assert half[name].dtype == torch.float32
        assert (half[name] - total).norm() < 0.1 * total.norm()


def test_a_compressed_model_has_the_fisher_of_the_products_of_its_factors() -> None:
    name, batch = "bert.encoder.layer.0.attention.self.query", padded_batch(torch.tensor([0, 2, 1, 2]))
    model, dense = factorize(tiny_bert(num_labels=3), names=[name]), tiny_bert(num_labels=3)
    with torch.no_grad():
        dense.get_submodule(name).weight.copy_(dense_weight(model.get_submodule(name)))
    found, expected = (compute_fisher(each, [batch], progress=False).sums["fisher"] for each in (model, dense))
    assert found.keys() == expected.keys()
    for layer, total in expected.items():
        torch.testing.assert_close(found[layer], total, rtol=1e-3, atol=1e-5 * float(total.max()))


def test_the_curvature_of_the_loss_is_known() -> None:
    """Per Fisher information: one for a class, 1 / (2 E r²) for a number, the labels of a sample for tokens."""
    classes, numbers = padded_batch(torch.tensor([0, 2, 1, 2])), padded_batch(torch.tensor([0.5, -1.0, 2.0, 3.0]))
    assert compute_statistics(tiny_bert(num_labels=3), [classes], ["fisher_rows"], progress=False).curvature == 1
    model = tiny_bert(num_labels=1)
    with torch.no_grad():
        error = float(model(**numbers).loss)
    measured = compute_statistics(model, [numbers], ["fisher_rows"], progress=False)
    assert measured.curvature == pytest.approx(1 / (2 * error), rel=1e-4)
    causal = padded_batch(lengths=(9, 4, 7, 5))
    measured = compute_statistics(tiny_llama(), [causal], ["fisher_rows"], progress=False)
    assert measured.curvature == (8 + 3 + 6 + 4) / 4
    labelled = (token_batch()["labels"] != -100).sum().item() / 4
    assert (
        compute_statistics(token_classifier(), [token_batch()], ["fisher_rows"], progress=False).curvature == labelled
    )


class OneLayer(PreTrainedModel):
    """A linear layer whose outputs are logits or predictions."""

    config_class = PreTrainedConfig

    def __init__(self, outputs: int, problem_type: str) -> None:
        super().__init__(PreTrainedConfig(num_labels=outputs, problem_type=problem_type))
        self.blocks = nn.ModuleList([nn.Linear(4, outputs)])

    def forward(self, states: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.blocks[0](states)
        loss = None if labels is None else self.mean_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def mean_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.problem_type == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        return F.binary_cross_entropy_with_logits(logits, labels)


@pytest.mark.parametrize("outputs", [1, 8])
@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_the_curvature_is_that_of_the_mean_loss(problem_type: str, outputs: int) -> None:
    """The Hessian by autograd, on labels that the model itself would draw."""
    torch.manual_seed(0)
    model, states = OneLayer(outputs, problem_type), torch.randn(20_000, 4) * torch.tensor([0.3, 1.0, 2.0, 0.5])
    with torch.no_grad():
        logits = model(states).logits
    noise = 0.5 * torch.randn_like(logits)
    labels = logits + noise if problem_type == "regression" else torch.bernoulli(logits.sigmoid())

    def mean_loss(weight: torch.Tensor) -> torch.Tensor:
        return model.mean_loss(F.linear(states, weight, model.blocks[0].bias), labels)

    weight = model.blocks[0].weight.detach()
    hessian = torch.autograd.functional.hessian(mean_loss, weight).reshape(weight.numel(), -1).diagonal()
    batches = [{"states": x, "labels": y} for x, y in zip(states.split(5000), labels.split(5000), strict=True)]
    measured = compute_fisher(model, batches, progress=False)
    found = measured.curvature * measured.mean("fisher", "blocks.0")
    torch.testing.assert_close(found.flatten(), hessian, rtol=0.1, atol=0)


def test_bad_numbers_are_named() -> None:
    model, batch = tiny_bert(num_labels=1), padded_batch(torch.tensor([0.5, -1.0, 2.0, 3.0]))
    bad = batch | {"labels": torch.tensor([0.5, -1.0, float("nan"), 3.0])}
    for batches, number in (([batch, bad], 6), ([{key: value[1:] for key, value in bad.items()}], 1)):
        with pytest.raises(LowRankError, match=f"the loss is not finite for sample {number}"):
            compute_fisher(model, batches, progress=False)
    model.bert.encoder.layer[1].output.register_forward_hook(
        lambda module, args, output: (
            output.register_hook(lambda g: g * torch.tensor([1.0, 1.0, float("inf"), 1.0])[: len(g), None, None])
            and None
        )
    )
    with pytest.raises(LowRankError, match=r"the gradient of bert\.encoder\.layer\.0\S+ is not finite for sample 2"):
        compute_fisher(model, [batch], progress=False)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(LowRankError, match=r"layer\.1\.output\.dense: 1 of its 2048 weights are not finite"):
        compute_fisher(model, [batch], progress=False)


def test_bad_calls_are_refused() -> None:
    model, batch = tiny_bert(), padded_batch(torch.tensor([0, 1, 1, 0]))
    with pytest.raises(LowRankError, match="unknown statistic 'fishr'"):
        compute_statistics(model, [batch], ["fishr"])
    with pytest.raises(LowRankError, match="no samples"):
        compute_fisher(model, [], progress=False)
    with pytest.raises(LowRankError, match="lack the labels"):
        compute_fisher(model, [{key: value for key, value in batch.items() if key != "labels"}], progress=False)


# --- the container ---


def measured() -> tuple[PreTrainedModel, Statistics]:
    model = tiny_bert(num_labels=3)
    batch = padded_batch(torch.tensor([0, 2, 1, 2]))
    return model, compute_fisher(model, [batch], origin={"model": "tiny", "seed": 0}, progress=False)


def test_saved_statistics_come_back_equal(tmp_path: Path) -> None:
    model, statistics = measured()
    statistics.save(tmp_path / "fisher")
    loaded = Statistics.load(tmp_path / "fisher")
    assert (loaded.samples, loaded.tokens, loaded.origin, loaded.weights) == (
        4,
        21,
        {"model": "tiny", "seed": 0},
        statistics.weights,
    )
    assert all(torch.equal(loaded.sums["fisher"][name], total) for name, total in statistics.sums["fisher"].items())
    assert "loss / weight" in (tmp_path / "fisher" / "statistics.json").read_text()
    loaded.check(find_targets(model), ("fisher", "fisher_rows"))
    with pytest.raises(LowRankError, match="exists and is not empty"):
        statistics.save(tmp_path / "fisher")


def test_the_same_weights_in_half_precision_are_the_same_model() -> None:
    model = tiny_bert(num_labels=3).half().float()
    statistics = compute_fisher(model, [padded_batch(torch.tensor([0, 2, 1, 2]))], progress=False)
    statistics.check(find_targets(copy.deepcopy(model).half()), ("fisher",))


def test_statistics_of_another_model_are_refused() -> None:
    _, statistics = measured()
    with pytest.raises(LowRankError, match="measured on other weights"):
        statistics.check(find_targets(tiny_bert(seed=1, num_labels=3)), ("fisher",))
    name = "bert.encoder.layer.0.intermediate.dense"
    with pytest.raises(LowRankError, match=r"fisher has shape \(64, 32\), its weight needs \(48, 32\)"):
        statistics.check({name: Target.of(name, torch.nn.Linear(32, 48))}, ("fisher",))
    with pytest.raises(LowRankError, match="know nothing of the module 'model.layers.0"):
        statistics.check(find_targets(tiny_llama()), ("fisher",))
    rows = compute_fisher(tiny_bert(), [padded_batch(torch.tensor([0, 1, 1, 0]))], form="row", progress=False)
    with pytest.raises(LowRankError, match="have no 'fisher'.*--kind fisher"):
        rows.mean("fisher", "anything")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    _, statistics = measured()
    folder = tmp_path / "fisher"
    statistics.save(folder)
    tensors = folder / "statistics.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    with pytest.raises(LowRankError, match=r"statistics\.safetensors is missing or damaged"):
        Statistics.load(folder)
    (folder / "statistics.json").write_text("{")
    with pytest.raises(LowRankError, match=r"statistics\.json is damaged"):
        Statistics.load(folder)
    with pytest.raises(LowRankError, match="there is no"):
        Statistics.load(tmp_path)


def test_an_embedding_counts_its_tokens() -> None:
    model, batch = tiny_bert(num_labels=3), padded_batch(torch.tensor([0, 2, 1, 2]))
    name, kinds = "bert.embeddings.word_embeddings", ["fisher", "activation_moment", "gradient_moment", "active_tokens"]
    measured = compute_statistics(model, [batch], kinds, include=["word_embeddings"], progress=False)
    counts = torch.bincount(batch["input_ids"][batch["attention_mask"].bool()], minlength=VOCABULARY)
    torch.testing.assert_close(4 * measured.mean("activation_moment", name), counts.float())
    assert float(4 * measured.mean("active_tokens", name)) == counts.sum()
    fisher, moment = measured.mean("fisher", name), measured.mean("gradient_moment", name)
    torch.testing.assert_close(moment, moment.T)
    assert fisher.shape == (32, VOCABULARY)
    assert (fisher.sum(dim=0) > 0).tolist() == (counts > 0).tolist()


def test_passes_are_counted_from_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0)  # a line for every batch
    batch = padded_batch(torch.tensor([0, 2, 1, 2]))
    compute_statistics(tiny_bert(num_labels=3), [batch], ["fisher_in_eigenbasis"])
    told = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["statistics, pass 1 of 2", "statistics, pass 2 of 2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_relied_on_after_one_check(dtype: torch.dtype) -> None:
    model, batch = tiny_bert(num_labels=3).to(dtype), padded_batch(torch.tensor([0, 2, 1, 2]))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, args, given: calls.append(len(given["input_ids"])), with_kwargs=True)
    compute_fisher(model, [batch, batch], progress=False)
    assert calls == [1, 1, 2, 4, 4]
