"""Results that papers print, to stand beside ours where the setting is the same. Never measured here."""

from dataclasses import dataclass

GLUE = frozenset({"cola", "mnli", "mrpc", "qnli", "qqp", "sst2", "stsb"})
ADAPTIVE = "Adaptive Rank Selections (NAACL 2024)"


@dataclass(frozen=True)
class Published:
    """The average over `tasks` of `model`, in millions of parameters, without and with fine-tuning afterwards."""

    model: str
    method: str
    parameters: float
    compressed: float
    finetuned: float | None
    source: str
    tasks: frozenset[str] = GLUE


PUBLISHED = (
    Published("bert-base-uncased", "dense", 109.5, 84.36, None, ADAPTIVE),
    Published("bert-base-uncased", "svd", 66.5, 41.90, 78.42, ADAPTIVE),
    Published("bert-base-uncased", "fwsvd", 66.5, 57.03, 81.34, ADAPTIVE),
    Published("bert-base-uncased", "fwsvd, adaptive ranks", 65.1, 69.49, 83.53, ADAPTIVE),
)
