"""Batches in all forms: every sample with its own labels, counted once, the same alone, in a batch and in any order."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lowrank import LowRankError, compute_fisher
from hf_lowrank.model.targets import find_targets
from hf_lowrank.statistics.batches import batch_size, selected
from tests.helpers import HIDDEN, VOCABULARY, WIDE, tiny_bert, tiny_llama, tiny_t5
from tests.statistics.test_statistics import padded_batch, token_batch, token_classifier

Batch = dict[str, Any]
SMALL = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 1, "num_attention_heads": 4}


def naive_fisher(model: Any, samples: Iterable[Batch], names: Iterable[str]) -> dict[str, Tensor]:
    """Σ_n (∂ loss_n / ∂W)² over batches of a single sample, by autograd alone."""
    weights = {name: model.get_submodule(name).weight for name in names}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for sample in samples:
        loss = model.eval()(**sample).loss
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += 0 if gradient is None else gradient**2
    return {name: part.detach() for name, part in total.items()}


def assert_equals(found: Any, expected: dict[str, Tensor], samples: int) -> None:
    assert found.samples == samples
    for name, total in expected.items():
        torch.testing.assert_close(found.sums["fisher"][name], total, rtol=1e-3, atol=1e-5 * float(total.max()))
    assert sum(float(total.sum()) for total in expected.values()) > 0


# --- labels that are lists ---


def boxes(count: int, seed: int) -> dict[str, Tensor]:
    """A detector's labels for an image with so many objects."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 4, generator=generator) * 0.3 + 0.3
    return {"class_labels": torch.randint(0, 3, (count,), generator=generator), "boxes": corners}


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def yolos() -> tuple[Any, Batch]:
    config = t.YolosConfig(**SMALL, image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=3)
    return t.YolosForObjectDetection(config), {"pixel_values": images(), "labels": [boxes(n, n) for n in (1, 2, 4)]}


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def detr() -> tuple[Any, Batch]:
    backbone = t.ResNetConfig(**RESNET, out_features=["stage4"])
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": WIDE, "decoder_ffn_dim": WIDE}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": HIDDEN, "num_queries": 5}
    config = t.DetrConfig(**sizes, backbone_config=backbone, use_timm_backbone=False, num_labels=3)
    return t.DetrForObjectDetection(config), {"pixel_values": images(64), "labels": [boxes(n, n) for n in (1, 2, 4)]}


def mask2former() -> tuple[Any, Batch]:
    swin = t.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = t.Mask2FormerConfig(
        backbone_config=swin, feature_size=HIDDEN, mask_feature_size=HIDDEN, hidden_dim=HIDDEN,
        encoder_feedforward_dim=WIDE, dim_feedforward=WIDE, encoder_layers=1, decoder_layers=2,
        num_attention_heads=4, num_queries=5, num_labels=3, train_num_points=64,
    )  # fmt: skip
    model = t.Mask2FormerForUniversalSegmentation(config)
    model.register_forward_pre_hook(lambda module, args: torch.manual_seed(0) and None)  # its loss draws points
    masks = [(torch.rand(n, 64, 64, generator=torch.Generator().manual_seed(n)) > 0.5).float() for n in (1, 2, 3)]
    classes = [torch.arange(n) for n in (1, 2, 3)]
    return model, {"pixel_values": images(64), "mask_labels": masks, "class_labels": classes}


@pytest.mark.parametrize("make", [yolos, detr, mask2former])
def test_labels_in_a_list_are_those_of_their_own_sample(make: Any) -> None:
    torch.manual_seed(0)
    model, batch = make()
    samples = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(3)]
    names = list(find_targets(model))
    expected = naive_fisher(model, samples, names)
    assert_equals(compute_fisher(model, [batch], progress=False), expected, 3)


def test_what_has_one_entry_for_each_sample_is_split_and_the_rest_is_for_all() -> None:
    batch = {
        "pixel_values": torch.arange(6).reshape(3, 2),
        "labels": [{"boxes": torch.ones(2)}, {"boxes": torch.zeros(1)}, {"boxes": torch.zeros(0)}],
        "sizes": (1, 2, 3),
        "nested": {"mask": torch.tensor([1, 2, 3])},
        "positions": torch.arange(9)[None],
        "temperature": torch.tensor(2.0),
        "return_dict": True,
        "cache": None,
    }
    assert batch_size(batch) == 3
    part = selected(batch, [0, 2])
    assert part["labels"] == [batch["labels"][0], batch["labels"][2]]
    assert part["pixel_values"].tolist() == [[0, 1], [4, 5]]
    assert part["sizes"] == [1, 3]
    assert part["nested"]["mask"].tolist() == [1, 3]
    for name in ("positions", "temperature", "return_dict", "cache"):
        assert part[name] is batch[name]
    with pytest.raises(LowRankError, match=r"nested\['mask'\] has 2 entries in a batch of 3 samples, so it cannot be"):
        selected(batch | {"nested": {"mask": torch.tensor([1, 2])}}, [0])
    with pytest.raises(LowRankError, match="a batch of flag holds no tensor"):
        batch_size({"flag": True})


