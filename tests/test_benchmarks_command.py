"""The command of the benchmarks: mistakes are told in one line, before anything is measured."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["layers"], "there is no benchmark 'layers', only fisher, "),
        (["bytes", "--model", "bert"], "--model and --task belong together"),
        (["billion", "--cache", "taken"], "--cache takes a folder, and taken is a file"),
        (["layer", "--output", "taken"], "--output takes a folder, and taken is a file"),
        (["bytes"], "bytes needs a real model: --model FOLDER --task NAME --data-dir FOLDER"),
        (["lm_bytes", "--cache", "."], "no language model is in .: train it with `python -m benchmarks lm --train`"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(told)
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
