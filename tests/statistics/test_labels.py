"""Labels of the model: in expectation its exact Fisher information, the same however samples come."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import BertForQuestionAnswering, BertModel, PreTrainedModel

from hf_lowrank import METHODS, CompressionConfig, LowRankError, Statistics, compress, compute_statistics
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.interrupts import Stopped
from hf_lowrank.model.predictions import Predicted, mean_pooled, predict
from hf_lowrank.model.targets import find_targets
from hf_lowrank.statistics.labels import ModelLabels, projected_losses
from tests.helpers import bert_config, tiny_bert, tiny_llama, tiny_t5
from tests.jobs.test_distributed import assert_equal_up_to_order
from tests.launches import Job
from tests.statistics.test_statistics import Batch, padded_batch, token_batch, token_classifier

DRAWS = 1500
DRAWN: dict[str, Any] = {"labels": "model", "progress": False}


def encoder() -> BertModel:
    torch.manual_seed(0)
    return BertModel(bert_config(), add_pooling_layer=False).eval()


def answerer() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    return BertForQuestionAnswering(bert_config())


def unlabelled(lengths: tuple[int, ...] = (9, 4, 7, 5)) -> Batch:
    return {key: value for key, value in padded_batch(lengths=lengths).items() if key != "labels"}


def sample_of(batch: Batch, number: int) -> Batch:
    return {key: value[number : number + 1] for key, value in batch.items()}


def last_target(model: PreTrainedModel) -> str:
    return list(find_targets(model))[-1]


def gradients(model: PreTrainedModel, scalars: list[Tensor]) -> list[Tensor]:
    """The gradient of each scalar by the last target's weight."""
    weight = model.get_submodule(last_target(model)).weight
    return [torch.autograd.grad(scalar, weight, retain_graph=True)[0] for scalar in scalars]


def exact_fisher(model: PreTrainedModel, batch: Batch, readout: Any = None) -> Tensor:
    """The diagonal of the curvature of each sample's mean loss, by enumeration of all labels: the mean over samples."""
    total = torch.zeros(())
    for n in range(len(batch["input_ids"])):
        predicted = predict(model, sample_of(batch, n), readout)
        for row in predicted.values:
            total = total + row_fisher(model, predicted.kind, row) / len(predicted.values)
    return total / len(batch["input_ids"])


def row_fisher(model: PreTrainedModel, kind: str, row: Tensor) -> Tensor:
    """Σ_y p(y) ∂(−log p(y))² of classes and of flags (their mean); JᵀJ of vectors, 2 / k of that for k numbers."""
    if kind == "classes":
        of_each = gradients(model, list(-row.log_softmax(-1)))
        return sum(p * g.square() for p, g in zip(row.softmax(-1).detach(), of_each, strict=True))
    if kind == "flags":
        share = row.sigmoid().detach()
        of_each = gradients(model, list(row))
        return sum(p * (1 - p) * g.square() for p, g in zip(share, of_each, strict=True)) / len(row)
    scale = 2 / len(row) if kind == "numbers" else 1
    return scale * sum(g.square() for g in gradients(model, list(row)))


CASES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], Batch]]] = {
    "classes": (lambda: tiny_bert(num_labels=3), unlabelled),
    "labels that may each apply": (
        lambda: tiny_bert(num_labels=3, problem_type="multi_label_classification"),
        unlabelled,
    ),
    "several numbers": (lambda: tiny_bert(num_labels=2, problem_type="regression"), unlabelled),
    "tokens": (token_classifier, token_batch),
    "next tokens": (tiny_llama, lambda: unlabelled((3, 2))),
    "decoded tokens": (tiny_t5, lambda: padded_batch(lengths=(3, 2))),
    "marked answers": (answerer, lambda: unlabelled((4, 3))),
    "hidden states": (encoder, lambda: unlabelled((3, 2))),
}


