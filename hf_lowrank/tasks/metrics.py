"""(predictions, labels) → figures, in percent, as GLUE tables give them.

What computes them is imported where it is used: it takes over a second, and the names of tasks need none of it.
"""

import string
from collections import Counter
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


def labels_f1(predictions: Any, labels: Any) -> dict[str, float]:
    """F1 over all labels of all samples together, the mean F1 of all labels that occur, and the samples all right."""
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    flags = MultiLabelBinarizer().fit([*predictions, *labels])
    found, right = flags.transform(predictions), flags.transform(labels)
    figures = {f"{mean}_f1": 100 * f1_score(right, found, average=mean, zero_division=0) for mean in ("micro", "macro")}
    return {**figures, "exact_match": 100 * accuracy_score(right, found)}


def squad(predictions: Any, labels: Any) -> dict[str, float]:
    """Exact matches and F1 of words with the nearest right answer, without case, articles and punctuation (SQuAD's).

    >>> squad(["The Nile"], [["the river Nile", "Nile"]])
    {'exact_match': 100.0, 'squad_f1': 100.0}
    """
    both = zip(predictions, labels, strict=True)
    pairs = [(_words(text), [_words(right) for right in answers or [""]]) for text, answers in both]
    exact = [max(float(words == right) for right in answers) for words, answers in pairs]
    shared = [max(_overlap(words, right) for right in answers) for words, answers in pairs]
    return {"exact_match": 100 * sum(exact) / len(pairs), "squad_f1": 100 * sum(shared) / len(pairs)}


def _words(text: str) -> list[str]:
    """The words of an answer that count."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _overlap(words: list[str], right: list[str]) -> float:
    """F1 of two bags of words."""
    if not words or not right:
        return float(words == right)
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right))


def rouge(predictions: Any, labels: Any) -> dict[str, float]:
    """ROUGE-1, -2 and -L, F1 of stems, by rouge_score (Lin, 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    found = [scorer.score(right, text) for text, right in zip(predictions, labels, strict=True)]
    return {name: 100 * sum(scores[name].fmeasure for scores in found) / len(found) for name in names}


def chrf(predictions: Any, labels: Any) -> dict[str, float]:
    """chrF (Popović, 2015) and BLEU of the whole data, by sacrebleu."""
    import sacrebleu

    known = [list(labels)]
    return {
        "chrf": sacrebleu.corpus_chrf(list(predictions), known).score,
        "bleu": sacrebleu.corpus_bleu(list(predictions), known).score,
    }


def entities(predictions: Any, labels: Any) -> dict[str, float]:
    """F1 of whole entities."""
    from seqeval.metrics import f1_score as entity_f1

    return {"entity_f1": 100 * entity_f1(labels, predictions)}
