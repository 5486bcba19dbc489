"""The search server gives the same answers as the index, whatever others send, and however slowly;
and a run whose server goes away continues."""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import running
import urllib3
from test_index import draw_documents, write_corpus

from stepsearch_jax import cli
from stepsearch_jax.benchmark.retrieval import measure, render
from stepsearch_jax.benchmark.serving import HOSTILE, run_server
from stepsearch_jax.prepare.index import index_files
from stepsearch_jax.search.cache import hash_documents
from stepsearch_jax.search.contents import render_contents
from stepsearch_jax.serve import __main__ as serve
from stepsearch_jax.serve.app import Engine, make_app
from stepsearch_jax.serve.limits import Limits
from stepsearch_jax.serve.server import Server, make_protocol

QUERIES = ["w0é w3é", "w1é", "nothing", "", "w2é w2é w40é"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def index(folder):
    return index_files(
        [write_corpus(folder / "c.jsonl", draw_documents(300, 4))], folder / "index", 0.9, 0.4
    )


@pytest.fixture(scope="module")
def url(index, folder):
    with run_server(folder / "index", folder / "serve.log") as address:
        yield address


@pytest.fixture(scope="module")
def hasty(index, folder):
    """A server that is soon tired of waiting."""
    with run_server(
        folder / "index", folder / "hasty.log", "--max-transfer-seconds=1.5"
    ) as address:
        yield address


def post(url, body, **options):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return urllib3.request(
        "POST", f"{url}/retrieve", body=raw, retries=False, timeout=30, **options
    )


def make_limits(transfer_seconds: float, **changed) -> Limits:
    limits = dict(body_bytes=1000, queries=5, query_characters=50, topk=5, searches=1, waiting=1)
    return Limits(transfer_seconds=transfer_seconds, **limits | dict(held_bytes=1000) | changed)


def make_scope(method: str, path: str) -> dict:
    """A request as ASGI describes it to the application."""
    scope = {"type": "http", "method": method, "path": path}
    return scope | {"headers": [], "query_string": b"", "root_path": ""}


def test_answers_have_search_r1s_form(url, index):
    ids, scores = index.search(QUERIES, 4)
    answer = post(url, {"queries": QUERIES, "topk": 4, "return_scores": True}).json()
    assert set(answer) == {"result", "manifest"} and answer["manifest"] == index.describe(4)
    assert len(answer["result"]) == len(QUERIES)
    for row, found in enumerate(answer["result"]):
        assert [int(entry["document"]["id"]) for entry in found] == ids[row][ids[row] >= 0].tolist()
        assert [entry["score"] for entry in found] == scores[row][ids[row] >= 0].tolist()
        for entry in found:
            document = index.documents[int(entry["document"]["id"])]
            assert entry["document"] == {
                "id": str(document.id),
                "title": document.title,
                "text": document.text,
                "contents": render_contents(document),
            }
    plain = post(url, {"queries": QUERIES, "topk": 4}).json()["result"]
    assert plain == [[entry["document"] for entry in found] for found in answer["result"]]
    default = post(url, {"queries": QUERIES}).json()["result"]  # --topk
    assert [len(found) for found in default] == [3, 3, 0, 0, 3]


@pytest.mark.parametrize("asked", [{"topk": 0}, {"topk": None}, {}], ids=str)
def test_the_servers_own_topk(url, asked):
    """Search-R1's server reads 0 and null as its own."""
    assert (
        post(url, {"queries": ["w0é"], **asked}).json()
        == post(url, {"queries": ["w0é"], "topk": 3}).json()
    )


def test_requests_of_search_r1s_trainer(url, index):
    """A turn in which nobody searches, and one in which 512 questions with 5 samples each do."""
    nothing = post(url, {"queries": [], "topk": 3, "return_scores": True})
    assert (nothing.status, nothing.json()["result"]) == (200, [])
    queries = [f"w{n % 40}é w{n // 40}é" for n in range(2560)]
    answer = post(url, {"queries": queries, "topk": 3, "return_scores": True})
    assert answer.status == 200 and "Content-Length" not in answer.headers  # in pieces
    ids, scores = index.search(queries, 3)
    assert len(answer.json()["result"]) == 2560
    for found, of_row, scores_of_row in zip(answer.json()["result"], ids, scores, strict=True):
        assert [int(entry["document"]["id"]) for entry in found] == of_row[of_row >= 0].tolist()
        assert [entry["score"] for entry in found] == scores_of_row[of_row >= 0].tolist()


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: repr(body[:30]))
def test_hostile_bodies_are_refused(url, body):
    try:
        answer = post(url, body)
    except urllib3.exceptions.HTTPError:
        assert len(body) > 1 << 20  # hung up on: it was still sending
        return
    assert answer.status == (413 if len(body) > 1 << 20 else 400)
    assert list(answer.json()) == ["error"]


