"""BM25 over made-up corpora of any size, and a search server under load and under attack.

For each size of --passages: passages of about 100 words with the frequencies of a language are
written to --folder, `prepare index` makes an index of them in a process of its own (time, peak
memory, size), and queries of 5 words are timed one by one and 64 at a time. Then `serve` holds the
index of the first size: 32 clients send requests of one query until --requests are answered, while
others send bodies that are malformed, too large, or never end. Every answer is compared with the
index's own; the run ends with an error if one is lost or wrong.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import urllib3
from tqdm import tqdm

from stepsearch_jax.benchmark.reward import Texts
from stepsearch_jax.search.bm25 import Bm25Index, load_index

K = 3
CLIENTS = 32
QUERY_WORDS = 5
SERVER_START_S = 300.0
HOSTILE = (  # bodies that the server must refuse
    b"",
    b"{",
    b"[" * 50_000,
    b"\xff\xfe\x00",
    b"[]",
    b'{"queries": "a"}',
    b'{"queries": [1]}',
    b'{"queries": []}',
    b'{"queries": ["a"], "topk": -1}',
    b'{"queries": ["a"], "topk": 1e9}',
    b'{"queries": ["a"], "topk": true}',
    json.dumps({"queries": ["a"] * 100_000}).encode(),
    json.dumps({"queries": ["a" * 900_000]}).encode(),
    b" " * (3 << 20),
    json.dumps({"queries": ["a"], "topk": 10**30}).encode(),
)


def measure(
    *, repeats: int, seed: int, passages: Sequence[int], requests: int, folder: pathlib.Path
) -> dict:
    """All figures; corpora and indexes stay in `folder`. The queries are timed `repeats` times."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"indexes": [measure_index(folder, count, seed, repeats) for count in passages]}
    if requests:
        figures["serve"] = measure_server(folder / f"index-{passages[0]}", seed, requests)
    return figures


