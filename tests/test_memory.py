"""A process holds hardly anything that grows with its corpus; the benchmark for large corpora."""

import gc
import json
import tracemalloc

import pytest
import running
import tiny_config

from stepsearch_jax.benchmark import memory, reward
from stepsearch_jax.benchmark.retrieval import write_corpus
from stepsearch_jax.data.loading import load_source
from stepsearch_jax.rewards import tfidf
from stepsearch_jax.run.system import build_system
from stepsearch_jax.search import corpus_tokens, postings

# Bytes a passage. Its text alone has about 600; "most" includes buffers that small corpora do not
# fill.
GROWTH = {"most": 350, "kept": 20}


@pytest.fixture
def config(tmp_path):
    config = running.here(tiny_config.get_config(str(tmp_path / "cache")))
    config.prompt.max_prompt_tokens, config.rollout.context = 100, 256
    config.reward.redundancy_scope, config.reward.retrieved_answer_credit = "rendered", 0.1
    return config


def trace(work, *arguments):
    """-> (result of work(*arguments), the most bytes held meanwhile, bytes still held).

    Both beyond those held before. Garbage is collected as often as in a user's process.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    gc.collect()
    tracemalloc.start()
    try:
        result = work(*arguments)
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        return result, peak, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.set_threshold(*thresholds)


@pytest.mark.slow
def test_memory_hardly_grows_with_the_corpus(config, tmp_path, monkeypatch):
    """From making the data set to scoring, by what Python and NumPy allocate: the most at each
    stage, and what a system keeps."""
    monkeypatch.setattr(memory, "QUESTIONS", 8)
    # Buffers that the smaller corpus fills already.
    monkeypatch.setattr(postings, "SHARD_WORDS", 1 << 14)
    monkeypatch.setattr(postings, "MERGE_POSTINGS", 1 << 14)
    monkeypatch.setattr(tfidf, "_COUNTED_AT_ONCE", 1 << 14)
    monkeypatch.setattr(corpus_tokens, "_CHUNK", 64)
    monkeypatch.setattr(reward, "VOCABULARY", 500)  # memory does grow with the different words
    held = {}
    # The first one's memory is also what libraries keep when they are first used. The large one is
    # measured twice, and the smaller figures count: what a thread of an earlier test allocates
    # meanwhile is counted as well.
    for count in (200, 201, 1000, 1001):
        folder, corpus = tmp_path / str(count), tmp_path / f"{count}.jsonl"
        folder.mkdir()
        write_corpus(corpus, count, seed=0)
        memory.write_questions(corpus, folder / "train.jsonl")
        config.data.update(kind="stepsearch", path=str(folder), corpus=str(corpus))
        _, *of_data = trace(load_source, config.data, config.search.bm25_k1, config.search.bm25_b)
        system, *of_first = trace(build_system, config, ["train"])
        assert len(system.source.documents) == count
        del system
        system, *of_later = trace(build_system, config, ["train"])
        scores, *of_scoring = trace(memory.score_all, system)
        assert scores.gain.sum(1).mean() > 0.5  # the queries find their passages mostly
        held[count] = dict(data=of_data, first=of_first, later=of_later, scoring=of_scoring)
    for stage, few in held[201].items():
        many = map(min, held[1000][stage], held[1001][stage])
        for kind, less, more in zip(GROWTH, few, many, strict=True):
            assert more - less < GROWTH[kind] * (1000 - 201), (stage, kind, less, more)


def test_figures_of_the_benchmark(config, tmp_path, monkeypatch):
    hold_here = lambda config, stage: memory.hold(json.loads(config.to_json()), stage)
    monkeypatch.setattr(memory, "_hold_alone", hold_here)
    monkeypatch.setattr(memory, "QUESTIONS", 4)
    folder = tmp_path / "made"
    figures = memory.measure(repeats=2, seed=0, passages=[90, 40], folder=folder, config=config)
    assert [size["passages"] for size in figures["sizes"]] == [40, 90]
    assert set(figures["slopes"]) == set(memory.STAGES)
    table = memory.render(figures)
    assert table.splitlines()[2].startswith("| 40 | ") and "| bytes a passage | " in table
    with pytest.raises(FileExistsError):
        memory.measure(repeats=1, seed=0, passages=[40], folder=folder, config=config)
    with pytest.raises(ValueError, match="--config"):
        memory.measure(repeats=1, seed=0, passages=[40], folder=folder, config=None)
