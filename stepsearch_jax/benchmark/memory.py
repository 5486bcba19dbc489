"""What a process of a run holds of its corpus in memory, mapped files apart: while data set and index are made, and when it finds them made.

For each size of --passages a corpus is made up as for `retrieval`, with questions about its first passages. Three processes follow one another: one stores the
data set, one makes what a run makes of it once (index, token ids, counted words), one finds all that, searches for every question and scores what came back.
--config names tokenizer, search and rewards.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pathlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import ml_collections

from stepsearch_jax.benchmark.importing import MIB, HostMemory
from stepsearch_jax.benchmark.retrieval import write_corpus
from stepsearch_jax.data.loading import load_source
from stepsearch_jax.records import Episode, Turn, TurnStatus
from stepsearch_jax.rewards.scoring import StepScores
from stepsearch_jax.run.system import System, build_system

QUESTIONS = 64
STAGES = ("data set", "first start", "later start")  # one process each


def measure(
    *,
    repeats: int,
    seed: int,
    passages: Sequence[int],
    folder: pathlib.Path,
    config: ml_collections.ConfigDict | None,
) -> dict:
    """-> sizes: passages and, by stage, the most MiB held beyond what the process began with (of a later start the largest of `repeats`); and slopes: by stage,
    bytes a passage between the smallest and the largest size, where there are two. Corpora and what is made of them stay in `folder`.

    Raises ValueError without a config, FileExistsError where `folder` holds what an earlier run made.
    """
    if config is None:
        raise ValueError(
            "--config is needed, such as configs/atlas_quickstart.py: its tokenizer, search and rewards are used"
        )
    sizes = []
    for count in sorted(passages):
        corpus, made = folder / f"corpus-{count}-{seed}.jsonl", folder / f"holding-{count}-{seed}"
        made.mkdir(parents=True)
        if not corpus.exists():
            write_corpus(corpus, count, seed)
        write_questions(corpus, made / "train.jsonl")
        config.data.update(
            kind="stepsearch",
            path=str(made),
            corpus=str(corpus),
            cache_dir=str(made / "cache"),
            train_split="train",
            train_questions=0,
        )
        risen = {
            stage: max(
                _hold_alone(config, stage) for _ in range(repeats if stage == STAGES[-1] else 1)
            )
            for stage in STAGES
        }
        sizes.append({"passages": count, **{stage: value / MIB for stage, value in risen.items()}})
    first, last = sizes[0], sizes[-1]
    apart = last["passages"] - first["passages"]
    return {
        "sizes": sizes,
        "slopes": {stage: (last[stage] - first[stage]) * MIB / apart for stage in STAGES}
        if apart
        else {},
        "questions": QUESTIONS,
        "repeats": repeats,
        "seed": seed,
    }


def write_questions(corpus: pathlib.Path, file: pathlib.Path) -> None:
    """Rows in StepSearch's form, each with two sub-questions about passages of the corpus."""
    with open(corpus) as lines:
        passages = [json.loads(line) for line in itertools.islice(lines, 2 * QUESTIONS)]
    rows = [
        {
            "question": f"{one['title']}, {two['title']}?",
            "final_answer": two["title"],
            "answer_aliases": [],
            "sub_searchs": [
                [passage["title"] + " " + passage["text"][:40]] for passage in (one, two)
            ],
            "sub_support_docs": [
                {"title": passage["title"], "paragraph_text": passage["text"]}
                for passage in (one, two)
            ],
        }
        for one, two in zip(passages[::2], passages[1::2])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _hold_alone(config: ml_collections.ConfigDict, stage: str) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(hold, config.to_dict(), stage).result()


def hold(settings: dict, stage: str) -> int:
    """Does the work of one stage -> bytes, as `HostMemory` tells them."""
    config = ml_collections.ConfigDict(settings)
    with HostMemory() as memory:
        if stage == "data set":
            load_source(config.data, config.search.bm25_k1, config.search.bm25_b)
        else:
            system = build_system(config, ["train"])
            if stage == "later start":
                score_all(system)
    return memory.risen


def score_all(system: System) -> StepScores:
    """Rewards of an episode of every question, in which each accepted query is searched for and the question itself is the answer."""
    episodes = []
    for question in system.splits["train"].questions:
        queries = [sub.queries[0] for sub in question.sub_questions]
        turns = [
            Turn(
                TurnStatus.SEARCH,
                f"<search>{query}</search>",
                query,
                None,
                tuple(int(i) for i in found if i >= 0),
            )
            for query, found in zip(queries, system.search_documents(queries), strict=True)
        ]
        turns.append(
            Turn(
                TurnStatus.ANSWER, f"<answer>{question.question}</answer>", None, question.question
            )
        )
        episodes.append(Episode(question, "", tuple(turns), finished=True, truncated=False))
    return system.score(episodes)


def render(figures: dict) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"| passages | {' | '.join(f'{stage}, MiB' for stage in STAGES)} |",
        "|---|" + "---|" * len(STAGES),
    ]
    rows = {f"{size['passages']:,}": size for size in figures["sizes"]} | (
        {"bytes a passage": figures["slopes"]} if figures["slopes"] else {}
    )
    lines += [
        f"| {name} | {' | '.join(f'{row[stage]:.0f}' for stage in STAGES)} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)
