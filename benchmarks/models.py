"""Randomly initialised BERTs and made-up data for them, so that nothing is downloaded, and shapes of Llamas."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig

Batch = dict[str, Any]


@dataclass(frozen=True)
class LlamaShape:
    """The shape of a Llama with grouped-query attention: Llama-3-8B's, unless said otherwise."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    key_value_heads: int = 8
    layers: int = 32

    def config(self, vocabulary: int, length: int, **others: Any) -> LlamaConfig:
        """That of the model, with so many tokens in its vocabulary and at most so many in a text."""
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=length,
            **others,
        )


def random_bert(layers: int, hidden: int, vocabulary: int = 30_522) -> BertForSequenceClassification:
    """A BERT of the usual proportions: heads of 64 or 32, an inner width of four times the hidden one."""
    torch.manual_seed(0)
    heads = max(12, hidden // 64)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    return BertForSequenceClassification(config).eval()


def random_batches(
    samples: int, batch_size: int, vocabulary: int, lengths: tuple[int, int] = (16, 64), seed: int = 0
) -> list[Batch]:
    """Classification batches of sentences of random lengths, longest first and padded within a batch."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(lengths[0], lengths[1] + 1, (samples,), generator=generator)
    return [_batch(part, vocabulary, generator) for part in drawn.sort(descending=True).values.split(batch_size)]


def _batch(lengths: torch.Tensor, vocabulary: int, generator: torch.Generator) -> Batch:
    size, longest = len(lengths), int(lengths.max())
    return {
        "input_ids": torch.randint(0, vocabulary, (size, longest), generator=generator),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "labels": torch.randint(0, 2, (size,), generator=generator),
    }


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A weight [rows, columns] with a singular spectrum like those of trained encoders: slow decay and no gap."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    index = torch.arange(rank)
    spectrum = (1 + index / 20) ** -0.5 * (1 - 0.95 * index / rank)
    return (left * spectrum) @ right.T


def random_importance(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A heavy-tailed importance [rows, columns]: log-normal, and as in Fisher information more by row and column."""
    generator = torch.Generator().manual_seed(seed)
    exponent = (
        torch.randn(rows, 1, generator=generator)
        + torch.randn(1, columns, generator=generator)
        + 0.4 * torch.randn(rows, columns, generator=generator)
    )
    return exponent.exp()
