"""Kill a compression again and again, resume it each time, and compare its model with that of an undisturbed run.

python tests/fault_injection.py --kills 50
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.launches import Job, content, hf_lowrank, make_data, make_model

BY_BLOCKS = ("--method", "kfac", "--rank-ratio", 0.3, "--batch-size", 4, "--blockwise", "on", "--resume")
SETTINGS = ("--method", "ekfac", "--rank-ratio", 0.3, "--batch-size", 4, "--checkpoint-minutes", 0, "--resume")


class Injection:
    """A job of the command in `folder`, that dies at random points of its run."""

    def __init__(
        self, folder: Path, seed: int, processes: int = 1, rows: int = 25, layers: int = 2, by_blocks: bool = False
    ) -> None:
        self.by_blocks = by_blocks
        self.folder, self.random, self.processes = folder, random.Random(seed), processes
        self.words: list[Any] = ["compress", make_model(folder / "model", num_hidden_layers=layers)]
        self.words += ["--task", "cola", "--data-dir", make_data(folder / "data", rows)]
        self.words += BY_BLOCKS if by_blocks else SETTINGS
        Job(folder / "warm-up", time.sleep, 0).done()  # from here on, jobs start at once
        started = time.monotonic()
        self.start(folder / "undisturbed", processes).done()
        self.seconds = time.monotonic() - started
        self.expected = content(folder / "undisturbed")

    def start(self, output: Path, processes: int) -> Job:
        """Begin the job, or go on with it."""
        return Job(self.folder / "job", hf_lowrank, *self.words, "--output", output, processes=processes)

    def run(self, kills: int) -> tuple[int, list[str]]:
        """How many runs were completed over so many kills, and the file that each kill came after."""
        output, completed, places = self.folder / "output", 0, []
        while len(places) < kills:
            places += [self.place(output)] if self.killed(output) else []
            if finished(output):
                self.compare(output)
                completed += 1
                print(f"{len(places)} kills, {completed} runs completed, the same bits", file=sys.stderr, flush=True)
                shutil.rmtree(output)
        if not finished(output):
            self.start(output, self.next_processes(output)).done()
        self.compare(output)
        return completed + 1, places

    def killed(self, output: Path) -> bool:
        """Run the job until a random moment; whether it was still running then."""
        job = self.start(output, self.next_processes(output))
        time.sleep(self.random.uniform(0, self.seconds))
        alive = any(process.is_alive() for process in job.processes)
        job.kill()
        codes = job.wait()
        assert set(codes) <= {0, -9}, f"{codes}\n{job.printed()}"
        return alive

    def next_processes(self, output: Path) -> int:
        """As many as at first while statistics are measured, any number later."""
        measured = (work(output) / "statistics-2").exists() and not self.by_blocks
        return self.random.randint(1, 2) if measured and self.processes > 1 else self.processes

    def place(self, output: Path) -> str:
        """The newest file that the job has written."""
        if not work(output).exists():
            return "no work yet" if not output.exists() else "all done"
        files = [path for path in work(output).rglob("*") if path.is_file()]
        newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=work(output))
        return str(newest.relative_to(work(output)).parent / newest.name.partition("-")[0]).partition("/")[0]

    def compare(self, output: Path) -> None:
        """Raise unless every file is what it is without kills, and nothing is left behind."""
        found = content(output)
        assert found.keys() == self.expected.keys()
        assert all(found[name] == self.expected[name] for name in found), [
            name for name in found if found[name] != self.expected[name]
        ]
        assert not work(output).exists()


def work(output: Path) -> Path:
    """Where unfinished work for an output is."""
    return output.with_name(f"{output.name}.work")


def finished(output: Path) -> bool:
    """Whether the job is over, and not only its output written."""
    return output.exists() and not work(output).exists()


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, help="1 or 2 (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by-blocks", action="store_true", help="with the blocks on disk")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        injection = Injection(Path(folder), given.seed, given.processes, rows=200, layers=6, by_blocks=given.by_blocks)
        completed, places = injection.run(given.kills)
    counts = {place: places.count(place) for place in sorted(set(places))}
    print(f"{len(places)} kills, {completed} runs completed, all the same bits; last file before a kill: {counts}")


if __name__ == "__main__":
    main()
