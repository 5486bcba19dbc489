"""The parts built from a config: rows of processes, padded batches, unused ids of the vocabulary,
retrieval recall, failed searches.
"""

import dataclasses
import types

import jax
import numpy as np
import pytest
import running
import tiny_config

from stepsearch_jax import sharding
from stepsearch_jax.records import TurnStatus
from stepsearch_jax.run import corpus
from stepsearch_jax.run.system import (
    WATCHED_QUERIES,
    System,
    build_system,
    check_searches,
    process_rows,
)
from stepsearch_jax.search.callback import MAX_QUERY_CHARACTERS, SearchCounts, SomeFailedError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))


@pytest.fixture(scope="module")
def system(config) -> System:
    return build_system(config, ["train", "validation"])


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 1, 2), (2, 2, 2)])
def test_one_process_holds_all_rows_in_order(shape):
    assert process_rows(sharding.make_mesh(*shape), 16).tolist() == list(range(16))


def test_a_process_holds_the_rows_of_its_devices(monkeypatch):
    """Two of four shards of 16 rows, named out of order and once for each of two slices: rows 4-7
    and 12-15.
    """
    spread = {
        "device 6": (slice(12, 16),),
        "device 7": (slice(12, 16),),
        "device 2": (slice(4, 8),),
        "device 3": (slice(4, 8),),
    }
    fake = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: spread)
    monkeypatch.setattr(jax.sharding, "NamedSharding", lambda mesh, spec: fake)
    assert process_rows(None, 16).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_rows_of_minus_one_fill_up_a_batch(system):
    split = system.splits["validation"]
    prompts, questions = split.take(np.array([3, 19, -1]), np.array([40, 41, 42]))
    assert [question.uid for question in questions[:2]] == ["validation-3", "validation-19"]
    assert prompts.active.tolist() == [True, True, False] and prompts.episode_ids.tolist() == [
        40,
        41,
        42,
    ]
    for row, question in enumerate(questions[:2]):
        text = system.tokenizer.decode(prompts.tokens[row, : prompts.length[row]])
        assert (
            text == f" Question: {question.question}\n"
            and not prompts.tokens[row, prompts.length[row] :].any()
        )


def test_data_is_known_by_what_it_holds(system):
    """The order of questions counts, and their number, and their whole text."""
    found, questions = system.describe_data(), system.splits["train"].questions
    assert (
        list(found) == ["corpus", "questions of train", "questions of validation"]
        and len(set(found.values())) == 3
    )
    changed = dataclasses.replace(questions[0].sub_questions[0], queries=("another",))
    first = dataclasses.replace(
        questions[0], sub_questions=(changed, *questions[0].sub_questions[1:])
    )
    others = [list(questions), questions[::-1], questions[:-1], [first, *questions[1:]]]
    hashes = [
        dataclasses.replace(
            system, splits={"train": dataclasses.replace(system.splits["train"], questions=other)}
        ).describe_data()
        for other in others
    ]
    assert [other["questions of train"] == found["questions of train"] for other in hashes] == [
        True,
        False,
        False,
        False,
    ]


def test_unused_ids_of_the_vocabulary_change_nothing(system):
    """The model's vocabulary is larger than the tokenizer's: such an id leaves the automaton where
    it is and reads as nothing, in queries as well.
    """
    size, states = system.tokenizer.vocab_size, len(system.environment.next_state)
    assert (
        system.learner_model.vocab_size == system.environment.next_state.shape[1] > size
        and system.learner_model.vocab_size % 64 == 0
    )
    assert (system.environment.next_state[:, size:] == np.arange(states)[:, None]).all()
    question = system.splits["train"].questions[0]
    ids = system.tokenizer.encode(f"<search> {question.sub_questions[0].queries[0]}</search>")
    ids = np.array([[*ids[:2], size, *ids[2:], size + 1]], np.int32)
    assert (
        system.tokenizer.decode(ids[0])
        == f"<search> {question.sub_questions[0].queries[0]}</search>"
    )
    _, _, doc_ids, ok = system.search(ids, np.array([ids.shape[1]]), np.array([True]))
    assert (
        ok.all()
        and doc_ids[0, 0] == question.sub_questions[0].gold_ids[0]
        and system.search.take_counts().failed == 0
    )


