"""Indexes of corpora of any size: bm25s' own files to the byte however the corpus is cut,
restartable after a kill, in bounded memory, searched by bm25s."""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import running
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsearch_jax.prepare import __main__ as prepare
from stepsearch_jax.prepare.index import index_files
from stepsearch_jax.records import Document
from stepsearch_jax.search import cache, postings
from stepsearch_jax.search.bm25 import build_index, load_index
from stepsearch_jax.search.cache import hash_documents
from stepsearch_jax.words import RECIPE, split_words

K1, B = 0.9, 0.4
BM25S_FILES = (
    "data.csc.index.npy",
    "indices.csc.index.npy",
    "indptr.csc.index.npy",
    "vocab.index.json",
    "params.index.json",
)


@pytest.fixture
def small_pieces(monkeypatch):
    """Shards and merged ranges of a few words, so that a tiny corpus has many of both."""
    monkeypatch.setattr(postings, "SHARD_WORDS", 40)
    monkeypatch.setattr(postings, "MERGE_POSTINGS", 25)


def draw_documents(count: int, seed: int, vocabulary: int = 60) -> list[Document]:
    """Documents of 0 to 20 words, common ones and rare ones; many are equal, so that scores tie."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, vocabulary + 1)
    draw = lambda: rng.choice(vocabulary, rng.choice([0, 1, 2, 20]), p=share / share.sum())
    return [Document(i, f"title {i % 7}", " ".join(f"w{w}é" for w in draw())) for i in range(count)]


def write_corpus(path, documents):
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        for document in documents:
            name, title, text = f"x{document.id}", document.title, document.text or "?"
            file.write(json.dumps({"id": name, "title": title, "text": text}) + "\n\n")
    return path


def build_with_bm25s(documents, folder):
    """The oracle: the library's own index, made in memory."""
    import bm25s

    vocabulary: dict[str, int] = {}
    texts = [split_words(f"{document.title}\n{document.text}") for document in documents]
    rows = [[vocabulary.setdefault(word, len(vocabulary)) for word in words] for words in texts]
    scorer = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy", csc_backend="numpy")
    scorer.index((rows, vocabulary), create_empty_token=False, show_progress=False)
    scorer.save(folder, show_progress=False)
    return scorer


def check_equal(folder, documents, oracle):
    build_with_bm25s(documents, oracle)
    for name in BM25S_FILES:
        assert (folder / name).read_bytes() == (oracle / name).read_bytes(), name


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32), count=st.integers(1, 150), vocabulary=st.sampled_from([3, 60, 400])
)
def test_equal_to_bm25s_to_the_byte(tmp_path_factory, seed, count, vocabulary):
    folder, documents = tmp_path_factory.mktemp("index"), draw_documents(count, seed, vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postings, "SHARD_WORDS", 1 + seed % 97)
        patch.setattr(postings, "MERGE_POSTINGS", 1 + seed % 53)
        build_index(documents, folder / "index", K1, B)
    check_equal(folder / "index", documents, folder / "oracle")


def test_ties_equal_bm25s_in_memory(tmp_path, small_pieces):
    """All scores by the library, sorted in a plain way: best first, then by id."""
    documents = draw_documents(300, 5, 12)
    index = build_index(documents, tmp_path / "index", K1, B)
    scorer = build_with_bm25s(documents, tmp_path / "oracle")
    queries, tied = ["w0é w3é", "w1é", "title w5é w5é", "7 w2é"], 0
    ids, scores = index.search(queries, 20)
    for row, query in enumerate(queries):
        of_all = scorer.get_scores(split_words(query))
        expected = sorted(np.flatnonzero(of_all > 0).tolist(), key=lambda i: (-of_all[i], i))[:20]
        assert ids[row][ids[row] >= 0].tolist() == expected
        np.testing.assert_array_equal(scores[row][: len(expected)], of_all[expected])
        tied += len(expected) - len(set(of_all[expected].tolist()))
    assert tied > 20


