"""One object of a data file, whose fields are checked as they are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

_JSON = re.compile(r'\s*(?:\{\s*"|\[\s*["{])')
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that is half of a surrogate pair


class Row:
    """One object of a file.

    `where` names its place ("file, line 3"), `number` counts the objects of the file from 1. Every
    method checks the field that it returns, and raises ValueError with `where` for a wrong one.
    None counts as missing. A list or an object may be given as a string of JSON, and a list of
    objects as an object of equally long lists.
    """

    def __init__(self, values: dict, where: str, number: int):
        self.values, self.where, self.number = values, where, number

    def fault(self, what: str) -> ValueError:
        """The error that says what is wrong with this row."""
        return ValueError(f"{self.where}: {what}")

    def has(self, name: str) -> bool:
        """Whether the field is there. An object of nothing but None is how Parquet has None."""
        value = self.values.get(name)
        empty = isinstance(value, dict) and value and all(part is None for part in value.values())
        return value is not None and not empty

    def get(self, name: str, kind: type) -> Any:
        """The field: present, of type `kind`, and not empty if a string."""
        if name not in self.values:
            raise self.fault(f"field {name!r} is missing")
        value: Any = self.values[name]
        if kind in (list, dict) and isinstance(value, str):
            value = self._parse(name, value)
        if kind is list and isinstance(value, dict):
            value = self._transpose(name, value)
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise self.fault(
                f"field {name!r} should be {kind.__name__}, not {type(value).__name__}"
            )
        if kind is str and not value.strip():
            raise self.fault(f"field {name!r} is empty")
        return value

    def _parse(self, name: str, raw: str) -> Any:
        """The list or object that a string holds as JSON; any other string as it is."""
        if not raw.lstrip().startswith(("[", "{")):
            return raw
        try:
            value = json.loads(raw)
            check_pairs(f"field {name!r}", raw, value)
        except (ValueError, RecursionError) as error:
            raise self.fault(
                f"field {name!r} is a string that is not JSON ({error}); write a list or an object"
            ) from None
        return value

    def holds_json(self, name: str) -> bool:
        """Whether the field is a string that begins as JSON with objects or texts in it does."""
        value = self.values.get(name)
        return isinstance(value, str) and bool(_JSON.match(value))

    def _transpose(self, name: str, columns: dict) -> Any:
        """The list of objects whose fields these lists are; any other object as it is.

        Raises ValueError if the lists differ in length. A field that is None is left out.
        """
        given = {field: values for field, values in columns.items() if values is not None}
        if not columns or not all(isinstance(values, list) for values in given.values()):
            return columns
        sizes = {field: len(values) for field, values in given.items()}
        if len(set(sizes.values())) > 1:
            raise self.fault(
                f"the lists in {name!r} should be equally long, but their lengths are "
                + ", ".join(f"{field} {size}" for field, size in sizes.items())
            )
        return [dict(zip(given, entry)) for entry in zip(*given.values())]

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

    def texts_or_numbers(self, name: str) -> tuple[str, ...]:
        """The answers of a field that holds one or a list of at least one, numbers as texts.

        1204 and 1204.0 are "1204". None of them is blank.
        """
        value = self.values.get(name)
        if self.holds_json(name):
            value = self._parse(name, value)
        answers = []
        for entry in value if isinstance(value, list) else [self.get(name, object)]:
            if isinstance(entry, float) and math.isfinite(entry) and entry.is_integer():
                entry = int(entry)
            fits = isinstance(entry, str | int) or isinstance(entry, float) and math.isfinite(entry)
            if isinstance(entry, bool) or not fits:
                raise self.fault(
                    f"{name!r} should hold texts or numbers only, not {entry!r}; "
                    "write each answer as a text"
                )
            answers.append(str(entry))
        if not all(answer.strip() for answer in answers):
            raise self.fault(f"{name!r} should hold no empty answer")
        if not answers:
            raise self.fault(f"{name!r} should hold at least one answer")
        return tuple(answers)

    def lists(self, name: str, *fields: Sequence[str]) -> list[list]:
        """The lists of a list.

        With `fields`, an entry may also be an object: it is the list of these fields. Each field
        is given by the names that it may have.
        """
        values = [
            self._pick(f"{name}[{i}]", value, fields)
            if fields and isinstance(value, dict)
            else value
            for i, value in enumerate(self.get(name, list))
        ]
        for i, value in enumerate(values):
            if not isinstance(value, list):
                raise self.fault(f"{name}[{i}] should be a list, not {type(value).__name__}")
        return values

    def _pick(self, place: str, entry: dict, fields: Sequence[Sequence[str]]) -> list:
        found = [next((name for name in names if name in entry), None) for names in fields]
        for names, name in zip(fields, found):
            if name is None:
                raise self.fault(f"{place} has no {' or '.join(map(repr, names))}")
        return [entry[name] for name in found]

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


def check_pairs(where: str, raw: str, value: object) -> None:
    """Refuses half of a surrogate pair: JSON can name it, but no text file can hold it."""
    if _HALF.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {error.object[error.start]!r} is half of a surrogate pair, not text; "
                "remove it"
            ) from None
