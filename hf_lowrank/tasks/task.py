"""What a task is: its columns, its data set, how it is scored, and the kind of model it takes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Texts:
    """Texts, or pairs of texts, without labels: what records call them, the names of their columns, and the rows."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Task:
    """A task: its columns, its Hub data set, and how it is scored. `kind` is a key of `KINDS`.

    `label_names` are the meanings of integer labels in the data; `label_values` is what stands there instead of 0, 1, …
    if the data are not numbered so. `metrics` maps (predictions, labels) to figures, of
    which `score` names the one that counts; perplexity needs none. `texts` are the rows themselves, without labels.
    """

    name: str
    kind: str
    text: tuple[str, ...]
    label: str | None
    hub: tuple[str, str | None]
    score: str
    metrics: Callable[[Any, Any], dict[str, float]] | None = None
    label_names: tuple[str, ...] = ()
    label_values: tuple[Any, ...] = ()
    validation: tuple[str, ...] = ("validation",)
    packed: bool = False  # texts are lines, joined and cut into blocks of equal length, as is usual for running text
    max_length: int = 128
    length_asked: bool = False  # max_length is a user's: a model that cannot read so much is an error
    texts: Texts | None = field(default=None, repr=False)

    @property
    def auto_class(self) -> Any:
        """The Auto class of models for this task."""
        import transformers  # here: it takes time to import

        return getattr(transformers, KINDS[self.kind])

    @property
    def has_labels(self) -> bool:
        """Whether its rows say what a model is to predict: their labels, or the text itself."""
        return self.label is not None or self.kind in ("causal_lm", "masked_lm")

    def without_labels(self) -> "Task":
        """The same rows, of which no labels are read."""
        return replace(self, label=None, label_names=(), label_values=())

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller score is a better one."""
        return self.score == "perplexity"


# kind → the Auto class of its models
KINDS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
}
