"""Speed of statistics and factorization on two processes relative to one, one thread each."""

import json
import os
import subprocess
import sys
import time

import torch
from accelerate import PartialState

from benchmarks.harness import Options, Result, Row, Spread, ratio
from benchmarks.models import random_batches, random_bert
from hf_lowrank import CompressionConfig, compress, compute_statistics
from hf_lowrank.jobs.distributed import from_everyone, start_processes

PROCESSES = (1, 2)
LAYERS, HIDDEN, VOCABULARY = 4, 384, 1000
SAMPLES, BATCH_SIZE = 160, 16
STAGES = ("statistics", "factorization", "both")


def run(options: Options) -> Result:
    """Seconds of each stage on one process and on two, taking turns."""
    rounds = [{processes: _start(processes) for processes in PROCESSES} for _ in range(options.rounds)]
    notes = [
        f"BERT of {LAYERS} layers, {HIDDEN}/{4 * HIDDEN}, randomly initialised; {SAMPLES} samples of 16 to 64 tokens; "
        "method kfac at a rank ratio of 0.33, greedy. Starting processes and loading are not counted.",
        "Wall: as the clock on the wall says, which needs a free core for each process. CPU: the time that the busiest "
        "process computed, which tells how evenly work is divided whatever else the machine does.",
    ]
    rows = [_row(stage, clock, rounds) for stage in STAGES for clock in ("wall", "CPU")]
    return Result("scaling: two processes against one, one thread each", rows, notes, {"rounds_measured": rounds})


def _row(stage: str, clock: str, rounds: list[dict[int, dict[str, float]]]) -> Row:
    one, two = ([measured[processes][f"{stage}, {clock}"] for measured in rounds] for processes in PROCESSES)
    return {
        "stage": stage,
        "clock": clock,
        "1 process, s": Spread(tuple(one)).text(),
        "2 processes, s": Spread(tuple(two)).text(),
        "speed-up": ratio(one, two).text(),
    }


def _start(processes: int) -> dict[str, float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    answer = subprocess.run(
        [sys.executable, *launcher, "-m", "benchmarks.scaling"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def measure() -> dict[str, float]:
    """Seconds of each stage on this process, by the wall and of CPU."""
    state = PartialState()
    model = random_bert(LAYERS, HIDDEN, VOCABULARY)
    mine = random_batches(SAMPLES, BATCH_SIZE, VOCABULARY)[state.process_index :: state.num_processes]
    config = CompressionConfig("kfac", 0.33)
    compute_statistics(model, mine[-1:], config.needs, progress=False)  # what is done once in a process
    state.wait_for_everyone()
    begun = _clocks()
    statistics = compute_statistics(model, mine, config.needs, progress=False)
    state.wait_for_everyone()
    between = _clocks()
    compress(model, config, statistics, progress=False)
    ended = _clocks()
    spans = ((begun, between), (between, ended), (begun, ended))
    return {
        f"{stage}, {clock}": end[clock] - start[clock]
        for stage, (start, end) in zip(STAGES, spans, strict=True)
        for clock in start
    }


def _clocks() -> dict[str, float]:
    return {"wall": time.perf_counter(), "CPU": time.process_time()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_processes()
    everyone = from_everyone(measure())
    if PartialState().is_main_process:
        print(json.dumps({name: max(each[name] for each in everyone) for name in everyone[0]}))
    PartialState().destroy_process_group()
