"""Results of steps → one JSON file each, whole or absent, read back only for the same settings."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.claims import differences
from hf_lowrank.jobs.files import read_json, write_json
from hf_lowrank.studies.experiment.recipe import Settings

Record = dict[str, Any]


class Store:
    """The records in a folder, by name. Only the main process writes; all of them read the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "records"

    def get(self, name: str, settings: Settings) -> Record | None:
        """The record of a step, or None if it is still to be made.

        Raises:
            LowRankError: it was made with other settings; the message names the first that differs.
        """
        PartialState().wait_for_everyone()
        path = self.path(name)
        if not path.is_file():
            return None
        record: Record = read_json(path)
        for part, before, now in differences(record.get("settings"), settings):
            raise LowRankError(
                f"{path} was made with {part} {before!r}, and the recipe says {now!r}; "
                "choose another --output, or delete the file"
            )
        return record

    def add(self, name: str, settings: Settings, facts: Record) -> Record:
        """Keep the result of a step."""
        record = {"settings": settings, **facts}
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.path(name), record)
        PartialState().wait_for_everyone()
        return record

    def path(self, name: str) -> Path:
        """Where the record of a step is kept."""
        return self.folder / f"{name}.json"
