"""Cosine similarity of tf-idf vectors between gold and retrieved documents, by corpus id (host).

    x_w = count(w) * idf(w),    idf(w) = ln((1 + N) / (1 + df(w))) + 1
    cos(x, y) = Σ_w x_w y_w / (|x| |y|)

A document is a row of `texts`. Weights and norm are the defaults of scikit-learn's
`TfidfVectorizer`. Tokens have two characters and more. The two fits differ in the collection that N
and df count, and in the tokens of texts that are not ASCII:
  `CorpusTfidf`  the whole corpus, once; the words of the search index (`words.py`);
  `PairTfidf`    {document} ∪ gold documents, for every document, in closed form; scikit-learn's
                 tokens, runs of `\\w` in lower case.
Reference: the paper does not say what the idf is fitted on; the released code refits a vectoriser
  for every retrieved document ("pair"), which makes a similarity depend on the number of gold
  documents and gives unrelated texts about 0.1. It also cuts the documents of a search out of their
  rendering between "##>" and "<##", so that all but the last end with the next one's label,
  "Doc 2": words of their own, which "pair" counts.

Words are counted once per corpus; a batch of questions is then compared in one pass over arrays.
Every sum runs over the words of one document in the order of their first occurrence, so a
similarity does not depend, to the last bit, on the other documents in the call.
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
from stepsearch_jax.words import RECIPE, split_words

_COUNTED_AT_ONCE = 1 << 20  # entries in memory before they are written
_LOOKED_AT = 100  # texts, evenly spread, whose hash tells apart two readings of one corpus
_ARRAYS = "ends", "frequencies", "labels"  # of `_TermCounts`, one file each
_WORD = re.compile(r"\w+")
_LABELLED = 1000  # the highest rank whose label "Doc RANK" can be counted


class Similarity(Protocol):
    """Anything that compares documents of one corpus by id."""

    def similarity(
        self,
        gold_ids: Sequence[Sequence[int]],
        doc_ids: Sequence[Sequence[int]],
        next_ranks: Sequence[Sequence[int]] | None = None,
    ) -> np.ndarray:
        """gold_ids[b] and doc_ids[b] of B questions -> cosines [n, R] float64 in [0, 1].

        R = Σ_b len(doc_ids[b]); n is the largest number of gold documents. Entry (i, r) compares
        the r-th of all doc_ids, question after question, with gold document i of its own question;
        0 if the question has fewer. next_ranks[b]: the rank, from 1, of the document that follows
        each of doc_ids[b] in its search, 0 behind the last; only `PairTfidf` reads it.
        """
        ...


def fit_similarity(
    texts: Sequence[str], *, tfidf_fit: str, folder: pathlib.Path | None = None, corpus: str = ""
) -> Similarity:
    """The similarity over a corpus whose document i is `texts[i]`.

    tfidf_fit: "corpus" or "pair". folder: keeps the term counts on disk, memory-mapped; None: they
    are counted in memory. corpus: identifies the texts in the folder.
    Raises ValueError on another fit, if there are no texts, or if the folder is damaged.
    """
    check_choice("reward.tfidf_fit", tfidf_fit)
    if not len(texts):
        raise ValueError("the corpus holds no documents; tf-idf needs at least one")
    if folder is None:
        files = io.BytesIO(), io.BytesIO()
        arrays = _count_terms(texts, tfidf_fit, *files)
        terms, counts = (np.frombuffer(file.getbuffer(), np.int32) for file in files)
        return _FITS[tfidf_fit](_TermCounts(terms, counts, *arrays))

    # Count the terms unless the folder holds those of the same texts, counted by the same code.
    def write(made: pathlib.Path) -> None:
        with open(made / "terms.bin", "wb") as terms, open(made / "counts.bin", "wb") as counts:
            for name, values in zip(_ARRAYS, _count_terms(texts, tfidf_fit, terms, counts)):
                np.save(made / f"{name}.npy", values)

    some = hash_texts(texts[i] for i in range(0, len(texts), -(-len(texts) // _LOOKED_AT)))
    code = hash_texts([inspect.getsource(sys.modules[__name__])])
    key = dict(kind="term-counts", corpus=corpus, documents=len(texts), texts=some, code=code)
    key["words"] = RECIPE if tfidf_fit == "corpus" else "scikit-learn"
    prepare_folder(folder, key, write)
    # Map the files into memory; an empty one cannot be mapped.
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
        ends = arrays[0]
        files = [
            np.memmap(folder / f"{name}.bin", np.int32, mode="r", shape=(int(ends[-1]),))
            if ends[-1]
            else np.zeros(0, np.int32)
            for name in ("terms", "counts")
        ]
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"the counted words in {folder} are damaged ({error}): remove this folder, and they are"
            " counted again"
        ) from error
    return _FITS[tfidf_fit](_TermCounts(*map(np.asarray, (*files, *arrays))))


def _split_as_scikit_learn(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _count_terms(
    texts: Sequence[str], tfidf_fit: str, terms_file: BinaryIO, counts_file: BinaryIO
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes every document's terms and counts, int32 -> the other arrays of `_TermCounts`.

    Memory grows with the number of distinct words.
    """
    split = split_words if tfidf_fit == "corpus" else _split_as_scikit_learn
    vocabulary: defaultdict[str, int] = defaultdict()
    vocabulary.default_factory = vocabulary.__len__  # an unknown word gets the next free term id
    terms, counts, ends = array.array("i"), array.array("i"), array.array("q", [0])
    frequencies = np.zeros(0, np.int64)

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
        tokens = split(text)
        words = Counter(vocabulary[token] for token in tokens if len(token) > 1)
        terms.extend(words.keys())
        counts.extend(words.values())
        ends.append(ends[-1] + len(words))
        if len(terms) >= _COUNTED_AT_ONCE:
            frequencies = flush()
    labels = [vocabulary[word] for word in ("doc", *map(str, range(10, _LABELLED + 1)))]
    return np.array(ends), flush(), np.array(labels)


