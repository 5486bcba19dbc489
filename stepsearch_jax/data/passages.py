"""Passages of a corpus, and how to find the gold ones of a question among them.

Of a corpus only the wanted passages, or 16 bytes of each, are kept in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from stepsearch_jax.data.rows import Row, read_rows
from stepsearch_jax.records import Document, Question
from stepsearch_jax.words import compose

_Passages = tuple[tuple[str, str], ...]  # title and text of each
_UNSORTED = 1 << 20  # digests that `Seen` collects before it merges them into its sorted array


def locate_gold(
    splits: dict[str, list[Question]], documents: Iterable[Document]
) -> dict[str, list[Question]]:
    """The questions with the ids of their missing gold documents that are among `documents`.

    Ids that the questions already have must be ids of these documents. A passage is the first
    document with its title and text; without a text, the only document with its title; without a
    title, the only document with its text as title, or else the first one with this text. White
    space is ignored, because data sets join the sentences of the same paragraph with a blank or
    without. Texts that are canonically equal in Unicode are equal.
    """
    wanted = (
        passage
        for question in itertools.chain(*splits.values())
        for passage in question.missing_gold
    )
    # None: not found.
    ids: dict[tuple[str, str | None], int | None] = dict.fromkeys(
        itertools.starmap(_squeeze_passage, wanted)
    )
    # What is a title or a text: if not found as the one, it is looked up as the other.
    either = {text for title, text in ids if not title}
    by_text: dict[str, int] = {}
    ids |= dict.fromkeys((text, None) for text in either)
    bearers = dict.fromkeys((title for title, _ in ids), 0)  # how many documents have the title
    for document in documents if ids else ():
        title = _squeeze(document.title)
        if either and (text := _squeeze(document.text)) in either:
            by_text.setdefault(text, document.id)
        if title in bearers:
            bearers[title] += 1
            for key in (title, _squeeze(document.text)), (title, None):
                if key in ids and ids[key] is None:
                    ids[key] = document.id
    # A title alone is no name if several documents have it.
    ids.update({(title, None): None for title, count in bearers.items() if count > 1})
    for text in either:
        named = ids[text, None]
        ids["", text] = by_text.get(text) if named is None else named

    def sort(missing: _Passages) -> tuple[tuple[int, ...], _Passages]:
        found = {passage: ids[_squeeze_passage(*passage)] for passage in missing}
        present = tuple(dict.fromkeys(i for i in found.values() if i is not None))
        return present, tuple(passage for passage, i in found.items() if i is None)

    def find(question: Question) -> Question:
        subs = []
        for sub in question.sub_questions:
            found, missing = sort(sub.missing_gold)
            subs.append(
                dataclasses.replace(sub, gold_ids=(*sub.gold_ids, *found), missing_gold=missing)
            )
        found, missing = sort(question.loose_missing_gold)
        return dataclasses.replace(
            question,
            sub_questions=tuple(subs),
            loose_gold_ids=(*question.loose_gold_ids, *found),
            loose_missing_gold=missing,
        )

    return {
        split: [find(question) for question in questions] for split, questions in splits.items()
    }


class Seen:
    """A set of passages, 16 bytes each: a digest of title and text without white space."""

    def __init__(self):
        self._sorted, self._others = np.zeros(0, "S16"), set()

    def __contains__(self, passage: tuple[str, str]) -> bool:
        return self._holds(_digest(passage))

    def add(self, passage: tuple[str, str]) -> bool:
        """Adds a passage -> whether it is new."""
        digest = _digest(passage)
        if self._holds(digest):
            return False
        self._others.add(digest)
        if len(self._others) == _UNSORTED:
            self._sorted = np.sort(
                np.concatenate([self._sorted, np.array(list(self._others), "S16")]), kind="stable"
            )
            self._others.clear()
        return True

    def _holds(self, digest: bytes) -> bool:
        place = np.searchsorted(self._sorted, digest) if len(self._sorted) else 0
        return digest in self._others or place < len(self._sorted) and self._sorted[place] == digest


def _digest(passage: tuple[str, str]) -> bytes:
    raw = "\n".join(map(_squeeze, passage)).encode()
    # NumPy's strings have no zeros at the end.
    return hashlib.blake2b(raw, digest_size=16).digest().rstrip(b"\0")


def _squeeze(text: str) -> str:
    return "".join(compose(text).split())


def _squeeze_passage(title: str, text: str) -> tuple[str, str | None]:
    """Title and text without white space; None for an empty text."""
    return _squeeze(title), _squeeze(text) if text else None


def read_passage(row: Row) -> tuple[str, str]:
    """Title and text of a row of a corpus.

    Fields: `title` and `text` (PhantomWiki: `article`), or `contents` alone, in Search-R1's form
    '"title"\\ntext'. A title that begins and ends with a quote loses this pair: "Heroes" (David
    Bowie album) keeps its own.
    """
    if row.has("text") or row.has("article") or not row.has("contents"):
        return row.text("title"), row.text("text", "article")
    line, _, text = row.text("contents").partition("\n")
    title = line.strip()
    if not text.strip() or not title.replace('"', "").strip():
        raise row.fault("'contents' should be a title, a line break and a text")
    return title[1:-1] if title[0] == title[-1] == '"' else title, text


def read_corpus(paths: Sequence[pathlib.Path]) -> Iterator[tuple[str, str]]:
    """Title and text of the passages of all files.

    The first file gives every row, the others give what no file before them holds. With several
    files, a digest of each passage before the last file is kept in memory; with one file, nothing.
    """
    before: list[Seen] = []
    for n, path in enumerate(paths, start=1):
        own = Seen()
        with contextlib.closing(read_rows(path)) as rows:
            for passage in map(read_passage, rows):
                if not any(passage in seen for seen in before):
                    if n < len(paths):
                        own.add(passage)
                    yield passage
        before.append(own)
