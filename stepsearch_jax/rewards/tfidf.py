"""Cosine similarity of tf-idf vectors between gold and retrieved documents, by corpus id (host).

A document is a row of `texts`. Tokens, weights and norm are scikit-learn's `TfidfVectorizer` defaults: lower case, `\\b\\w\\w+\\b`, raw term counts,
smooth idf(w) = ln((1 + N) / (1 + df(w))) + 1, l2 norm. What differs is the collection that N and df count:
  `CorpusTfidf`  the whole corpus, once;
  `PairTfidf`    {document} ∪ gold documents, anew for every document, in closed form.
Reference: the paper does not say what the idf is fitted on; the released code refits a vectoriser for every retrieved document ("pair"), which makes
  one similarity depend on the number of gold documents and gives unrelated texts about 0.1.

Words are counted once, when the corpus is fitted; a whole batch of questions is then compared in one pass over arrays. Every sum runs over the words of one
document in the order in which it names them, so a similarity is the same to the last bit whatever else is asked for in the same call.
"""
from __future__ import annotations

import array
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

_TOKEN = re.compile(r"\b\w\w+\b")


class Similarity(Protocol):
    """Anything that compares documents of one corpus by id."""

    def similarity(self, gold_ids: Sequence[Sequence[int]], doc_ids: Sequence[Sequence[int]]) -> np.ndarray:
        """gold_ids[b] and doc_ids[b] of B questions -> [n, R] float64 in [0, 1], R = Σ_b len(doc_ids[b]), n the largest number of gold documents.

        Entry (i, r) compares the r-th of all doc_ids, one question after the other, with gold document i of its own question; 0 where there is none.
        """


def fit_similarity(texts: Sequence[str], *, tfidf_fit: str) -> Similarity:
    """The similarity over a corpus whose document i reads `texts[i]`; `tfidf_fit` is "corpus" or "pair". ValueError on anything else."""
    if tfidf_fit == "corpus":
        return CorpusTfidf(texts)
    if tfidf_fit == "pair":
        return PairTfidf(texts)
    raise ValueError(f"reward.tfidf_fit is {tfidf_fit!r}; it must be 'corpus' or 'pair'")


