"""The command `hf-lowrank`: each subcommand calls the library's public functions and prints what they return."""

# ruff: noqa: I001  # commands appear in --help in this order
from hf_lowrank.cli.app import app, main
from hf_lowrank.cli import demo, analyze, sweep, compress, shrink, narrow, heal, finetune, experiment, evaluate, inspect
from hf_lowrank.cli import verify, bench, quantize, densify, card, push, export, statistics, methods

__all__ = [
    "analyze",
    "app",
    "bench",
    "card",
    "compress",
    "demo",
    "densify",
    "evaluate",
    "experiment",
    "export",
    "finetune",
    "heal",
    "inspect",
    "main",
    "methods",
    "narrow",
    "push",
    "quantize",
    "shrink",
    "statistics",
    "sweep",
    "verify",
]
