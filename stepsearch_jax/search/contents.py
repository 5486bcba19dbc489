"""The contents of documents as Search-R1's servers send them, and documents found by them."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from stepsearch_jax.records import Document

logger = logging.getLogger("stepsearch_jax")

_LISTED_AT_ONCE = 1024  # documents between two reports of progress


def render_contents(document: Document) -> str:
    """Title and text in one string, as Search-R1's corpora have them: the first line is the title,
    in quotes, with its line ends as spaces."""
    return f'"{" ".join(document.title.split())}"\n{document.text}'


def spell(contents: str) -> str:
    """What two forms of one document have in common: quotes and white space do not count."""
    return "".join(contents.replace('"', "").split())


class Finder:
    """Finds documents by their contents, for servers that send no ids, or ids of their own.

    The first search lists all documents: 16 bytes of memory for each. progress: called often
    meanwhile. May be used from several threads at once.
    """

    def __init__(self, documents: Sequence[Document], progress: Callable[[], None]):
        self._documents, self._progress = documents, progress
        self._lock = threading.Lock()
        self._hashes: np.ndarray | None = None  # [N] uint64, sorted
        self._rows = np.zeros(0, np.int64)  # [N]: the document of each hash

    def find(self, contents: str) -> int | None:
        """The first document with these contents, as `spell` reads them; None if there is none."""
        with self._lock:
            if self._hashes is None:
                self._list()
        assert self._hashes is not None  # _list sets it
        wanted = spell(contents)
        first, last = (
            np.searchsorted(self._hashes, _hash(wanted), side) for side in ("left", "right")
        )
        for row in self._rows[first:last].tolist():
            if spell(render_contents(self._documents[row])) == wanted:
                return row
        return None

    def _list(self) -> None:
        count = len(self._documents)
        logger.info("the search server has ids of its own: listing %d documents by contents", count)
        hashes = np.empty(count, np.uint64)
        for row in range(count):
            hashes[row] = _hash(spell(render_contents(self._documents[row])))
            if row % _LISTED_AT_ONCE == 0:
                self._progress()
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]


def _hash(text: str) -> np.uint64:
    raw = text.encode("utf-8", errors="surrogatepass")
    return np.uint64(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest()))
