"""Memory known before a job starts: exact where it can be, above what is measured elsewhere, and refused in words."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.memory import peak_of_resident, resident
from hf_lowrank import LowRankError, compute_statistics
from hf_lowrank.compression.memory import available, estimate_memory, factorization_bytes, skeleton, statistics_device
from hf_lowrank.solvers import get_method
from hf_lowrank.tasks import get_task
from tests.helpers import tiny_bert, tiny_llama
from tests.launches import Job, hf_lowrank, make_data, make_model
from tests.statistics.test_statistics import padded_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "kinds", [["fisher"], ["activation_moment", "gradient_moment", "active_tokens"], ["fisher_in_eigenbasis"]]
)
def test_the_bytes_of_statistics_are_known_before(kinds: list[str]) -> None:
    model = tiny_llama()
    estimate = estimate_memory(model, kinds)
    assert estimate.model >= sum(parameter.nbytes for parameter in model.parameters())
    measured = compute_statistics(model, [padded_batch(lengths=(9, 7))], kinds, progress=False)
    held = {id(total): total.nbytes for sums in measured.sums.values() for total in sums.values()}
    assert estimate.statistics == pytest.approx(sum(held.values()), rel=0 if kinds == ["fisher"] else 0.1)
    assert estimate.total == estimate.model + estimate.statistics + estimate.workspace


def test_half_precision_halves_the_model_and_not_the_statistics() -> None:
    full, half = (estimate_memory(model, ["fisher"]) for model in (tiny_bert(), tiny_bert().bfloat16()))
    parameters = sum(parameter.numel() for parameter in tiny_bert().parameters())
    assert full.model - half.model == 2 * parameters
    assert full.statistics == half.statistics


def test_factorizing_takes_no_more_than_estimated() -> None:
    shape = (512, 1536)
    square = {"activation_moment": 1536, "gradient_moment": 512}
    means = {kind: (a := torch.randn(size, size)) @ a.T for kind, size in square.items()}
    means["active_tokens"] = torch.tensor(1.0)
    weight = torch.randn(shape)
    method = get_method("kfac")
    method.objective(means).factorize(weight, 100)  # libraries are loaded once
    before = resident()
    with peak_of_resident() as peak:
        objective = method.objective(means)
        objective.error(weight - objective.factorize(weight, 100).balanced().product())
    assert (peak.seen["resident"] - before) * 2**20 <= factorization_bytes(shape)


def test_what_cannot_fit_is_refused_with_figures(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=32768, intermediate_size=131072, num_hidden_layers=400, vocab_size=1000)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    model = skeleton(str(tmp_path), get_task("tinystories"), CPU)
    assert model is not None
    estimate = estimate_memory(model, ["activation_moment"], tokens=16 * 512)
    with pytest.raises(LowRankError, match=r"would take about \d+\.\d+ GiB \(model .* GiB are free for it on cpu; use"):
        statistics_device(estimate, CPU)
    assert statistics_device(estimate_memory(tiny_bert(), ["fisher"]), CPU) is None
    assert 0 < available(CPU) < 2**50


def test_the_command_says_what_it_will_take_and_records_it(tmp_path: Path) -> None:
    words = ["compress", make_model(tmp_path / "model"), "--task", "cola", "--data-dir", make_data(tmp_path / "data")]
    job = Job(tmp_path / "job", hf_lowrank, *words, "--output", tmp_path / "out").done()
    assert "memory at the peak: about" in job.printed()
    assert '"statistics": ' in (tmp_path / "out/compression.json").read_text()
    assert '"workspace": ' in (tmp_path / "out/compression.json").read_text()
