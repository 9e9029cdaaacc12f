"""The command `hf-lowrank`: each subcommand calls the library's public functions and prints what they return."""

# ruff: noqa: I001  # commands appear in --help in this order
from hf_lowrank.cli.app import app, main
from hf_lowrank.cli import demo, compress, evaluate, inspect, statistics, methods

__all__ = ["app", "compress", "demo", "evaluate", "inspect", "main", "methods", "statistics"]
