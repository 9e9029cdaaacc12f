"""The application that commands are registered with, and its entry point.

The modules of commands say what options there are and import the library when they are called: it takes seconds, and
help or a mistyped word should not.
"""

import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from hf_lowrank import __version__
from hf_lowrank.cli.groups import with_groups
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.imports import after_import
from hf_lowrank.jobs.interrupts import Stopped, ending_in_order

GRACE = 3.0  # seconds

# Loggers of libraries that warn of what they can do without, those of quantizers wherever one is installed.
NOTICES = ("huggingface_hub", "torchao", "bitsandbytes", "torch.utils._pytree", "accelerate.big_modeling")


class _Group(TyperGroup):
    """The commands, and `--version`: not a parsed option, as parsing one takes Typer a quarter of the time of help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] == ["--version"]:
            typer.echo(f"hf-lowrank {__version__}")
            raise typer.Exit
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="hf-lowrank",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make Hugging Face transformers smaller by importance-weighted low-rank factorization.\n\n"
    "Start with [bold]hf-lowrank demo[/bold], which needs no download. [bold]hf-lowrank --version[/bold] says which "
    "version this is.",
)


def command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the command `name`; its parameters may be dataclasses of options (see `with_groups`)."""
    return lambda function: app.command(name)(with_groups(function))


def main() -> None:
    """Entry point: bad input ends with one line on stderr and exit code 2, Ctrl-C with 130, SIGTERM with 143."""
    _quiet_libraries()
    try:
        with ending_in_order():
            if "WORLD_SIZE" in os.environ:
                from hf_lowrank.jobs.distributed import start_processes  # here: it takes time to import

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
        print(f"hf-lowrank: {in_options(str(error), sys.argv[1:])}", file=sys.stderr)
        _leave(2)
    except SystemExit as end:
        if not end.code and "WORLD_SIZE" in os.environ:
            from accelerate import PartialState

            PartialState().destroy_process_group()
        raise


def in_options(message: str, words: list[str]) -> str:
    """A message of the library, which speaks of arguments, in the words of the command that was called.

    Names of two words alone, such as max_length: others may mean something else.
    """
    command: Any = typer.main.get_command(app)
    called = command.commands.get(words[0]) if words else None
    options = {option.name: option.opts[0] for option in called.params if "_" in option.name} if called else {}
    options |= {f"{name}s": said for name, said in options.items()}  # what may be repeated is several arguments
    named = "|".join(map(re.escape, options))
    return re.sub(rf"(?<![\w./'-])({named})(?![\w/'=])", lambda m: options[m[1]], message) if named else message


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
    after_import("transformers.utils.logging", _quiet_transformers)
    after_import("datasets", _quiet_datasets)
    for name in NOTICES:
        logging.getLogger(name).setLevel(logging.ERROR)


def _quiet_transformers() -> None:
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()


def _quiet_datasets() -> None:
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it cannot read is told by our own error
    datasets.disable_progress_bars()
