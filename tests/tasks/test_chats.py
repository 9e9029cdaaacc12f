"""Conversations become what a chat template makes of them, and their answers what is to be predicted."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import GPT2Config, PreTrainedTokenizerFast

from hf_lowrank.errors import LowRankError
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.tasks import encode, get_task
from hf_lowrank.tasks.encoding import IGNORED
from tests.helpers import tiny_llama, word_tokenizer

CHAT = [
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w4 w5"},
    {"role": "user", "content": "w6"},
    {"role": "assistant", "content": "w7 w8 w9"},
]
# Roles are words; the last message of a user asks for an answer; thoughts are shown of the last answer alone.
PLAIN = (
    "{% for m in messages %}{{ 'w20' if m.role == 'user' else 'w21' }} {{ m.content }} w22 {% endfor %}"
    "{% if add_generation_prompt %}w21 {% endif %}"
)
THINKING = PLAIN.replace("{{ m.content }}", "{{ 'w30 ' if loop.last and m.role != 'user' }}{{ m.content }}")
REFUSING = "{{ raise_exception('no system message') }}"


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    found = word_tokenizer()
    found.chat_template = template
    return found


def encoded(template: str | None, chat: list[Any] = CHAT, length: int | None = None) -> dict[str, Any]:
    rows = Dataset.from_dict({"messages": [chat]})
    return encode(rows, get_task("chat", length), tokenizer(template), GPT2Config(vocab_size=64))[0]


@pytest.mark.parametrize(
    ("template", "answers"),
    [(PLAIN, ["w4", "w5", "w22", "w7", "w8", "w9", "w22"]), (THINKING, ["w30", "w7", "w8", "w9", "w22"])],
)
def test_answers_are_what_is_predicted(template: str, answers: list[str]) -> None:
    row = encoded(template)
    words = tokenizer(None)
    assert words.convert_ids_to_tokens(row["input_ids"])[:5] == ["w20", "w2", "w3", "w22", "w21"]
    assert words.convert_ids_to_tokens([label for label in row["labels"] if label != IGNORED]) == answers
    assert all(label in (token, IGNORED) for token, label in zip(row["input_ids"], row["labels"], strict=True))


@pytest.mark.parametrize(
    ("template", "chat", "length", "message"),
    [
        (None, CHAT, None, "the tokenizer has no chat template: take that of the chat model, or the task 'text'"),
        (REFUSING, CHAT, None, "template refuses a conversation of user, assistant, user, assistant: no system"),
        (PLAIN, [{"role": "user"}], None, "in row 0; chat needs a list of messages with role and content there"),
        (PLAIN, CHAT[:1], None, "the texts of chat are empty: there is nothing to predict"),
        (PLAIN, CHAT, 4, "the texts of chat are empty: there is nothing to predict"),
    ],
)
def test_chats_that_cannot_be_read_are_named(
    template: str | None, chat: list[Any], length: int | None, message: str
) -> None:
    with pytest.raises(LowRankError, match=message):
        encoded(template, chat, length)


def test_a_model_is_compressed_by_its_answers(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer(PLAIN).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        Dataset.from_dict({"messages": [CHAT, CHAT[2:]] * 4}).to_json(tmp_path / f"data/{split}.jsonl")
    pipeline = Pipeline.load(str(tmp_path / "model"), "chat", tmp_path / "data", progress=False)
    assert pipeline.score()["tokens"] == 4 * (7 + 4)
    report = pipeline.compress(keep=0.5)
    assert "parameters kept: " in report.summary()
    assert pipeline.score()["score"] > 0
