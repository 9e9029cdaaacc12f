"""The application that commands are registered with, and its entry point."""

import logging
import os
import sys
import time
import traceback

import datasets
import transformers
import typer
from accelerate import PartialState

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.distributed import start_processes
from hf_lowrank.jobs.interrupts import Stopped, ending_in_order

GRACE = 3.0  # seconds

app = typer.Typer(
    name="hf-lowrank",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Make Hugging Face transformers smaller by importance-weighted low-rank factorization. Start with "
    "[bold]hf-lowrank demo[/bold], which needs no download.",
)


def main() -> None:
    """Entry point: bad input ends with one line on stderr and exit code 2, Ctrl-C with 130, SIGTERM with 143."""
    _quiet_libraries()
    try:
        with ending_in_order():
            if "WORLD_SIZE" in os.environ:
                start_processes()
            _run()
    except Stopped as stop:
        if not _is_other_process():
            print(f"hf-lowrank: {stop}", file=sys.stderr)
        _leave(128 + stop.number)
    except Exception:
        if "WORLD_SIZE" not in os.environ:
            raise
        traceback.print_exc()
        _leave(1)


def _run() -> None:
    try:
        app()
    except LowRankError as error:
        if os.environ.get("HF_LOWRANK_DEBUG"):
            raise
        if _is_other_process():
            time.sleep(GRACE)  # if the main process says the same, the launcher ends this one meanwhile
        print(f"hf-lowrank: {error}", file=sys.stderr)
        _leave(2)
    except SystemExit as end:
        if not end.code and "WORLD_SIZE" in os.environ:
            PartialState().destroy_process_group()
        raise


def _leave(code: int) -> None:
    """End; among several processes at once, since an orderly end would wait for the others."""
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_other_process() -> bool:
    return int(os.environ.get("RANK", 0)) > 0


def _quiet_libraries() -> None:
    """Their bars and notices would drown ours; errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
