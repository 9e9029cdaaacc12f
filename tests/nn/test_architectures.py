"""Families of models: compressed, saved and loaded by the Auto class; their Fisher information is that of autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks import architectures, coverage
from hf_lowrank import CompressionConfig, LowRankError, compress, compute_fisher, compute_statistics
from hf_lowrank.model.targets import find_targets, unstacked
from hf_lowrank.nn.layers_lowrank import LowRankLinear
from tests.helpers import modules_of

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SMALL | WORDS | {"num_key_value_heads": 2, "head_dim": 8}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
STACKS = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4))}
STACKS |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32}
WAVES = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (5, 4), "num_feat_extract_layers": 2}
WAVES |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
MOBILE = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 2}


def tokens(batch: int = 3, length: int = 6) -> Tensor:
    return torch.randint(5, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def classes() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": torch.tensor([0, 1, 1])}


def tags() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens() % 2}


def span() -> dict[str, Any]:
    return {"input_ids": tokens(), "start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 3, 5])}


def text() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens()}


def masked() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens().masked_fill(torch.arange(6) % 3 > 0, -100)}


def images() -> dict[str, Any]:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1])}


def captions() -> dict[str, Any]:
    ids = torch.cat([torch.full((3, 4), 63), tokens() % 60], dim=1)  # four patches, then words
    return images() | {"input_ids": ids, "labels": ids.masked_fill(ids == 63, -100)}


def sounds() -> dict[str, Any]:
    features = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "labels": tokens()}


def waves() -> dict[str, Any]:
    sound = torch.randn(3, 400, generator=torch.Generator().manual_seed(1))
    return {"input_values": sound, "labels": tokens(length=3)}


def vision(config_class: Any) -> Any:
    return config_class(**SMALL, image_size=16, patch_size=8)


def llava() -> Any:
    config = t.LlavaConfig(
        vision_config=vision(t.CLIPVisionConfig), text_config=t.LlamaConfig(**GROUPED), image_token_index=63
    )
    return t.LlavaForConditionalGeneration(config)


def whisper() -> Any:
    sizes = STACKS | WORDS | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**sizes, decoder_start_token_id=1, suppress_tokens=None))


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    auto_class: Any
    batch: Callable[[], dict[str, Any]]


def family(model_class: Any, config: Any, auto_class: Any, batch: Callable[[], dict[str, Any]]) -> Family:
    return Family(lambda: model_class(config), auto_class, batch)


CLASSIFIER, CAUSAL, SEQ2SEQ = t.AutoModelForSequenceClassification, t.AutoModelForCausalLM, t.AutoModelForSeq2SeqLM

FAMILIES = {
    "BERT": family(t.BertForSequenceClassification, t.BertConfig(**SMALL | WORDS), CLASSIFIER, classes),
    "RoBERTa": family(
        t.RobertaForTokenClassification, t.RobertaConfig(**SMALL | WORDS), t.AutoModelForTokenClassification, tags
    ),
    "DistilBERT": family(
        t.DistilBertForQuestionAnswering,
        t.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=64),
        t.AutoModelForQuestionAnswering,
        span,
    ),
    "ALBERT": family(
        t.AlbertForSequenceClassification, t.AlbertConfig(**SMALL | WORDS, embedding_size=16), CLASSIFIER, classes
    ),
    "MobileBERT": family(
        t.MobileBertForSequenceClassification, t.MobileBertConfig(**SMALL | WORDS | MOBILE), CLASSIFIER, classes
    ),
    "DeBERTa-v2": family(
        t.DebertaV2ForSequenceClassification,
        t.DebertaV2Config(**SMALL | WORDS, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
        CLASSIFIER,
        classes,
    ),
    "ELECTRA": family(
        t.ElectraForMaskedLM, t.ElectraConfig(**SMALL | WORDS, embedding_size=16), t.AutoModelForMaskedLM, masked
    ),
    "GPT-2": family(t.GPT2LMHeadModel, t.GPT2Config(n_embd=32, n_layer=2, n_head=4, **WORDS), CAUSAL, text),
    "GPT-NeoX, fused qkv": family(t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**SMALL | WORDS), CAUSAL, text),
    "Falcon, a linear of its own": family(t.FalconForCausalLM, t.FalconConfig(**SMALL | WORDS), CAUSAL, text),
    "Llama": family(t.LlamaForCausalLM, t.LlamaConfig(**GROUPED), CAUSAL, text),
    "Qwen3": family(t.Qwen3ForCausalLM, t.Qwen3Config(**GROUPED, tie_word_embeddings=True), CAUSAL, text),
    "Gemma": family(t.GemmaForCausalLM, t.GemmaConfig(**GROUPED), CAUSAL, text),
    "Mistral": family(t.MistralForCausalLM, t.MistralConfig(**GROUPED), CAUSAL, text),
    "Mixtral, 3-D experts": family(t.MixtralForCausalLM, t.MixtralConfig(**GROUPED, num_local_experts=4), CAUSAL, text),
    "Switch, experts of linears": family(
        t.SwitchTransformersForConditionalGeneration,
        t.SwitchTransformersConfig(**T5, **WORDS, num_experts=4, expert_capacity=64, num_sparse_encoder_layers=1),
        SEQ2SEQ,
        text,
    ),
    "T5": family(t.T5ForConditionalGeneration, t.T5Config(**T5, **WORDS), SEQ2SEQ, text),
    "BART": family(
        t.BartForConditionalGeneration, t.BartConfig(**STACKS | WORDS, decoder_start_token_id=2), SEQ2SEQ, text
    ),
    "ViT": family(t.ViTForImageClassification, vision(t.ViTConfig), t.AutoModelForImageClassification, images),
    "CLIP": family(
        t.CLIPForImageClassification,
        t.CLIPConfig(vision_config=vision(t.CLIPVisionConfig).to_dict(), text_config=SMALL | WORDS),
        t.AutoModelForImageClassification,
        images,
    ),
    "LLaVA": Family(llava, t.AutoModelForImageTextToText, captions),
    "Whisper": Family(whisper, t.AutoModelForSpeechSeq2Seq, sounds),
    "wav2vec 2.0": family(t.Wav2Vec2ForCTC, t.Wav2Vec2Config(**SMALL | WORDS | WAVES), t.AutoModelForCTC, waves),
    "Mamba": family(
        t.MambaForCausalLM, t.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, **WORDS), CAUSAL, text
    ),
}


@pytest.fixture(params=FAMILIES)
def built(request: pytest.FixtureRequest) -> tuple[Any, Family]:
    torch.manual_seed(0)
    return FAMILIES[request.param].make().eval(), FAMILIES[request.param]


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model(**batch)
    return found.logits if "logits" in found else found.start_logits


def test_a_family_is_compressed_saved_and_loaded(built: tuple[Any, Family], tmp_path: Path) -> None:
    model, family = built
    expected = logits(model, family.batch())
    low_rank, report = compress(copy.deepcopy(model), CompressionConfig("svd", 0.25), progress=False)
    found = logits(low_rank, family.batch())
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)
    layers = [module for module in low_rank.modules() if isinstance(module, LowRankLinear)]
    assert len(layers) == len(report.ranks) > 0
    saved = sum(layer.parameters_before - layer.parameters_after for layer in report.layers)
    assert low_rank.num_parameters() == report.parameters_after == model.num_parameters() - saved
    low_rank.save_pretrained(tmp_path)
    loaded = family.auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(low_rank)
    before, after = low_rank.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert loaded.num_parameters() == report.parameters_after
    torch.testing.assert_close(logits(loaded, family.batch()), found)


# Mamba multiplies by the weight of this layer instead of calling it, so nothing is seen of it: it is kept dense.
READ_NOT_CALLED = "mixer.dt_proj"


def naive_fisher(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Σ_n (∂ loss_n / ∂ W)², one sample at a time by autograd alone."""
    model = copy.deepcopy(model).eval()
    targets = find_targets(model)
    total = {name: torch.zeros(target.shape) for name, target in targets.items()}
    for n in range(len(next(iter(batch.values())))):
        with unstacked(model, targets):
            model.zero_grad()
            model(**{key: value[n : n + 1] for key, value in batch.items()}).loss.backward()
        for name, module in modules_of(targets).items():
            if module.weight.grad is not None:
                gradient = module.weight.grad
                total[name] += (gradient.T if isinstance(module, Conv1D) else gradient) ** 2
    return total


