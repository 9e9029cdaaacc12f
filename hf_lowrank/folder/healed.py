"""The record of a low-rank model and the facts of its healing → the record of the healed one, without what is stale."""

from typing import Any

Record = dict[str, Any]

STALE = ("compressed", "finetuned")  # kinds of scores that were measured before


def healed_record(record: Record, healing: Record) -> Record:
    """The record with the healing in it, and in the healing the last score before.

    Scores and divergences of the compressed model are left out, and those of the dense one kept. What the record says
    of single layers is of the compression.
    """
    before = next((record[f"score_{kind}"] for kind in reversed(STALE) if f"score_{kind}" in record), None)
    kept = {key: value for key, value in record.items() if key not in {f"score_{kind}" for kind in STALE}}
    for key in ("scored_on", "divergence"):
        if key in kept:
            kept[key] = {kind: value for kind, value in kept[key].items() if kind not in STALE}
    return {**kept, "healing": healing | ({} if before is None else {"score_before": before})}


def healed_kind(record: Record) -> str:
    """The kind under which a score after the healing is noted."""
    return "finetuned" if "finetuning" in record else "compressed"
