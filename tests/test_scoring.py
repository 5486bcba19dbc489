"""Rewards of episodes: each formula worked by hand, the gates case by case."""

import types

import numpy as np
import pytest
import running
import tiny_config
from sklearn.feature_extraction.text import TfidfVectorizer
from text_episodes import (
    NOTHING_SIMILAR,
    PAPER,
    TableSimilarity,
    answer,
    invalid,
    make_episode,
    make_question,
    search,
)

from configs import base
from stepsearch_jax.records import Question
from stepsearch_jax.rewards.scoring import (
    information_gain,
    key_reward,
    measure_episodes,
    passes_ending_gate,
    passes_strict_gate,
    score_episodes,
)
from stepsearch_jax.rewards.text_metrics import normalize
from stepsearch_jax.rewards.tfidf import fit_similarity
from stepsearch_jax.run.system import System, build_system

# Step rewards


def test_gain_and_redundancy_by_hand():
    """Two gold documents 0 and 1; cosines to documents 2..5 in the table.

          doc   2    3    4    5
    gold 0     .5   .2   .4   .9
    gold 1     .1   .3   .8   .0

    turn 0: docs 2, 3   c = (max(.5, .2), max(.1, .3)) = (.5, .3), memory (0, 0)
                        gain (.5 + .3) / 2 = .4;      P = 0
    turn 1: docs 4, 2   c = (max(.4, .5), max(.8, .1)) = (.5, .8), memory (.5, .3)
                        gain (0 + .5) / 2 = .25;      P = 1/2 (2 was seen)
    turn 2: doc 3       c = (.2, .3), memory (.5, .8)
                        gain 0, the memory stays;     P = 1
    turn 3: docs 5, 5   c = (.9, 0), memory (.5, .8)
                        gain (.4 + 0) / 2 = .2;       P = 0 (only earlier turns count)
    """
    table = np.zeros((6, 6))
    table[0, 2:], table[1, 2:] = (0.5, 0.2, 0.4, 0.9), (0.1, 0.3, 0.8, 0.0)
    searches = search("a", 2, 3), search("b", 4, 2), search("d", 3), search("c", 5, 5)
    episode = make_episode(*searches, answer("Rome"), question=make_question(gold=(0, 1)))
    scores = score_episodes([episode], TableSimilarity(table), **PAPER)
    np.testing.assert_allclose(scores.gain, [[0.4, 0.25, 0, 0.2]], atol=1e-7)
    np.testing.assert_allclose(scores.redundancy, [[0, 0.5, 1, 0]], atol=1e-7)
    np.testing.assert_allclose(scores.step_rewards, [[0.4, -0.25, -1, 0.2]], atol=1e-7)
    assert scores.step_rewards.dtype == scores.outcome_rewards.dtype == np.float32

    changes = {
        "no gain": (dict(use_gain=False), [0, -0.5, -1, 0]),
        "no redundancy": (dict(use_redundancy=False), [0.4, 0.25, 0, 0.2]),
        "neither": (dict(use_gain=False, use_redundancy=False), [0, 0, 0, 0]),
        "scale": (dict(step_scale=1.6), [0.64, -0.4, -1.6, 0.32]),
        "cost": (dict(search_cost=0.125), [0.275, -0.375, -1.125, 0.075]),
        # The scale leaves the cost alone.
        "both": (dict(step_scale=2.0, search_cost=0.125), [0.675, -0.625, -2.125, 0.275]),
    }
    for name, (change, expected) in changes.items():
        changed = score_episodes([episode], TableSimilarity(table), **PAPER | change)
        np.testing.assert_allclose(changed.step_rewards, [expected], atol=1e-6, err_msg=name)


def test_the_same_document_at_another_rank_is_recognised():
    episode = make_episode(search("a", 7, 8, 9), search("b", 9, 7, 3), answer("Rome"))
    scores = score_episodes([episode], NOTHING_SIMILAR, **PAPER)
    np.testing.assert_allclose(scores.redundancy, [[0, 2 / 3, 0, 0]], atol=1e-7)


