"""Search keys: rules, votes, rows there and back, and runs that are killed."""

import json
import math
import os
import pathlib
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
from stepsearch_jax.prepare.engines import Engine, count_votes, is_kept, search_all
from stepsearch_jax.prepare.keys import list_hops, make_row, measure_votes
from stepsearch_jax.prepare.rules import write_queries
from stepsearch_jax.prepare.store import Store
from stepsearch_jax.records import Document, Question, SubQuestion
from stepsearch_jax.rewards.text_metrics import normalize

CITIES = [
    f"{start}{end}"
    for start in ("Ar", "Bel", "Cor", "Dun", "El")
    for end in ("ton", "ville", "burg", "mouth")
]


def musique_row(city: str, number: int) -> dict:
    return {
        "id": f"2hop__{number}",
        "question": f"Who leads the country of {city}?",
        "answer": f"Leader {number}",
        "answer_aliases": [f"L. {number}"],
        "paragraphs": [
            {"idx": 0, "title": city, "paragraph_text": f"{city} is a city in Land{city}."},
            {
                "idx": 1,
                "title": f"Land{city}",
                "paragraph_text": f"Land{city} is led by Leader {number}.",
            },
        ],
        "question_decomposition": [
            {"question": f"{city} >> country", "answer": f"Land{city}", "paragraph_support_idx": 0},
            {
                "question": "Who leads #1 ?",
                "answer": f"Leader {number}",
                "paragraph_support_idx": 1,
            },
        ],
    }


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    (tmp_path / "data").mkdir()
    write_rows(
        tmp_path / "data/train.jsonl",
        [musique_row(city, number) for number, city in enumerate(CITIES)],
    )
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
    assert (
        write_queries("who leads Landarton in May", ["Landarton"], 3)[2]
        == "Landarton in May leads Landarton May"
    )
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
    assert (
        queries == write_queries(question, list(earlier), count)
        and 1 <= len(queries) <= count
        and all(query.strip() for query in queries)
    )
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
    first = search_all([Engine("e", "f", search)], ["a", "bb", "a"], 2, "corpus", store)
    assert first == [{"a": [1, -1], "bb": [2, -1]}] and asked == ["a", "bb"]
    assert search_all([Engine("e", "f", search)], ["bb", "ccc"], 2, "corpus", store) == [
        {"bb": [2, -1], "ccc": [3, -1]}
    ] and asked == ["a", "bb", "ccc"]
    (
        search_all([Engine("e", "other", search)], ["a"], 2, "corpus", store),
        search_all([Engine("e", "f", search)], ["a"], 1, "corpus", store),
    )
    search_all([Engine("e", "f", search)], ["a"], 2, "another corpus", store)
    assert asked[3:] == ["a", "a", "a"]
    store.close()


def test_figures_by_hand():
    questions = [
        Question(
            "q",
            "?",
            "x",
            sub_questions=(
                SubQuestion("one", "a", gold_ids=(0,)),
                SubQuestion("two", "b", gold_ids=(1,)),
            ),
        ),
        Question(
            "r", "?", "x", sub_questions=(SubQuestion("lost", "a", missing_gold=(("T", "t"),)),)
        ),
    ]
    assert list_hops(questions) == [(0, 0), (0, 1)]
    votes = {
        (0, 0, "a"): [True, False],
        (0, 0, "b"): [False, False],
        (0, 0, "c"): [True, True],
        (0, 1, "a"): [False, False],
    }
    figures = measure_votes(
        questions, {(0, 0): ("a", "b", "c"), (0, 1): ("a",)}, (), votes, ["e1", "e2"]
    )
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
    assert [
        without[name][kind]
        for kind in ("unwritten", "refused")
        for name in ("all", "hop 1", "hop 2")
    ] == [2, 1, 1, 1, 0, 1]
    assert (
        figures["hop 1"]["sub_questions"] == 2
        and figures["hop 2"]["kept"] == 0
        and figures["hop 2"]["engines"]["e1"]["kept_recall"] is None
    )


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
        ),
    ]
    write_rows(
        tmp_path / "train.jsonl",
        [
            make_row(question, [sub.queries for sub in question.sub_questions], documents)
            for question in questions
        ],
    )
    write_rows(
        tmp_path / "corpus.jsonl",
        [{"title": document.title, "text": document.text} for document in documents],
    )
    assert read_records(OFFICIAL["stepsearch"].FORMAT, tmp_path).splits["train"] == questions