@dataclasses.dataclass(frozen=True)
class _TermCounts:
    """Sparse term counts of every document.

    8 bytes per distinct word of a document, about 0.6 kB for a passage of 100 words.
    """

    terms: np.ndarray  # [E] int32
    counts: np.ndarray  # [E] int32: occurrences of the term in the document
    ends: np.ndarray  # [documents + 1] int64: document i owns entries ends[i] to ends[i + 1]
    frequencies: np.ndarray  # [V] int64: number of documents with the term
    labels: np.ndarray  # int64: the terms "doc", "10", "11" … of the labels of ranks

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.ends) - 1

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries of documents ids [m] -> (terms [e], counts [e] float64, bounds [m + 1]).

        The entries stand document after document; document i owns bounds[i] to bounds[i + 1].
        Raises ValueError if the corpus lacks an id.
        """
        wrong = (ids < 0) | (ids >= self.documents)
        if wrong.any():
            raise ValueError(
                f"document id {ids[wrong][0]} is not in the corpus of {self.documents} documents;"
                " are gold ids and corpus from one data set?"
            )
        starts, stops = self.ends[ids], self.ends[ids + 1]
        places = list(map(slice, starts.tolist(), stops.tolist()))
        terms, counts = (
            np.concatenate([whole[:0], *map(whole.__getitem__, places)])
            for whole in (self.terms, self.counts)
        )
        return terms, counts.astype(np.float64), np.concatenate([[0], np.cumsum(stops - starts)])

    def gather_labelled(
        self, ids: np.ndarray, next_ranks: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `gather`, with the label "Doc RANK" behind each document whose next rank is not 0."""
        terms, counts, bounds = self.gather(ids)
        ranks = np.asarray(next_ranks, np.int64)
        if ranks.max(initial=0) > _LABELLED:
            raise ValueError(
                f"reward.tfidf_fit=pair counts the labels of up to {_LABELLED} documents a search: "
                "lower search.k"
            )
        # A rank of one digit is no token.
        words = [(self.labels[0], ranks > 0)]
        words += [(self.labels[rank - 9], ranks == rank) for rank in np.unique(ranks[ranks >= 10])]
        for term, labelled in words:
            row = np.repeat(np.arange(len(ids)), np.diff(bounds))
            there = (terms == term) & labelled[row]
            counts = counts + there
            lacking = labelled.copy()
            lacking[row[there]] = False
            ends = bounds[1:][lacking]
            terms, counts = np.insert(terms, ends, term), np.insert(counts, ends, 1.0)
            bounds = bounds + np.concatenate([[0], np.cumsum(lacking)])
        return terms, counts, bounds


