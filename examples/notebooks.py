"""The scripts of this folder → the same as notebooks: `python examples/notebooks.py`. Needs the extra `docs`."""

from pathlib import Path

import jupytext
import nbformat

SCRIPTS = ("classifier", "embeddings", "language_model")
HERE = Path(__file__).resolve().parent


def notebook(name: str) -> nbformat.NotebookNode:
    """The notebook of a script, the same every time."""
    made = jupytext.read(HERE / f"{name}.py")
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made.metadata = nbformat.from_dict({"kernelspec": kernel})
    return made


if __name__ == "__main__":
    for name in SCRIPTS:
        nbformat.write(notebook(name), HERE / f"{name}.ipynb")
