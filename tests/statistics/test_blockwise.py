"""Statistics block by block are those of the whole model; what cannot be cut into blocks is named."""

import copy
import gc
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakSet, ref

import pytest
import torch
from accelerate import PartialState
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_lowrank import CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.interrupts import Stopped
from hf_lowrank.model.blocks import Chain, NotAChain, block_bytes, blocks_on_disk, find_chain
from hf_lowrank.model.targets import find_targets
from hf_lowrank.statistics.batches import Marked, Marks
from hf_lowrank.statistics.blockwise import statistics_by_blocks
from hf_lowrank.statistics.one_pass import Pass
from hf_lowrank.statistics.prefix import forward_order
from tests.compression.test_sequential import batches
from tests.helpers import tiny_albert, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.launches import Job
from tests.nn.test_experts import mixtral

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: tiny_bert(num_hidden_layers=3),
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "mixtral": mixtral,
    "t5": tiny_t5,
}
SLOW = [pytest.param(name, "data", marks=pytest.mark.slow) for name in ("gpt2", "t5")]
LABELS = [("bert", "data"), ("llama", "model"), ("mixtral", "model"), *SLOW]


@pytest.mark.parametrize(("architecture", "labels"), LABELS)
def test_they_are_those_of_the_whole_model(architecture: str, labels: str) -> None:
    model, marks = MODELS[architecture](), (Marks(), Marks())
    kinds = CompressionConfig("kfac").needs
    rest: Any = {"labels": labels, "progress": False}
    whole = compute_statistics(model, batches(model), kinds, **rest, marks=marks[0])
    found = statistics_by_blocks(model, batches(model), kinds, **rest, marks=marks[1])
    assert (found.samples, found.tokens, found.weights) == (whole.samples, whole.tokens, whole.weights)
    assert found.labels == whole.labels
    assert found.curvature == pytest.approx(whole.curvature, rel=1e-5)
    assert_close(found, whole)
    for one, other in zip(*marks, strict=True):
        assert all(torch.equal(one.active[name], other.active[name]) for name in one.active)
    assert all(parameter.requires_grad for parameter in model.parameters())


def assert_close(found: Statistics, whole: Statistics) -> None:
    assert {*found.kinds} == {*whole.kinds}
    for kind, sums in whole.sums.items():
        assert list(found.sums[kind]) == list(sums)
        for name, total in sums.items():
            torch.testing.assert_close(found.sums[kind][name], total, rtol=1e-3, atol=1e-4 * float(total.abs().max()))


def test_so_are_those_of_two_passes() -> None:
    model, kinds = tiny_llama(), ["fisher_in_eigenbasis"]
    whole = compute_statistics(model, batches(model), kinds, progress=False)
    assert_close(statistics_by_blocks(model, batches(model), kinds, progress=False), whole)


def test_so_are_ranks_and_factors() -> None:
    model = tiny_llama()
    config = CompressionConfig("kfac", keep=0.5, align=1)
    compressed = []
    for measure in (compute_statistics, statistics_by_blocks):
        marks = Marks()
        measured = measure(model, batches(model), config.needs, labels="model", marks=marks, progress=False)
        compressed.append(compress(copy.deepcopy(model), config, measured, False, batches=marks)[0])
    whole, by_blocks = compressed
    assert by_blocks.lowrank_ranks == whole.lowrank_ranks
    for name in whole.lowrank_ranks:
        expected = whole.get_submodule(name).product()
        torch.testing.assert_close(by_blocks.get_submodule(name).product(), expected, rtol=1e-2, atol=1e-4)


def test_the_same_samples_give_the_same_bits() -> None:
    model = tiny_llama(num_hidden_layers=1)
    one, two = (statistics_by_blocks(model, batches(model), ["fisher"], progress=False) for _ in range(2))
    assert all(torch.equal(one.sums["fisher"][name], two.sums["fisher"][name]) for name in one.sums["fisher"])


