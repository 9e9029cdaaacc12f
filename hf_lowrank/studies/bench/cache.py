"""A compressed decoder → the bytes of its cache of keys and values for a token, and what ranks could save of them."""

from torch import nn

from hf_lowrank.nn.layers_lowrank import LowRankLinear
from hf_lowrank.studies.bench.record import DENSE, LOW

KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value")  # as transformers calls them where they are layers of their own


def cache_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of one token in all blocks: of its keys and values, and of the inner channels of those that have factors.

    Keys and values follow from inner channels by `up` (and the rotation by the position), at the cost of that product
    for every token at every step. Empty where keys and values are no layers of their own.
    """
    dense = low = 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in KEYS_AND_VALUES and isinstance(module, (nn.Linear, LowRankLinear)):
            width = module.out_features
            size = next(module.parameters()).element_size()
            dense += size * width
            low += size * (min(width, module.rank) if isinstance(module, LowRankLinear) else width)
    return {DENSE: dense, LOW: low} if dense else {}
