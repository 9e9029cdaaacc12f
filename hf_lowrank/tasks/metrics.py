"""(predictions, labels) → figures, in percent, as GLUE tables give them.

What computes them is imported where it is used: it takes over a second, and the names of tasks need none of it.
"""

from typing import Any


def correlation(predictions: Any, labels: Any) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and their mean."""
    import numpy as np
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:  # a constant correlates with nothing
        return {"pearson": 0.0, "spearman": 0.0, "pearson_spearman": 0.0}
    pearson, spearman = pearsonr(predictions, labels)[0], spearmanr(predictions, labels)[0]
    return {"pearson": 100 * pearson, "spearman": 100 * spearman, "pearson_spearman": 50 * (pearson + spearman)}


def matthews(predictions: Any, labels: Any) -> dict[str, float]:
    """Matthews' correlation of classes, and the accuracy."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": 100 * matthews_corrcoef(labels, predictions), **accuracy(predictions, labels)}


def accuracy(predictions: Any, labels: Any) -> dict[str, float]:
    """Share of predictions that are right, in percent."""
    from sklearn.metrics import accuracy_score

    return {"accuracy": 100 * accuracy_score(labels, predictions)}


def f1(predictions: Any, labels: Any) -> dict[str, float]:
    """F1 of the class 1, and the accuracy."""
    from sklearn.metrics import f1_score

    return {"f1": 100 * f1_score(labels, predictions), **accuracy(predictions, labels)}


def macro_f1(predictions: Any, labels: Any) -> dict[str, float]:
    """The accuracy, and the mean F1 of all classes."""
    from sklearn.metrics import f1_score

    return {**accuracy(predictions, labels), "macro_f1": 100 * f1_score(labels, predictions, average="macro")}


def entities(predictions: Any, labels: Any) -> dict[str, float]:
    """F1 of whole entities."""
    from seqeval.metrics import f1_score as entity_f1

    return {"entity_f1": 100 * entity_f1(labels, predictions)}
