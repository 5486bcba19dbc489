"""Measures of evaluated questions by hand; means and bootstrap intervals by loops and a law."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_episodes import answer, invalid, make_episode, search

from stepsearch_jax.evaluation.measures import Estimate, estimate, list_measures, measure_episode
from stepsearch_jax.records import Question, SubQuestion

TEXTS = [
    "Rome\nThe capital of Italy.",
    "Po\nA river in Italy.",
    "Turin\nA city on the Po.",
    "Paris\nA city.",
    "Seine\nA river.",
]
# Two hops: documents 2 and then 1 are needed; the answer is "the Po", also accepted as "Padus".
QUESTION = Question(
    "q",
    "Which river?",
    "the Po",
    ("Padus",),
    (SubQuestion("?", "!", gold_ids=(2,)), SubQuestion("?", "!", gold_ids=(1, 0))),
)


def measure(*turns, given=(), question=QUESTION, hops=3, truncated=False):
    pairs = measure_episode(
        make_episode(*turns, question=question, truncated=truncated), given, TEXTS, hops
    )
    assert pairs.shape == (len(list_measures(hops)), 2)
    return {name: tuple(pair) for name, pair in zip(list_measures(hops), pairs.tolist())}


def test_a_searching_episode_by_hand():
    """A search that finds Turin (hop 1) and Paris, an invalid turn, an answer half right.

    "Po Seine" against "Po": 2 * 1 / (2 + 1) = 2/3. Turin's text holds "the Po". Gold: one of three
    documents; all of hop 1, none of the two of hop 2.
    """
    found = measure(search("turin river", 2, 3), invalid("hm"), answer("Po Seine"))
    assert found == {
        "em": (0, 1),
        "f1": (pytest.approx(2 / 3), 1),
        "cover_em": (1, 1),
        "answer_in_evidence": (1, 1),
        "gold_recall": (pytest.approx(1 / 3), 1),
        "gold_recall_hop_1": (1, 1),
        "gold_recall_hop_2": (0, 1),
        "gold_recall_hop_3": (0, 0),
        "searches": (1, 1),
        "invalid_turns": (1, 3),
        "truncated": (0, 1),
    }


def test_half_of_a_hop_and_a_failed_search():
    found = measure(search("rome", 0), search("x", ok=False), truncated=True)
    assert found["gold_recall_hop_2"] == (0.5, 1) and found["searches"] == (2, 1)
    assert found["truncated"] == (1, 1) and found["em"] == (0, 1)
    assert found["answer_in_evidence"] == (0, 1), "Rome's text says nothing of the Po"


def test_documents_that_were_given_count_as_retrieved():
    found = measure(answer("The Padus!"), given=(1, 2, 0))
    recalls = "gold_recall", "gold_recall_hop_1", "gold_recall_hop_2"
    for name in ("em", *recalls, "answer_in_evidence"):
        assert found[name] == (1, 1)
    assert found["searches"] == (0, 1)


def test_a_list_of_answers_may_stand_in_any_order():
    question = Question("q", "Which?", "Turin, Po", unordered=True)
    found = measure(search("x", 2), answer("the Po, Turin"), question=question)
    assert found["em"] == found["f1"] == found["cover_em"] == (1, 1)
    assert found["answer_in_evidence"] == (1, 1)
    assert measure(search("x", 1), question=question)["answer_in_evidence"] == (0, 1)


def test_what_is_not_defined_has_no_weight():
    """No evidence without documents, no recall without known gold ones, no share without turns."""
    direct = measure(answer("Po"), given=None)
    for name in ("answer_in_evidence", "gold_recall", "gold_recall_hop_1"):
        assert direct[name][1] == 0
    assert direct["em"] == (1, 1)
    unknown = measure(search("x", 1), answer("Po"), question=Question("q", "?", "Po"))
    assert unknown["gold_recall"][1] == unknown["gold_recall_hop_1"][1] == 0
    assert unknown["answer_in_evidence"] == (1, 1)
    assert measure()["invalid_turns"] == (0, 0)


def test_estimates_by_hand():
    """Two questions: 1 of 1 and 1 of 3 turns make 2 of 4.

    A draw takes the first twice (1), both (1/2) or the second twice (1/3).
    """
    pairs = np.array([[[1.0, 1.0], [5.0, 0.0]], [[1.0, 3.0], [7.0, 0.0]]])
    share, undefined = estimate(pairs, 400, 0)
    assert share == Estimate(0.5, pytest.approx(1 / 3), 1.0)
    assert undefined == Estimate(None, None, None)
    assert estimate(pairs, 0, 0)[0] == Estimate(0.5, 0.5, 0.5)
    # Draws of the second question alone have no weight.
    half = np.array([[[1.0, 1.0]], [[0.0, 0.0]]])
    assert estimate(half, 50, 0)[0] == Estimate(1.0, 1.0, 1.0)


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(
        st.tuples(st.floats(-3, 3), st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=12
    ),
    seed=st.integers(0, 9),
)
def test_intervals_by_loops(values, seed):
    rng, ratios = np.random.default_rng(seed), []
    for _ in range(40):
        drawn = [values[i] for i in rng.integers(len(values), size=len(values))]
        if sum(weight for _, weight in drawn):
            ratios.append(sum(amount for amount, _ in drawn) / sum(weight for _, weight in drawn))
    got = estimate(np.array(values)[:, None], 40, seed)[0]
    if not sum(weight for _, weight in values):
        assert got == Estimate(None, None, None)
    elif ratios:
        ordered = sorted(ratios)
        between = lambda q: np.interp(q * (len(ordered) - 1), np.arange(len(ordered)), ordered)
        np.testing.assert_allclose(got[1:], [between(0.025), between(0.975)], atol=1e-9)


@pytest.mark.slow
def test_intervals_cover_the_mean_about_as_often_as_they_say():
    """200 samples of 80 answers, right with probability 0.3: 95 % of the intervals hold 0.3."""
    rng = np.random.default_rng(1)
    held = []
    for sample in range(200):
        pairs = np.stack([rng.random(80) < 0.3, np.ones(80)], axis=1)[:, None].astype(float)
        _, low, high = estimate(pairs, 300, sample)[0]
        held.append(low <= 0.3 <= high)
    assert 0.88 <= np.mean(held) <= 0.99
