"""The search callback: fixed shapes, observations from integer copies, failures that never raise;
the corpus as tokens."""

import functools
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsearch_jax.prompting import templates
from stepsearch_jax.prompting.tags import decode_query
from stepsearch_jax.prompting.tokenizers import make_word_tokenizer
from stepsearch_jax.records import Document
from stepsearch_jax.search.bm25 import build_index
from stepsearch_jax.search.callback import (
    MAX_QUERY_CHARACTERS,
    SearchCounts,
    SomeFailedError,
    make_search_callback,
)
from stepsearch_jax.search.corpus_tokens import tokenize_corpus
from stepsearch_jax.search.observations import EnvironmentTokens, build_observation, share_out
from stepsearch_jax.search.watchdog import Watchdog


def array(*ids):
    return np.array(ids, np.int32)


# head 1; rank prefixes 11 and 12; tail 2 3; notes 41 and 42
ENVIRONMENT = EnvironmentTokens(
    array(1), (array(11), array(12)), array(2, 3), array(41), array(42), array(5), array(6)
)
DOCUMENTS = [array(100, 101, 102), array(200), array(300, 301, 302, 303, 304, 305)]
NOTHING, FAILED = [1, 41, 2, 3], [1, 42, 2, 3]
WATCHDOG = Watchdog(60.0, "search.timeout_s")


def read_letters(ids):
    """A query of one letter for each token: 1 = "a"; 99 cannot be read."""
    if 99 in ids:
        raise ValueError("unreadable query")
    return "".join(chr(96 + i) for i in ids)


def make_callback(search, budget=20, documents=DOCUMENTS):
    return make_search_callback(search, read_letters, documents, ENVIRONMENT, budget, 2, WATCHDOG)


def call(callback, *queries):
    """Calls with one row for each query (a list of token ids, or None = not wanted) -> rows as
    lists: (observation, doc_ids, ok)."""
    # The 7 beyond a query's length must not matter.
    tokens = np.full((len(queries), 4), 7, np.int32)
    for row, query in enumerate(queries):
        tokens[row, : len(query or ())] = query or ()
    lengths = array(*(len(query or ()) for query in queries))
    out = callback(tokens, lengths, np.array([query is not None for query in queries]))
    rows, width = len(queries), callback.max_observation_tokens
    assert [field.shape for field in out] == [(rows, width), (rows,), (rows, 2), (rows,)]
    assert [field.dtype for field in out] == [np.int32, np.int32, np.int32, bool]
    results = []
    for observation, length, doc_ids, ok in zip(*out, strict=True):
        assert (observation[length:] == 0).all()
        results.append((observation[:length].tolist(), doc_ids.tolist(), bool(ok)))
    return results


# ---- observations ----


@pytest.mark.parametrize(
    "budget, expected",
    [
        (20, [1, 11, 100, 101, 102, 12, 300, 301, 302, 303, 304, 305, 2, 3]),  # everything fits
        (14, [1, 11, 100, 101, 102, 12, 300, 301, 302, 303, 304, 305, 2, 3]),  # exactly
        # 7 tokens: 3 of document 0, which leaves 4.
        (12, [1, 11, 100, 101, 102, 12, 300, 301, 302, 303, 2, 3]),
        # 5 tokens: the odd one goes to the better document.
        (10, [1, 11, 100, 101, 102, 12, 300, 301, 2, 3]),
        (5, [1, 11, 12, 2, 3]),
    ],
)
def test_documents_share_the_budget(budget, expected):
    assert build_observation(ENVIRONMENT, [DOCUMENTS[0], DOCUMENTS[2]], budget).tolist() == expected


def test_fewer_documents_and_none():
    assert build_observation(ENVIRONMENT, [DOCUMENTS[1]], 20).tolist() == [1, 11, 200, 2, 3]
    assert build_observation(ENVIRONMENT, [], 20).tolist() == NOTHING
    with pytest.raises(ValueError, match="5 tokens, .*max_observation_tokens=4"):
        build_observation(ENVIRONMENT, [], 4)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 90))
def test_share_out_by_single_tokens(lengths, room):
    """Oracle: hand out one token at a time, in rounds, best rank first, to every document that
    still wants one."""
    shares = [0] * len(lengths)
    while room > 0 and shares != lengths:
        for i in range(len(lengths)):
            if room > 0 and shares[i] < lengths[i]:
                shares[i] += 1
                room -= 1
    assert share_out(lengths, sum(shares) + room) == shares


# ---- the callback ----


