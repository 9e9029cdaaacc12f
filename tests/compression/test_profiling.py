"""The mean loss of a model over batches of any form: that of its samples, each taken alone."""

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_lowrank.compression.profiling import mean_loss
from tests.helpers import HIDDEN, VOCABULARY, tiny_llama, tiny_t5
from tests.statistics.test_statistics import padded_batch


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 1, 2]])
def test_a_sample_without_labels_has_no_loss(make: object, order: list[int]) -> None:
    model, batch = make(), padded_batch(lengths=(9, 4, 7, 5))  # type: ignore[operator]
    batch["labels"][3] = -100
    with torch.no_grad():
        alone = [float(model(**{key: value[n : n + 1] for key, value in batch.items()}).loss) for n in range(3)]
    shuffled = {key: value[order] for key, value in batch.items()}
    assert mean_loss(model, [shuffled]) == pytest.approx(sum(alone) / 3, rel=1e-4)


def test_a_model_that_takes_no_batches_has_a_mean_loss() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=HIDDEN, n_layer=1, n_head=4, n_positions=64, vocab_size=VOCABULARY, num_labels=3)
    model = GPT2ForSequenceClassification(config).eval()  # without a padding token
    batch = {"input_ids": torch.randint(5, VOCABULARY, (3, 6)), "labels": torch.tensor([0, 2, 1])}
    with torch.no_grad():
        alone = [float(model(**{key: value[n : n + 1] for key, value in batch.items()}).loss) for n in range(3)]
    assert mean_loss(model, [batch]) == pytest.approx(sum(alone) / 3, rel=1e-4)
