"""A kind of layer of one's own: a subclass of nn.Linear that computes what nn.Linear does.

A subclass may use its weight in its own way, so that none is factorized unless it is named here.
"""

from torch import nn

from hf_lowrank.model import targets


def allow(linear_class: type[nn.Linear]) -> None:
    """Take layers of this class for linear layers from now on."""
    targets.PLAIN_SUBCLASSES = (*targets.PLAIN_SUBCLASSES, linear_class.__name__)