def test_rows_by_hand_and_duplicates_searched_once():
    asked = []

    def search(queries):
        asked.append(queries)
        return np.array([{"a": [1, 0], "b": [-1, -1], "ab": [2, -1]}[query] for query in queries])

    callback = make_callback(search)
    rows = call(callback, [1], [1, 2], None, [1], [2], [])
    assert asked == [["a", "ab", "b"]]
    assert rows == [
        ([1, 11, 200, 12, 100, 101, 102, 2, 3], [1, 0], True),
        ([1, 11, 300, 301, 302, 303, 304, 305, 2, 3], [2, -1], True),
        ([], [-1, -1], True),  # not wanted
        ([1, 11, 200, 12, 100, 101, 102, 2, 3], [1, 0], True),
        (NOTHING, [-1, -1], True),  # found nothing
        (NOTHING, [-1, -1], True),  # an empty query: never searched
    ]
    counts = callback.take_counts()
    assert (counts.calls, counts.searches, counts.failed, counts.first_error) == (1, 5, 0, "")
    assert counts.seconds > 0
    assert callback.take_counts() == SearchCounts()


def test_nothing_wanted_searches_nothing():
    rows = call(make_callback(lambda queries: pytest.fail("searched")), None, None)
    assert rows == [([], [-1, -1], True)] * 2
    rows = call(make_callback(lambda queries: pytest.fail("searched")), [], None)
    assert rows[0] == (NOTHING, [-1, -1], True)


def test_gaps_in_the_ids_are_closed():
    assert call(make_callback(lambda queries: np.array([[-1, 1]])), [1]) == [
        ([1, 11, 200, 2, 3], [1, -1], True)
    ]


def test_a_repeated_document_counts_once():
    """At its best rank, whichever engine returns it."""
    callback = make_callback(lambda queries: np.array([[1, 1], [-1, 2]]))
    assert call(callback, [1], [2]) == [
        ([1, 11, 200, 2, 3], [1, -1], True),
        ([1, 11, 300, 301, 302, 303, 304, 305, 2, 3], [2, -1], True),
    ]


def test_an_unreadable_query_fails_alone():
    callback = make_callback(lambda queries: np.array([[1, -1]] * len(queries)))
    assert call(callback, [1], [99], None) == [
        ([1, 11, 200, 2, 3], [1, -1], True),
        (FAILED, [-1, -1], False),
        ([], [-1, -1], True),
    ]
    assert callback.take_counts().first_error == "ValueError: unreadable query"


def raise_error(error):
    raise error


@pytest.mark.parametrize(
    "search, message",
    [
        (lambda queries: raise_error(RuntimeError("index gone")), "RuntimeError: index gone"),
        (lambda queries: raise_error(SystemExit(3)), "SystemExit: 3"),
        (lambda queries: np.array([[3, -1]]), "IndexError"),  # no such document
        (lambda queries: np.array([[1, 0, 2]]), "ValueError: the search returned int64 (1, 3)"),
        (lambda queries: np.array([[1.0, 0.0]]), "ValueError: the search returned float64 (1, 2)"),
        (lambda queries: None, "ValueError: the search returned object ()"),
    ],
)
def test_failures_never_raise(search, message):
    callback = make_callback(search)
    assert call(callback, [1], None, [1]) == [
        (FAILED, [-1, -1], False),
        ([], [-1, -1], True),
        (FAILED, [-1, -1], False),
    ]
    call(callback, None)
    counts = callback.take_counts()
    assert (counts.calls, counts.searches, counts.failed) == (2, 2, 2)
    assert counts.first_error.startswith(message)


def test_a_failure_halfway_leaves_no_half_written_rows():
    """The first query's documents are fine, the second's do not exist: all rows fail alike."""
    callback = make_callback(lambda queries: np.array([[1, 0], [9, -1]]))
    assert call(callback, [1], [2]) == [(FAILED, [-1, -1], False)] * 2


def test_queries_may_fail_alone():
    def search(queries):
        assert queries == ["a", "ab", "b"]
        raise SomeFailedError(np.array([[1, 0], [-1, -1], [2, -1]]), {1: "ValueError: too odd"})

    callback = make_callback(search)
    first = ([1, 11, 200, 12, 100, 101, 102, 2, 3], [1, 0], True)
    third = ([1, 11, 300, 301, 302, 303, 304, 305, 2, 3], [2, -1], True)
    assert call(callback, [1], [1, 2], [2], [1, 2]) == [
        first,
        (FAILED, [-1, -1], False),
        third,
        (FAILED, [-1, -1], False),
    ]
    counts = callback.take_counts()
    assert (counts.searches, counts.failed, counts.first_error) == (4, 2, "ValueError: too odd")


def test_engines_see_the_beginning_of_a_long_query():
    asked = []
    texts = [
        "x" * (MAX_QUERY_CHARACTERS + 5),
        "é" * MAX_QUERY_CHARACTERS + "a",
        "é" * MAX_QUERY_CHARACTERS + "b",
    ]
    search = lambda queries: asked.append(queries) or np.array([[1, -1]] * len(queries))
    read = lambda ids: texts[ids[0]]
    callback = make_search_callback(search, read, DOCUMENTS, ENVIRONMENT, 20, 2, WATCHDOG)
    assert [ok for _, _, ok in call(callback, [0], [1], [2])] == [True] * 3
    assert asked == [["x" * MAX_QUERY_CHARACTERS, "é" * MAX_QUERY_CHARACTERS]]