def test_command_with_rules(folder, capsys, monkeypatch):
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    prepare.main(command(folder, f"--out={folder / 'keys'}", f"--json={folder / 'figures.json'}"))
    printed, figures = (
        capsys.readouterr().out,
        json.loads((folder / "keys/report.json").read_text()),
    )
    assert (
        figures == json.loads((folder / "figures.json").read_text())
        and "| hop 2 | 20 | 20 | 20 |" in printed
    )
    documents, splits, _ = read_records(OFFICIAL["stepsearch"].FORMAT, folder / "keys")
    before, original, _ = read_records(OFFICIAL["musique"].FORMAT, folder / "data")
    assert [(d.title, d.text) for d in documents] == [(d.title, d.text) for d in before]
    for new, old in zip(splits["train"], original["train"], strict=True):
        assert (new.uid, new.question, new.answers, new.shape, new.gold_ids) == (
            old.uid,
            old.question,
            old.answers,
            old.shape,
            old.gold_ids,
        )
        for sub, other in zip(new.sub_questions, old.sub_questions, strict=True):
            assert (sub.question, sub.answer, sub.aliases, sub.gold_ids) == (
                other.question,
                other.answer,
                other.aliases,
                other.gold_ids,
            )
            assert len(sub.queries) > 1 and set(sub.queries) <= set(
                write_queries(sub.question, [new.sub_questions[0].answer], 5)
                + write_queries(sub.question, [], 5)
            )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--writer=chat"], "--writer chat needs --url"),
        *(
            (
                ["--writer=chat", f"--url={url}", "--model=m", "--key-env="],
                "is not the address of an endpoint",
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
            "the environment variable NO_SUCH_KEY holds no key for http://x/v1: set it",
        ),
        (["--engines", "bm52:1:1"], "'bm52:1:1' is not an engine; one is bm25:K1:B"),
        (["--engines", "bm25:1:2"], "'bm25:1:2' is not an engine"),
        (["--engines", "dense"], "the engine dense needs config.search.encoder"),
        (["--engines", "bm25:0.90:0.4", "bm25:0.9:0.4"], "an engine stands there twice"),
        (["--engines", "bm25:inf:0.4"], "'bm25:inf:0.4' is not an engine; one is .* or remote:URL"),
        (
            ["--engines", "remote:localhost:8000"],
            "'localhost:8000' is not the address of a search server",
        ),
        (
            ["--engines", "remote:http://a:1", "remote:http://A:1/retrieve/"],
            "an engine stands there twice",
        ),
        (
            ["--engines", "remote:http://localhost:1", "--config.search.attempts=1"],
            "the search server at http://localhost:1 does not answer",
        ),
        (["--queries=0"], "--queries 0: a number above 0 is needed"),
        (["--retries=-1"], "--retries -1: 0 or more is needed"),
        (["--backoff=nan"], "--backoff nan: 0 or more is needed"),
        (["--timeout=inf"], "--timeout inf: a number above 0 is needed, 1,000,000 at most"),
        (["--config.search.k=0"], "config.search.k is 0; it must be at least 1"),
        (["--splits=tset"], "--splits tset: the data set has train"),
        (["--config.data.path=nowhere"], "in nowhere: set data.path to the folder of MuSiQue"),
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
    with pytest.raises(
        SystemExit, match="the environment variable TEST_KEY holds characters that no key has"
    ) as caught:
        prepare.main(
            command(
                folder,
                f"--out={folder / 'keys'}",
                "--writer=chat",
                "--url=http://localhost:1",
                "--model=m",
                "--key-env=TEST_KEY",
            )
        )
    assert "cret" not in str(caught.value)


def test_a_store_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no store " * 100)
    with pytest.raises(
        OSError, match="folder, which keeps answers, cannot be read or written: unable to open"
    ):
        Store(tmp_path / "folder")
    with pytest.raises(ValueError, match="text is not a store of answers .*: remove it"):
        Store(tmp_path / "text")
    store = Store(tmp_path / "full")
    store._database.execute("PRAGMA max_page_count=1")
    with pytest.raises(
        OSError,
        match="full, which keeps answers, cannot be read or written: database or disk is full",
    ):
        store.put({str(i): "x" * 1000 for i in range(100)})
    assert store.get(["5"]) == [None]
    store.close()


def test_unreadable_row_is_named(folder, monkeypatch):
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    with (folder / "data/train.jsonl").open("a") as file:
        file.write('{"id": "x"}\n')
    with pytest.raises(SystemExit, match=r"train.jsonl, line 21: field 'paragraphs' is missing"):
        prepare.main(command(folder, f"--out={folder / 'keys'}"))


@pytest.mark.slow
def test_killed_twice_it_writes_the_same_and_pays_for_nothing_twice(folder):
    """SIGKILL while requests are on their way: only those are sent again."""

    def answer(question, count):
        number = sum(map(ord, question))
        if number % 7 == 0 and count == 1:
            return (500, 429)[number % 2], "", {"Retry-After": "0"}
        return (
            200,
            complete(
                "?!"
                if number % 11 == 0
                else f"{question}\n{question.split()[-1]} {question.split()[0]}"
            ),
            {},
        )

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
        for share in (0.25, 0.6):
            process = start(endpoint, "cut")
            while endpoint.paid.total() < share * 40 and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None, process.stdout.read()[-3000:]
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            time.sleep(0.3)  # what was on its way is counted as paid
        process = start(endpoint, "cut")
        printed = process.communicate()[0]
        assert process.returncode == 0, printed[-3000:]
        twice = {body: count for body, count in endpoint.paid.items() if count > 1}
        assert len(twice) <= killed * concurrency and max(endpoint.paid.values()) <= 1 + killed
        sent = endpoint.asked.total()
        assert start(endpoint, "cut").wait() == 0 and endpoint.asked.total() == sent
    with Endpoint(answer) as other:
        # The store knows answers by the endpoint's address: another cache and address ask for everything.
        process = start(other, "whole")
        assert (
            process.communicate()
            and process.returncode == 0
            and set(other.paid.values()) == {1}
            and set(other.paid) == set(endpoint.paid)
        )
    assert read("cut") == read("whole") and set(read("cut")) == {"train.jsonl", "report.json"}
    assert json.loads(read("cut")["report.json"])["splits"]["train"]["all"]["kept"] > 20


@pytest.mark.parametrize(
    "out,message",
    [
        ("data", "is config.data.path, whose files would be replaced"),
        ("corpora", "holds a file of config.data.corpus"),
    ],
)
def test_the_source_is_never_replaced(folder, out, message):
    before = {path: path.read_bytes() for path in (folder / "data").iterdir()}
    with pytest.raises(SystemExit, match=message):
        prepare.main(
            command(
                folder,
                f"--out={folder / out}",
                f"--config.data.corpus={folder / 'corpora' / 'corpus.jsonl'}",
            )
        )
    assert {path: path.read_bytes() for path in (folder / "data").iterdir()} == before
