"""What the documentation and the README say is what the code does, as far as that can be told cheaply."""

import inspect
import re
from pathlib import Path

import pytest

import hf_lowrank
from benchmarks.picture import curves
from hf_lowrank import Pipeline
from hf_lowrank.allocation import ALLOCATIONS, BUDGETS
from hf_lowrank.jobs.files import read_json
from hf_lowrank.solvers import METHODS
from hf_lowrank.statistics import KINDS
from hf_lowrank.tasks.table import NAMES
from tests.examples.inputs import settings
from tests.launches import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def options_in(text: str) -> set[str]:
    """The long options of every `hf-lowrank …` in the blocks of shell commands, as (command, option) in one string."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    found = set()
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        match = re.search(r"(?:hf-lowrank|-m hf_lowrank) ([a-z]+)(.*)", line.split("#")[0])
        if match:
            found |= {f"{match[1]} {option}" for option in re.findall(r"--[a-z0-9-]+", match[2])} | {match[1]}
    return found


def known_options() -> set[str]:
    import typer

    from hf_lowrank.cli import app

    group = typer.main.get_command(app)
    commands = group.commands.items()  # type: ignore[attr-defined]
    every = [(name, [*p.opts, *p.secondary_opts]) for name, command in commands for p in command.params]
    return {f"{name} {option}" for name, options in every for option in options} | {name for name, _ in commands}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_options_that_are_shown_exist(page: Path) -> None:
    assert options_in(page.read_text(encoding="utf-8")) <= known_options() | {"demo"}


def test_python_that_is_shown_compiles_and_imports_what_exists() -> None:
    for page in [ROOT / "README.md", *PAGES]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            if "--8<--" not in block:
                compile(block, str(page), "exec")
                for line in re.findall(r"^from hf_lowrank.*$", block, flags=re.MULTILINE):
                    exec(line)


def test_the_pages_name_every_method_allocation_budget_and_task() -> None:
    concepts = {name: (DOCS / f"concepts/{name}.md").read_text(encoding="utf-8") for name in ("objectives", "ranks")}
    assert [name for name in METHODS if f"`{name}`" not in concepts["objectives"]] == []
    assert [name for name in ALLOCATIONS if f"`{name}`" not in concepts["ranks"]] == []
    assert [name for name in BUDGETS if f"`--{name.replace('_', '-')}" not in concepts["ranks"]] == []
    guides = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "guides").glob("*.md"))
    assert [name for name in NAMES if f"`{name}`" not in guides] == []


def test_the_pages_name_every_statistic_and_every_field_of_a_record(tmp_path: Path) -> None:
    statistics = (DOCS / "concepts/statistics.md").read_text(encoding="utf-8")
    assert [name for name in KINDS if f"`{name}`" not in statistics] == []
    given = settings("classifier", tmp_path)
    pipeline = Pipeline.load(given["MODEL"], given["TASK"], given["DATA"])
    pipeline.compress(method="svd", keep_model=0.8)
    pipeline.save(tmp_path / "out")
    formats = (DOCS / "reference/formats.md").read_text(encoding="utf-8")
    record = read_json(tmp_path / "out/compression.json")
    assert [field for field in [*record, *record["layers"][0]] if not re.search(rf"`{field}`", formats)] == []


def test_the_picture_shows_the_figures_of_the_study() -> None:
    dense, found = curves((ROOT / "benchmarks/allocation.md").read_text(encoding="utf-8"))
    assert dense == 83.07
    assert found["svd"][0] == (20.1, 79.6)
    assert {len(points) for points in found.values()} == {4}


FUNCTIONS = [name for name in hf_lowrank.__all__ if inspect.isfunction(getattr(hf_lowrank, name))]
CLASSES = ["CompressionConfig", "CompressionReport", "LowRankLinear", "Pipeline", "Statistics"]


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_exported_names_have_whole_docstrings(name: str) -> None:
    """Every argument under `Args`; of functions also what they raise."""
    exported = getattr(hf_lowrank, name)
    text = inspect.getdoc(exported) or ""
    arguments = text.split("Args:")[-1].split("Raises:")[0] if "Args:" in text else ""
    assert [argument for argument in inspect.signature(exported).parameters if f"{argument}:" not in arguments] == []
    assert "Raises:" in text or name not in FUNCTIONS


def test_the_readme_is_short_and_its_table_is_the_study_s() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= 900
    _, found = curves((ROOT / "benchmarks/allocation.md").read_text(encoding="utf-8"))
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in readme.splitlines() if "|" in line]
    shown = {row[0]: row[1:] for row in rows}
    names = dict(zip(found, ("SVD", "FWSVD", "TFWSVD", "activation whitening", "the default"), strict=True))
    for method, name in names.items():
        assert shown[name] == [f"{score:.1f}" for _, score in found[method]]
    assert shown["parameters left"] == [f"{size}M" for size, _ in found["svd"]]


def test_links_of_files_outside_the_site_lead_somewhere() -> None:
    for page in [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
