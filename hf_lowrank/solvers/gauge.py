"""Factors and what counts on both sides → the same product in another basis of its r inner channels: the gauge.

U D = (U R)(R⁻¹ D) for every invertible R [r, r]: the choice changes nothing in exact arithmetic, and decides what is
lost when inner activations and weights are rounded. Rounding adds noise of variance range² / 12 in proportion to the
range that shares a scale. Where every channel carries the same, ranges follow traces, and what rounding is expected to
cost depends on H = R Rᵀ alone:

    activations   tr(H⁻¹ Σ) tr(H M)      Σ = D A Dᵀ, the moment of the inner activations; M = Uᵀ G U, what they count
    rows of down  tr(H⁻¹ N) tr(H M)      N = D Dᵀ tr(A) / in
    rows of up    tr(H⁻¹ Σ) tr(H P)      P = Uᵀ diag(G) U

for scales per tensor, token, channel or group alike. The sum is convex along the geodesics of positive matrices, so
that its least value is where it is stationary: there H is the geometric mean of two sums of these moments. For
activations alone it is M⁻¹ # Σ, in whose basis Σ = M, at a cost of (tr (Σ M)^½)². What remains free is a rotation, and
serves to make every channel carry the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_lowrank.solvers.decomposition import FLOOR, Decomposition
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.scaled import Scaled

# Half a range in standard deviations: of a batch's inner activations, with its outliers, and of a row of weights.
ACTIVATION_PEAK, WEIGHT_PEAK = 6.0, 3.5

# Share of the mean diagonal that is added to moments: channels that carry nothing can then be inverted.
RIDGE = 1e-7

# The metric is found when the shares of the moments in it change by less than this one of themselves: the cost is off
# by the square of that. The iteration contracts, two or three turns are enough.
TOLERANCE, MAX_ITERATIONS = 1e-3, 30


@dataclass(frozen=True)
class Channels:
    """Second moments [r, r] of the inner channels, by what they are multiplied with when something is rounded.

    Args:
        inputs: Σ = D A Dᵀ, of what flows through them.
        outputs: M = Uᵀ G U, what a change of them counts.
        down: N = D Dᵀ tr(A) / in, what a relative change of the rows of `down` adds to them.
        up: P = Uᵀ diag(G) U, what counts of a change in proportion to the rows of `up`.
    """

    inputs: Tensor
    outputs: Tensor
    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, factors: Factors, sides: Scaled) -> "Channels":
        """Those of factors [out, r] and [r, in] under an error ‖L Δ Rᵀ‖², with G = LᵀL and A = RᵀR."""
        up, down = factors.up.double(), factors.down.double()
        in_features = down.shape[1]
        mean_input = sides.right.power(in_features).to(down.device) / in_features
        return cls(
            with_ridge(down @ sides.right.square(down.T)),
            with_ridge(up.T @ sides.left.square(up)),
            with_ridge(mean_input * down @ down.T),
            with_ridge(up.T @ (sides.left.diagonal(len(up)).to(up.device)[:, None] * up)),
        )

    @classmethod
    def ordered(cls, factors: Factors, decomposition: Decomposition, mean: Tensor | None) -> "Channels":
        """Those of the factors that a decomposition gives, in float64; inputs have a `mean` [in] besides, or None.

        Nothing needs to be multiplied by a moment for them.
        """
        up, down = factors.up, factors.down
        energies = decomposition.energies(len(down))
        inputs, power = energies.diag(), decomposition.inputs.sum()
        if mean is not None:
            along = down @ mean.to(down)
            inputs, power = inputs + along.outer(along), power + mean.to(down).square().sum()
        return cls(
            with_ridge(inputs),
            with_ridge(energies.diag()),
            with_ridge(power / down.shape[1] * down @ down.T),
            with_ridge(up.T @ (decomposition.outputs[:, None] * up)),
        )

    def in_basis(self, basis: Tensor) -> "Channels":
        """Those of the factors U R and R⁻¹ D, for R = `basis` [r, r]."""
        by_inputs = (
            torch.linalg.solve(basis, torch.linalg.solve(basis, moment).T) for moment in (self.inputs, self.down)
        )
        by_outputs = (basis.T @ moment @ basis for moment in (self.outputs, self.up))
        (inputs, down), (outputs, up) = by_inputs, by_outputs
        return Channels(inputs, outputs, down, up)

    def cost(self) -> float:
        """What rounding is expected to cost, up to a factor, if every channel carries the same."""
        inputs, outputs, down, up = (float(m.trace()) for m in (self.inputs, self.outputs, self.down, self.up))
        activations, weights = _shares()
        return activations * inputs * outputs + weights * (down * outputs + inputs * up)


def balanced(factors: Factors, sides: Scaled) -> Factors:
    """Factors of equal singular values, √σ each, in falling order (see `Factors.balanced`)."""
    return factors.balanced()


def flat(factors: Factors, sides: Scaled, seed: int = 0) -> Factors:
    """The factors of least expected loss under rounding, at equal norms; every inner channel has the same variance.

    The rotation is random, by `seed` and the rank alone, so that no weight stands out either, and then brought to equal
    variances. Where `sides` is a plain ‖Δ‖², these are balanced factors, rotated. Computed in float64.
    """
    start = Factors(factors.up.double(), factors.down.double(), factors.trace).balanced()
    return in_basis(start, flat_basis(Channels.of(start, sides), seed))[0]


def flat_basis(channels: Channels, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The basis R [r, r] of `flat` factors, and R⁻¹, for channels in any other."""
    root, inverse = _least_root(channels)
    turn = rotation(inverse @ channels.inputs @ inverse.T, seed)
    return root @ turn, turn.T @ inverse