class _Match:
    """Words of B questions' gold documents (m in all) in the retrieved documents (R in all).

    A column is a word of one question's gold documents. Its index is that of one entry of the word
    in them, so C is the number of their entries; if several hold a word, the other columns stay
    unused. Words in none of the question's gold documents have no column: they add nothing to dot
    products.
    """

    def __init__(
        self,
        counts: _TermCounts,
        gold_ids: Sequence[Sequence[int]],
        doc_ids: Sequence[Sequence[int]],
        next_ranks: Sequence[Sequence[int]] | None = None,
    ):
        self.gold_ids, self.gold_question, gold_ends = _flatten(gold_ids)  # [m], [m], [B + 1]
        self.doc_ids, self.doc_question, doc_ends = _flatten(doc_ids)  # [R], [R], [B + 1]
        self.gold_number = np.diff(gold_ends)  # [B]
        # [m]: place of the gold document among those of its question.
        self.gold_place = np.arange(len(self.gold_ids)) - gold_ends[self.gold_question]
        # [C], [C], [m + 1] and [e], [e], [R + 1]
        self.gold_terms, self.gold_counts, gold_starts = counts.gather(self.gold_ids)
        self.doc_terms, self.doc_counts, doc_starts = (
            counts.gather(self.doc_ids)
            if next_ranks is None
            else counts.gather_labelled(
                self.doc_ids, list(itertools.chain.from_iterable(next_ranks))
            )
        )

        # Columns, question by question, through a table over all words.
        numbers = np.arange(len(self.gold_terms), dtype=np.int32)
        column_of = np.full(len(counts.frequencies), -1, np.int32)
        self.gold_column = np.empty(len(self.gold_terms), np.int32)
        doc_column = np.empty(len(self.doc_terms), np.int32)
        gold_bounds, doc_bounds = gold_starts[gold_ends].tolist(), doc_starts[doc_ends].tolist()
        for gold_start, gold_end, doc_start, doc_end in zip(
            gold_bounds, gold_bounds[1:], doc_bounds, doc_bounds[1:]
        ):
            terms = self.gold_terms[gold_start:gold_end]
            column_of[terms] = numbers[gold_start:gold_end]
            self.gold_column[gold_start:gold_end] = column_of.take(terms)
            doc_column[doc_start:doc_end] = column_of.take(self.doc_terms[doc_start:doc_end])
            column_of[terms] = -1

        # [C]: the gold document of an entry; [n, C]: counts, by place of the gold document.
        self.gold_row = np.repeat(np.arange(len(self.gold_ids)), np.diff(gold_starts))
        self.table = np.zeros((self.gold_number.max(initial=0), len(numbers)))
        self.table[self.gold_place.take(self.gold_row), self.gold_column] = self.gold_counts

        # [e]: the retrieved document of an entry; [s]: entries that have a column.
        self.doc_row = np.repeat(np.arange(len(self.doc_ids)), np.diff(doc_starts))
        shared = np.flatnonzero(doc_column >= 0)
        self.row = self.doc_row.take(shared)  # [s]
        self.column = doc_column.take(shared).astype(np.int64)  # [s]
        self.counts = self.doc_counts.take(shared)  # [s]

    def sum_shared(self, values: np.ndarray) -> np.ndarray:
        """Sums over the entries of each retrieved document that have a column: [s] -> [R]."""
        return np.bincount(self.row, values, len(self.doc_ids))

    def spread_gold(self, values: np.ndarray) -> np.ndarray:
        """Values of gold documents [m] -> those of each retrieved document's question [n, R].

        0 if the question has fewer gold documents.
        """
        table = np.zeros((len(self.table), len(self.gold_number)))
        table[self.gold_place, self.gold_question] = values
        return table[:, self.doc_question]


class CorpusTfidf:
    """tf-idf with one idf for the whole corpus."""

    def __init__(self, counts: _TermCounts):
        self._counts = counts
        # [V]
        self._idf_squares = (np.log((1 + counts.documents) / (1 + counts.frequencies)) + 1) ** 2

    def similarity(
        self,
        gold_ids: Sequence[Sequence[int]],
        doc_ids: Sequence[Sequence[int]],
        next_ranks: Sequence[Sequence[int]] | None = None,
    ) -> np.ndarray:
        """Cosines [n, R] in [0, 1], see `Similarity`. ValueError if the corpus lacks an id."""
        match = _Match(self._counts, gold_ids, doc_ids)
        weighted = match.counts * self._idf_squares.take(match.gold_terms).take(match.column)  # [s]
        dots = np.zeros((len(match.table), len(match.doc_ids)))
        for i, gold in enumerate(match.table):
            dots[i] = match.sum_shared(gold.take(match.column) * weighted)
        gold_terms = self._idf_squares.take(match.gold_terms) * match.gold_counts**2
        gold_squares = np.bincount(match.gold_row, gold_terms, len(match.gold_ids))
        doc_terms = self._idf_squares.take(match.doc_terms) * match.doc_counts**2
        doc_squares = np.bincount(match.doc_row, doc_terms, len(match.doc_ids))
        return _divide(dots, match.spread_gold(gold_squares) * doc_squares)


