"""An output → a lock on it that one job at a time holds, known by process and host; a dead job's is free at once."""

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from hf_lowrank.errors import LowRankError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of file systems without locks, such as some network ones

_held: set[tuple[int, Path]] = set()  # (thread, output) of this process


@contextmanager
def locked(output: str | Path) -> Iterator[bool]:
    """Within the block no other job can take `output`; yields whether the block is the first to, within this thread.

    The lock is the system's own (`flock`) on a hidden file beside the output, which names the holder and is removed at
    the end; a killed job leaves the file, unlocked, to the next one. Folders that have to be made for it are removed
    again if they are still empty. Where there are no such locks (Windows, some network file systems) the file alone
    counts, as long as the process that it names is alive, as far as can be told.

    Raises:
        LowRankError: another job holds it, or nothing can be written there.
    """
    place = Path(output).resolve()
    if (key := (threading.get_ident(), place)) in _held:
        yield False
        return
    path = _lock_file(place)
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        with writing(output):
            path.parent.mkdir(parents=True, exist_ok=True)
            _refuse_unwritable(place)
            descriptor = _acquired(path, output)
        _held.add(key)
        try:
            yield True
        finally:
            _held.discard(key)
            _release(path, descriptor)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the system's refusal of a step within the block into one clear line.

    Raises:
        LowRankError: it names `path` and the reason.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise LowRankError(f"{path} cannot be written: {reason}; choose another place") from None


def _lock_file(place: Path) -> Path:
    """Beside the output, which replacing it leaves alone; within it where it cannot be replaced either."""
    beside = place.with_name(f".{place.name}.lock")
    within = place.is_dir() and not os.access(place.parent, os.W_OK)
    return place / ".lock" if within or not place.name else beside


def _refuse_unwritable(place: Path) -> None:
    if place.exists() and not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, "")


def _acquired(path: Path, output: str | Path) -> int:
    """A descriptor of the lock file, locked. Files are removed by their holders, so that it may be gone meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(descriptor, path):
                raise LowRankError(f"{output} is in use by {_described(_holder(path), path)}")
            if _is_still(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Whether the lock could be taken."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return not _may_live(_holder(path))
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> dict[str, Any]:
    """{"process", "host"} as the lock file has them; nothing in the moment before they are written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _described(holder: dict[str, Any], path: Path) -> str:
    if not holder:
        return "another process: wait for its end"
    where = f"process {holder['process']} on {holder['host']}: wait for its end, or stop it"
    return where if holder["host"] == socket.gethostname() else f"{where}; if there is no such process, delete {path}"


def _may_live(holder: dict[str, Any]) -> bool:
    """Whether a holder is alive, or on another host and beyond asking."""
    return bool(holder) and (holder["host"] != socket.gethostname() or psutil.pid_exists(holder["process"]))


def _release(path: Path, descriptor: int) -> None:
    """Remove the file while it is still locked, so that nobody else's is removed."""
    if fcntl is None:  # Windows removes no open file
        os.close(descriptor)
        path.unlink(missing_ok=True)
    else:
        path.unlink(missing_ok=True)
        os.close(descriptor)
