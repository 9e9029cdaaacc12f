"""The house itself: rooms, the import arrows between them, how a model walks through `compress`, and what is long.

Arrows and lengths are read from the source. The walks are real compressions of a tiny BERT, from Python and by the
command, with one move for each change of rooms (see `rooms_walked`).
"""

import ast
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import typer
from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import hf_lowrank
from benchmarks.harness import Options, Result
from hf_lowrank import CompressionConfig, compress, compute_statistics
from hf_lowrank.cli.app import app
from hf_lowrank.studies.demo import make_tokenizer

ROOT = Path(hf_lowrank.__file__).parent
# The flow: a room imports only from those before it.
FLOW = (
    *("errors", "jobs", "nn", "model", "tasks", "statistics", "solvers", "allocation", "compression", "training"),
    *("folder", "pipeline", "studies", "cli"),
)
DEEPEST = 2  # how far inside of an argument a layer is looked for
LABELS = ("unacceptable", "acceptable")
# The files that know the kinds of layers.
KINDS_AT_HOME = ("nn/", "model/")
KIND_TEST = re.compile(
    r"(isinstance|type)\(.*\b(nn\.Embedding|CONVOLUTIONS|Conv1D|nn\.Conv[123]d)\b"
    r"|\bis_(embedding|convolution)\("
)


def run(options: Options) -> Result:
    """The table of the house."""
    arrows = set(import_arrows(ROOT))
    against = sorted((a, b) for a, b in arrows if FLOW.index(a) < FLOW.index(b))
    walks = {"compress": _from_python(), "hf-lowrank compress": _from_the_command()}
    longest, lines, parameters = max(command_functions(ROOT), key=lambda found: found[1])
    measured: list[tuple[str, int]] = [
        ("rooms: modules and packages at the top", len(rooms(ROOT))),
        ("import arrows between rooms", len(arrows)),
        ("arrows against the flow", len(against)),
        ("rooms that import each other, over any way", len(circles(arrows))),
        *(measure for name, walk in walks.items() for measure in _measures_of(name, walk)),
        ("lines of the longest command function", lines),
        ("its parameters", parameters),
        ("kind tests of layers outside nn/ and model/", len(kind_tests(ROOT))),
    ]
    notes = [f"against the flow: {', '.join(f'{a} → {b}' for a, b in against) or 'none'}", f"longest: {longest}"]
    return Result("The house", [{"measure": name, "value": str(value)} for name, value in measured], notes)


def _measures_of(name: str, walk: list[str]) -> list[tuple[str, int]]:
    moves = list(pairwise(walk))
    back = sum(FLOW.index(b) > FLOW.index(a) for a, b in moves)
    return [
        (f"{name}: rooms that a model enters", len(set(walk))),
        (f"{name}: moves between them", len(moves)),
        (f"{name}: moves back up", back),
    ]


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
                yield (
                    f"{path.stem}.{node.name}",
                    last - node.lineno + 1,
                    len(node.args.args) + len(node.args.kwonlyargs),
                )


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
    """The rooms that a model enters during `action`, in order, repetitions left out.

    Those of the library's functions that are given the model, its layers, or something that holds them: every call of
    one such function by another, in the order of first times.
    """
    seen: dict[Any, str] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("hf_lowrank.") and _is_given_a_model(frame):
            seen.setdefault((_library_caller(frame), frame.f_code), module.split(".")[1])

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    entered = list(seen.values())
    return [room for n, room in enumerate(entered) if n == 0 or room != entered[n - 1]]


def _is_given_a_model(frame: FrameType) -> bool:
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return any(_holds_layers(frame.f_locals.get(name)) for name in names)


def _holds_layers(value: Any, depth: int = 0) -> bool:
    """Whether it is a module, or a container or an object of the library that has one near its beginning."""
    if isinstance(value, nn.Module) or depth > DEEPEST:
        return isinstance(value, nn.Module)
    if isinstance(value, (dict, list, tuple)):
        inside: Iterable[Any] = list(value.values() if isinstance(value, dict) else value)[:3]
    else:
        own = type(value).__module__.startswith("hf_lowrank")
        inside = list(vars(value).values()) if own and hasattr(value, "__dict__") else ()
    return any(_holds_layers(part, depth + 1) for part in inside)


def _library_caller(frame: FrameType) -> Any:
    caller = frame.f_back
    while caller is not None and not caller.f_globals.get("__name__", "").startswith("hf_lowrank."):
        caller = caller.f_back
    return caller and caller.f_code


def _tiny_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32}
    sizes |= {"vocab_size": len(make_tokenizer()), "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, id2label=dict(enumerate(LABELS)), label2id={name: n for n, name in enumerate(LABELS)})
    return BertForSequenceClassification(config).eval()


def _from_python() -> list[str]:
    model, settings = _tiny_model(), CompressionConfig(rank_ratio=0.3)
    batch = {"input_ids": torch.randint(0, 50, (4, 8)), "labels": torch.tensor([0, 1, 0, 1])}
    statistics = compute_statistics(model, [batch], settings.needs, progress=False)
    return rooms_walked(lambda: compress(model, settings, statistics, progress=False))


def _from_the_command() -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        _tiny_model().save_pretrained(place / "model")
        make_tokenizer().save_pretrained(place / "model")
        texts = [f"food{n} room{n}" for n in range(16)]
        rows = Dataset.from_dict({"sentence": texts, "label": [n % 2 for n in range(len(texts))]})
        for split in ("train", "validation"):
            rows.to_parquet(place / "data" / f"{split}.parquet")
        words = ["compress", str(place / "model"), "--task", "cola", "--max-length", "16", "--json"]
        words += ["--data-dir", str(place / "data"), "--output", str(place / "small")]
        command = typer.main.get_command(app)
        with redirect_stdout(StringIO()):
            return rooms_walked(lambda: command(words, standalone_mode=False))
