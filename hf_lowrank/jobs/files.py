"""Files that are whole or absent: written beside their place, moved there when complete."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_lowrank.errors import LowRankError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block ends without an error, and vanishes otherwise.

    Raises:
        LowRankError: `folder` exists and may not be replaced (see `refuse_existing`).
    """
    folder = Path(folder)
    refuse_existing(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=scratch_name(folder).name))
    try:
        whole = scratch / "whole"
        with space_errors(folder):
            whole.mkdir()
            yield whole
        if folder.exists():
            os.replace(folder, scratch / "replaced")
        os.replace(whole, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def scratch_name(folder: Path, ending: str = "") -> Path:
    """A name beside `folder` for what is not, or no longer, it; see `remove_leftovers`."""
    return folder.with_name(f".{folder.name}.partial-{ending}")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left of writing `folder`."""
    for scratch in folder.parent.glob(f"{scratch_name(folder).name}*"):
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
        known = [each for each in NO_SPACE if number == each or f"os error {each})" in str(error)]
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
    """Write a text file, whole or not at all."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with space_errors(path):
            scratch.write_text(text, encoding="utf-8")
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
