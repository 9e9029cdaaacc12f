"""The model card: all of the record and nothing else, metadata that the Hub reads, and cards of real runs."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_lowrank import METHODS, CompressionConfig, LowRankError, compress
from hf_lowrank.folder.card import base_facts, render_card, rendered_as
from hf_lowrank.folder.citations import citations
from hf_lowrank.folder.saving import add_facts, read_record, save_compressed
from hf_lowrank.nn.publishing_lowrank import card_for
from tests.helpers import tiny_bert, tiny_gpt2, word_tokenizer
from tests.tiny_task import run

ROOT = Path(__file__).parents[2]
REAL = sorted(path.parent for path in (ROOT / "model_cards").glob("*/record.json"))


DATA = {"data": "nyu-mll/glue", "splits": ["validation"], "rows": 1500, "digest": "0123456789abcdef"}


def record(**changes: Any) -> dict[str, Any]:
    """A record with everything that a card can show; None removes a fact."""
    layer = {"name": "bert.encoder.layer.0.output.dense", "out_features": 384, "in_features": 1536, "rank": 48}
    facts = {
        "base_model": "someone/bert-stsb",
        "base": {
            "on_hub": True,
            "weights_bytes": 45_400_000,
            "license": "apache-2.0",
            "language": ["en"],
            "datasets": "someone/pairs",
        },
        "architecture": "LowRankBertForSequenceClassification",
        "auto_class": "AutoModelForSequenceClassification",
        "tokenizer": True,
        "task": "stsb",
        "data": "nyu-mll/glue",
        "versions": {"hf_lowrank": "0.1.0", "torch": "2.9.1"},
        "score_dense": 83.071,
        "score_compressed": 81.525,
        "score_finetuned": 82.988,
        "scored_on": dict.fromkeys(("dense", "compressed", "finetuned"), DATA),
        "finetuning": {"epochs": 3, "learning_rate": 3e-5, "history": [1, 2]},
        "latency": {"dense": 7.25, "compressed": 4.75, "setup": "batch 8 of 128 tokens, float32, 2 threads"},
        "weights_bytes": 30_600_000,
        "settings": {"method": "tfwsvd", "rank_ratio": 0.33, "allocation": "uniform", "include": ["query", "key"]},
        "parameters_before": 22_713_601,
        "parameters_after": 15_290_113,
        "statistics": {"samples": 1024, "origin": {"data": "nyu-mll/glue", "split": "train", "seed": 7}},
        "layers": [layer, {**layer, "name": "bert.encoder.layer.1.output.dense", "rank": None}],
    }
    return {key: value for key, value in {**facts, **changes}.items() if value is not None}


def test_the_metadata_is_what_the_hub_searches_by() -> None:
    data = ModelCard(render_card(record(), "me/small")).data.to_dict()
    scores = data.pop("model-index")
    assert data == {
        "base_model": "someone/bert-stsb",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["low-rank", "compression", "svd", "tfwsvd", "custom_code"],
        "datasets": ["someone/pairs", "nyu-mll/glue"],
        "language": ["en"],
        "license": "apache-2.0",
    }
    assert scores[0]["name"] == "small"
    (result,) = scores[0]["results"]
    assert result["dataset"] == {"name": "stsb", "type": "nyu-mll/glue", "config": "stsb", "split": "validation"}
    assert result["metrics"][0]["value"] == 82.988
    untuned = ModelCard(render_card(record(score_finetuned=None, finetuning=None), "me/small")).data
    assert untuned.to_dict()["base_model_relation"] == "quantized"
    assert [result.metric_value for result in untuned.eval_results or []] == [81.525]


def test_the_table_compares_dense_compressed_and_fine_tuned() -> None:
    card = render_card(record(), "me/small")
    assert "| | dense | compressed | fine-tuned |" in card
    assert "| mean of Pearson and Spearman correlation (%) | 83.07 | 81.53 | 82.99 |" in card
    assert "| parameters | 22,713,601 | 15,290,113 (67.3%) | 15,290,113 |" in card
    assert "| weights on disk (MB) | 45.4 | 30.6 | 30.6 |" in card
    assert "| latency (ms) | 7.25 | 4.75 | 4.75 |" in card
    assert "batch 8 of 128 tokens, float32, 2 threads" in card
    assert "fine-tuning afterwards: epochs 3, learning rate 3e-05\n" in card
    assert "1 of its layers" in card  # the other one stayed dense


def test_a_latency_stands_under_the_model_that_was_timed() -> None:
    quantized = record(unquantized_bytes=30_600_000, score_finetuned=None, finetuning=None)
    assert "| latency (ms) | 7.25 | 4.75 |  |" in render_card(quantized, "me/small")
    quantized["latency"]["quantized_by"] = "torchao"
    assert "| latency (ms) | 7.25 |  | 4.75 |" in render_card(quantized, "me/small")


def test_scores_on_other_data_are_not_compared() -> None:
    other = DATA | {"data": "mine", "rows": 60, "digest": "fedcba9876543210"}
    card = render_card(record(scored_on={"dense": DATA, "compressed": DATA, "finetuned": other}), "me/small")
    assert "| mean of Pearson and Spearman correlation (%) |  |  | 82.99 |" in card
    assert "The score is that of 60 rows of mine (validation), all that there are." in card
    assert (
        "The compressed model's 81.53 is not compared: it was measured on 1,500 rows of nyu-mll/glue (01234567), the "
        "fine-tuned model's score on 60 rows of mine (fedcba98), which are other data."
    ) in card
    (result,) = ModelCard(card).data.to_dict()["model-index"][0]["results"]
    assert result["dataset"] == {"name": "stsb", "type": "stsb", "split": "validation"}


def test_scores_of_which_the_data_are_not_known_are_not_compared() -> None:
    card = render_card(record(scored_on=None), "me/small")
    assert "| mean of Pearson and Spearman correlation (%) |  |  | 82.99 |" in card
    assert "The score is that of validation data of stsb that are not recorded." in card
    for score in ("dense model's 83.07", "compressed model's 81.53"):
        assert f"The {score} is not compared: not both were recorded with their validation data." in card
    assert "1,500 rows" not in card
    assert "whole" not in card.partition("## Ranks")[0]


def test_what_was_done_is_said_with_its_formula_and_sources() -> None:
    card = render_card(record(), "me/small")
    method = METHODS["tfwsvd"]
    for said in (
        f"`tfwsvd`, which minimises {method.formula}",
        method.source,
        "- rank ratio: 0.33\n- allocation: uniform\n- include: query, key\n",
        "importance measured on 1,024 samples of nyu-mll/glue (train), seed 7",
        "hf_lowrank 0.1.0, torch 2.9.1",
        "hsu2022fwsvd",
        "hua2022tfwsvd",
    ):
        assert said in card
    assert "{{" not in card
    assert "None" not in card


OPTIONAL = (
    "base_model",
    "base",
    "architecture",
    "auto_class",
    "tokenizer",
    "task",
    "data",
    "versions",
    "score_dense",
    "score_compressed",
    "score_finetuned",
    "scored_on",
    "finetuning",
    "latency",
    "weights_bytes",
    "statistics",
)


@pytest.mark.parametrize("lacking", [*((key,) for key in OPTIONAL), OPTIONAL], ids=lambda keys: keys[-1])
def test_what_was_not_recorded_is_left_out(lacking: tuple[str, ...]) -> None:
    whole = render_card(record(), "small")
    facts = record(**dict.fromkeys(lacking))
    card = render_card(facts, "small")
    assert card != whole
    assert not re.search(r"None|Undefined|\{\{|\{%|\bnan\b|: \n|: ,", card)
    assert "\n\n\n" not in card
    # Every number is one of the record, or of a name in it.
    text = card.partition("## Citation")[0].partition("\n---\n")[2]
    known = render_numbers(facts) | {"0", "2", "1"}
    assert set(re.findall(r"\d[\d,.]*\d|\d", text)) <= known


def render_numbers(facts: dict[str, Any]) -> set[str]:
    """All numbers of a record as a card may write them."""
    known = set(re.findall(r"\d[\d.]*\d|\d", json.dumps(facts) + METHODS["tfwsvd"].source + METHODS["tfwsvd"].formula))
    for number in [float(text) for text in known if text.count(".") < 2]:
        known |= {f"{number:,.0f}", f"{number:.2f}", f"{number / 1e6:.1f}"}
    return known | {f"{100 * facts['parameters_after'] / facts['parameters_before']:.1f}", "3e-05", "05"}


def test_a_record_of_something_else_is_refused() -> None:
    with pytest.raises(LowRankError, match="the record of the compression lacks settings, parameters_before"):
        render_card({"layers": []}, "small")


def test_a_base_model_on_this_machine_is_named_but_not_linked() -> None:
    """It is no repository: the Hub would look for one of that name."""
    card = render_card(record(base_model="bert-stsb", base={"on_hub": False}), "small")
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "`bert-stsb` made smaller" in card


def test_other_tasks_and_heads(tmp_path: Path) -> None:
    model = tiny_gpt2()
    small, report = compress(model, CompressionConfig("svd", 0.25), progress=False)
    facts: dict[str, Any] = {"task": "tinystories", "score_dense": 12.5, "score_compressed": 13.25}
    facts["scored_on"] = {"dense": DATA, "compressed": DATA}
    save_compressed(small, None, report, tmp_path / "small", **facts)
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert "from transformers import AutoModelForCausalLM\n" in card.text  # there is no tokenizer
    assert "| perplexity | 12.50 | 13.25 |" in card.text
    unknown = render_card(record(task="of-my-own"), "small")
    assert "| score | 83.07 |" in unknown
    assert ModelCard(unknown).data.eval_results is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_citations(method: str) -> None:
    changed = copy.deepcopy(record())
    changed["settings"]["method"] = method
    card = render_card(changed, "small")
    for entry in citations(method):
        assert entry in card
        assert entry.count("{") == entry.count("}")
    year = re.search(r"\((\d{4})\)", METHODS[method].source)
    if method not in ("svd", "fwsvd2", "whiten-diag") and year:
        assert f"year = {{{year[1]}}}" in card


# --- cards of folders ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nlanguage: en\nfoo: bar\n---\n\n# Base\n")
    model = type(base).from_pretrained(tmp_path / "base")
    small, report = compress(model, CompressionConfig("svd", 0.25), progress=False)
    save_compressed(small, word_tokenizer(), report, tmp_path / "small", base_model="base", task="cola")
    return tmp_path / "small"


def test_a_saved_folder_has_a_card_with_what_the_base_model_says(folder: Path) -> None:
    card, facts = ModelCard.load(folder / "README.md"), read_record(folder)
    assert facts is not None
    assert (card.data.license, card.data.language) == ("mit", "en")
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder.parent / "base", folder)]
    assert [facts["base"]["weights_bytes"], facts["weights_bytes"]] == sizes
    assert str(folder.parent) not in json.dumps(facts) + card.content


def test_facts_that_come_later_are_added_unless_the_card_was_edited(folder: Path) -> None:
    add_facts(folder, score_compressed=48.25)
    path = folder / "README.md"
    assert "| Matthews correlation (%) |  | 48.25 |" in path.read_text()
    path.write_text(edited := path.read_text() + "\nMy own words.\n")
    add_facts(folder, score_compressed=50.5)
    assert path.read_text() == edited
    assert rendered_as(folder, read_record(folder) or {}) is None


def test_a_card_for_another_name_differs_in_the_name_alone() -> None:
    assert card_for(render_card(record(), "small"), "me/tiny") == render_card(record(), "me/tiny")
    assert card_for("no heading", "me/tiny") == "no heading"


def test_what_cannot_be_found_out_of_a_base_model_is_left_out(folder: Path) -> None:
    assert base_facts("") == {}
    assert base_facts("nobody/nothing") == {}
    (folder.parent / "base" / "README.md").write_text("---\nlicense: [mit\n---\n")  # not YAML
    assert base_facts(str(folder.parent / "base")).keys() == {"on_hub", "weights_bytes"}


def test_thousands_of_layers_are_not_drawn() -> None:
    many = [{"name": f"experts.{n}", "out_features": 4, "in_features": 4, "rank": 1} for n in range(1001)]
    assert "## Ranks" in render_card(record(layers=many[1:]), "small")
    assert "## Ranks" not in render_card(record(layers=many), "small")


# --- what ships, and what was run ---


@pytest.mark.parametrize("folder", REAL, ids=lambda folder: folder.name)
def test_the_cards_of_real_runs_are_what_their_records_say(folder: Path) -> None:
    facts = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    rendered = render_card(facts, folder.name)
    assert (folder / "README.md").read_text(encoding="utf-8") == rendered, f"run: hf-lowrank card {folder}"
    assert (folder / "ranks.png").is_file()
    assert {"score_dense", "score_compressed", "base_model", "task"} <= facts.keys()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("hatchling") is None, reason="the build backend is not installed")
def test_the_wheel_has_the_template(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    assert not (tmp_path / "model_cards").exists()
    script = "import sys, hf_lowrank.folder.card as card; print(card.__file__); card._template().read_text()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path))


def test_what_the_owner_says_stands_on_this_card_and_on_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((ROOT / "model_cards/minilm-l6-stsb-kfac/record.json").read_text(encoding="utf-8"))
    record["base"] = {"license": "mit", "license_link": "somewhere"}
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    said = ["--license", "apache-2.0", "--language", "en", "--language", "de", "--base-model", "me/bert-stsb"]
    for words in (said, []):
        code, _, err = run(monkeypatch, capfd, "card", tmp_path, *words)
        assert code == 0, err
        data = ModelCard.load(tmp_path / "README.md").data
        assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en", "de"], "me/bert-stsb")
        assert data.get("license_link") is None
    code, _, err = run(monkeypatch, capfd, "card", tmp_path, "--base-model", "../secret/path")
    assert code == 2
    assert "'../secret/path' is no name on the Hub" in err
