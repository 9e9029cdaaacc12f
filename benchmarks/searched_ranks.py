"""A model and what its layers lose by each rank, measured as KL to dense with that layer alone factorized → a profile.

So ranks are searched for by what is lost in truth (as by LEMS, by calibration on KL), not by what a method expects.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Lines
from hf_lowrank import CompressionConfig
from hf_lowrank.allocation import Profile
from hf_lowrank.compression.compress import layer_solver
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.editing_lowrank import replaced
from hf_lowrank.statistics import Statistics

RATIOS = (0.05, 0.12, 0.25, 0.5)  # of min(in, out)


def profile(model: Any, config: CompressionConfig, statistics: Statistics, ids: Tensor, lines: Lines) -> Profile:
    """KL to dense over the windows `ids` [windows, tokens], by name and rank; measured ones are read from `lines`."""
    model = deepcopy(model)
    targets = find_targets(model)
    solver = layer_solver(targets, config, statistics)
    dense = _log_probabilities(model, ids)
    for name, target in targets.items():
        if lines.has(layer=name):
            continue
        ranks = sorted({max(1, round(ratio * min(target.shape))) for ratio in RATIOS})
        found = solver.weigh(name, ranks[-1])[1]
        lost = {}
        for rank in ranks:
            with replaced(model, {name: solver.low_rank(name, rank, found)[0]}):
                said = _log_probabilities(model, ids)
            lost[rank] = float((dense.exp() * (dense - said)).sum(dim=-1).double().mean())
        lines.add(layer=name, lost=lost)
    return {row["layer"]: {int(rank): nats for rank, nats in row["lost"].items()} for row in lines.rows()}


@torch.inference_mode()
def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits[:, :-1].float().log_softmax(dim=-1)
