"""Rows of data files (JSON lines, JSON arrays, CSV, Parquet), with their places for messages."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import hashlib
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from tqdm import tqdm

from stepsearch_jax.data.row import Row, check_pairs

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
_DECODER = json.JSONDecoder()
_BEFORE_JSON = b" \t\r\n" + codecs.BOM_UTF8


def describe_files(files: Sequence[pathlib.Path]) -> list[list]:
    """Path, size and time of each file, as JSON: they show a change without reading the file.

    Raises FileNotFoundError for a missing file, or a folder.
    """
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is {'a folder: name the files in it' if path.is_dir() else 'not there'}"
            )
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def find_files(folder: pathlib.Path, stems: Sequence[str]) -> list[pathlib.Path]:
    """The file in `folder` that has one of these names and a known ending, or its shards in order.

    A shard is called as on the Hugging Face Hub, train-00000-of-00002.parquet. Raises ValueError
    when there are two files, FileNotFoundError when a shard is missing.
    """
    groups: dict[tuple[str, str, str], dict[int, pathlib.Path]] = {}
    for stem in stems:
        for suffix in SUFFIXES:
            if (path := folder / f"{stem}{suffix}").is_file():
                groups[stem, "", suffix] = {0: path}
    shard = re.compile(
        rf"({'|'.join(map(re.escape, stems))})-(\d+)-of-(\d+)(?:-[0-9a-f]{{16}})?"
        rf"({'|'.join(map(re.escape, SUFFIXES))})"
    )
    for path in sorted(folder.glob("*-of-*")):
        if (match := shard.fullmatch(path.name)) and path.is_file():
            shards = groups.setdefault((match[1], match[3], match[4]), {})
            if (other := shards.setdefault(int(match[2]), path)) != path:
                raise ValueError(f"{other} and {path} are the same shard: remove one of them")
    if not groups:
        return []
    (first, *others), ((stem, count, suffix), *_) = groups.values(), groups
    if others:
        raise ValueError(
            f"{next(iter(first.values()))} and {next(iter(others[0].values()))} are the same split "
            "twice: remove one of them"
        )
    for number in range(int(count or 1)):
        if number not in first:
            name = f"{stem}-{number:0{len(count)}}-of-{count}{suffix}"
            raise FileNotFoundError(f"{folder / name} is missing: fetch all {int(count)} shards")
    if len(first) > int(count or 1):
        raise ValueError(f"{first[max(first)]} is not one of {int(count)} shards: remove it")
    return [first[number] for number in sorted(first)]


def read_rows(
    path: pathlib.Path, on_fault: Callable[[ValueError], None] | None = None
) -> Iterator[Row]:
    """The objects of a file, in order.

    on_fault: takes the error of a line that holds no object, and reading goes on after that line;
    None: the error is raised. Raises FileNotFoundError, and ValueError for a file that holds no
    objects or something else. Close the iterator (contextlib.closing) if the caller can fail
    between rows: an open progress bar garbles the message.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: the name should end in one of {', '.join(SUFFIXES)}")
    number = 0
    values = _read_values(path)
    try:
        for place, value in tqdm(values, desc=f"reading {path.name}", unit=" rows", leave=False):
            number += 1
            if not isinstance(value, dict):
                fault = (
                    value
                    if isinstance(value, ValueError)
                    else ValueError(
                        f"{path}, {place}: a JSON object is needed, not {type(value).__name__}"
                    )
                )
                if on_fault is None:
                    raise fault
                on_fault(fault)
                continue
            yield Row(value, f"{path}, {place}", number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: after row {number} the file cannot be read ({error}); fetch it again"
        ) from None
    if not number:
        raise ValueError(f"{path}: the file is empty; at least one row is needed")


def hash_file(path: pathlib.Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_values(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    """(place, value) of each row; the value of a line that cannot be read is its ValueError."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
        if kind == "csv":
            yield from _read_table(path, file)
            return
        start = b" "
        while start and start in _BEFORE_JSON:
            start = file.read(1)
        file.seek(0)
        if kind == "json" and start == b"[":
            yield from _read_array(path, "".join(_decode_lines(path, file)))
        else:
            yield from _read_lines(path, file)


def _decode_lines(path: pathlib.Path, file: Iterable[bytes]) -> Iterator[str]:
    """The lines of a file as text, without a byte order mark before the first."""
    for number, line in enumerate(file, start=1):
        yield _decode(path, number, line)


def _decode(path: pathlib.Path, number: int, line: bytes) -> str:
    try:
        return (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: not UTF-8 ({error.reason} "
            f"{error.object[error.start]:#04x}); save the file as UTF-8"
        ) from None


def _read_table(path: pathlib.Path, file: Iterable[bytes]) -> Iterator[tuple[str, object]]:
    reader = csv.DictReader(_decode_lines(path, file))
    try:
        # The reader skips empty lines only after the line with the names.
        reader.fieldnames = next(filter(None, reader.reader), None)
        for values in reader:
            yield f"line {reader.line_num}", values
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.reader.line_num}: not CSV, or too long a text for CSV "
            f"({error}); a .jsonl file can hold it"
        ) from None


def _read_lines(path: pathlib.Path, file: Iterable[bytes]) -> Iterator[tuple[str, object]]:
    for number, raw in enumerate(file, start=1):
        try:
            line = _decode(path, number, raw)
            if not line.strip():
                continue
            with _naming_line(path, number):
                value = json.loads(line)
            check_pairs(f"{path}, line {number}", line, value)
        except ValueError as error:
            value = error
        yield f"line {number}", value


def _read_array(path: pathlib.Path, text: str) -> Iterator[tuple[str, object]]:
    """One element at a time: the objects of a file of 600 MB need not all be in memory at once."""
    position, line, counted = _skip(text, text.index("[") + 1), 1, 0
    more = text[position : position + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, position), position
        with _naming_line(path, line):
            value, position = _DECODER.raw_decode(text, position)
        try:
            check_pairs(f"{path}, line {line}", text[counted:position], value)
        except ValueError as error:
            value = error
        yield f"line {line}", value
        position = _skip(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ValueError(
                f"{path}, line {line}: not JSON "
                "(a comma or the end of the array is missing after this row)"
            )
    rest = _skip(text, position + 1)
    if rest < len(text):
        line = 1 + text.count("\n", 0, rest)
        raise ValueError(f"{path}, line {line}: not JSON (text after the end of the array)")


@contextlib.contextmanager
def _naming_line(path: pathlib.Path, line: int) -> Iterator[None]:
    """Adds file and line to the errors of json; without a line of its own, the text's first."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {max(line, error.lineno)}: not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{path}, line {line}: lists and objects are nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{path}, line {line}: {error}") from None


def _skip(text: str, position: int) -> int:
    """The next position that holds no white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield f"row {number}", values
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: after row {number} it cannot be read as a Parquet file ({error}); "
            "fetch it again"
        ) from None
