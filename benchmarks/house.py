"""The house itself: rooms, the import arrows between them, how a model walks through `compress`, and what is long.

Arrows and lengths are read from the source. The walk is a real call of `compress` on a tiny BERT: every function of the
library in the order of its first call, one move for each change of rooms.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_lowrank
from benchmarks.harness import Options, Result
from hf_lowrank import CompressionConfig, compress, compute_statistics

ROOT = Path(hf_lowrank.__file__).parent
# The flow: a room imports only from those before it.
FLOW = (
    *("errors", "jobs", "nn", "model", "tasks", "statistics", "solvers", "allocation", "compression", "training"),
    *("folder", "pipeline", "studies", "cli"),
)
# The files that know the kinds of layers.
KINDS_AT_HOME = ("nn/", "model/")
KIND_TEST = re.compile(r"(isinstance|type)\(.*\b(nn\.Embedding|CONVOLUTIONS|Conv1D|nn\.Conv[123]d)\b")


def run(options: Options) -> Result:
    """The table of the house."""
    arrows = set(import_arrows(ROOT))
    against = sorted((a, b) for a, b in arrows if FLOW.index(a) < FLOW.index(b))
    walk = rooms_walked(_compress_a_tiny_model())
    moves = list(pairwise(walk))
    longest, lines, parameters = max(command_functions(ROOT), key=lambda found: found[1])
    measured: list[tuple[str, int]] = [
        ("rooms: modules and packages at the top", len(rooms(ROOT))),
        ("import arrows between rooms", len(arrows)),
        ("arrows against the flow", len(against)),
        ("rooms that import each other, over any way", len(circles(arrows))),
        ("rooms entered by compress", len(set(walk))),
        ("moves between them", len(moves)),
        ("moves back up", sum(FLOW.index(b) > FLOW.index(a) for a, b in moves)),
        ("lines of the longest command function", lines),
        ("its parameters", parameters),
        ("kind tests of layers outside nn/ and model/", len(kind_tests(ROOT))),
    ]
    notes = [f"against the flow: {', '.join(f'{a} → {b}' for a, b in against) or 'none'}", f"longest: {longest}"]
    return Result("The house", [{"measure": name, "value": str(value)} for name, value in measured], notes)


def rooms(root: Path) -> set[str]:
    """The modules and packages at the top, `__init__` and `__main__` apart."""
    found = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    return found - {"__init__", "__main__"}


def import_arrows(root: Path) -> Iterator[tuple[str, str]]:
    """(importing room, imported room) of every import, those inside functions too."""
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                other = [*name.split("."), ""][1]
                if name.startswith("hf_lowrank.") and other != room and not room.startswith("__"):
                    yield room, other


def circles(arrows: set[tuple[str, str]]) -> set[str]:
    """The rooms from which a way leads back to themselves."""
    ways = set(arrows)
    while more := {(a, d) for a, b in ways for c, d in arrows if b == c} - ways:
        ways |= more
    return {a for a, b in ways if a == b}


def command_functions(root: Path) -> Iterator[tuple[str, int, int]]:
    """(name, lines, parameters) of every function in the command's files."""
    for path in (root / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                last = node.end_lineno or node.lineno
                yield f"{path.stem}.{node.name}", last - node.lineno + 1, len(node.args.args)


def kind_tests(root: Path) -> list[str]:
    """Lines that ask what kind of layer a module is, outside of the files of layers and targets."""
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(KINDS_AT_HOME):
            found += [
                f"{name}: {line}" for line in path.read_text(encoding="utf-8").split("\n") if KIND_TEST.search(line)
            ]
    return found


def rooms_walked(action: Callable[[], Any]) -> list[str]:
    """The rooms of the functions that `action` calls, in the order of their first calls, repetitions left out."""
    seen: dict[Any, str] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("hf_lowrank."):
            seen.setdefault(frame.f_code, module.split(".")[1])

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    entered = list(seen.values())
    return [room for n, room in enumerate(entered) if n == 0 or room != entered[n - 1]]


def _compress_a_tiny_model() -> Callable[[], Any]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
    config = BertConfig(vocab_size=50, num_hidden_layers=2, num_attention_heads=2, num_labels=2, **sizes)
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(0, 50, (4, 8)), "labels": torch.tensor([0, 1, 0, 1])}
    settings = CompressionConfig(rank_ratio=0.3)
    statistics = compute_statistics(model, [batch], settings.needs, progress=False)
    return lambda: compress(model, settings, statistics, progress=False)
