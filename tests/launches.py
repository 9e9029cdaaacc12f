"""The command as a job of its own, of one process or several, on a tiny model and made-up data."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_lowrank import cli
from hf_lowrank.jobs.distributed import start_processes
from tests.helpers import bert_config

WORDS = [f"w{n}" for n in range(40)]
ROOT = Path(__file__).resolve().parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
TIMINGS = ("seconds", "latency", "memory")  # what differs between two runs of the same job

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.launches"])


def make_model(folder: Path, **changes: Any) -> Path:
    """A folder with a tiny classifier and its tokenizer."""
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(num_labels=2, **changes)).save_pretrained(folder)
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def make_data(folder: Path, count: int = 25) -> Path:
    """CoLA-like rows as parquet files, `count` of them to measure on."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", count), ("validation", 10)):
        texts = [" ".join(WORDS[(n * 7 + k) % 40] for k in range(n % 9 + 1)) for n in range(rows)]
        Dataset.from_dict({"sentence": texts, "label": [n % 2 for n in range(rows)]}).to_parquet(
            folder / f"{split}.parquet"
        )
    return folder


class Job:
    """`function(*arguments)` in processes of their own that know each other as those of a launcher do.

    They are forked from a process that has imported everything, so that they start at once.
    """

    def __init__(self, log: Path, function: Callable[..., Any], *arguments: Any, processes: int = 1) -> None:
        self.logs = [log.with_name(f"{log.name}-{rank}.log") for rank in range(processes)]
        port = free_port()
        self.processes = []
        for rank, path in enumerate(self.logs):
            launched = _launched(rank, processes, port) if processes > 1 else {}
            process = _forks.Process(target=_run, args=(path, launched, function, arguments))
            process.start()
            self.processes.append(process)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send every process a signal."""
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def wait(self, timeout: float = 100) -> list[int | None]:
        """The exit codes, minus the signal where one ended it; None where it was killed for being slow."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def until(self, path: Path) -> "Job":
        """Wait until a file is there."""
        wait_for(path)
        return self

    def done(self) -> "Job":
        """Wait for an end without errors."""
        codes = self.wait()
        assert codes == [0] * len(codes), f"{codes}\n{self.printed()}"
        return self

    def printed(self) -> str:
        """What all processes have printed."""
        return "\n".join(path.read_text() for path in self.logs)


def hf_lowrank(*words: Any) -> None:
    """The command, in this process."""
    sys.argv = ["hf-lowrank", *map(str, words)]
    cli.main()


def wait_for(path: Path, timeout: float = 60) -> None:
    """Wait until a file is there, or for so many seconds."""
    end = time.monotonic() + timeout
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.005)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _launched(rank: int, processes: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _run(log: Path, launched: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= launched | QUIET
    torch.set_num_threads(1)
    if launched:
        start_processes()
    function(*arguments)


def launch(words: list[Any], *launcher: str) -> subprocess.Popen[str]:
    """`hf-lowrank words…` started by a real launcher, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "hf_lowrank", *map(str, words)],
        env=os.environ | QUIET | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def content(folder: Path) -> dict[str, Any]:
    """Every file of a result, but for what only tells how long it took."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(files.pop("compression.json"))
    record.get("fingerprint", {}).pop("output", None)  # rounded as the memory happens to be aligned
    files.pop("README.md", None)  # it shows the folder's name
    for part in (record, *record["layers"]):
        for key in TIMINGS:
            part.pop(key, None)
    return files | {"compression.json": record}
