"""A saved folder loads without hf_lowrank by the code inside it, and with hf_lowrank imported by the library's own.

Each script runs in a process of its own, with an empty cache; the folders are made by the fixture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from hf_lowrank.nn import modeling_lowrank
from hf_lowrank.nn.configuration_lowrank import SOURCE_FILES
from tests.helpers import factorize, outputs, tiny_bert, tiny_gpt2, token_ids

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PREAMBLE = """
import copy, json, pickle, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, pipeline

expected = torch.load("expected.pt")
ids = expected["ids"]

def refused(load):
    try:
        load()
    except (ValueError, OSError) as error:
        return str(error)
    raise AssertionError("it was not refused")
"""

# `None` in sys.modules makes every import of the library fail, wherever it may be installed.
WITHOUT_LIBRARY = "import sys; sys.modules['hf_lowrank'] = None\n" + PREAMBLE
WITH_LIBRARY = PREAMBLE + "import hf_lowrank.nn.modeling_lowrank as library; library.register()\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a saved classifier and language model, a repository in the Hub's cache, and their outputs."""
    place = tmp_path_factory.mktemp("place")
    classifier, generator = factorize(tiny_bert()), factorize(tiny_gpt2())
    classifier.save_pretrained(place / "classifier")
    generator.save_pretrained(place / "generator")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
    (place / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(place / "vocab.txt")).save_pretrained(place / "classifier")

    repository = place / "home" / "hub" / "models--someone--classifier"
    shutil.copytree(place / "classifier", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)

    generated = generator.generate(token_ids(), max_new_tokens=5, do_sample=False)
    expected = {"logits": outputs(classifier), "body": outputs(classifier.bert), "generated": generated}
    torch.save(expected | {"ids": token_ids()}, place / "expected.pt")
    return place


def runs_to_its_end(script: str, place: Path, library: bool = False) -> bool:
    """Whether `script` reaches its last line, in a clean process that runs in `place`."""
    settings = {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings["PYTHONPATH"] = str(Path(__file__).parents[2]) if library else ""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    process = subprocess.run(
        [sys.executable, "-c", script],
        cwd=place,
        env=inherited | settings,
        stdin=subprocess.DEVNULL,  # transformers asks whether to trust the code, and nobody answers
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout.endswith("done\n")


@pytest.mark.slow
def test_without_the_library_a_folder_loads_by_its_own_code(place: Path) -> None:
    script = """
message = refused(lambda: AutoModelForSequenceClassification.from_pretrained("classifier"))
assert "trust_remote_code" in message, message

config = AutoConfig.from_pretrained("classifier", trust_remote_code=True)
assert (type(config).__name__, config.model_type, len(config.ranks)) == ("LowRankBertConfig", "bert", 12)
model = AutoModelForSequenceClassification.from_pretrained("classifier", trust_remote_code=True)
assert type(model).__name__ == "LowRankBertForSequenceClassification"
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert torch.equal(model(ids).logits, expected["logits"])

body = AutoModel.from_pretrained("classifier", trust_remote_code=True, dtype=torch.float32)
assert torch.equal(body(ids).last_hidden_state, expected["body"])
tagger = AutoModelForTokenClassification.from_pretrained("classifier", trust_remote_code=True)
assert len(tagger.lowrank_ranks) == 12

classify = pipeline("text-classification", model="classifier", trust_remote_code=True)
assert type(classify.model) is type(model) and 0.5 <= classify("w1 w2")[0]["score"] <= 1

for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
    assert type(other) is type(model) and torch.equal(other(ids).logits, expected["logits"])

generator = AutoModelForCausalLM.from_pretrained("generator", trust_remote_code=True)
assert torch.equal(generator.generate(ids, max_new_tokens=5, do_sample=False), expected["generated"])

assert sys.modules["hf_lowrank"] is None
assert not [name for name in sys.modules if name.startswith("hf_lowrank.")]
print("done")
"""
    assert runs_to_its_end(WITHOUT_LIBRARY + script, place)


@pytest.mark.slow
def test_what_was_loaded_by_its_own_code_saves_and_loads_again(place: Path) -> None:
    script = """
model = AutoModelForSequenceClassification.from_pretrained("classifier", trust_remote_code=True)
with torch.no_grad():
    model.bert.encoder.layer[0].output.dense.down.weight.mul_(2)  # as after fine-tuning
model.save_pretrained("copy")
for name in ("config.json", *(path.name for path in Path("classifier").glob("*_lowrank.py"))):
    assert Path("copy", name).read_bytes() == Path("classifier", name).read_bytes(), name
copied = AutoModelForSequenceClassification.from_pretrained("copy", trust_remote_code=True)
assert type(copied).__name__ == "LowRankBertForSequenceClassification"
assert torch.equal(copied(ids).logits, model(ids).logits)
assert not torch.equal(copied(ids).logits, expected["logits"])

path = Path("copy", "config.json")
content = json.loads(path.read_text())
path.write_text(json.dumps(content | {"ranks": dict.fromkeys(content["ranks"], 4)}))
message = refused(lambda: AutoModelForSequenceClassification.from_pretrained("copy", trust_remote_code=True))
assert "has rank 4 in config.json" in message, message
print("done")
"""
    assert runs_to_its_end(WITHOUT_LIBRARY + script, place)


@pytest.mark.slow
def test_without_the_library_a_repository_of_the_hub_loads_by_its_own_code(place: Path) -> None:
    script = """
message = refused(lambda: AutoModelForSequenceClassification.from_pretrained("someone/classifier"))
assert "trust_remote_code" in message, message
model = AutoModelForSequenceClassification.from_pretrained("someone/classifier", trust_remote_code=True)
assert torch.equal(model(ids).logits, expected["logits"])
model.save_pretrained("from_hub")
assert "--" not in Path("from_hub", "config.json").read_text()  # nothing refers to the repository it came from
copied = AutoModel.from_pretrained("from_hub", trust_remote_code=True)
assert torch.equal(copied(ids).last_hidden_state, expected["body"])
print("done")
"""
    assert runs_to_its_end(WITHOUT_LIBRARY + script, place)


@pytest.mark.slow
def test_with_the_library_imported_its_own_classes_load_without_the_flag_and_with_it(place: Path) -> None:
    script = """
for flag in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
    for folder in ("classifier", "someone/classifier"):
        model = AutoModelForSequenceClassification.from_pretrained(folder, **flag)
        assert type(model) is library.LowRankBertForSequenceClassification
        assert torch.equal(model(ids).logits, expected["logits"])
assert pipeline("text-classification", model="classifier")("w1 w2")[0]["score"] >= 0.5
generator = AutoModelForCausalLM.from_pretrained("generator")
assert torch.equal(generator.generate(ids, max_new_tokens=5, do_sample=False), expected["generated"])
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
print("done")
"""
    assert runs_to_its_end(WITH_LIBRARY + script, place, library=True)


def test_every_file_that_travels_is_imported_by_the_one_that_auto_map_names() -> None:
    """transformers 5.5 copies a local folder's code no deeper."""
    source = Path(modeling_lowrank.__file__).read_text(encoding="utf-8")
    imported = {f"{name}.py" for name in re.findall(r"^from \.(\w+) import", source, re.MULTILINE)}
    assert imported == {*SOURCE_FILES} - {"modeling_lowrank.py"}
