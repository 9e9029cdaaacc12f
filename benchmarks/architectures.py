"""The records of a coverage sweep → `architectures.json`, and from there a page: how each type of model fared."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.experts_lowrank import is_stacked

DATA = Path(__file__).with_name("architectures.json")
KINDS = ("linears of blocks", "embeddings", "convolutions", "3-D parameters", "other")
Record = dict[str, Any]

ABOUT = """\
# Architectures by type

`python -m benchmarks coverage --all`, transformers {version}: {classes} head classes of {types} model types. What is \
factorized in each family, and why not the rest: [Architectures](architectures.md).

## What the sweep checked

A small random model of every class, by `svd` at a quarter of the ranks: compressed, saved, loaded by its Auto class.

{outcomes}

## By model type

Shares are of the parameters of the first class at transformers' default config. "ok" counts the classes that were
checked and came through. 3-D parameters are those of experts and of convolutions under weight normalisation.

{types_table}
{problems}"""


def write_data(records: Sequence[Record], meanings: Mapping[str, str]) -> None:
    """Write the data of the page from the records of all head classes."""
    counts = Counter(record["status"] for record in records)
    by_type: dict[str, list[Record]] = {}
    for record in records:
        by_type.setdefault(record["type"], []).append(record)
    types = {}
    with bar("parameters by kind", len(by_type), "types") as shown:
        for model_type, heads in by_type.items():
            types[model_type] = [_outcome(heads), *_shares(heads)]
            shown.update()
    order = ("failed", "dense fails too", "not built")
    bad = sorted((r for r in records if r["status"] in order), key=lambda record: order.index(record["status"]))
    data = {
        "transformers": transformers.__version__,
        "classes": len(records),
        "outcomes": {
            name: {"classes": counts[name], "meaning": text} for name, text in meanings.items() if counts[name]
        },
        "types": types,
        "exceptions": [[r["type"], r["class"], r["status"], r["note"][:120].replace("|", "/")] for r in bad],
    }
    DATA.write_text(_one_entry_a_line(data), encoding="utf-8")


def _one_entry_a_line(data: dict[str, Any]) -> str:
    """JSON of which a person can read the differences between two versions: an entry of a list or a mapping a line."""
    parts = []
    for key, value in data.items():
        entries = value.items() if isinstance(value, dict) else value if isinstance(value, list) else None
        if entries is None:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
            continue
        mapping = isinstance(value, dict)
        lines = [json.dumps(dict([e]) if mapping else e, ensure_ascii=False) for e in entries]
        body = ",\n".join(line[1:-1] if mapping else line for line in lines)
        parts.append(f"{json.dumps(key)}: " + ("{\n%s\n}" if mapping else "[\n%s\n]") % body)
    return "{\n" + ",\n".join(parts) + "\n}\n"


def types_page() -> str:
    """The page of the documentation that shows the data, in Markdown."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    outcomes = [[name, str(found["classes"]), found["meaning"]] for name, found in data["outcomes"].items()]
    problems = [[kind, name, outcome, f"`{why}`"] for kind, name, outcome, why in data["exceptions"]]
    page = ABOUT.format(
        version=data["transformers"],
        classes=data["classes"],
        types=len(data["types"]),
        outcomes=_table(["outcome", "classes", "meaning"], outcomes),
        types_table=_table(["model type", "ok", *KINDS], [[kind, *cells] for kind, cells in data["types"].items()]),
        problems="\n## Exceptions\n\n" + _table(["type", "class", "outcome", "why"], problems) if problems else "",
    )
    return page.rstrip() + "\n"


def _outcome(heads: Sequence[Record]) -> str:
    counts = Counter(head["status"] for head in heads)
    good = counts.pop("ok", 0) + counts.pop("ok, not run", 0)
    others = [f"{status}: {count}" for status, count in counts.items()]
    return ", ".join([f"{good} of {len(heads)}", *others]) if good else ", ".join(others)


def _shares(heads: Sequence[Record]) -> list[str]:
    """The share of each of `KINDS` in the first class at its default config; no memory is taken."""
    model_class = getattr(transformers, heads[0]["class"], None)
    try:
        with torch.device("meta"):
            counts = parameters_by_kind(model_class._from_config(model_class.config_class()))  # type: ignore[union-attr]
    except Exception:  # it cannot be built, as the outcome says
        return ["–"] * len(KINDS)
    total = sum(counts.values())
    return [f"{counts[kind] / total:.0%}" if counts[kind] else "" for kind in KINDS]


def parameters_by_kind(model: Any) -> dict[str, int]:
    """How many parameters of a model are of each of `KINDS`; shared ones are counted once."""
    try:
        targets = find_targets(model)
    except LowRankError:  # there are none
        targets = {}
    targeted = {target.owner or target.module for target in targets.values()}
    counts, seen = dict.fromkeys(KINDS, 0), set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[_kind(module, parameter, module in targeted)] += parameter.numel()
    return counts


def _kind(module: nn.Module, parameter: nn.Parameter, targeted: bool) -> str:
    if targeted and parameter.ndim == (3 if is_stacked(module) else 2):
        return "linears of blocks"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    return "3-D parameters" if parameter.ndim == 3 and parameter.shape[0] > 1 and parameter.shape[1] > 1 else "other"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in [columns, *rows]]
    lines.insert(1, "|" + "---|" * len(columns))
    return "\n".join(lines)
