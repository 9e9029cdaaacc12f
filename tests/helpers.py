"""Tiny random models, and their factorization by a plain truncated SVD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from hf_lowrank.model.targets import Target
from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.nn.layers_lowrank import LowRankLinear, dense_weight
from hf_lowrank.nn.modeling_lowrank import to_low_rank_class

VOCABULARY, HIDDEN, WIDE, RANK = 64, 32, 64, 8


def bert_config(**changes: Any) -> BertConfig:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(**sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 32} | changes)


def tiny_bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(bert_config(**changes)).eval()


def tiny_albert() -> AlbertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 3, "num_attention_heads": 4}
    return AlbertForSequenceClassification(AlbertConfig(**sizes, vocab_size=VOCABULARY, embedding_size=16)).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, **tokens)).eval()


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes | tokens | {"num_key_value_heads": 2} | changes)).eval()


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": WIDE, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=VOCABULARY, decoder_start_token_id=0)).eval()


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r factors of `weight` [out, in]: up [out, r] and down [r, in], of equal singular spectra."""
    left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def block_linears(model: nn.Module) -> list[str]:
    """The linear layers inside the transformer blocks: their names have a number in them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split("."))
    ]


def factorize(model: Any, rank: int = RANK, names: list[str] | None = None) -> Any:
    """`model`, in place, with the named layers (those of the blocks) replaced by their truncated SVD."""
    names = block_linears(model) if names is None else names
    to_low_rank_class(model)
    for name in names:
        linear = model.get_submodule(name)
        replace_module(model, name, LowRankLinear.from_factors(linear, *truncated_svd(dense_weight(linear), rank)))
    return model


def token_ids(seed: int = 0, batch: int = 3, length: int = 7) -> Tensor:
    """Token ids [batch, length], none of them a special token."""
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, **inputs: Tensor) -> Tensor:
    """Logits or last hidden states of `model` for the same token ids every time."""
    inputs = inputs or {"input_ids": token_ids()}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    with torch.no_grad():
        return model(**inputs)[0]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny models' vocabulary, whose words are w2, w3, …"""
    words = ["[PAD]", "[UNK]", *(f"w{n}" for n in range(2, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def modules_of(targets: Mapping[str, Target]) -> dict[str, Any]:
    """The layers that targets are, by name."""
    return {name: target.module for name, target in targets.items()}
