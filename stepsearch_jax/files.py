"""Files and folders, written whole or not at all, with errors that name them; and checks of output
files.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.util
import json
import os
import pathlib
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath


CONFIG_FILE = "config.json"  # what a run keeps its config in


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say instead of an error number: C++ code, NumPy's tofile, TFDS.
_NO_ROOM_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "Not enough disk space",
    " requested and ",
)
_LEFT_S = 24 * 3600.0  # after so long, what another host has not finished is a leftover


class WriteError(OSError):
    """A file could not be written. The message names it, the cause, and what to do."""


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file. ValueError for any other content."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: expected a JSON object, found {type(value).__name__}; delete it or write it "
            "again"
        )
    return value


def write_json(path: pathlib.Path, value) -> None:
    """Writes JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json_lines(path: pathlib.Path | epath.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, in order, without a last line that a kill cut off (no line
    end, no valid JSON).

    Raises FileNotFoundError if there is no such file, and ValueError, with the line number, if any
    other line is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # bytes that are not UTF-8 included
            if number == len(lines):  # no line end follows: the write was cut off
                break
            raise ValueError(
                f"{path}, line {number}: not valid JSON ({error}); repair or delete the line"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, found {type(row).__name__}; "
                "repair or delete the line"
            )
        rows.append(row)
    return rows


def write_text(path: pathlib.Path | epath.Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all. Raises WriteError if that is impossible."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path | epath.Path, raw: bytes) -> None:
    """Writes a file, whole or not at all. Raises WriteError if that is impossible."""
    if in_bucket(path):  # buckets store objects whole or not at all
        path.write_bytes(raw)
        return
    with replacing(pathlib.Path(path)) as temporary:
        temporary.write_bytes(raw)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name beside `path` for a file that takes its place when the body ends without an error.

    Raises WriteError if it cannot be written. What killed processes left there is removed.
    """
    remove_leftovers(path)
    temporary = name_beside(path, "new")
    try:
        with naming_failures(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def name_beside(path: pathlib.Path, kind: str) -> pathlib.Path:
    """The name of this process's own unfinished version of a file or folder."""
    return path.with_name(f".{path.name}.{kind}.{socket.gethostname()}.{os.getpid()}")


def remove_leftovers(path: pathlib.Path) -> None:
    """Removes what processes that were killed left of `name_beside`."""
    start = f".{path.name}."
    for leftover in path.parent.glob(f"{glob.escape(start)}*"):
        _, _, place = leftover.name.removeprefix(start).partition(".")
        host, _, process = place.rpartition(".")
        if not process.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has just been finished, or removed
            if host == socket.gethostname():
                is_left = _has_ended(int(process))
            else:
                is_left = time.time() - leftover.stat().st_mtime > _LEFT_S
            if is_left:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@contextlib.contextmanager
def naming_failures(path: os.PathLike) -> Iterator[None]:
    """Within the context, a full disk, or one that fails, raises WriteError, which names `path`."""
    try:
        yield
    except WriteError:  # which names the file already
        raise
    except Exception as error:
        cause = find_disk_fault(error)
        if cause is None:
            raise
        raise WriteError(describe_disk_fault(path, cause)) from error


def describe_disk_fault(path: os.PathLike, cause: str) -> str:
    """What to say about a file that could not be written. cause: from `find_disk_fault`."""
    return f"{path} could not be written ({cause}): fix that, and run the same command again"


def find_disk_fault(error: BaseException | None) -> str | None:
    """Why a file could not be written, if that is behind an error, whoever raised it; else None."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (*_NO_ROOM, errno.EROFS, errno.EIO):
            return os.strerror(number)
        if any(text in str(error) for text in _NO_ROOM_TEXTS):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None


def in_bucket(path: os.PathLike) -> bool:
    """Whether a path is in a bucket (gs://…), where files are written whole, never appended to."""
    return "://" in str(path)


def check_output(flag: str, path: str | pathlib.Path | None) -> None:
    """Raises OSError, naming the flag, if file `path` cannot be written; None and "" pass."""
    if not path:
        return
    path = pathlib.Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"--{flag}={path}: name a file in a folder that is there")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(
            f"--{flag}={path}: nothing can be written to that folder ({error.strerror}); name "
            "another one"
        ) from None


def check_workdir(workdir: pathlib.Path) -> None:
    """Raises OSError if --workdir cannot be written or made. Makes nothing; skips buckets."""
    if in_bucket(workdir):
        return
    nearest = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise OSError(
            f"--workdir={workdir}: nothing can be written to {nearest} ({error.strerror}); name "
            "another folder"
        ) from None


def check_buckets(*folders: str) -> None:
    """Raises ValueError if a folder is in a bucket and etils cannot use buckets, for which it needs
    gcsfs or TensorFlow.
    """
    for folder in folders:
        if folder.startswith("gs://") and not any(
            importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")
        ):
            raise ValueError(
                f"{folder} is in a bucket, and the package gcsfs is missing: pip install gcsfs "
                "(requirements-tpu.txt has it)"
            )
