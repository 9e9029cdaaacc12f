"""A model whose blocks stay on disk is compressed to the same result, killed or not, in memory that knows no depth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_lowrank import CompressionConfig, LowRankError, Pipeline
from hf_lowrank.cli.work import planned_memory
from hf_lowrank.compression import blockwise
from hf_lowrank.compression.blockwise import plan_memory
from hf_lowrank.compression.memory import estimate_memory, skeleton
from hf_lowrank.compression.report import CompressionReport
from hf_lowrank.model.blocks import is_on_disk
from hf_lowrank.model.weightless import weightless
from hf_lowrank.tasks import get_task
from tests.helpers import tiny_albert, tiny_bert
from tests.launches import Job, make_data, make_model
from tests.nn.test_experts import mixtral
from tests.tiny_task import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny classifier, stored in half precision, and its data."""
    folder = tmp_path_factory.mktemp("tiny")
    model = BertForSequenceClassification.from_pretrained(make_model(folder / "model"))
    model.bfloat16().save_pretrained(folder / "model")
    make_data(folder / "data")
    return folder


def compressed(folder: Path, work: Path, by_blocks: bool) -> tuple[Pipeline, CompressionReport]:
    pipeline = Pipeline.load(str(folder / "model"), "cola", folder / "data", blockwise=by_blocks, progress=False)
    assert is_on_disk(pipeline.model) == by_blocks
    pipeline.begin(work, {})
    report = pipeline.compress(keep=0.5, align=1)
    assert is_on_disk(pipeline.model) == by_blocks
    return pipeline, report


def test_the_saved_model_is_that_of_the_whole_model(folder: Path, tmp_path: Path) -> None:
    whole, expected = compressed(folder, tmp_path / "whole.work", False)
    by_blocks, report = compressed(folder, tmp_path / "out.work", True)
    assert report.ranks == expected.ranks
    assert report.settings == expected.settings
    assert report.settings["sequential"]
    by_blocks.save(tmp_path / "out")
    by_blocks.finish()
    saved, tensors = load_file(tmp_path / "out" / "model.safetensors"), whole.model.state_dict()
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved[name].dtype == torch.bfloat16
        torch.testing.assert_close(saved[name].float(), tensor.float(), rtol=1e-2, atol=1e-3)
    assert load_file(tmp_path / "out" / "directions.safetensors")


def test_what_is_no_chain_is_compressed_whole_and_it_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_albert().save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((folder / "model" / name).read_bytes())
    rest: Any = {"blockwise": True, "progress": False}
    pipeline = Pipeline.load(str(tmp_path / "model"), "cola", folder / "data", **rest)
    pipeline.compress(keep=0.5, align=1)
    assert not is_on_disk(pipeline.model)
    assert (
        "does not go block by block, as albert.encoder.albert_layer_groups.0 is run 3 times" in capsys.readouterr().err
    )


def test_stacked_experts_stay_in_memory_and_are_measured_block_by_block(folder: Path, tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((folder / "model" / name).read_bytes())
    found = []
    for by_blocks in (False, True):
        rest: Any = {"texts": ["a b c d e", "e d c", "b a"] * 3, "blockwise": by_blocks, "progress": False}
        pipeline = Pipeline.load(str(tmp_path / "model"), **rest)
        report = pipeline.compress(keep=0.6, align=1)
        assert pipeline.blockwise == by_blocks
        assert not is_on_disk(pipeline.model)
        found.append((report.ranks, pipeline.model.state_dict()))
    (whole, expected), (ranks, tensors) = found
    assert ranks == whole
    assert any("experts" in name for name in ranks)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected.items())
    plan = plan_memory(model, CompressionConfig(), "on", CPU, 10)
    assert plan.by_blocks
    assert plan.estimate.model == estimate_memory(model, CompressionConfig().needs).model


def test_auto_goes_by_blocks_where_the_whole_model_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=64, vocab_size=1000)
    deep, kfac = weightless(LlamaForCausalLM, config), CompressionConfig()
    whole = estimate_memory(deep, kfac.needs, tokens=1024)
    monkeypatch.setattr(blockwise, "available", lambda device: whole.total - 1)
    plan = plan_memory(deep, kfac, "auto", CPU, 1024)
    assert plan.by_blocks
    assert plan.estimate.total < whole.total / 8
    shallow = weightless(LlamaForCausalLM, LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 8}))
    assert plan.estimate.total == plan_memory(shallow, kfac, "on", CPU, 1024).estimate.total  # whatever the depth
    assert not plan_memory(weightless(type(tiny_bert()), tiny_bert().config), kfac, "auto", CPU, 10).by_blocks
    with pytest.raises(LowRankError, match="blockwise"):
        plan_memory(deep, kfac, "sometimes", CPU, 1024)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"bytes": "1MB"}, "bytes needs it"),
        ({"form": "interpolative"}, "interpolative needs it"),
        ({"allocation": "knapsack"}, "the allocation knapsack measures all of it"),
        ({"include": ("*pooler.dense",)}, "bert.pooler.dense is in none of its blocks"),
        ({"method": "svd"}, "nothing is measured"),
    ],
)
def test_what_needs_the_whole_model_says_so(settings: dict[str, Any], why: str) -> None:
    plan = plan_memory(tiny_bert(), CompressionConfig(**{"method": "kfac"} | settings), "on", CPU, 10)
    assert (plan.by_blocks, plan.why_whole) == (False, why)


def test_it_is_told_where_nothing_is_measured_though_blocks_are_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("compress", folder / "model", "--method", "svd", "--blockwise", "on", "--output", tmp_path / "small")
    code, _, err = run(monkeypatch, capfd, *words)
    assert code == 0, err
    assert "held in memory, not block by block, as nothing is measured" in err


def plan_where_one_has_less(folder: Path) -> None:
    task, config = get_task("cola", data_dir=folder / "data"), CompressionConfig()
    model = skeleton(str(folder / "model"), task, CPU)
    assert model is not None
    whole = estimate_memory(model, config.needs, tokens=task.at_once(16, task.max_length) * task.max_length).total
    blockwise.available = lambda device: whole if PartialState().is_main_process else whole - 1
    plan = planned_memory(str(folder / "model"), task, config, "auto", 16, "")
    assert plan is not None
    assert plan.by_blocks


@pytest.mark.slow
def test_all_processes_go_by_blocks_where_one_of_them_has_to(folder: Path, tmp_path: Path) -> None:
    Job(tmp_path / "job", plan_where_one_has_less, folder, processes=2).done()
