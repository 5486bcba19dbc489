"""Passages of a corpus, and how the gold ones of a question are found among them."""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from stepsearch_jax.data.rows import Row, read_rows
from stepsearch_jax.records import Document, Question


class Passages:
    """Documents in the order in which they are added (id = row), found again by title and text; their white space does not count.

    White space does not count at all, because data sets join the sentences of one and the same paragraph with a blank or without.
    """

    def __init__(self, documents: Iterable[Document] = ()):
        self.documents: list[Document] = []
        self._ids: dict[tuple[str, str], int] = {}
        self._titles: dict[str, int | None] = {}
        for document in documents:
            self.add(document.title, document.text)

    def add(self, title: str, text: str) -> int:
        """Adds a document, even one that is there already -> its id."""
        row = len(self.documents)
        self.documents.append(Document(row, title, text))
        squeezed = _squeeze(title)
        self._ids.setdefault((squeezed, _squeeze(text)), row)
        self._titles[squeezed] = None if squeezed in self._titles else row
        return row

    def find(self, title: str, text: str) -> int | None:
        """The id of the first document with this title and text, or None. Without a text: of the only document with this title."""
        squeezed = _squeeze(title)
        return self._ids.get((squeezed, _squeeze(text))) if text else self._titles.get(squeezed)

    def sort_gold(self, gold: Iterable[tuple[str, str]]) -> tuple[tuple[int, ...], tuple[tuple[str, str], ...]]:
        """(title, text) of gold documents -> the ids of those that are here, and the others, both without repetition."""
        found = {passage: self.find(*passage) for passage in gold}
        return tuple(dict.fromkeys(i for i in found.values() if i is not None)), tuple(passage for passage, i in found.items() if i is None)

    def find_missing(self, question: Question) -> Question:
        """The question with those of its missing gold documents found that are here. Ids that it has must be ids of these documents."""
        subs = []
        for sub in question.sub_questions:
            ids, missing = self.sort_gold(sub.missing_gold)
            subs.append(dataclasses.replace(sub, gold_ids=(*sub.gold_ids, *ids), missing_gold=missing))
        ids, missing = self.sort_gold(question.loose_missing_gold)
        return dataclasses.replace(question, sub_questions=tuple(subs), loose_gold_ids=(*question.loose_gold_ids, *ids), loose_missing_gold=missing)


def _squeeze(text: str) -> str:
    return "".join(text.split())


def read_passage(row: Row) -> tuple[str, str]:
    """Title and text of a row of a corpus: fields `title` and `text` (PhantomWiki: `article`), or `contents` alone, in Search-R1's form '"title"\\ntext'.

    One pair of quotes is taken off a title that begins and ends with one: "Heroes" (David Bowie album) keeps its own.
    """
    if row.has("text") or row.has("article") or not row.has("contents"):
        return row.text("title"), row.text("text", "article")
    line, _, text = row.text("contents").partition("\n")
    title = line.strip()
    if not text.strip() or not title.replace('"', "").strip():
        raise row.fault("'contents' should be a title, a line break and a text")
    return title[1:-1] if title[0] == title[-1] == '"' else title, text


def read_corpus(paths: Sequence[pathlib.Path]) -> Iterator[tuple[str, str]]:
    """Title and text of the passages of all these files: of the first file every row, of the others what no file before them holds.

    Of a single file nothing is remembered, of several a hash of each passage that stands before the last.
    """
    seen: set[bytes] = set()
    for n, path in enumerate(paths, start=1):
        own = []
        with contextlib.closing(read_rows(path)) as rows:
            for row in rows:
                title, text = read_passage(row)
                key = hashlib.blake2b(f"{_squeeze(title)}\n{_squeeze(text)}".encode(), digest_size=16).digest() if len(paths) > 1 else b""
                if key not in seen:
                    if n < len(paths):
                        own.append(key)
                    yield title, text
        seen.update(own)
