"""Imports that wait: whatever comes first, `import hf_lowrank` registers the Auto classes, and brings nothing heavy.

Every case is a process of its own, as what is imported already would hide the difference.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from hf_lowrank.solvers import OPTIMIZERS
from hf_lowrank.solvers.family import METHODS, OPTIMIZER_NAMES
from hf_lowrank.solvers.methods import OBJECTIVES
from hf_lowrank.statistics import KINDS
from hf_lowrank.statistics.names import KIND_NEEDS
from tests.helpers import factorize, tiny_bert

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "sklearn", "scipy", "matplotlib", "numpy")


def in_a_new_process(code: str, *arguments: str) -> str:
    """What a script prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


LOAD = "AutoModelForSequenceClassification.from_pretrained(sys.argv[1])"
ORDERS = {
    "library first": f"import hf_lowrank; from transformers import AutoModelForSequenceClassification; m = {LOAD}",
    "library last": f"from transformers import AutoModelForSequenceClassification; import hf_lowrank; m = {LOAD}",
    "library in between": "import transformers, hf_lowrank; m = transformers." + LOAD,
    "config alone": "import hf_lowrank; from transformers import AutoConfig; "
    "c = AutoConfig.from_pretrained(sys.argv[1]); from transformers import AutoModelForSequenceClassification; "
    "m = AutoModelForSequenceClassification.from_config(c)",
    "a name of the library": "from hf_lowrank import LowRankLinear; import transformers; m = transformers." + LOAD,
    "in a thread": "import hf_lowrank, threading; r = []; t = threading.Thread(target=lambda: r.append("
    f"__import__('transformers').{LOAD})); t.start(); t.join(); m = r[0]",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved low-rank classifier."""
    path = tmp_path_factory.mktemp("imports") / "model"
    factorize(tiny_bert(num_labels=2)).save_pretrained(path)
    return path


@pytest.mark.parametrize("order", [pytest.param(order, marks=pytest.mark.slow) for order in ORDERS])
def test_a_saved_model_loads_whatever_is_imported_first(folder: Path, order: str) -> None:
    printed = in_a_new_process(f"import sys; {ORDERS[order]}; print(type(m).__module__, type(m).__name__)", str(folder))
    assert printed == "hf_lowrank.nn.modeling_lowrank LowRankBertForSequenceClassification"


@pytest.mark.slow
def test_models_load_and_travel_between_processes(folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "model.pickle"
    in_a_new_process(
        f"import sys, pickle; {ORDERS['library first']}; pickle.dump(m, open(sys.argv[2], 'wb'))",
        str(folder),
        str(pickled),
    )
    name = in_a_new_process(
        "import sys, pickle; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)", str(pickled)
    )
    assert name == "LowRankBertForSequenceClassification"


def test_importing_the_library_imports_nothing_heavy() -> None:
    printed = in_a_new_process(f"import sys, hf_lowrank.cli; print({{*{HEAVY!r}}} & sys.modules.keys())")
    assert printed == "set()"


def test_a_module_that_fails_to_import_is_waited_for_again(tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text("import os\nif 'FAIL' in os.environ: raise ImportError('not now')\n")
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from hf_lowrank.jobs.imports import after_import\n"
        "after_import('fragile', lambda: print('acted')); os.environ['FAIL'] = '1'\n"
        "try: import fragile\nexcept ImportError as error: print(error)\n"
        "del os.environ['FAIL']; import fragile; import fragile\nafter_import('fragile', lambda: print('at once'))"
    )
    assert in_a_new_process(code, str(tmp_path)).splitlines() == ["not now", "acted", "at once"]


@pytest.mark.parametrize("package", ["", ".allocation", ".solvers", ".statistics", ".tasks"])
def test_every_public_name_is_found(package: str) -> None:
    module = import_module(f"hf_lowrank{package}")
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_names_are_those_of_what_they_name() -> None:
    assert tuple(OPTIMIZERS) == OPTIMIZER_NAMES
    assert OBJECTIVES.keys() >= METHODS.keys()
    assert tuple(KINDS) == tuple(KIND_NEEDS)