class _TermCounts:
    """Sparse term counts of every document: 8 bytes a distinct word, about 0.6 kB for a passage of 100 words."""

    def __init__(self, texts: Sequence[str]):
        if not len(texts):
            raise ValueError("the corpus holds no documents; tf-idf needs at least one")
        vocabulary: defaultdict[str, int] = defaultdict()
        vocabulary.default_factory = vocabulary.__len__  # an unknown word gets the next free term id
        terms, counts, ends = array.array("i"), array.array("i"), array.array("q", [0])
        for text in texts:
            words = Counter(map(vocabulary.__getitem__, _TOKEN.findall(text.lower())))
            terms.extend(words.keys())
            counts.extend(words.values())
            ends.append(len(terms))
        self.documents, self.words = len(texts), len(vocabulary)
        self.terms, self.counts, self.ends = np.array(terms), np.array(counts), np.array(ends)  # [E], [E], [documents + 1]: i owns ends[i] to ends[i + 1]

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries of the documents `ids` [m], one document after the other -> (their terms [e], where each document begins and the last one ends [m + 1],
        what to add to a place among these entries to find it in `terms` and `counts` [m]). ValueError if the corpus lacks an id."""
        wrong = (ids < 0) | (ids >= self.documents)
        if wrong.any():
            raise ValueError(f"document id {ids[wrong][0]} is not in the corpus of {self.documents} documents; are gold ids and corpus from one data set?")
        starts, stops = self.ends[ids], self.ends[ids + 1]
        terms = np.concatenate([self.terms[:0], *[self.terms[start:stop] for start, stop in zip(starts.tolist(), stops.tolist())]])
        ends = np.concatenate([[0], np.cumsum(stops - starts)])
        return terms, ends, starts - ends[:-1]


class _Match:
    """Where the words of B questions' gold documents (m in all) occur in the documents that the questions retrieved (R in all).

    A column is a word of one question's gold documents. It bears the number of an entry in which they name it, so C = number of their entries, and
    columns stay unused where several name the same word. Words that no gold document of the question holds have no column: they add nothing to dot products.
    """

    def __init__(self, counts: _TermCounts, gold_ids: Sequence[Sequence[int]], doc_ids: Sequence[Sequence[int]]):
        self.gold_ids, self.gold_question, gold_ends = _flatten(gold_ids)  # [m], [m], [B + 1]
        self.doc_ids, self.doc_question, doc_ends = _flatten(doc_ids)  # [R], [R], [B + 1]
        self.gold_number = np.diff(gold_ends)  # [B]
        self.gold_place = np.arange(len(self.gold_ids)) - gold_ends[self.gold_question]  # [m] among its question's
        self.gold_terms, gold_starts, gold_offset = counts.gather(self.gold_ids)  # [C], [m + 1], [m]
        doc_terms, doc_starts, doc_offset = counts.gather(self.doc_ids)  # [e], [R + 1], [R]

        # Columns, question by question, through a table over all words.
        numbers, column_of = np.arange(len(self.gold_terms), dtype=np.int32), np.full(counts.words, -1, np.int32)
        self.gold_column, doc_column = np.empty(len(self.gold_terms), np.int32), np.empty(len(doc_terms), np.int32)
        gold_bounds, doc_bounds = gold_starts[gold_ends].tolist(), doc_starts[doc_ends].tolist()
        for gold_start, gold_end, doc_start, doc_end in zip(gold_bounds, gold_bounds[1:], doc_bounds, doc_bounds[1:]):
            terms = self.gold_terms[gold_start:gold_end]
            column_of[terms] = numbers[gold_start:gold_end]
            self.gold_column[gold_start:gold_end] = column_of.take(terms)
            doc_column[doc_start:doc_end] = column_of.take(doc_terms[doc_start:doc_end])
            column_of[terms] = -1

        self.gold_row = np.repeat(np.arange(len(self.gold_ids)), np.diff(gold_starts))  # [C] which gold document
        self.gold_counts = counts.counts.take(numbers + gold_offset.take(self.gold_row)).astype(np.float64)  # [C]
        self.table = np.zeros((self.gold_number.max(initial=0), len(numbers)))  # [n, C] counts, by place of the gold document
        self.table[self.gold_place.take(self.gold_row), self.gold_column] = self.gold_counts

        shared = np.flatnonzero(doc_column >= 0)  # [s] entries of retrieved documents that have a column
        self.row = np.repeat(np.arange(len(self.doc_ids), dtype=np.int32), np.diff(doc_starts)).take(shared).astype(np.int64)  # [s] which document
        self.column = doc_column.take(shared).astype(np.int64)  # [s]
        self.counts = counts.counts.take(shared + doc_offset.take(self.row)).astype(np.float64)  # [s] in the retrieved document

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

    def __init__(self, texts: Sequence[str]):
        self._counts = counts = _TermCounts(texts)
        idf = np.log((1 + len(texts)) / (1 + np.bincount(counts.terms, minlength=counts.words))) + 1
        self._idf_squares = idf**2  # [V]
        self._squares = _sum_squares(counts, self._idf_squares)

    def similarity(self, gold_ids: Sequence[Sequence[int]], doc_ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Cosines [n, R] in [0, 1], see `Similarity`. ValueError if the corpus lacks an id."""
        match = _Match(self._counts, gold_ids, doc_ids)
        weighted = match.counts * self._idf_squares.take(match.gold_terms).take(match.column)  # [s]
        dots = np.zeros((len(match.table), len(match.doc_ids)))
        for i, gold in enumerate(match.table):
            dots[i] = match.sum_shared(gold.take(match.column) * weighted)
        return _divide(dots, match.spread_gold(self._squares[match.gold_ids]) * self._squares[match.doc_ids])


