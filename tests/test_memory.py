"""What a process holds of its corpus: hardly anything that grows with it; and the benchmark that measures this on large ones."""

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

GROWTH = {
    "most": 350,
    "kept": 20,
}  # bytes a passage. Its text alone has about 600; buffers that small corpora do not fill count among the most


@pytest.fixture
def config(tmp_path):
    config = running.here(tiny_config.get_config(str(tmp_path / "cache")))
    config.prompt.max_prompt_tokens, config.rollout.context = 100, 256
    config.reward.redundancy_scope, config.reward.retrieved_answer_credit = "rendered", 0.1
    return config


def trace(work, *arguments):
    """-> what work(*arguments) returns, the most bytes that were held meanwhile, and those that still are, beyond those from before."""
    gc.collect()
    tracemalloc.start()
    try:
        result = work(*arguments)
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        return result, peak, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_memory_hardly_grows_with_the_corpus(config, tmp_path, monkeypatch):
    """From making the data set to scoring, by what Python and NumPy allocate: the most at each stage, and what a system keeps."""
    monkeypatch.setattr(memory, "QUESTIONS", 8)
    for module, name in (
        (postings, "SHARD_WORDS"),
        (postings, "MERGE_POSTINGS"),
        (tfidf, "_COUNTED_AT_ONCE"),
    ):
        monkeypatch.setattr(
            module, name, 1 << 14
        )  # what is worked on at a time is full with the smaller corpus already
    monkeypatch.setattr(corpus_tokens, "_CHUNK", 64)
    monkeypatch.setattr(reward, "VOCABULARY", 500)  # memory does grow with the different words
    held = {}
    for count in (
        200,
        201,
        1000,
    ):  # the first one's is also what libraries keep when they are first used
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
        for kind, less, more in zip(GROWTH, few, held[1000][stage], strict=True):
            assert more - less < GROWTH[kind] * (1000 - 201), (stage, kind, less, more)


def test_figures_of_the_benchmark(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory,
        "_hold_alone",
        lambda config, stage: memory.hold(json.loads(config.to_json()), stage),
    )
    monkeypatch.setattr(memory, "QUESTIONS", 4)
    figures = memory.measure(
        repeats=2, seed=0, passages=[90, 40], folder=tmp_path / "made", config=config
    )
    assert [size["passages"] for size in figures["sizes"]] == [40, 90] and set(
        figures["slopes"]
    ) == set(memory.STAGES)
    assert memory.render(figures).splitlines()[2].startswith(
        "| 40 | "
    ) and "| bytes a passage | " in memory.render(figures)
    with pytest.raises(FileExistsError):
        memory.measure(repeats=1, seed=0, passages=[40], folder=tmp_path / "made", config=config)
    with pytest.raises(ValueError, match="--config is needed"):
        memory.measure(repeats=1, seed=0, passages=[40], folder=tmp_path / "made", config=None)
