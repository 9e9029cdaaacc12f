"""Two factors → the same product in as few parameters as its rank allows: an interpolative decomposition."""

import torch
from torch import Tensor

from hf_lowrank.solvers.factors import Factors

# Coefficients above this are brought down by exchanging columns; in exact arithmetic 1 can be reached.
LARGEST_COEFFICIENT = 1.1


def interpolative(factors: Factors) -> Factors:
    """The same product [out, in] from factors of which `down` [r, in] has the identity in r of its columns.

    `up` then holds r columns of the product, and r² entries of `down` are known: r(in + out - r) parameters remain,
    which is the dimension of the matrices of rank r. The columns are those of (locally) maximal volume, so that no
    other entry of `down` exceeds `LARGEST_COEFFICIENT` and nothing is magnified: Goreinov, Oseledets, Savostyanov,
    Tyrtyshnikov & Zamarashkin (2010), "How to find a good submatrix". Computed in float64.
    """
    up, down = factors.up.double(), factors.down.double()
    basis = torch.linalg.qr(down.T).Q  # [in, r]: of the inputs that are read, whatever their scale
    kept = columns_of_maximal_volume(basis)
    coefficients = torch.linalg.solve(basis[kept].T, basis.T)
    coefficients[:, kept] = torch.eye(len(kept), dtype=down.dtype, device=down.device)
    return Factors(up @ down[:, kept], coefficients, factors.trace)


def columns_of_maximal_volume(basis: Tensor, max_exchanges: int = 1000) -> Tensor:
    """Indices [r] of the rows of a `basis` [n, r] by which all others are expressed with small coefficients."""
    rank = basis.shape[1]
    permutation, lower, _ = torch.linalg.lu(basis)
    order = permutation.argmax(dim=0)  # partial pivoting is a good start
    coefficients = torch.linalg.solve_triangular(
        lower[:rank], lower, upper=False, unitriangular=True, left=False
    )  # of the rows in `order`
    for _ in range(max_exchanges):
        row, column = divmod(int(coefficients.abs().argmax()), rank)
        pivot = coefficients[row, column]
        if pivot.abs() <= LARGEST_COEFFICIENT:
            break
        change = coefficients[row].clone()
        change[column] -= 1
        order[[row, column]] = order[[column, row]]
        coefficients -= coefficients[:, column : column + 1] * (change / pivot)
        coefficients[[row, column]] = coefficients[[column, row]]
    return order[:rank]