class PairTfidf:
    """tf-idf fitted on {document} ∪ gold documents for every document, in closed form.

        dot(gold_i, d)  = Σ_w c_i c_d idf(g + 1)^2
        |d|^2           = Σ_w c_d^2 idf(1)^2 + Σ_{w shared} c_d^2 (idf(g + 1)^2 - idf(1)^2)
        |gold_i|^2      = Σ_w c_i^2 idf(g)^2 + Σ_{w shared} c_i^2 (idf(g + 1)^2 - idf(g)^2)

    n gold documents make N = n + 1 documents and idf(f) = ln((2 + n) / (1 + f)) + 1. c_x(w) is the
    count of w in x, g(w) the number of gold documents that hold w. A word of the document has
    frequency g(w) + 1, any other word g(w). A word is shared if d and any gold document hold it.
    The collection is a list: a document that is itself gold counts twice.
    """

    def __init__(self, counts: _TermCounts):
        self._counts = counts

    def similarity(
        self,
        gold_ids: Sequence[Sequence[int]],
        doc_ids: Sequence[Sequence[int]],
        next_ranks: Sequence[Sequence[int]] | None = None,
    ) -> np.ndarray:
        """Cosines [n, R] in [0, 1], see `Similarity`. ValueError if the corpus lacks an id."""
        match = _Match(self._counts, gold_ids, doc_ids, next_ranks)
        frequency = np.count_nonzero(match.table, axis=0)  # [C] g
        total = 2.0 + match.gold_number  # [B]
        of_column = total[match.gold_question[match.gold_row]]  # [C]
        # [C]: idf(g)^2 of each entry's word
        without = np.square(np.log(of_column / (1 + frequency)) + 1)[match.gold_column]
        within = np.square(np.log(of_column / (2 + frequency)) + 1)  # [C] idf(g + 1)^2
        alone = np.square(np.log(total / 2) + 1)[match.doc_question]  # [R] idf(1)^2

        weighted = match.counts * within.take(match.column)  # [s]
        shared_squares = match.sum_shared(match.counts**2)
        squares = np.bincount(match.doc_row, match.doc_counts**2, len(match.doc_ids))
        own_squares = squares - shared_squares  # whole numbers: an exact difference
        doc_squares = alone * own_squares + match.sum_shared(match.counts * weighted)
        # [n, R]: first as if d held none of the words, then corrected for the shared ones.
        gold_squares = np.bincount(
            match.gold_row, match.gold_counts**2 * without, len(match.gold_ids)
        )
        gold_squares = match.spread_gold(gold_squares)
        dots = np.zeros_like(gold_squares)
        for i, gold in enumerate(match.table):
            dots[i] = match.sum_shared(gold.take(match.column) * weighted)
            gold_squares[i] += match.sum_shared((gold**2 * (within - without)).take(match.column))
        return _divide(dots, gold_squares * doc_squares)


def _flatten(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> all ids, question after question [m], the question of each [m], and bounds [B + 1].

    Question b owns bounds[b] to bounds[b + 1].
    """
    bounds = np.cumsum([0, *map(len, ids)])
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, bounds[-1])
    return flat, np.repeat(np.arange(len(ids)), np.diff(bounds)), bounds


def _divide(dots: np.ndarray, squared_norms: np.ndarray) -> np.ndarray:
    """Cosines; 0 for a document without words."""
    cosines = np.divide(
        dots, np.sqrt(squared_norms), out=np.zeros_like(dots), where=squared_norms > 0
    )
    return np.minimum(cosines, 1.0)  # rounding above 1 would break Σ_t G^t <= 1


_FITS = {"corpus": CorpusTfidf, "pair": PairTfidf}
