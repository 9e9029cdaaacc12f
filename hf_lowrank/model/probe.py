"""A model → one fixed input that it can be run on, whatever its weights."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

LENGTH = 16


def token_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """One sequence of `LENGTH` tokens, on the CPU."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    if isinstance(config.eos_token_id, int):
        ids[0, -1] = config.eos_token_id  # BART's classifiers read the output there
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | {"decoder_input_ids": ids} if config.is_encoder_decoder else inputs


def image_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """One image of the size that the config names, on the CPU."""
    config = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, config.num_channels, height, width)}


def fixed_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """An image for a model of images, and tokens for any other."""
    return image_inputs(model) if model.main_input_name == "pixel_values" else token_inputs(model)
