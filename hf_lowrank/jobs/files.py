"""Files and folders that are whole or absent: written beside their place, flushed, and moved there when complete."""

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.locks import locked, writing

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REPLACED = "replaced"  # within the scratch folder: what was in the output's place, while nothing else is

# Linux: of renameat2(2)
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise where `folder` holds something that the user has not allowed to be replaced.

    Raises:
        LowRankError: it exists, is not an empty folder, and `overwrite` is off; or it is a file.
    """
    if folder.is_file():
        raise LowRankError(f"{folder} is a file; choose a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise LowRankError(f"{folder} exists and is not empty; choose another folder or pass --overwrite")


@contextmanager
def held(output: str | Path) -> Iterator[None]:
    """`locked`, with what a killed job left of the output put in order: see `remove_leftovers`.

    Raises:
        LowRankError: another job holds it, or nothing can be written there.
    """
    with locked(output) as first:
        if first:
            remove_leftovers(Path(output))
        yield


@contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block ends without an error, and vanishes otherwise.

    It is on the disk, with the rights that the umask gives to new files, before it takes its place. A crash leaves the
    old folder or the new one whole, there or where `remove_leftovers` puts it back from.

    Raises:
        LowRankError: `folder` exists and may not be replaced (see `refuse_existing`), another job holds it, or it
            cannot be written.
    """
    with held(folder):
        refuse_existing(Path(folder), overwrite)
        place = Path(folder).resolve()
        with writing(folder):
            scratch = Path(tempfile.mkdtemp(dir=place.parent, prefix=scratch_name(place).name))
        try:
            whole = scratch / "whole"
            with space_errors(place):
                whole.mkdir()
                yield whole
                _open_to_all(whole)
                flush(whole)
            refuse_existing(Path(folder), overwrite)  # what somebody else has put there meanwhile
            with writing(folder):
                _move(whole, place, scratch)
        finally:
            _clear(scratch, place)


def _move(whole: Path, place: Path, scratch: Path) -> None:
    """Put `whole` in its place, and what is there into `scratch`."""
    if not place.exists():
        os.replace(whole, place)
    elif not exchange(whole, place):
        os.replace(place, scratch / REPLACED)
        os.replace(whole, place)
        os.replace(scratch / REPLACED, scratch / "dropped")  # from now on, nothing to put back
    flush_entries(place.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, or do nothing and answer False where the system cannot (other than Linux)."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(first), os.fsencode(second)
    return rename is not None and rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0


def _open_to_all(folder: Path) -> None:
    """Give what is in a new folder the rights that the umask gave itself: libraries make files for one user alone."""
    mode = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def flush(folder: Path) -> None:
    """Return when all that is in a folder is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent, name))
        flush_entries(Path(parent))


def flush_entries(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    _flush(folder)


def _flush(path: Path) -> None:
    if os.name == "nt":  # which flushes only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scratch_name(folder: Path, ending: str = "") -> Path:
    """A name beside `folder` for what is not, or no longer, it; see `remove_leftovers`."""
    return folder.with_name(f".{folder.name}.partial-{ending}")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left of writing `folder`, and put back what it was about to replace.

    To be called by who holds the lock.
    """
    place = folder.resolve()
    for scratch in place.parent.glob(f"{glob.escape(scratch_name(place).name)}*"):
        with writing(folder):
            _clear(scratch, place)


def _clear(scratch: Path, place: Path) -> None:
    if (scratch / REPLACED).exists() and not place.exists():
        os.replace(scratch / REPLACED, place)
    shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a limit on file sizes met within the block into one clear line.

    Raises:
        LowRankError: it names `path` and the space that is left.
    """
    try:
        yield
    except Exception as error:  # safetensors raises its own, with the system's words
        number = getattr(error, "errno", None)
        known = [code for code in NO_SPACE if number == code or f"os error {code})" in str(error)]
        if not known:
            raise
        left = shutil.disk_usage(path.parent if path.parent.exists() else Path()).free / 2**20
        raise LowRankError(
            f"{path} cannot be written: {os.strerror(known[0])} ({left:,.0f} MiB are free there); make room and run "
            "again, with --resume where there is one"
        ) from None


def sha256_of(path: Path) -> str:
    """The SHA-256 digest of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, record: Any) -> None:
    """Write `record` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; it is on the disk when this returns."""
    write_bytes(path, text.encode())
    flush_entries(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all: its content is on the disk before it takes its place.

    Raises:
        LowRankError: there is no room for it.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with space_errors(path):
            with scratch.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        LowRankError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LowRankError(f"there is no {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LowRankError(f"{path} is damaged, it is not JSON: {error}") from None
