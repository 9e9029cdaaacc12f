"""A record's scores and what each was measured on → which may stand side by side, and why the others may not."""

from typing import Any

KINDS = ("dense", "compressed", "finetuned", "quantized")  # in the order of a model's life
WORDS = {"dense": "dense", "compressed": "compressed", "finetuned": "fine-tuned", "quantized": "quantized"}

Record = dict[str, Any]


def with_score(record: Record, kind: str, score: float, data: Record) -> Record:
    """The facts that note a score of `KINDS` and the validation data (`tasks.described`) it was measured on.

    They hold what the record has noted of its other scores.
    """
    return {f"score_{kind}": score, "scored_on": {**record.get("scored_on", {}), kind: data}}


def with_divergence(record: Record, kind: str, divergence: Record, data: Record) -> Record:
    """The facts that note how far a model's predictions are from dense (`Divergence`), and the validation data."""
    return {"divergence": {**record.get("divergence", {}), kind: {**divergence, "digest": data["digest"]}}}


def last_score(record: Record) -> str | None:
    """The kind of the score that was measured last; None where there is none."""
    return next((kind for kind in reversed(KINDS) if record.get(f"score_{kind}") is not None), None)


def comparable(record: Record, kind: str, other: str) -> bool:
    """Whether two scores of a record were measured on the same validation data, by their digests."""
    data = [record.get("scored_on", {}).get(each) for each in (kind, other)]
    return kind == other or (all(data) and data[0]["digest"] == data[1]["digest"])


def left_out(record: Record) -> list[str]:
    """A sentence for each score that may not be compared with the last one, saying why."""
    last = last_score(record)
    others = [kind for kind in KINDS if record.get(f"score_{kind}") is not None]
    return [why_not(record, kind, last) for kind in others if last and not comparable(record, kind, last)]


def why_not(record: Record, kind: str, last: str) -> str:
    """Why the score of `kind` is not compared with the last one."""
    score, on = f"{record[f'score_{kind}']:.2f}", record.get("scored_on", {})
    if not on.get(kind) or not on.get(last):
        return f"The {WORDS[kind]} model's {score} is not compared: not both were recorded with their validation data."
    return (
        f"The {WORDS[kind]} model's {score} is not compared: it was measured on {_named(on[kind])}, the "
        f"{WORDS[last]} model's score on {_named(on[last])}, which are other data."
    )


def _named(data: Record) -> str:
    return f"{data['rows']:,} rows of {data['data']} ({data['digest'][:8]})"
