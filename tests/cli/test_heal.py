"""hf-lowrank heal, and compress --heal: the healed model, its record and its card."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_lowrank.folder.healed import healed_record
from hf_lowrank.folder.verify import verify
from tests.launches import make_data, make_model
from tests.tiny_task import run

FAST = ("--hidden", 1, "--rate", 3e-3, "--rate", 3e-4, "--batch-size", 5, "--epochs", 4, "--held-out", 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "dense", initializer_range=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "rows", 60)


@pytest.fixture
def small(model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> Path:
    words = ("compress", model, "--task", "cola", "--data-dir", data, "--method", "svd", "--evaluate")
    assert run(monkeypatch, capfd, *words, "--output", tmp_path / "small")[0] == 0
    return tmp_path / "small"


@pytest.mark.slow
def test_the_record_and_the_card_tell_of_it(
    small: Path, model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    common = ("--teacher", model, "--task", "cola", "--data-dir", data)
    out = tmp_path / "healed"
    code, printed, err = run(monkeypatch, capfd, "heal", small, *common, "--output", out, "--evaluate", *FAST)
    assert code == 0, err
    assert "held-out texts" in printed
    before, record = (json.loads((folder / "compression.json").read_text()) for folder in (small, out))
    healing = record["healing"]
    assert healing["healed"]
    assert healing["divergence_after"] < healing["divergence_before"]
    assert healing["score_before"] == before["score_compressed"]
    assert (healing["teacher"], healing["data"], healing["held_out"]) == ("dense", "rows", 20)
    assert record["divergence"]["compressed"]["mean"] < before["divergence"]["compressed"]["mean"]
    assert record["scored_on"] == before["scored_on"]
    assert "healed afterwards: its factors trained without labels to say what `dense` says" in (
        (out / "README.md").read_text()
    )
    assert {check.name: check.status for check in verify(out, model)} == {
        "checksums": "PASS",
        "config and shapes": "PASS",
        "finite": "PASS",
        "outputs as recorded": "PASS",
        "smaller": "PASS",
        "other weights unchanged": "PASS",
        "layers' errors as recorded": "SKIP",
        "outputs": "INFO",
    }
    assert not list(tmp_path.glob("*.checkpoints"))
    json_printed = run(monkeypatch, capfd, "heal", small, *common, "--output", tmp_path / "again", "--json", *FAST)[1]
    assert json.loads(json_printed)["healing"]["divergence_after"] == healing["divergence_after"]
    assert "score_compressed" not in json.loads((tmp_path / "again" / "compression.json").read_text())


def test_compress_heals_at_once_and_texts_will_do(model: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(" ".join(f"w{(n * 7 + k) % 40}" for k in range(n % 9 + 1)) for n in range(60)))
    words = ("compress", model, "--texts", texts, "--rank-ratio", 0.2, "--output")
    assert run(monkeypatch, capfd, *words, tmp_path / "plain")[0] == 0
    code, printed, err = run(monkeypatch, capfd, *words, tmp_path / "healed", "--heal")
    assert code == 0, err
    assert "heal" in printed
    record = json.loads((tmp_path / "healed" / "compression.json").read_text())
    assert record["healing"]["divergence_after"] <= record["healing"]["divergence_before"]
    code, _, err = run(monkeypatch, capfd, "compress", tmp_path / "plain", *words[2:4], "--heal", "--output", tmp_path)
    assert code == 2
    words = ("compress", tmp_path / "plain", "--texts", texts, "--heal", "--rank-ratio", 0.1, "--output")
    code, _, err = run(monkeypatch, capfd, *words, tmp_path / "twice")
    assert code == 2
    assert "only a dense one can be the teacher" in err
    code, _, err = run(monkeypatch, capfd, "heal", tmp_path / "plain", "--teacher", model, "--output", tmp_path / "no")
    assert code == 2
    assert "healing reads texts: give a --task, or --texts FILE" in err


@pytest.mark.slow
def test_an_interrupted_command_is_resumed(
    small: Path, model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    words = ("heal", small, "--teacher", model, "--task", "cola", "--data-dir", data, *FAST, "--output")

    def fails(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    assert run(monkeypatch, capfd, *words, tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("hf_lowrank.folder.saving.save_model", fails)
        assert run(monkeypatch, capfd, *words, tmp_path / "cut")[0] == 130
    code, _, err = run(monkeypatch, capfd, *words, tmp_path / "cut")
    assert code == 2
    assert "interrupted run; resume it" in err
    assert run(monkeypatch, capfd, *words, tmp_path / "cut", "--resume")[0] == 0
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_scores_of_before_are_left_out_of_the_record() -> None:
    record = {
        "score_dense": 90.0,
        "score_compressed": 80.0,
        "scored_on": {"dense": {}, "compressed": {}},
        "task": "cola",
    }
    healed = healed_record(record, {"healed": True})
    assert healed["healing"] == {"healed": True, "score_before": 80.0}
    assert (healed["score_dense"], healed["scored_on"], "score_compressed" in healed) == (90.0, {"dense": {}}, False)