def test_other_requests_and_metrics(url, index):
    assert urllib3.request("GET", f"{url}/health").json() == {"status": "ok", **index.describe(3)}
    assert urllib3.request("GET", f"{url}/retrieve").status == 405
    assert urllib3.request("POST", f"{url}/nothing").status == 404
    before = urllib3.request("GET", f"{url}/metrics").data.decode()
    post(url, {"queries": ["a", "b"]})
    post(url, b"{")
    after = urllib3.request("GET", f"{url}/metrics").data.decode()
    read = lambda text, name: float(
        next(line for line in text.splitlines() if line.startswith(name)).split()[-1]
    )
    for name, more in (
        ('stepsearch_requests_total{status="200"}', 1),
        ('stepsearch_requests_total{status="400"}', 1),
        ("stepsearch_queries_total", 2),
    ):
        assert read(after, name) == (read(before, name) if name in before else 0) + more
    assert read(after, "stepsearch_busy") == 0


def test_a_slow_body_and_too_many_requests(index):
    """In the application itself: 408 for a body that does not come, 503 beyond the limits."""
    limits = make_limits(transfer_seconds=0.2)
    app = make_app(Engine(index.search, index.documents, index.describe), 3, limits)

    async def ask(delay: float) -> int:
        sent = []
        parts = [
            {"type": "http.request", "body": b'{"queries": ["w1"]', "more_body": True},
            {"type": "http.request", "body": b"}"},
        ]

        async def receive():
            if len(parts) == 1:
                await asyncio.sleep(delay)
            return parts.pop(0)

        async def send(message):
            sent.append(message)

        await app(make_scope("POST", "/retrieve"), receive, send)
        return sent[0]["status"]

    async def ask_many() -> list[int]:
        return await asyncio.gather(*(ask(0.1) for _ in range(4)))

    assert asyncio.run(ask(5.0)) == 408 and asyncio.run(ask(0.0)) == 200
    assert sorted(asyncio.run(ask_many())) == [200, 200, 503, 503]


def test_an_index_that_fails_is_reported_and_counted(index):
    """The application continues; the error stands in its log, not in the answer."""

    def search(queries, k):
        if queries == ["bad"]:
            raise OSError("/secret/place is gone")
        return index.search(queries, k)

    limits = make_limits(transfer_seconds=1.0)
    app = make_app(Engine(search, index.documents, index.describe), 3, limits)

    async def ask(method: str, path: str, body: bytes = b"") -> tuple[int, str]:
        sent = []

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            sent.append(message)

        await app(make_scope(method, path), receive, send)
        return sent[0]["status"], sent[1]["body"].decode()

    assert asyncio.run(ask("POST", "/retrieve", b'{"queries": ["bad"]}')) == (
        500,
        '{"error": "the search failed: OSError"}',
    )
    assert asyncio.run(ask("POST", "/retrieve", b'{"queries": ["w1"]}'))[0] == 200
    metrics = asyncio.run(ask("GET", "/metrics"))[1]
    assert 'stepsearch_requests_total{status="500"} 1.0' in metrics
    assert "stepsearch_busy 0.0" in metrics


