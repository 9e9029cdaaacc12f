"""What a measurement block by block has done → files of sums, and of what each process keeps of its own samples."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Store, Work
from hf_lowrank.jobs.distributed import on_main


@dataclass(frozen=True)
class Kept:
    """Where a measurement keeps what it has done: all processes in one folder, or each in a temporary one."""

    folder: Path
    shared: bool
    temporary: Any = None  # gone with the last sum that lies in it

    @classmethod
    def of(cls, work: Work | None) -> "Kept":
        if work is None:
            temporary = tempfile.TemporaryDirectory(prefix="hf_lowrank-")
            return cls(Path(temporary.name), False, temporary)
        kept = cls(work.folder / "blocks", True)
        on_main(kept.refuse_other_shares)
        return kept

    def sums(self, number: int) -> Store:
        """The sums of a pass over all processes."""
        return Store(self.folder / f"sums-{number}")

    def own(self, number: int) -> Store:
        """What this process keeps of its own samples in a pass."""
        state = PartialState()
        return Store(self.folder / f"pass-{number}-process-{state.process_index}-of-{state.num_processes}")

    def save(self, store: Store, name: str, tensors: dict[str, Tensor], facts: Any = ()) -> None:
        """Keep what all processes have in common."""
        if self.shared:
            on_main(lambda: store.save(name, (tensors, dict(facts))))
        else:
            store.save(name, (tensors, dict(facts)))

    def refuse_other_shares(self) -> None:
        """Raise where other processes than these had shared the samples.

        Raises:
            LowRankError: it says how many they were.
        """
        processes = str(PartialState().num_processes)
        others = {path.name.rpartition("-")[2] for path in self.folder.glob("pass-*")} - {processes}
        if others:
            raise LowRankError(
                f"{self.folder}: the statistics were begun by {others.pop()} process(es), each with its share of the "
                f"data, and are resumed by {processes}; use as many as before, or start again with --overwrite"
            )


class KeptSums(Mapping[str, Tensor]):
    """The sums of a kind by layer, which are read from their files when they are asked for."""

    def __init__(self, kept: Kept, store: Store, entries: Mapping[str, str]) -> None:
        self.kept, self.store, self.entries = kept, store, entries

    def __getitem__(self, name: str) -> Tensor:
        return self.store.load(self.entries[name])[0]["sum"]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
