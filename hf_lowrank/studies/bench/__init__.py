"""Speed and memory of a saved low-rank model beside its dense form, measured in turns in one process."""

from hf_lowrank.studies.bench.record import BenchRecord, Case
from hf_lowrank.studies.bench.run import BenchConfig, bench

__all__ = ["BenchConfig", "BenchRecord", "Case", "bench"]
