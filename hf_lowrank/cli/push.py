"""hf-lowrank push: from a compressed model's folder to a repository on the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption


@command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="A folder with a compressed model.", metavar="DIR")],
    repo_id: Annotated[str, typer.Argument(help="The repository, such as me/bert-stsb-lowrank.", metavar="REPO")],
    private: Annotated[bool, typer.Option("--private", help="Only you can see it, if it is made now.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to; made if need be.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a compressed model on the Hub: weights, code, tokenizer and model card in one commit.

    The token is the one of 'hf auth login', or HF_TOKEN. Example: hf-lowrank push ./bert-stsb-lowrank me/bert-stsb
    """
    from hf_lowrank.folder.hub import push_folder

    address = push_folder(folder, repo_id, private or None, revision, create_pr, message)
    if as_json:
        return print_json({"repository": repo_id, "address": address})
    console.print(f"pushed to {repo_id}: {address}", highlight=False)