def test_the_fisher_of_a_family_is_that_of_autograd(built: tuple[Any, Family]) -> None:
    model, family = built
    expected = naive_fisher(model, family.batch())
    found = compute_fisher(model, [family.batch()], progress=False)
    for name, total in expected.items():
        if READ_NOT_CALLED in name:
            assert found.sums["fisher"][name].sum() == 0 < total.sum()
            continue
        torch.testing.assert_close(found.sums["fisher"][name], total, rtol=1e-3, atol=1e-5 * float(total.max()))


def test_gradient_checkpointing_changes_no_statistics() -> None:
    torch.manual_seed(0)
    model = FAMILIES["BERT"].make()
    expected = compute_fisher(model, [classes()], progress=False).sums["fisher"]
    model.gradient_checkpointing_enable()
    found = compute_fisher(model.train(), [classes()], progress=False).sums["fisher"]
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], total) for name, total in expected.items())
    assert model.is_gradient_checkpointing


@pytest.mark.slow
def test_experts_that_no_token_is_routed_to_stay_dense() -> None:
    torch.manual_seed(0)
    model = FAMILIES["Switch, experts of linears"].make().eval()
    one_word = {"input_ids": torch.full((1, 4), 7), "labels": torch.full((1, 4), 9)}
    config = CompressionConfig("tfwsvd", 0.25)
    statistics = compute_statistics(model, [one_word], config.needs, progress=False)
    low_rank, report = compress(model, config, statistics, progress=False)
    idle = [layer for layer in report.layers if layer.note == "no sample reached it"]
    assert len(idle) >= 6  # of the four experts in each of two layers at least three, of two linears each
    assert all("expert" in layer.name for layer in idle)
    assert all(type(low_rank.get_submodule(layer.name)) is nn.Linear for layer in idle)


