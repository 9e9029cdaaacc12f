"""Lists of tests, line by line on standard input → their exit codes, each run in a fork that starts at once.

The libraries that the tests import are imported before, once; what is tested never is, so that every run takes it from
the files as they are. A script of its own: `python mutation_server.py FOLDER` runs the tests of a project's folder.
"""

import json
import os
import resource
import signal
import sys
import time
from importlib import import_module
from typing import Any

import pytest

OWN = ("hf_lowrank", "tests", "benchmarks", "conftest", "mutation_server")


def main(folder: str) -> None:
    """Answer requests until there are no more."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _import_libraries()
    for line in sys.stdin:
        os.write(answer, (json.dumps(_in_fork(**json.loads(line))) + "\n").encode())


def _import_libraries() -> None:
    """Whatever the tests import that is not their own."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"])
        with os.fdopen(writing, "w") as names:
            names.write("\n".join(sys.modules))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as names:
        for name in names.read().split("\n"):
            if name.partition(".")[0] not in OWN and not name.startswith("_"):
                _import(name)
    os.wait()


def _import(name: str) -> None:
    try:
        import_module(name)
    except Exception:
        return  # made on the fly, or not meant to be imported


def _in_fork(tests: list[str], seconds: float) -> dict[str, Any]:
    """The exit code of some tests, and their CPU seconds; they end when they have taken `seconds`, or ten times as long
    by the clock."""
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        os._exit(pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]))
    end = time.monotonic() + 10 * seconds
    while not (ended := os.wait4(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    _kill_group(child)
    if not ended[0]:
        ended = os.wait4(child, 0)
    return {"code": os.waitstatus_to_exitcode(ended[1]), "seconds": ended[2].ru_utime + ended[2].ru_stime}


def _kill_group(leader: int) -> None:
    """The tests, and the processes that they have started."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main(sys.argv[1])
