"""Importance as a scaling of both sides of the weight: the best factors are a truncated SVD of the scaled weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowrank.solvers.factors import Factors

# Importance below this share of its mean counts as this share: a zero would forbid undoing the scaling.
FLOOR = 1e-8


class Scaling:
    """An invertible matrix S, by which one side of a weight is multiplied. This one is the identity."""

    def apply(self, matrix: Tensor) -> Tensor:
        """S @ matrix."""
        return matrix

    def undo(self, matrix: Tensor) -> Tensor:
        """S⁻¹ @ matrix."""
        return matrix

    def power(self, size: int) -> Tensor:
        """‖S‖²_F for S [size, size], a scalar."""
        return torch.tensor(float(size), dtype=torch.float64)


class DiagonalScaling(Scaling):
    """S = diag(√importance), for an `importance` [n] of squared errors; zeros are raised to a floor.

    The square root is what makes the squared error of the scaled weight the weighted squared error of the weight.
    """

    def __init__(self, importance: Tensor) -> None:
        mean = importance.double().mean()
        floor = FLOOR * mean if mean > 0 else torch.ones_like(mean)  # all zero: nothing is more important than the rest
        self.root = importance.double().clamp_min(floor).sqrt()[:, None]

    def apply(self, matrix: Tensor) -> Tensor:
        return self.root * matrix

    def undo(self, matrix: Tensor) -> Tensor:
        return matrix / self.root

    def power(self, size: int) -> Tensor:
        return self.root.square().sum()


class WhiteningScaling(Scaling):
    """S with SᵀS = M + damping · mean(diag M) · I, for a second moment M [n, n]: the transposed Cholesky factor.

    The damping is relative to the scale of M, so that any moment, rank-deficient ones included, can be whitened.
    """

    def __init__(self, moment: Tensor, damping: float) -> None:
        moment = moment.to(torch.float64, copy=True)  # of which Cholesky's method reads the lower triangle
        mean = moment.diagonal().mean()
        mean = torch.where(mean > 0, mean, 1.0)  # all zero: nothing is more important than the rest
        moment.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(moment)
        while failed:  # rounding made it indefinite
            damping = max(10 * damping, 1e-10)
            moment.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(moment)
        self.upper = lower.T

    def apply(self, matrix: Tensor) -> Tensor:
        return self.upper @ matrix

    def undo(self, matrix: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.upper, matrix.to(self.upper.dtype), upper=True)

    def power(self, size: int) -> Tensor:
        return self.upper.square().sum()


def whitening(moment: Tensor, damping: float) -> Scaling:
    """The whitening of a second moment [n, n], or of a diagonal one [n], such as that of one-hot inputs."""
    if moment.ndim == 2:
        return WhiteningScaling(moment, damping)
    return DiagonalScaling(moment + damping * moment.mean())


@dataclass(frozen=True)
class Scaled:
    """error(Δ) = ‖L Δ Rᵀ‖²_F, with L scaling the outputs and R the inputs.

    By Eckart and Young (1936) the least error at a rank is the sum of the squared singular values of L W Rᵀ from that
    rank on, and is attained by undoing the scalings of its truncated SVD.
    """

    left: Scaling
    right: Scaling

    def error(self, delta: Tensor) -> Tensor:
        """‖L Δ Rᵀ‖²_F of a `delta` [out, in], a scalar."""
        return self._scale(delta).square().sum()

    def mass(self, shape: tuple[int, int]) -> Tensor:
        """‖L‖²_F ‖R‖²_F for weights of `shape` (out, in), a scalar."""
        left, right = self.left.power(shape[0]), self.right.power(shape[1])
        return left * right.to(left.device)

    def spectrum(self, weight: Tensor) -> Tensor:
        """The squared singular values of L W Rᵀ [min(out, in)], largest first."""
        scaled = self._scale(weight)
        shorter = scaled if scaled.shape[0] <= scaled.shape[1] else scaled.T
        return torch.linalg.eigvalsh(_lower_gram(shorter), UPLO="L").flip(0).clamp_min(0)

    def factorize(self, weight: Tensor, rank: int) -> Factors:
        """The best factors of `weight` [out, in] at `rank`, computed in float64."""
        up, down = truncated_svd(self._scale(weight), rank)
        return Factors(self.left.undo(up), self.right.undo(down.T).T)

    def _scale(self, matrix: Tensor) -> Tensor:
        return self.right.apply(self.left.apply(matrix.double()).T).T


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `matrix` [m, n] at `rank` as (orthogonal [m, rank], rest [rank, n]) or its mirror.

    The leading singular vectors of the shorter side are eigenvectors of its Gram matrix, and projecting onto them gives
    the other factor: several times less work than a full SVD, and in float64 as exact as float32 data deserves.
    """
    if matrix.shape[0] > matrix.shape[1]:
        up, down = truncated_svd(matrix.T, rank)
        return down.T, up.T
    matrix = matrix.double()
    _, vectors = torch.linalg.eigh(_lower_gram(matrix), UPLO="L")  # ascending
    leading = vectors[:, -rank:].flip(1)
    return leading, leading.T @ matrix


def _lower_gram(matrix: Tensor, blocks: int = 8) -> Tensor:
    """The lower triangle of matrix @ matrix.T [m, m], all that a symmetric solver reads: nearly half the products."""
    rows = len(matrix)
    size = -(-rows // blocks)
    gram = matrix.new_zeros(rows, rows)
    for start in range(0, rows, size):
        end = min(start + size, rows)
        gram[start:end, :end] = matrix[start:end] @ matrix[:end].T
    return gram