def test_the_automaton_sees_the_tags(system):
    """The environment's events are those of the tokenizer's tags: one search, one answer, one
    closing tag that nothing opened.
    """
    for text, expected in (
        ("<search> a</search>", TurnStatus.SEARCH),
        ("<answer> a</answer>", TurnStatus.ANSWER),
        ("</search>", TurnStatus.INVALID),
    ):
        state = int(system.environment.start)
        for token in system.tokenizer.encode(text):
            assert system.environment.event[state] == TurnStatus.NONE
            state = int(system.environment.next_state[state, token])
        assert system.environment.event[state] == expected


def test_retrieval_is_measured_by_gold_documents(config):
    """A search that finds the gold document of every second sub-question: 0.5; and all queries
    arrive, in parts.
    """
    plain = build_system(config, ["train"])
    subs = [sub for question in plain.splits["train"].questions for sub in question.sub_questions]
    asked = []

    def search(queries):
        first = sum(map(len, asked))
        asked.append(queries)
        return np.array(
            [[subs[first + n].gold_ids[0] if (first + n) % 2 else -1] for n in range(len(queries))],
            np.int32,
        )

    repeated = build_system(config, ["train"], search)
    subs = subs * 3
    repeated.splits["train"].questions.extend(repeated.splits["train"].questions * 2)
    assert repeated.measure_retrieval("train") == 0.5
    assert [query for part in asked for query in part] == [sub.question for sub in subs] and len(
        subs
    ) == 144
    assert [len(part) for part in asked] == [
        WATCHED_QUERIES,
        WATCHED_QUERIES,
        144 - 2 * WATCHED_QUERIES,
    ]
    repeated.splits["train"].questions.clear()
    assert np.isnan(repeated.measure_retrieval("train"))


def test_a_long_query_is_cut_outside_episodes_too(config):
    asked = []
    system = build_system(
        config,
        ["train"],
        lambda queries: asked.extend(queries) or np.zeros((len(queries), 1), np.int32),
    )
    system.search_documents(["a", "b" * (MAX_QUERY_CHARACTERS + 1)])
    assert asked == ["a", "b" * MAX_QUERY_CHARACTERS]


def test_a_query_that_fails_alone_finds_nothing(config, caplog):
    def search(queries):
        raise SomeFailedError(np.array([[3], [-1]], np.int32), {1: "no such letter"})

    system = build_system(config, ["train"], search)
    with caplog.at_level("WARNING", logger="stepsearch_jax"):
        assert system.search_documents(["a", "b"]).tolist() == [[3], [-1]]
    assert "the search failed for 1 of 2 queries: no such letter" in caplog.text


def test_requests_to_a_server_renew_the_time_of_a_search(config, system, monkeypatch):
    """So that many of them, one after the other, may take longer than config.search.timeout_s."""
    opened = []
    monkeypatch.setattr(
        corpus,
        "open_remote",
        lambda *arguments: (
            opened.append(arguments) or types.SimpleNamespace(describe=lambda k: system.retrieval)
        ),
    )
    remote = config.copy_and_resolve_references()
    remote.search.kind, remote.search.attempts = "remote", 1
    callback = build_system(remote, ["train"]).search
    assert opened[0][-1] == callback._watchdog.renew


def test_a_search_that_fails_outside_episodes_is_named(config):
    def search(queries):
        raise RuntimeError("no route")

    with pytest.raises(ValueError, match="^the search failed: RuntimeError: no route$"):
        build_system(config, ["train"], search).measure_retrieval("train")


@pytest.mark.parametrize(
    "limit,failed,stops",
    [(0.0, 0, False), (0.0, 1, True), (0.25, 5, False), (0.25, 6, True), (1.0, 20, False)],
)
def test_failed_searches_stop_the_run_above_their_limit(limit, failed, stops):
    counts = SearchCounts(
        calls=3, searches=20, failed=failed, first_error="TimeoutError: slow" if failed else ""
    )
    config = types.SimpleNamespace(search=types.SimpleNamespace(max_failure_fraction=limit))
    system = types.SimpleNamespace(
        search=types.SimpleNamespace(take_counts=lambda: counts), config=config
    )
    if not stops:
        assert check_searches(system) == counts
        return
    with pytest.raises(
        SystemExit,
        match=rf"{failed} of 20 .*process 0: TimeoutError: slow.*max_failure_fraction={limit}",
    ):
        check_searches(system)
