"""Figures of lm-evaluation-harness: a local task, whose figure is known by hand, and input that cannot be."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.folder.saving import save_compressed
from tests.helpers import tiny_llama, word_tokenizer
from tests.tiny_task import run

INSTALLED = find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="the extra lm-eval is not installed")

TASK = """\
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["w5", "w6"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a compressed model, `small`, and a task, `own.yaml`, of eight questions."""
    model, report = compress(tiny_llama(), CompressionConfig("svd", 0.5), progress=False)
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[PAD]"  # what the harness puts before a text
    save_compressed(model, tokenizer, report, tmp_path / "small")
    rows = [{"question": f"w{n + 7} w{2 * n + 9}", "answer": n % 2} for n in range(8)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(TASK.format(data=tmp_path / "test.jsonl"))
    return tmp_path


@needs_harness
@pytest.mark.slow
def test_a_compressed_model_answers_the_questions_of_a_task(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["evaluate", place / "small", "--lm-eval", place / "own.yaml", "--json"]
    code, out, error = run(monkeypatch, capfd, *words)
    assert code == 0, error
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(place / "small"), word_tokenizer()
    right = []
    for line in (place / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            logits = model(**tokenizer(row["question"], return_tensors="pt")).logits[0, -1]
        first, second = (float(logits[tokenizer.convert_tokens_to_ids(word)]) for word in ("w5", "w6"))
        right.append(int(second > first) == row["answer"])
    assert json.loads(out)["lm_eval"]["own"]["acc"] == sum(right) / len(right)
    code, _, error = run(monkeypatch, capfd, *words[:2], "--lm-eval", "no_such_task")
    assert (code, error.count("\n")) == (2, 1)
    assert "lm-evaluation-harness knows no task 'no_such_task'" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lm-eval", "own"], 'lm-evaluation-harness is not installed: pip install "hf_lowrank[lm-eval]"'),
        (["--lm-eval", ","], "--lm-eval takes names of tasks with commas between them"),
        (["--limit", "3"], "--limit is of the tasks of --lm-eval"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if INSTALLED and "not installed" in message:
        pytest.skip("the extra lm-eval is installed")
    code, _, error = run(monkeypatch, capfd, "evaluate", "nowhere", *words)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
