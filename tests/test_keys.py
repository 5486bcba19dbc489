"""Search keys: rules, votes, rows there and back, and runs that are killed."""

import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import Endpoint, complete
from test_datasets import REPO, read_records, write_rows

from stepsearch_jax.data.loading import OFFICIAL
from stepsearch_jax.prepare import __main__ as prepare
from stepsearch_jax.prepare.engines import Engine, search_all
from stepsearch_jax.prepare.keys import make_row
from stepsearch_jax.prepare.rules import write_queries
from stepsearch_jax.prepare.store import Store
from stepsearch_jax.prepare.votes import count_votes, is_kept, list_hops, measure_votes
from stepsearch_jax.records import Document, Question, SubQuestion
from stepsearch_jax.rewards.text_metrics import normalize

CITIES = [
    f"{start}{end}"
    for start in ("Ar", "Bel", "Cor", "Dun", "El")
    for end in ("ton", "ville", "burg", "mouth")
]


def musique_row(city: str, number: int) -> dict:
    land, leader = f"Land{city}", f"Leader {number}"
    return {
        "id": f"2hop__{number}",
        "question": f"Who leads the country of {city}?",
        "answer": leader,
        "answer_aliases": [f"L. {number}"],
        "paragraphs": [
            {"idx": 0, "title": city, "paragraph_text": f"{city} is a city in {land}."},
            {"idx": 1, "title": land, "paragraph_text": f"{land} is led by {leader}."},
        ],
        "question_decomposition": [
            {"question": f"{city} >> country", "answer": land, "paragraph_support_idx": 0},
            {"question": "Who leads #1 ?", "answer": leader, "paragraph_support_idx": 1},
        ],
    }


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    (tmp_path / "data").mkdir()
    rows = [musique_row(city, number) for number, city in enumerate(CITIES)]
    write_rows(tmp_path / "data/train.jsonl", rows)
    return tmp_path


def command(folder: pathlib.Path, *more: str) -> list[str]:
    return [
        "keys",
        f"--config={REPO / 'configs/base.py'}",
        f"--config.data.path={folder / 'data'}",
        f"--config.data.cache_dir={folder / 'cache'}",
        *more,
    ]


# --- rules and the vote


def test_rules_by_hand():
    assert write_queries("Attics to Eden >> performer", [], 4) == [
        "performer of Attics to Eden",
        "Attics to Eden performer",
        "Attics to Eden Attics Eden performer",
        "Attics Eden performer song album by",
    ]
    assert write_queries("What country is Dunton in?", [], 9) == [
        "What country is Dunton in?",
        "country Dunton",
        "Dunton country Dunton",
        "country Dunton located in",
        "Dunton located in",
    ]
    queries = write_queries("who leads Landarton in May", ["Landarton"], 3)
    assert queries[2] == "Landarton in May leads Landarton May"
    assert write_queries("who is it", [], 5) == ["who is it"] and write_queries("?", [], 5) == ["?"]


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["who", "Rome", ">>", "capital", "of", "the", '"', "Ann's", "#3"]),
        max_size=8,
    ).map(" ".join),
    st.lists(st.sampled_from(["Rome", "", " ", "Ann"]), max_size=3),
    st.integers(1, 7),
)
def test_rules_give_distinct_queries_that_are_not_empty(question, earlier, count):
    question = question.strip() or "x"
    queries = write_queries(question, earlier, count)
    assert queries == write_queries(question, list(earlier), count)
    assert 1 <= len(queries) <= count and all(query.strip() for query in queries)
    assert len({tuple(sorted(normalize(query).split())) for query in queries}) == len(queries)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda engines: st.lists(st.permutations(range(6)), min_size=engines, max_size=engines)
    ),
    st.integers(1, 6),
    st.lists(st.integers(0, 5), min_size=1, max_size=2),
)
def test_vote_equals_plain_loops(rankings, k, gold):
    votes = 0
    for ranking in rankings:
        returned = False
        for place in range(k):
            for document in gold:
                if ranking[place] == document:
                    returned = True
        votes += returned
    counted = count_votes([{"q": list(ranking[:k])} for ranking in rankings], "q", gold)
    assert sum(counted) == votes and is_kept(counted) == (votes >= math.ceil(len(rankings) / 2))


