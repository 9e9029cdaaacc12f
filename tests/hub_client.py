"""A process of its own that talks to a loopback Hub with the real client, one piece of Python after the other.

huggingface_hub reads its settings when it is imported, so the tests' own process cannot be the client. One process
serves many tests, as imports take seconds; where they matter, a test starts its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
HIDDEN = "import sys; sys.modules['hf_lowrank'] = None\n"  # every import of the library fails, wherever it is installed
WORKER = """
import contextlib, io, json, os, signal, sys, time, traceback
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # the client waits seconds before it tries again
import torch
torch.set_num_threads(1)
if sys.modules.get("hf_lowrank", 0) is not None:
    import hf_lowrank.cli
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
replies, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    asked = json.loads(line)
    signal.alarm(100)
    out, err, code, error = io.StringIO(), io.StringIO(), 0, ""
    before = dict(os.environ)
    for name, value in asked["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(asked["code"], globals().copy())
        except SystemExit as end:
            code = end.code or 0
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
            traceback.print_exc()
    os.environ.clear(), os.environ.update(before)
    reply = {"out": out.getvalue(), "err": err.getvalue(), "code": code, "error": error}
    print(json.dumps(reply), file=replies, flush=True)
"""


@dataclass(frozen=True)
class Reply:
    """What became of a piece of code: what it printed, its exit code, and its exception in one line."""

    out: str
    err: str
    code: int
    error: str


def environment(url: str, home: Path, token: str | None, **more: str) -> dict[str, str]:
    """Environment variables for a client of the Hub at `url` whose cache is in `home`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "PYTHONPATH": str(ROOT),
    }
    return {**inherited, **settings, **({"HF_TOKEN": token} if token else {}), **more}


def run_script(script: str, env: dict[str, str], cwd: Path, library: bool) -> str:
    """What `script` prints, in a clean process that can or cannot import the library."""
    process = subprocess.run(
        [sys.executable, "-c", ("" if library else HIDDEN) + script],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,  # transformers asks whether to trust the code, and nobody answers
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


class Client:
    """A process that runs what it is sent."""

    def __init__(self, env: dict[str, str], cwd: Path, library: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ("" if library else HIDDEN) + WORKER],
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process:  # closes its pipes and waits for it
            self._process.kill()

    def run(self, code: str, **env: str | None) -> Reply:
        """Run Python code with changed environment variables (None: unset)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"code": code, "env": env}), file=self._process.stdin, flush=True)
        return Reply(**json.loads(self._process.stdout.readline()))

    def command(self, *words: Any, **env: str | None) -> Reply:
        """Run `hf-lowrank words…`."""
        argv = ["hf-lowrank", *map(str, words)]
        return self.run(f"sys.argv = {argv!r}; hf_lowrank.cli.main()", **env)

    def done(self, code: str, **env: str | None) -> str:
        """What the code prints; it must not fail."""
        reply = self.run(code, **env)
        assert not reply.error, reply.err[-4000:]
        return reply.out