def send_slowly(url, before: bytes, pause: float, most: float) -> float:
    """Sends `before`, then a byte after each pause -> seconds until the server hangs up, at most
    `most`."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(before)
        client.settimeout(pause)
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < most:
                with contextlib.suppress(TimeoutError):
                    if not client.recv(1 << 16):
                        break
                client.sendall(b"x")
                time.sleep(pause)
        return time.monotonic() - start


HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(HEALTH, id="headers", marks=pytest.mark.slow),
        pytest.param(b"GET /", id="first line", marks=pytest.mark.slow),
        pytest.param(
            HEALTH + b"\r\nGET /health HTTP/1.1\r\nX: ", id="second headers", marks=pytest.mark.slow
        ),
        pytest.param(
            HEALTH + b"Content-Length: 1000\r\n\r\n", id="unread body", marks=pytest.mark.slow
        ),
    ],
)
def test_who_sends_slowly_is_cut_off(hasty, before):
    assert 1.0 < send_slowly(hasty, before, 0.1, 8.0) < 7.0


@pytest.mark.slow
def test_who_does_not_take_the_answer_is_cut_off(hasty, index):
    """The answer is longer than what the system holds for a connection: without a time limit the
    rest would stay in the server's memory."""
    body = json.dumps({"queries": ["w0é w1é"] * 500, "topk": 100, "return_scores": True}).encode()
    whole = len(post(hasty, body).data)
    host, port = hasty.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        client.connect((host, int(port)))
        client.sendall(
            b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        client.recv(1)  # the answer has begun
        time.sleep(3.0)
        read = 0
        with contextlib.suppress(ConnectionError):
            while part := client.recv(1 << 20):
                read += len(part)
    assert 0 < read < whole


@pytest.mark.slow
def test_ordinary_requests_and_slow_searches_go_on(hasty, index):
    http = urllib3.PoolManager(maxsize=1, retries=False)
    for _ in range(8):  # one connection, for longer than the limit
        assert http.request("POST", f"{hasty}/retrieve", json={"queries": QUERIES}).status == 200
        time.sleep(0.3)
    assert http.connection_from_url(hasty).num_connections == 1

    def search(queries, k):
        time.sleep(1.4)
        return index.search(queries, k)

    limits = make_limits(transfer_seconds=1.0)
    app = make_app(Engine(search, index.documents, index.describe), 3, limits)
    port, protocol = running.free_port(), make_protocol(limits.transfer_seconds)
    server = Server(serve.uvicorn.Config(app, port=port, http=protocol, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, 30, "the server does not start")
        head = b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: 18\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as client:
            # The second request is there before the first is answered.
            client.sendall((head + b'{"queries": ["a"]}') * 2)
            answered = b""
            with contextlib.suppress(ConnectionError):  # it is cut off when it stays idle
                while part := client.recv(1 << 16):
                    answered += part
        assert answered.count(b"HTTP/1.1 200") == 2
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--index=none"], "none holds no search index"),
        (["--index=none", "--port=70000"], "--port=70000"),
        (["--index=none", "--topk=101"], "--topk=101"),
        (["--index=none", "--max-queries=0"], "--max-queries=0"),
        (["--index=none", "--max-held-bytes=9"], "--max-held-bytes=9"),
    ],
)
def test_mistakes_on_the_command_line_are_named(flags, message):
    with pytest.raises(SystemExit, match=message):
        serve.main(flags)


def test_a_port_that_is_taken_is_named_before_anything_is_served(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus.jsonl", draw_documents(9, 1))
    index_files([corpus], tmp_path / "index", 1.2, 0.75)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"127.0.0.1:{port} .*in use.*--host or --port"):
            serve.main([f"--index={tmp_path / 'index'}", f"--port={port}"])
    with pytest.raises(SystemExit, match="a..b:8000 .*--host or --port"):
        serve.main([f"--index={tmp_path / 'index'}", "--host=a..b"])
    assert "serving" not in capsys.readouterr().out


def test_the_number_of_documents_is_printed(tmp_path, capsys, monkeypatch):
    # uvicorn's own Config would set up logging.
    monkeypatch.setattr(serve.uvicorn, "Config", lambda *_, **__: None)
    monkeypatch.setattr(Server, "__init__", lambda *_: None)
    monkeypatch.setattr(Server, "run", lambda _, sockets: sockets[0].close())
    for count, printed in ((1, " 1 document at "), (2, " 2 documents at ")):
        corpus = write_corpus(tmp_path / "corpus.jsonl", draw_documents(count, 1))
        index_files([corpus], tmp_path / f"index-{count}", 1.2, 0.75)
        serve.main([f"--index={tmp_path}/index-{count}", f"--port={running.free_port()}"])
        assert printed in capsys.readouterr().out


