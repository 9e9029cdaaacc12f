"""Random Llamas of several depths, compressed block by block from disk to disk → peak memory, and time.

The shallowest is measured freely. The deeper ones run under a limit on the data that a process may have (RLIMIT_DATA:
all private memory, without the cache of files) that is 5% above what the shallowest took: a regression fails. It holds
until all factors are there: while the output is written, weight files that are mapped several times count as data, but
take no memory. With a --cache what is done stays there: a run that was killed goes on, its figures being those of all
its parts.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Options, Result, Row
from benchmarks.memory import MEGABYTE, Peak
from hf_lowrank import CompressionConfig, compress, compute_statistics
from hf_lowrank.folder.loading import unmapped
from hf_lowrank.folder.saving import save_compressed
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.files import write_json
from hf_lowrank.model.blocks import blocks_on_disk
from hf_lowrank.model.weightless import weightless
from hf_lowrank.statistics.batches import Marks
from hf_lowrank.statistics.blockwise import statistics_by_blocks

DEPTHS, WIDTH, GROWTH = (8, 16, 32, 64), 1024, 1.05
SAMPLES, BATCH, LENGTH, VOCABULARY = 8, 4, 32, 2000
INTERVAL = 0.005  # seconds between two looks at the memory
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def run(options: Options) -> Result:
    """Peak memory at every depth, the last ones under the limit; and of the whole model at the smallest depth."""
    with ExitStack() as stack:
        folder = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = {DEPTHS[0]: measured(folder, DEPTHS[0], options.threads)}
        whole = measured(folder, DEPTHS[0], options.threads, whole=True)
        limit = GROWTH * found[DEPTHS[0]]["data"]
        found |= {depth: measured(folder, depth, options.threads, limit) for depth in DEPTHS[1:]}
    rows = [row(str(depth), figures, found[DEPTHS[0]]) for depth, figures in found.items()]
    rows.append(row(f"{DEPTHS[0]}, whole in memory", whole, found[DEPTHS[0]]))
    notes = [
        f"Random Llamas of width {WIDTH} in bfloat16, compressed by the default in float32; {SAMPLES} samples of "
        f"{LENGTH} tokens. Private memory: all of a process but the cache of files (RssAnon); code and libraries "
        f"included. From {DEPTHS[1]} blocks on under a limit of {limit / MEGABYTE:.0f} MiB of data.",
    ]
    return Result("blockwise: peak memory of compress by depth", rows, notes, {"cases": found, "whole": whole})


def row(name: str, figures: dict[str, float], first: dict[str, float]) -> Row:
    return {
        "blocks": name,
        "weights in bf16, MiB": f"{figures['weights'] / MEGABYTE:.0f}",
        "peak private memory, MiB": f"{figures['anonymous'] / MEGABYTE:.0f}",
        "over the first": f"{figures['anonymous'] / first['anonymous'] - 1:+.1%}",
        "CPU s": f"{figures['seconds']:.0f}",
        "CPU s a block": f"{figures['seconds'] / figures['blocks']:.1f}",
    }


def measured(folder: Path, depth: int, threads: int, limit: float = 0, whole: bool = False) -> dict[str, float]:
    """The figures of one job, in a process of its own, or as they are in the folder already.

    Raises:
        CalledProcessError: it failed, for example under the limit.
    """
    model, name = folder / f"llama-{depth}", _name(depth, whole)
    done = folder / f"{name}.json"
    if not done.is_file():
        if not (model / "config.json").is_file():
            random_llama(depth, WIDTH, model)
        words = ["--depth", depth, "--folder", folder, "--threads", threads, "--limit", int(limit)]
        command = [sys.executable, "-m", "benchmarks.blockwise", *map(str, words), *["--whole"] * whole]
        answer = subprocess.run(command, env=os.environ | AT_ONCE, stdout=subprocess.PIPE, text=True, check=True)
        done.write_text(answer.stdout.splitlines()[-1])
        for left in folder.glob(f"{name}*/"):
            shutil.rmtree(left)
    return json.loads(done.read_text())


def _name(depth: int, whole: bool) -> str:
    return f"{'whole' if whole else 'blocks'}-{depth}"


def random_llama(depth: int, width: int, folder: Path, vocabulary: int = VOCABULARY) -> None:
    """A Llama of the usual proportions in bfloat16, saved in shards."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_attention_heads": width // 64}
    config = LlamaConfig(**sizes, num_hidden_layers=depth, vocab_size=vocabulary, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
    torch.set_default_dtype(torch.float32)


def job(folder: Path, depth: int, whole: bool) -> dict[str, float]:
    """Compress a Llama by the default; if that was begun in this folder, go on."""
    name = folder / f"llama-{depth}"
    output, work = (folder / f"{_name(depth, whole)}{ending}" for ending in ("", ".work"))
    config = CompressionConfig()
    weights = sum(path.stat().st_size for path in name.glob("*.safetensors"))
    with Peak(Spent(folder / f"{_name(depth, whole)}.spent"), INTERVAL) as peak:
        marks = Marks()
        model = load(name, whole)
        batches = token_batches(model.config.vocab_size)
        kept = Work.open(work, {"depth": depth}, resume=True)
        measure = compute_statistics if whole else statistics_by_blocks
        rest: Any = {"labels": "model", "marks": marks, "work": kept, "progress": False}
        statistics = measure(model, batches, config.needs, **rest)
        _tell("statistics", peak)
        model, report = compress(model, config, statistics, False, work=kept, batches=marks, labels="model")
        _tell("factors", peak)
        until = peak.seen["data"]
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
        save_compressed(model, None, report, output, True, torch.bfloat16)
    return {"weights": weights, "blocks": depth, **peak.seen, "data": until}


def _tell(what: str, peak: Peak) -> None:
    figures = ", ".join(f"{name} {size / MEGABYTE:.0f} MiB" for name, size in peak.seen.items() if name != "seconds")
    print(f"{what} after {peak.seen['seconds']:.0f} s of CPU, until then at most {figures}", file=sys.stderr)


def load(name: Path, whole: bool) -> Any:
    config = LlamaConfig.from_pretrained(name)
    skeleton = weightless(LlamaForCausalLM._from_config, config)
    places = {} if whole else {"device_map": blocks_on_disk(skeleton, torch.device("cpu"))}
    with unmapped():
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **places)


def token_batches(vocabulary: int, samples: int = SAMPLES, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)]


class Spent:
    """What this process has taken of memory and CPU, at most, with what is known of earlier ones that were killed.

    It is kept in a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = json.loads(path.read_text()) if path.is_file() else {}
        self._earlier = self.known.get("seconds", 0.0) - time.process_time()
        self._written = time.monotonic()

    def __call__(self) -> dict[str, float]:
        now = private() | {"seconds": self._earlier + time.process_time()}
        self.known = {name: max(size, self.known.get(name, 0.0)) for name, size in now.items()}
        if time.monotonic() > self._written + 1:
            write_json(self.path, self.known)
            self._written = time.monotonic()
        return self.known


def private() -> dict[str, float]:
    """The private memory of this process in bytes, resident and asked for."""
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: 1024.0 * int(words[key].split()[0]) for key, name in (("RssAnon", "anonymous"), ("VmData", "data"))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    for option in ("--depth", "--threads", "--limit"):
        parser.add_argument(option, type=int, default=0)
    parser.add_argument("--whole", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads or 1)
    if given.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (given.limit, resource.RLIM_INFINITY))
    print(json.dumps(job(given.folder, given.depth, given.whole)))