def test_files_and_memory_give_the_same_index(tmp_path, small_pieces):
    drawn = [Document(d.id, d.title, d.text or "?") for d in draw_documents(120, 0)]
    paths = [
        write_corpus(tmp_path / "a.jsonl", drawn[:70]),
        write_corpus(tmp_path / "b.jsonl.gz", drawn[70:]),
    ]
    index = index_files(paths, tmp_path / "index", K1, B)
    first = {(d.title, d.text) for d in drawn[:70]}  # is not taken again from the second file
    kept = drawn[:70] + [d for d in drawn[70:] if (d.title, d.text) not in first]
    documents = [Document(i, d.title, d.text) for i, d in enumerate(kept)]
    assert 70 < len(documents) < 120
    check_equal(tmp_path / "index", documents, tmp_path / "oracle")
    manifest = {
        "corpus": hash_documents(documents),
        "documents": len(documents),
        "retriever": "bm25-lucene",
        "k": 3,
        "settings": {"k1": K1, "b": B, "words": RECIPE},
    }
    assert index.describe(3) == manifest
    assert build_index(documents, tmp_path / "other", K1, B).describe(3) == manifest
    assert [index.documents[i] for i in range(len(index.documents))] == documents
    for bad in (-1, len(documents)):
        with pytest.raises(IndexError, match=f"document {bad} of {len(documents)}"):
            index.documents[bad]


class Killed(BaseException):
    """What a kill is to the code that runs."""


@pytest.mark.parametrize("after", [0, 1, 37, 119])
def test_an_interrupted_build_goes_on(tmp_path, small_pieces, monkeypatch, after):
    """Complete shards are not split into words again, and the files are those of an uninterrupted
    build."""
    documents = [Document(d.id, d.title, d.text or "?") for d in draw_documents(120, 1)]
    real, split = postings.split_words, []
    path = write_corpus(tmp_path / "c.jsonl", documents)

    def split_some(text):
        split.append(text)
        if len(split) > limit:
            raise Killed
        return real(text)

    monkeypatch.setattr(postings, "split_words", split_some)
    limit = after
    with pytest.raises(Killed):
        index_files([path], tmp_path / "index", K1, B)
    assert not (tmp_path / "index").exists()
    limit = 10_000
    index = index_files([path], tmp_path / "index", K1, B)
    assert len(split) - (after + 1) < 120 - after + 40
    check_equal(tmp_path / "index", documents, tmp_path / "oracle")
    assert [index.documents[i] for i in range(120)] == documents and index.describe(1)[
        "corpus"
    ] == hash_documents(documents)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.jsonl", "index", "oracle"]


BUILD = """
import sys, time
from stepsearch_jax.prepare import index
from stepsearch_jax.search import postings
postings.SHARD_WORDS = postings.MERGE_POSTINGS = 2000
if sys.argv.pop(1) == "slow":
    write = postings._write_shard
    postings._write_shard = lambda *arguments: (time.sleep(0.2), write(*arguments))
index.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    """SIGKILL, twice, in the middle of the shards; then the same command to its end."""
    documents = [Document(d.id, d.title, d.text or "?") for d in draw_documents(2000, 2, 3000)]
    corpus = write_corpus(tmp_path / "c.jsonl", documents)
    arguments = ["--corpus", corpus, "--out", tmp_path / "index"]
    environment = os.environ | {"PYTHONPATH": str(running.REPO)}
    begun = tmp_path / "index.unfinished" / "begun"
    for shards in (2, 5):
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD, "slow", *arguments],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not (begun / f"{shards}.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "index").exists()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "fast", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "| documents | 2000 |" in done.stdout, done.stderr[-2000:]
    check_equal(tmp_path / "index", documents, tmp_path / "oracle")


KILLED_AT_LAST = """
import os, signal, sys
from stepsearch_jax.prepare import index
from stepsearch_jax.search import postings, cache
postings.SHARD_WORDS, postings.MERGE_POSTINGS = 40, 25
cache.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
index.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "how,links",
    [
        (signal.SIGKILL, True),
        (KeyboardInterrupt(), True),
        (OSError(28, "No space left on device"), True),
        (KeyboardInterrupt(), False),
    ],
    ids=["kill", "ctrl-c", "full disk", "copied"],
)
def test_an_end_at_the_last_step_loses_nothing(tmp_path, small_pieces, monkeypatch, how, links):
    """All is there but the manifest, after which the folder gets its name; then the same again, to
    its end."""
    documents = [Document(d.id, d.title, d.text or "?") for d in draw_documents(120, 1)]
    path = write_corpus(tmp_path / "c.jsonl", documents)

    def refuse(*_):
        raise how

    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", link)
    if how == signal.SIGKILL:
        flags = ["--corpus", path, "--out", tmp_path / "index"]
        done = subprocess.run(
            [sys.executable, "-c", KILLED_AT_LAST, *flags],
            env=os.environ | {"PYTHONPATH": str(running.REPO)},
            stderr=subprocess.DEVNULL,
            timeout=120,
        )
        assert done.returncode == -how
    else:
        with monkeypatch.context() as patch, pytest.raises(type(how)):
            # That of the whole index: other modules write what stands in begun/.
            patch.setattr(cache, "write_manifest", refuse)
            index_files([path], tmp_path / "index", K1, B)
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(postings, "split_words", refuse)  # nothing of the first pass is done again
    index = index_files([path], tmp_path / "index", K1, B)
    assert [index.documents[i] for i in range(120)] == documents and index.describe(1)[
        "corpus"
    ] == hash_documents(documents)
    check_equal(tmp_path / "index", documents, tmp_path / "oracle")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.jsonl", "index", "oracle"]


