"""What of the documentation is generated at build time: the commands, the API by room, the studies of `benchmarks/`.

The package and `benchmarks/` → pages of the site. MkDocs calls the functions named `on_…`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_lowrank"
sys.path.insert(0, str(ROOT))

ERRORS = ("LowRankError", "ImpossibleBudget", "ValueError")
ROOMS = "API by room"  # the title in `nav` under which the rooms are listed


def on_config(config: Any) -> Any:
    """List every room of the package in the navigation."""
    rooms = [{room: f"reference/rooms/{room}.md"} for room in _rooms()]
    for section in config.nav:
        for entry in next(iter(section.values())):
            if isinstance(entry, dict) and ROOMS in entry:
                entry[ROOMS] = rooms
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in _pages():
        files.append(File.generated(config, path, content=text))
    for path in sorted((ROOT / "benchmarks" / "pictures").glob("*.png")):
        files.append(File.generated(config, f"results/pictures/{path.name}", abs_src_path=str(path)))
    return files


def _pages() -> Iterator[tuple[str, str]]:
    """(path, Markdown) of every generated page."""
    yield "reference/commands.md", command_reference()
    yield "reference/errors.md", error_reference()
    for room in _rooms():
        yield f"reference/rooms/{room}.md", _room_page(room)
    for study in sorted((ROOT / "benchmarks").glob("*.md")):
        if study.name != "README.md":
            yield f"results/{study.name}", study.read_text(encoding="utf-8")
    from benchmarks.architectures import types_page

    yield "results/architectures-by-type.md", types_page()


def command_reference() -> str:
    """Every command of `hf-lowrank` with its arguments and options, read from the command itself."""
    import typer
    from typer.main import get_command

    from hf_lowrank.cli import app

    group: Any = get_command(app)
    context = typer.Context(group, info_name="hf-lowrank")
    parts = [
        "# Commands\n\nGenerated from `hf-lowrank` itself; `hf-lowrank COMMAND --help` prints the same. Errors end "
        "with one line and exit code 2; see [troubleshooting](../troubleshooting.md).\n"
    ]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        parts.append(_command_section(command, typer.Context(command, context, name)))
    return "\n".join(parts)


def _command_section(command: Any, context: Any) -> str:
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## {context.info_name}\n", _plain(command.help or ""), ""]
    lines += ["```", f"hf-lowrank {context.info_name} {usage}", "```", ""]
    options = [parameter for parameter in command.params if parameter.name != "help"]
    if options:
        lines += ["| | default | |", "|---|---|---|"]
    for parameter in options:
        option = parameter.param_type_name == "option"
        name = (
            ", ".join([*parameter.opts, *parameter.secondary_opts])
            if option
            else parameter.metavar or parameter.name.upper()
        )
        cells = [f"`{name}`", _default(parameter), _plain(getattr(parameter, "help", None) or "")]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    values = default if isinstance(default, (list, tuple)) else [default]
    return ", ".join(f"`{value}`" for value in values if not (value is None or value is False or callable(value)))


def _plain(text: str) -> str:
    """Help without the marks that colour it in a terminal, and with its placeholders and patterns as they are."""
    text = re.sub(r"\[/?(dim|bold|italic)\]", "", text).replace("\\[", "[").replace("\b\n", "")
    text = "\n".join(line.strip() for line in text.strip().splitlines())
    text = re.sub(r"^Example: (.*)$", r"Example: `\1`", text, flags=re.MULTILINE)
    return re.sub(r"(?<!`)<([^>]*)>(?!`)", r"&lt;\1&gt;", text).replace("*", "\\*") if "`" not in text else text


def error_reference() -> str:
    """Every message of a `LowRankError` (and of the `ValueError`s of loading), by the module that raises it."""
    parts = [
        "# Every error\n\nGenerated from the source: `…` stands for names and numbers. A message says what is wrong "
        "and what to do; the common ones are explained in [troubleshooting](../troubleshooting.md).\n"
    ]
    for room in (*_rooms(), "cli"):
        lines = [line for path in sorted((PACKAGE / room).rglob("*.py")) for line in _messages(path)]
        if lines:
            parts += [f"## {room}\n", "| where | message |", "|---|---|", *lines, ""]
    return "\n".join(parts)


def _messages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = _template(node.exc.args[0])
            if getattr(node.exc.func, "id", "") in ERRORS and message.strip("… "):
                name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
                yield f"| `{name}` | {message.replace('|', '&#124;').replace('*', '&#42;').replace('<', '&lt;')} |"


def _template(node: ast.expr) -> str:
    """The text of a message, with … in the place of what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    return "…"


def _rooms() -> list[str]:
    """The packages of the house, in the order in which a model goes through them, then any others."""
    order = ("nn", "model", "tasks", "statistics", "solvers", "allocation", "compression", "training", "folder")
    found = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "cli")
    return [*(room for room in order if room in found), *(room for room in found if room not in order)]


def _room_page(room: str) -> str:
    """Every module of a room that has something to show, in the order of their names."""
    about = _docstring(PACKAGE / room / "__init__.py")
    parts = [f"# {room}\n", about, ""]
    for path in sorted((PACKAGE / room).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py" and _has_public(path):
            parts += [f"## {name.removeprefix('hf_lowrank.')}\n", f"::: {name}", ""]
    return "\n".join(parts)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _has_public(path: Path) -> bool:
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, kinds) and not node.name.startswith("_") for node in body)
