"""Work on many processes: named items and their costs → a share for each process → every result on all of them."""

import heapq
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object, parse_flag_from_env, reduce
from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.digests import bytes_of
from hf_lowrank.jobs.files import held

T = TypeVar("T")
Result = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and plain facts about them

# One process may be done hours before another. A dead one is noticed all the same: its connections break, and the
# launcher ends the rest.
PATIENCE = timedelta(days=7)


class Kept(Protocol):
    """Results that outlive a process, by name (see `checkpoint.Store`)."""

    def names(self) -> set[str]:
        """Those that are there."""

    def load(self, name: str) -> Result:
        """One of them."""

    def save(self, name: str, result: Result) -> None:
        """Add one."""


def start_processes() -> PartialState:
    """Join the processes that a launcher (accelerate launch, torchrun) started; on machines without GPUs over gloo.

    To be called before anything else asks Accelerate for its state.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    if state.num_processes < int(os.environ.get("WORLD_SIZE", 1)):  # Accelerate must be told that it is the CPU
        PartialState._reset_state()
        state = PartialState(cpu=True, timeout=PATIENCE)
    return state


def refuse_several(what: str) -> None:
    """Raise where this process is one of several.

    Raises:
        LowRankError: on all of them.
    """
    if PartialState().num_processes > 1:
        raise LowRankError(f"{what} runs in one process; start it without accelerate launch")


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns on the main process, which alone calls it, on every process; likewise a LowRankError."""
    state = PartialState()
    answer: list[Any] = [None, None]
    if state.is_main_process:
        try:
            answer[0] = function()
        except LowRankError as error:
            answer[1] = error
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def agreed(value: T) -> T:
    """The main process's value, on every process: of what each has computed, and rounded, in its own way."""
    return on_main(lambda: value)


@contextmanager
def shared_errors() -> Iterator[None]:
    """A LowRankError that one process raises within the block is raised by all of them at its end.

    So none waits for a result that will not come. All processes must come here, and each works alone within the block.
    """
    own = None
    try:
        yield
    except LowRankError as error:
        own = error
    first = next((error for error in from_everyone(own) if error is not None), None)
    if first is not None:
        raise own or first


@contextmanager
def held_for_all(output: str | Path) -> Iterator[None]:
    """`held` by the main process, for all processes of the job.

    Raises:
        LowRankError: on all of them; see `held`.
    """
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(held(output)))
        yield


def from_everyone(value: T) -> list[T]:
    """The value of every process, in their order."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def estimated_cost(shape: tuple[int, int]) -> float:
    """What factorizing a weight [out, in] takes, up to scale: products with both moments and one eigenproblem."""
    return shape[0] * shape[1] * sum(shape) + 10 * min(shape) ** 3


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, where the tensor was."""
    state = PartialState()
    return reduce(tensor.to(state.device), "sum").to(tensor.device) if state.num_processes > 1 else tensor


def shares(costs: Mapping[str, float], processes: int, given: Mapping[str, int] | None = None) -> list[list[str]]:
    """The names for each process: those `given` to it, then the most costly first, each to the one with least to do.

    At most 4/3 of the shortest possible time. Graham (1969), LPT.

    >>> shares({"a": 3, "b": 2, "c": 2, "d": 1}, 2)
    [['a', 'd'], ['b', 'c']]
    """
    given = {name: process for name, process in (given or {}).items() if name in costs}
    share = [[name for name in costs if given.get(name) == process] for process in range(processes)]
    busy = [(sum(costs[name] for name in names), process) for process, names in enumerate(share)]
    heapq.heapify(busy)
    for name in sorted((name for name in costs if name not in given), key=lambda name: -costs[name]):
        load, process = heapq.heappop(busy)
        share[process].append(name)
        heapq.heappush(busy, (load + costs[name], process))
    return share


def divided(
    costs: Mapping[str, float],
    solve: Callable[[str], Result],
    kept: Kept | None = None,
    holders: Mapping[str, int] | None = None,
) -> Iterator[tuple[str, Result]]:
    """Solve every name on one of the processes, and yield each (name, result) on all of them.

    Names of which one process alone has what it takes are for that one: `holders` says which.

    Every process gives its own results first, as they come, and then receives those of the others one by one, so that
    the caller can make room for each. What is `kept` already is not solved again, and what is solved is kept. All
    processes must call this with the same costs.

    Raises:
        LowRankError: on all processes, as `solve` on one; or something kept is damaged.
    """
    state = PartialState()
    done = on_main(lambda: sorted(kept.names() & set(costs)) if kept is not None else [])
    left = {name: cost for name, cost in costs.items() if name not in set(done)}
    share = shares(left, state.num_processes, holders or {})
    own: dict[str, Result] = {}
    with shared_errors():
        for name in [*(done if state.is_main_process else ()), *share[state.process_index]]:
            if name in done:
                assert kept is not None
                result = kept.load(name)
            else:
                result = solve(name)
                if kept is not None:
                    kept.save(name, result)
            yield name, result
            if state.num_processes > 1:
                own[name] = result
    if state.num_processes > 1:
        yield from _exchanged(own)


def _exchanged(own: dict[str, Result]) -> Iterator[tuple[str, Result]]:
    """Send one's own results to all processes, and yield theirs."""
    state = PartialState()
    described = {
        name: ({key: (t.shape, t.dtype) for key, t in tensors.items()}, facts) for name, (tensors, facts) in own.items()
    }
    for sender, theirs in enumerate(from_everyone(described)):
        for name, (shapes, facts) in theirs.items():
            if sender == state.process_index:
                for tensor in own.pop(name)[0].values():
                    _broadcast(tensor, sender)
            else:
                empty = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in shapes.items()}
                yield name, ({key: _broadcast(tensor, sender) for key, tensor in empty.items()}, facts)


def _broadcast(tensor: Tensor, sender: int) -> Tensor:
    """Its bytes, so that any dtype can travel."""
    here = tensor.detach().contiguous().to(PartialState().device)
    broadcast(bytes_of(here), from_process=sender)
    return here
