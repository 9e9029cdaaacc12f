"""Fisher information and weight of one matrix → numbers that should say beforehand what low rank will cost it.

TFWSVD (Hua et al., 2022) predicts with a variance of Fisher information over a matrix when SVD fails. Its exact form is
known here only in outline; `fisher_shape` is our reconstruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor


@dataclass(frozen=True)
class FisherShape:
    """How unevenly the Fisher information F [out, in] is spread over a matrix. Free of scale.

    `variation` is the coefficient of variation of its elements, their standard deviation over their mean. By the law of
    total variance variation² = between_rows² + within_rows², where a row is an input feature, as in the papers (a
    column of `nn.Linear.weight`): the first part is what FWSVD's one weight per row can follow, the second what only
    importance of single elements can. `rank1_share` is the share of ‖F‖² that the best rank-1 matrix has, which a
    two-sided diagonal scaling can follow.
    """

    variation: float
    between_rows: float
    within_rows: float
    rank1_share: float


def fisher_shape(fisher: Tensor) -> FisherShape:
    """Of the Fisher information [out, in] of one weight.

    >>> rows = torch.tensor([[1.0, 3.0], [1.0, 3.0]])  # varies between inputs only
    >>> shape = fisher_shape(rows)
    >>> shape.variation, shape.between_rows, shape.within_rows, round(shape.rank1_share, 6)
    (0.5, 0.5, 0.0, 1.0)
    """
    fisher = fisher.double()
    mean = fisher.mean()
    if mean == 0:
        return FisherShape(0.0, 0.0, 0.0, 1.0)
    between = fisher.mean(dim=0).var(correction=0)
    within = fisher.var(dim=0, correction=0).mean()
    squares = _squared_singular_values(fisher)
    return FisherShape(
        float((between + within).sqrt() / mean),
        float(between.sqrt() / mean),
        float(within.sqrt() / mean),
        float(squares.max() / squares.sum()),
    )


def effective_rank(squared_singular_values: Tensor) -> float:
    """exp of the entropy of the singular values' shares, between 1 and their number. Roy & Vetterli (2007).

    >>> round(effective_rank(torch.tensor([4.0, 4.0, 0.0])), 6)
    2.0
    """
    values = squared_singular_values.double().clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum().exp())


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ over matrices between what a predictor says and what was measured; None where one is constant."""

    predictor: str
    outcome: str
    rho: float | None
    p_value: float | None
    matrices: int


def correlate(predictor: str, predicted: Sequence[float], outcome: str, measured: Sequence[float]) -> Correlation:
    """The rank correlation of two lists, one entry for each matrix."""
    return Correlation(predictor, outcome, *spearman(predicted, measured), len(predicted))


def spearman(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None]:
    """(ρ, p); (None, None) for fewer than three pairs or a constant list."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None, None
    result = spearmanr(a, b)
    return float(result.statistic), float(result.pvalue)


def _squared_singular_values(matrix: Tensor) -> Tensor:
    shorter = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(shorter @ shorter.T).clamp_min(0)
