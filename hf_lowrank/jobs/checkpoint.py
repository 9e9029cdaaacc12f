"""What a long job has finished → files that are whole or absent, checked when read, and of this very job."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.claims import differences
from hf_lowrank.jobs.digests import digest_of
from hf_lowrank.jobs.distributed import Result, on_main
from hf_lowrank.jobs.files import read_json, remove_leftovers, scratch_name, space_errors, write_bytes, write_json
from hf_lowrank.jobs.interrupts import MINUTES, kept_in

FORMAT_VERSION = 1
KEY = "job.json"


@dataclass(frozen=True)
class Store:
    """Results by name, each in a safetensors file of its own with its facts and a checksum, in one folder."""

    folder: Path

    def names(self) -> set[str]:
        """Of all results that are there."""
        return {path.name.removesuffix(".safetensors") for path in self.folder.glob("[!.]*.safetensors")}

    def path(self, name: str) -> Path:
        """Where a result is, or would be."""
        return self.folder / f"{name}.safetensors"

    def save(self, name: str, result: Result) -> None:
        """Write a result, whole or not at all.

        Raises:
            LowRankError: there is no room for it.
        """
        tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in result[0].items()}
        facts = json.dumps(result[1])
        with space_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path(name), save(tensors, {"facts": facts, "checksum": _checksum(tensors, facts)}))

    def load(self, name: str) -> Result:
        """Read a result.

        Raises:
            LowRankError: its file is truncated or damaged.
        """
        path = self.path(name)
        try:
            with safe_open(path, "pt") as file:
                noted = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise LowRankError(f"{path} is damaged ({error}); {self._remedy()}") from None
        if noted.get("checksum") != _checksum(tensors, noted.get("facts", "")):
            raise LowRankError(f"{path} is damaged (its checksum is not the recorded one); {self._remedy()}")
        return tensors, json.loads(noted["facts"])

    def _remedy(self) -> str:
        return "delete this file and resume: only what it held is computed again"

    def remove(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _checksum(tensors: Mapping[str, Tensor], facts: str) -> str:
    names = sorted(tensors)
    described = json.dumps([(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names])
    content = digest_of(tensors[name] for name in names)
    return hashlib.blake2b(f"{described}{content}{facts}".encode(), digest_size=16).hexdigest()


@dataclass
class Work:
    """The folder of one job's unfinished work; see `open`."""

    folder: Path
    minutes: float = MINUTES
    last: float = field(default_factory=time.monotonic)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        key: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        minutes: float = MINUTES,
    ) -> "Work":
        """The work of the job described by `key`: begun, or with `resume` continued where there is some.

        Args:
            key: plain facts, nested or not, that decide the result (digests of weights and data, settings, seed).
            overwrite: let go of work that is there, unless it is resumed.
            minutes: between two checkpoints of a pass over the data; 0 writes one after every batch.

        Raises:
            LowRankError: on all processes, if there is work and neither flag is set, or it is another job's: the
                message names what differs.
        """
        folder = Path(folder)
        on_main(lambda: _begin(folder, json.loads(json.dumps(key)), resume, overwrite))
        kept_in(folder)
        return cls(folder, minutes)

    def store(self, name: str) -> Store:
        """Results of one sort."""
        return Store(self.folder / name)

    def due(self) -> bool:
        """Whether the last checkpoint is `minutes` ago."""
        return time.monotonic() - self.last >= 60 * self.minutes

    def checkpointed(self) -> None:
        """A checkpoint has just been written."""
        self.last = time.monotonic()

    def decided(self, name: str, decide: Callable[[], Any]) -> Any:
        """Plain facts that are decided once: read back if they were, else computed by all. Main's count everywhere."""
        path = self.folder / f"{name}.json"
        if not on_main(path.is_file):
            facts = decide()
            on_main(lambda: write_json(path, facts))
        return on_main(lambda: read_json(path))

    @property
    def saving(self) -> bool:
        """Whether the result had begun to be saved: an output folder is then this job's own."""
        return (self.folder / "saving").exists()

    def mark_saving(self) -> None:
        """From now on, what is in the output folder is this job's own."""
        with space_errors(self.folder):
            (self.folder / "saving").touch()

    def remove(self) -> None:
        """Let go of the work, its result being safe; to be called by the main process, when all others are done."""
        _drop(self.folder)
        kept_in(None)


def _begin(folder: Path, key: dict[str, Any], resume: bool, overwrite: bool) -> None:
    path = folder / KEY
    if resume and path.is_file():
        differing = sorted(differences(read_json(path), key | {"format_version": FORMAT_VERSION}))
        if differing:
            named = "; ".join(f"{name} was {before} and is {now}" for name, before, now in differing)
            raise LowRankError(
                f"{folder} holds the work of another job: {named}. Resume with what it was begun "
                "with, or start again with --overwrite"
            )
        return
    if path.is_file() and not overwrite:
        raise LowRankError(f"{folder} holds unfinished work; continue it with --resume or drop it with --overwrite")
    remove_leftovers(folder)
    if path.is_file():
        _drop(folder)
    if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise LowRankError(f"{folder}, the place for unfinished work, is in use: move it away")
    with space_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, key | {"format_version": FORMAT_VERSION})


def _drop(folder: Path) -> None:
    """Remove work, so that it is either all there or all gone."""
    os.replace(folder, scratch_name(folder, "dropped"))
    remove_leftovers(folder)
