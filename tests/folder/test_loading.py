"""A model without a tokenizer, or with pickled weights, is refused: nothing is made up, nothing is unpickled."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    BertTokenizer,
    ByT5Tokenizer,
    GPT2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    WhisperTokenizer,
)

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.loading import load_for_finetuning, load_model, load_trained
from hf_lowrank.folder.tokenizers import _lacking, load_tokenizer
from hf_lowrank.jobs.progress import say_once
from hf_lowrank.model.blocks import is_on_disk
from hf_lowrank.tasks import get_task
from tests.helpers import bert_config, tiny_bert, tiny_t5
from tests.tiny_task import run, tiny_tokenizer, write_cola

NONE = r"has no tokenizer \(tokenizer.json, vocab.txt are not there\); save that of the model it was made from"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A classifier without a tokenizer, of which transformers makes up one of five tokens."""
    tiny_bert().save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


def test_a_tokenizer_is_never_made_up(bare: Path) -> None:
    for load in (load_model, load_for_finetuning):
        with pytest.raises(LowRankError, match=NONE):
            load(str(bare), get_task("cola"))
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')  # still no words
    with pytest.raises(LowRankError, match=NONE):
        load_tokenizer(str(bare))
    assert type(load_trained(str(bare), get_task("cola"))).__name__ == "BertForSequenceClassification"  # a teacher


@pytest.mark.parametrize("kind", ["fast", "words", "derived"])
def test_every_kind_of_tokenizer_is_taken(bare: Path, kind: str) -> None:
    if kind == "fast":
        tiny_tokenizer().save_pretrained(bare)
    else:
        (bare / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "w1"]))
    if kind == "derived":
        (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizerFast"}')
    assert load_model(str(bare), get_task("cola"))[1].convert_tokens_to_ids("w1") == 5


class _Derived(BertTokenizer):
    """Its files are named by the class it comes from."""


@pytest.mark.parametrize(
    ("kind", "files", "lacking"),
    [
        (BertTokenizer, ["vocab.txt"], []),
        (_Derived, ["vocab.txt"], []),
        (_Derived, [], ["tokenizer.json", "vocab.txt"]),
        (T5Tokenizer, ["spiece.model"], []),
        (T5Tokenizer, ["tokenizer.json"], []),
        (T5Tokenizer, ["tokenizer_config.json"], ["tokenizer.json", "spiece.model"]),
        (GPT2Tokenizer, ["vocab.json", "merges.txt"], []),
        (RobertaTokenizer, ["vocab.json"], ["tokenizer.json", "merges.txt"]),
        (WhisperTokenizer, ["vocab.json", "merges.txt"], []),
        (ByT5Tokenizer, [], []),  # bytes need no vocabulary
    ],
)
def test_what_a_tokenizer_needs_is_known_by_its_class(
    tmp_path: Path, kind: type, files: list[str], lacking: list[str]
) -> None:
    for file in files:
        (tmp_path / file).touch()
    assert _lacking(str(tmp_path), kind) == lacking


def test_a_tokenizer_of_bytes_needs_no_files(bare: Path) -> None:
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(str(bare))("ab")["input_ids"][:2] == [ord("a") + 3, ord("b") + 3]


def test_a_broken_tokenizer_is_named(bare: Path) -> None:
    (bare / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "None')
    with pytest.raises(LowRankError, match=r"bare has no tokenizer that can be read \(.*\); save that of"):
        load_model(str(bare), get_task("cola"))


@pytest.mark.parametrize("command", ["evaluate", "compress", "finetune", "statistics", "analyze", "sweep"])
def test_every_command_that_reads_text_refuses_it(
    bare: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, command: str
) -> None:
    data, output = write_cola(tmp_path / "data"), tmp_path / "out"
    place = () if command == "evaluate" else ("--output", output)
    code, _, err = run(monkeypatch, capfd, command, bare, "--task", "cola", "--data-dir", data, *place)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"hf-lowrank: {bare} has no tokenizer (")
    assert not (output / "config.json").exists()


def test_a_kind_of_statistics_is_checked_before_anything_heavy(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    words = ("--task", "cola", "--kind", "foo", "--data-dir", tmp_path, "--output", tmp_path / "out")
    code, _, err = run(monkeypatch, capfd, "statistics", "./nowhere", *words)
    assert code == 2
    assert err.startswith("hf-lowrank: unknown statistic 'foo'; there are fisher, ")


def test_a_model_that_no_task_of_this_kind_has_is_named(tmp_path: Path) -> None:
    tiny_t5().save_pretrained(tmp_path)
    with pytest.raises(LowRankError, match="is a t5, and transformers has no AutoModelForCausalLM of that kind"):
        load_model(str(tmp_path), get_task("text"))


def test_kept_heads_say_how_their_labels_are_matched(bare: Path, capfd: Any) -> None:
    say_once.cache_clear()
    tiny_tokenizer().save_pretrained(bare)
    load_for_finetuning(str(bare), get_task("cola"))
    assert "matched by position" in capfd.readouterr().err


@pytest.mark.slow
def test_a_broken_file_is_told_in_one_line(bare: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(bare)
    (tmp_path / "validation.csv").write_bytes("sentence,label\ncaf\xe9,1\n".encode("latin-1"))
    words = ("evaluate", bare, "--task", "cola", "--data-dir", tmp_path)
    done = subprocess.run([sys.executable, "-m", "hf_lowrank", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hf-lowrank")]
    assert line.endswith("validation.csv: it is not UTF-8; save it as UTF-8")


@pytest.mark.parametrize("command", ["evaluate", "compress", "finetune"])
def test_pickled_weights_are_never_read(bare: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, command: str) -> None:
    tiny_tokenizer().save_pretrained(bare)
    (bare / "model.safetensors").unlink()
    torch.save(tiny_bert().state_dict(), bare / "pytorch_model.bin")
    place = () if command == "evaluate" else ("--output", tmp_path / "out")
    words = ("--task", "cola", "--data-dir", write_cola(tmp_path / "data"))
    code, _, err = run(monkeypatch, capfd, command, bare, *words, *place)
    assert code == 2
    assert "are pickled (pytorch_model.bin), which may run any code, and are never read" in err
    assert "AutoModelForSequenceClassification.from_pretrained(" in err.strip().splitlines()[-1]


def test_what_is_told_to_convert_pickled_weights_does(bare: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(bare)
    (bare / "model.safetensors").unlink()
    torch.save(tiny_bert().state_dict(), bare / "pytorch_model.bin")
    with pytest.raises(LowRankError) as error_info:
        load_model(str(bare), get_task("cola"))
    told = str(error_info.value).partition("if you trust them: ")[2].partition(" converts")[0]
    from transformers import AutoModelForSequenceClassification

    eval(told, {"AutoModelForSequenceClassification": AutoModelForSequenceClassification, "FOLDER": str(bare)})
    assert load_model(str(bare), get_task("cola"))[0].config.vocab_size == bert_config().vocab_size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of resident memory")
def test_blocks_that_stay_on_disk_are_not_held_while_the_rest_is_loaded(tmp_path: Path) -> None:
    """Their files, being converted, would count as resident whole."""
    config = bert_config(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_hidden_layers=4)
    BertForSequenceClassification(config).bfloat16().save_pretrained(tmp_path)
    (size,) = (file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    assert is_on_disk(load_trained(str(tmp_path), get_task("cola"), on_disk=True))
    assert resident("VmHWM") - before < 0.7 * size


def resident(name: str) -> int:
    """Bytes of this process, as the system says."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
