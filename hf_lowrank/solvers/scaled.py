"""Importance as a scaling of both sides of the weight: the best factors are a truncated SVD of the scaled weight."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.solvers.decomposition import Decomposition
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.single import TOLERANCE, WIDE, distance, excess

# Importance below this share of its mean counts as this share: a zero would forbid undoing the scaling.
FLOOR = 1e-8

# What keeps an anchored weight near to the dense one, as a share of the mean second moment of an input.
RIDGE = 2e-2

# Products with a triangular or a symmetric matrix are taken in this many blocks of rows: nearly half the work.
BLOCKS = 8


class Scaling:
    """An invertible matrix S, by which one side of a weight is multiplied. This one is the identity.

    `apply`, `square` and `regress` compute in the dtype of the matrix that they are given.
    """

    def apply(self, matrix: Tensor) -> Tensor:
        """S @ matrix."""
        return matrix

    def undo(self, matrix: Tensor) -> Tensor:
        """S⁻¹ @ matrix."""
        return matrix

    def adjoint(self, matrix: Tensor) -> Tensor:
        """Sᵀ @ matrix."""
        return matrix

    def square(self, matrix: Tensor) -> Tensor:
        """Sᵀ S @ matrix."""
        return matrix

    def regress(self, matrix: Tensor, ridge: float) -> Tensor:
        """(Sᵀ S + ridge · mean(diag Sᵀ S) · I)⁻¹ @ matrix."""
        return matrix / (1 + ridge)

    def power(self, size: int) -> Tensor:
        """‖S‖²_F for S [size, size], a scalar."""
        return torch.tensor(float(size), dtype=torch.float64)

    def gram(self, size: int) -> Tensor:
        """Sᵀ S for S [size, size], or its diagonal [size] where that is all there is."""
        return torch.ones(size, dtype=torch.float64)

    def diagonal(self, size: int) -> Tensor:
        """That of Sᵀ S [size], for S [size, size]."""
        gram = self.gram(size)
        return gram if gram.ndim == 1 else gram.diagonal()


class DiagonalScaling(Scaling):
    """S = diag(√importance), for an `importance` [n] of squared errors; zeros are raised to a floor.

    The square root is what makes the squared error of the scaled weight the weighted squared error of the weight.
    """

    def __init__(self, importance: Tensor) -> None:
        mean = importance.double().mean()
        floor = FLOOR * mean if mean > 0 else torch.ones_like(mean)  # all zero: nothing is more important than the rest
        self.root = importance.double().clamp_min(floor).sqrt()[:, None]

    def apply(self, matrix: Tensor) -> Tensor:
        return self.root.to(matrix.dtype) * matrix

    def undo(self, matrix: Tensor) -> Tensor:
        return matrix / self.root

    def adjoint(self, matrix: Tensor) -> Tensor:
        return self.root * matrix

    def square(self, matrix: Tensor) -> Tensor:
        return self.root.square().to(matrix.dtype) * matrix

    def regress(self, matrix: Tensor, ridge: float) -> Tensor:
        importance = self.root.square()
        return matrix / (importance + ridge * importance.mean()).to(matrix.dtype)

    def power(self, size: int) -> Tensor:
        return self.root.square().sum()

    def gram(self, size: int) -> Tensor:
        return self.root[:, 0].square()


def _cholesky(moment: Tensor, damping: float, mean: Tensor) -> Tensor:
    """The lower Cholesky factor of a moment [n, n], which is damped further while rounding leaves it indefinite."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    while failed:
        damping = max(10 * damping, 1e-10)
        moment.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(moment)
    return lower


class WhiteningScaling(Scaling):
    """S with SᵀS = M + damping · mean(diag M) · I, for a second moment M [n, n]: the transposed Cholesky factor.

    The damping is relative to the scale of M, so that any moment, rank-deficient ones included, can be whitened.

    Raises:
        LowRankError: M is not finite.
    """

    def __init__(self, moment: Tensor, damping: float) -> None:
        moment = moment.to(torch.float64, copy=True)
        if not torch.isfinite(moment.sum()):
            raise LowRankError("a moment of the statistics is not finite: measure them again, in float32")
        mean = moment.diagonal().mean()
        self.mean = torch.where(mean > 0, mean, 1.0)  # all zero: nothing is more important than the rest
        self.moment, self.damping = moment, damping
        moment.diagonal().add_(damping * self.mean)

    @cached_property
    def upper(self) -> Tensor:
        """S, found when it is first needed: the longer side of a weight never needs it."""
        return _cholesky(self.moment, self.damping, self.mean).T

    def apply(self, matrix: Tensor) -> Tensor:
        blocks, upper = _row_blocks(len(matrix)), self.upper.to(matrix.dtype)  # left of the diagonal are zeros
        return torch.cat([upper[start:end, start:] @ matrix[start:] for start, end in blocks])

    def undo(self, matrix: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.upper, matrix.to(self.upper.dtype), upper=True)

    def adjoint(self, matrix: Tensor) -> Tensor:
        blocks = _row_blocks(len(matrix))  # right of the diagonal are zeros
        return torch.cat([self.upper[:end, start:end].T @ matrix[:end] for start, end in blocks])

    def square(self, matrix: Tensor) -> Tensor:
        return self.moment.to(matrix.dtype) @ matrix

    def regress(self, matrix: Tensor, ridge: float) -> Tensor:
        moment = self.moment.to(matrix.dtype, copy=True)
        moment.diagonal().add_(ridge * self.mean)
        return torch.cholesky_solve(matrix, _cholesky(moment, ridge, self.mean))

    def power(self, size: int) -> Tensor:
        return self.moment.diagonal().sum()

    def gram(self, size: int) -> Tensor:
        return self.moment


