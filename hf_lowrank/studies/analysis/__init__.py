"""model + task data + statistics → why, where and by how much low-rank compression hurts, as plain dataclasses.

`analyze` runs all four studies: group truncation (`truncation`), rank sweep (`rank_sweep`), predictor (`predictor`,
`layers`) and redundancy (a layer's share of the expected loss). Plots of them are in `hf_lowrank.studies.plots`.
"""

from hf_lowrank.studies.analysis.evaluator import Baseline, Evaluator, Measurement
from hf_lowrank.studies.analysis.journal import Journal
from hf_lowrank.studies.analysis.layers import LayerAnalysis, LayerMethod
from hf_lowrank.studies.analysis.predictor import Correlation, FisherShape, effective_rank, fisher_shape
from hf_lowrank.studies.analysis.rank_sweep import SweepPoint
from hf_lowrank.studies.analysis.run import Analysis, AnalysisConfig, analyze, needed_statistics
from hf_lowrank.studies.analysis.truncation import Group, GroupTruncation

__all__ = [
    "Analysis",
    "AnalysisConfig",
    "Baseline",
    "Correlation",
    "Evaluator",
    "FisherShape",
    "Group",
    "GroupTruncation",
    "Journal",
    "LayerAnalysis",
    "LayerMethod",
    "Measurement",
    "SweepPoint",
    "analyze",
    "effective_rank",
    "fisher_shape",
    "needed_statistics",
]
