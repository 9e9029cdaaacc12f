"""The notebooks are those of the scripts, and run from the first cell to the last. Needs the extra `docs`."""

from pathlib import Path

import pytest

from tests.examples.inputs import NAMES, settings
from tests.launches import ROOT

nbformat = pytest.importorskip("nbformat", reason="notebooks need the extra `docs`")
nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra `docs`")
pytest.importorskip("jupytext", reason="notebooks need the extra `docs`")

from examples.notebooks import notebook  # noqa: E402


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script(name: str) -> None:
    written = nbformat.read(ROOT / f"examples/{name}.ipynb", as_version=4)
    assert written == notebook(name), "write it again: python examples/notebooks.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in settings(name, tmp_path).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook(name), timeout=120, kernel_name="python3").execute()
    assert (tmp_path / "out/model.safetensors").is_file()
