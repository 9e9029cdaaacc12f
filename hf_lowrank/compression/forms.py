"""A low-rank model → the same model with its linears in another form: plain factors, or the fewest parameters.

A matrix of rank r has r(in + out - r) degrees of freedom, and two plain factors have r(in + out) parameters. The
interpolative form makes r² of them a known identity. Any factors can be brought to it, after fine-tuning too, and back.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.settings import check_choice
from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.nn.layers_lowrank import FORMS, LowRankLinear
from hf_lowrank.nn.modeling_lowrank import LowRankMixin
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.gauge import flat
from hf_lowrank.solvers.interpolative import interpolative
from hf_lowrank.solvers.scaled import Scaled, Scaling

# Any two factors → those of the same product that a form holds.
_CONVERSIONS: dict[str, Callable[[Factors], Factors]] = {
    "factors": partial(flat, sides=Scaled(Scaling(), Scaling())),
    "interpolative": interpolative,
}


def to_form(model: PreTrainedModel, form: str) -> PreTrainedModel:
    """Bring every factorized linear of `model`, in place, to a form of `FORMS`, and return it.

    The weights are the same to rounding: conversions are computed in float64 and stored in the factors' dtype.

    Raises:
        LowRankError: an unknown form, or a model that is not low-rank.
    """
    check_choice("form", form, FORMS)
    if not isinstance(model, LowRankMixin):
        raise LowRankError(f"{type(model).__name__} is not a low-rank model: compress it first")
    for name in model.lowrank_ranks:
        layer = model.get_submodule(name)
        if isinstance(layer, LowRankLinear) and layer.form != form:
            replace_module(model, name, converted(layer, form))
    return model


@torch.no_grad()
def converted(layer: LowRankLinear, form: str) -> LowRankLinear:
    """A layer of another form with the weight, bias, device and dtype of `layer`."""
    factors = _CONVERSIONS[form](Factors(layer.up.weight.double(), layer.down.weight.double()))
    return FORMS[form].from_factors(layer, factors.up, factors.down)