# --- inputs that are flattened ---


class Patches(t.PreTrainedModel):
    """Images as rows of patches, one image after another → classes."""

    config_class = t.PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(t.PreTrainedConfig(num_labels=3))
        self.blocks = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 3)])

    def forward(self, patches: Tensor, counts: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        states = self.blocks[0](patches).tanh()
        pooled = torch.stack([part.mean(dim=0) for part in states.split(counts.tolist())])
        logits = self.blocks[1](pooled)
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def image_by_image(batch: Batch) -> Iterable[Batch]:
    for n, patches in enumerate(batch["patches"].split(batch["counts"].tolist())):
        yield {"patches": patches, "counts": batch["counts"][n : n + 1], "labels": batch["labels"][n : n + 1]}


def test_flattened_inputs_are_split_by_the_callers_function_or_come_one_by_one() -> None:
    torch.manual_seed(0)
    model, counts = Patches(), torch.tensor([2, 5, 1])
    batch = {"patches": torch.randn(8, 4), "counts": counts, "labels": torch.tensor([0, 2, 1])}
    expected = naive_fisher(model, image_by_image(batch), ["blocks.0", "blocks.1"])
    assert_equals(compute_fisher(model, [batch], progress=False, split=image_by_image), expected, 3)
    assert_equals(compute_fisher(model, image_by_image(batch), progress=False), expected, 3)
    with pytest.raises(LowRankError, match=r"patches has 8 entries in a batch of 3 samples.*`split`"):
        compute_fisher(model, [batch], progress=False)


# --- samples without labels, and models that take no batches ---


def without_labels(batch: Batch, samples: list[int]) -> Batch:
    labels = batch["labels"].clone()
    labels[samples] = -100
    return batch | {"labels": labels}


@pytest.mark.parametrize("case", ["classes", "tokens", "causal", "encoder-decoder"])
def test_a_sample_without_labels_adds_nothing_wherever_it_stands(case: str) -> None:
    model, batch = {
        "classes": lambda: (tiny_bert(num_labels=3), padded_batch(torch.tensor([0, 2, 1, 2]))),
        "tokens": lambda: (token_classifier(), token_batch()),
        "causal": lambda: (tiny_llama(), padded_batch(lengths=(9, 4, 7, 5))),
        "encoder-decoder": lambda: (tiny_t5(), padded_batch(lengths=(9, 4, 7, 5))),
    }[case]()
    known = {key: value[:2] for key, value in batch.items()}
    expected = compute_fisher(model, [known], progress=False)
    for order in ([0, 1, 2, 3], [2, 3, 0, 1], [0, 2, 1, 3]):
        whole = {key: value[order] for key, value in without_labels(batch, [2, 3]).items()}
        parts = [{key: value[n : n + 2] for key, value in whole.items()} for n in (0, 2)]
        for batches in ([whole], parts):
            found = compute_fisher(model, batches, progress=False)
            assert_equals(found, expected.sums["fisher"], 2)
            assert (found.tokens, found.curvature) == (expected.tokens, expected.curvature)
    with pytest.raises(LowRankError, match="no samples to measure statistics on: none of them has a label"):
        compute_fisher(model, [without_labels(batch, [0, 1, 2, 3])], progress=False)


def test_a_model_that_takes_no_batches_is_given_single_samples() -> None:
    torch.manual_seed(0)
    config = t.GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, num_labels=3)
    model = t.GPT2ForSequenceClassification(config).eval()  # without a padding token
    batch = {"input_ids": torch.randint(5, VOCABULARY, (3, 6)), "labels": torch.tensor([0, 2, 1])}
    with pytest.raises(ValueError, match="padding token"):
        model(**batch)
    names = list(find_targets(model))
    singles = [{key: value[n : n + 1] for key, value in batch.items()} for n in range(3)]
    expected = {name: total.T for name, total in naive_fisher(model, singles, names).items()}  # Conv1D
    assert_equals(compute_fisher(model, [batch], progress=False), expected, 3)


def test_a_first_batch_of_one_sample_does_not_decide_for_all() -> None:
    batch = padded_batch(torch.tensor([0, 2, 1, 2]))
    sizes: list[int] = []
    model = tiny_bert(num_labels=3)
    model.bert.register_forward_hook(lambda module, args, output: sizes.append(len(output[0])))
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    compute_fisher(model, parts, progress=False)
    assert (sizes[0], sizes[-1]) == (1, 3)


def test_bad_numbers_are_named_by_their_place_in_the_data() -> None:
    model, batch = tiny_bert(num_labels=3), padded_batch(torch.tensor([-100, 0, -100, 2]))
    batch["input_ids"][3, 0] = 4
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[4] = float("nan")
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 4))]
    for batches in ([batch], parts):
        with pytest.raises(LowRankError, match="the loss is not finite for sample 3"):
            compute_fisher(model, batches, progress=False)
