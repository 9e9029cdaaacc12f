"""A config.json from elsewhere: what does not fit is refused before memory is given to it, and nothing it names is
looked up outside of the model or written outside of the target folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_lowrank.nn.configuration_lowrank import validate_ranks
from tests.helpers import factorize, tiny_bert

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    factorize(tiny_bert()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "..", ".", "a..b", ".a", "a.", "a b", "a\\b", "a\n", " ", "a.b/c", 7, None],
)
def test_names_that_cannot_be_those_of_modules_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="module names are words joined by dots"):
        validate_ranks({name: 4})


@pytest.mark.parametrize("name", ["config", "forward", "__class__", "bert.encoder.__init__", "bert.config.ranks", "T"])
def test_attributes_that_are_no_modules_are_not_looked_up(folder: Path, name: str) -> None:
    edit_config(folder, ranks={name: 4})
    with pytest.raises(ValueError, match=f"names '{name}', which LowRankBertForSequenceClassification"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_messages_stay_short_whatever_the_config_holds() -> None:
    for ranks in ("x" * 10**6, {"a" * 10 + " " * 10**6: 1}, {"a": "9" * 10**6}):
        with pytest.raises(ValueError, match="ranks") as error:
            validate_ranks(ranks)
        assert len(str(error.value)) < 300


def test_a_module_named_twice_is_refused(folder: Path) -> None:
    ranks = json.loads((folder / "config.json").read_text())["ranks"]
    edit_config(folder, ranks=ranks | {QUERY.removeprefix("bert."): 4})
    with pytest.raises(ValueError, match=f"one module twice, as '{QUERY}' and as"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_the_format_cannot_be_its_own_base(folder: Path) -> None:
    edit_config(folder, base_model_type="lowrank")
    with pytest.raises(ValueError, match="does not know 'lowrank'"):
        AutoConfig.from_pretrained(folder)


ABSURD: list[dict[str, Any]] = [
    {"ranks": {QUERY: 10**15}},
    {"ranks": {QUERY: 33}},
    {"hidden_size": 2**24},
    {"intermediate_size": 10**12},
    {"vocab_size": 10**13},
    {"num_hidden_layers": 300},
]

LOAD_IN_LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
import hf_lowrank
from transformers import AutoModelForSequenceClassification

AutoModelForSequenceClassification.from_pretrained(sys.argv[1])  # imports and buffers
path = Path(sys.argv[1], "config.json")
sound = json.loads(path.read_text())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for changes in json.loads(sys.argv[2]):
    path.write_text(json.dumps(sound | changes))
    try:
        AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
    except (ValueError, RuntimeError) as error:
        assert "memory" not in str(error), error
    else:
        raise AssertionError(changes)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_absurd_sizes_are_refused_before_anything_is_allocated(folder: Path) -> None:
    command = [sys.executable, "-c", LOAD_IN_LITTLE_MEMORY, str(folder), json.dumps(ABSURD)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) < 100_000  # KiB; the smallest of them would be hundreds of MB


def test_saving_again_writes_into_the_target_folder_alone(folder: Path, tmp_path: Path) -> None:
    outside = {"AutoConfig": "../../evil.Config", "AutoModel": "/tmp/evil.Model"}
    edit_config(folder, auto_map=outside, _name_or_path="../../elsewhere", tokenizer_file="../../elsewhere")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    before = set(tmp_path.rglob("*"))
    model.save_pretrained(tmp_path / "again")
    written = set(tmp_path.rglob("*")) - before
    assert {path.relative_to(tmp_path).parts[0] for path in written} == {"again"}
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert all(value.startswith("modeling_lowrank.LowRank") for value in auto_map.values())