def test_searches_are_not_repeated(tmp_path):
    asked = []

    def search(queries, k):
        asked.extend(queries)
        return np.array([[len(query), -1][:k] for query in queries])

    store = Store(tmp_path / "store.sqlite")
    engines = [Engine("e", "f", search)]
    found = search_all(engines, ["a", "bb", "a"], 2, "corpus", store)
    assert found == [{"a": [1, -1], "bb": [2, -1]}] and asked == ["a", "bb"]
    found = search_all(engines, ["bb", "ccc"], 2, "corpus", store)
    assert found == [{"bb": [2, -1], "ccc": [3, -1]}] and asked == ["a", "bb", "ccc"]
    # another engine, k or corpus is searched
    search_all([Engine("e", "other", search)], ["a"], 2, "corpus", store)
    search_all(engines, ["a"], 1, "corpus", store)
    search_all(engines, ["a"], 2, "another corpus", store)
    assert asked[3:] == ["a", "a", "a"]
    store.close()


def test_figures_by_hand():
    found = SubQuestion("one", "a", gold_ids=(0,)), SubQuestion("two", "b", gold_ids=(1,))
    lost = SubQuestion("lost", "a", missing_gold=(("T", "t"),))
    questions = [
        Question("q", "?", "x", sub_questions=found),
        Question("r", "?", "x", sub_questions=(lost,)),
    ]
    assert list_hops(questions) == [(0, 0), (0, 1)]
    votes = {
        (0, 0, "a"): [True, False],
        (0, 0, "b"): [False, False],
        (0, 0, "c"): [True, True],
        (0, 1, "a"): [False, False],
    }
    written = {(0, 0): ("a", "b", "c"), (0, 1): ("a",)}
    figures = measure_votes(questions, written, (), votes, ["e1", "e2"])
    assert figures["all"] == {
        "sub_questions": 3,
        "asked": 2,
        "unwritten": 0,
        "refused": 0,
        "with_key": 1,
        "written": 4,
        "kept": 2,
        "kept_fraction": 0.5,
        "engines": {
            "e1": {"found": 0.5, "kept_recall": 1.0, "reached": 0.5},
            "e2": {"found": 0.25, "kept_recall": 0.5, "reached": 0.5},
        },
    }
    without = measure_votes(questions, {(0, 0): (), (0, 1): ()}, {(0, 1)}, {}, ["e1"])
    groups = ("all", "hop 1", "hop 2")
    assert [without[name]["unwritten"] for name in groups] == [2, 1, 1]
    assert [without[name]["refused"] for name in groups] == [1, 0, 1]
    assert figures["hop 1"]["sub_questions"] == 2 and figures["hop 2"]["kept"] == 0
    assert figures["hop 2"]["engines"]["e1"]["kept_recall"] is None


# --- there and back


def test_rows_are_read_back_as_they_were(tmp_path):
    documents = [Document(i, f"T{i}", f"Text {i}.") for i in range(4)]
    questions = [
        Question(
            "u1",
            "Both?",
            "x",
            ("y",),
            (
                SubQuestion("one?", "a", ("b",), (0,), ("k1", "k2")),
                SubQuestion("two?", "x", (), (1,), ()),
            ),
            "3hop1",
        ),
        Question(
            "u2",
            "Loose?",
            "x",
            (),
            (
                SubQuestion("one?", "a", (), (), (), (("Lost", "gone"),)),
                SubQuestion("two?", "x", (), (1, 2), ("k",)),
            ),
            "odd",
            (3,),
            (("Lost too", ""),),
        ),
        Question(
            "u3",
            "Loose?",
            "x",
            (),
            (SubQuestion("one?", "a", (), (0,), ("k",)), SubQuestion("two?", "x", (), (), ())),
            "2hop",
            (1, 2),
            unordered=True,
        ),
    ]
    rows = [
        make_row(question, [sub.queries for sub in question.sub_questions], documents)
        for question in questions
    ]
    corpus = [{"title": document.title, "text": document.text} for document in documents]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "corpus.jsonl", corpus)
    assert read_records(OFFICIAL["stepsearch"].FORMAT, tmp_path).splits["train"] == questions


