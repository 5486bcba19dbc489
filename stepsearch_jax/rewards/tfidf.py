"""Cosine similarity of tf-idf vectors between gold and retrieved documents, by corpus id (host).

A document is a row of `texts`. Tokens, weights and norm are scikit-learn's `TfidfVectorizer` defaults: lower case, `\\b\\w\\w+\\b`, raw term counts,
smooth idf(w) = ln((1 + N) / (1 + df(w))) + 1, l2 norm. What differs is the collection that N and df count:
  `CorpusTfidf`  the whole corpus, once;
  `PairTfidf`    {document} ∪ gold documents, anew for every document, in closed form.
Reference: the paper does not say what the idf is fitted on; the released code refits a vectoriser for every retrieved document ("pair"), which makes
  one similarity depend on the number of gold documents and gives unrelated texts about 0.1.

Words are counted once for a corpus; a whole batch of questions is then compared in one pass over arrays. Every sum runs over the words of one
document in the order in which it names them, so a similarity is the same to the last bit whatever else is asked for in the same call.
"""

from __future__ import annotations

import array
import dataclasses
import inspect
import io
import itertools
import pathlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import BinaryIO, Protocol

import numpy as np
import tqdm

from stepsearch_jax.choices import check_choice
from stepsearch_jax.search.cache import hash_texts, prepare_folder

_COUNTED_AT_ONCE = 1 << 20  # entries in memory before they are written
_LOOKED_AT = 100  # texts, evenly spread, by which counted words are known for those of the same reading of a corpus
_TOKEN = re.compile(r"\b\w\w+\b")


