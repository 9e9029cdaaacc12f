"""What a command writes: one job at a time, never what it reads, refused before any work where it cannot be written."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import factorize, tiny_bert
from tests.jobs.test_locks import holding
from tests.launches import Job, hf_lowrank, make_data, make_model
from tests.tiny_task import run


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    make_model(folder / "model")
    make_data(folder / "cola")
    factorize(tiny_bert()).save_pretrained(folder / "low")
    recipe = {"path": 3, "models": [str(folder / "model")], "tasks": ["cola"], "methods": ["svd"], "budgets": [{}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"finetune": False, "finetune_after": False}))
    return folder


def commands(places: Path, out: Path) -> dict[str, list[Any]]:
    """Every command that writes, with `out` as what it writes."""
    task = [places / "model", "--task", "cola", "--data-dir", places / "cola", "--output", out]
    return {
        "compress": ["compress", *task],
        "compress --overwrite": ["compress", *task, "--overwrite"],
        "compress --resume": ["compress", *task, "--resume"],
        "statistics": ["statistics", *task],
        "finetune": ["finetune", *task],
        "sweep": ["sweep", *task],
        "analyze": ["analyze", *task],
        "experiment": ["experiment", places / "recipe.yaml", "--data-dir", places, "--output", out],
        "demo": ["demo", "--output", out],
        "densify": ["densify", places / "low", out],
        "export": ["export", places / "low", out.with_name(f"{out.name}.onnx")],
        "bench --record": ["bench", out, "--record"],
        "bench --plot": ["bench", places / "low", "--plot", out],
    }


NAMES = list(commands(Path(), Path("out")))


def refused(monkeypatch: Any, capfd: Any, words: list[Any]) -> str:
    """What a command says that ends with exit code 2 and one line."""
    code, printed, error = run(monkeypatch, capfd, *words)
    assert code == 2
    assert printed == ""
    assert len(error.strip().splitlines()) == 1
    return error


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_output_in_use_is_refused_before_it_is_touched(
    places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, name: str
) -> None:
    words = commands(places, tmp_path / "out")[name]
    written = next(word for word in words if isinstance(word, Path) and word.name.startswith("out"))
    job = holding(tmp_path, written)
    before = sorted(tmp_path.rglob("*"))
    assert f"{written} is in use by process {job.processes[0].pid} on " in refused(monkeypatch, capfd, words)
    assert sorted(tmp_path.rglob("*")) == before
    job.kill()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("bench --record")])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, name: str
) -> None:
    (tmp_path / "file").touch()
    error = refused(monkeypatch, capfd, commands(places, tmp_path / "file" / "out")[name])
    assert "cannot be written: File exists; choose another place" in error
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


@pytest.mark.parametrize(
    ("command", "output", "more", "said"),
    [
        ("compress", "model", [], "model is {}/model, which this command reads; choose another output"),
        ("compress", "link", [], "link is {}/model, which"),
        ("compress", "model/sub/out", [], "model/sub/out lies in {}/model, which"),
        ("statistics", ".", [], "holds {}/model, which"),
        ("compress", "cola", [], "cola is {}/cola, which"),
        ("compress", "measured", ["--statistics", "measured"], "measured is {}/measured, which"),
        ("finetune", "low", ["--teacher", "low"], "low is {}/low, which"),
        ("sweep", "model", [], "model is {}/model, which"),
        ("analyze", "model", [], "model is {}/model, which"),
    ],
)
def test_what_a_command_reads_is_not_its_output(
    places: Path, monkeypatch: Any, capfd: Any, command: str, output: str, more: list[str], said: str
) -> None:
    (places / "measured").mkdir(exist_ok=True)
    if not (places / "link").exists():
        (places / "link").symlink_to(places / "model")
    before = {path: path.stat().st_mtime_ns for path in places.rglob("*")}
    words = [command, places / "model", "--task", "cola", "--data-dir", places / "cola", "--output", places / output]
    words += [] if command == "sweep" else ["--overwrite"]
    error = refused(monkeypatch, capfd, [*words, *(places / word if "--" not in word else word for word in more)])
    assert said.format(places) in error
    assert {path: path.stat().st_mtime_ns for path in places.rglob("*")} == before


@pytest.mark.parametrize("more", [[], ["--record"]])
@pytest.mark.parametrize(
    "plot", ["low/model.safetensors", "low/compression.json", "model/config.json", "model", "link"]
)
def test_a_picture_takes_no_place_of_a_model(
    places: Path, monkeypatch: Any, capfd: Any, plot: str, more: list[str]
) -> None:
    if not (places / "link").exists():
        (places / "link").symlink_to(places / "model")
    before = {path: path.stat().st_mtime_ns for path in places.rglob("*")}
    words = ["bench", places / "low", "--against", places / "model", "--plot", places / plot, *more]
    assert "which this command reads; choose another output" in refused(monkeypatch, capfd, words)
    assert {path: path.stat().st_mtime_ns for path in places.rglob("*")} == before


def test_densifying_in_place_is_refused(places: Path, monkeypatch: Any, capfd: Any) -> None:
    error = refused(monkeypatch, capfd, ["densify", places / "low", places / "low", "--overwrite"])
    assert "low is " in error
    assert (places / "low/model.safetensors").is_file()


def test_others_may_read_a_model_and_statistics(places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    before = os.umask(0o022)
    try:
        for name in ("compress", "statistics"):
            words = commands(places, tmp_path / name)[name]
            assert run(monkeypatch, capfd, *words, "--samples", 4)[0] == 0
    finally:
        os.umask(before)
    for name in ("compress", "statistics"):
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / name).rglob("*") if path.is_file()}
        assert modes == {0o644}
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o755


@pytest.mark.slow
def test_a_fine_tuning_killed_while_it_saves_goes_on(places: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*commands(places, out)["finetune"], "--epochs", 1]
    job = Job(tmp_path / "job", hf_lowrank, *words).until(out)
    job.kill()
    assert job.wait() == [-9]
    assert (tmp_path / "out.checkpoints/saving").exists()
    Job(tmp_path / "job", hf_lowrank, *words, "--resume").done()
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out"]
