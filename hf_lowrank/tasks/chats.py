"""Conversations + a tokenizer with a chat template → tokens, of which the answers are to be predicted."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.predictions import IGNORED

ANSWERS = "assistant"  # the role whose messages are to be predicted

Message = dict[str, Any]


def encode_chats(chats: Sequence[Sequence[Message]], tokenizer: Any, length: int) -> dict[str, Any]:
    """Rows of a causal language model, cut at `length` tokens; those in which no answer is left are left out.

    An answer counts where the template shows it in the whole conversation as it showed it when it was the last: some
    leave the thoughts of earlier answers out.

    Raises:
        LowRankError: the tokenizer has no chat template, is slow, or its template refuses a conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise LowRankError(
            "the tokenizer has no chat template: take that of the chat model, or the task 'text' on texts without roles"
        )
    if not tokenizer.is_fast:
        raise LowRankError("chats need a fast tokenizer, which knows where its tokens stand; this one is slow")
    rows = [_encoded(chat, tokenizer, length) for chat in chats]
    kept = [(ids, labels) for ids, labels in rows if any(label != IGNORED for label in labels[1:])]
    return {
        "input_ids": [ids for ids, _ in kept],
        "attention_mask": [[1] * len(ids) for ids, _ in kept],
        "labels": [labels for _, labels in kept],
    }


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, each with a role and a text."""
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )


def _encoded(chat: Sequence[Message], tokenizer: Any, length: int) -> tuple[list[int], list[int]]:
    """Token ids, and the same as labels within answers."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in chat]
    shown, answers = _answers(messages, tokenizer)
    encoded = tokenizer(
        shown, add_special_tokens=False, truncation=True, max_length=length, return_offsets_mapping=True
    )
    inside = [any(start <= at < end for start, end in answers) for at, _ in encoded["offset_mapping"]]
    ids = encoded["input_ids"]
    return ids, [token if told else IGNORED for token, told in zip(ids, inside, strict=True)]


def _answers(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as the template shows it, and where the answers stand in it, first and last character."""
    shown, places = _shown(messages, tokenizer), []
    for number, message in enumerate(messages):
        if message["role"] == ANSWERS:
            before = _shown(messages[:number], tokenizer, add_generation_prompt=True)
            after = _shown(messages[: number + 1], tokenizer)
            if shown.startswith(after) and after.startswith(before):
                places.append((len(before), len(after)))
    return shown, places


def _shown(messages: Sequence[Message], tokenizer: Any, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise LowRankError(f"the tokenizer's chat template refuses a conversation of {roles}: {error}") from error
