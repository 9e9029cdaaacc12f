"""How many samples statistics are measured on unless it is said: by the tokens that a model's widest layer takes."""

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_lowrank import Pipeline
from hf_lowrank.tasks import get_task
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.tasks.enough import enough_samples
from hf_lowrank.tasks.texts import given_texts, texts_task
from tests.helpers import WIDE, tiny_bert, tiny_llama
from tests.tiny_task import WORDS, tiny_tokenizer

WIDER = 1000  # inputs of the widest layer
LENGTHS = (6, 10)  # the tokens of texts, with the special ones


def texts(count: int = 4000) -> list[str]:
    return [" ".join(WORDS[(n + k) % len(WORDS)] for k in range(LENGTHS[n % 2] - 2)) for n in range(count)]


def samples(model: Any, rows: list[str], **options: Any) -> int:
    model.config.architectures = [type(model).__name__]
    task = texts_task(given_texts(rows), model.config)
    loader: Any = calibration_loader(model, tiny_tokenizer(), task, labels="model", **options)
    return len(loader.dataset)


def test_the_default_is_25_tokens_for_each_input_of_the_widest_layer(capfd: pytest.CaptureFixture[str]) -> None:
    """8 tokens in the mean, so about 25 · 1000 / 8 rows; whatever the batches, and all where there are fewer."""
    model = tiny_bert(intermediate_size=WIDER)
    found = samples(model, texts())
    assert found == pytest.approx(25 * WIDER / 8, rel=0.05)
    assert found % 16 == 0
    said = "25 tokens for each of 1,000 inputs of a layer take"
    assert f"measuring on {found:,} rows: {said} {found:,}\n" in capfd.readouterr().err
    assert samples(model, texts(), batch_size=7) == found
    assert samples(model, texts(), samples=20) == 20
    assert samples(model, texts(1500)) == 1350  # a tenth is held out
    assert f"measuring on 1,350 rows, all there are: {said}" in capfd.readouterr().err


def test_narrow_models_and_single_answers_take_1024_rows() -> None:
    assert 25 * WIDE / 8 < 1024
    assert samples(tiny_bert(), texts()) == 1024


@pytest.mark.parametrize(("wide", "wanted"), [(WIDE, 128), (2048, 25 * 2048 / 16)])
def test_windows_of_running_text_are_fewer_as_each_holds_many(wide: int, wanted: float) -> None:
    rows, task = Dataset.from_dict({"text": texts(1)}), get_task("text", max_length=16, dataset=None, data_dir=Path())
    found = enough_samples(tiny_llama(intermediate_size=wide), tiny_tokenizer(), task, rows, 0)
    assert found == math.ceil(wanted / 16) * 16


def test_the_record_says_what_was_asked_for() -> None:
    model: Any = tiny_bert(intermediate_size=WIDER)
    model.config.architectures = [type(model).__name__]
    task = texts_task(given_texts(texts(8)), model.config)
    asked = "25 tokens for each of 1,000 inputs of a layer, 1,024 samples at least"
    assert Pipeline(model, tiny_tokenizer(), task).origin["enough"] == asked
    assert "enough" not in Pipeline(model, tiny_tokenizer(), task, samples=8).origin