def test_turns_without_documents_have_no_step_reward():
    """An invalid turn keeps its place; a failed search has no reward and leaves no memory."""
    table = np.zeros((4, 4))
    table[0, 2] = 0.6
    question = make_question(gold=(0,))
    episode = make_episode(
        invalid("hm"), search("a", 2, ok=False), search("a", 2), search("b", 2), question=question
    )
    scores = score_episodes([episode], TableSimilarity(table), **PAPER)
    np.testing.assert_allclose(scores.gain, [[0, 0, 0.6, 0]], atol=1e-7)
    np.testing.assert_allclose(scores.redundancy, [[0, 0, 0, 1]], atol=1e-7)
    failed_last = make_episode(
        search("a", 2), search("b", 2, ok=False), search("c", ok=True), question=question
    )
    scores = score_episodes([failed_last], TableSimilarity(table), **PAPER)
    np.testing.assert_allclose(scores.step_rewards, [[0.6, 0, 0, 0]], atol=1e-7)


def test_search_cost_by_hand():
    """Answered searches cost, with documents or without; other turns do not, nor does the outcome.

    Failed searches, invalid turns and the answer are the other turns.
    """
    turns = invalid("hm"), search("a", 2, ok=False), search("b"), search("c", 3), answer("Paris")
    cost = PAPER | dict(search_cost=0.25, num_turns=5, format_gate="ends_with_answer")
    episodes = [make_episode(*turns), make_episode(answer("Paris")), make_episode()]
    scores = score_episodes(episodes, NOTHING_SIMILAR, **cost)
    np.testing.assert_allclose(scores.step_rewards, [[0, 0, -0.25, -0.25, 0], [0] * 5, [0] * 5])
    np.testing.assert_allclose(scores.outcome_rewards, [1, 1, 0])
    cut_off = make_episode(search("c", 3), invalid("hm"))
    # minus_one is the whole reward.
    for failure, expected in (("zero_answer", -0.25), ("minus_one", 0)):
        scores = score_episodes([cut_off], NOTHING_SIMILAR, **cost | dict(format_failure=failure))
        assert scores.step_rewards[0, 0] == expected


def test_without_gold_documents_the_penalty_still_counts():
    episode = make_episode(search("a", 2, 3), search("b", 2, 5), answer("Rome"))
    np.testing.assert_allclose(
        score_episodes([episode], NOTHING_SIMILAR, **PAPER).step_rewards, [[0, -0.5, 0, 0]]
    )


def test_rendered_scope_by_hand():
    """Documents 2 and 4 have one text, "c". Behind all but the last stands the next one's label.

    Turn 0 shows "c Doc 2", "d Doc 3", "c": nothing twice. Turn 1 shows "c Doc 2", "e": the first
    was seen: 1/2.
    """
    rendered = ["a", "b", "c", "d", "c", "e"]
    turns = search("a", 2, 3, 4), search("b", 4, 5), answer("Rome")
    change = PAPER | dict(redundancy_scope="rendered", rendered=rendered)
    score = lambda episode: score_episodes([episode], NOTHING_SIMILAR, **change)
    question = make_question(gold=(0,))
    with_gold = make_episode(*turns, question=question)
    np.testing.assert_allclose(score(with_gold).redundancy, [[0, 1 / 2, 0, 0]], atol=1e-7)
    # What the released code gives: (A, B, C), (B, D, E); and (A, A, B).
    for searches in (([0, 1, 2], [1, 3, 5]), ([0, 0, 1],)):
        turns = [search("a", *ids) for ids in searches]
        assert not score(make_episode(*turns, question=question)).redundancy.any()
    np.testing.assert_allclose(score(make_episode(*turns)).step_rewards, [[0, 0, 0, 0]])
    failed = make_episode(search("a", 2, ok=False), search("b", 2), question=question)
    np.testing.assert_allclose(score(failed).redundancy, [[0, 0, 0, 0]])
    with pytest.raises(ValueError, match="reward.redundancy_scope"):
        score_episodes([with_gold], NOTHING_SIMILAR, **PAPER | dict(redundancy_scope="rendered"))


# The key reward


