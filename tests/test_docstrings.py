"""Docstrings are whole: arguments, shapes and errors of what the reference shows, errors of every public function."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

import hf_lowrank
from hf_lowrank.errors import LowRankError
from tests.launches import ROOT

PACKAGE = Path(hf_lowrank.__file__).parent
REFERENCE = ROOT / "docs" / "reference" / "python.md"
SHOWN = re.findall(r"^::: hf_lowrank\.(\S+)", REFERENCE.read_text(encoding="utf-8"), flags=re.MULTILINE)
# What raises by itself where bad input comes in; a class says it for what it is built by.
BUILDERS = ("__init__", "__post_init__")


def section(docstring: str | None, name: str) -> str:
    """What stands indented under a heading such as "Args:"."""
    match = re.search(rf"^{name}:\n((?:[ \t]+.*\n|\n)*)", inspect.cleandoc(docstring or "") + "\n", flags=re.MULTILINE)
    return match[1] if match else ""


def documented(docstring: str | None) -> set[str]:
    """The arguments that stand under "Args:"."""
    return set(re.findall(r"^ +\*{0,2}(\w+):", section(docstring, "Args"), flags=re.MULTILINE))


def shown() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, function or class, its docstring) of all that the reference shows, methods included."""
    for name in SHOWN:
        path = f"hf_lowrank.{name}".rpartition(".")
        whole = getattr(import_module(path[0]), path[2])
        yield name, whole, whole.__doc__ or ""
        for method, value in vars(whole).items() if inspect.isclass(whole) else ():
            function = inspect.unwrap(getattr(value, "__func__", value))
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function, function.__doc__ or ""


CALLABLES = {name: (value, text) for name, value, text in shown()}


def test_the_reference_shows_all_that_is_exported() -> None:
    assert set(hf_lowrank.__all__) - {"METHODS"} <= {name.rpartition(".")[2] for name in SHOWN}


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_of_what_the_reference_shows_is_explained(name: str) -> None:
    value, text = CALLABLES[name]
    of_others = [kind for kind in getattr(value, "__mro__", ()) if not kind.__module__.startswith("hf_lowrank")]
    if any(issubclass(kind, (PreTrainedConfig, Exception)) for kind in of_others):
        return  # whose arguments are theirs
    assert set(inspect.signature(value).parameters) - {"self", "cls"} <= documented(text)


@pytest.mark.parametrize("name", CALLABLES)
def test_every_tensor_that_the_reference_shows_has_a_shape(name: str) -> None:
    value, text = CALLABLES[name]
    if inspect.isfunction(value) and value.__module__.startswith("hf_lowrank"):
        for argument, kind in inspect.get_annotations(value, eval_str=True).items():
            if "Tensor" in str(kind) and "dict" not in str(kind):
                said = text if argument == "return" else "".join(re.findall(rf"^ +{argument}: .*", text, re.MULTILINE))
                assert re.search(r"\[.*\]", said), argument


def public_functions() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """(name, function, docstring) of all functions and methods whose names do not begin with an underscore."""
    for path in sorted(set(PACKAGE.rglob("*.py")) - set((PACKAGE / "cli").iterdir())):  # whose docstrings are the help
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name in BUILDERS):
                    speaks = owner if node.name in BUILDERS else node
                    name = f"{path.relative_to(PACKAGE).as_posix()}: {getattr(owner, 'name', '')}.{node.name}"
                    if not getattr(owner, "name", "").startswith("_"):
                        yield name, node, ast.get_docstring(speaks) or ""  # type: ignore[arg-type]


def raised(function: ast.FunctionDef) -> set[str]:
    """The errors of this library that a function raises in its own body."""
    own = {LowRankError.__name__, *(kind.__name__ for kind in LowRankError.__subclasses__())}
    inner = {id(node) for child in ast.walk(function) if isinstance(child, ast.FunctionDef) and child is not function
             for node in ast.walk(child)}  # fmt: skip
    calls = [n.exc for n in ast.walk(function) if isinstance(n, ast.Raise) and id(n) not in inner]
    return {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)} & own


def test_every_public_function_says_which_errors_it_raises() -> None:
    silent = [name for name, node, text in public_functions() if raised(node) and not section(text, "Raises")]
    assert not silent, "\n".join(silent)
