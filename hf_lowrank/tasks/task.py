"""What a task is: its columns, its data set, how it is scored, and the kind of model it takes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hf_lowrank.errors import LowRankError

USUAL = 128  # tokens of a text, where nothing else is known


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
    training: str = "train"  # the split that is measured and trained on, of a data set on the Hub
    validation: tuple[str, ...] = ("validation",)
    packed: bool = False  # texts are parts of a running text, which is cut into windows of equal length: its samples
    separator: str | None = None  # what stands between such parts; None for a line break where a part ends without
    chat: bool = False  # texts are conversations, lists of messages with a role and a content
    max_length: int = 128
    length_asked: bool = False  # max_length is a user's: a model that cannot read so much is an error
    texts: Texts | None = field(default=None, repr=False)
    streamed: bool = False  # of training data no more is read than is measured on
    own_data: bool = False  # its columns, and the names of its labels, are found in the data that a user gives

    @property
    def auto_class(self) -> Any:
        """The Auto class of models for this task."""
        import transformers  # here: it takes time to import

        return getattr(transformers, KINDS[self.kind])

    @property
    def has_labels(self) -> bool:
        """Whether its rows say what a model is to predict: their labels, or the text itself."""
        if self.kind == "similarity":  # its labels are of pairs, and its rows are single texts
            return False
        return self.label is not None or self.kind in ("causal_lm", "masked_lm")

    @property
    def labels_are_tokens(self) -> bool:
        """Whether its models predict tokens of their own vocabulary, by a head that is never made anew."""
        return self.kind in ("causal_lm", "masked_lm", "seq2seq")

    @property
    def is_scored(self) -> bool:
        """Whether there is a figure that says how good a model is at it."""
        return self.has_labels or (self.kind == "similarity" and self.label is not None)

    def without_labels(self) -> "Task":
        """The same rows, of which no labels are read, but for the texts along which a decoder is to predict tokens."""
        if self.kind == "seq2seq":
            return self
        return replace(self, label=None, label_names=(), label_values=())

    def as_similarity(self) -> "Task":
        """The same pairs, whose texts are read one by one, for models that embed them.

        Raises:
            LowRankError: it is of other things than pairs of texts with a number.
        """
        if self.kind != "regression" or len(self.text) != 2:
            raise LowRankError(
                f"{self.name} has no pairs of texts with a number, which models of sentence-transformers are scored "
                "by; give texts in place of a task"
            )
        return replace(self, kind="similarity", score="spearman", metrics=None)

    def at_once(self, batch_size: int, length: int) -> int:
        """How many rows a batch of `batch_size` has: of windows fewer, so that it holds as many tokens as of texts."""
        return max(1, batch_size * USUAL // max(length, USUAL)) if self.packed else batch_size

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
    "question_answering": "AutoModelForQuestionAnswering",
    "multi_label": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image_classification": "AutoModelForImageClassification",
    "embedding": "AutoModel",
    "similarity": "AutoModel",
}