def test_a_loss_that_compares_samples_is_refused_in_plain_words() -> None:
    torch.manual_seed(0)
    config = t.CLIPConfig(vision_config=vision(t.CLIPVisionConfig).to_dict(), text_config=SMALL | WORDS)
    model, settings = t.CLIPModel(config).eval(), CompressionConfig("kfac", 0.25)
    batch = {"input_ids": tokens(), "pixel_values": images()["pixel_values"], "return_loss": True}
    statistics = compute_statistics(model, [batch], settings.needs, progress=False)
    with pytest.raises(LowRankError, match="no sample's loss depends on any targeted layer; .* contrastive"):
        compress(model, settings, statistics, progress=False)


def test_the_sweep_tells_what_came_of_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("bit", "BitModel", "AutoModel"),
        ("detr", "DetrModel", "AutoModel"),
    ]
    records = [coverage.check(head) for head in heads]
    assert [record["status"] for record in records[:2]] == ["ok", "nothing to factorize"]
    monkeypatch.setattr(architectures, "DATA", tmp_path / "architectures.json")
    architectures.write_data(records, coverage.MEANINGS)
    page = architectures.types_page()
    assert "3 head classes of 3 model types" in page
    assert "| bert | 1 of 1 | 78% | 22% |  |  | 1% |" in page
    assert "| bit | nothing to factorize: 1 | " in page