def test_shards_without_their_documents_are_made_again(tmp_path, small_pieces, monkeypatch):
    from stepsearch_jax.search import bm25

    documents = [Document(d.id, d.title, d.text or "?") for d in draw_documents(120, 1)]
    path = write_corpus(tmp_path / "c.jsonl", documents)
    with monkeypatch.context() as patch:
        patch.setattr(bm25, "merge_shards", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            index_files([path], tmp_path / "index", K1, B)
    os.truncate(tmp_path / "index.unfinished/begun/corpus.jsonl", 1000)
    index = index_files([path], tmp_path / "index", K1, B)
    assert [index.documents[i] for i in range(120)] == documents


def test_a_build_interrupted_while_merging_splits_nothing_again(
    tmp_path, small_pieces, monkeypatch
):
    from stepsearch_jax.search import bm25

    path = write_corpus(tmp_path / "c.jsonl", draw_documents(120, 1))

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(bm25, "merge_shards", die)
        with pytest.raises(Killed):
            index_files([path], tmp_path / "index", K1, B)
    monkeypatch.setattr(postings, "split_words", die)
    assert len(index_files([path], tmp_path / "index", K1, B)) == 120


def test_other_files_or_settings_start_over(tmp_path, small_pieces, monkeypatch):
    from stepsearch_jax.search import bm25

    documents = draw_documents(120, 1)
    path = write_corpus(tmp_path / "c.jsonl", documents)
    with monkeypatch.context() as patch:
        patch.setattr(bm25, "merge_shards", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            index_files([path], tmp_path / "index", K1, B)
    write_corpus(path, documents[1:])
    assert len(index_files([path], tmp_path / "index", K1, B)) == 119
    assert index_files([path], tmp_path / "index", K1, 1.0).describe(1)["settings"] == {
        "k1": K1,
        "b": 1.0,
        "words": RECIPE,
    }
    assert load_index(tmp_path / "index").describe(1)["settings"]["b"] == 1.0


@pytest.mark.parametrize(
    "flags,content,message",
    [
        ([], '{"title": "a", "text": "b"}\n{"title": ', r"c\.jsonl, line 2: not JSON"),
        ([], '\n\n{"title": 3, "text": "b"}\n', r"c\.jsonl, line 3: .*'title'"),
        ([], "", r"c\.jsonl.* empty"),
        ([], '{"title": "?", "text": "!"}\n', "no document of the corpus holds a word"),
        (["--b=2"], "{}", "its b is 2.*--b"),
        (["--corpus=none"], "{}", "none is not there"),
        (["--corpus=configs"], "{}", "configs is a folder"),
        *(([f"--k1={k1}"], "{}", f"k1 is {k1}.*--k1") for k1 in ("nan", "inf", "-1")),
        (["--json=nowhere/x.json"], "{}", "--json=nowhere/x.json"),
        (["--out=."], "{}", "holds no index"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(tmp_path, flags, content, message):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=message):
        prepare.main(
            ["index", f"--corpus={tmp_path / 'c.jsonl'}", f"--out={tmp_path / 'index'}", *flags]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_other_folders_are_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").write_text("dear")
    with pytest.raises(ValueError, match="mine is there and holds no index"):
        index_files(
            [write_corpus(tmp_path / "c.jsonl", draw_documents(3, 0))], tmp_path / "mine", K1, B
        )
    assert (tmp_path / "mine/letter").read_text() == "dear"


def test_the_folder_that_one_stands_in_becomes_the_index(tmp_path, monkeypatch):
    path = write_corpus(tmp_path / "c.jsonl", draw_documents(9, 1))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert len(index_files([path], pathlib.Path("."), K1, B)) == 9
    assert sorted(name.name for name in tmp_path.iterdir()) == ["c.jsonl", "here"]
    assert len(load_index(tmp_path / "here")) == 9


@pytest.mark.parametrize("name", [*BM25S_FILES, "corpus.jsonl", "corpus.offsets.npy"])
@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[: len(raw) // 2], lambda raw: b"", None],
    ids=["half", "empty", "gone"],
)
def test_a_damaged_index_is_named_with_what_to_do(tmp_path, name, damage):
    index_files(
        [write_corpus(tmp_path / "c.jsonl", draw_documents(50, 1))], tmp_path / "index", K1, B
    )
    file = tmp_path / "index" / name
    raw = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(raw))
    message = r"/index (is damaged \(.*\): remove|.*prepare index)"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_index(tmp_path / "index")


def test_odd_characters(tmp_path):
    """JSON may hold line separators and surrogate pairs. Search-R1's corpus has contents only."""
    rows = [
        {"id": "0", "contents": '"Po"\nThe Po is \U0001f30a a river.'},
        {"title": "Rome", "text": "a\u2028city"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = index_files([tmp_path / "c.jsonl"], tmp_path / "index", K1, B)
    assert [index.documents[i] for i in range(2)] == [
        Document(0, "Po", "The Po is \U0001f30a a river."),
        Document(1, "Rome", "a\u2028city"),
    ]
    assert index.search(["rome river"], 3)[0].tolist() in ([[1, 0, -1]], [[0, 1, -1]])


def test_searches_from_many_threads_do_not_disturb_each_other(tmp_path):
    documents, queries = draw_documents(2000, 3, 300), [f"w{i}é w{7 * i % 50}é" for i in range(64)]
    index = build_index(documents, tmp_path / "index", K1, B)
    alone = [index.search([query], 5)[0][0].tolist() for query in queries]
    with ThreadPoolExecutor(8) as pool:
        for ids in pool.map(lambda _: index.search(queries, 5)[0].tolist(), range(20)):
            assert ids == alone


MEASURE = """
import sys
from stepsearch_jax.prepare import __main__ as prepare
from stepsearch_jax.search import postings
postings.SHARD_WORDS = postings.MERGE_POSTINGS = 1 << 18
prepare.main(["index", "--corpus", sys.argv[1], "--out", sys.argv[2], "--json", sys.argv[3]])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Ten times the documents, less than 40 MB more (mapped files and offsets); held at once, their
    words alone would be 150 MB more."""
    peaks = []
    for count in (5_000, 50_000):
        rng = np.random.default_rng(0)
        with open(tmp_path / "c.jsonl", "w") as file:
            for words in rng.zipf(1.3, (count, 100)):
                text = " ".join(f"w{w}" for w in np.minimum(words, 30_000))
                file.write(json.dumps({"title": "t", "text": text}) + "\n")
        paths = [tmp_path / name for name in ("c.jsonl", f"index-{count}", "out.json")]
        subprocess.run(
            [sys.executable, "-c", MEASURE, *paths],
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(running.REPO), "MALLOC_ARENA_MAX": "1"},
        )
        peaks.append(json.loads((tmp_path / "out.json").read_text())["peak_bytes"] / 2**20)
    assert peaks[1] - peaks[0] < 40, peaks


@pytest.mark.parametrize("manifest", ['{"name": "mine"}', "[1]", '{"kind": "bm25-lucene"}'])
def test_a_folder_with_a_manifest_of_its_own_is_left_alone(tmp_path, manifest):
    mine, corpus = tmp_path / "mine", write_corpus(tmp_path / "c.jsonl", draw_documents(9, 1))
    mine.mkdir()
    (mine / "manifest.json").write_text(manifest)
    (mine / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine is there and holds no index"):
        index_files([corpus], mine, K1, B)
    with pytest.raises(FileNotFoundError, match="holds no search index"):
        load_index(mine)
    assert (mine / "precious.txt").read_text() == "mine"