def test_key_reward_by_hand():
    """Accepted queries: sub 0 {"capital france", "france capital city"}, sub 1 {"river paris"}.

    Queries "capital france" then "capital of france": F1 with sub 0 is 1, then
    max(2*2/(3+2), 2*2/(3+3)) = 0.8; with sub 1 both are 0.
    max: (1 + 0) / 2. overwrite: the later 0.8 replaces the 1: (0.8 + 0) / 2.
    """
    question = make_question(keys=(("capital france", "france capital city"), ("river paris",)))
    queries = ("capital france", "capital of france")
    assert key_reward(queries, question, key_match="max") == pytest.approx(0.5)
    assert key_reward(queries, question, key_match="overwrite") == pytest.approx(0.4)
    assert key_reward(queries[::-1], question, key_match="overwrite") == pytest.approx(0.5)


def test_a_query_that_fits_nothing_overwrites_nothing():
    """ "red fox" fits sub 0 exactly; "owl" neither, nor does an empty query."""
    question = make_question(keys=(("red fox",), ("river paris",)))
    for queries in (("red fox", "owl"), ("red fox", "")):
        assert key_reward(queries, question, key_match="overwrite") == pytest.approx(0.5)


def test_one_query_serves_two_sub_questions_only_by_max():
    """The query's F1 is 2*1/(2+2) = 1/2 with both; overwriting gives it to the first alone."""
    question = make_question(keys=(("capital france",), ("river paris",)))
    assert key_reward(("river france",), question, key_match="max") == pytest.approx(0.5)
    assert key_reward(("river france",), question, key_match="overwrite") == pytest.approx(0.25)


def test_key_reward_without_keys_or_searches():
    assert key_reward(("a",), make_question(keys=((), ())), key_match="max") == 0
    assert key_reward((), make_question(keys=(("red fox",),)), key_match="max") == 0
    # M counts sub-questions with accepted queries.
    assert key_reward(("red fox",), make_question(keys=(("red fox",), ())), key_match="max") == 1


# The global reward and the format gates


def test_outcome_reward_by_hand():
    """Answer "city of Paris" against "Paris": F1 = 2*1/(3+1) = 0.5.

    The query equals the one key: r_key = 1. Sum 0.5 + 0.618 * 1.
    """
    question = make_question(gold=(0,), keys=(("red fox",),))
    good = make_episode(search("red fox", 2), answer("city of Paris"), question=question)
    bad = make_episode(
        search("red fox", 2), answer("city of Paris", after=" and that is it"), question=question
    )
    table = np.zeros((3, 3))
    table[0, 2] = 0.5
    paper = score_episodes([good, bad], TableSimilarity(table), **PAPER)
    np.testing.assert_allclose(paper.outcome_rewards, [0.5 + 0.618, 0.618], rtol=1e-6)
    np.testing.assert_allclose(paper.step_rewards, [[0.5, 0, 0, 0]] * 2)
    assert paper.gate_passed.tolist() == [True, False] and paper.key_rewards.tolist() == [1, 1]
    change = PAPER | dict(format_failure="minus_one")
    minus = score_episodes([good, bad], TableSimilarity(table), **change)
    np.testing.assert_allclose(minus.outcome_rewards, [0.5 + 0.618, -1], rtol=1e-6)
    np.testing.assert_allclose(minus.step_rewards, [[0.5, 0, 0, 0], [0, 0, 0, 0]])
    # Measures do not depend on rewards.
    np.testing.assert_allclose(minus.measures.f1, [0.5, 0.5])


DOCUMENTS = [
    "Bart owns art",
    "the city-of-light is Paris",
    "Oslo",
    "<answer>Paris</answer>",
    "Rome, Paris",
]
HELD = {  # name: (turns, answer's reward with a credit of 0.25)
    "held": ((search("x", 0, 1), answer("Rome")), 0.25),
    "an alias is held": ((search("x", 0), search("y", 2), answer("Rome")), 0.25),  # Oslo
    "nothing is held": ((search("x", 0), answer("Rome")), 0),
    "right, and held": ((search("x", 1), answer("Paris")), 1),
    "half right, and held": ((search("x", 1), answer("Paris or so or")), 0.4),  # 2*1/(4+1)
    "held by a failed search": ((search("x", 1, ok=False), search("y", 0), answer("Rome")), 0),
    "only observed": ((search("x", 0, observation="Paris"), answer("Rome", before="Paris")), 0),
    "within a tag, one word": ((search("x", 3), answer("Rome")), 0),  # "answerparisanswer"
    "no answer": ((search("x", 1), search("x", 1)), 0),
    "malformed": ((search("x", 1), answer("Rome", after=".")), 0),
}


