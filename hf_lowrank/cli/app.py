"""The application that commands are registered with, and its entry point."""

import logging
import os
import sys

import datasets
import transformers
import typer

from hf_lowrank.errors import LowRankError

app = typer.Typer(
    name="hf-lowrank",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Make Hugging Face transformers smaller by importance-weighted low-rank factorization. Start with "
    "[bold]hf-lowrank demo[/bold], which needs no download.",
)


def main() -> None:
    """Entry point: bad input ends with one line on stderr and exit code 2, Ctrl-C with 130."""
    _quiet_libraries()
    try:
        app()
    except LowRankError as error:
        if os.environ.get("HF_LOWRANK_DEBUG"):
            raise
        print(f"hf-lowrank: {error}", file=sys.stderr)
        sys.exit(2)


def _quiet_libraries() -> None:
    """Their bars and notices would drown ours; errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
