"""Rewards of random episodes: bounds, loops, independence of the batch, and spoofed tags."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_tfidf import loop_gain
from text_episodes import (
    PAPER,
    TableSimilarity,
    answer,
    invalid,
    make_episode,
    make_question,
    search,
)

from stepsearch_jax.records import TurnStatus
from stepsearch_jax.rewards.scoring import information_gain, score_episodes
from stepsearch_jax.rewards.tfidf import fit_similarity

CORPUS = [
    "red fox runs",
    "blue fox sleeps",
    "red owl",
    "the elm and the oak",
    "fox and owl",
    "",
    "owl owl owl",
    "red fox runs",
]
SIMILARITY = fit_similarity(CORPUS, tfidf_fit="corpus")
FIELDS = ("step_rewards", "outcome_rewards", "gain", "redundancy", "key_rewards", "gate_passed")
words = st.sampled_from(["red fox", "blue", "owl and elm", "", "the"])
turns = st.builds(
    lambda query, ids, ok: search(query, *ids, ok=ok),
    words,
    st.lists(st.integers(0, 7), max_size=3),
    st.booleans(),
) | words.map(invalid)
questions = st.builds(
    lambda gold, keys: make_question(gold=gold, keys=keys, answers=("red fox", "owl")),
    st.lists(st.integers(0, 7), max_size=8, unique=True),
    st.lists(st.lists(words, max_size=2), min_size=1, max_size=3),
)
episodes = st.builds(
    lambda body, last, question: make_episode(*body, *last, question=question),
    st.lists(turns, max_size=4),
    st.lists(words.map(answer), max_size=1),
    questions,
)
choices = st.fixed_dictionaries(
    dict(
        format_gate=st.sampled_from(["strict", "ends_with_answer"]),
        format_failure=st.sampled_from(["zero_answer", "minus_one"]),
        key_match=st.sampled_from(["max", "overwrite"]),
        redundancy_scope=st.sampled_from(["earlier_turns", "rendered"]),
        search_cost=st.sampled_from([0.0, 0.25]),
        retrieved_answer_credit=st.sampled_from([0.0, 0.5]),
    )
).map(lambda change: PAPER | change | dict(rendered=CORPUS, texts=CORPUS))


def was_served(episode, t):
    return (
        t < len(episode.turns)
        and episode.turns[t].status == TurnStatus.SEARCH
        and episode.turns[t].search_ok
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(episodes, max_size=4), choices)
def test_rewards_are_bounded_and_gains_telescope(batch, keywords):
    scores = score_episodes(batch, SIMILARITY, **keywords)
    assert (scores.gain >= 0).all() and (scores.gain.sum(1) <= 1 + 1e-6).all()
    assert (scores.redundancy >= 0).all() and (scores.redundancy <= 1 + 1e-6).all()
    assert (scores.outcome_rewards >= -1).all() and (scores.outcome_rewards <= 1.618 + 1e-6).all()
    if keywords["redundancy_scope"] == "earlier_turns":
        assert (scores.redundancy[:, 0] == 0).all()
    for b, episode in enumerate(batch):
        gold = episode.question.gold_ids
        retrieved = [i for turn in episode.search_turns if turn.search_ok for i in turn.doc_ids]
        reached = 0  # the gains telescope to this
        if gold and retrieved:
            reached = SIMILARITY.similarity([gold], [retrieved]).max(1).mean()
        assert scores.gain[b].sum() == pytest.approx(reached, abs=1e-5)
        assert all(was_served(episode, t) or scores.step_rewards[b, t] == 0 for t in range(4))


@pytest.mark.parametrize("fit", ["corpus", "pair"])
@settings(max_examples=100, deadline=None)
@given(batch=st.lists(episodes, max_size=4))
def test_gains_equal_loops(fit, batch):
    gain = information_gain(batch, fit_similarity(CORPUS, tfidf_fit=fit), num_turns=4)
    for b, episode in enumerate(batch):
        found = [episode.turns[t].doc_ids if was_served(episode, t) else () for t in range(4)]
        expected = loop_gain(CORPUS, episode.question.gold_ids, found, tfidf_fit=fit)
        np.testing.assert_allclose(gain[b], expected, rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(episodes, min_size=1, max_size=4), choices)
def test_cost_and_credit_change_only_what_they_name(batch, keywords):
    """The cost changes step rewards of answered searches, the credit outcome rewards.

    The credit needs a passed gate and an F1 of 0. Cost and credit of 0 change nothing.
    """
    neither = dict(search_cost=0.0, retrieved_answer_credit=0.0, texts=None)
    plain = score_episodes(batch, SIMILARITY, **keywords | neither)
    scores = score_episodes(batch, SIMILARITY, **keywords)
    for b, episode in enumerate(batch):
        whole = keywords["format_failure"] == "minus_one" and not scores.gate_passed[b]
        charged = [
            keywords["search_cost"] if was_served(episode, t) and not whole else 0.0
            for t in range(4)
        ]
        np.testing.assert_allclose(
            plain.step_rewards[b] - scores.step_rewards[b], charged, atol=1e-6
        )
        ids = [i for t in range(4) if was_served(episode, t) for i in episode.turns[t].doc_ids]
        # These texts are normalised already.
        held = any(f" {word} " in f" {CORPUS[i]} " for i in ids for word in ("red fox", "owl"))
        due = held and scores.gate_passed[b] and scores.measures.f1[b] == 0
        earned = keywords["retrieved_answer_credit"] if due else 0.0
        found = scores.outcome_rewards[b] - plain.outcome_rewards[b]
        assert found == pytest.approx(earned, abs=1e-6)
    for name in ("gain", "redundancy", "key_rewards", "gate_passed"):
        np.testing.assert_array_equal(getattr(scores, name), getattr(plain, name))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(episodes, min_size=1, max_size=4),
    choices,
    st.randoms(use_true_random=False),
    st.sampled_from(["corpus", "pair"]),
)
def test_episodes_are_scored_independently(batch, keywords, random, fit):
    """To the last bit: alone, in a batch, in another order."""
    similarity = fit_similarity(CORPUS, tfidf_fit=fit)
    order = random.sample(range(len(batch)), len(batch))
    whole = score_episodes(batch, similarity, **keywords)
    permuted = score_episodes([batch[i] for i in order], similarity, **keywords)
    for b, episode in enumerate(batch):
        alone = score_episodes([episode], similarity, **keywords)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(whole, name)[b])
            np.testing.assert_array_equal(
                getattr(permuted, name)[b], getattr(whole, name)[order[b]]
            )


def test_gains_do_not_depend_on_the_batch_where_gold_documents_are_many():
    """To the last bit with one turn and 12 gold documents.

    NumPy would add them in another order for an episode alone.
    """
    rng = np.random.default_rng(0)
    for _ in range(20):
        similarity = TableSimilarity(rng.random((14, 14)))
        questions = [make_question(gold=rng.permutation(12).tolist()) for _ in range(3)]
        batch = [make_episode(search("a", 12, 13), question=question) for question in questions]
        whole = information_gain(batch, similarity, num_turns=1)
        alone = [information_gain([episode], similarity, num_turns=1) for episode in batch]
        np.testing.assert_array_equal(np.concatenate(alone), whole)


BARE = {  # what an episode can lack
    "nothing at all": (),
    "zero searches": (answer("red fox"),),
    "zero searches, no answer": (invalid("hm"), invalid("")),
    "only failed searches": (search("fox", ok=False), search("fox", ok=False), answer("red fox")),
    "searches that find nothing": (search("fox"), search("fox"), answer("")),
    "empty query, empty document": (search("", 5, 5), search("", 5), answer("red fox")),
    "truncated": (search("red fox", 0, 1),),
}


@pytest.mark.parametrize("fit", ["corpus", "pair"])
@pytest.mark.parametrize("gold", [(), (5,), (0, 5, 7)])
def test_whatever_is_missing_rewards_are_finite_and_defined(gold, fit):
    """Alone and in a batch with a full episode, under both gates and format failures."""
    similarity = fit_similarity(CORPUS, tfidf_fit=fit)
    full = make_episode(
        search("red fox", 0, 1),
        answer("owl"),
        question=make_question(gold=(0, 2), keys=(("red fox",),), answers=("owl",)),
    )
    needed = dict(rendered=CORPUS, retrieved_answer_credit=0.5, texts=CORPUS)
    # No sub-questions, and so no gold documents; no accepted queries; some.
    for keys in ((), ((),), (("fox",), ())):
        question = make_question(gold=gold, keys=keys)
        bare = [
            make_episode(*turns, question=question, truncated=name == "truncated")
            for name, turns in BARE.items()
        ]
        for gate, failure in (("strict", "zero_answer"), ("ends_with_answer", "minus_one")):
            for scope in ("earlier_turns", "rendered"):
                change = dict(format_gate=gate, format_failure=failure, redundancy_scope=scope)
                change |= needed
                for batch in (bare, [full, *bare], [*bare, full], *([episode] for episode in bare)):
                    scores = score_episodes(batch, similarity, **PAPER | change)
                    for name in FIELDS:
                        assert np.isfinite(getattr(scores, name)).all(), name
                    assert scores.step_rewards.shape == (len(batch), 4)
                    assert scores.outcome_rewards.shape == (len(batch),)
                    for b, episode in enumerate(batch):
                        if not episode.question.gold_ids:
                            assert (scores.gain[b] == 0).all() and not scores.measures.gold_known[b]
                        if not episode.doc_ids:
                            assert (scores.step_rewards[b] == 0).all()
                        if not episode.queries:
                            assert scores.key_rewards[b] == 0


# What the environment wrote: tags in it change no reward

SPOOFS = st.lists(
    st.sampled_from(
        [
            "<search>",
            "</search>",
            "<answer>",
            "</answer>",
            "<information>",
            "</information>",
            "<think>",
            "<warning>",
            "red fox",
            "owl",
            "\n",
            " ",
        ]
    ),
    max_size=8,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(episodes, min_size=1, max_size=3), choices, st.lists(SPOOFS, min_size=3, max_size=3)
)
def test_tags_in_documents_prompts_and_warnings_change_no_reward(batch, keywords, spoofs):
    """Observations are documents after a search and warnings after an invalid turn.

    The prompt holds the question.
    """
    observed, prompt, asked = spoofs

    def spoof(episode):
        spoofed = tuple(dataclasses.replace(turn, observation=observed) for turn in episode.turns)
        return dataclasses.replace(
            episode,
            turns=spoofed,
            prompt=prompt,
            question=dataclasses.replace(episode.question, question=asked),
        )

    groups = batch, [spoof(episode) for episode in batch]
    plain, spoofed = (score_episodes(group, SIMILARITY, **keywords) for group in groups)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(plain, name), getattr(spoofed, name))
    for name in ("em", "f1", "cover_em", "gold_recall", "searches"):
        np.testing.assert_array_equal(
            getattr(plain.measures, name), getattr(spoofed.measures, name)
        )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(episodes, min_size=1, max_size=3),
    choices,
    st.lists(st.tuples(SPOOFS, SPOOFS), min_size=8, max_size=8),
    st.sampled_from(["corpus", "pair"]),
)
def test_tags_in_the_corpus_are_words_to_tfidf_and_nothing_else(batch, keywords, spoofs, fit):
    """Tags in titles and texts count in tf-idf as words; the other rewards do not change."""
    tagged = [f"{before} {text} {after}" for text, (before, after) in zip(CORPUS, spoofs)]
    # Words of a document may earn the credit, and the spoofs have words.
    keywords = keywords | dict(retrieved_answer_credit=0.0)
    plain_fit, tagged_fit = (fit_similarity(texts, tfidf_fit=fit) for texts in (CORPUS, tagged))
    plain = score_episodes(batch, plain_fit, **keywords)
    scores = score_episodes(batch, tagged_fit, **keywords | dict(texts=tagged))
    for name in ("outcome_rewards", "redundancy", "key_rewards", "gate_passed"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(scores, name))
    for b, episode in enumerate(batch):
        found = [episode.turns[t].doc_ids if was_served(episode, t) else () for t in range(4)]
        expected = loop_gain(tagged, episode.question.gold_ids, found, tfidf_fit=fit)
        np.testing.assert_allclose(scores.gain[b], expected, rtol=0, atol=1e-6)
        kept = keywords["format_failure"] == "zero_answer" or scores.gate_passed[b]
        changed = (scores.gain[b] - plain.gain[b]) * kept
        found = scores.step_rewards[b] - plain.step_rewards[b]
        np.testing.assert_allclose(found, changed, rtol=0, atol=1e-6)
