"""hf-lowrank shrink: from a folder to a smaller one, without data."""

import json
from pathlib import Path
from typing import Any

from hf_lowrank.folder.verify import verify
from tests.launches import make_data, make_model
from tests.tiny_task import run


def test_a_folder_is_shrunk_and_tells_of_both_steps(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    model, data = make_model(tmp_path / "dense"), make_data(tmp_path / "rows")
    half, less = tmp_path / "half", tmp_path / "less"
    words = ("compress", model, "--task", "cola", "--data-dir", data, "--keep", 0.5, "--cap", 1.5, "--output", half)
    assert run(monkeypatch, capfd, *words)[0] == 0
    code, printed, err = run(monkeypatch, capfd, "shrink", half, "--keep", 0.3, "--output", less, "--json")
    assert code == 0, err
    result = json.loads(printed)
    assert result["targeted_after"] <= 0.3 * result["targeted_before"]
    record = json.loads((less / "compression.json").read_text())
    assert record["earlier"][0]["settings"]["keep"] == 0.5
    assert (record["base_model"], record["settings"]["keep"]) == ("dense", 0.3)
    assert {check.status for check in verify(less)} == {"PASS"}
    assert (less / "tokenizer.json").is_file()
    code, _, err = run(monkeypatch, capfd, "shrink", half, "--output", tmp_path / "no")
    assert code == 2
    assert "how small? Give keep" in err
    code, _, err = run(monkeypatch, capfd, "shrink", model, "--keep", 0.3, "--output", tmp_path / "no")
    assert code == 2
    assert "none of its layers is factorized" in err
