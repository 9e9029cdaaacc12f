"""Divergence from the dense model against its definition, row by row; its standard error against repeated draws."""

import copy
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from transformers import BertModel, PreTrainedModel

from hf_lowrank import LowRankError
from hf_lowrank.model.predictions import Predicted, divergences, predict
from hf_lowrank.tasks import TASKS
from hf_lowrank.training import divergence
from hf_lowrank.training.divergence import Reference
from tests.helpers import VOCABULARY, bert_config, tiny_bert, tiny_llama, word_tokenizer
from tests.statistics.test_statistics import padded_batch, token_batch, token_classifier

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "cola": lambda: tiny_bert(num_labels=2),
    "stsb": lambda: tiny_bert(num_labels=1),
    "conll2003": token_classifier,
    "tinystories": tiny_llama,
}


def changed(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return other


def rows(task: str, count: int = 7) -> Dataset:
    """Encoded rows of 2 to 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, VOCABULARY, (2 + n % 7,), generator=generator).tolist() for n in range(count)]
    labels = {"cola": [0] * count, "stsb": [0.5] * count, "tinystories": ids}.get(task)
    labels = labels or [[-100, *[1] * (len(each) - 1)] for each in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": labels})


@torch.no_grad()
def by_hand(task: str, dense: PreTrainedModel, model: PreTrainedModel, data: Dataset) -> list[torch.Tensor]:
    """The divergences of each row's predictions, unpadded."""
    found = []
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        p, q = (each.eval()(input_ids=ids).logits[0].double() for each in (dense, model))
        if task == "stsb":
            found.append((p - q).square() / 2)
            continue
        p, q = (p, q) if task == "cola" else (p[:-1], q[:-1]) if task == "tinystories" else (p[1:], q[1:])
        p, q = (each.reshape(-1, each.shape[-1]) for each in (p, q))
        found.append((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1))
    return found


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("kept", [0, 2**28])
def test_the_divergence_is_its_definition(task: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "KEPT_BYTES", kept)
    dense = MODELS[task]()
    model, data = changed(dense), rows(task)
    reference = Reference(dense, word_tokenizer(), TASKS[task], [data.select([0, 1]), data.select(range(2, 7))], 3)
    expected = torch.cat(by_hand(task, dense, model, data))
    for _ in range(2):  # the second time from what is kept
        found = reference.divergence(model, progress=False)
        assert found.mean == pytest.approx(float(expected.mean()), rel=1e-4)
        assert found.count == len(expected)
    assert len(reference.kept) == (3 if kept else 0)
    assert ("unit noise" in found.measure) == (task == "stsb")


def test_the_same_model_is_at_0_and_modes_stay() -> None:
    dense, model = tiny_bert(num_labels=2).train(), tiny_bert(num_labels=2)
    found = Reference(dense, word_tokenizer(), TASKS["cola"], [rows("cola")]).divergence(model, progress=False)
    assert found.mean == pytest.approx(0, abs=1e-6)
    assert (dense.training, model.training) == (True, False)


def test_the_standard_error_is_that_of_samples_whose_tokens_go_together() -> None:
    """Rows of constant divergence, of 1 to 9 tokens: the tokens of a row are not as many observations."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        counts = torch.randint(1, 10, (50,), generator=generator).double()
        sums = counts * torch.rand(50, generator=generator).double()
        mean, error, count = divergence._ratio(sums, counts)
        assert count == int(counts.sum())
        means.append(mean)
        errors.append(error)
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(means).std()), rel=0.1)


def test_flags_and_hidden_states() -> None:
    p, q = torch.tensor([[0.3, -2.0]]), torch.tensor([[1.0, 0.5]])
    flags = [Predicted("flags", each, torch.tensor([0]), 1) for each in (p, q)]
    share, other = p.sigmoid(), q.sigmoid()
    expected = (share * (share / other).log() + (1 - share) * ((1 - share) / (1 - other)).log()).sum()
    torch.testing.assert_close(divergences(*flags)[0], expected)
    model = BertModel(bert_config(), add_pooling_layer=False).eval()
    batch = padded_batch(torch.tensor([0, 1, 1, 0]))
    found = [predict(each, batch) for each in (model, changed(model))]
    assert found[0].counts.tolist() == [9, 4, 7, 1]
    change = (found[0].values - found[1].values).square().sum(dim=1) / 2
    torch.testing.assert_close(divergences(*found), change)


def test_what_cannot_be_compared_is_refused() -> None:
    two, three = tiny_bert(num_labels=2), tiny_bert(num_labels=3)
    reference = Reference(two, word_tokenizer(), TASKS["cola"], [rows("cola")])
    with pytest.raises(LowRankError, match="the models predict different things: 2 classes and 3 classes"):
        reference.divergence(three, progress=False)


def test_tokens_without_a_label_do_not_count() -> None:
    batch = token_batch()
    assert predict(token_classifier(), batch).counts.tolist() == [8, 3, 6, 1]
    assert predict(tiny_llama(), padded_batch()).counts.tolist() == [8, 3, 6, 0]
    unlabelled = {key: value for key, value in padded_batch().items() if key != "labels"}
    assert predict(tiny_llama(), unlabelled).counts.tolist() == [8, 3, 6, 0]
