"""Layers that read the same input keep one activation moment, and each has what it would have measured alone."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lowrank import CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.model.targets import Target, find_targets
from hf_lowrank.statistics.kinds import active_tokens
from hf_lowrank.statistics.shared import InputSums
from tests.helpers import tiny_albert, tiny_bert, tiny_llama
from tests.statistics.test_statistics import padded_batch

KINDS = ["activation_moment", "activation_magnitude", "activation_mean", "active_tokens"]
MODELS = {
    "encoder": (tiny_bert, padded_batch(torch.tensor([0, 1, 1, 0]))),
    "decoder": (tiny_llama, padded_batch()),
    "shared blocks": (tiny_albert, padded_batch(torch.tensor([0, 1, 1, 0]))),
}


def measure(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Statistics:
    later = {key: value.flip(0) for key, value in batch.items()}
    return compute_statistics(model, [batch, later], KINDS, progress=False)


FIRST_ONLY = ("layer.1.attention.output.dense", "layer.1.intermediate.dense", "layer.1.output.dense")


def read_positions(case: str, name: str, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """For each call of a layer the positions [batch, tokens] that the loss depends on, by the shape of the model."""
    real = batch["attention_mask"].bool()
    first = torch.zeros_like(real).index_fill_(1, torch.tensor(0), True)
    if case == "decoder":
        return [real & real.roll(-1, dims=1).index_fill_(1, torch.tensor(-1), False)]  # the last predicts nothing
    if case == "encoder":
        return [first if name.endswith(FIRST_ONLY) else real]
    in_attention = name.endswith(("query", "key", "value"))
    return [real, real, real if in_attention else first]  # the pooler reads the first position of the last call


@pytest.mark.parametrize("case", MODELS)
def test_a_layer_has_the_moment_of_the_tokens_that_the_loss_depends_on(case: str) -> None:
    """Those of its input: a single token's query has no gradient, but its value has."""
    make, batch = MODELS[case]
    model = make()
    measured = measure(model, batch)
    tensors = {id(tensor) for tensor in measured.sums["active_tokens"].values()}
    assert len(tensors) < len(measured.sums["active_tokens"])
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in measured.weights}
    for name, inputs in seen.items():
        model.get_submodule(name).register_forward_hook(lambda _, args, out, inputs=inputs: inputs.append(args[0]))
    with torch.no_grad():
        model(**batch)
    for name, inputs in seen.items():
        read = read_positions(case, name, batch)
        rows = torch.cat([x[chosen] for x, chosen in zip(inputs, read, strict=True)])
        expected = {
            "activation_moment": rows.T @ rows,
            "activation_magnitude": rows.abs().sum(dim=0),
            "activation_mean": rows.sum(dim=0),
            "active_tokens": torch.tensor(float(len(rows))),
        }
        for kind, total in expected.items():  # `measure` sees the batch twice
            torch.testing.assert_close(measured.sums[kind][name], 2 * total, rtol=1e-4, atol=1e-3)


def rounded(model: PreTrainedModel, noise: float) -> PreTrainedModel:
    """The model on a machine that rounds otherwise: gradients that are almost zero are `noise` there."""

    def tip(g: torch.Tensor) -> torch.Tensor:
        almost = g.abs().amax(dim=-1, keepdim=True) < 1e-8
        return torch.where(almost, noise * torch.randn_like(g), g)

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_().clone()
        output.register_hook(tip)
        return output

    for target in find_targets(model).values():
        target.module.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("case", MODELS)
def test_rounding_decides_nothing(case: str) -> None:
    """What is counted, which layers share, the memory and the ranks, where noise is added and taken away."""
    make, _ = MODELS[case]
    batch = padded_batch(None if case == "decoder" else torch.tensor([0, 1, 1, 0]), lengths=(9, 4, 7, 2))
    if case != "decoder":
        batch["attention_mask"][3, 1] = 0  # a sample of one token
    config = CompressionConfig(keep=0.5)
    found = []
    for noise in (0.0, 1e-11, 1e-9):
        model = rounded(make(), noise)
        batches = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 4))]
        measured = compute_statistics(model, batches, config.needs, progress=False)
        counts = {name: float(total) for name, total in measured.sums["active_tokens"].items()}
        ids = [id(total) for total in measured.sums["activation_moment"].values()]
        held = {id(total): total.nbytes for sums in measured.sums.values() for total in sums.values()}
        _, report = compress(make(), config, measured, progress=False)
        found.append((counts, [ids.index(each) for each in ids], sum(held.values()), report.ranks))
    assert found[0] == found[1] == found[2]


def test_layers_share_what_they_read_whatever_is_read_of_them() -> None:
    moments = measure(tiny_bert(), MODELS["encoder"][1]).sums["activation_moment"]
    query, key, value, output = (
        moments[f"bert.encoder.layer.1.attention.{part}"]
        for part in ("self.query", "self.key", "self.value", "output.dense")
    )
    assert query is key is value  # of the last layer's query only the first position is read
    assert output is not query


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


def test_tokens_of_an_input_count_for_all_that_read_it() -> None:
    states, labels = torch.randn(5, 6, 4), torch.tensor([0, 1, 2, 1, 0])
    batches = [{"states": states, "labels": labels}]
    moments = compute_statistics(TwoReaders(), batches, KINDS, progress=False).sums["activation_moment"]
    read = states[:, :2].flatten(0, 1)
    assert moments["readers.0"] is moments["readers.1"]
    torch.testing.assert_close(moments["readers.0"], read.T @ read)


def test_layers_part_at_the_first_batch_where_they_read_something_else() -> None:
    targets = {name: Target.of(name, nn.Linear(2, 3)) for name in "abc"}
    sums = InputSums(["active_tokens"], targets, dict.fromkeys(targets, torch.device("cpu")))
    x, every, some = torch.randn(1, 4, 2), torch.ones(1, 4), torch.tensor([[1.0, 0, 0, 0]])
    for readers in (("a", "b", "c"), ("a", "b")):
        for _ in readers:
            sums.arrive("first", readers, x, every)
    sums.arrive("second", ("c",), x, some)
    sums.arrive("third", ("a", "b", "c"), x, every)  # b and c get no gradient in the last batch
    sums.end_batch()
    totals = sums.result()["active_tokens"]
    assert {name: float(total) for name, total in totals.items()} == {"a": 12, "b": 12, "c": 9}
    assert totals["a"] is totals["b"] is not totals["c"]


def test_a_token_is_active_beside_the_most_important_of_its_sample_alone() -> None:
    largest = torch.tensor([[1.0, 1e-3, 1e-4, 0.0], [1e-20, 1e-23, 1e-24, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(active_tokens(largest), expected)
    for sample, row in zip(largest, expected, strict=True):
        assert torch.equal(active_tokens(sample[None]), row[None])


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