def balanced_basis(factors: Factors) -> tuple[Tensor, Tensor]:
    """The basis R [r, r] of balanced factors, and R⁻¹, for others of full rank."""
    r_up, r_down = (torch.linalg.qr(side, mode="r").R for side in (factors.up, factors.down.T))
    u, s, _ = torch.linalg.svd(r_up @ r_down.T)
    root = torch.where(s[0] > 0, s.clamp_min(FLOOR**0.5 * s[0]), 1.0).sqrt()
    return torch.linalg.solve_triangular(r_up, u * root, upper=True), (u / root).T @ r_up


def in_basis(factors: Factors, basis: tuple[Tensor, Tensor]) -> tuple[Factors, tuple[Tensor, Tensor]]:
    """U R and R⁻¹ D for a basis R and its inverse, both scaled so that the factors have equal norms."""
    up, down = factors.up @ basis[0], basis[1] @ factors.down
    scale = (up.norm() / down.norm()).sqrt() if down.any() else torch.ones_like(up.norm())
    return Factors(up / scale, down * scale, factors.trace), (basis[0] / scale, basis[1] * scale)


GAUGES: dict[str, Callable[[Factors, Scaled], Factors]] = {"flat": flat, "balanced": balanced}


def least_rounding(channels: Channels) -> Tensor:
    """The metric H = R Rᵀ [r, r] of least `Channels.cost`, found as the fixed point of a geometric mean."""
    root, _ = _least_root(channels)
    return root @ root.T


def _least_root(channels: Channels) -> tuple[Tensor, Tensor]:
    """A root R of the metric of least cost, and R⁻¹. What changes from turn to turn are two shares of moments."""
    activations, weights = _shares()
    inputs, outputs, down, up = (float(m.trace()) for m in vars(channels).values())
    shares = (0.0, 0.0)
    for _ in range(MAX_ITERATIONS):
        before, shares = (
            shares,
            (
                weights * inputs / (activations * inputs + weights * down),
                weights * outputs / (activations * outputs + weights * up),
            ),
        )
        if all(abs(new - old) <= TOLERANCE * new for new, old in zip(shares, before, strict=True)):
            break
        root, inverse = mean_root(
            channels.outputs + shares[0] * channels.up, channels.inputs + shares[1] * channels.down
        )
        inputs, down = (_inner(inverse @ moment, inverse) for moment in (channels.inputs, channels.down))
        outputs, up = (_inner(moment @ root, root) for moment in (channels.outputs, channels.up))
    return root, inverse


