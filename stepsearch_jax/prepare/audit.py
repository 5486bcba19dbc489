"""What a data set and its corpus allow, before any training: a missing gold document costs more than most algorithms gain.

    python -m stepsearch_jax.prepare audit --config=configs/X.py[:arg] [--corpus FILE …] [--k N …] [--json FILE] [--config.key=value …]

Three tables: the gold documents of each split, and how many of them the corpus lacks; the share of them that BM25 brings back when it is asked the gold
queries, which no policy that asks such queries can surpass; and what training and evaluation rows have in common. --corpus adds the passages of more files
to the data set's corpus; --json also writes every missing document and every shared text. No model is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import ml_collections
import numpy as np
from tqdm import tqdm

from stepsearch_jax import cli
from stepsearch_jax.data.loading import open_source
from stepsearch_jax.data.passages import Seen, locate_gold, read_corpus
from stepsearch_jax.data.rows import describe_files
from stepsearch_jax.prepare.options import run_command
from stepsearch_jax.records import Document, Question
from stepsearch_jax.rewards.text_metrics import normalize
from stepsearch_jax.search.bm25 import build_index, check_settings, stream_index
from stepsearch_jax.search.cache import locate_corpus, lock_cache

logger = logging.getLogger("stepsearch_jax")
Search = Callable[
    [Sequence[str], int], np.ndarray
]  # queries, k -> corpus ids [q, k], best first, -1 where there are no more
QUERY_SETS: dict[str, Callable[[Question], Iterable[str]]] = {
    "the question": lambda question: [question.question],
    "its sub-questions": lambda question: [sub.question for sub in question.sub_questions],
    "sub-questions and accepted queries": lambda question: [
        text for sub in question.sub_questions for text in (sub.question, *sub.queries)
    ],
}
_QUERIES_AT_ONCE = 64


def find_gold(questions: Sequence[Question]) -> dict:
    """How much of the gold the corpus holds.

    -> questions, and of these: with_gold (a gold document is known), complete (the corpus holds all of them); gold_documents and how many are missing; and
    lacking: title, text and questions (uids) of each of the latter.
    """
    lacking: dict[tuple[str, str], list[str]] = {}
    for question in questions:
        for passage in question.missing_gold:
            lacking.setdefault(passage, []).append(question.uid)
    with_gold = [question for question in questions if question.gold_ids or question.missing_gold]
    held = {i for question in questions for i in question.gold_ids}
    return dict(
        questions=len(questions),
        with_gold=len(with_gold),
        complete=sum(not question.missing_gold for question in with_gold),
        gold_documents=len(held) + len(lacking),
        missing=len(lacking),
        lacking=[
            dict(title=title, text=text, questions=uids) for (title, text), uids in lacking.items()
        ],
    )


def measure_recall(
    questions: Sequence[Question], search: Search, ks: Sequence[int]
) -> dict[str, dict[str, dict]]:
    """The best recall: which gold documents are among the first k for at least one of a question's gold queries. A missing one is never found.

    -> for each set of queries (QUERY_SETS; the last one only where a sub-question has queries besides itself) and k: `recall`, the mean over questions with
    gold documents of the share found; `complete`, the share of these questions with all of them found; `hop_recall`, the mean over sub-questions with
    gold documents of the share that their own queries find (not for the question itself). None where nothing is to be measured.
    """
    texts = list(
        dict.fromkeys(
            text
            for question in questions
            for choose in QUERY_SETS.values()
            for text in choose(question)
        )
    )
    found: dict[str, list[int]] = {}
    for start in tqdm(
        range(0, len(texts), _QUERIES_AT_ONCE),
        desc="searching",
        unit=f" x {_QUERIES_AT_ONCE} queries",
        leave=False,
    ):
        batch = texts[start : start + _QUERIES_AT_ONCE]
        found.update(zip(batch, search(batch, max(ks)).tolist()))

    def share(queries: Iterable[str], k: int, gold: Sequence[int], missing: Sequence) -> float:
        reached = {i for text in queries for i in found[text][:k]}
        return len(reached.intersection(gold)) / (len(gold) + len(missing))

    figures: dict[str, dict[str, dict]] = {}
    *plain, accepted = QUERY_SETS
    more = any(
        set(sub.queries) - {sub.question}
        for question in questions
        for sub in question.sub_questions
    )
    for name in (*plain, accepted) if more else plain:
        choose = QUERY_SETS[name]
        asked = [
            question
            for question in questions
            if (question.gold_ids or question.missing_gold) and list(choose(question))
        ]
        hops = (
            []
            if name == "the question"
            else [
                sub
                for question in questions
                for sub in question.sub_questions
                if sub.gold_ids or sub.missing_gold
            ]
        )
        figures[name] = {}
        for k in ks:
            shares = [
                share(choose(question), k, question.gold_ids, question.missing_gold)
                for question in asked
            ]
            hop_fractions = [
                share(
                    [sub.question] if name == "its sub-questions" else (sub.question, *sub.queries),
                    k,
                    sub.gold_ids,
                    sub.missing_gold,
                )
                for sub in hops
            ]
            figures[name][str(k)] = dict(
                questions=len(asked),
                sub_questions=len(hops),
                recall=_mean(shares),
                complete=_mean([share == 1 for share in shares]),
                hop_recall=_mean(hop_fractions),
            )
    return figures


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def measure_overlap(
    training: Sequence[Question], evaluation: Sequence[Question], documents: Sequence[Document]
) -> dict[str, dict]:
    """What evaluation rows have in common with training rows, texts normalised as in F1.

    -> for questions, sub-questions and gold passages (title and text; missing ones included): training and evaluation, the number of different texts
    in each; rows, the evaluation questions with a text that training rows hold; and shared, these texts (of passages the titles).
    """

    def passages(question: Question) -> dict[str, str]:
        held = ((documents[i].title, documents[i].text) for i in question.gold_ids)
        return {
            normalize(f"{title} {text}"): title for title, text in (*held, *question.missing_gold)
        }

    kinds: dict[
        str, Callable[[Question], dict[str, str]]
    ] = {  # what is compared -> what is shown of it
        "questions": lambda question: {normalize(question.question): question.question},
        "sub-questions": lambda question: {
            normalize(sub.question): sub.question for sub in question.sub_questions
        },
        "gold passages": passages,
    }
    figures = {}
    for name, read in kinds.items():
        known = {text for question in training for text in read(question)}
        of_rows = [read(question) for question in evaluation]
        shown = {text: label for row in of_rows for text, label in row.items()}
        figures[name] = dict(
            training=len(known),
            evaluation=len(shown),
            rows=sum(not known.isdisjoint(row) for row in of_rows),
            shared=[label for text, label in shown.items() if text in known],
        )
    return figures


def audit(
    config: ml_collections.ConfigDict, corpora: Sequence[pathlib.Path], ks: Sequence[int]
) -> dict:
    """All figures of a config's data set; `corpora` are files whose passages are added to its corpus, each passage once."""
    search_config = config.search
    check_settings(search_config.bm25_k1, search_config.bm25_b)
    with lock_cache(config.data.cache_dir):
        source = open_source(config.data, search_config.bm25_k1, search_config.bm25_b)
        splits = {name: list(rows) for name, rows in source.splits.items()}
        folder, part = (
            locate_corpus(config.data.cache_dir, source.manifest["hash"]),
            f"bm25-{search_config.bm25_k1}-{search_config.bm25_b}",
        )
        if corpora:
            named = hashlib.sha256(
                "\n".join(str(path.resolve()) for path in corpora).encode()
            ).hexdigest()[:16]
            made_from = {"data": source.manifest["hash"], "files": describe_files(corpora)}
            index = stream_index(
                lambda: extend_corpus(source.documents, corpora),
                made_from,
                folder.with_name(f"{folder.name}-{named}") / part,
                search_config.bm25_k1,
                search_config.bm25_b,
            )
            splits = locate_gold(splits, index.documents)
        else:
            index = build_index(
                source.documents, folder / part, search_config.bm25_k1, search_config.bm25_b
            )
    documents = index.documents
    figures = dict(
        data={
            "kind": config.data.kind,
            **{name: source.manifest[name] for name in ("hash", "files")},
        },
        passages=len(documents),
        added_passages=len(documents) - len(source.documents),
        corpora=[str(path) for path in corpora],
        retriever=dict(kind="bm25", k1=search_config.bm25_k1, b=search_config.bm25_b),
        ks=list(ks),
        splits={},
        overlap={},
    )
    train = config.data.train_split
    for name, questions in splits.items():
        logger.info("split %s: %d questions", name, len(questions))
        recall = measure_recall(questions, lambda queries, k: index.search(queries, k)[0], ks)
        figures["splits"][name] = dict(gold=find_gold(questions), recall=recall)
        if name != train and train in splits:
            figures["overlap"][name] = measure_overlap(splits[train], questions, documents)
    return figures


