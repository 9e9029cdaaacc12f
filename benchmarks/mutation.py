"""Small faults put into the library one at a time → the share that the tests of their room notice, and the others.

The faults are those of Cosmic Ray's operators that a reader could miss: one neighbour for each operator and comparison,
numbers one off, conditions turned round, loops that never run. Faults in type annotations are left out, as nothing can
notice them. A mutant is killed where a test fails, an import does, or the tests take three times as long.
"""

import ast
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Result, Row
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import bar

ROOT = Path(__file__).resolve().parents[1]

# The tests of each room, those first that notice most in little time.
ROOMS = {
    "statistics": (
        *("tests/statistics/test_statistics.py", "tests/statistics/test_shared_inputs.py"),
        *("tests/solvers/test_methods.py", "tests/statistics"),
    ),
    "allocation": ("tests/allocation",),
    "solvers": ("tests/solvers",),
}

BINARY = (("Add", "Sub"), ("Sub", "Add"), ("Mul", "Div"), ("Div", "Mul"), ("FloorDiv", "Div"), ("Mod", "Mul"))
COMPARISONS = (("Lt", "LtE"), ("LtE", "Lt"), ("Gt", "GtE"), ("GtE", "Gt"), ("Eq", "NotEq"), ("NotEq", "Eq"))
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{old}_{new}" for old, new in (*BINARY, ("Pow", "Mul"), ("BitOr", "BitAnd"))),
    *(f"core/ReplaceComparisonOperator_{old}_{new}" for old, new in (*COMPARISONS, ("Is", "IsNot"), ("IsNot", "Is"))),
    *("core/ReplaceUnaryOperator_Delete_USub", "core/ReplaceUnaryOperator_Delete_Not", "core/AddNot"),
    *("core/ReplaceAndWithOr", "core/ReplaceOrWithAnd", "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue"),
    *("core/NumberReplacer", "core/ZeroIterationForLoop", "core/ReplaceBreakWithContinue", "core/ExceptionReplacer"),
)


@dataclass(frozen=True)
class Mutant:
    """One fault: the file, its text with the fault, and what has changed in it."""

    room: str
    path: Path  # from the root
    text: str
    change: str  # "line number: before → after"


def run(options: Options) -> Result:
    """Try `options.sample` mutants, drawn by `options.seed` from all of them.

    Raises:
        LowRankError: Cosmic Ray is not installed; or the tests fail without any fault.
    """
    if find_spec("cosmic_ray") is None:
        raise LowRankError("this needs Cosmic Ray: pip install 'hf_lowrank[mutation]'")
    everything = sorted(mutants(), key=lambda mutant: (str(mutant.path), mutant.change, mutant.text))
    drawn = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    killed = dict(zip(drawn, _tried(drawn), strict=True))
    survivors = [f"{mutant.path}:{mutant.change}" for mutant in drawn if not killed[mutant]]
    rows = [_row(room, [killed[m] for m in drawn if m.room == room], everything) for room in ROOMS]
    rows.append(_row("all", list(killed.values()), everything))
    title = f"mutation: faults noticed by the tests of their room, seed {options.seed}"
    return Result(title, rows, [f"- survived: `{each}`" for each in survivors], {"survivors": survivors})


def mutants() -> Iterator[Mutant]:
    """Every fault that can be put into the rooms."""
    for room in ROOMS:
        for path in sorted((ROOT / "hf_lowrank" / room).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            for text in _mutated(source):
                yield Mutant(room, path.relative_to(ROOT), text, _change(source, text))


def _mutated(source: str) -> Iterator[str]:
    """All texts with one fault that change what a file does."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    meaning = _meaning(source)
    for name in OPERATORS:
        occurrence = 0
        while (text := mutate_code(source, get_operator(name)(), occurrence)) is not None:
            occurrence += 1
            if _meaning(text) != meaning:
                yield text


def _meaning(source: str) -> str:
    """A file without its type annotations."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            node.annotation = ast.Constant(None)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
    return ast.dump(tree)


def _change(before: str, after: str) -> str:
    """The lines that differ, by the number of the first."""
    difference = list(unified_diff(before.split("\n"), after.split("\n"), lineterm="", n=0))[2:]
    number = difference[0].split()[1].lstrip("-").partition(",")[0]
    old, new = ([line[1:].strip() for line in difference[1:] if line.startswith(sign)] for sign in "-+")
    return f"{number}: {' '.join(old)} → {' '.join(new)}"


def _tried(drawn: Sequence[Mutant]) -> Iterator[bool]:
    """Whether each mutant is killed, in a copy of the project."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "results"))
        server = _Server(copy)
        seconds = {room: server.unharmed(room) for room in sorted({mutant.room for mutant in drawn})}
        with bar("mutants", len(drawn), "mutants") as shown:
            for mutant in drawn:
                killed = server.kills(mutant, 3 * seconds[mutant.room] + 10)
                if not killed:
                    print(f"survived: {mutant.path}:{mutant.change}", file=sys.stderr, flush=True)
                yield killed
                shown.update()
        server.end()


class _Server:
    """The process that runs tests on a copy of the project (see `mutation_server.py`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = Path(__file__).with_name("mutation_server.py")
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def unharmed(self, room: str) -> float:
        """The CPU seconds that a room's tests take where there is no fault."""
        answer = self._ask(room, 3600)
        if answer["code"] != 0:
            raise LowRankError(f"the tests of {room} fail without any fault: pytest {' '.join(ROOMS[room])}")
        return answer["seconds"]

    def kills(self, mutant: Mutant, seconds: float) -> bool:
        """Whether a room's tests notice a mutant."""
        path = self.folder / mutant.path
        sound = path.read_text(encoding="utf-8")
        try:
            self._write(path, mutant.text)
            return self._ask(mutant.room, seconds)["code"] != 0
        finally:
            self._write(path, sound)

    def end(self) -> None:
        """Let the process end."""
        self.process.communicate()

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        Path(cache_from_source(str(path))).unlink(missing_ok=True)  # it may be of the same second and size

    def _ask(self, room: str, seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"tests": ROOMS[room], "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def _row(room: str, killed: list[bool], everything: Sequence[Mutant]) -> Row:
    """Of one room or all: how many faults there are, were tried and noticed, and the share with its standard error."""
    there = sum(room in (mutant.room, "all") for mutant in everything)
    share = sum(killed) / len(killed) if killed else 0.0
    error = math.sqrt(share * (1 - share) / len(killed) * (1 - len(killed) / there)) if killed else 0.0
    return {
        "room": room,
        "mutants": str(there),
        "tried": str(len(killed)),
        "killed": str(sum(killed)),
        "share": f"{share:.1%} ± {error:.1%}" if killed else "–",
    }
