"""Options in dataclasses: Typer sees them flat, and the command gets them filled."""

import ast
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from hf_lowrank.cli import app
from hf_lowrank.cli.groups import with_groups
from tests.launches import ROOT


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(min=1, help="From left to right.", rich_help_panel="Sizes")] = 1
    names: Annotated[list[str] | None, typer.Option("--name")] = None


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Annotated[str, typer.Option(help="Where it goes.")]
    size: Size
    values: Annotated[list[str], typer.Option("--value")] = field(default_factory=lambda: ["1", "2"])


def made(seen: list[Any]) -> typer.Typer:
    application = typer.Typer()

    @application.command()
    @with_groups
    def draw(
        context: typer.Context, model: Annotated[str, typer.Argument()], given: Options, quick: bool = False
    ) -> None:
        """Draw it."""
        seen.append((context.info_name, model, given, quick))

    return application


def test_a_command_gets_its_groups_filled() -> None:
    seen: list[Any] = []
    words = ["bert", "--width", "3", "--name", "a", "--name", "b", "--output", "out", "--quick"]
    assert CliRunner().invoke(made(seen), words).exit_code == 0
    assert CliRunner().invoke(made(seen), ["bert", "--output", "out"]).exit_code == 0
    first = Options(output="out", size=Size(3, ["a", "b"]), values=["1", "2"])
    assert seen == [("draw", "bert", first, True), ("draw", "bert", Options(output="out", size=Size()), False)]


def test_typer_sees_the_options_in_order_with_their_checks_and_panels() -> None:
    command = typer.main.get_command(made([]))
    names = [parameter.name for parameter in command.params]
    assert names[:6] == ["model", "output", "width", "names", "values", "quick"]
    assert {p.name: getattr(p, "rich_help_panel", None) for p in command.params}["width"] == "Sizes"
    assert command.help == "Draw it."
    for words, said in ((["--width", "0"], "greater than or equal to 1"), (["--output", "out"], ""), ([], "--output")):
        result = CliRunner().invoke(made([]), ["bert", *words])
        assert said in result.output
        assert (result.exit_code == 0) == (words == ["--output", "out"])


def functions(path: Any) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", sorted((ROOT / "hf_lowrank/cli").glob("*.py")), ids=lambda path: path.stem)
def test_no_function_of_a_command_is_long(path: Any) -> None:
    long = {
        f.name: f.end_lineno - f.lineno + 1 for f in functions(path) if f.end_lineno and f.end_lineno - f.lineno >= 40
    }
    assert long == {}


def test_every_option_has_a_help() -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    bare = [f"{name} {p.name}" for name, command in commands.items() for p in command.params if not p.help]
    assert bare == []