def layer_of(statistics: Statistics) -> Tensor:
    return statistics.mean("fisher", list(statistics.weights)[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_projected_fisher_is_the_exact_one_in_expectation(case: str) -> None:
    model, batch = CASES[case][0]().eval(), CASES[case][1]()
    size = len(batch["input_ids"])
    copies = {key: value.repeat(DRAWS // 5 // size, *[1] * (value.ndim - 1)) for key, value in batch.items()}
    drawn = compute_statistics(
        model, [copies] * 5, ["fisher"], include=[last_target(model)], labels="model", progress=False
    )
    exact = exact_fisher(model, batch)
    assert (drawn.curvature, drawn.labels) == (1.0, "model")
    found = layer_of(drawn)
    assert float(found.sum() / exact.sum()) == pytest.approx(1, abs=0.1)
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.98


def test_one_projection_is_exact_for_one_number() -> None:
    """Residuals of ±1 have the square 1: the Gauss-Newton matrix itself, whatever the seed."""
    model, batch = tiny_bert(num_labels=1), unlabelled()
    exact = exact_fisher(model, batch)
    for seed in (0, 1):
        drawn = compute_statistics(model, [batch], ["fisher"], labels=ModelLabels(seed), progress=False)
        torch.testing.assert_close(layer_of(drawn), exact, rtol=1e-4, atol=1e-6 * float(exact.max()))


def test_pooled_embeddings_are_measured_through_a_readout() -> None:
    model, batch = encoder(), unlabelled((5, 3))
    exact = exact_fisher(model, batch, mean_pooled)
    copies = {key: value.repeat(150, 1) for key, value in batch.items()}
    source = ModelLabels(readout=mean_pooled)
    drawn = compute_statistics(model, [copies] * 3, ["fisher"], labels=source, progress=False)
    assert drawn.labels == "model, mean_pooled"
    assert float(layer_of(drawn).sum() / exact.sum()) == pytest.approx(1, abs=0.1)


def test_batches_and_padding_do_not_change_the_signs() -> None:
    model, batch = token_classifier().eval(), token_batch()
    whole = compute_statistics(model, [batch], ["fisher"], labels="model", progress=False)
    alone = compute_statistics(
        model, [sample_of(batch, n) for n in range(4)], ["fisher"], labels="model", progress=False
    )
    assert_equal_up_to_order(alone, whole)


def test_the_seed_decides_the_signs() -> None:
    model, batch = tiny_bert(num_labels=3), unlabelled()
    first, again, other = (
        compute_statistics(model, [batch], ["fisher"], labels=ModelLabels(seed), progress=False) for seed in (4, 4, 5)
    )
    assert torch.equal(layer_of(first), layer_of(again))
    assert not torch.allclose(layer_of(first), layer_of(other), rtol=0.1)


def test_labels_of_the_data_are_not_read() -> None:
    model = tiny_bert(num_labels=3)
    one, other = (padded_batch(torch.tensor(labels)) for labels in ([0, 2, 1, 2], [1, 1, 1, 1]))
    first, second = (compute_statistics(model, [b], ["fisher"], labels="model", progress=False) for b in (one, other))
    assert torch.equal(layer_of(first), layer_of(second))


def test_a_text_that_predicts_nothing_does_not_count() -> None:
    measured = compute_statistics(tiny_llama(), [unlabelled((5, 1))], ["fisher"], labels="model", progress=False)
    assert measured.samples == 1


def in_shares(output: Path) -> None:
    state, whole = PartialState(), padded_batch(torch.tensor([0, 1, 1, 0, 1]), lengths=(9, 8, 6, 4, 1))
    mine = range(state.process_index, 5, state.num_processes)
    measured = compute_statistics(
        tiny_bert(num_labels=3), [sample_of(whole, n) for n in mine], ["fisher"], labels="model", progress=False
    )
    if state.is_last_process:
        measured.save(output)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """As `calibration_loader` deals samples: with other draws the sums would be others by far more than rounding."""
    for processes in (1, 2):
        Job(tmp_path / "job", in_shares, tmp_path / str(processes), processes=processes).done()
    assert_equal_up_to_order(*(Statistics.load(tmp_path / str(processes)) for processes in (2, 1)))


class Interrupted(list):
    """Batches of which the last one comes only when asked for again."""

    stopped = False

    def __iter__(self) -> Any:
        for number, batch in enumerate(super().__iter__()):
            if number == len(self) - 1 and not self.stopped:
                self.stopped = True
                raise Stopped(15)
            yield batch


def test_a_stopped_measurement_goes_on_to_the_same_bits_and_with_its_own_labels_only(tmp_path: Path) -> None:
    model, samples = tiny_bert(num_labels=3), [sample_of(padded_batch(torch.tensor([0, 2, 1, 2])), n) for n in range(4)]
    kinds = ["fisher", "gradient_moment", "activation_moment", "fisher_in_eigenbasis"]
    expected = compute_statistics(model, samples, kinds, labels="model", progress=False)
    broken, given = Interrupted(samples), {"progress": False, "work": Work.open(tmp_path / "work", {})}
    with pytest.raises(Stopped):
        compute_statistics(model, broken, kinds, labels="model", **given)
    with pytest.raises(LowRankError, match="by the labels of the model, not of the data"):
        compute_statistics(model, broken, kinds, **given)
    found = compute_statistics(model, broken, kinds, labels="model", **given)
    for kind, sums in expected.sums.items():
        assert all(torch.equal(found.sums[kind][name], total) for name, total in sums.items())
    with pytest.raises(LowRankError, match="with the labels of the model, not of the data"):
        compute_statistics(model, samples, kinds, **given)  # after a finished pass


def test_statistics_say_whose_labels_they_are_by_and_are_not_mixed(tmp_path: Path) -> None:
    model, batch = tiny_bert(num_labels=3), padded_batch(torch.tensor([0, 2, 1, 2]))
    config = CompressionConfig("kfac", 0.3)
    drawn = compute_statistics(model, [batch], config.needs, labels="model", progress=False)
    drawn.save(tmp_path / "drawn")
    assert Statistics.load(tmp_path / "drawn").labels == "model"
    given = compute_statistics(model, [batch], ["fisher"], progress=False)
    with pytest.raises(LowRankError, match="with the labels of the model, not of the data"):
        drawn.joined(given)
    _, report = compress(model, config, drawn, progress=False)
    assert report.statistics["labels"] == "model"


def test_the_default_is_the_methods_own() -> None:
    """The papers' methods stay as published."""
    assert {name: method.labels for name, method in METHODS.items() if method.labels != "data"} == {"kfac": "model"}


def test_what_has_no_likelihood_is_refused() -> None:
    with pytest.raises(LowRankError, match="unknown labels 'teacher'; there are data, model"):
        compute_statistics(tiny_bert(), [unlabelled()], ["fisher"], labels="teacher", progress=False)

    class Silent(BertModel):
        def forward(self, *given: Any, **rest: Any) -> Any:
            super().forward(*given, **rest)
            return ()

    with pytest.raises(LowRankError, match="Silent gives no classes, numbers, tokens or hidden states"):
        compute_statistics(Silent(bert_config()), [unlabelled()], ["fisher"], labels="model", progress=False)


def test_a_confident_models_fisher_is_found_by_fewer_projections_than_draws() -> None:
    """Their outer products have the mean diag(p) − p pᵀ exactly, and a small part of the variance of drawn labels'."""
    rows = 4000
    logits = torch.tensor([5.0, 1.0, 0.0]).repeat(rows, 1).requires_grad_()
    predicted = Predicted("classes", logits, torch.arange(rows), rows)
    projected_losses(predicted, range(rows), 0).sum().backward()
    assert logits.grad is not None
    share = logits[0].detach().softmax(-1)
    fisher = share.diag() - share.outer(share)

    def variance(gradients: Tensor, weights: Tensor) -> float:
        squares = (gradients[:, :, None] * gradients[:, None] - fisher).square().sum(dim=(1, 2))
        return float((weights * squares).sum() / weights.sum())

    found = logits.grad.T @ logits.grad / rows
    torch.testing.assert_close(found, fisher, rtol=0.1, atol=0.05 * float(fisher.max()))
    drawn = torch.eye(3) - share  # by label
    assert variance(logits.grad, torch.ones(rows)) < 0.1 * variance(drawn, share)