class Similarity(Protocol):
    """Anything that compares documents of one corpus by id."""

    def similarity(
        self, gold_ids: Sequence[Sequence[int]], doc_ids: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """gold_ids[b] and doc_ids[b] of B questions -> [n, R] float64 in [0, 1], R = Σ_b len(doc_ids[b]), n the largest number of gold documents.

        Entry (i, r) compares the r-th of all doc_ids, one question after the other, with gold document i of its own question; 0 where there is none.
        """


def fit_similarity(
    texts: Sequence[str], *, tfidf_fit: str, folder: pathlib.Path | None = None, corpus: str = ""
) -> Similarity:
    """The similarity over a corpus whose document i reads `texts[i]`; `tfidf_fit` is "corpus" or "pair".

    folder: keeps the words of the documents, counted once and memory-mapped; None: they are counted in memory. corpus: identifies the texts in the folder.
    Raises ValueError on another fit, or if there are no texts.
    """
    check_choice("reward.tfidf_fit", tfidf_fit)
    if not len(texts):
        raise ValueError("the corpus holds no documents; tf-idf needs at least one")
    if folder is None:
        terms, counts = io.BytesIO(), io.BytesIO()
        ends, frequencies = _count_terms(texts, terms, counts)
        return _FITS[tfidf_fit](
            _TermCounts(
                *(np.frombuffer(file.getbuffer(), np.int32) for file in (terms, counts)),
                ends,
                frequencies,
            )
        )

    def write(made: pathlib.Path) -> None:
        with open(made / "terms.bin", "wb") as terms, open(made / "counts.bin", "wb") as counts:
            for name, values in zip(("ends", "frequencies"), _count_terms(texts, terms, counts)):
                np.save(made / f"{name}.npy", values)

    some = hash_texts(texts[i] for i in range(0, len(texts), -(-len(texts) // _LOOKED_AT)))
    code = hash_texts([inspect.getsource(sys.modules[__name__])])
    prepare_folder(
        folder,
        {
            "kind": "term-counts",
            "corpus": corpus,
            "documents": len(texts),
            "texts": some,
            "code": code,
        },
        write,
    )
    try:
        ends, frequencies = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ends", "frequencies")
        )
        files = [
            np.memmap(folder / f"{name}.bin", np.int32, mode="r", shape=(int(ends[-1]),))
            if ends[-1]
            else np.zeros(0, np.int32)
            for name in ("terms", "counts")
        ]
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"the counted words in {folder} are damaged ({error}): remove this folder, and they are counted again"
        ) from error
    return _FITS[tfidf_fit](_TermCounts(*map(np.asarray, (*files, ends, frequencies))))


def _count_terms(
    texts: Sequence[str], terms_file: BinaryIO, counts_file: BinaryIO
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the terms of every document and their counts, int32 -> ends and frequencies, as in `_TermCounts`. Memory grows with the different words."""
    vocabulary: defaultdict[str, int] = defaultdict()
    vocabulary.default_factory = vocabulary.__len__  # an unknown word gets the next free term id
    terms, counts, ends, frequencies = (
        array.array("i"),
        array.array("i"),
        array.array("q", [0]),
        np.zeros(0, np.int64),
    )

    def flush() -> np.ndarray:
        held = np.bincount(np.array(terms, np.int64), minlength=len(vocabulary))
        held[: len(frequencies)] += frequencies
        for values, file in ((terms, terms_file), (counts, counts_file)):
            values.tofile(file)
            del values[:]
        return held

    for text in tqdm.tqdm(
        texts, desc="counting words", unit=" documents", leave=False, disable=None
    ):
        words = Counter(map(vocabulary.__getitem__, _TOKEN.findall(text.lower())))
        terms.extend(words.keys())
        counts.extend(words.values())
        ends.append(ends[-1] + len(words))
        if len(terms) >= _COUNTED_AT_ONCE:
            frequencies = flush()
    return np.array(ends), flush()


@dataclasses.dataclass(frozen=True)
class _TermCounts:
    """Sparse term counts of every document: 8 bytes a distinct word, about 0.6 kB for a passage of 100 words."""

    terms: np.ndarray  # [E] int32
    counts: np.ndarray  # [E] int32: how often the document names the term
    ends: np.ndarray  # [documents + 1] int64: document i owns entries ends[i] to ends[i + 1]
    frequencies: np.ndarray  # [V] int64: how many documents name the term

    @property
    def documents(self) -> int:
        """Their number."""
        return len(self.ends) - 1

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries of the documents `ids` [m], one document after the other -> (their terms [e], their counts [e] float64, where each document begins and the
        last one ends [m + 1]). ValueError if the corpus lacks an id."""
        wrong = (ids < 0) | (ids >= self.documents)
        if wrong.any():
            raise ValueError(
                f"document id {ids[wrong][0]} is not in the corpus of {self.documents} documents; are gold ids and corpus from one data set?"
            )
        starts, stops = self.ends[ids], self.ends[ids + 1]
        places = list(map(slice, starts.tolist(), stops.tolist()))
        terms, counts = (
            np.concatenate([whole[:0], *map(whole.__getitem__, places)])
            for whole in (self.terms, self.counts)
        )
        return terms, counts.astype(np.float64), np.concatenate([[0], np.cumsum(stops - starts)])


class _Match:
    """Where the words of B questions' gold documents (m in all) occur in the documents that the questions retrieved (R in all).

    A column is a word of one question's gold documents. It bears the number of an entry in which they name it, so C = number of their entries, and
    columns stay unused where several name the same word. Words that no gold document of the question holds have no column: they add nothing to dot products.
    """

    def __init__(
        self,
        counts: _TermCounts,
        gold_ids: Sequence[Sequence[int]],
        doc_ids: Sequence[Sequence[int]],
    ):
        self.gold_ids, self.gold_question, gold_ends = _flatten(gold_ids)  # [m], [m], [B + 1]
        self.doc_ids, self.doc_question, doc_ends = _flatten(doc_ids)  # [R], [R], [B + 1]
        self.gold_number = np.diff(gold_ends)  # [B]
        self.gold_place = (
            np.arange(len(self.gold_ids)) - gold_ends[self.gold_question]
        )  # [m] among its question's
        self.gold_terms, self.gold_counts, gold_starts = counts.gather(
            self.gold_ids
        )  # [C], [C], [m + 1]
        self.doc_terms, self.doc_counts, doc_starts = counts.gather(
            self.doc_ids
        )  # [e], [e], [R + 1]

        # Columns, question by question, through a table over all words.
        numbers, column_of = (
            np.arange(len(self.gold_terms), dtype=np.int32),
            np.full(len(counts.frequencies), -1, np.int32),
        )
        self.gold_column, doc_column = (
            np.empty(len(self.gold_terms), np.int32),
            np.empty(len(self.doc_terms), np.int32),
        )
        gold_bounds, doc_bounds = gold_starts[gold_ends].tolist(), doc_starts[doc_ends].tolist()
        for gold_start, gold_end, doc_start, doc_end in zip(
            gold_bounds, gold_bounds[1:], doc_bounds, doc_bounds[1:]
        ):
            terms = self.gold_terms[gold_start:gold_end]
            column_of[terms] = numbers[gold_start:gold_end]
            self.gold_column[gold_start:gold_end] = column_of.take(terms)
            doc_column[doc_start:doc_end] = column_of.take(self.doc_terms[doc_start:doc_end])
            column_of[terms] = -1

        self.gold_row = np.repeat(
            np.arange(len(self.gold_ids)), np.diff(gold_starts)
        )  # [C] which gold document
        self.table = np.zeros(
            (self.gold_number.max(initial=0), len(numbers))
        )  # [n, C] counts, by place of the gold document
        self.table[self.gold_place.take(self.gold_row), self.gold_column] = self.gold_counts

        shared = np.flatnonzero(
            doc_column >= 0
        )  # [s] entries of retrieved documents that have a column
        self.doc_row = np.repeat(
            np.arange(len(self.doc_ids)), np.diff(doc_starts)
        )  # [e] which document
        self.row = self.doc_row.take(shared)  # [s]
        self.column = doc_column.take(shared).astype(np.int64)  # [s]
        self.counts = self.doc_counts.take(shared)  # [s] in the retrieved document

    def sum_shared(self, values: np.ndarray) -> np.ndarray:
        """[s] -> [R]: sums over the entries of each retrieved document that have a column."""
        return np.bincount(self.row, values, len(self.doc_ids))

    def spread_gold(self, values: np.ndarray) -> np.ndarray:
        """Values of gold documents [m] -> [n, R]: for each retrieved document those of its question's gold documents, 0 where there are fewer."""
        table = np.zeros((len(self.table), len(self.gold_number)))
        table[self.gold_place, self.gold_question] = values
        return table[:, self.doc_question]


class CorpusTfidf:
    """tf-idf with one idf for the whole corpus."""

    def __init__(self, counts: _TermCounts):
        self._counts = counts
        self._idf_squares = (
            np.log((1 + counts.documents) / (1 + counts.frequencies)) + 1
        ) ** 2  # [V]

    def similarity(
        self, gold_ids: Sequence[Sequence[int]], doc_ids: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Cosines [n, R] in [0, 1], see `Similarity`. ValueError if the corpus lacks an id."""
        match = _Match(self._counts, gold_ids, doc_ids)
        weighted = match.counts * self._idf_squares.take(match.gold_terms).take(match.column)  # [s]
        dots = np.zeros((len(match.table), len(match.doc_ids)))
        for i, gold in enumerate(match.table):
            dots[i] = match.sum_shared(gold.take(match.column) * weighted)
        gold_squares = np.bincount(
            match.gold_row,
            self._idf_squares.take(match.gold_terms) * match.gold_counts**2,
            len(match.gold_ids),
        )
        doc_squares = np.bincount(
            match.doc_row,
            self._idf_squares.take(match.doc_terms) * match.doc_counts**2,
            len(match.doc_ids),
        )
        return _divide(dots, match.spread_gold(gold_squares) * doc_squares)


class PairTfidf:
    """tf-idf fitted on {document} ∪ gold documents for every document, without fitting anything.

    With n gold documents, N = n + 1. Let g(w) be the number of gold documents that hold w, c_x(w) the count of w in x, and
    idf(f) = ln((2 + n) / (1 + f)) + 1. A word of the document has frequency g(w) + 1, any other word g(w), so
      dot(gold_i, d)  = Σ_w c_i c_d idf(g + 1)^2                                 (only shared words count)
      |d|^2           = Σ_w c_d^2 idf(1)^2 + Σ_{w shared} c_d^2 (idf(g + 1)^2 - idf(1)^2)
      |gold_i|^2      = Σ_w c_i^2 idf(g)^2 + Σ_{w shared} c_i^2 (idf(g + 1)^2 - idf(g)^2)
    where a word is shared if d and any gold document hold it. The collection is a list: a document that is itself gold counts twice.
    """

    def __init__(self, counts: _TermCounts):
        self._counts = counts

    def similarity(
        self, gold_ids: Sequence[Sequence[int]], doc_ids: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Cosines [n, R] in [0, 1], see `Similarity`. ValueError if the corpus lacks an id."""
        match = _Match(self._counts, gold_ids, doc_ids)
        frequency = np.count_nonzero(match.table, axis=0)  # [C] g
        total = 2.0 + match.gold_number  # [B]
        of_column = total[match.gold_question[match.gold_row]]  # [C]
        without = np.square(np.log(of_column / (1 + frequency)) + 1)[
            match.gold_column
        ]  # [C] idf(g)^2, of each entry's word
        within = np.square(np.log(of_column / (2 + frequency)) + 1)  # [C] idf(g + 1)^2
        alone = np.square(np.log(total / 2) + 1)[match.doc_question]  # [R] idf(1)^2

        weighted = match.counts * within.take(match.column)  # [s]
        shared_squares = match.sum_shared(match.counts**2)
        squares = np.bincount(match.doc_row, match.doc_counts**2, len(match.doc_ids))
        doc_squares = alone * (squares - shared_squares) + match.sum_shared(
            match.counts * weighted
        )  # whole numbers: an exact difference
        gold_squares = match.spread_gold(
            np.bincount(match.gold_row, match.gold_counts**2 * without, len(match.gold_ids))
        )  # [n, R] if d held none of it
        dots = np.zeros_like(gold_squares)
        for i, gold in enumerate(match.table):
            dots[i] = match.sum_shared(gold.take(match.column) * weighted)
            gold_squares[i] += match.sum_shared((gold**2 * (within - without)).take(match.column))
        return _divide(dots, gold_squares * doc_squares)


def _flatten(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> all ids, one question after the other [m], the question of each [m], and where each question begins and the last one ends [B + 1]."""
    ends = np.cumsum([0, *map(len, ids)])
    return (
        np.fromiter(itertools.chain.from_iterable(ids), np.int64, ends[-1]),
        np.repeat(np.arange(len(ids)), np.diff(ends)),
        ends,
    )


def _divide(dots: np.ndarray, squared_norms: np.ndarray) -> np.ndarray:
    """Cosines; 0 for a document without words."""
    cosines = np.divide(
        dots, np.sqrt(squared_norms), out=np.zeros_like(dots), where=squared_norms > 0
    )
    return np.minimum(cosines, 1.0)  # rounding above 1 would break Σ_t G^t <= 1


_FITS = {"corpus": CorpusTfidf, "pair": PairTfidf}
