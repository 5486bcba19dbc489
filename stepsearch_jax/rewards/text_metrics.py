"""Word F1, exact match and cover match of two texts (host).

The method is SQuAD's (Rajpurkar et al. 2016, section 6.1) on texts in Unicode's normal form C. In
scripts without spaces between words each character counts as a word (`words.py`). Accepted answers
and queries recur, so their normalised form is cached; texts of a policy are not.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stepsearch_jax.words import fold, separate_characters

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION_BYTES = string.punctuation.encode()
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ARTICLE_WORDS = frozenset(("a", "an", "the"))


class AnswerScores(NamedTuple):
    """Best over the accepted answers, each in [0, 1]."""

    em: float  # the normalised texts are equal
    f1: float  # words in common, see `f1`
    cover_em: float  # an accepted answer stands in the given one, as whole words


def compare_answer(
    prediction: str | None, answers: Sequence[str], unordered: bool = False
) -> AnswerScores:
    """Scores of `prediction`; all 0 if it is None or if there are no accepted answers.

    unordered: each accepted answer is a list with commas. Then em compares the sets of entries, and
    cover_em asks for every entry.
    """
    if prediction is None:
        return AnswerScores(0.0, 0.0, 0.0)
    text, words = _read(prediction)
    accepted = [_list_entries(answer, unordered) for answer in answers]
    given = _list_entries(prediction, unordered, _read) if unordered else {text}
    em = given in accepted
    return AnswerScores(
        em=float(em),
        f1=_best_f1(words, [_read_accepted(answer)[1] for answer in answers]),
        cover_em=float(em or any([_holds_all(text, entries) for entries in accepted])),
    )


def match_queries(queries: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[list[float]]:
    """Best F1 of every query (rows) with each group of accepted queries (columns).

    0 for an empty group.
    """
    groups = [[_read_accepted(text)[1] for text in texts] for texts in accepted]
    return [
        [_best_f1(words, group) for group in groups]
        for words in [_read(query)[1] for query in queries]
    ]


def f1(a: str, b: str) -> float:
    """Word-level F1 of two texts after normalisation, in [0, 1].

        F1 = 2 |a ∩ b| / (|a| + |b|)    over bags of words

    Two blank texts have 1, as in exact match; a blank text and another one have 0.
    """
    return _best_f1(_read(a)[1], [_read(b)[1]])


def holds_answer(text: str, answers: Sequence[str], unordered: bool = False) -> bool:
    """Whether a text holds one of the answers as whole words, both normalised.

    No text holds an answer without words. unordered: as in `compare_answer`; the text holds every
    entry.
    """
    words = " ".join(_list_words(text))
    accepted = [_list_entries(answer, unordered) for answer in answers]
    return any([any(entries) and _holds_all(words, entries) for entries in accepted])


def normalize(text: str) -> str:
    """SQuAD normalisation.

    Lower case, without ASCII punctuation and the words a, an, the; white space collapsed. A text of
    which nothing would be left keeps its articles ("A", a grade), and one of punctuation alone
    keeps that ("*"), so that an empty answer does not equal them. The result is in normal form C.
    Reference: SQuAD's script compares such texts as empty ones, and knows no normal form.
    """
    return " ".join(_split(text))


def _split(text: str) -> list[str]:
    """The words of the normalised text, separated by white space."""
    text = fold(text)
    return _split_as_squad(text) or text.translate(_PUNCTUATION).split() or text.split()


def _split_as_squad(text: str) -> list[str]:
    # Without punctuation such a text is letters, digits and spaces, so articles are whole words:
    # the same result, three times faster.
    if text.isascii() and text.isprintable():
        words = text.encode().translate(None, _PUNCTUATION_BYTES).decode().split()
        if _ARTICLE_WORDS.isdisjoint(words):
            return words
        return [word for word in words if word not in _ARTICLE_WORDS]
    return _ARTICLES.sub(" ", text.translate(_PUNCTUATION)).split()


def _list_words(text: str) -> list[str]:
    """The words of the normalised text, those of scripts without spaces by characters."""
    words = _split(text)
    if text.isascii():
        return words
    return [part for word in words for part in separate_characters(word)]


def _read(text: str) -> tuple[str, frozenset]:
    """-> the words of the normalised text, joined by spaces, and their bag as a set.

    The n-th repetition of a word is the element (word, n), so intersections of sets are those of
    bags.
    """
    words = _list_words(text)
    bag = frozenset(words)
    if len(bag) < len(words):
        counts: dict[str, int] = {}
        for word in words:
            counts[word] = counts.get(word, 0) + 1
        bag = bag.union((word, n) for word, count in counts.items() for n in range(1, count))
    return " ".join(words), bag


_read_accepted = functools.lru_cache(maxsize=1 << 18)(_read)


def _list_entries(answer: str, unordered: bool, read: Callable = _read_accepted) -> set[str]:
    """The entries of a list with commas, normalised; of any other answer, the answer itself."""
    entries = {read(entry)[0] for entry in answer.split(",")} - {""} if unordered else ()
    return set(entries) or {read(answer)[0]}


def _holds_all(text: str, entries: set[str]) -> bool:
    """Whether a text holds each of these as whole words; all are normalised."""
    return all([f" {entry} " in f" {text} " for entry in entries])


def _best_f1(words: frozenset, others: Sequence[frozenset]) -> float:
    return max(
        [
            2 * len(words & other) / (len(words) + len(other)) if words or other else 1.0
            for other in others
        ],
        default=0.0,
    )
