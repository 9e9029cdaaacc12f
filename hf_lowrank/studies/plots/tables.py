"""An analysis → the header and rows of its tables, numbers as a person reads them."""

from collections.abc import Sequence

from hf_lowrank.studies.analysis import Analysis

Row = Sequence[object]


def sweep_rows(analysis: Analysis) -> tuple[Row, list[Row]]:
    """Every method at every rank ratio."""
    header = (
        "method",
        "rank ratio",
        "targeted parameters",
        analysis.score_name,
        f"damage ({analysis.damage_unit})",
        "±",
    )
    return header, [
        (
            point.method,
            f"{point.rank_ratio:.0%}",
            f"{point.targeted_share:.1%}",
            f"{point.measured.score:.2f}",
            f"{point.measured.damage:.3f}",
            f"{point.measured.damage_error:.3f}",
        )
        for point in analysis.sweep
    ]


def group_rows(analysis: Analysis) -> tuple[Row, list[Row]]:
    """Every group of every method."""
    header = ("method", "group", "damage", "±", "loss increase", "±", "reconstruction error", "share of its importance")
    return header, [
        (
            truncation.method,
            group.group,
            group.measured.damage,
            group.measured.damage_error,
            group.measured.loss_increase,
            group.measured.loss_increase_error,
            f"{group.reconstruction_error:.1%}",
            f"{group.importance_share:.2%}",
        )
        for truncation in analysis.truncation
        for group in truncation.groups
    ]


def layer_rows(analysis: Analysis) -> tuple[Row, list[Row]]:
    """Every layer: what its statistics say, and the advice."""
    header = (
        "layer", "out × in", "rank", "advice", "share of expected loss", "Fisher variation", "between rows",
        "within rows", "rank-1 share", "effective rank", "whitened",
    )  # fmt: skip
    return header, [
        (
            layer.name,
            f"{layer.out_features} × {layer.in_features}",
            layer.rank,
            analysis.layer_recommendations[layer.name],
            f"{layer.share:.1%}",
            layer.fisher.variation,
            layer.fisher.between_rows,
            layer.fisher.within_rows,
            f"{layer.fisher.rank1_share:.0%}",
            f"{layer.effective_rank:.0f}",
            f"{layer.whitened_effective_rank:.0f}",
        )
        for layer in analysis.layers
    ]


def alone_rows(analysis: Analysis) -> tuple[Row, list[Row]]:
    """Every layer compressed alone by each method: loss increase, expected and measured."""
    header = ("layer", *(f"{method}, {what}" for method in analysis.methods for what in ("expected", "measured")))
    rows: list[Row] = []
    for layer in analysis.layers:
        cells = [
            cell
            for of in layer.methods.values()
            for cell in (
                of.expected_increase,
                f"{of.measured.loss_increase:.2g} ± {of.measured.loss_increase_error:.1g}",
            )
        ]
        rows.append((layer.name, *cells))
    return header, rows


def correlation_rows(analysis: Analysis) -> tuple[Row, list[Row]]:
    """Every predictor against every outcome."""
    header = ("predictor", "outcome", "Spearman's ρ", "p", "layers")
    return header, [
        (
            found.predictor,
            found.outcome,
            None if found.rho is None else f"{found.rho:.2f}",
            found.p_value,
            found.matrices,
        )
        for found in analysis.correlations
    ]
