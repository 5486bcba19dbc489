"""JSON and text files, written whole or not at all; and checks of folders and output files."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath


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
    """Writes a file, whole or not at all."""
    if in_bucket(path):  # buckets store objects whole or not at all
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
