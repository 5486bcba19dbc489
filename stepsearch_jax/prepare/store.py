"""Keeps paid or computed answers in a file. An answer survives a kill once `put` has returned."""

from __future__ import annotations

import contextlib
import pathlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence


class Store:
    """Texts by key. `put` and `get` may be called from several threads at once.

    Raises ValueError if the file exists but is no store. It and its methods raise OSError if the
    file cannot be read or written.
    """

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = path, threading.Lock()
        with self._naming_faults():
            self._database = sqlite3.connect(path, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            # answers survive a power cut, too
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS kept "
                "(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
            )

    @contextlib.contextmanager
    def _naming_faults(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(
                f"the store of answers {self._path} cannot be read or written: {error}"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self._path} is not a store of answers ({error}): remove it and start again"
            ) from error

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """The text of each key, None where there is none."""
        select = "SELECT value FROM kept WHERE key = ?"
        with self._lock, self._naming_faults():
            rows = [self._database.execute(select, (key,)).fetchone() for key in keys]
        return [row[0] if row else None for row in rows]

    def put(self, texts: Mapping[str, str]) -> None:
        """Keeps texts by their keys: all of them or none."""
        with self._lock, self._naming_faults(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", texts.items())

    def close(self) -> None:
        """Closes the file."""
        self._database.close()