def mean_metric(rises: Tensor, falls: Tensor) -> Tensor:
    """The H [r, r] of least tr(H · rises) + tr(H⁻¹ · falls): H · rises · H = falls, the mean of rises⁻¹ and falls."""
    root, _ = mean_root(rises, falls)
    return root @ root.T


def mean_root(rises: Tensor, falls: Tensor) -> tuple[Tensor, Tensor]:
    """A root R [r, r] of `mean_metric`, R Rᵀ = H, and R⁻¹."""
    lower = torch.linalg.cholesky(rises)
    values, vectors = _eigh(lower.T @ falls @ lower)
    fourth = values.sqrt().sqrt()
    return torch.linalg.solve_triangular(lower.T, vectors * fourth, upper=True), (vectors / fourth).T @ lower.T


def rotation(moment: Tensor, seed: int = 0) -> Tensor:
    """An orthogonal Q [r, r], random by `seed`, for which the diagonal of Qᵀ · moment · Q is constant."""
    turned = random_rotation(len(moment), seed).to(moment)
    return turned @ equalizing(turned.T @ moment @ turned)


def random_rotation(size: int, seed: int = 0) -> Tensor:
    """An orthogonal [size, size] of uniform distribution, the same in every process; no global generator is touched."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def equalizing(moment: Tensor) -> Tensor:
    """An orthogonal Q [r, r] that makes the diagonal of Qᵀ · moment · Q constant, by r - 1 plane rotations at most.

    Each brings one channel to the mean: Bendel & Mickey (1978), "Population correlation matrices for sampling
    experiments". Computed on the CPU.
    """
    values = moment.detach().cpu().numpy().copy()
    turned = np.eye(len(values))
    mean = values.diagonal().mean()
    for _ in range(len(values) - 1):
        high, low = values.diagonal().argmax(), values.diagonal().argmin()
        if values[high, high] - values[low, low] <= 1e-9 * mean:
            break
        plane = _to_mean(values[high, high], values[low, low], values[high, low], mean)
        pair = [high, low]
        values[:, pair] = values[:, pair] @ plane
        values[pair] = plane.T @ values[pair]
        turned[:, pair] = turned[:, pair] @ plane
    return torch.from_numpy(turned).to(moment.device)


def _to_mean(high: float, low: float, across: float, mean: float) -> np.ndarray:
    """The rotation of the plane of two channels after which the first one's variance is the mean."""
    root = max(across**2 - (high - mean) * (low - mean), 0.0) ** 0.5
    tangent = (across + root) / (low - mean)
    cosine = (1 + tangent**2) ** -0.5
    return np.array([[cosine, tangent * cosine], [-tangent * cosine, cosine]])


def power(moment: Tensor, exponent: float) -> Tensor:
    """A symmetric positive matrix [n, n] to a power, itself symmetric and positive."""
    values, vectors = _eigh(moment)
    return (vectors * values**exponent) @ vectors.T


def _eigh(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, all positive, and eigenvectors of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(_symmetric(moment))
    return values.clamp_min(torch.finfo(values.dtype).eps * values[-1]), vectors  # what is below is rounding


def _shares() -> tuple[float, float]:
    """What rounding to 8 bits costs per squared standard deviation: of activations, and of weights."""
    return (2 * ACTIVATION_PEAK / 255) ** 2, (2 * WEIGHT_PEAK / 254) ** 2


def with_ridge(moment: Tensor) -> Tensor:
    """A second moment [n, n] that can be inverted: with a share of its mean diagonal, or 1, added to its diagonal."""
    mean = moment.diagonal().mean()
    ridge = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean))
    return _symmetric(moment) + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _inner(a: Tensor, b: Tensor) -> float:
    """tr(a b) of symmetric matrices."""
    return float((a * b).sum())