def test_command_with_rules(folder, capsys, monkeypatch):
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    prepare.main(command(folder, f"--out={folder / 'keys'}", f"--json={folder / 'figures.json'}"))
    figures = json.loads((folder / "keys/report.json").read_text())
    assert figures == json.loads((folder / "figures.json").read_text())
    assert "| hop 2 | 20 | 20 | 20 |" in capsys.readouterr().out
    documents, splits, *_ = read_records(OFFICIAL["stepsearch"].FORMAT, folder / "keys")
    before, original, *_ = read_records(OFFICIAL["musique"].FORMAT, folder / "data")
    assert [(d.title, d.text) for d in documents] == [(d.title, d.text) for d in before]
    for new, old in zip(splits["train"], original["train"], strict=True):
        for name in ("uid", "question", "answers", "shape", "gold_ids"):
            assert getattr(new, name) == getattr(old, name)
        for sub, other in zip(new.sub_questions, old.sub_questions, strict=True):
            for name in ("question", "answer", "aliases", "gold_ids"):
                assert getattr(sub, name) == getattr(other, name)
            first = new.sub_questions[0].answer
            queries = write_queries(sub.question, [first], 5) + write_queries(sub.question, [], 5)
            assert len(sub.queries) > 1 and set(sub.queries) <= set(queries)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--writer=chat"], "--writer chat needs --url"),
        *(
            (
                ["--writer=chat", f"--url={url}", "--model=m", "--key-env="],
                f"--url {re.escape(url)}",
            )
            for url in (
                "http:///v1",
                "http://host:99999/v1",
                "http://a b/v1",
                "http://a..b/v1",
                "http://[::1/v1",
            )
        ),
        (
            ["--writer=chat", "--url=http://x/v1", "--model=m", "--key-env=NO_SUCH_KEY"],
            "NO_SUCH_KEY.*http://x/v1.*--key-env",
        ),
        (["--engines", "bm52:1:1"], "'bm52:1:1'.*bm25:K1:B"),
        (["--engines", "bm25:1:2"], "'bm25:1:2'"),
        (["--engines", "dense"], "dense needs config.search.encoder"),
        (["--engines", "bm25:0.90:0.4", "bm25:0.9:0.4"], "--engines.*twice"),
        (["--engines", "bm25:inf:0.4"], "'bm25:inf:0.4'.*remote:URL"),
        (["--engines", "remote:localhost:8000"], "'localhost:8000' is not the address"),
        (["--engines", "remote:http://a:1", "remote:http://A:1/retrieve/"], "--engines.*twice"),
        (
            ["--engines", "remote:http://localhost:1", "--config.search.attempts=1"],
            "http://localhost:1 does not answer",
        ),
        (["--queries=0"], "--queries 0"),
        (["--retries=-1"], "--retries -1"),
        (["--backoff=nan"], "--backoff nan"),
        (["--timeout=inf"], "--timeout inf.*1,000,000"),
        (["--config.search.k=0"], "config.search.k is 0"),
        (["--splits=tset"], "--splits tset.*train"),
        (["--config.data.path=nowhere"], "nowhere.*data.path"),
    ],
)
def test_mistakes_are_one_line_before_work_starts(folder, monkeypatch, arguments, message):
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    with pytest.raises(SystemExit, match=message):
        prepare.main(command(folder, f"--out={folder / 'keys'}", *arguments))
    assert not (folder / "keys").exists()


@pytest.mark.parametrize("key", ["se\ncret", "sécret", "se\tcret"])
def test_a_key_that_cannot_be_one_is_refused_without_saying_it(folder, monkeypatch, key):
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    monkeypatch.setenv("TEST_KEY", key)
    chat = ["--writer=chat", "--url=http://localhost:1", "--model=m", "--key-env=TEST_KEY"]
    with pytest.raises(SystemExit, match="TEST_KEY holds characters") as caught:
        prepare.main(command(folder, f"--out={folder / 'keys'}", *chat))
    assert "cret" not in str(caught.value)


