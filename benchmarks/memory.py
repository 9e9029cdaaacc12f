"""Peak memory of `compress` above that of the model and its statistics, in a process of its own."""

import gc
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]
import torch

from benchmarks.harness import Options, Result, Row
from benchmarks.models import random_bert, random_importance
from hf_lowrank import CompressionConfig, Statistics, compress
from hf_lowrank.model.targets import Target, find_targets
from hf_lowrank.nn.layers_lowrank import dense_weight
from hf_lowrank.solvers import get_method
from hf_lowrank.statistics.container import digest

LAYERS, HIDDEN = 12, 768
INTERVAL = 0.001  # seconds between two looks at the memory
MEGABYTE = 2**20


def run(options: Options) -> Result:
    """Memory before and at the peak of `compress`, as PyTorch allocates it and with freed memory given back at once."""
    settings = {
        "default": {},
        "returned at once": {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"},
    }
    measured = {name: _in_own_process(options.threads, extra) for name, extra in settings.items()}
    notes = [
        f"BERT of {LAYERS} layers, {HIDDEN}/{4 * HIDDEN}, randomly initialised, with a random Fisher; method tfwsvd.",
        "Workspace: the peak less the model and the statistics. Under the default allocator freed memory may stay with "
        "the process and be used again; glibc can be told to return it at once, which shows what is really in use.",
        "One layer's: the same for the factorization of the largest layer alone. Once per process: what a first "
        "compression of one block left behind (code, buffers of libraries), not counted in the others.",
    ]
    return Result(
        "memory: peak of compress, MiB",
        [_row(name, figures) for name, figures in measured.items()],
        notes,
        {"cases": measured},
    )


def _in_own_process(threads: int, environment: dict[str, str]) -> dict[str, float]:
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(threads)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def _row(name: str, figures: dict[str, float]) -> Row:
    workspace = figures["peak"] - figures["loaded"]
    return {
        "freed memory": name,
        "model": f"{figures['model']:.0f}",
        "statistics": f"{figures['statistics']:.0f}",
        "peak above the model": f"{workspace + figures['statistics']:.0f}",
        "workspace": f"{workspace:.0f}",
        "one layer's, largest": f"{figures['one layer']:.0f}",
        "that layer in float64": f"{figures['layer']:.0f}",
        "once per process": f"{figures['once']:.0f}",
        "after, above before": f"{figures['after'] - figures['loaded']:.0f}",
    }


def measure() -> dict[str, float]:
    """MiB of the model, the statistics and a layer, and of the process before, at the peak, and after."""
    once = warm_up()
    model = random_bert(LAYERS, HIDDEN)
    targets = find_targets(model)
    statistics = random_statistics(targets)
    sizes = {
        "once": once,
        "model": sum(parameter.nbytes for parameter in model.parameters()) / MEGABYTE,
        "statistics": sum(total.nbytes for total in statistics.sums["fisher"].values()) / MEGABYTE,
        "layer": max(8 * math.prod(target.shape) for target in targets.values()) / MEGABYTE,
    }
    sizes["one layer"] = largest_layer_workspace(targets, statistics)
    del targets
    gc.collect()
    sizes["loaded"] = resident()
    with peak_of_resident() as peak:
        compressed, _ = compress(model, CompressionConfig("tfwsvd"), statistics, progress=False)
    assert compressed is model  # edited in place
    return sizes | {"peak": peak.seen["resident"], "after": resident()}


def warm_up() -> float:
    """MiB that stay after compressing one block: code and buffers that are loaded once in a process."""
    gc.collect()
    before = resident()
    model = random_bert(1, HIDDEN, vocabulary=100)
    compress(model, CompressionConfig("tfwsvd"), random_statistics(find_targets(model)), progress=False)
    del model
    gc.collect()
    return resident() - before


def largest_layer_workspace(targets: dict[str, Target], statistics: Statistics) -> float:
    """MiB that factorizing the largest layer and judging its error takes above the weight and its importance."""
    name = max(targets, key=lambda name: math.prod(targets[name].shape))
    weight = dense_weight(targets[name].module).detach()
    before = resident()
    with peak_of_resident() as peak, torch.no_grad():
        objective = get_method("tfwsvd").objective({"fisher": statistics.mean("fisher", name)})
        objective.error(weight - objective.factorize(weight, round(0.33 * min(weight.shape))).product())
    return peak.seen["resident"] - before


def random_statistics(targets: dict[str, Target]) -> Statistics:
    """A positive Fisher for every target, as if it had been measured on it."""
    fisher = {name: random_importance(*target.shape) for name, target in targets.items()}
    return Statistics({"fisher": fisher}, 1, 1, {name: digest(target.module) for name, target in targets.items()})


def resident() -> float:
    """The resident memory of this process in MiB."""
    return psutil.Process().memory_info().rss / MEGABYTE


def peak_of_resident() -> "Peak":
    """The largest resident memory, by the name "resident"."""
    return Peak(lambda: {"resident": resident()})


class Peak:
    """The largest of each figure of memory within a `with` block, looked at every so many seconds by a thread.

    Args:
        figures: what the memory of this process is now, by name.
        interval: seconds between two looks.
    """

    def __init__(self, figures: Callable[[], dict[str, float]], interval: float = INTERVAL) -> None:
        self.figures, self.interval = figures, interval

    def __enter__(self) -> "Peak":
        self.seen = self.figures()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(self.interval):
            now = self.figures()
            self.seen = {name: max(size, now[name]) for name, size in self.seen.items()}

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(measure()))