class PairTfidf:
    """tf-idf fitted on {document} ∪ gold documents for every document, without fitting anything.

    With n gold documents, N = n + 1. Let g(w) be the number of gold documents that hold w, c_x(w) the count of w in x, and
    idf(f) = ln((2 + n) / (1 + f)) + 1. A word of the document has frequency g(w) + 1, any other word g(w), so
      dot(gold_i, d)  = Σ_w c_i c_d idf(g + 1)^2                                 (only shared words count)
      |d|^2           = Σ_w c_d^2 idf(1)^2 + Σ_{w shared} c_d^2 (idf(g + 1)^2 - idf(1)^2)
      |gold_i|^2      = Σ_w c_i^2 idf(g)^2 + Σ_{w shared} c_i^2 (idf(g + 1)^2 - idf(g)^2)
    where a word is shared if d and any gold document hold it. The collection is a list: a document that is itself gold counts twice.
    """

    def __init__(self, texts: Sequence[str]):
        self._counts = _TermCounts(texts)
        self._squares = _sum_squares(self._counts, np.ones(self._counts.words))

    def similarity(self, gold_ids: Sequence[Sequence[int]], doc_ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Cosines [n, R] in [0, 1], see `Similarity`. ValueError if the corpus lacks an id."""
        match = _Match(self._counts, gold_ids, doc_ids)
        frequency = np.count_nonzero(match.table, axis=0)  # [C] g
        total = 2.0 + match.gold_number  # [B]
        of_column = total[match.gold_question[match.gold_row]]  # [C]
        without = np.square(np.log(of_column / (1 + frequency)) + 1)[match.gold_column]  # [C] idf(g)^2, of each entry's word
        within = np.square(np.log(of_column / (2 + frequency)) + 1)  # [C] idf(g + 1)^2
        alone = np.square(np.log(total / 2) + 1)[match.doc_question]  # [R] idf(1)^2

        weighted = match.counts * within.take(match.column)  # [s]
        shared_squares = match.sum_shared(match.counts**2)
        doc_squares = alone * (self._squares[match.doc_ids] - shared_squares) + match.sum_shared(match.counts * weighted)  # whole numbers: an exact difference
        gold_squares = match.spread_gold(np.bincount(match.gold_row, match.gold_counts**2 * without, len(match.gold_ids)))  # [n, R] if d held none of it
        dots = np.zeros_like(gold_squares)
        for i, gold in enumerate(match.table):
            dots[i] = match.sum_shared(gold.take(match.column) * weighted)
            gold_squares[i] += match.sum_shared((gold**2 * (within - without)).take(match.column))
        return _divide(dots, gold_squares * doc_squares)


def _flatten(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> all ids, one question after the other [m], the question of each [m], and where each question begins and the last one ends [B + 1]."""
    ends = np.cumsum([0, *map(len, ids)])
    return np.fromiter(itertools.chain.from_iterable(ids), np.int64, ends[-1]), np.repeat(np.arange(len(ids)), np.diff(ends)), ends


def _sum_squares(counts: _TermCounts, weights: np.ndarray) -> np.ndarray:
    """[documents] Σ_w weights[w] c(w)^2 of every document."""
    rows = np.repeat(np.arange(counts.documents), np.diff(counts.ends))
    return np.bincount(rows, weights[counts.terms] * counts.counts.astype(np.float64) ** 2, counts.documents)


def _divide(dots: np.ndarray, squared_norms: np.ndarray) -> np.ndarray:
    """Cosines; 0 for a document without words."""
    cosines = np.divide(dots, np.sqrt(squared_norms), out=np.zeros_like(dots), where=squared_norms > 0)
    return np.minimum(cosines, 1.0)  # rounding above 1 would break Σ_t G^t <= 1