class RotatedScaling(Scaling):
    """S = T Qᵀ for another scaling T and an orthogonal Q [n, n]."""

    def __init__(self, scaling: Scaling, rotation: Tensor) -> None:
        self.scaling, self.rotation = scaling, rotation.double()

    def apply(self, matrix: Tensor) -> Tensor:
        return self.scaling.apply(self.rotation.T.to(matrix.dtype) @ matrix)

    def undo(self, matrix: Tensor) -> Tensor:
        return self.rotation @ self.scaling.undo(matrix)

    def adjoint(self, matrix: Tensor) -> Tensor:
        return self.rotation @ self.scaling.adjoint(matrix)

    def square(self, matrix: Tensor) -> Tensor:
        rotation = self.rotation.to(matrix.dtype)
        return rotation @ self.scaling.square(rotation.T @ matrix)

    def power(self, size: int) -> Tensor:
        return self.scaling.power(size)

    def gram(self, size: int) -> Tensor:
        return self.square(torch.eye(size, dtype=torch.float64, device=self.rotation.device))


def whitening(moment: Tensor, damping: float) -> Scaling:
    """The whitening of a second moment [n, n], or of a diagonal one [n], such as that of one-hot inputs."""
    if moment.ndim == 2:
        return WhiteningScaling(moment, damping)
    return DiagonalScaling(moment + damping * moment.mean())


