"""What a data set and its corpus allow, before any training.

    python -m stepsearch_jax.prepare audit --config=configs/X.py[:arg]
        [--corpus FILE …] [--k N …] [--json FILE] [--config.key=value …]

A missing gold document costs more than most algorithms gain. Prints three tables: the gold
documents of each split, and how many of them the corpus lacks; the fraction of them that BM25 finds
for the gold queries, an upper bound for any policy with such queries; and what training and
evaluation rows have in common. --corpus adds the passages of more files to the data set's corpus;
--json also lists every missing document and every shared text. Needs no model.
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
from stepsearch_jax.data.passages import Seen, locate_gold, read_corpus
from stepsearch_jax.data.rows import describe_files
from stepsearch_jax.prepare.options import run_command
from stepsearch_jax.records import Document, Question
from stepsearch_jax.rewards.text_metrics import normalize
from stepsearch_jax.search.bm25 import build_index, check_settings, stream_index
from stepsearch_jax.search.cache import locate_corpus, lock_cache

logger = logging.getLogger("stepsearch_jax")
# queries, k -> corpus ids [q, k], best first, padded with -1
Search = Callable[[Sequence[str], int], np.ndarray]
QUERY_SETS: dict[str, Callable[[Question], Iterable[str]]] = {
    "the question": lambda question: [question.question],
    "its sub-questions": lambda question: [sub.question for sub in question.sub_questions],
    "sub-questions and accepted queries": lambda question: [
        text for sub in question.sub_questions for text in (sub.question, *sub.queries)
    ],
}
_QUERIES_AT_ONCE = 64
SHOWN_MISSING = 10  # gold documents that the corpus lacks, below the table


def find_gold(questions: Sequence[Question]) -> dict:
    """How much of the gold the corpus holds.

    -> numbers: questions; with_gold, those with a known gold document; complete, those whose gold
    documents are all in the corpus; gold_documents; missing, those not in the corpus. lacking: the
    title, text and questions (uids) of each missing one.
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
    """The best recall: which gold documents are among the first k for one of the gold queries.

    A missing document counts as not found.

    -> for each set of queries (QUERY_SETS; the last only if there are accepted queries) and each
    k: `recall`, the fraction of a question's gold documents found, averaged over questions with
    gold documents; `complete`, the fraction of these questions with all of them found;
    `hop_recall`, the fraction of a sub-question's gold documents that its own queries find,
    averaged over sub-questions with gold documents (not for the question itself). None if there is
    nothing to measure.
    """
    # every text is searched once, with the largest k
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

    def recall(queries: Iterable[str], k: int, gold: Sequence[int], missing: Sequence) -> float:
        reached = {i for text in queries for i in found[text][:k]}
        return len(reached.intersection(gold)) / (len(gold) + len(missing))

    # accepted queries have figures of their own only if there are any
    figures: dict[str, dict[str, dict]] = {}
    *plain, accepted = QUERY_SETS
    all_subs = [sub for question in questions for sub in question.sub_questions]
    more = any(set(sub.queries) - {sub.question} for sub in all_subs)
    with_gold = [question for question in questions if question.gold_ids or question.missing_gold]
    for name in (*plain, accepted) if more else plain:
        choose = QUERY_SETS[name]
        asked = [question for question in with_gold if list(choose(question))]
        hops = [sub for sub in all_subs if sub.gold_ids or sub.missing_gold]
        if name == "the question":
            hops = []
        figures[name] = {}
        for k in ks:
            recalls = [
                recall(choose(question), k, question.gold_ids, question.missing_gold)
                for question in asked
            ]
            hop_recalls = []
            for sub in hops:
                own = () if name == "its sub-questions" else sub.queries
                hop_recalls.append(recall((sub.question, *own), k, sub.gold_ids, sub.missing_gold))
            figures[name][str(k)] = dict(
                questions=len(asked),
                sub_questions=len(hops),
                recall=_mean(recalls),
                complete=_mean([value == 1 for value in recalls]),
                hop_recall=_mean(hop_recalls),
            )
    return figures


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def measure_overlap(
    training: Sequence[Question], evaluation: Sequence[Question], documents: Sequence[Document]
) -> dict[str, dict]:
    """What evaluation rows have in common with training rows, texts normalised as in F1.

    -> for questions, sub-questions and gold passages (title and text; missing ones included):
    training and evaluation, the number of different texts in each; rows, the number of evaluation
    questions with a text that training rows hold; shared, these texts (titles for passages).
    """

    def passages(question: Question) -> dict[str, str]:
        held = ((documents[i].title, documents[i].text) for i in question.gold_ids)
        return {
            normalize(f"{title} {text}"): title for title, text in (*held, *question.missing_gold)
        }

    # kind -> normalised text: what is shown for it
    kinds: dict[str, Callable[[Question], dict[str, str]]] = {
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
    """All figures of a config's data set.

    corpora: files whose passages are added to its corpus, each passage once.
    """
    from stepsearch_jax.data.loading import open_source  # loads slowly: --help does without it

    # the data set and its index; a corpus with added files has an index of its own
    k1, b = config.search.bm25_k1, config.search.bm25_b
    check_settings(k1, b)
    with lock_cache(config.data.cache_dir):
        source = open_source(config.data, k1, b)
        splits = {name: list(rows) for name, rows in source.splits.items()}
        folder = locate_corpus(config.data.cache_dir, source.manifest["hash"])
        part = f"bm25-{k1}-{b}"
        if corpora:
            paths = "\n".join(str(path.resolve()) for path in corpora)
            named = hashlib.sha256(paths.encode()).hexdigest()[:16]
            index = stream_index(
                lambda: extend_corpus(source.documents, corpora),
                {"data": source.manifest["hash"], "files": describe_files(corpora)},
                folder.with_name(f"{folder.name}-{named}") / part,
                k1,
                b,
            )
            splits = locate_gold(splits, index.documents)
        else:
            index = build_index(source.documents, folder / part, k1, b)

    # the figures: of the whole, then of each split and what it shares with training
    documents = index.documents
    figures = dict(
        data={
            "kind": config.data.kind,
            **{name: source.manifest[name] for name in ("hash", "files")},
        },
        passages=len(documents),
        added_passages=len(documents) - len(source.documents),
        corpora=[str(path) for path in corpora],
        retriever=dict(kind="bm25", k1=k1, b=b),
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
    """Title and text of all documents, then of new passages in the files, each once."""
    seen = Seen()
    for document in documents:
        passage = document.title, document.text
        seen.add(passage)
        yield passage
    yield from filter(seen.add, read_corpus(corpora))


def render(figures: dict) -> str:
    """The figures as Markdown tables."""
    # gold documents
    added = (
        f", {figures['added_passages']:,} of them from the {len(figures['corpora'])} files added"
        if figures["corpora"]
        else ""
    )
    lines = [
        f"{figures['data']['kind']}: {figures['passages']:,} passages{added}",
        "",
        "| split | questions | with gold documents | all of these in the corpus | gold documents "
        "| missing |",
        "|---|---|---|---|---|---|",
    ]
    for name, split in figures["splits"].items():
        gold = split["gold"]
        counts = ("questions", "with_gold", "complete", "gold_documents", "missing")
        lines.append(f"| {name} | " + " | ".join(str(gold[count]) for count in counts) + " |")
    lines += _list_missing(figures["splits"])
    # recall; nothing to find without gold documents
    if not any(split["gold"]["with_gold"] for split in figures["splits"].values()):
        lines += [
            "",
            "No question names gold documents, so every information gain would be 0: add them, or "
            "train with reward.step_reward=answer_logprob.",
        ]
        return "\n".join([*lines, *_render_overlap(figures["overlap"])])
    retriever = figures["retriever"]
    lines += [
        "",
        f"Fraction of the gold documents that BM25 (k1 = {retriever['k1']}, b = {retriever['b']}) "
        "finds if each query returns k",
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
                    numbers = " | ".join(f"{cell:.3f}" for cell in cells)
                    lines.append(f"| {name} | {queries} | {of} | {numbers} |")
    return "\n".join([*lines, *_render_overlap(figures["overlap"])])


def _list_missing(splits: dict) -> list[str]:
    """The first gold documents that the corpus lacks, with the questions that need them."""
    missing = [
        (name, entry) for name, split in splits.items() for entry in split["gold"]["lacking"]
    ]
    lines = [
        f"- {(entry['title'] or entry['text'])[:80]!r}, which {name} question "
        f"{', '.join(entry['questions'][:3])} needs"
        for name, entry in missing[:SHOWN_MISSING]
    ]
    if len(missing) > SHOWN_MISSING:
        lines.append(f"- and {len(missing) - SHOWN_MISSING} more, which --json FILE lists")
    return ["", "Gold documents that the corpus lacks:", "", *lines] if missing else []


def _render_overlap(of_splits: dict) -> list[str]:
    """The table of what splits have in common with training; nothing without such splits."""
    if not of_splits:
        return []
    return [
        "",
        "| in common with training rows | different texts in training | in evaluation "
        "| in both | evaluation questions with one |",
        "|---|---|---|---|---|",
        *(
            f"| {name}: {kind} | {cell['training']} | {cell['evaluation']} "
            f"| {len(cell['shared'])} | {cell['rows']} |"
            for name, overlap in of_splits.items()
            for kind, cell in overlap.items()
        ),
    ]


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Errors that a user can fix end it with one line."""

    def run(config: ml_collections.ConfigDict, options: argparse.Namespace) -> dict:
        if options.k != sorted(set(options.k)) or options.k[0] < 1:
            raise ValueError(
                f"--k {' '.join(map(str, options.k))}: numbers above 0 are needed, smallest first"
            )
        return audit(config, options.corpus, options.k)

    parser = cli.make_parser("prepare audit", __doc__, "config", "json")
    parser.add_argument(
        "--corpus",
        type=cli.name_path,
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
        help="documents for each query (1 3 5 10 20)",
    )
    run_command(parser, arguments, run, render)