def measure_index(folder: pathlib.Path, count: int, seed: int, repeats: int) -> dict:
    """Of one size: documents, minutes, peak_bytes, bytes, vocabulary, and queries per second.

    The last by batch, the best of `repeats`.
    """
    # Corpus and index, if they are not there.
    corpus, out = folder / f"corpus-{count}-{seed}.jsonl", folder / f"index-{count}"
    figures_file = folder / f"index-{count}.json"
    if not corpus.exists():
        write_corpus(corpus, count, seed)
    if not figures_file.exists():
        command = [
            sys.executable,
            "-m",
            "stepsearch_jax.prepare",
            "index",
            f"--corpus={corpus}",
            f"--out={out}",
            f"--json={figures_file}",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    # Queries; a first search does not count.
    built, index = json.loads(figures_file.read_text(encoding="utf-8")), load_index(out)
    queries = draw_queries(64, seed)
    index.search(queries, K)
    rates = {}
    for batch, asked in ((1, queries[:16]), (64, queries)):
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            for first in range(0, len(asked), batch):
                index.search(asked[first : first + batch], K)
            seconds.append(time.perf_counter() - start)
        rates[str(batch)] = len(asked) / min(seconds)
    names = ("documents", "vocabulary", "minutes", "peak_bytes", "bytes")
    return {name: built[name] for name in names} | {"queries_per_second": rates}


def write_corpus(path: pathlib.Path, count: int, seed: int) -> None:
    """JSON lines with `title` and `text`, 80 to 120 words each."""
    texts, rng = Texts(seed), np.random.default_rng(seed)
    temporary = path.with_suffix(".part")
    with open(temporary, "w", encoding="utf-8") as file:
        for _ in tqdm(range(count), desc="writing passages", unit=" passages"):
            row = {"title": texts.write(2), "text": texts.write(int(rng.integers(80, 121)))}
            file.write(json.dumps(row) + "\n")
    temporary.rename(path)


def draw_queries(count: int, seed: int) -> list[str]:
    """Queries in the words of the corpus, but not in the texts of its first passages."""
    texts = Texts(seed)
    for _ in range(1000):
        texts.write(QUERY_WORDS)
    return [texts.write(QUERY_WORDS) for _ in range(count)]


@contextlib.contextmanager
def run_server(index: pathlib.Path, log: pathlib.Path, *flags: str) -> Iterator[str]:
    """`serve` in a process of its own -> its address."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    with open(log, "w", encoding="utf-8") as log_file:
        command = [
            sys.executable,
            "-m",
            "stepsearch_jax.serve",
            f"--index={index}",
            f"--port={port}",
            *flags,
        ]
        server = subprocess.Popen(command, stdout=log_file, stderr=log_file)
    try:
        url, deadline = f"http://localhost:{port}", time.monotonic() + SERVER_START_S
        while True:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                urllib3.request("GET", f"{url}/health", retries=False)
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"the server did not start; {log} says why")
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


def measure_server(folder: pathlib.Path, seed: int, requests: int) -> dict:
    """-> figures of requests, and of hostile bodies that are sent meanwhile.

    requests, seconds, p50_ms, p99_ms: of the requests; hostile, by_status: numbers of the bodies.
    Raises ValueError for a wrong answer.
    """
    # What the server should answer.
    index = load_index(folder)
    queries = draw_queries(64, seed + 1)
    expected = [answer_of(index, query) for query in queries]
    stop, statuses = threading.Event(), {}
    with run_server(folder, folder.with_suffix(".log")) as url, ThreadPoolExecutor(CLIENTS) as pool:
        # Two threads send hostile bodies, CLIENTS threads send requests.
        http = urllib3.PoolManager(maxsize=CLIENTS, retries=False)
        attackers = [
            threading.Thread(target=attack, args=(url, stop, statuses, n), daemon=True)
            for n in range(2)
        ]
        for thread in attackers:
            thread.start()

        def ask(n: int) -> float:
            body = {"queries": [queries[n % 64]], "topk": K, "return_scores": True}
            start = time.perf_counter()
            answer = http.request("POST", f"{url}/retrieve", json=body, timeout=120)
            took = time.perf_counter() - start
            found = answer.status
            if found == 200:
                entries = answer.json()["result"][0]
                found = [(entry["document"]["id"], entry["score"]) for entry in entries]
            if found != expected[n % 64]:
                raise ValueError(f"request {n} was answered {found}; expected {expected[n % 64]}")
            return took

        start = time.perf_counter()
        answers = pool.map(ask, range(requests))
        took = list(tqdm(answers, total=requests, desc="asking the server", unit=" requests"))
        seconds = time.perf_counter() - start
        stop.set()
        for thread in attackers:
            thread.join()
    p50, p99 = (float(x) for x in np.percentile(took, [50, 99]) * 1000)
    return dict(
        documents=len(index),
        requests=len(took),
        clients=CLIENTS,
        hostile=sum(statuses.values()),
        by_status=dict(sorted(statuses.items())),
        seconds=seconds,
        p50_ms=p50,
        p99_ms=p99,
    )


def answer_of(index: Bm25Index, query: str) -> list[tuple[str, float]]:
    """What the server should answer."""
    ids, scores = index.search([query], K)
    pairs = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
    return [(str(i), score) for i, score in pairs if i >= 0]


def attack(url: str, stop: threading.Event, statuses: dict[str, int], number: int) -> None:
    """Sends hostile bodies one after another and counts the answers by status.

    Every eighth body is begun and never finished.
    """
    unfinished = b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
    host, port = url.removeprefix("http://").split(":")
    http, turn = urllib3.PoolManager(retries=False), number
    while not stop.is_set():
        turn += 1
        try:
            if turn % 8 == 0:
                with socket.create_connection((host, int(port)), 10) as left:
                    left.sendall(unfinished)
                status = "left"
            else:
                body = HOSTILE[turn % len(HOSTILE)]
                answer = http.request("POST", f"{url}/retrieve", body=body, timeout=60)
                status = str(answer.status)
        except (urllib3.exceptions.HTTPError, OSError):
            status = "closed"  # the server hangs up on a body that is too long
        statuses[status] = statuses.get(status, 0) + 1
        stop.wait(0.02)


def render(figures: dict) -> str:
    """The figures as Markdown tables."""
    lines = [
        "| passages | different words | minutes | peak memory, GiB | index and passages, GiB "
        "| queries/s, one by one | 64 at a time |",
        "|---|---|---|---|---|---|---|",
    ]
    gib = lambda size: f"{size / 2**30:.2f}"
    for index in figures["indexes"]:
        rates = index["queries_per_second"]
        lines.append(
            f"| {index['documents']:,} | {index['vocabulary']:,} | {index['minutes']:.1f} "
            f"| {gib(index['peak_bytes'])} | {gib(index['bytes'])} "
            f"| {rates['1']:.1f} | {rates['64']:.1f} |"
        )
    if "serve" in figures:
        serve = figures["serve"]
        lines += [
            "",
            "| server over | requests | clients | lost or wrong | hostile bodies meanwhile "
            "| seconds | p50, ms | p99, ms |",
            "|---|---|---|---|---|---|---|---|",
            f"| {serve['documents']:,} | {serve['requests']:,} | {serve['clients']} | 0 "
            f"| {serve['hostile']:,} ({serve['by_status']}) | {serve['seconds']:.0f} "
            f"| {serve['p50_ms']:.0f} | {serve['p99_ms']:.0f} |",
        ]
    return "\n".join(lines)
