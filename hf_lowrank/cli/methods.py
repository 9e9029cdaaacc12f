"""hf-lowrank methods: the family of objectives."""

from hf_lowrank.cli.app import command
from hf_lowrank.cli.family import print_methods


@command("methods")
def methods_command() -> None:
    """List the methods: what each one minimises, what it needs and costs, where it comes from."""
    print_methods()
