"""A search server under load and under attack: part of the subject `retrieval`.

32 clients send requests of one query until all are answered. Meanwhile others send bodies that are
malformed, too large, or never end, and 64 clients ask for the longest answer there is and never
read it. Then a second server gets SIGTERM in the middle of such requests. Every answer is compared
with the index's own.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import urllib3
from tqdm import tqdm

from stepsearch_jax.search.bm25 import Bm25Index, load_index

K = 3
CLIENTS = 32
SILENT_CLIENTS = 64  # which do not read
START_S, END_S = 300.0, 60.0  # for a server to start and to end
STOP_AFTER_S = 2.0  # of load, before SIGTERM
HOSTILE = (  # bodies that the server must refuse
    b"",
    b"{",
    b"[" * 50_000,
    b"\xff\xfe\x00",
    b"[]",
    b'{"queries": "a"}',
    b'{"queries": [1]}',
    b'{"topk": 3}',
    b'{"queries": ["a"], "topk": -1}',
    b'{"queries": ["a"], "topk": 1e9}',
    b'{"queries": ["a"], "topk": true}',
    json.dumps({"queries": ["a"] * 100_000}).encode(),
    json.dumps({"queries": ["a" * 900_000]}).encode(),
    b" " * (3 << 20),
    json.dumps({"queries": ["a"], "topk": 10**30}).encode(),
)


class Server:
    """`serve` in a process of its own. url: its address; process: itself."""

    def __init__(self, index: pathlib.Path, log: pathlib.Path, *flags: str):
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        command = [sys.executable, "-m", "stepsearch_jax.serve"]
        command += [f"--index={index}", f"--port={port}", *flags]
        with open(log, "w") as log_file:
            self.process = subprocess.Popen(command, stdout=log_file, stderr=log_file)
        self.url, deadline = f"http://localhost:{port}", time.monotonic() + START_S
        while True:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                urllib3.request("GET", f"{self.url}/health", retries=False)
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise ValueError(f"the server did not start; {log} says why")
            time.sleep(0.1)

    def read_memory(self) -> int:
        """Bytes that it holds in memory, without those of mapped files. 0 where nothing says so."""
        with contextlib.suppress(OSError):
            status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
            if found := re.search(r"RssAnon:\s+(\d+) kB", status):
                return int(found[1]) << 10
        return 0

    def stop(self) -> int:
        """Ends it -> its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def run_server(index: pathlib.Path, log: pathlib.Path, *flags: str) -> Iterator[str]:
    """`serve` in a process of its own -> its address."""
    server = Server(index, log, *flags)
    try:
        yield server.url
    finally:
        server.stop()


class Asker:
    """Asks a server and compares its answers with those of the index itself."""

    def __init__(self, index: Bm25Index, queries: list[str], url: str):
        self._queries, self._url = queries, url
        self._expected = [answer_of(index, query) for query in queries]
        self._http = urllib3.PoolManager(maxsize=CLIENTS, retries=False)

    def __call__(self, number: int) -> float:
        """One request -> its seconds. Raises ValueError for a wrong answer, HTTPError for none."""
        number %= len(self._queries)
        body = {"queries": [self._queries[number]], "topk": K, "return_scores": True}
        start = time.perf_counter()
        answer = self._http.request("POST", f"{self._url}/retrieve", json=body, timeout=120)
        took = time.perf_counter() - start
        found = answer.status
        if found == 200:
            entries = answer.json()["result"][0]
            found = [(entry["document"]["id"], entry["score"]) for entry in entries]
        if found != self._expected[number]:
            raise ValueError(
                f"a request was answered {found} {answer.data[:200]!r}; expected "
                f"{self._expected[number]}"
            )
        return took


def answer_of(index: Bm25Index, query: str) -> list[tuple[str, float]]:
    """What the server should answer."""
    ids, scores = index.search([query], K)
    pairs = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
    return [(str(i), score) for i, score in pairs if i >= 0]


def measure_load(
    folder: pathlib.Path, queries: list[str], requests: int, silent: int = SILENT_CLIENTS
) -> dict:
    """-> figures of requests to a server of the index in `folder`, and of what happened meanwhile.

    requests, seconds, p50_ms, p99_ms: of the requests; hostile, by_status: numbers of the bodies;
    silent: clients that do not read, cut_off: how often one was; memory_bytes, grown_bytes: of the
    server before, and how much more at most. Raises ValueError for a wrong answer.
    """
    index, statuses, cut_off = load_index(folder), Counter(), Counter()
    server = Server(folder, folder.with_suffix(".log"))
    try:
        ask = Asker(index, queries, server.url)
        for number in range(len(queries)):  # warm
            ask(number)
        before, peak = server.read_memory(), []
        disturbing = [lambda stop, n=n: attack(server.url, stop, statuses, n) for n in range(2)]
        if silent:
            disturbing.append(lambda stop: do_not_read(server.url, stop, queries, silent, cut_off))
        disturbing.append(lambda stop: _watch(server.read_memory, stop, peak))
        with _in_background(disturbing), ThreadPoolExecutor(CLIENTS) as pool:
            start = time.perf_counter()
            answers = pool.map(ask, range(requests))
            took = list(tqdm(answers, total=requests, desc="asking the server", unit=" requests"))
            seconds = time.perf_counter() - start
    finally:
        server.stop()
    p50, p99 = (float(x) for x in np.percentile(took, [50, 99]) * 1000)
    return dict(
        documents=len(index),
        requests=len(took),
        clients=CLIENTS,
        hostile=sum(statuses.values()),
        by_status=dict(sorted(statuses.items())),
        silent=silent,
        cut_off=cut_off["clients"],
        seconds=seconds,
        p50_ms=p50,
        p99_ms=p99,
        memory_bytes=before,
        grown_bytes=max(peak) - before,
    )


