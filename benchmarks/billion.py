"""A Llama of 1.1 billion random weights, compressed by the command from disk to disk under 3 GB → peak memory, time.

Its weights are made on disk, block by block. All memory of the process that is resident is watched, pages of files
included: one that passes the limit is ended at once. Fewer blocks of the same shape are compressed both ways, for the
time against a model that is in memory whole.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harness import Options, Result, Row
from hf_lowrank.jobs.files import read_json, write_json
from hf_lowrank.model.weightless import weightless

BLOCKS, FEW, LIMIT = 22, 2, 3 * 10**9
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}  # of TinyLlama
SAMPLES, LENGTH = 4, 128
INTERVAL, GIGABYTE = 0.02, 10**9  # seconds between two looks at the memory


def run(options: Options) -> Result:
    """The whole depth under the limit, and a few blocks of it both ways."""
    with ExitStack() as stack:
        folder = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        few = {how: compressed(folder, FEW, how, options.threads) for how in ("on", "off")}
        all_blocks = compressed(folder, BLOCKS, "on", options.threads, LIMIT)
    times = few["on"]["seconds"] / few["off"]["seconds"]
    rows = [
        row(f"{BLOCKS} blocks, under {LIMIT / GIGABYTE:.0f} GB", all_blocks),
        row(f"{FEW} blocks, block by block", few["on"]),
        row(f"{FEW} blocks, whole in memory", few["off"]),
    ]
    notes = [
        f"hf-lowrank compress --texts by the default, {SAMPLES} samples of {LENGTH} tokens; random weights in bfloat16 "
        f"({all_blocks['weights'] / GIGABYTE:.2f} GB), computed with in float32. Resident: with pages of files "
        "(VmHWM), which the limit is for; private: without (RssAnon). CPU: all of the process, with imports.",
        f"Block by block takes {times:.2f} times the CPU time of the whole model.",
    ]
    return Result(
        "billion: a Llama of 1.1 billion weights in 3 GB", rows, notes, {"few": few, "all": all_blocks, "ratio": times}
    )


def row(name: str, figures: dict[str, float]) -> Row:
    return {
        "model": name,
        "peak resident, GB": f"{figures['VmHWM'] / GIGABYTE:.2f}",
        "peak private, GB": f"{figures['RssAnon'] / GIGABYTE:.2f}",
        "CPU s": f"{figures['seconds']:.0f}",
        "CPU s a block": f"{figures['seconds'] / figures['blocks']:.0f}",
    }


def compressed(folder: Path, blocks: int, how: str, threads: int, limit: int = 0) -> dict[str, float]:
    """The figures of `--blockwise` on or off, as they are in the folder, or by a job that begins or goes on there.

    Raises:
        CalledProcessError: it failed, for example under the limit.
    """
    model, output = folder / f"llama-{blocks}", folder / f"{how}-{blocks}"
    done = folder / f"{how}-{blocks}.json"
    if not done.is_file():
        if not (model / "texts.txt").is_file():
            make(model, blocks)
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        found = watched(command(model, output, how), threads, limit, folder / f"{how}-{blocks}.spent")
        write_json(done, {"blocks": blocks, "weights": weights, **found})
        shutil.rmtree(output)
    return read_json(done)


def command(model: Path, output: Path, how: str) -> list[str]:
    words = ["compress", model, "--texts", model / "texts.txt", "--output", output, "--blockwise", how]
    words += ["--samples", SAMPLES, "--max-length", LENGTH, "--resume", "--overwrite"]
    return [sys.executable, "-m", "hf_lowrank", *map(str, words)]


def watched(words: list[str], threads: int, limit: int, kept: Path) -> dict[str, float]:
    """The most of what the system says of the memory of a process, and its CPU seconds, with those `kept` of earlier.

    Raises:
        CalledProcessError: it failed.
    """
    earlier: dict[str, float] = read_json(kept) if kept.is_file() else {}
    seen = dict.fromkeys(("VmHWM", "RssAnon", "seconds"), 0.0) | earlier
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    job = subprocess.Popen(words, env=environment)
    looks = 0
    while job.poll() is None:
        looks += 1
        _look(job.pid, seen, earlier.get("seconds", 0.0))
        if limit and seen["VmHWM"] > limit:
            job.kill()
        if looks % 50 == 0:
            write_json(kept, seen)
        time.sleep(INTERVAL)
    if job.returncode:
        raise subprocess.CalledProcessError(job.returncode, words)
    return seen


def _look(pid: int, seen: dict[str, float], earlier: float) -> None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:  # it has ended
        return
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in seen:
            seen[name] = max(seen[name], 1024.0 * int(value.split()[0]))
    if sum(map(int, ticks)):
        seen["seconds"] = earlier + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def make(folder: Path, blocks: int) -> None:
    """A Llama of random weights with a tokenizer and texts; no more than a block of it is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**SHAPE, num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    torch.manual_seed(0)
    places: dict[str, str] = {}
    for number, tensors in enumerate(_parts(weightless(LlamaForCausalLM._from_config, config).state_dict())):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    _save_tokenizer(folder)
    _save_texts(folder / "texts.txt")


def _parts(empty: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Random weights, those of a block at a time."""
    owners = {name: ".".join(name.split(".")[:3]) if ".layers." in name else name for name in empty}
    for owner in dict.fromkeys(owners.values()):
        yield {name: _random(name, empty[name].shape) for name, its in owners.items() if its == owner}


def _random(name: str, shape: torch.Size) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16) if "norm" in name else (0.02 * torch.randn(shape)).bfloat16()


def _save_tokenizer(folder: Path) -> None:
    words = {"<unk>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


def _save_texts(path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, SHAPE["vocab_size"], (2 * SAMPLES, 2 * LENGTH), generator=generator)
    path.write_text("".join(" ".join(f"w{word}" for word in row) + "\n" for row in rows.tolist()))