def test_what_is_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Within the forward pass, the head, and a block on the way back."""
    model, kinds = tiny_llama(), CompressionConfig("kfac").needs

    def measured(folder: Path) -> tuple[Statistics, Marks]:
        marks, work = Marks(), Work.open(folder, {"model": "tiny"}, resume=True)
        return statistics_by_blocks(model, batches(model), kinds, work=work, marks=marks, progress=False), marks

    whole, expected = measured(tmp_path / "whole")
    for last in (21, 7, 8):
        calls = count(1)

        def stop(module: nn.Module, args: Any, last: int = last, calls: Iterator[int] = calls) -> None:
            if next(calls) > last:
                raise Stopped(signal.SIGTERM)

        with model.register_forward_pre_hook(stop), pytest.raises(Stopped):
            measured(tmp_path / "stopped")
    found, marks = measured(tmp_path / "stopped")
    for kind, sums in whole.sums.items():
        assert all(torch.equal(found.sums[kind][name], total) for name, total in sums.items())
    for one, other in zip(marks, expected, strict=True):
        assert all(torch.equal(one.active[name], other.active[name]) for name in one.active)


def test_blocks_may_write_to_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    block = model.bert.encoder.layer[1]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda hidden, *args, **kwargs: forward(hidden.mul_(0.5), *args, **kwargs))
    whole = compute_statistics(model, batches(model), ["fisher"], progress=False)
    assert_close(statistics_by_blocks(model, batches(model), ["fisher"], progress=False), whole)


def measure_share(folder: Path, processes: int) -> None:
    state, model = PartialState(), tiny_llama()
    mine = batches(model)[state.process_index :: processes]
    work = Work.open(folder / f"work-{processes}", {"model": "tiny"})
    found = statistics_by_blocks(model, mine, ["fisher", "activation_moment"], work=work, progress=False)
    if state.is_main_process:
        found.save(folder / f"on-{processes}")


@pytest.mark.slow
def test_processes_share_the_samples_and_one_may_have_none(tmp_path: Path) -> None:
    for processes in (1, 2, 3):
        Job(tmp_path / "job", measure_share, tmp_path, processes, processes=processes).done()
    one, *others = (Statistics.load(tmp_path / f"on-{processes}") for processes in (1, 2, 3))
    for found in others:
        assert found.samples == one.samples == 16
        assert_close(found, one)


class Skipping(nn.Module):
    """Its head reads what its first block gave."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first)) + first


def test_what_is_no_chain_is_named() -> None:
    skipping = Skipping()
    with pytest.raises(NotAChain, match="its head reads more than what the last block gives"):
        find_chain(skipping, lambda: skipping(torch.ones(2, 4)))
    model = tiny_albert()
    with pytest.raises(NotAChain, match=r"albert_layer_groups\.0 is run 3 times"):
        statistics_by_blocks(model, batches(model), ["fisher"], progress=False)
    model = tiny_bert()
    with pytest.raises(NotAChain, match=r"bert\.pooler\.dense is in none of its blocks"):
        statistics_by_blocks(model, batches(model), ["fisher"], include=["*pooler.dense"], progress=False)


def test_one_block_and_its_sums_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the help of the garbage collector."""
    deep = tiny_llama(num_hidden_layers=6)
    deep.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map=blocks_on_disk(deep, torch.device("cpu")))
    one, alive, seen = max(block_bytes(deep).values()), WeakSet[Pass](), []
    begin, run = Pass.__init__, Chain.run

    def noted(self: Pass, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        alive.add(self)

    def looked(self: Chain, *args: Any) -> Any:
        weights = sum(p.nbytes for p in model.model.layers.parameters() if not p.is_meta)
        sums = [total for each in alive for by_name in each.sums.values() for total in by_name.values()]
        seen.append((weights, sum(total.nbytes for total in sums)))
        return run(self, *args)

    monkeypatch.setattr(Pass, "__init__", noted)
    monkeypatch.setattr(Chain, "run", looked)
    gc.collect()
    gc.disable()
    try:
        statistics_by_blocks(model, batches(model), ["fisher"], progress=False)
    finally:
        gc.enable()
    weights, sums = (max(sizes) for sizes in zip(*seen, strict=True))
    assert weights == one
    assert 0 < sums < 1.5 * one


def test_the_order_of_layers_is_found_without_keeping_what_they_read() -> None:
    """But for the inputs of a few."""
    model = tiny_llama(num_hidden_layers=6)
    targets, read, alive = find_targets(model), list[ref[torch.Tensor]](), list[int]()

    def reached(module: nn.Module, args: Any) -> None:
        read.append(ref(args[0]))
        alive.append(len({id(tensor) for known in read if (tensor := known()) is not None}))

    for target in targets.values():
        target.module.register_forward_pre_hook(reached)
    order = forward_order(model, targets, [Marked(batches(model)[0], {})])
    assert [len(step.names) for step in order.steps] == 6 * [3, 1, 2, 1]
    assert max(alive) <= 4


def test_all_but_the_blocks_is_kept_in_memory() -> None:
    places = blocks_on_disk(tiny_bert(), torch.device("cpu"))
    assert {name for name, place in places.items() if place == "disk"} == {f"bert.encoder.layer.{n}" for n in range(2)}
    covered = tuple(f"{name}." for name in places)
    assert all(f"{name}.".startswith(covered) for name, _ in tiny_bert().named_parameters())


def test_single_samples_where_batches_are_not_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is centred over its samples has other gradients than they alone."""
    model = tiny_bert()
    block = model.bert.encoder.layer[0]
    forward = block.forward

    def centred(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = forward(*args, **kwargs)
        return hidden - hidden.mean(dim=0) / 2

    monkeypatch.setattr(block, "forward", centred)
    alone = [{key: value[n : n + 1] for key, value in batch.items()} for batch in batches(model) for n in range(8)]
    expected = compute_statistics(model, alone, ["fisher"], progress=False)
    found = statistics_by_blocks(model, batches(model), ["fisher"], progress=False)
    assert_close(found, expected)
    assert found.samples == 16
