"""Importance-weighted low-rank factorization of Hugging Face transformers.

model + task data → statistics (Fisher …) → ranks → factors → replace → (fine-tune) → save / push → from_pretrained →
evaluate

Importing this registers the Auto classes: at once, or where transformers is not imported yet, together with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.imports import after_import, lazily

if TYPE_CHECKING:
    from hf_lowrank.compression.compress import compress
    from hf_lowrank.compression.config import CompressionConfig
    from hf_lowrank.compression.report import CompressionReport
    from hf_lowrank.folder.directions import shrink_saved
    from hf_lowrank.folder.hub import push_folder
    from hf_lowrank.nn.configuration_lowrank import LowRankConfig
    from hf_lowrank.nn.layers_lowrank import LowRankLinear
    from hf_lowrank.pipeline import Pipeline
    from hf_lowrank.solvers.family import METHODS
    from hf_lowrank.statistics.collect import compute_fisher, compute_statistics
    from hf_lowrank.statistics.container import Statistics
    from hf_lowrank.training.heal import heal

__version__ = "0.2.0"

__all__ = [
    "METHODS",
    "CompressionConfig",
    "CompressionReport",
    "LowRankConfig",
    "LowRankError",
    "LowRankLinear",
    "Pipeline",
    "Statistics",
    "compress",
    "compute_fisher",
    "compute_statistics",
    "heal",
    "push_folder",
    "shrink_saved",
]

__getattr__ = lazily(
    __name__,
    {
        "METHODS": "solvers.family",
        "CompressionConfig": "compression.config",
        "CompressionReport": "compression.report",
        "LowRankConfig": "nn.configuration_lowrank",
        "LowRankLinear": "nn.layers_lowrank",
        "Pipeline": "pipeline",
        "Statistics": "statistics.container",
        "compress": "compression.compress",
        "compute_fisher": "statistics.collect",
        "compute_statistics": "statistics.collect",
        "heal": "training.heal",
        "push_folder": "folder.hub",
        "shrink_saved": "folder.directions",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import_config() -> None:
    import_module("hf_lowrank.nn.configuration_lowrank")  # which may be what is importing transformers


def _register_config() -> None:
    from hf_lowrank.nn.configuration_lowrank import register

    register()


def _register_card_writer() -> None:
    from hf_lowrank.nn.publishing_lowrank import on_push

    on_push(_write_card)


def _write_card(*pushed: Any) -> bool:
    from hf_lowrank.folder.hub import card_from_report

    return card_from_report(*pushed)


after_import("hf_lowrank.nn.configuration_lowrank", _register_config)
after_import("transformers.models.auto.configuration_auto", _import_config)
after_import("hf_lowrank.nn.publishing_lowrank", _register_card_writer)
