"""Records hold no path of a machine."""

from pathlib import Path

import pytest

from hf_lowrank.folder.facts import public_name


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("bert-base-uncased", "bert-base-uncased"),
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("/home/ada/models/bert-stsb", "bert-stsb"),
        ("/home/ada/models/bert-stsb/", "bert-stsb"),
        ("./bert-stsb", "bert-stsb"),
        ("../models/bert-stsb", "bert-stsb"),
        ("~/bert-stsb", "bert-stsb"),
        ("runs/2024/bert-stsb", "bert-stsb"),
        ("C:\\Users\\ada\\bert-stsb", "bert-stsb"),
    ],
)
def test_only_hub_names_are_published_whole(given: str, name: str) -> None:
    assert public_name(given) == name


def test_a_folder_is_called_by_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("me/bert") == "bert"
    monkeypatch.chdir(tmp_path / "me" / "bert")
    assert public_name(".") == "bert"