def test_a_config_is_served_too(tmp_path, tmp_path_factory):
    """The data set of a config, without a policy: the run's mesh need not fit the devices here."""
    file = f"{running.REPO}/tests/tiny_config.py:{running.shared_cache(tmp_path_factory)}"
    overrides = [f"--config.mesh.{axis}" for axis in ("data=1", "fsdp=8", "tensor=2")]
    config = cli.read_config(cli.make_parser("serve", ""), file, overrides)
    engine = serve.open_engine(argparse.Namespace(index=None, config=config))
    manifest = engine.describe(2)
    assert manifest["corpus"] == hash_documents(engine.documents) and manifest["k"] == 2
    title = engine.documents[5].title
    assert 5 in engine.search([title], 3)[0]


# ---- whole runs ----


def start_server(config: str, port: int, log: pathlib.Path) -> subprocess.Popen:
    """`serve` for the tests' data set, on a given port."""
    command = [sys.executable, "-m", "stepsearch_jax.serve", f"--config={config}", f"--port={port}"]
    environment = os.environ | {"XLA_FLAGS": ""}
    with open(log, "a") as file:
        return subprocess.Popen(
            command, cwd=running.REPO, stdout=file, stderr=file, env=environment
        )


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def answers(port: int) -> bool:
    address = f"http://localhost:{port}/health"
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        return urllib3.request("GET", address, retries=False, timeout=5).status == 200
    return False


@pytest.mark.slow
def test_a_run_outlives_its_engine(tmp_path, tmp_path_factory):
    """The server is killed and started again, twice, in the middle of RL: the run continues, and
    the failures are counted."""
    config = f"tests/tiny_config.py:{running.shared_cache(tmp_path_factory)}"
    port, workdir = running.free_port(), tmp_path / "run"
    start = running.searching_start(tmp_path_factory)
    server = start_server(config, port, tmp_path / "server.log")
    run = None
    try:
        wait_for(lambda: answers(port), 120, "the server does not start")
        flags = [
            f"--config.search.url=http://localhost:{port}",
            "--config.search.kind=remote",
            "--config.search.max_failure_fraction=1.0",
            "--config.search.attempt_s=0.5",
            "--config.search.attempts=2",
            "--config.search.backoff_s=0.1",
            "--config.iterations=400",
            f"--config.sft.checkpoint={start}",
            "--config.checkpoint.every=1000",
            "--config.evaluation.questions=8",
        ]
        run = running.start(
            ["-m", "stepsearch_jax.train", f"--config={config}", f"--workdir={workdir}", *flags],
            log=tmp_path / "run.log",
        )
        metrics = workdir / "metrics.jsonl"
        lines = lambda: metrics.read_text().splitlines() if metrics.exists() else []
        read = lambda: [json.loads(line) for line in lines()]
        failed = lambda: [line["failed_searches"] > 0 for line in read()]
        wait_for(lambda: len(read()) >= 2, 240, "the run does not begin")
        for times in (1, 2):
            before = len(read())
            server.send_signal(signal.SIGKILL)
            server.wait()
            wait_for(lambda before=before: any(failed()[before:]), 120, "no failure is counted")
            server = start_server(config, port, tmp_path / "server.log")
            wait_for(lambda: answers(port), 120, "the server does not start again")
            after = len(read()) + 1
            wait_for(
                lambda after=after: len(read()) > after and not all(failed()[after:]),
                120,
                f"after restart {times} every search fails",
            )
        assert run.poll() is None, (tmp_path / "run.log").read_text()[-3000:]
        assert any(failed()) and not failed()[0]
    finally:
        for process in (server, run):
            if process is not None:
                process.kill()


@pytest.mark.slow
def test_the_benchmark_counts_every_answer(tmp_path):
    figures = measure(repeats=1, seed=0, passages=[2000], requests=300, folder=tmp_path)
    assert figures["serve"]["requests"] == 300 and figures["serve"]["hostile"] > 0
    assert "| 2,000 |" in render(figures)
    assert set(figures["serve"]["by_status"]) <= {"400", "413", "408", "closed", "left"}
    assert figures["serve"]["grown_bytes"] < 100 << 20
    assert figures["stop"]["status"] == 143 and figures["stop"]["lost"] == 0
    assert figures["stop"]["answered"] > 100 and figures["stop"]["refused"] == 32
