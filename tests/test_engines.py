"""Engines that vote on search keys: a search server beside BM25, one that dies, and an encoder."""

import contextlib
import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import running
import test_dense
import urllib3
from test_datasets import read_records, write_rows
from test_keys import command, musique_row

from stepsearch_jax.data.loading import OFFICIAL
from stepsearch_jax.dense.index import load_text_encoder
from stepsearch_jax.prepare import __main__ as prepare
from stepsearch_jax.prepare import engines
from stepsearch_jax.prepare.index import index_files
from stepsearch_jax.prepare.rules import write_queries
from stepsearch_jax.prepare.store import Store

PLACES = [
    f"{first} {second}"
    for first in ("North", "South", "Old")
    for second in ("Arton", "Belville", "Corburg", "Dunmouth")
]
ONE, OTHER = "bm25:0.9:0.4", "bm25:3.0:1.0"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """Places with shared words, in passages of different lengths: the engines disagree."""
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    (tmp_path / "data").mkdir()
    rows = [musique_row(place, number) for number, place in enumerate(PLACES)]
    for number, row in enumerate(rows):
        passages = row["paragraphs"]
        first = f" North and South, the country of old: {PLACES[number - 1]}."
        second = f" A country and its leader. {PLACES[number - 5]}, {PLACES[number - 2]}."
        passages[0]["paragraph_text"] += first * (number % 4)
        passages[1]["paragraph_text"] += second * (number % 3)
    write_rows(tmp_path / "data/train.jsonl", rows)
    return tmp_path


def make_keys(folder: pathlib.Path, out: str, *more: str) -> tuple[str, dict]:
    """-> rows, figures of the only split."""
    prepare.main(command(folder, f"--out={folder / out}", "--config.search.k=1", *more))
    report = json.loads((folder / out / "report.json").read_text())
    return (folder / out / "train.jsonl").read_text(), report["splits"]["train"]


