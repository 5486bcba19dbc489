"""Answers of the search server are made and sent in pieces within a budget of bytes, whatever
clients do; and a signal ends the server after it has answered what it accepted."""

import asyncio
import contextlib
import functools
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import running
import urllib3
import uvicorn
from test_index import draw_documents, write_corpus
from test_serve import make_limits, make_scope, post, wait_for

from stepsearch_jax.benchmark.serving import Server as ServerProcess
from stepsearch_jax.prepare.index import index_files
from stepsearch_jax.serve import server as server_module
from stepsearch_jax.serve.app import ABORT, PIECE_BYTES, Engine, make_app, parse_request
from stepsearch_jax.serve.limits import Budget
from stepsearch_jax.serve.server import Server, make_protocol

LONG = {"queries": [f"w{n}é" for n in range(30)] * 2, "topk": 100, "return_scores": True}
SHORT = {"queries": ["w1é"], "topk": 2}
LIMITS = dict(body_bytes=1 << 20, queries=100, topk=100, searches=2, waiting=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pieces")


@pytest.fixture(scope="module")
def index(folder):
    return index_files(
        [write_corpus(folder / "c.jsonl", draw_documents(300, 4))], folder / "index", 0.9, 0.4
    )


def make_engine(index, search=None):
    return Engine(search or index.search, index.documents, index.describe)


class Client:
    """Asks the application as an ASGI server would, and reads as long as `reads` is set.

    status, body: of the answer so far; is_whole: whether it has ended; is_cut_off: whether the
    application has reset the connection.
    """

    def __init__(self, app):
        self.reads, self.gone = asyncio.Event(), asyncio.Event()
        self.reads.set()
        self.status, self.headers, self.body, self.is_whole = 0, {}, b"", False
        self.is_cut_off = False
        self._app = app

    async def ask(self, body) -> "Client":
        raw = [body if isinstance(body, bytes) else json.dumps(body).encode()]

        async def receive():
            if raw:
                return {"type": "http.request", "body": raw.pop()}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if self.body:  # the part before is in the way
                await self.reads.wait()
            if message["type"] == "http.response.start":
                self.status, self.headers = message["status"], dict(message["headers"])
            else:
                self.body += message["body"]
                self.is_whole = not message.get("more_body", False)

        scope = make_scope("POST", "/retrieve") | {"state": {ABORT: self.abort}}
        await self._app(scope, receive, send)
        return self

    def abort(self):
        self.is_cut_off = True

    def leave(self):
        self.gone.set()
        self.reads.set()


async def read_metric(app, name: str) -> float:
    text = ""

    async def send(message):
        nonlocal text
        text += message.get("body", b"").decode()

    await app(make_scope("GET", "/metrics"), None, send)
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


async def settle() -> None:
    """Until nothing moves any more."""
    await asyncio.sleep(0.3)


def test_a_long_answer_is_that_of_the_index(index):
    limits = make_limits(5.0, **LIMITS, held_bytes=1 << 20)
    app = make_app(make_engine(index), 3, limits)

    async def ask(body):
        return await Client(app).ask(body)

    long = asyncio.run(ask(LONG))
    ids, scores = index.search(LONG["queries"], 100)
    assert len(long.body) > 4 * PIECE_BYTES and long.is_whole
    assert b"content-length" not in long.headers
    answer = json.loads(long.body)
    assert answer["manifest"] == index.describe(100)
    for row, found in enumerate(answer["result"]):
        assert [int(entry["document"]["id"]) for entry in found] == ids[row][ids[row] >= 0].tolist()
        assert [entry["score"] for entry in found] == scores[row][ids[row] >= 0].tolist()
    assert long.body.decode() == json.dumps(answer)
    short = asyncio.run(ask(SHORT))
    assert short.headers[b"content-length"] == str(len(short.body)).encode()


@pytest.mark.parametrize("pieces", [3, 20])
def test_clients_that_do_not_read_hold_one_piece_each_within_the_budget(index, pieces):
    """Eight of them: with room for three pieces, five wait; with room for more, others are
    answered meanwhile. When they read, each gets its whole answer."""
    held_bytes = (pieces + 1) * PIECE_BYTES - 1000  # a piece is up to a document longer
    limits = make_limits(5.0, **(LIMITS | {"body_bytes": 1 << 16}), held_bytes=held_bytes)
    app = make_app(make_engine(index), 3, limits)

    async def run():
        clients = [Client(app) for _ in range(8)]
        for client in clients:
            client.reads.clear()
        tasks = [asyncio.create_task(client.ask(LONG)) for client in clients]
        await settle()
        held = await read_metric(app, "stepsearch_held_bytes")
        assert held == sum(len(client.body) for client in clients)
        assert sum(bool(client.body) for client in clients) == min(pieces, 8)
        assert held <= held_bytes and max(len(client.body) for client in clients) < 80_000
        if pieces > 8:
            assert (await asyncio.wait_for(Client(app).ask(SHORT), 5)).is_whole
        for client in clients:
            client.reads.set()
        await asyncio.gather(*tasks)
        assert len({client.body for client in clients}) == 1 and clients[0].is_whole
        assert await read_metric(app, "stepsearch_held_bytes") == 0
        assert await read_metric(app, "stepsearch_unfinished_total") == 0

    asyncio.run(run())


def test_who_leaves_frees_its_bytes(index):
    limits = make_limits(5.0, **LIMITS, held_bytes=1 << 20)
    app = make_app(make_engine(index), 3, limits)

    async def run():
        client = Client(app)
        client.reads.clear()
        task = asyncio.create_task(client.ask(LONG))
        await settle()
        assert await read_metric(app, "stepsearch_held_bytes") > 0
        client.leave()
        await task
        assert len(client.body) < 2 * PIECE_BYTES and not client.is_whole
        assert await read_metric(app, "stepsearch_held_bytes") == 0
        assert await read_metric(app, "stepsearch_unfinished_total") == 1
        assert await read_metric(app, "stepsearch_queries_total") == 0

    asyncio.run(run())


def test_an_index_that_fails_in_the_middle_cuts_the_answer_off(index):
    """Half an answer must not pass for a whole one."""
    done = []

    def search(queries, k):
        done.append(len(queries))
        if sum(done) > 40:
            raise OSError("gone")
        return index.search(queries, k)

    app = make_app(make_engine(index, search), 3, make_limits(5.0, **LIMITS, held_bytes=1 << 20))

    async def run():
        client = await Client(app).ask(LONG)
        assert client.status == 200 and client.body and not client.is_whole and client.is_cut_off
        assert await read_metric(app, "stepsearch_held_bytes") == 0
        assert await read_metric(app, "stepsearch_unfinished_total") == 1

    asyncio.run(run())


def test_large_requests_take_turns_with_small_ones(index):
    """A small request does not wait for all queries of a large one that came before."""
    asked = []

    def search(queries, k):
        asked.append(len(queries))
        time.sleep(0.002 * len(queries))
        return index.search(queries, k)

    limits = make_limits(5.0, **(LIMITS | {"searches": 1}), held_bytes=1 << 20)
    app = make_app(make_engine(index, search), 3, limits)

    async def run():
        large = asyncio.create_task(Client(app).ask(LONG))
        await asyncio.sleep(0)
        await Client(app).ask(SHORT)
        assert not large.done() and sum(asked) < 60
        assert (await large).is_whole

    asyncio.run(run())


def test_short_requests_pass_many_long_answers_by(index):
    """Of twenty answers under way only few wait for a turn before a request that comes later."""
    asked, are_reading = [], asyncio.Event()

    def search(queries, k):
        asked.append(len(queries))
        time.sleep(0.001 * are_reading.is_set())
        return index.search(queries, k)

    limits = make_limits(5.0, **(LIMITS | {"searches": 1}), held_bytes=1 << 23)
    app = make_app(make_engine(index, search), 3, limits)

    async def run():
        clients = [Client(app) for _ in range(20)]
        for client in clients:
            client.reads.clear()
        tasks = [asyncio.create_task(client.ask(LONG)) for client in clients]
        await settle()
        before = len(asked)
        are_reading.set()
        for client in clients:
            client.reads.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await Client(app).ask(SHORT)
        assert len(asked) - before < 20 * 2
        are_reading.clear()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_long_bodies_share_a_budget(index):
    """Beyond it they are refused, to come again; short ones always get through."""
    limits = make_limits(5.0, **LIMITS, held_bytes=1 << 20)
    app = make_app(make_engine(index), 3, limits)
    long = b" " * 600_000 + json.dumps(LONG).encode()

    async def run():
        first = Client(app)
        first.reads.clear()
        task = asyncio.create_task(first.ask(long))
        await settle()
        assert (await Client(app).ask(long)).status == 503
        assert (await Client(app).ask(SHORT)).status == 200
        first.reads.set()
        await task
        assert (await Client(app).ask(long)).status == 200

    asyncio.run(run())


def test_a_budget_is_first_come_first_served():
    async def run():
        budget, order = Budget(10), []

        async def take(size):
            await budget.take(size)
            order.append(size)

        await take(25)  # alone, more than the limit passes
        tasks = [asyncio.create_task(take(size)) for size in (9, 8, 1)]
        await asyncio.sleep(0)
        assert not budget.try_take(1)
        budget.free(25)
        await asyncio.sleep(0.01)
        assert order == [25, 9] and budget.held == 9  # 1 would fit, but comes after 8
        tasks[1].cancel()  # who does not wait any more takes nothing
        await asyncio.sleep(0.01)
        assert order == [25, 9, 1] and budget.held == 10 and not budget.try_take(1)

    asyncio.run(run())


def test_no_queries_and_no_topk_are_read_as_search_r1_does():
    limits = make_limits(1.0)
    for body, expected in (
        (b'{"queries": []}', ([], 3, False)),
        (b'{"queries": ["a"], "topk": 0}', (["a"], 3, False)),
        (b'{"queries": ["a"], "topk": null, "return_scores": true}', (["a"], 3, True)),
        (b'{"queries": ["a"], "topk": 5}', (["a"], 5, False)),
    ):
        assert parse_request(body, 3, limits) == expected


# ---- servers ----


@contextlib.contextmanager
def serving(app, seconds: float):
    """A server in a thread -> itself and its address."""
    port = running.free_port()
    settings = uvicorn.Config(app, port=port, http=make_protocol(seconds), log_level="warning")
    server = Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, 30, "the server does not start")
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_a_server_that_ends_answers_what_it_accepted(index, monkeypatch):
    """Requests that wait, one under way, an answer that is half sent, and idle connections."""

    def search(queries, k):
        time.sleep(0.05)
        return index.search(queries, k)

    monkeypatch.setattr(server_module, "IDLE_S", 3.0)
    app = make_app(make_engine(index, search), 3, make_limits(5.0, **LIMITS, held_bytes=1 << 22))
    with serving(app, 5.0) as (server, url), ThreadPoolExecutor(8) as pool:
        idle = urllib3.PoolManager(retries=False)
        assert idle.request("GET", f"{url}/health").status == 200
        bodies = [LONG, *[SHORT] * 7]
        ask = functools.partial(post, url)
        answers = [pool.submit(ask, body) for body in bodies]
        busy = lambda: urllib3.request("GET", f"{url}/metrics").data
        wait_for(lambda: b"stepsearch_busy 6.0" in busy() or b"busy 5.0" in busy(), 5, "not busy")
        server.should_exit = True
        time.sleep(0.3)
        late = idle.request("GET", f"{url}/health")  # it was perhaps under way
        assert late.status == 200 and late.headers["Connection"] == "close"
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.result().status == 200
            assert len(answer.result().json()["result"]) == len(body["queries"])
        assert any(answer.result().headers.get("Connection") == "close" for answer in answers)
    with pytest.raises(urllib3.exceptions.HTTPError):
        urllib3.request("GET", f"{url}/health", retries=False)


@pytest.mark.slow
@pytest.mark.parametrize("number, again", [("TERM", 0), ("INT", 0), ("HUP", 0), ("TERM", 1)])
def test_a_signal_ends_the_server_with_one_line(folder, index, number, again):
    """A second one ends it at once, though a client does not take its answer."""
    number, log = signal.Signals[f"SIG{number}"], folder / f"{number}-{again}.log"
    server = ServerProcess(folder / "index", log, "--max-transfer-seconds=20")
    try:
        slow = urllib3.request(
            "POST",
            f"{server.url}/retrieve",
            json=LONG | {"queries": LONG["queries"] * 40},
            preload_content=False,
            retries=False,
        )
        os.kill(server.process.pid, number)
        time.sleep(0.5)
        assert server.process.poll() is None  # the answer is not taken
        if again:
            os.kill(server.process.pid, number)
        else:
            assert len(json.loads(slow.read())["result"]) == 2400
        assert server.process.wait(5) == 128 + number
        slow.close()
    finally:
        server.process.kill()
    _, *lines = log.read_text().splitlines()
    assert len(lines) == 1 + again and all(number.name in line for line in lines)
