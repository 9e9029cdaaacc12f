"""bench: what is counted is right, both models are measured, and the record says how."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowrank import CompressionConfig, LowRankError, LowRankLinear, cli, compress
from hf_lowrank.folder.saving import read_record, save_compressed
from hf_lowrank.jobs.turns import seconds_in_turns
from hf_lowrank.studies.bench import BenchConfig, BenchRecord, Case, bench
from hf_lowrank.studies.bench.measure import operations, peak_bytes
from hf_lowrank.studies.plots.bench import bench_figure
from tests.helpers import tiny_bert, tiny_llama, tiny_t5

CPU = torch.device("cpu")
QUICK = BenchConfig((1, 2), (4, 8), rounds=2)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder / "dense")
    model, report = compress(model, CompressionConfig("svd", 0.25), progress=False)
    save_compressed(model, None, report, folder / "low")
    return folder / "low"


@torch.inference_mode()
def test_operations_are_those_of_the_formula() -> None:
    dense, low, x = nn.Linear(64, 128), LowRankLinear(64, 128, 8), torch.randn(10, 64)
    assert operations(lambda: dense(x)) == 2 * 10 * 64 * 128
    assert operations(lambda: low(x)) == 2 * 10 * 8 * (64 + 128)
    query, key = torch.randn(2, 4, 6, 16), torch.randn(2, 4, 9, 16)
    attention = operations(lambda: nn.functional.scaled_dot_product_attention(query, key, key))
    assert attention == 2 * 2 * (2 * 4 * 6 * 9 * 16)


@torch.inference_mode()
def test_peak_memory_is_what_is_held_at_once() -> None:
    x = torch.randn(1000, 10)
    slack = 100  # bytes of scalars
    assert 0 <= peak_bytes(lambda: x + 1, CPU) - x.nbytes < slack
    assert 0 <= peak_bytes(lambda: (x + 1) + 1, CPU) - 2 * x.nbytes < slack  # one is held while the next is made
    assert 0 <= peak_bytes(lambda: [x + 1, x + 1, x + 1], CPU) - 3 * x.nbytes < slack
    assert peak_bytes(lambda: [(x + 1).sum() for _ in range(3)], CPU) < 1.1 * x.nbytes


def test_competitors_take_turns() -> None:
    order: list[str] = []
    seconds = seconds_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU)
    assert order == ["a", "b"] * 5  # two rounds are not counted
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_figures_follow_from_the_seconds() -> None:
    dense, low = [0.004, 0.002, 0.003], [0.002, 0.001, 0.001]
    case = Case("forward", 2, 5, {"dense": dense, "compressed": low}, {"dense": 300, "compressed": 100}, {})
    assert case.speedup == 2  # of 2, 2, 3
    assert case.arithmetic == 3
    assert case.realised == pytest.approx(2 / 3)
    assert case.median("dense") == 3
    assert case.p90("dense") == pytest.approx(3.8)
    assert case.throughput("dense") == pytest.approx(10 / 0.003)
    decode = Case("decode", 2, 5, case.seconds, case.operations, {})
    assert decode.throughput("compressed") == pytest.approx(2 / 0.001)


@pytest.mark.parametrize("against", [False, True])
def test_an_encoder_is_measured_beside_its_dense_form_or_its_base(tmp_path: Path, against: bool) -> None:
    low = save(tiny_bert(), tmp_path)
    record = bench(low, tmp_path / "dense" if against else None, QUICK, progress=False)
    assert [(case.phase, case.batch, case.length) for case in record.cases] == [
        ("forward", batch, length) for batch in (1, 2) for length in (4, 8)
    ]
    for case in record.cases:
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in case.seconds.values())
        assert case.peak_bytes["dense"] > case.peak_bytes["compressed"] > 4 * record.parameters["compressed"]
        assert case.arithmetic > 1
    assert record.parameters["dense"] == tiny_bert().num_parameters() > record.parameters["compressed"]
    assert record.bytes["compressed"] == (low / "model.safetensors").stat().st_size
    assert record.first_output_seconds["dense"] > record.load_seconds["dense"] > 0
    assert record.setup.startswith(f"float32, not compiled, {torch.get_num_threads()} thread")
    json.dumps(record.to_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "low"]


def test_the_arithmetic_ratio_is_that_of_the_whole_model(tmp_path: Path) -> None:
    """Two blocks of 32/64 with 12 linears at rank 8; attention, pooler and classifier are the same in both."""
    record = bench(save(tiny_bert(), tmp_path), None, BenchConfig((3,), (8,), rounds=1), progress=False)
    tokens, blocks = 3 * 8, 2
    same = blocks * 2 * 2 * 3 * 8 * 8 * 32 + 2 * 3 * 32 * 32 + 2 * 3 * 32 * 2
    dense = tokens * blocks * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    low = tokens * blocks * 2 * 8 * (4 * (32 + 32) + 2 * (32 + 64))
    assert record.cases[0].operations == {"dense": dense + same, "compressed": low + same}


def test_a_language_model_has_prefill_and_decode_by_the_token(tmp_path: Path) -> None:
    record = bench(save(tiny_llama(), tmp_path), None, BenchConfig((2,), (8,), rounds=2), progress=False)
    prefill, decode = record.cases
    assert (prefill.phase, decode.phase) == ("prefill", "decode")
    assert decode.tokens == 2
    assert prefill.operations["dense"] > decode.operations["dense"] > prefill.operations["dense"] / 16
    assert record.latency_facts()["setup"].startswith("batch 2 × 8 tokens, prefill, ")
    # 2 blocks, keys and values of 2 heads of 8 in float32; a rank of 8 × 25% in their place
    assert record.cache_bytes == {"dense": 2 * 2 * 2 * 8 * 4, "compressed": 2 * 2 * 4 * 4}


def test_encoder_decoders_and_other_dtypes_are_measured(tmp_path: Path) -> None:
    config = BenchConfig((1,), (4,), rounds=1, dtype="bfloat16")
    record = bench(save(tiny_t5(), tmp_path), None, config, progress=False)
    assert record.dtype == "bfloat16"
    assert record.cases[0].phase == "forward"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    low = save(tiny_bert(), tmp_path)
    with pytest.raises(LowRankError, match="takes at most 32 tokens, not 33"):
        bench(low, None, BenchConfig((1,), (33,)))
    with pytest.raises(LowRankError, match="at least 1"):
        BenchConfig((0,))
    with pytest.raises(LowRankError, match="unknown dtype 'int8'"):
        BenchConfig(dtype="int8")
    with pytest.raises(LowRankError, match="is dense: say what to measure it against"):
        bench(tmp_path / "dense", None, QUICK)
    tiny_bert(vocab_size=70).save_pretrained(tmp_path / "other")
    with pytest.raises(LowRankError, match="another vocabulary"):
        bench(low, tmp_path / "other", QUICK, progress=False)


def test_dense_models_are_measured_beside_each_other(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "two")
    tiny_bert(num_hidden_layers=1).save_pretrained(tmp_path / "one")
    record = bench(tmp_path / "one", tmp_path / "two", BenchConfig((1,), (4,), rounds=1), progress=False)
    assert record.parameters["compressed"] < record.parameters["dense"]
    assert record.cases[0].arithmetic > 1


def test_the_plot_has_a_row_for_every_case() -> None:
    both: dict[str, Any] = {"dense": [0.2, 0.1, 0.15], "compressed": [0.1, 0.05, 0.1]}
    cases = tuple(Case("forward", 1, n, both, {"dense": 2, "compressed": 1}, both) for n in (4, 8, 16))
    ones = {"dense": 1, "compressed": 1}
    machine = {"threads": 1, "cpu": "some", "torch": "2"}
    record = BenchRecord("a", "b", "float32", False, 3, machine, ones, ones, ones, ones, cases)  # type: ignore[arg-type]
    figure = bench_figure(record.to_dict())
    latency, speed = figure.axes
    assert [label.get_text() for label in latency.get_yticklabels()] == [
        "forward 1 × 4",
        "forward 1 × 8",
        "forward 1 × 16",
    ]
    assert [bar.get_width() for bar in speed.patches] == [2, 2, 2]
    assert [bar.get_width() for bar in latency.patches] == pytest.approx([1, 1, 1, 2 / 3, 2 / 3, 2 / 3])
    assert latency.get_xlim()[0] == speed.get_xlim()[0] == 0
    assert "150 ms" in [text.get_text() for text in latency.texts]
    with pytest.raises(ValueError, match="no cases"):
        bench_figure({"cases": []})


def test_figures_can_be_read_on_long_and_short_bars() -> None:
    times = {"dense": 1234.5, "compressed": 61.7}
    case = {"phase": "forward", "batch": 32, "length": 128, "speedup": 20.0, "arithmetic": 25.0, "realised": 0.8}
    slow = {**case, "median_ms": {"dense": 1.0, "compressed": 5.0}, "speedup": 0.2, "arithmetic": 2.0, "realised": 0.1}
    record = {"setup": "", "cases": [{**case, "median_ms": times, "p90_ms": times}, {**slow, "p90_ms": times}]}
    latency, speed = bench_figure(record).axes
    told = {text.get_text(): text for axes in (latency, speed) for text in axes.texts}
    assert told["1,234 ms"].get_color() == "k"
    for words, width in (("61.7 ms", 61.7 / 1234.5), ("0.20× · 10%", 0.2)):
        assert told[words].get_color() == "k"
        assert told[words].get_position()[0] > width  # after the bar, not white beside it
    assert told["20.00× · 80%"].get_color() == "w"


@pytest.mark.parametrize(
    ("rounds", "stated"),
    [
        ([1.0, 1.05, 1.0, 1.05], True),
        ([1.0, 1.0, 1.0, 1.0, 5.0, 1.0], True),  # a lone slow round
        ([1.0, 1.0, 1.3, 1.3], False),  # another job came
        ([1.0], False),
    ],
)
@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_latencies_are_stated_where_they_repeat(rounds: list[float], stated: bool, which: str) -> None:
    seconds = dict.fromkeys(("dense", "compressed"), [1.0] * len(rounds)) | {which: rounds}
    ones: dict[str, Any] = {"dense": 1, "compressed": 1}
    case = Case("forward", 1, 4, seconds, ones, ones)
    record = BenchRecord("a", "b", "float32", False, len(rounds), {}, ones, ones, ones, ones, (case,))
    assert (record.not_stated() is None) == stated


@pytest.mark.slow
def test_the_command_prints_records_and_draws(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    low = save(tiny_bert(), tmp_path)
    words = ["--batch", "2", "--length", "4", "--rounds", "2", "--plot", str(tmp_path / "speed.png")]

    def told(*more: str) -> str:
        return run(*more) and captured[-1].err

    captured: list[Any] = []

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hf-lowrank", "bench", str(low), *words, *more])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert not exit_info.value.code
        captured.append(capfd.readouterr())
        out: str = captured[-1].out
        return out

    printed = run()
    for word in ("2 × 4", "arithmetic", "realised", "load, ms", "not compiled"):
        assert word in printed
    monkeypatch.setattr("hf_lowrank.studies.bench.record.REPEATS_WITHIN", -1.0)
    assert "not recorded: the latency does not repeat" in told("--record")
    assert "latency" not in (read_record(low) or {})
    monkeypatch.setattr("hf_lowrank.studies.bench.record.REPEATS_WITHIN", math.inf)  # of a machine that others use
    told("--record")
    latency = (read_record(low) or {})["latency"]
    assert latency["cases"][0]["median_ms"] == {"dense": pytest.approx(latency["dense"], abs=1e-3)} | {
        "compressed": pytest.approx(latency["compressed"], abs=1e-3)
    }
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert math.isfinite(json.loads(run("--json"))["cases"][0]["speedup"])
