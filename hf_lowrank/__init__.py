"""Importance-weighted low-rank factorization of Hugging Face transformers.

model + task data → statistics (Fisher …) → ranks → factors → replace → (fine-tune) → save / push → from_pretrained →
evaluate
"""

from hf_lowrank.compression.compress import CompressionConfig, compress
from hf_lowrank.compression.report import CompressionReport
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.hub import push_folder
from hf_lowrank.nn.configuration_lowrank import LowRankConfig
from hf_lowrank.nn.layers_lowrank import LowRankLinear
from hf_lowrank.nn.modeling_lowrank import register
from hf_lowrank.solvers import METHODS
from hf_lowrank.statistics import Statistics, compute_fisher, compute_statistics

register()

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CompressionConfig",
    "CompressionReport",
    "LowRankConfig",
    "LowRankError",
    "LowRankLinear",
    "Statistics",
    "compress",
    "compute_fisher",
    "compute_statistics",
    "push_folder",
]