@contextlib.contextmanager
def serving(index: pathlib.Path, port: int):
    """`serve` at a given port -> its process."""
    log = pathlib.Path(f"{index}.log")
    command = [sys.executable, "-m", "stepsearch_jax.serve", f"--index={index}", f"--port={port}"]
    with log.open("a") as file:
        server = subprocess.Popen(command, cwd=running.REPO, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                urllib3.request("GET", f"http://localhost:{port}/health", retries=False)
                break
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield server
    finally:
        server.kill()
        server.wait()


def count_searched(port: int) -> int:
    """Queries that the server has answered."""
    metrics = urllib3.request("GET", f"http://localhost:{port}/metrics").data.decode()
    lines = [line for line in metrics.splitlines() if line.startswith("stepsearch_queries_total")]
    return round(float(lines[0].split()[-1]))


@pytest.mark.slow
def test_a_server_votes_as_its_index_does_and_may_die(folder, monkeypatch):
    rows, figures = make_keys(folder, "local", "--engines", ONE, OTHER)
    of_engines = figures["all"]["engines"]
    assert of_engines[ONE]["found"] != of_engines[OTHER]["found"]
    assert (folder / "local/corpus.jsonl").exists()
    assert 0 < figures["all"]["kept_fraction"] < 1
    index_files([folder / "local/corpus.jsonl"], folder / "index", 3.0, 1.0)
    port = running.free_port()
    remote = f"remote:http://localhost:{port}"
    both = ["--engines", ONE, remote]
    patient = [f"--config.search.{key}" for key in ("attempts=2", "backoff_s=0.01", "batch=5")]

    # The server votes as its index does.
    with serving(folder / "index", port):
        other_cache = f"--config.data.cache_dir={folder / 'other-cache'}"
        whole, of_remote = make_keys(folder, "whole", *both, *patient, other_cache)
        different = count_searched(port)
    assert whole == rows and json.loads(json.dumps(of_remote).replace(remote, OTHER)) == figures

    # It dies after 32 queries: they are kept, and the command ends with one line.
    write_rows(folder / "more.jsonl", [{"title": "More", "text": "Another passage."}])
    with serving(folder / "index", port) as server, monkeypatch.context() as patch:
        kept = []

        def put(store, texts):
            keep(store, texts)
            kept.extend(texts)
            # all by the remote engine: the first run kept what the other one found
            if len(kept) == 32:
                server.kill()
                server.wait()

        keep = Store.put
        patch.setattr(engines, "QUERIES_AT_ONCE", 16)
        patch.setattr(Store, "put", put)
        with pytest.raises(SystemExit, match=f"{remote} failed 2 times"):
            make_keys(folder, "cut", *both, *patient)
    assert len(kept) == 32 and not any((folder / "cut").iterdir())
    with pytest.raises(SystemExit, match=f"http://localhost:{port} does not answer"):
        make_keys(folder, "cut", *both, *patient)

    # The same command continues with what is kept; a server with another corpus is refused.
    with serving(folder / "index", port):
        make_keys(folder, "cut", *both, *patient)
        assert count_searched(port) == different - 32
        corpora = f"{folder / 'local/corpus.jsonl'},{folder / 'more.jsonl'}"
        with pytest.raises(SystemExit, match="holds the corpus"):
            make_keys(folder, "no", *both, f"--config.data.corpus={corpora}")
    for name in ("train.jsonl", "report.json"):
        assert (folder / "cut" / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.slow
def test_an_encoder_votes_as_its_vectors_say(folder):
    """The tiny encoder beside BM25, on sentences of words that it knows.

    Its votes are counted again with plain products of vectors.
    """
    rng, k = np.random.default_rng(3), 3
    words = ["rome", "paris", "france", "city", "river", "capital", "founded", "when", "near"]
    speak = lambda count: " ".join(rng.choice(words, count))
    rows = [musique_row(place, number) for number, place in enumerate(PLACES)]
    for row in rows:
        for passage, sub in zip(row["paragraphs"], row["question_decomposition"], strict=True):
            passage["title"], passage["paragraph_text"] = speak(2), speak(6)
            sub["question"] = f"{speak(2)} of {passage['title']}"
    write_rows(folder / "data/train.jsonl", rows)
    encoder = test_dense.FOLDER / "mean"
    settings = [
        f"--config.search.encoder={encoder}",
        "--config.search.embedding_dtype=float32",
        f"--config.search.k={k}",
    ]
    rows, figures = make_keys(folder, "keys", "--engines", ONE, "dense", *settings)

    documents, splits, *_ = read_records(OFFICIAL["musique"].FORMAT, folder / "data")
    embed = load_text_encoder(encoder, 1, jax.devices()[:1]).embed
    vectors = embed([f"{document.title}\n{document.text}" for document in documents])
    bm25 = index_files([folder / "keys/corpus.jsonl"], folder / "index", 0.9, 0.4)
    votes = {}
    for question in splits["train"]:
        for hop, sub in enumerate(question.sub_questions):
            for query in write_queries(sub.question, [question.sub_questions[0].answer][:hop], 5):
                scores = vectors @ embed([query])[0]
                order = np.argsort(-scores)
                margin = scores[order[k - 1]] - scores[order[k]]
                assert margin > 1e-5, "rounding must not decide which documents are nearest"
                votes[question.uid, hop, query] = (
                    sub.gold_ids[0] in bm25.search([query], k)[0][0],
                    sub.gold_ids[0] in order[:k],
                )
    for number, engine in enumerate((ONE, "dense")):
        expected = np.mean([both[number] for both in votes.values()])
        assert figures["all"]["engines"][engine]["found"] == expected
    kept = {
        (row["id"], hop, query)
        for row in map(json.loads, rows.splitlines())
        for hop, queries in enumerate(row["sub_searchs"])
        for query in queries
    }
    # one vote of two is enough
    assert kept == {place for place, both in votes.items() if any(both)}
    assert {(True, False), (False, True), (False, False)} <= set(votes.values())
