"""A Llama measured block by block, its files in the system's cache or on the disk alone → what blocks are waited for.

That share of the time is the most that a block read ahead of its turn could spare, on a core that has nothing else to
do. Files leave the cache by `posix_fadvise` before every reading.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import nn

from benchmarks.blockwise import WIDTH, load, random_llama, token_batches
from benchmarks.harness import Options, Result, Row
from hf_lowrank import CompressionConfig
from hf_lowrank.model.blocks import loaded
from hf_lowrank.statistics import blockwise

DEPTH = 4
CASES = {
    "in the cache, 8 samples of 32 tokens": (False, 8, 32),
    "on the disk, 8 samples of 32 tokens": (True, 8, 32),
    "on the disk, 8 samples of 256 tokens": (True, 8, 256),
}


def run(options: Options) -> Result:
    """The statistics of the default three times, for the time within readings and in all."""
    with ExitStack() as stack:
        folder = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        name = folder / f"llama-{DEPTH}"
        if not (name / "config.json").is_file():
            random_llama(DEPTH, WIDTH, name)
        found = {case: measured(name, *settings) for case, settings in CASES.items()}
    rows = [row(case, figures) for case, figures in found.items()]
    notes = [f"A random Llama of {DEPTH} blocks of width {WIDTH} in bfloat16. Wall time."]
    return Result("reading: what blocks from disk wait for", rows, notes, found)


def row(case: str, figures: dict[str, float]) -> Row:
    return {
        "weights": case,
        "blocks read": f"{figures['readings']:.0f}",
        "ms a block": f"{1000 * figures['reading'] / figures['readings']:.0f}",
        "reading and widening, s": f"{figures['reading']:.2f}",
        "statistics, s": f"{figures['seconds']:.2f}",
        "share": f"{figures['reading'] / figures['seconds']:.1%}",
    }


def measured(name: Path, cold: bool, samples: int, length: int) -> dict[str, float]:
    """Seconds in all, and of those that blocks were waited for."""
    model = load(name, whole=False)
    batches, kinds = token_batches(model.config.vocab_size, samples, length), CompressionConfig().needs
    found = {"reading": 0.0, "readings": 0.0}

    @contextmanager
    def timed(*modules: nn.Module) -> Iterator[None]:
        if cold:
            forget(name)
        started = time.perf_counter()
        with loaded(*modules):
            found["reading"] += time.perf_counter() - started
            found["readings"] += len(modules)
            yield

    rest: Any = {"labels": "model", "progress": False}
    with patch.object(blockwise, "loaded", timed):
        started = time.perf_counter()
        blockwise.statistics_by_blocks(model, batches, kinds, **rest)
        return found | {"seconds": time.perf_counter() - started}


def forget(folder: Path) -> None:
    """Let the system's cache of all files in a folder go."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
