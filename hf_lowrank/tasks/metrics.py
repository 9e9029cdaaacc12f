"""(predictions, labels) → figures, in percent, as GLUE tables give them."""

from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def correlation(predictions: Any, labels: Any) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and their mean."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:  # a constant correlates with nothing
        return {"pearson": 0.0, "spearman": 0.0, "pearson_spearman": 0.0}
    pearson, spearman = pearsonr(predictions, labels)[0], spearmanr(predictions, labels)[0]
    return {"pearson": 100 * pearson, "spearman": 100 * spearman, "pearson_spearman": 50 * (pearson + spearman)}


def matthews(predictions: Any, labels: Any) -> dict[str, float]:
    """Matthews' correlation of classes, and the accuracy."""
    return {"matthews": 100 * matthews_corrcoef(labels, predictions), **accuracy(predictions, labels)}


def accuracy(predictions: Any, labels: Any) -> dict[str, float]:
    """Share of predictions that are right, in percent."""
    return {"accuracy": 100 * accuracy_score(labels, predictions)}


def f1(predictions: Any, labels: Any) -> dict[str, float]:
    """F1 of the class 1, and the accuracy."""
    return {"f1": 100 * f1_score(labels, predictions), **accuracy(predictions, labels)}


def macro_f1(predictions: Any, labels: Any) -> dict[str, float]:
    """The accuracy, and the mean F1 of all classes."""
    return {**accuracy(predictions, labels), "macro_f1": 100 * f1_score(labels, predictions, average="macro")}


def entities(predictions: Any, labels: Any) -> dict[str, float]:
    """F1 of whole entities."""
    return {"entity_f1": 100 * entity_f1(labels, predictions)}