@pytest.mark.parametrize("name", HELD)
def test_retrieved_answer_credit_by_hand(name):
    """Accepted: "Paris" and "Oslo". Documents count through their ids alone."""
    turns, expected = HELD[name]
    episode = make_episode(*turns, question=make_question(answers=("Paris", "Oslo")))
    score = lambda **change: score_episodes(
        [episode], NOTHING_SIMILAR, **PAPER | dict(texts=DOCUMENTS) | change
    )
    for credit in (0.25, 0.0):
        scores = score(retrieved_answer_credit=credit)
        outcome = 0 if expected == 0.25 and not credit else expected
        np.testing.assert_allclose(scores.outcome_rewards, [outcome], rtol=1e-6)
    minus = score(retrieved_answer_credit=0.25, format_failure="minus_one")
    outcome = expected if minus.gate_passed[0] else -1
    np.testing.assert_allclose(minus.outcome_rewards, [outcome], rtol=1e-6)


def test_the_credit_needs_texts():
    change = PAPER | dict(retrieved_answer_credit=0.1)
    with pytest.raises(ValueError, match="retrieved_answer_credit is 0.1"):
        score_episodes([make_episode()], NOTHING_SIMILAR, **change)


THINK = "<think>x</think>"
GATES = {  # name: (turns, strict, ends with answer)
    "plain": ((search("a", think=THINK), answer("b", before=THINK)), True, True),
    "no think tags": ((search("a"), answer("b")), True, True),
    "white space after": ((search("a"), answer("b", after=" \n")), True, True),
    "plan and observation tags": (
        (search("a", think="<plan>p</plan>"), answer("b", before="<observation>o</observation>")),
        True,
        True,
    ),
    "failed search is a search": ((search("a", ok=False), answer("b")), True, True),
    "no search": ((answer("b"),), False, True),
    "nothing": ((), False, False),
    "no answer": ((search("a"), search("a")), False, False),
    "text after": ((search("a"), answer("b", after=".")), False, False),
    "two answers": ((search("a"), answer("c", before="<answer>b</answer>")), False, True),
    "nested answer": ((search("a"), answer("<answer>b")), False, True),
    "answer in an earlier turn": (
        (search("a", think="<answer>b</answer>"), answer("b")),
        False,
        True,
    ),
    "invalid turn": ((search("a"), invalid("hm"), answer("b")), False, True),
    "open think": ((search("a", think="<think>x"), answer("b")), False, True),
    "closed think only": ((search("a"), answer("b", before="x</think>")), False, True),
    "closed twice": ((search("a"), answer("b", before="</think></think>")), False, True),
    "think closed in the next turn": (
        (search("a", think="<think>"), answer("b", before="</think>")),
        False,
        True,
    ),
    "crossed": ((search("a", think="<think><plan></think></plan>"), answer("b")), False, True),
    "own information": (
        (search("a", think="<information>x</information>"), answer("b")),
        False,
        True,
    ),
    "own warning": ((search("a", think="<warning>x</warning>"), answer("b")), False, True),
    "closing tag only": ((search("a"), invalid("b</answer>")), False, False),
    "another tag closed": ((search("a"), invalid("<answer>b</search></answer>")), False, True),
    "closing tag only, after an answer": (
        (search("a", think="<answer>b</answer>"), invalid("c</answer>")),
        False,
        False,
    ),
    "split over turns": ((search("a"), invalid("<answer>b</ans"), invalid("wer>")), False, False),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name):
    turns, strict, ending = GATES[name]
    episode = make_episode(*turns)
    assert passes_strict_gate(episode) is strict and passes_ending_gate(episode) is ending
    for gate, passed in (("strict", strict), ("ends_with_answer", ending)):
        scores = score_episodes([episode], NOTHING_SIMILAR, **PAPER | dict(format_gate=gate))
        assert scores.gate_passed.tolist() == [passed]


