"""Memory that a run holds for its corpus, mapped files apart: at its first start and at later ones.

For each size of --passages a corpus is made up as for `retrieval`, with questions about its first
passages. Three processes follow one another: the first stores the data set, the second makes what a
run makes of it once (index, token ids, counted words), the third finds all that, searches for every
question and scores the results. --config names tokenizer, search and rewards.
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
    """-> sizes: passages and, by stage, the most MiB held beyond what the process began with.

    Of a later start that is the largest of `repeats`. Also slopes: by stage, bytes a passage
    between the smallest and the largest size, if there are two. Corpora and what is made of them
    stay in `folder`.

    Raises ValueError without a config, FileExistsError if `folder` has the files of an earlier run.
    """
    if config is None:
        raise ValueError(
            "--config is needed, such as configs/atlas_quickstart.py: its tokenizer, search and "
            "rewards are used"
        )
    sizes = []
    for count in sorted(passages):
        corpus, made = folder / f"corpus-{count}-{seed}.jsonl", folder / f"memory-{count}-{seed}"
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
        size = {"passages": count}
        for stage in STAGES:
            times = repeats if stage == STAGES[-1] else 1
            size[stage] = max(_hold_alone(config, stage) for _ in range(times)) / MIB
        sizes.append(size)
    first, last, slopes = sizes[0], sizes[-1], {}
    if apart := last["passages"] - first["passages"]:
        slopes = {stage: (last[stage] - first[stage]) * MIB / apart for stage in STAGES}
    return {
        "sizes": sizes,
        "slopes": slopes,
        "questions": QUESTIONS,
        "repeats": repeats,
        "seed": seed,
    }


def write_questions(corpus: pathlib.Path, file: pathlib.Path) -> None:
    """Rows in StepSearch's form, each with two sub-questions about passages of the corpus."""
    with open(corpus, encoding="utf-8") as lines:
        passages = [json.loads(line) for line in itertools.islice(lines, 2 * QUESTIONS)]
    query = lambda passage: passage["title"] + " " + passage["text"][:40]
    document = lambda passage: {"title": passage["title"], "paragraph_text": passage["text"]}
    rows = [
        {
            "question": f"{one['title']}, {two['title']}?",
            "final_answer": two["title"],
            "answer_aliases": [],
            "sub_searchs": [[query(one)], [query(two)]],
            "sub_support_docs": [document(one), document(two)],
        }
        for one, two in zip(passages[::2], passages[1::2])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _hold_alone(config: ml_collections.ConfigDict, stage: str) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(hold, config.to_dict(), stage).result()


def hold(settings: dict, stage: str) -> int:
    """Does the work of one stage -> bytes by which memory rose (`HostMemory`)."""
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
    """Rewards of one episode for each question.

    It searches for the first accepted query of each sub-question, and answers with the question.
    """
    episodes = []
    for question in system.splits["train"].questions:
        queries = [sub.queries[0] for sub in question.sub_questions]
        turns = []
        for query, found in zip(queries, system.search_documents(queries), strict=True):
            ids = tuple(int(i) for i in found if i >= 0)
            text = f"<search>{query}</search>"
            turns.append(Turn(TurnStatus.SEARCH, text, query, None, ids))
        answer = question.question
        turns.append(Turn(TurnStatus.ANSWER, f"<answer>{answer}</answer>", None, answer))
        episodes.append(Episode(question, "", tuple(turns), finished=True, truncated=False))
    return system.score(episodes)


def render(figures: dict) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"| passages | {' | '.join(f'{stage}, MiB' for stage in STAGES)} |",
        "|---|" + "---|" * len(STAGES),
    ]
    rows = {f"{size['passages']:,}": size for size in figures["sizes"]}
    if figures["slopes"]:
        rows["bytes a passage"] = figures["slopes"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[stage]:.0f}' for stage in STAGES)} |")
    return "\n".join(lines)
