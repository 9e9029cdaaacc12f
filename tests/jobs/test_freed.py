"""What was freed is not resident any more, though something that is in use lies behind it."""

from pathlib import Path

import pytest
import torch

from hf_lowrank.jobs.freed import _trim, give_back


def resident() -> int:
    """Bytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(_trim() is None, reason="only glibc keeps what was freed, and gives it back")
def test_holes_go_back_to_the_system() -> None:
    holes, between = [], []
    for _ in range(400):
        holes.append(torch.ones(100_000, dtype=torch.uint8))
        between.append(torch.ones(1_000, dtype=torch.uint8))
    del holes
    before = resident()
    give_back()
    assert before - resident() > 30_000_000
    assert all(tensor.all() for tensor in between)
