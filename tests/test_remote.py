"""The client of a search server gives the same answers as the index, even if the server is slow,
fails, lies, goes away, or comes back as another one."""

import base64
import contextlib
import dataclasses
import http.server
import json
import socket
import threading
import time

import numpy as np
import pytest
import urllib3
from test_index import draw_documents, write_corpus
from test_time_limit import DRIPS, dripping

from stepsearch_jax.benchmark.serving import run_server
from stepsearch_jax.data.passages import read_passage
from stepsearch_jax.data.rows import Row, read_rows
from stepsearch_jax.prepare.index import index_files
from stepsearch_jax.records import Document
from stepsearch_jax.search import contents
from stepsearch_jax.search.callback import MAX_QUERY_CHARACTERS, SomeFailedError
from stepsearch_jax.search.contents import render_contents
from stepsearch_jax.search.remote import MAX_BODY_BYTES, RemoteIndex, open_remote
from stepsearch_jax.words import RECIPE

QUERIES = ["w0é w3é", "w1é", "nothing", "", "w2é w2é w40é"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def index(folder):
    return index_files(
        [write_corpus(folder / "c.jsonl", draw_documents(300, 4))], folder / "index", 0.9, 0.4
    )


@pytest.fixture(scope="module")
def url(index, folder):
    with run_server(folder / "index", folder / "serve.log") as address:
        yield address


def documents_of(index):
    return [index.documents[i] for i in range(len(index))]


def open_client(url, index, **changed):
    arguments = {"documents": documents_of(index), "corpus": index.describe(1)["corpus"]}
    arguments |= {"attempt_s": 2.0, "attempts": 3, "backoff_s": 0.05, "batch": 2}
    return RemoteIndex(url, **(arguments | changed))


def test_the_client_finds_what_the_index_finds(url, index):
    client = open_remote(url, documents_of(index), index.describe(1)["corpus"], 5.0, 2, 0.1, 2)
    for found, expected in zip(client.search(QUERIES, 4), index.search(QUERIES, 4), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert client.search([], 4)[0].shape == (0, 4)
    manifest = client.describe(4)
    assert manifest["retriever"] == "remote"
    assert manifest["corpus"] == index.describe(4)["corpus"]
    settings = {"url": url, "retriever": "bm25-lucene", "k1": 0.9, "b": 0.4, "words": RECIPE}
    assert manifest["settings"] == settings


def test_another_corpus_is_refused(url, index):
    with pytest.raises(ValueError, match="holds the corpus .* but this run needs other"):
        open_client(url, index, corpus="other").check()
    others = [dataclasses.replace(d, text=f"{d.text} x") for d in documents_of(index)]
    with pytest.raises(ValueError, match="id '.*none of the 300 documents here"):
        open_client(url, index, documents=others).search(["w0é"], 3)
    with pytest.raises(ValueError, match="is not the address of a search server"):
        open_client("localhost:8000", index)
    for wrong in ({"attempts": 0}, {"batch": 0}, {"attempt_s": 0.0}, {"backoff_s": -1.0}):
        with pytest.raises(ValueError, match="must be more than 0"):
            open_client("http://localhost:1", index, **wrong)
    with socket.socket() as closed:
        closed.bind(("localhost", 0))
        with pytest.raises(ValueError, match="does not answer"):
            open_client(f"http://localhost:{closed.getsockname()[1]}", index).check()


@contextlib.contextmanager
def fake_server(respond, health=None):
    """A server that does respond(handler, n) with its n-th search, from 0 -> its address, and the
    times of these. health: what /health says, if it is there."""
    times = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.say(*((404, b"") if health is None else (200, json.dumps(health).encode())))

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            times.append(time.monotonic())
            with contextlib.suppress(OSError):
                respond(self, len(times) - 1)

        def log_message(self, *_):
            pass

        def say(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}", times
    finally:
        server.shutdown()


def good_answer(index, **more):
    document = index.documents[7]
    entry = {"document": {"id": "7", "contents": render_contents(document)}, "score": 1.5}
    return json.dumps({"result": [[entry]], **more}).encode()


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"result": [')
    hang_up(handler)


@pytest.mark.parametrize(
    "fault",
    [
        lambda h: h.say(503, b"busy"),
        lambda h: h.say(500, b"oh"),
        lambda h: h.say(429, b"slow down"),
        hang_up,
        cut_short,
        lambda h: time.sleep(1.0),
    ],
    ids=["503", "500", "429", "hangs up", "cuts short", "sleeps"],
)
def test_passing_faults_are_tried_again(index, fault):
    with fake_server(lambda h, n: fault(h) if n < 2 else h.say(200, good_answer(index))) as (
        url,
        times,
    ):
        ids, scores = open_client(url, index, attempt_s=0.4, backoff_s=0.2).search(["a"], 2)
        assert ids.tolist() == [[7, -1]] and scores.tolist() == [[1.5, 0.0]] and len(times) == 3
        assert times[1] - times[0] >= 0.1 and times[2] - times[1] >= 0.2  # the pauses double
    with fake_server(lambda h, n: fault(h)) as (url, times):
        with pytest.raises(urllib3.exceptions.HTTPError):
            open_client(url, index, attempt_s=0.4).search(["a"], 2)
        assert len(times) == 3


@pytest.mark.slow
@pytest.mark.parametrize("drip", ["first line", "headers", "body"])
def test_dribbling_does_not_buy_time(index, drip):
    start = time.monotonic()
    with (
        dripping(*DRIPS[drip]) as url,
        pytest.raises(urllib3.exceptions.TimeoutError, match="took longer than 0.6 s"),
    ):
        open_client(url, index, attempt_s=0.3, attempts=2).search(["a"], 2)
    assert 1.2 <= time.monotonic() - start < 5


SHOWN = {"id": "7", "contents": "other"}


@pytest.mark.parametrize(
    "status,body",
    [
        (200, b"<html>"),
        pytest.param(200, b"[" * 200_000, id="deep"),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"result": []}'),
        (200, b'{"result": [[], []]}'),
        (200, b'{"result": [[7]]}'),
        (200, b'{"result": [[{"document": {"id": "x"}, "score": 1}]]}'),
        (200, b'{"result": [[{"document": {"id": "7"}, "score": 1}]]}'),
        (200, json.dumps({"result": [[{"document": SHOWN, "score": 1}]]}).encode()),
        (200, b'{"result": [[{"document": {"id": -1}, "score": 1}]]}'),
        (200, b'{"result": [[{"document": {"id": "7", "contents": null}, "score": 1}]]}'),
        (200, b'{"result": [[{"document": {"id": 300}, "score": 1}]]}'),
        (200, b'{"result": [[{"document": {"id": 1e400}, "score": 1}]]}'),
        (400, b'{"error": "no"}'),
        (404, b""),
        (301, b""),
    ],
)
def test_nonsense_fails_at_once(index, status, body):
    with (
        fake_server(lambda h, n: h.say(status, body)) as (url, times),
        pytest.raises(ValueError, match="answer"),
    ):
        open_client(url, index).search(["a"], 2)
    assert len(times) == 1


def test_a_query_that_the_server_refuses_fails_alone(url, index):
    """Whatever its place among others; a limit of the server on queries at a time costs none."""
    long = "w0é " * 1100
    for queries in (["w0é", long, "w1é", "w3é", "w2é"], [long], ["w1é", "w0é", long, long]):
        alone = [n for n, query in enumerate(queries) if query == long]
        with pytest.raises(
            SomeFailedError, match="answered 400: .*a query is longer than 4096 characters"
        ) as raised:
            open_client(url, index, batch=4).search(queries, 3)
        expected = index.search(["" if query == long else query for query in queries], 3)[0]
        np.testing.assert_array_equal(raised.value.found, expected)
        assert list(raised.value.failures) == alone
    many = [f"w{n % 40}é w{n // 40}é" for n in range(700)]
    np.testing.assert_array_equal(
        open_client(url, index, batch=700).search(many, 3)[0], index.search(many, 3)[0]
    )


def test_the_end_of_every_request_is_reported(url, index):
    ended = []
    report = lambda: ended.append(1)
    open_client(url, index, ended=report).search(QUERIES, 3)
    assert len(ended) == 3
    with pytest.raises(SomeFailedError):
        open_client(url, index, ended=report).search(["a", "w0é " * 1100], 3)
    assert len(ended) == 3 + 3  # both together, and each alone
    with (
        fake_server(lambda h, n: h.say(503, b"busy")) as (busy, times),
        pytest.raises(urllib3.exceptions.HTTPError),
    ):
        open_client(busy, index, ended=report).search(["a"], 3)
    assert len(times) == 3 and len(ended) == 3 + 3 + 1


def test_many_long_queries_are_asked_for_in_requests_that_servers_take(url, index):
    """4,096 characters, the longest allowed, take up to 49,152 bytes of a request. A server may
    hang up on a longer request before it is sent."""
    queries = [
        ("w1é " + sign * 5000)[: MAX_QUERY_CHARACTERS - n] for n, sign in enumerate("漢😀" * 32)
    ]
    assert len(json.dumps(queries)) > 2 * MAX_BODY_BYTES
    for found, expected in zip(
        open_client(url, index, batch=64, attempts=1).search(queries, 3),
        index.search(queries, 3),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    assert 'status="413"' not in urllib3.request("GET", f"{url}/metrics").data.decode()


TITLES = [
    "Paris",
    '"Heroes" (David Bowie album)',
    '"Heroes" and "Low"',
    'Toys "R" Us',
    "two\nlines",
]


@pytest.mark.parametrize(
    "send",
    [
        lambda d: {"contents": f"{d.title}\n{d.text}"},
        lambda d: {"contents": f'"{d.title}"\n{d.text}'},
        lambda d: {"contents": render_contents(d)},
        lambda d: {"title": d.title, "text": d.text},
    ],
    ids=["bare", "in quotes", "as serve has it", "fields"],
)
def test_a_document_may_be_sent_in_any_form_of_a_corpus(send):
    documents = [Document(i, title, f'{title} is "so".\nAnd so.') for i, title in enumerate(TITLES)]
    answer = {
        "result": [[{"document": {"id": str(d.id), **send(d)}, "score": 1.0} for d in documents]]
    }
    with fake_server(lambda h, n: h.say(200, json.dumps(answer).encode())) as (url, _):
        client = RemoteIndex(
            url, documents, "hash", attempt_s=2.0, attempts=1, backoff_s=0.0, batch=2
        )
        assert client.search(["a"], 5)[0].tolist() == [[0, 1, 2, 3, 4]]
        answer["result"][0][3]["document"] = {"id": "3", "contents": "Toys\nwere us"}
        with pytest.raises(ValueError, match="id '3' .*none of the 5 documents here"):
            client.search(["a"], 5)


def test_documents_survive_the_form_of_an_answer(shared_data):
    """Real ones, written as answers have them and read as rows of a corpus: only white space in
    titles changes."""
    with contextlib.closing(read_rows(shared_data / "wiki18_sample" / "corpus.jsonl.gz")) as rows:
        passages = [(row.text("title"), row.text("text")) for row in rows]
    assert sum("\n" in title for title, _ in passages) > 30
    for title, text in passages + [(title, "x") for title in TITLES]:
        read = read_passage(Row({"contents": render_contents(Document(0, title, text))}, "", 1))
        assert read == (" ".join(title.split()), text)


OTHER_CORPUS, CHANGED = "corpus other, but this run needs", "its {}, at first .*, is now "


@pytest.mark.parametrize(
    "health,changed,message",
    [
        ({}, {}, None),
        ({}, {"k": 9, "documents": 5}, None),
        (None, {"settings": {"k1": 2.0}}, None),
        ("ok", {}, None),
        ({"settings": [1]}, {"settings": None}, None),
        ({}, {"corpus": "other"}, OTHER_CORPUS),
        (None, {"corpus": "other"}, OTHER_CORPUS),
        ({}, {"settings": {"k1": 2.0, "b": 0.4}}, CHANGED.format("settings")),
        ({}, {"retriever": "dense"}, CHANGED.format("retriever")),
    ],
)
def test_a_server_that_was_restarted_with_another_index_is_noticed(index, health, changed, message):
    """Its answers say so, even if both corpora hold their documents. A server may say nothing about
    itself, or nothing sensible."""
    health = {**index.describe(3), **health} if isinstance(health, dict) else health
    answer = good_answer(index, manifest={**index.describe(2), **changed})
    with fake_server(lambda h, n: h.say(200, good_answer(index) if n == 0 else answer), health) as (
        url,
        times,
    ):
        client = open_client(url, index)
        client.check()
        assert client.search(["a"], 2)[0].tolist() == [[7, -1]]
        assert client.describe(2)["settings"]["url"] == url
        if message is None:
            assert client.search(["a"], 2)[0].tolist() == [[7, -1]]
        else:
            with pytest.raises(ValueError, match=message):
                client.search(["a"], 2)
        assert len(times) == 2  # another attempt would find the same index


# What servers answer that are not ours: the documents of each query, best first, as Search-R1's
# dense server has them (rows of its corpus), its BM25 server (whose index may hold texts only), …
PASSAGES = [Document(i, f"Town {i}", f"Town {i} lies on a river.") for i in range(5)]
shown = lambda d, **more: {"contents": f'"{d.title}"\n{d.text}', **more}
scored = lambda *documents: [{"document": document, "score": 1.5} for document in documents]
FOREIGN = {  # name: answer to one query; the ids that are read from it for k = 2
    "ids": (scored(*(shown(d, id=str(d.id)) for d in PASSAGES[1:3])), [1, 2]),
    "no ids": (scored(*(shown(d, title=d.title, text=d.text) for d in PASSAGES[1:3])), [1, 2]),
    "ids from 1": (scored(*(shown(d, id=str(d.id + 1)) for d in PASSAGES[3:])), [3, 4]),
    "words as ids": (scored(*(shown(d, id=f"wiki_{d.id}") for d in PASSAGES[:2])), [0, 1]),
    "no scores": ([shown(d, id=d.id) for d in PASSAGES[1:3]], [1, 2]),
    "null as score": ([{"document": shown(PASSAGES[4], id="4"), "score": None}], [4, -1]),
    "more than topk": (scored(*(shown(d, id=str(d.id)) for d in PASSAGES)), [0, 1]),
    "fewer": (scored(shown(PASSAGES[2], id="2")), [2, -1]),
    "none": ([], [-1, -1]),
    "thrice": (scored(*[shown(PASSAGES[3], id="3")] * 3, shown(PASSAGES[1], id="1")), [3, 1]),
    "thrice without ids": (scored(*[shown(PASSAGES[3])] * 3), [3, -1]),
}


def open_passages(url, **changed):
    options = dict(corpus="hash", attempt_s=2.0, attempts=1, backoff_s=0.0, batch=2)
    return RemoteIndex(url, documents=PASSAGES, **options | changed)


@pytest.mark.parametrize("found,expected", FOREIGN.values(), ids=FOREIGN)
def test_what_other_servers_answer_is_read(found, expected):
    answer = json.dumps({"result": [found, found]}).encode()
    with fake_server(lambda h, n: h.say(200, answer)) as (url, _):
        ids, scores = open_passages(f"{url}/retrieve").search(["a", "b"], 2)
    assert ids.tolist() == [expected] * 2
    has_score = bool(found) and found[0].get("score") is not None
    assert scores.tolist() == [[1.5 * has_score * (i >= 0) for i in expected]] * 2


@pytest.mark.parametrize("identity", [{"id": "wiki_7"}, {"id": "2"}, {}], ids=str)
def test_an_unknown_document_is_named(identity):
    answer = {"result": [[{"document": {"contents": "Another\nOne.", **identity}, "score": 1.0}]]}
    with (
        fake_server(lambda h, n: h.say(200, json.dumps(answer).encode())) as (url, _),
        pytest.raises(ValueError) as raised,
    ):
        open_passages(url).search(["a"], 2)
    assert repr(identity.get("id", "Another")).strip("'") in str(raised.value)


def test_documents_are_listed_once_and_the_end_of_each_step_is_reported(monkeypatch):
    """By all threads together; of equal documents the first is found."""
    monkeypatch.setattr(contents, "_LISTED_AT_ONCE", 10)
    read, reports = [], []

    class Documents(list):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    documents = Documents(Document(i, f"t{i % 60}", "x") for i in range(100))
    finder = contents.Finder(documents, lambda: reports.append(1))
    threads = [threading.Thread(target=finder.find, args=("t7\nx",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 10 and sorted(read[:100]) == list(range(100)) and len(read) == 104
    assert [finder.find(f'"t{n}" x') for n in (7, 59, 60)] == [7, 59, None]


def half_of(sent: bytes):
    """Says the beginning of an answer and hangs up."""

    def answer(handler):
        handler.wfile.write(sent)
        handler.wfile.flush()
        hang_up(handler)

    return answer


HEAD = b"HTTP/1.1 200 OK\r\n"
HALVES = {
    "within the body": HEAD + b'\r\n{"result": [[{"docu',
    "before the body": HEAD + b"\r\n",
    "within the headers": HEAD + b"Content-Ty",
    "within a chunk": HEAD + b'Transfer-Encoding: chunked\r\n\r\n40\r\n{"result": [',
    "between chunks": HEAD + b'Transfer-Encoding: chunked\r\n\r\nc\r\n{"result": [\r\n',
    "within a size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n4",
    "of a known length": HEAD + b'Content-Length: 90\r\n\r\n{"result": [',
    "with nothing": b"",
    "within the first line": b"HTTP/1.1 2",
}


@pytest.mark.parametrize("sent", HALVES.values(), ids=HALVES)
def test_half_an_answer_is_asked_for_again(index, sent):
    with fake_server(
        lambda h, n: half_of(sent)(h) if n == 0 else h.say(200, good_answer(index))
    ) as (
        url,
        times,
    ):
        assert open_client(url, index).search(["a"], 2)[0].tolist() == [[7, -1]]
        assert len(times) == 2


LOGIN = "anna:z%40bra:w%C3%B6rd"  # of which "z@bra:wörd" is the password


def test_a_password_is_sent_and_never_shown(index):
    """Not in the manifest, nor in any error."""
    seen, status = [], [200]

    def respond(handler, n):
        seen.append(handler.headers["Authorization"])
        handler.say(status[0], good_answer(index))

    with fake_server(respond) as (url, _):
        address = url.replace("://", f"://{LOGIN}@")
        client = open_client(address, index, attempts=1)
        assert client.search(["a"], 2)[0].tolist() == [[7, -1]]
        assert seen == ["Basic " + base64.b64encode("anna:z@bra:wörd".encode()).decode()]
        texts = [json.dumps(client.describe(2))]
        assert client.describe(2)["settings"]["url"] == url
        for status[0] in (401, 404, 500):
            with pytest.raises((ValueError, urllib3.exceptions.HTTPError)) as raised:
                client.search(["a"], 2)
            texts.append(str(raised.value))
        assert "config.search.url" in texts[1]
    for wrong in (address, "ftp://anna:z%40bra@host", "http://anna:z/bra@host"):
        with pytest.raises(ValueError) as raised:
            open_client(wrong, index, attempts=1).check()
        texts.append(str(raised.value))
    assert not [text for text in texts if "anna" in text or "bra" in text]
