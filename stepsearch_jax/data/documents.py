"""The documents of a corpus as a memory-mapped file, one line of JSON each.

A process holds only the documents that it reads.
"""

from __future__ import annotations

import array
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from stepsearch_jax.records import Document

CORPUS = "corpus.jsonl"  # the documents, a line each, with `title` and `text`
OFFSETS = "corpus.offsets.npy"  # where each line begins, and the end of the last


class Mapped(Sequence):
    """A function applied to each item of a sequence, at every access; results are not kept."""

    def __init__(self, function: Callable, items: Sequence):
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._function(self._items[index])

    def __iter__(self):
        return map(self._function, self._items)


class StoredDocuments:
    """The documents that `write_documents` or an index wrote into a folder.

    `documents[i].id == i`. Raises ValueError if the files do not belong together.
    """

    def __init__(self, folder: pathlib.Path):
        # Plain views of the maps are faster to slice.
        self._offsets = np.asarray(np.load(folder / OFFSETS, mmap_mode="r"))
        self._lines = np.asarray(np.memmap(folder / CORPUS, np.uint8, mode="r"))
        if self._offsets[-1] != len(self._lines):
            raise ValueError(
                f"{CORPUS} has {len(self._lines)} bytes instead of {self._offsets[-1]}"
            )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        row = json.loads(self._lines[self._offsets[i] : self._offsets[i + 1]].tobytes())
        return Document(i, row["title"], row["text"])


def write_documents(passages: Iterable[tuple[str, str]], folder: pathlib.Path) -> StoredDocuments:
    """Writes title and text of each document into `folder`, and opens them.

    Raises ValueError if there are none.
    """
    with open(folder / CORPUS, "wb") as file:
        sizes = array.array("i", (file.write(encode_passage(*passage)) for passage in passages))
    if not sizes:
        raise ValueError("the corpus is empty: there is nothing to search")
    write_offsets(np.array(sizes), folder)
    return StoredDocuments(folder)


def encode_passage(title: str, text: str) -> bytes:
    """The line of a document."""
    return json.dumps({"title": title, "text": text}).encode() + b"\n"


def write_offsets(sizes: np.ndarray, folder: pathlib.Path) -> None:
    """Writes where lines of these sizes [N], in bytes, begin and end."""
    np.save(folder / OFFSETS, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
