"""How well one text answers for another: word F1, exact match, cover match (host; method of SQuAD, Rajpurkar et al. 2016, section 6.1).

Accepted answers and queries come from the data set and recur, so what they consist of is kept; what a policy wrote does not, and is not.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION_BYTES = string.punctuation.encode()
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ARTICLE_WORDS = frozenset(("a", "an", "the"))


class AnswerScores(NamedTuple):
    """Best over the accepted answers, each in [0, 1]."""

    em: float  # the normalised texts are equal
    f1: float  # words in common, see `f1`
    cover_em: float  # an accepted answer stands in the given one, as whole words


def compare_answer(prediction: str | None, answers: Sequence[str]) -> AnswerScores:
    """How well `prediction` answers; 0 throughout for a missing one (None) or without accepted answers."""
    if prediction is None:
        return AnswerScores(0.0, 0.0, 0.0)
    text, words = _read(prediction)
    accepted = [_read_accepted(answer) for answer in answers]
    return AnswerScores(
        em=float(any([text == answer for answer, _ in accepted])),
        f1=_best_f1(words, [other for _, other in accepted]),
        cover_em=float(any([f" {answer} " in f" {text} " for answer, _ in accepted])),
    )


def match_queries(queries: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[list[float]]:
    """F1 of every query (rows) with the best of each group of accepted queries (columns); 0 for an empty group."""
    groups = [[_read_accepted(text)[1] for text in texts] for texts in accepted]
    return [
        [_best_f1(words, group) for group in groups]
        for words in [_read(query)[1] for query in queries]
    ]


def f1(a: str, b: str) -> float:
    """Word-level F1 of two texts after normalisation, in [0, 1]: 2 |a ∩ b| / (|a| + |b|) over bags of words.

    Two texts that are both empty after normalisation are equal (1), as in exact match; one empty text against a full one is 0.
    """
    return _best_f1(_read(a)[1], [_read(b)[1]])


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a document's text holds one of the answers as whole words, both normalised; an answer without words is held by none."""
    padded = f" {normalize(text)} "
    return any(answer and f" {answer} " in padded for answer, _ in map(_read_accepted, answers))


def normalize(text: str) -> str:
    """SQuAD normalisation: lower case, ASCII punctuation removed, the words a, an, the removed, white space collapsed."""
    return " ".join(_split(text))


def _split(text: str) -> list[str]:
    """The words of the normalised text."""
    if (
        text.isascii() and text.isprintable()
    ):  # all but punctuation are letters, digits and spaces, so articles are whole words: the same, three times faster
        words = text.lower().encode().translate(None, _PUNCTUATION_BYTES).decode().split()
        return (
            words
            if _ARTICLE_WORDS.isdisjoint(words)
            else [word for word in words if word not in _ARTICLE_WORDS]
        )
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _read(text: str) -> tuple[str, frozenset]:
    """-> the normalised text, and its bag of words as a set: a word's n-th repetition stands as (word, n), so that bags share what their sets share."""
    words = _split(text)
    bag = frozenset(words)
    if len(bag) < len(words):
        counts: dict[str, int] = {}
        for word in words:
            counts[word] = counts.get(word, 0) + 1
        bag = bag.union((word, n) for word, count in counts.items() for n in range(1, count))
    return " ".join(words), bag


_read_accepted = functools.lru_cache(maxsize=1 << 18)(_read)


def _best_f1(words: frozenset, others: Sequence[frozenset]) -> float:
    return max(
        [
            2 * len(words & other) / (len(words) + len(other)) if words or other else 1.0
            for other in others
        ],
        default=0.0,
    )