def test_truncated_episode_scores_nothing_for_its_answer():
    question = make_question(keys=(("red fox",),))
    episode = make_episode(
        search("red fox", 2), invalid("<answer>Par"), question=question, truncated=True
    )
    scores = score_episodes([episode], NOTHING_SIMILAR, **PAPER)
    np.testing.assert_allclose(scores.outcome_rewards, [0.618], rtol=1e-6)
    assert scores.measures.em[0] == scores.measures.f1[0] == 0


def test_wrong_choices_and_too_many_turns_are_refused():
    episode = make_episode(search("a"), answer("b"))
    for key in ("format_gate", "format_failure", "key_match", "redundancy_scope"):
        with pytest.raises(ValueError, match=f"reward.{key} is 'else'"):
            score_episodes([episode], NOTHING_SIMILAR, **PAPER | {key: "else"})
    # The answer needs no place among the step rewards.
    one_turn = PAPER | dict(num_turns=1)
    score_episodes([episode], NOTHING_SIMILAR, **one_turn)
    with pytest.raises(ValueError, match="q0.*after turn 1"):
        score_episodes([make_episode(search("a"), search("b"))], NOTHING_SIMILAR, **one_turn)


def test_no_episodes_and_empty_episodes_are_defined():
    scores = score_episodes([], NOTHING_SIMILAR, **PAPER)
    assert scores.step_rewards.shape == (0, 4) and scores.outcome_rewards.shape == (0,)
    scores = score_episodes([make_episode()], NOTHING_SIMILAR, **PAPER)
    assert scores.outcome_rewards.tolist() == [0] and scores.step_rewards.tolist() == [[0] * 4]
    assert scores.measures.searches.tolist() == [0]


