"""The command's words that need no model → their CPU time, beyond that of starting Python."""

import resource
import subprocess
import sys

from benchmarks.harness import Options, Result, Spread

WORDS = (
    "--help",
    "--version",
    "methods",
    "compress --help",
    "compres",
    "compress --rank-ration 0.3",
    "compress MODEL --task stsb --output OUT --method fsvd",
)


def run(options: Options) -> Result:
    """Each is run in turn with `python -c pass`, whose time is taken off within every round."""
    spreads = {words: Spread(tuple(_beyond_python(words) for _ in range(options.rounds))) for words in WORDS}
    rows = [
        {"hf-lowrank …": f"`{words}`", "CPU seconds beyond Python's start": spread.text()}
        for words, spread in spreads.items()
    ]
    note = "User and system time of the whole process. Above half a second, something heavy is imported."
    figures = {"seconds": {words: list(spread.values) for words, spread in spreads.items()}}
    return Result("startup: help, names and mistakes", rows, [note], figures)


def _beyond_python(words: str) -> float:
    return _cpu_seconds("-m", "hf_lowrank", *words.split()) - _cpu_seconds("-c", "pass")


def _cpu_seconds(*words: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
