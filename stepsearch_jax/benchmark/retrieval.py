"""BM25 over made-up corpora of any size, and a search server under load and under attack.

For each size of --passages: passages of about 100 words with the frequencies of a language are
written to --folder, `prepare index` makes an index of them in a process of its own (time, peak
memory, size), and queries of 5 words are timed one by one and 64 at a time. Then `serve` holds the
index of the first size: 32 clients send requests of one query until --requests are answered, while
others send bodies that are malformed, too large, or never end, and 64 clients do not read their
answers. A second server gets SIGTERM in the middle of requests. Every answer is compared with the
index's own; the run ends with an error if one is wrong.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from stepsearch_jax.benchmark import serving
from stepsearch_jax.benchmark.reward import Texts
from stepsearch_jax.benchmark.serving import K
from stepsearch_jax.search.bm25 import load_index

QUERY_WORDS = 5


def measure(
    *, repeats: int, seed: int, passages: Sequence[int], requests: int, folder: pathlib.Path
) -> dict:
    """All figures; corpora and indexes stay in `folder`. The queries are timed `repeats` times."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"indexes": [measure_index(folder, count, seed, repeats) for count in passages]}
    if requests:
        index, queries = folder / f"index-{passages[0]}", draw_queries(64, seed + 1)
        figures["serve"] = serving.measure_load(index, queries, requests)
        figures["stop"] = serving.measure_stop(index, queries)
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
        lines += ["", *serving.render(figures["serve"], figures["stop"])]
    return "\n".join(lines)
