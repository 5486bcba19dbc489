"""Text metrics: by hand, step by step on random texts, and against recorded scores."""

import gzip
import itertools
import json
import re
import string
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsearch_jax.rewards import text_metrics


def exact_match(prediction, answer):
    return text_metrics.compare_answer(prediction, [answer]).em


def cover_match(prediction, answer):
    return text_metrics.compare_answer(prediction, [answer]).cover_em


def test_f1_and_exact_match_by_hand():
    # "The Eiffel-Tower, Paris" -> "eiffeltower paris"; "a tower in Paris!" -> "tower in paris": one
    # shared word of 2 and 3: F1 = 2*1/(2+3).
    assert text_metrics.f1("The Eiffel-Tower, Paris", "a tower in Paris!") == pytest.approx(2 / 5)
    # Bags, not sets: "no no yes" against "no yes yes" share one "no" and one "yes": 2*2/(3+3).
    assert text_metrics.f1("no no yes", "no yes yes") == pytest.approx(2 / 3)
    assert exact_match("The  U.S.A.", "usa") == 1 and exact_match("USA 1", "usa") == 0
    # Articles only as whole words, after punctuation.
    assert text_metrics.normalize("An apple, the Theory of A.") == "apple theory of"
    assert cover_match("it is New York City", "New York") == 1
    assert cover_match("newer yorks", "new york") == 0
    assert cover_match("Yorks", "York") == 0


def test_empty_texts_and_missing_answers():
    # SQuAD's normalisation leaves nothing of these answers; only they themselves equal them.
    for answer, equal in (("A", "a"), ("A", "A."), ("The", "the"), ("*", " * "), ("a *", "A")):
        assert exact_match(equal, answer) == text_metrics.f1(equal, answer) == 1
        for other in ("", "...", "an", "-", "B", "Paris"):
            assert text_metrics.compare_answer(other, [answer]) == (0, 0, 0)
    assert exact_match("...", "***") == 0
    assert text_metrics.f1("", "Paris") == text_metrics.f1("Paris", "") == 0
    assert (
        text_metrics.compare_answer(None, ["", "Paris"])
        == text_metrics.compare_answer("Paris", [])
        == (0, 0, 0)
    )
    # The best alias counts: "city of light" shares city and of, 2*2/(3+3), more than "Paris" with
    # 2*1/(3+1).
    aliases = ["London", "Paris", "the city of light"]
    scores = text_metrics.compare_answer("city of Paris", aliases)
    assert scores == pytest.approx((0, 4 / 6, 1))


def test_holding_an_answer_by_hand():
    holds = text_metrics.holds_answer
    # "bart lives in newyork usa"
    assert holds("Bart lives in New-York, the U.S.A.", ["Oslo", "the USA"])
    # Whole words, in this order.
    assert not holds("Bart lives in New-York", ["art", "York", "lives New"])
    # No text holds an answer without words.
    assert not holds("the", ["a", ""]) and not holds("", [""])
    assert not holds("Paris", [])


NAMES = ("Ann Oss", "the Bob", "Cid", "ann oss")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    st.lists(st.sampled_from([*NAMES, "Dan", "Ann Oss Cid"]), max_size=4),
    st.randoms(),
)
def test_scores_of_a_list_do_not_depend_on_its_order(accepted, given_entries, rng):
    """Equal sets have em 1, held ones cover_em 1, whatever the order of either list."""
    before = text_metrics.compare_answer(", ".join(given_entries), [", ".join(accepted)], True)
    sets = [
        {" ".join(text_metrics.normalize(entry).split()) for entry in entries}
        for entries in (given_entries, accepted)
    ]
    assert before.em == (sets[0] == sets[1])
    rng.shuffle(accepted)
    rng.shuffle(given_entries)
    joined = ", ".join(given_entries)
    assert text_metrics.compare_answer(joined, [", ".join(accepted)], True)[:2] == before[:2]
    for entries in itertools.permutations(accepted):
        cover = text_metrics.compare_answer(f"see {joined}", [", ".join(entries)], True).cover_em
        assert cover == text_metrics.holds_answer(f"see {joined}", [", ".join(entries)], True)
        assert cover or not sets[1] <= sets[0]


def test_a_list_by_hand():
    compare = lambda text, *answers: text_metrics.compare_answer(text, answers, True)
    assert compare("Bob,  the Cid.", "Cid, Bob") == compare("Cid, Bob", "Cid, Bob") == (1, 1, 1)
    assert compare("Bob and Cid", "Cid, Bob") == (0, pytest.approx(4 / 5), 1)
    assert compare("Bob", "Cid, Bob") == (0, pytest.approx(2 / 3), 0)
    assert compare("Bob, Cid, Dan", "Cid, Bob") == (0, pytest.approx(4 / 5), 1)
    assert compare("Dan", "Cid, Bob", "Dan").em == 1
    assert compare("*, Bob", "Bob, *") == (1, 1, 1)
    assert compare("", "Cid, Bob") == compare(", ,", "Cid, Bob") == (0, 0, 0)
    # Elsewhere commas are punctuation.
    assert exact_match("Texas, Paris", "Paris, Texas") == 0
    assert exact_match("Paris Texas", "Paris, Texas") == 1


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("aAnthe .,-'_’é1\t\n\x01\x1cİß")) | st.text())
def test_normalisation_is_squads(text):
    """Step by step, like the official evaluation script; ours has a short cut for plain ASCII.

    Where that script leaves nothing, articles stay, or else punctuation. The text is in normal form
    C first.
    """
    text = unicodedata.normalize("NFC", text.lower())
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", kept).split() or kept.split() or text.lower().split()
    assert text_metrics.normalize(text) == " ".join(words)


@settings(max_examples=200, deadline=None)
@given(
    *[st.lists(st.sampled_from(["red", "fox", "the", "owl", "Red!"]), max_size=7).map(" ".join)] * 2
)
def test_f1_equals_counting(a, b):
    """Against the textbook way, precision and recall of two counters."""
    words_a, words_b = (text_metrics.normalize(text).split() for text in (a, b))
    shared = sum((Counter(words_a) & Counter(words_b)).values())
    if shared:
        precision, recall = shared / len(words_a), shared / len(words_b)
        assert text_metrics.f1(a, b) == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert text_metrics.f1(a, b) == float(not words_a and not words_b)


def test_f1_and_exact_match_agree_with_recorded_scores(shared_data):
    """All scores that another system recorded with its 600 real transcripts must agree."""
    with gzip.open(shared_data / "transcripts" / "search_r1_eval_sample.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 600
    for row in rows:
        scores = text_metrics.compare_answer(row["pred"], row["golden_answers"])
        assert scores.em == row["em"] and scores.f1 == pytest.approx(row["f1"], abs=1e-6)
