"""Measurements as they come → lines of a file, so that work that was interrupted goes on where it was."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.claims import differences

FORMAT_VERSION = 1


class Journal:
    """Records by key, each one on disk (JSON lines) as soon as it is there.

    The first line says what all of them depend on; a line that was cut off by a crash is forgotten.

    Args:
        path: the file, made when the first record comes; None keeps the records in memory.
        settings: what the records depend on, plain values by name.

    Raises:
        LowRankError: the file was written with other settings; the message names the first that differs.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, {"format_version": FORMAT_VERSION, **settings}
        self.records: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            self._read(path)

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a key, or None."""
        return self.records.get(_text(key))

    def add(self, key: Mapping[str, Any], record: dict[str, Any]) -> None:
        """Keep a record, on disk before this returns."""
        self.records[_text(key)] = record
        if self.path is None:
            return
        new = not self.path.is_file()
        with self.path.open("a", encoding="utf-8") as file:
            if new:
                file.write(_text({"settings": self.settings}) + "\n")
            file.write(_text({"key": dict(key), "record": record}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            settings = lines[0]["settings"] if lines else self.settings
            self.records = {_text(line["key"]): line["record"] for line in lines[1:]}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise LowRankError(f"{path} is damaged ({error}); begin anew with --overwrite") from None
        for name, then, now in differences(settings, self.settings):
            raise LowRankError(
                f"{path} holds measurements with another {name.replace('_', ' ')}: {then!r} then, {now!r} now; "
                "choose another folder, or begin anew with --overwrite"
            )
        if whole != text:
            os.truncate(path, len(whole.encode()))
        if not lines:
            path.unlink()


def plain(value: Any) -> Any:
    """`value` with every number that JSON has no word for (NaN, infinity) as None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
