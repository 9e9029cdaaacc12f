"""hf-lowrank card: the model card of a compressed model, rendered again from its record."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.console import console
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.files import read_json, write_json


@command("card")
def card_command(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder with compression.json or record.json, the record of a compression.", metavar="DIR"
        ),
    ],
    license_name: Annotated[
        str | None, typer.Option("--license", help="As the Hub spells it, such as apache-2.0. Default: the base's.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Such as en; may be repeated. Default: the base's.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base's name on the Hub, where it was compressed from a folder.")
    ] = None,
) -> None:
    """Write the model card (README.md) of a compressed model again, from the record of its making.

    Replaces one that was edited. What the options say is kept in the record, for later cards too.

    Example: hf-lowrank card ./bert-stsb-lowrank --license apache-2.0 --language en --base-model me/bert-stsb
    """
    from hf_lowrank.folder.card import with_rights, write_card
    from hf_lowrank.nn.publishing_lowrank import CARD, PICTURE, RECORD

    path = next((path for name in (RECORD, "record.json") if (path := folder / name).is_file()), None)
    if path is None:
        raise LowRankError(f"{folder} has no {RECORD}, the record that compress writes and a card is rendered from")
    record = with_rights(read_json(path), license_name, language, base_model)
    write_card(folder, record, folder.resolve().name)  # first: what cannot be rendered is not kept
    write_json(path, record)
    console.print(f"wrote {CARD} and {PICTURE} into {folder}", highlight=False)