def test_it_works_again_after_a_failure():
    broken = [True]
    callback = make_callback(
        lambda queries: raise_error(OSError("down")) if broken[0] else np.array([[1, -1]])
    )
    assert call(callback, [1])[0][2] is False
    broken[0] = False
    assert call(callback, [1])[0] == ([1, 11, 200, 2, 3], [1, -1], True)


def test_threads_at_once():
    """Four threads, each with its own queries: own results, and no count is lost."""

    def search(queries):
        time.sleep(0.001)
        return np.array([[len(query) - 1, -1] for query in queries])

    callback = make_callback(search)
    wrong = []

    def work(length):
        expected = ([1, 11, *DOCUMENTS[length - 1].tolist(), 2, 3], [length - 1, -1], True)
        for _ in range(50):
            wrong.extend(row for row in call(callback, [1] * length) if row != expected)

    threads = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = callback.take_counts()
    assert wrong == [] and (counts.calls, counts.searches, counts.failed) == (200, 200, 0)


def test_environment_must_fit():
    search = lambda queries: None
    with pytest.raises(ValueError, match="2 ranks, .* 3 documents"):
        make_search_callback(search, read_letters, DOCUMENTS, ENVIRONMENT, 20, 3, WATCHDOG)
    with pytest.raises(ValueError, match="max_observation_tokens=4"):
        make_callback(search, budget=4)


def test_with_a_real_index_and_tokenizer(tmp_path):
    """Words to documents and back to words, every part as a run uses it."""
    documents = [
        Document(0, "Po", "The Po is a river."),
        Document(1, "Rome", "Rome is a city."),
        Document(2, "City", "A city is large."),
    ]
    words = [word.strip(".") for d in documents for word in (d.title + " " + d.text).split()]
    tokenizer = make_word_tokenizer([*words, *templates.list_short_words()])
    rendered = [templates.render_document(d) for d in documents]
    document_tokens = tokenize_corpus(
        rendered, tmp_path / "tokens", tokenizer.encode_batch, tokenizer.fingerprint
    )
    index = build_index(documents, tmp_path / "index", 0.9, 0.4)
    environment = templates.encode_environment(tokenizer.encode, 2)
    decode = functools.partial(decode_query, token_bytes=tokenizer.token_bytes)
    search = lambda queries: index.search(queries, 2)[0]
    callback = make_search_callback(search, decode, document_tokens, environment, 64, 2, WATCHDOG)
    ids = tokenizer.encode("<search> city of Rome</search>\n")
    query = np.zeros((2, 40), np.int32)
    query[0, : len(ids)] = ids
    tokens, length, doc_ids, ok = callback(query, array(len(ids), 0), np.array([True, False]))
    assert ok.tolist() == [True, True] and doc_ids.tolist() == [[1, 2], [-1, -1]] and length[1] == 0
    assert tokenizer.decode(tokens[0, : length[0]]) == (
        "\n<information>\n Doc 1 <## Title: Rome ##> Rome is a city.\n"
        " Doc 2 <## Title: City ##> A city is large.\n</information>\n"
    )


# ---- the corpus as tokens ----


def test_corpus_tokens_round_trip_and_reuse(tmp_path):
    encoded = []

    def encode_batch(texts):
        encoded.extend(texts)
        return [list(text.encode()) for text in texts]

    texts = [f"document {i} " + "x" * (i % 7) for i in range(5000)]
    for _ in range(2):
        tokens = tokenize_corpus(texts, tmp_path / "tokens", encode_batch, "bytes")
        assert len(tokens) == 5000 and tokens[4999].dtype == np.int32
        assert all(
            bytes(tokens[i].astype(np.uint8)).decode() == text for i, text in enumerate(texts)
        )
    assert encoded == texts  # once only
    with pytest.raises(ValueError, match="read-only"):
        tokens[0][0] = 1
    for bad in (-1, 5000):
        with pytest.raises(IndexError, match=f"document {bad} of 5000"):
            tokens[bad]
    tokenize_corpus(texts, tmp_path / "tokens", encode_batch, "other tokenizer")
    assert len(encoded) == 10_000
    tokenize_corpus(texts[:-1], tmp_path / "tokens", encode_batch, "other tokenizer")
    assert len(encoded) == 14_999


def test_bad_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="corpus is empty"):
        tokenize_corpus([], tmp_path / "tokens", lambda texts: [], "t")
    with pytest.raises(ValueError, match="document 1 has no tokens: its text is ''"):
        tokenize_corpus(
            ["a", ""], tmp_path / "tokens", lambda texts: [list(t.encode()) for t in texts], "t"
        )
    assert list(tmp_path.iterdir()) == []