def measure_stop(folder: pathlib.Path, queries: list[str]) -> dict:
    """-> what became of the requests to a server that got SIGTERM under load.

    answered, after_signal: requests that were answered, and how many of them after the signal;
    refused: clients that could not connect any more, as they should not; lost: requests that were
    sent and not answered; status: of the process; seconds: from the signal to its end.
    """
    index, outcomes, lock = load_index(folder), Counter(), threading.Lock()
    server = Server(folder, folder.with_suffix(".log"))
    ask, signalled = Asker(index, queries, server.url), threading.Event()

    def ask_until_refused(first: int) -> None:
        number, outcome = first, "answered"
        while outcome == "answered":
            try:
                ask(number)
            except urllib3.exceptions.NewConnectionError:
                outcome = "refused"
            except (urllib3.exceptions.HTTPError, ValueError) as error:
                outcome = "lost"
                print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
            with lock:
                outcomes[outcome] += 1
                outcomes["after_signal"] += outcome == "answered" and signalled.is_set()
            number += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask_until_refused, n) for n in range(CLIENTS)]
        time.sleep(STOP_AFTER_S)
        signalled.set()
        start = time.perf_counter()
        status = server.stop()
        seconds = time.perf_counter() - start
        for client in clients:
            client.result()
    names = ("answered", "after_signal", "refused", "lost")
    return {name: outcomes[name] for name in names} | dict(status=status, seconds=seconds)


@contextlib.contextmanager
def _in_background(works: list[Callable[[threading.Event], None]]) -> Iterator[None]:
    """Runs each work(stop) in a thread until the context ends."""
    stop = threading.Event()
    threads = [threading.Thread(target=work, args=(stop,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _watch(read: Callable[[], int], stop: threading.Event, values: list[int]) -> None:
    values.append(read())
    while not stop.wait(0.05):
        values.append(read())


def attack(url: str, stop: threading.Event, statuses: Counter, number: int) -> None:
    """Sends hostile bodies one after another and counts the answers by status.

    Every eighth body is begun and never finished.
    """
    unfinished = b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
    http, turn = urllib3.PoolManager(retries=False), number
    while not stop.is_set():
        turn += 1
        try:
            if turn % 8 == 0:
                with socket.create_connection(_split(url), 10) as left:
                    left.sendall(unfinished)
                status = "left"
            else:
                body = HOSTILE[turn % len(HOSTILE)]
                answer = http.request("POST", f"{url}/retrieve", body=body, timeout=60)
                status = str(answer.status)
        except (urllib3.exceptions.HTTPError, OSError):
            status = "closed"  # the server hangs up on a body that is too long
        statuses[status] += 1
        stop.wait(0.02)


def do_not_read(
    url: str, stop: threading.Event, queries: list[str], clients: int, cut_off: Counter
) -> None:
    """Has so many clients ask for the longest answer and not read it.

    Whoever is cut off is counted in cut_off["clients"] and asks again.
    """
    many = (queries * 512)[:512]
    body = json.dumps({"queries": many, "topk": 100, "return_scores": True}).encode()
    head = f"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    poll, connections = select.poll(), {}

    def connect() -> None:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        client.connect(_split(url))
        client.sendall(head + body)
        connections[client.fileno()] = client
        poll.register(client, select.POLLRDHUP)  # hears when the other side has hung up

    try:
        for _ in range(clients):
            connect()
        while not stop.is_set():
            for number, _ in poll.poll(100):
                poll.unregister(number)
                connections.pop(number).close()
                cut_off["clients"] += 1
                connect()
    finally:
        for client in connections.values():
            client.close()


def _split(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def render(load: dict, stop: dict) -> list[str]:
    """The figures as lines of Markdown tables."""
    mib = lambda size: f"{size / 2**20:.0f}"
    signalled = signal.Signals.SIGTERM.name
    return [
        "| server over | requests | clients | lost or wrong | hostile bodies meanwhile "
        "| clients that do not read (cut off) | seconds | p50, ms | p99, ms "
        "| memory before, MiB | grown by at most, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| {load['documents']:,} | {load['requests']:,} | {load['clients']} | 0 "
        f"| {load['hostile']:,} ({load['by_status']}) | {load['silent']} ({load['cut_off']}) "
        f"| {load['seconds']:.0f} | {load['p50_ms']:.0f} | {load['p99_ms']:.0f} "
        f"| {mib(load['memory_bytes'])} | {mib(load['grown_bytes'])} |",
        "",
        f"| {signalled} under load: answered | of these after it | not connected any more | lost "
        "| seconds to the end | exit status |",
        "|---|---|---|---|---|---|",
        f"| {stop['answered']:,} | {stop['after_signal']} | {stop['refused']} | {stop['lost']} "
        f"| {stop['seconds']:.1f} | {stop['status']} |",
    ]