def test_a_store_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no store " * 100)
    with pytest.raises(OSError, match=f"{tmp_path}/folder cannot be .*: unable to open"):
        Store(tmp_path / "folder")
    with pytest.raises(ValueError, match=f"{tmp_path}/text is not a store"):
        Store(tmp_path / "text")
    store = Store(tmp_path / "full")
    store._database.execute("PRAGMA max_page_count=1")
    with pytest.raises(OSError, match=f"{tmp_path}/full cannot be .*disk is full"):
        store.put({str(i): "x" * 1000 for i in range(100)})
    assert store.get(["5"]) == [None]
    store.close()


def test_unreadable_row_is_named(folder, monkeypatch):
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    with (folder / "data/train.jsonl").open("a") as file:
        file.write('{"id": "x"}\n')
    with pytest.raises(SystemExit, match="train.jsonl, line 21: .*'paragraphs'"):
        prepare.main(command(folder, f"--out={folder / 'keys'}"))


@pytest.mark.slow
def test_killed_twice_it_writes_the_same_and_pays_for_nothing_twice(folder):
    """SIGKILL while requests are under way: only those are sent again."""

    def answer(question, count):
        number = sum(map(ord, question))
        if number % 7 == 0 and count == 1:
            return (500, 429)[number % 2], "", {"Retry-After": "0"}
        words = question.split()
        text = "?!" if number % 11 == 0 else f"{question}\n{words[-1]} {words[0]}"
        return 200, complete(text), {}

    concurrency = 3

    def start(endpoint, cache):
        arguments = command(
            folder,
            f"--config.data.cache_dir={folder / cache}",
            f"--out={folder / cache / 'keys-out'}",
            "--writer=chat",
            f"--url={endpoint.url}",
            "--model=m",
            "--key-env=TEST_KEY",
            f"--concurrency={concurrency}",
            "--rate=60000",
            "--backoff=0.01",
        )
        return subprocess.Popen(
            [sys.executable, "-m", "stepsearch_jax.prepare", *arguments],
            cwd=REPO,
            env={**os.environ, "TEST_KEY": "k"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def read(cache):
        return {
            path.name: path.read_bytes()
            for path in (folder / cache / "keys-out").iterdir()
            if path.name != "corpus.jsonl"
        }

    with Endpoint(answer, delay=0.1) as endpoint:
        killed = 0
        for fraction in (0.25, 0.6):
            process = start(endpoint, "cut")
            while endpoint.paid.total() < fraction * 40 and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None, process.stdout.read()[-3000:]
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            time.sleep(0.3)  # requests under way count as paid
        process = start(endpoint, "cut")
        printed = process.communicate()[0]
        assert process.returncode == 0, printed[-3000:]
        twice = {body: count for body, count in endpoint.paid.items() if count > 1}
        assert len(twice) <= killed * concurrency and max(endpoint.paid.values()) <= 1 + killed
        sent = endpoint.asked.total()
        assert start(endpoint, "cut").wait() == 0 and endpoint.asked.total() == sent
    with Endpoint(answer) as other:
        # The store's keys hold the endpoint's address: another one is asked for everything.
        process = start(other, "whole")
        process.communicate()
        assert process.returncode == 0
        assert set(other.paid.values()) == {1} and set(other.paid) == set(endpoint.paid)
    assert read("cut") == read("whole") and set(read("cut")) == {"train.jsonl", "report.json"}
    assert json.loads(read("cut")["report.json"])["splits"]["train"]["all"]["kept"] > 20


@pytest.mark.parametrize(
    "out,message",
    [
        ("data", "--out.*config.data.path"),
        ("corpora", "--out.*config.data.corpus"),
    ],
)
def test_the_source_is_never_replaced(folder, out, message):
    before = {path: path.read_bytes() for path in (folder / "data").iterdir()}
    corpus = f"--config.data.corpus={folder / 'corpora/corpus.jsonl'}"
    with pytest.raises(SystemExit, match=message):
        prepare.main(command(folder, f"--out={folder / out}", corpus))
    assert {path: path.read_bytes() for path in (folder / "data").iterdir()} == before
