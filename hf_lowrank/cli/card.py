"""hf-lowrank card: the model card of a compressed model, rendered again from its record."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import app
from hf_lowrank.cli.console import console
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.files import read_json


@app.command("card")
def card_command(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder with compression.json or record.json, the record of a compression.", metavar="DIR"
        ),
    ],
) -> None:
    """Write the model card (README.md) of a compressed model again, from the record of its making.

    Replaces one that was edited. Example: hf-lowrank card ./bert-stsb-lowrank
    """
    from hf_lowrank.folder.card import write_card
    from hf_lowrank.nn.publishing_lowrank import CARD, PICTURE, RECORD

    path = next((path for name in (RECORD, "record.json") if (path := folder / name).is_file()), None)
    if path is None:
        raise LowRankError(f"{folder} has no {RECORD}, the record that compress writes and a card is rendered from")
    write_card(folder, read_json(path), folder.resolve().name)
    console.print(f"wrote {CARD} and {PICTURE} into {folder}", highlight=False)
