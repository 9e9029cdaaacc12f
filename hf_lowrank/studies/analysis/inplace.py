"""Other weights in a model for a while, and then its own again, bit by bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from hf_lowrank.nn.layers_lowrank import as_stored


@contextmanager
def replaced_weights(targets: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give layers other weights [out, in], as `dense_weight` gives them, by name, for the length of the block.

    The parameters stay the same objects. Their own values are set aside, not copied, and put back however the block
    ends, so that nothing is rounded. Memory: the new weights.
    """
    parameters = {name: targets[name].get_parameter("weight") for name in weights}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, weight in weights.items():
            parameters[name].data = as_stored(targets[name], weight).to(own[name]).contiguous()
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