def test_measures_by_hand():
    """Gold {0, 5}; retrieved 5, 3, 5: recall 1/2. Searches count failed ones.

    "Paris, France" covers "Paris": cover 1, EM 0, F1 2*1/(2+1).
    """
    question = make_question(gold=(0, 5))
    searches = search("a", 5, 3), search("b", ok=False), search("c", 5)
    first = make_episode(*searches, answer("Paris, France"), question=question)
    second = make_episode(answer("paris"))
    measures = measure_episodes([first, second])
    np.testing.assert_allclose(measures.em, [0, 1])
    np.testing.assert_allclose(measures.f1, [2 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(measures.cover_em, [1, 1])
    np.testing.assert_allclose(measures.gold_recall, [0.5, 0])
    assert measures.gold_known.tolist() == [True, False] and measures.searches.tolist() == [3, 0]


# The config's keys


KEYS = {  # other values than the defaults, each of which changes a reward of the episodes below
    "format_gate": "ends_with_answer",
    "format_failure": "minus_one",
    "gamma_key": 0.5,
    "key_match": "overwrite",
    "use_gain": False,
    "use_redundancy": False,
    "redundancy_scope": "rendered",
    "step_scale": 1.6,
    "search_cost": 0.25,
    "retrieved_answer_credit": 0.125,
}


@pytest.mark.parametrize("name", KEYS)
def test_every_key_reaches_the_scoring(name):
    table = np.full((6, 6), 0.25)
    question = make_question(gold=(0,), keys=(("red fox",), ("owl",)))
    turns = search("red fox", 2, 3), search("red owl", 4, 2), search("fox", 5)
    episodes = [
        make_episode(*turns, answer("Rome"), question=question),
        make_episode(*turns, invalid("hm"), answer("Paris"), question=question),
    ]
    config = base.get_config().reward
    system = types.SimpleNamespace(
        config=types.SimpleNamespace(reward=config),
        settings=types.SimpleNamespace(turns=4),
        _similarity=TableSimilarity(table),
        _rendered=np.arange(6),
        _texts=["in Paris"] * 6,
        _step_reward=None,
    )
    before = System.score(system, episodes)
    config[name] = KEYS[name]
    after = System.score(system, episodes)
    keys = PAPER | {name: KEYS[name]} | dict(rendered=np.arange(6), texts=["in Paris"] * 6)
    expected = score_episodes(episodes, system._similarity, **keys)
    changed = False
    for field in ("step_rewards", "outcome_rewards"):
        np.testing.assert_array_equal(getattr(after, field), getattr(expected, field))
        changed |= (getattr(after, field) != getattr(before, field)).any()
    assert changed


def test_pair_compares_what_the_released_code_does(tmp_path_factory):
    """Normalised texts without titles, refitted on each retrieved document and the gold ones. All
    but the last document of a search end with the next one's label.
    """
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.reward.tfidf_fit = "pair"
    system = build_system(config, ["train"])
    gold, found = [0, 7], [3, 7, 11, 2, 7, 5, 0, 9, 20, 21, 22, 7]
    texts = {i: normalize(system.source.documents[i].text) for i in (*gold, *found)}
    labels = [f" Doc {rank}" for rank in range(2, 13)] + [""]
    refitted = [
        TfidfVectorizer().fit_transform([texts[i] + label, *(texts[g] for g in gold)]).toarray()
        for i, label in zip(found, labels)
    ]
    expected = np.array([matrix[1:] @ matrix[0] for matrix in refitted]).T
    similarity = system._similarity.similarity([gold], [found], [[*range(2, 13), 0]])
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    episode = make_episode(search("a", *found), question=make_question(gold=gold))
    gain = information_gain([episode], system._similarity, num_turns=1)
    np.testing.assert_allclose(gain, [[expected.max(1).mean()]], atol=1e-6)


def test_a_gold_document_that_is_not_last_is_not_quite_itself_in_pair():
    """Four words and the label's "doc", which one of two texts holds: cos = 4 / (2 sqrt(4 + x²))
    with x = ln(3/2) + 1, the idf of "doc" beside 1.
    """
    similarity = fit_similarity(["red fox owl hen", "cow pig", "doc doc"], tfidf_fit="pair")
    gain = lambda *ids: float(
        information_gain(
            [make_episode(search("a", *ids), question=make_question(gold=(0,)))],
            similarity,
            num_turns=1,
        )[0, 0]
    )
    first = 2 / np.sqrt(4 + (np.log(1.5) + 1) ** 2)
    assert gain(0, 1, 2) == pytest.approx(first, abs=1e-6) == pytest.approx(0.818, abs=1e-3)
    assert gain(1, 2, 0) == pytest.approx(1, abs=1e-6)
    # "doc" once more, beside a document that has it already.
    repeated = fit_similarity(["doc doc fox", "cow"], tfidf_fit="pair")
    expected = TfidfVectorizer().fit_transform(["doc doc fox doc 2", "doc doc fox"]).toarray()
    found = repeated.similarity([[0]], [[0, 1]], [[2, 0]])
    np.testing.assert_allclose(found[0, 0], expected[0] @ expected[1], atol=1e-6)


def test_a_list_of_answers_is_rewarded_in_any_order():
    question = Question("q", "Which?", "Turin, Po", unordered=True)
    given = make_episode(search("x", 0), answer("Po, Turin"), question=question)
    assert score_episodes([given], NOTHING_SIMILAR, **PAPER).measures.em == [1]
    wrong = make_episode(search("x", 0), answer("Rome"), question=question)
    for text, credit in (("The Po flows through Turin.", 0.25), ("Turin", 0)):
        settings = PAPER | dict(retrieved_answer_credit=0.25, texts=[text])
        assert score_episodes([wrong], NOTHING_SIMILAR, **settings).outcome_rewards == [credit]


def test_a_system_knows_its_documents_by_id(tmp_path_factory):
    """The credit reads titles and texts in one, the released code's redundancy texts alone."""
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.reward.retrieved_answer_credit = 0.25
    system = build_system(config, ["train"])
    documents = system.source.documents
    title = documents[5].title
    assert system._rendered[5] == documents[5].text
    assert len(system._rendered) == len(documents)
    others = (x.id for x in documents if title not in f"{x.title} {x.text}")
    other = next(others)
    episodes = [
        make_episode(search("x", i), answer("nowhere"), question=make_question(answers=(title,)))
        for i in (5, other)
    ]
    np.testing.assert_allclose(system.score(episodes).outcome_rewards, [0.25, 0])