def extend_corpus(
    documents: Iterable[Document], corpora: Sequence[pathlib.Path]
) -> Iterator[tuple[str, str]]:
    """Title and text of all the documents, then of the passages of the files that are not among them, each once."""
    seen = Seen()
    for document in documents:
        passage = document.title, document.text
        seen.add(passage)
        yield passage
    yield from filter(seen.add, read_corpus(corpora))


def render(figures: dict) -> str:
    """The figures as Markdown tables."""
    added = (
        f", {figures['added_passages']:,} of them from the {len(figures['corpora'])} files added"
        if figures["corpora"]
        else ""
    )
    lines = [
        f"{figures['data']['kind']}: {figures['passages']:,} passages{added}",
        "",
        "| split | questions | with gold documents | all of these in the corpus | gold documents | missing |",
        "|---|---|---|---|---|---|",
    ]
    for name, split in figures["splits"].items():
        gold = split["gold"]
        lines.append(
            f"| {name} | {gold['questions']} | {gold['with_gold']} | {gold['complete']} | {gold['gold_documents']} | {gold['missing']} |"
        )
    retriever = figures["retriever"]
    lines += [
        "",
        f"Share of the gold documents that BM25 (k1 = {retriever['k1']}, b = {retriever['b']}) finds if each query brings k",
        "",
        f"| split | queries | of |{''.join(f' recall@{k} |' for k in figures['ks'])}",
        "|---|---|---|" + "---|" * len(figures["ks"]),
    ]
    kinds = {
        "recall": "a question's gold documents",
        "complete": "questions with all of them",
        "hop_recall": "a sub-question's gold documents",
    }
    for name, split in figures["splits"].items():
        for queries, recall in split["recall"].items():
            for kind, of in kinds.items():
                cells = [cell[kind] for cell in recall.values()]
                if None not in cells:
                    lines.append(
                        f"| {name} | {queries} | {of} | "
                        + " | ".join(f"{cell:.3f}" for cell in cells)
                        + " |"
                    )
    if figures["overlap"]:
        lines += [
            "",
            "| in common with training rows | different texts in training | in evaluation | in both | evaluation questions with one |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {name}: {kind} | {cell['training']} | {cell['evaluation']} | {len(cell['shared'])} | {cell['rows']} |"
            for name, overlap in figures["overlap"].items()
            for kind, cell in overlap.items()
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """The command, with the arguments that follow its name. What a user can mend ends it with one line."""

    def run(config: ml_collections.ConfigDict, options: argparse.Namespace) -> dict:
        if options.k != sorted(set(options.k)) or options.k[0] < 1:
            raise ValueError(
                f"--k {' '.join(map(str, options.k))}: numbers above 0 are needed, smallest first"
            )
        return audit(config, options.corpus, options.k)

    parser = cli.make_parser("prepare audit", __doc__, "config", "json")
    parser.add_argument(
        "--corpus",
        type=pathlib.Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="passages to add to the data set's corpus",
    )
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        default=[1, 3, 5, 10, 20],
        metavar="N",
        help="documents a query (1 3 5 10 20)",
    )
    run_command(parser, arguments, run, render)
