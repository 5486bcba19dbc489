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
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
_DECODER = json.JSONDecoder()
_BEFORE_JSON = b" \t\r\n" + codecs.BOM_UTF8
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that is half of a surrogate pair


class Row:
    """One object of a file.

    `where` names its place ("file, line 3"), `number` counts the objects of the file from 1. Every
    method checks the field that it returns, and raises ValueError with `where` for a wrong one.
    None counts as missing.
    """

    def __init__(self, values: dict, where: str, number: int):
        self.values, self.where, self.number = values, where, number

    def fault(self, what: str) -> ValueError:
        """The error that says what is wrong with this row."""
        return ValueError(f"{self.where}: {what}")

    def has(self, name: str) -> bool:
        """Whether the field is there."""
        return self.values.get(name) is not None

    def get(self, name: str, kind: type):
        """The field: present, of type `kind`, and not empty if a string."""
        if name not in self.values:
            raise self.fault(f"field {name!r} is missing")
        value = self.values[name]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise self.fault(
                f"field {name!r} should be {kind.__name__}, not {type(value).__name__}"
            )
        if kind is str and not value.strip():
            raise self.fault(f"field {name!r} is empty")
        return value

    def text(self, *names: str) -> str:
        """The string in the first of these fields that is there."""
        return self.get(next((name for name in names if self.has(name)), names[0]), str)

    def identifier(self, *names: str, otherwise: str) -> str:
        """The text or number in the first of these fields that is there, as text.

        Without one, `otherwise` and the number of the row, from 0.
        """
        value = next(
            (self.values[name] for name in names if self.has(name)),
            f"{otherwise}_{self.number - 1}",
        )
        is_name = isinstance(value, (str, int)) and not isinstance(value, bool)
        if not is_name or not str(value).strip():
            raise self.fault(
                f"{value!r} in {' or '.join(map(repr, names))} should be a text or a number"
            )
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """The strings of a list."""
        values = self.get(name, list)
        if not all(isinstance(value, str) for value in values):
            raise self.fault(f"{name!r} should hold strings only")
        return tuple(values)

    def aliases(self, name: str) -> tuple[str, ...]:
        """The strings of a list, none of them blank: that would make an empty answer right."""
        values = self.texts(name)
        if not all(value.strip() for value in values):
            raise self.fault(f"{name!r} should hold no empty answer")
        return values

    def answers(self, name: str) -> tuple[str, ...]:
        """The strings of a list that holds at least one, none of them blank."""
        values = self.aliases(name)
        if not values:
            raise self.fault(f"{name!r} should hold at least one answer")
        return values

    def lists(self, name: str) -> list[list]:
        """The lists of a list."""
        values = self.get(name, list)
        for i, value in enumerate(values):
            if not isinstance(value, list):
                raise self.fault(f"{name}[{i}] should be a list, not {type(value).__name__}")
        return values

    def object(self, name: str) -> Row:
        """The object in a field."""
        return Row(self.get(name, dict), f"{self.where}, {name}", self.number)

    def objects(self, name: str) -> list[Row]:
        """The objects of a list that is not empty."""
        values = self.get(name, list)
        if not values:
            raise self.fault(f"{name!r} is empty")
        for i, value in enumerate(values):
            if not isinstance(value, dict):
                raise self.fault(f"{name}[{i}] should be an object, not {type(value).__name__}")
        return [
            Row(value, f"{self.where}, {name}[{i}]", self.number) for i, value in enumerate(values)
        ]


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


def find_file(folder: pathlib.Path, stems: Sequence[str]) -> pathlib.Path | None:
    """The file in `folder` that has one of these names and a known ending.

    Raises ValueError when there are two.
    """
    found = [
        path
        for path in (folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
        if path.is_file()
    ]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} are the same split twice: remove one of them")
    return found[0] if found else None


def read_rows(path: pathlib.Path) -> Iterator[Row]:
    """The objects of a file, in order.

    Raises FileNotFoundError, and ValueError for a file that holds no objects or something else.
    Close the iterator (contextlib.closing) if the caller can fail between rows: an open progress
    bar garbles the message.
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
                raise ValueError(
                    f"{path}, {place}: a JSON object is needed, not {type(value).__name__}"
                )
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
    """(place, value) of each row."""
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
        try:
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
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
    for number, line in enumerate(_decode_lines(path, file), start=1):
        if line.strip():
            with _naming_line(path, number):
                value = json.loads(line)
            _check_pairs(path, number, line, value)
            yield f"line {number}", value


def _read_array(path: pathlib.Path, text: str) -> Iterator[tuple[str, object]]:
    """One element at a time: the objects of a file of 600 MB need not all be in memory at once."""
    position, line, counted = _skip(text, text.index("[") + 1), 1, 0
    more = text[position : position + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, position), position
        with _naming_line(path, line):
            value, position = _DECODER.raw_decode(text, position)
        _check_pairs(path, line, text[counted:position], value)
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


def _check_pairs(path: pathlib.Path, line: int, raw: str, value: object) -> None:
    """Refuses half of a surrogate pair: JSON can name it, but no text file can hold it."""
    if _HALF.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path}, line {line}: {error.object[error.start]!r} is half of a surrogate pair, "
                "not text; remove it"
            ) from None


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
