"""Layers that read the same input keep one activation moment, and each has what it would have measured alone."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lowrank import Statistics, compute_statistics
from hf_lowrank.statistics.hooks import Recorder
from hf_lowrank.statistics.shared import InputSums
from tests.helpers import tiny_albert, tiny_bert, tiny_llama
from tests.statistics.test_statistics import padded_batch

KINDS = ["activation_moment", "activation_magnitude", "active_tokens"]
MODELS = {
    "encoder": (tiny_bert, padded_batch(torch.tensor([0, 1, 1, 0]))),
    "decoder": (tiny_llama, padded_batch()),
    "shared blocks": (tiny_albert, padded_batch(torch.tensor([0, 1, 1, 0]))),
}


def measure(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Statistics:
    later = {key: value.flip(0) for key, value in batch.items()}
    return compute_statistics(model, [batch, later], KINDS, progress=False)


@pytest.mark.parametrize("case", MODELS)
def test_every_layer_has_what_it_would_have_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, batch = MODELS[case]
    shared = measure(make(), batch)
    monkeypatch.setattr(Recorder, "readers", lambda self, name: (name,))
    alone = measure(make(), batch)
    for kind in KINDS:
        tensors = {id(tensor) for tensor in shared.sums[kind].values()}
        assert len(tensors) < len(shared.sums[kind]) == len({id(tensor) for tensor in alone.sums[kind].values()})
        for name, tensor in alone.sums[kind].items():
            assert torch.equal(shared.sums[kind][name], tensor)


def test_only_the_same_active_tokens_of_the_same_tensor_are_shared() -> None:
    moments = measure(tiny_bert(), MODELS["encoder"][1]).sums["activation_moment"]
    query, key, value, output = (
        moments[f"bert.encoder.layer.1.attention.{part}"]
        for part in ("self.query", "self.key", "self.value", "output.dense")
    )
    assert key is value
    assert key is not query  # of the last layer only the first position is read
    assert output is not query
    first = moments["bert.encoder.layer.0.attention.self.query"]
    assert first is moments["bert.encoder.layer.0.attention.self.key"]


class TwoReaders(PreTrainedModel):
    """Two layers that read one tensor, of which the loss depends on at one position each."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig(num_labels=3))
        self.readers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, states: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.readers[0](states)[:, 0] + self.readers[1](states)[:, 1]
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_layers_that_are_read_at_as_many_other_positions_share_nothing() -> None:
    states, labels = torch.randn(5, 6, 4), torch.tensor([0, 1, 2, 1, 0])
    batches = [{"states": states, "labels": labels}]
    moments = compute_statistics(TwoReaders(), batches, KINDS, progress=False).sums["activation_moment"]
    for position in (0, 1):
        read = states[:, position]
        torch.testing.assert_close(moments[f"readers.{position}"], read.T @ read)


def test_layers_part_at_the_first_batch_where_they_differ() -> None:
    targets: dict[str, nn.Module] = {name: nn.Linear(2, 3) for name in "abc"}
    sums = InputSums(["active_tokens"], targets, None)
    x, every, some = torch.randn(1, 4, 2), torch.ones(1, 4), torch.tensor([[1.0, 0, 0, 0]])
    for masks in ({"a": every, "b": every, "c": every}, {"a": every, "b": every, "c": some}):
        for name, mask in masks.items():
            sums.arrive(name, x, mask, ("a", "b", "c"))
    sums.arrive("b", x, every, ("a", "b", "c"))  # a and c get no gradient in the last batch
    sums.end_batch()
    assert {name: float(total) for name, total in sums.result()["active_tokens"].items()} == {"a": 8, "b": 12, "c": 5}


def test_shared_moments_are_stored_once_and_shared_again_when_read(tmp_path: Path) -> None:
    measured = measure(tiny_llama(), MODELS["decoder"][1])
    measured.save(tmp_path / "statistics")
    again = Statistics.load(tmp_path / "statistics")
    for kind in KINDS:
        assert set(again.sums[kind]) == set(measured.sums[kind])
        for name, tensor in measured.sums[kind].items():
            assert torch.equal(again.sums[kind][name], tensor)
    moments = again.sums["activation_moment"]
    assert len({tensor.data_ptr() for tensor in moments.values()}) == 2 * 4  # q k v, o, gate up, down
    unique = sum({tensor.data_ptr(): tensor.nbytes for tensor in moments.values()}.values())
    assert (tmp_path / "statistics/statistics.safetensors").stat().st_size < 1.5 * unique + 20_000
