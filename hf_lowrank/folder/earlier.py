"""The record of an earlier compression → what the record of a further one says of the model that it all began with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_lowrank.compression.report import CompressionReport
from hf_lowrank.folder.card import stored
from hf_lowrank.jobs.files import read_json
from hf_lowrank.nn.publishing_lowrank import RECORD

Record = dict[str, Any]

# What is kept of the record of an earlier compression.
STEP = (
    *("settings", "parameters_after", "statistics", "versions", "task", "data", "healing", "finetuning"),
    *("score_compressed", "score_finetuned", "scored_on"),
)


def of_original(report: CompressionReport, facts: Record, name: str | None) -> tuple[CompressionReport, Record]:
    """A report and facts of a further compression of the model called `name`, so that they speak of the dense original.

    The report gets the earlier steps that the record beside the model knows of. `base_model` is the original's name,
    None where no record says it; a `score_dense` that was measured of what was given is `score_given`, and
    `score_dense` the original's, with what that was measured on. What was dense when it was loaded is left.
    """
    if not report.earlier or "settings" in report.earlier[0]:
        return report, facts
    path = stored(name, RECORD) if name else None
    record = read_json(Path(path)) if path else {}
    if record:
        step = {key: record[key] for key in STEP if key in record}
        report = replace(report, earlier=(*record.get("earlier", ()), step, *report.earlier[1:]))
    return report, _facts_of_original(facts, record)


def _facts_of_original(facts: Record, record: Record) -> Record:
    scored_on = {**facts.get("scored_on", {})}
    kept = {key: value for key, value in facts.items() if key not in ("score_dense", "scored_on")}
    if "score_dense" in facts:
        kept |= {"score_given": facts["score_dense"]}
        scored_on |= {"given": scored_on.pop("dense", None)}
    if "score_dense" in record:
        kept |= {"score_dense": record["score_dense"]}
        scored_on |= {"dense": record.get("scored_on", {}).get("dense")}
    described = {"scored_on": {kind: data for kind, data in scored_on.items() if data}} if scored_on else {}
    return kept | described | {"base_model": record.get("base_model"), "base": record.get("base", {})}
