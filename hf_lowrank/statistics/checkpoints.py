"""Checkpoints of statistics: each process's own sums within a pass over the data, everyone's after each pass."""

import copy
import shutil
from pathlib import Path

from accelerate import PartialState

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.checkpoint import Store, Work
from hf_lowrank.jobs.distributed import Result, on_main
from hf_lowrank.statistics.container import Statistics


class Checkpoints:
    """Where a measurement goes on: after the passes that are finished, within the one that is not."""

    def __init__(self, work: Work, labels: str = "data") -> None:
        self.work, self.labels = work, labels
        self.number = 1  # of the pass at hand
        state = PartialState()
        self.name = f"process-{state.process_index}-of-{state.num_processes}"

    def finished(self) -> tuple[Statistics | None, int]:
        """The statistics of the last finished pass, and its number, 0 if there is none.

        Raises:
            LowRankError: they are damaged, or by other labels.
        """
        number = on_main(lambda: max((self._number(path) for path in self.work.folder.glob("statistics-*")), default=0))
        self.number = number + 1
        if number == 0:
            return None, 0
        in_memory = copy.deepcopy(Statistics.load(self._folder(number)))  # the next pass removes the files
        in_memory.check_labels(self.labels)
        return in_memory, number

    @property
    def sums(self) -> Store:
        """Those of the pass at hand."""
        return self.work.store(f"sums-{self.number}")

    def load(self) -> Result | None:
        """What this process had summed up in the pass at hand, if anything.

        Raises:
            LowRankError: on all processes, if other processes than these had shared the data; or it is damaged.
        """
        on_main(self._refuse_other_shares)
        return self.sums.load(self.name) if self.name in self.sums.names() else None

    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return self.work.due()

    def save(self, state: Result) -> None:
        """Write what this process has summed up in the pass at hand."""
        self.sums.save(self.name, state)
        self.work.checkpointed()

    def finish(self, measured: Statistics) -> None:
        """Write what this pass and those before have measured, and let go of all that went into it."""
        on_main(lambda: measured.save(self._folder(self.number)))
        on_main(self.sums.remove)
        on_main(lambda: shutil.rmtree(self._folder(self.number - 1), ignore_errors=True))
        self.number += 1
        self.work.checkpointed()

    @staticmethod
    def _number(folder: Path) -> int:
        return int(folder.name.removeprefix("statistics-"))

    def _folder(self, number: int) -> Path:
        return self.work.folder / f"statistics-{number}"

    def _refuse_other_shares(self) -> None:
        processes = PartialState().num_processes
        others = {name.rpartition("-")[2] for name in self.sums.names()} - {str(processes)}
        if others:
            raise LowRankError(
                f"{self.work.folder}: the statistics were begun by {others.pop()} process(es), each with its share of "
                f"the data, and are resumed by {processes}; use as many as before, or start again with --overwrite"
            )