@dataclass(frozen=True)
class Scaled:
    """error(Δ) = ‖L Δ Rᵀ‖²_F, with L scaling the outputs and R the inputs.

    By Eckart and Young (1936) the least error at a rank is the sum of the squared singular values of L W Rᵀ from that
    rank on, and is attained by undoing the scalings of its truncated SVD. Its singular vectors on the shorter side are
    those of a Gram matrix, into which the scaling of the longer side enters only as the moment that it is the root of.
    """

    left: Scaling
    right: Scaling

    def error(self, delta: Tensor) -> Tensor:
        """‖L Δ Rᵀ‖²_F of a `delta` [out, in], a scalar."""
        half, whole = self._scaled(delta.double())[1:]
        return (half * whole).sum()

    def mass(self, shape: tuple[int, int]) -> Tensor:
        """‖L‖²_F ‖R‖²_F for weights of `shape` (out, in), a scalar."""
        left, right = self.left.power(shape[0]), self.right.power(shape[1])
        return left * right.to(left.device)

    def spectrum(self, weight: Tensor) -> Tensor:
        """The squared singular values of L W Rᵀ [min(out, in)], largest first."""
        rows, columns = weight.shape
        return self._worth(weight, rows * columns // (rows + columns), vectors=False)[0]

    def factorize(self, weight: Tensor, rank: int) -> Factors:
        """The best factors of `weight` [out, in] at `rank`, computed in float64."""
        shorter, half, whole = self._scaled(weight.double())
        leading = _leading(lower_product(whole, half), rank)
        left, right = shorter.undo(leading), leading.T @ half
        return Factors(left, right) if weight.shape[0] <= weight.shape[1] else Factors(right.T, left.T)

    def decompose(self, weight: Tensor, most: int) -> Decomposition:
        """The worth of all directions of `weight` [out, in], and the first `most` of them."""
        worth, vectors = self._worth(weight, most)
        shorter, leading = self._sides(weight.shape)[0], vectors[:, -most:].flip(1).double()
        outputs, inputs = self.left.diagonal(weight.shape[0]), self.right.diagonal(weight.shape[1])
        span, dual = shorter.undo(leading).float(), shorter.adjoint(leading).float()
        return Decomposition(worth, span, dual, outputs.to(worth), inputs.to(worth))

    def two_sided(self) -> "Scaled":
        """These scalings: what every objective can be asked for."""
        return self

    def anchored(self, weight: Tensor, drift: Tensor) -> Tensor:
        """The weight [out, in] that makes of other inputs x′ what `weight` makes of x, as nearly as inputs allow.

        Of x′ the right scaling is the whitening, SᵀS = A′ = E x′ x′ᵀ, damped, and `drift` [in, in] is E (x − x′) x′ᵀ:
        the least of E‖W x − V x′‖² + λ‖W − V‖², with any scaling of outputs, is at V = W + W drift (A′ + λ I)⁻¹: a
        ridge regression on all inputs, with λ as `RIDGE` says. From there on the error of U D is that of the change
        V − U D, and what cannot be undone. Wide layers in float32, which λ keeps well-conditioned.
        """
        dtype = torch.float32 if min(weight.shape) >= WIDE else torch.float64
        change = self.right.regress((weight.to(dtype) @ drift.to(weight.device, dtype)).T, RIDGE).T
        return weight.double() + change

    def _worth(self, weight: Tensor, most: int, vectors: bool = True) -> tuple[Tensor, Tensor]:
        """The eigenvalues [m] of the Gram matrix of the scaled weight, largest first, and its vectors, largest last.

        From a width of `WIDE` on in float32, where that decides as well about the first `most` (see `excess`).
        """
        if min(weight.shape) >= WIDE:
            with suppress(torch.linalg.LinAlgError):  # of what is beyond the range of float32
                worth, basis, gram = self._eigen(weight.float(), vectors)
                found = partial(_product, worth.flip(0), basis) if vectors else _symmetric(gram).matmul
                error = distance(found, partial(self._gram_times, weight.double()), gram)
                if excess(worth, most, error) <= TOLERANCE:
                    return worth, basis
        return self._eigen(weight.double(), vectors)[:2]

    def _eigen(self, weight: Tensor, vectors: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As `_worth`, in the dtype of the weight, and the lower triangle of the Gram matrix [m, m]."""
        _, half, whole = self._scaled(weight)
        gram = lower_product(whole, half)
        del half, whole
        values, basis = torch.linalg.eigh(gram, UPLO="L") if vectors else (torch.linalg.eigvalsh(gram, UPLO="L"), gram)
        return values.flip(0).clamp_min(0).double(), basis, gram

    def _gram_times(self, weight: Tensor, vectors: Tensor) -> Tensor:
        """The Gram matrix of the scaled weight [out, in] @ vectors [m, n], without it."""
        shorter, longer = self._sides(weight.shape)
        matrix = _turned(weight)
        return shorter.apply(matrix @ longer.square(matrix.T @ shorter.adjoint(vectors)))

    def _sides(self, shape: Sequence[int]) -> tuple[Scaling, Scaling]:
        """The scalings of the shorter and of the longer side of a weight of `shape` (out, in)."""
        return (self.right, self.left) if shape[0] > shape[1] else (self.left, self.right)

    def _scaled(self, matrix: Tensor) -> tuple[Scaling, Tensor, Tensor]:
        """The shorter side's scaling S, S M and S M Tᵀ T [shorter, longer], for a matrix M turned that way."""
        shorter, longer = self._sides(matrix.shape)
        half = shorter.apply(_turned(matrix))
        return shorter, half, longer.square(half.T).T


def _turned(matrix: Tensor) -> Tensor:
    """Its transpose, if it is higher than wide."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _product(values: Tensor, basis: Tensor, vectors: Tensor) -> Tensor:
    """A symmetric matrix [m, m] by its eigenvalues and eigenvectors @ vectors [m, n]."""
    basis = basis.double()
    return basis @ (values[:, None] * (basis.T @ vectors))


def _symmetric(lower: Tensor) -> Tensor:
    """In float64, a symmetric matrix [m, m] of which the lower triangle is known."""
    lower = lower.double()
    return lower.tril() + lower.tril(-1).T


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `matrix` [m, n] at `rank` as (orthogonal [m, rank], rest [rank, n]) or its mirror.

    The leading singular vectors of the shorter side are eigenvectors of its Gram matrix, and projecting onto them gives
    the other factor: several times less work than a full SVD, and in float64 as exact as float32 data deserves.
    """
    if matrix.shape[0] > matrix.shape[1]:
        up, down = truncated_svd(matrix.T, rank)
        return down.T, up.T
    matrix = matrix.double()
    leading = _leading(lower_product(matrix, matrix), rank)
    return leading, leading.T @ matrix


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors [m, rank] of the largest eigenvalues, of a symmetric matrix [m, m] by its lower triangle."""
    _, vectors = torch.linalg.eigh(gram, UPLO="L")  # ascending
    return vectors[:, -rank:].flip(1)


def lower_product(a: Tensor, b: Tensor) -> Tensor:
    """The lower triangle of a @ b.T [m, m] where that is symmetric: all that a symmetric solver reads."""
    product = a.new_zeros(len(a), len(b))
    for start, end in _row_blocks(len(a)):
        product[start:end, :end] = a[start:end] @ b[:end].T
    return product


def _row_blocks(rows: int) -> Iterator[tuple[int, int]]:
    """(start, end) of `BLOCKS` blocks of rows."""
    size = -(-rows // BLOCKS)
    return ((start, min(start + size, rows)) for start in range(0, rows, size))
