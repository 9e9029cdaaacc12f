"""The family of objectives: closed forms attain their optimum, errors mean what they say, bad statistics work."""

import math

import pytest
import torch

from hf_lowrank import METHODS, CompressionConfig, compress, compute_statistics
from hf_lowrank.model.targets import find_targets
from hf_lowrank.statistics import KINDS
from hf_lowrank.statistics.eigenbasis import eigenbasis
from hf_lowrank.statistics.kinds import active_tokens, completed
from hf_lowrank.statistics.names import passes
from tests.helpers import tiny_bert
from tests.statistics.test_statistics import padded_batch

OUT, IN, RANK = 20, 30, 6
CLOSED_FORMS = [name for name in METHODS if name not in ("tfwsvd", "ekfac")]


def samples(count: int = 40, tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x [count, tokens, IN] and gradients g [count, tokens, OUT], correlated and badly scaled."""
    torch.manual_seed(0)
    x = torch.randn(count, tokens, IN) @ torch.randn(IN, IN) * torch.logspace(-1, 1, IN)
    g = torch.randn(count, tokens, OUT) @ torch.randn(OUT, OUT) * torch.logspace(-4, -2, OUT)
    return x, g


def statistics_of(x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean of every kind over samples, as `compute_statistics` makes it."""
    means: dict[str, torch.Tensor] = {}
    for part in passes(list(KINDS)):
        for kind in part:
            context = KINDS[kind].context
            known = all(need in means for need in KINDS[kind].needs)
            prepared = context(*(means[need] for need in KINDS[kind].needs)) if context and known else None
            total = torch.zeros(KINDS[kind].shape(OUT, IN))
            KINDS[kind].add(total, x, active_tokens(g.abs().amax(dim=-1)) if KINDS[kind].of_input else g, prepared)
            means[kind] = completed(kind, total) / len(x)
    return means


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_attain_the_sum_of_the_discarded_spectrum(name: str) -> None:
    objective = METHODS[name].objective(statistics_of(*samples()))
    weight = torch.randn(OUT, IN)
    factors = objective.factorize(weight, RANK)
    error, spectrum = objective.error(weight - factors.product()), objective.spectrum(weight)
    torch.testing.assert_close(error, spectrum[RANK:].sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(objective.error(weight), spectrum.sum(), rtol=1e-6, atol=0)
    assert (spectrum[1:] <= spectrum[:-1]).all()


@pytest.mark.parametrize("name", METHODS)
def test_no_other_method_is_better_under_a_methods_own_objective(name: str) -> None:
    means = statistics_of(*samples())
    objective, weight = METHODS[name].objective(means), torch.randn(OUT, IN)
    own = objective.error(weight - objective.factorize(weight, RANK).product())
    for other in METHODS.values():
        assert own <= 1.001 * objective.error(weight - other.objective(means).factorize(weight, RANK).product())


def test_whitening_weighs_the_change_of_the_output() -> None:
    x, g = samples()
    delta = torch.randn(OUT, IN)
    centred = x - x.mean(dim=(0, 1))  # what the mean loses, the bias makes up for
    expected = (centred @ delta.T).square().sum(dim=-1).mean()
    assert float(METHODS["whiten"].objective(statistics_of(x, g)).error(delta)) == pytest.approx(
        float(expected), rel=0.02
    )


def test_kfac_is_the_mean_squared_change_of_the_loss_where_tokens_are_independent() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(60_000, 1, 4) @ torch.randn(4, 4), torch.randn(60_000, 1, 3) @ torch.randn(3, 3)
    moments = {
        "activation_moment": torch.einsum("ntj,ntk->jk", x, x) / len(x),
        "gradient_moment": torch.einsum("ntj,ntk->jk", g, g) / len(g),
        "active_tokens": torch.tensor(1.0),
    }
    delta = torch.randn(3, 4)
    change = torch.einsum("nto,oi,nti->n", g, delta, x)  # of sample n's loss, to first order
    error = METHODS["kfac"].objective(moments).error(delta)
    assert float(error) == pytest.approx(float(change.square().mean()), rel=0.1)


@pytest.mark.parametrize(("side", "damping"), [("activation_moment", 1e-3), ("gradient_moment", 1e-2)])
def test_second_moments_are_damped_by_a_share_of_their_mean_diagonal(side: str, damping: float) -> None:
    """1e-3 of that of inputs, 1e-2 of that of gradients: what a direction costs that no sample has."""
    moments = {"activation_moment": torch.eye(4), "gradient_moment": torch.eye(4), "active_tokens": torch.tensor(1.0)}
    moments[side] = torch.diag(torch.tensor([4.0, 4.0, 0.0, 0.0]))
    objective, change = METHODS["kfac"].objective(moments), torch.zeros(2, 4, 4)
    change[0, 0, 0] = change[1, 3, 3] = 1.0
    seen, unseen = (float(objective.error(delta)) for delta in change)
    assert unseen / seen == pytest.approx(2 * damping / (4 + 2 * damping), rel=1e-4)


def test_ekfac_measures_the_exact_fisher_of_the_rotated_weight() -> None:
    x, g = samples()
    means = statistics_of(x, g)
    left, right = eigenbasis(means["gradient_moment"], means["activation_moment"])
    rotated = left.T @ torch.einsum("nto,nti->noi", g, x) @ right
    torch.testing.assert_close(means["fisher_in_eigenbasis"], rotated.square().mean(dim=0), rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(left @ left.T, torch.eye(OUT), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("damage", ["rank-deficient", "tiny", "zero"])
def test_poor_statistics_still_work(name: str, damage: str) -> None:
    x, g = samples(count=3, tokens=1) if damage == "rank-deficient" else samples()
    x, g = (x * 1e-12, g * 1e-6) if damage == "tiny" else (x, g)
    g = g * 0 if damage == "zero" else g
    factors = METHODS[name].objective(statistics_of(x, g)).factorize(torch.randn(OUT, IN), RANK).balanced()
    assert torch.isfinite(factors.up).all()
    assert torch.isfinite(factors.down).all()


def test_padding_and_unread_positions_are_not_active() -> None:
    batch = padded_batch(torch.tensor([0, 2, 1, 2]))
    model = tiny_bert(num_labels=3)
    measured = compute_statistics(model, [batch], ["active_tokens", "activation_moment"], progress=False)
    names = list(find_targets(model))
    tokens = {name: float(measured.mean("active_tokens", name) * 4) for name in names}
    assert tokens[names[0]] == batch["attention_mask"].sum()
    assert tokens[names[-1]] == 4  # the last feed-forward layer, of which the pooler reads the first token
    seen: list[torch.Tensor] = []
    model.get_submodule(names[0]).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**batch)
    real = seen[0][batch["attention_mask"].bool()]
    torch.testing.assert_close(measured.mean("activation_moment", names[0]) * 4, real.T @ real, rtol=1e-4, atol=1e-4)


def test_kinds_that_need_others_come_in_a_second_pass() -> None:
    assert passes(["fisher"]) == [("fisher",)]
    assert passes(["fisher_in_eigenbasis", "fisher"]) == [
        ("fisher", "gradient_moment", "activation_moment"),
        ("fisher_in_eigenbasis",),
    ]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_compresses_a_model(name: str) -> None:
    model = tiny_bert(num_labels=3)
    batch = padded_batch(torch.tensor([0, 2, 1, 2]))
    config = CompressionConfig(name, 0.25)
    measured = compute_statistics(model, [batch], config.needs, progress=False) if config.needs else None
    _, report = compress(model, config, measured, progress=False)
    assert report.settings["allocation"] == METHODS[name].allocation
    assert report.parameters_after < report.parameters_before
    assert all(math.isfinite(layer.weighted_error) for layer in report.layers)
