"""Search keys for every sub-question, made as in StepSearch: written, voted on, stored as rows.

    python -m stepsearch_jax.prepare keys --config=configs/X.py[:arg] --out FOLDER
        [--splits SPLIT …] [--engines ENGINE …] [--queries N]
        [--writer rules | --writer chat --url URL --model NAME [--key-env VARIABLE] …]
        [--json FILE] [--config.key=value …]

A writer gives queries for each sub-question, with the earlier answers filled in. A query is kept if
at least half of the engines (⌈M/2⌉ of M) return a gold document of the sub-question among their
first config.search.k. FOLDER/SPLIT.jsonl then holds the rows in StepSearch's form, which
--config.data.kind=stepsearch --config.data.path=FOLDER reads. Engines: bm25:K1:B; dense, the
encoder of config.search; or remote:URL, a search server such as `python -m stepsearch_jax.serve`
with the same corpus (queried with config.search.attempt_s, attempts, backoff_s and batch).

`rules` needs no model. `chat` queries any OpenAI-compatible endpoint; its key comes from an
environment variable. Answers and searches are kept in config.data.cache_dir: run an interrupted
command again to continue it. It pays for no answer twice and writes the same files.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import ml_collections

from stepsearch_jax import cli
from stepsearch_jax.files import write_json, write_text
from stepsearch_jax.prepare.engines import FORMS, Engine, build_engine, check_engines, search_all
from stepsearch_jax.prepare.options import run_command
from stepsearch_jax.prepare.rules import write_queries
from stepsearch_jax.prepare.store import Store
from stepsearch_jax.prepare.votes import count_votes, is_kept, list_hops, measure_votes, render
from stepsearch_jax.records import Document, Question
from stepsearch_jax.search.bm25 import check_settings
from stepsearch_jax.search.cache import locate_corpus, lock_cache, one_at_a_time

if TYPE_CHECKING:
    from stepsearch_jax.data.loading import Source
    from stepsearch_jax.prepare.chat import ChatSettings

logger = logging.getLogger("stepsearch_jax")
MOST = 1_000_000  # no flag needs more, and some system calls take no more


def make_row(
    question: Question, keys: Sequence[Sequence[str]], documents: Sequence[Document]
) -> dict:
    """A question in StepSearch's form (data/stepsearch.py). keys: the kept queries of each hop."""

    def show(gold_ids, missing) -> list[dict[str, str]]:
        held = [(documents[i].title, documents[i].text) for i in gold_ids]
        return [
            {"title": title, "paragraph_text": text} if text else {"title": title}
            for title, text in (*held, *missing)
        ]

    subs = question.sub_questions
    support = [show(sub.gold_ids, sub.missing_gold) for sub in subs]
    row = {
        "id": question.uid,
        "question": question.question,
        "final_answer": question.answer,
        "answer_aliases": question.aliases,
        "shape": question.shape,
        "sub_questions": [sub.question for sub in subs],
        "sub_answers": [sub.answer for sub in subs],
        "sub_answer_aliases": [sub.aliases for sub in subs],
        "sub_searchs": keys,
        "sub_support_docs": [group[0] for group in support]
        if all(len(group) == 1 for group in support)
        else support,
    }
    if question.unordered:
        row["unordered"] = True
    loose = show(question.loose_gold_ids, question.loose_missing_gold)
    return {**row, "support_docs": loose} if loose else row


def make_keys(config: ml_collections.ConfigDict, options: argparse.Namespace) -> dict:
    """Writes the rows and report.json to options.out -> the figures of the report.

    Raises ValueError or OSError for bad flags and bad data, before any work where possible.
    """
    # these libraries load slowly: --help does without them
    from stepsearch_jax.data.loading import open_source

    chat = None
    if options.writer == "chat":
        from stepsearch_jax.prepare.chat import read_settings

        chat = read_settings(options)
    _check_options(config, options)

    # the data set and the engines' indexes
    cache = pathlib.Path(config.data.cache_dir)
    with lock_cache(config.data.cache_dir):
        source = open_source(config.data, config.search.bm25_k1, config.search.bm25_b)
        splits = options.splits or [config.data.train_split]
        for split in splits:
            if split not in source.splits:
                raise ValueError(f"--splits {split}: the data set has {', '.join(source.splits)}")
            if not list_hops(list(source.splits[split])):
                raise ValueError(
                    f"no question of split {split} has a sub-question with a gold document in the "
                    f"corpus: {config.data.kind} gives nothing to write queries for"
                )
        folder = locate_corpus(config.data.cache_dir, source.manifest["hash"])
        engines = [
            build_engine(name, source.documents, folder, config.search) for name in options.engines
        ]

    # queries, searches and votes; the lock keeps another process from paying for the same answers
    options.out.mkdir(parents=True, exist_ok=True)  # fails before anything is paid for
    named = {name: source.manifest[name] for name in ("hash", "files") if name in source.manifest}
    figures = dict(
        data={"kind": config.data.kind, **named},
        writer=options.writer,
        model=options.model or None,
        queries=options.queries,
        k=config.search.k,
        splits={},
    )
    rows = {}
    with one_at_a_time(cache / "keys"):
        store = Store(cache / "keys" / "store.sqlite")
        try:
            for split in splits:
                figures["splits"][split], rows[split] = _make_split(
                    split, source, chat, options, engines, config.search.k, store
                )
        finally:
            store.close()

    # the files: rows, corpus, report
    for split, of_split in rows.items():
        write_text(options.out / f"{split}.jsonl", _to_lines(of_split))
    corpora = _name_corpus(config.data.corpus, source, options.out)
    write_json(options.out / "report.json", figures)
    logger.info(
        "to train on them: --config.data.kind=stepsearch --config.data.path=%s "
        "--config.data.corpus=%s",
        options.out,
        corpora,
    )
    return figures


def _check_options(config: ml_collections.ConfigDict, options: argparse.Namespace) -> None:
    """Raises ValueError for flags and config keys that cannot work."""
    check_engines(options.engines, config.search)
    for name in ("queries", "concurrency", "attempts", "rate", "timeout"):
        if not 0 < (value := getattr(options, name)) <= MOST:
            raise ValueError(f"--{name} {value}: a number above 0 is needed, {MOST:,} at most")
    for name in ("retries", "temperature", "backoff"):
        if not 0 <= (value := getattr(options, name)) <= MOST:
            raise ValueError(f"--{name} {value}: 0 or more is needed, {MOST:,} at most")
    check_settings(config.search.bm25_k1, config.search.bm25_b)
    if config.search.k < 1:
        raise ValueError(f"config.search.k is {config.search.k}; it must be at least 1")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is not a folder")
    # --out must not replace the source's own files
    out = options.out.resolve()
    if config.data.path and out == pathlib.Path(config.data.path).resolve():
        raise ValueError(
            f"--out {options.out} is config.data.path, whose files would be replaced: choose "
            "another folder"
        )
    corpora = [pathlib.Path(file) for file in config.data.corpus.split(",") if file]
    if any(out == corpus.resolve().parent for corpus in corpora):
        raise ValueError(
            f"--out {options.out} holds a file of config.data.corpus, which might be replaced: "
            "choose another folder"
        )


def _make_split(
    split: str,
    source: Source,
    chat: ChatSettings | None,
    options: argparse.Namespace,
    engines: Sequence[Engine],
    k: int,
    store: Store,
) -> tuple[dict, list[dict]]:
    """Writes queries for a split and has the engines vote on them -> its figures, its rows."""
    # queries for each sub-question with a gold document in the corpus
    questions = list(source.splits[split])
    places = list_hops(questions)
    asked = [
        (
            questions[i].sub_questions[hop].question,
            tuple(sub.answer for sub in questions[i].sub_questions[:hop]),
        )
        for i, hop in places
    ]
    if chat:
        from stepsearch_jax.prepare.chat import ChatWriter

        writer = ChatWriter(chat, store)
        queries = writer.write_all(asked)
        logger.info(
            "split %s: this process sent %d requests and received %d answers; the endpoint "
            "refused %d sub-questions",
            split,
            writer.sent,
            writer.received,
            writer.refused,
        )
    else:
        queries = [write_queries(question, earlier, options.queries) for question, earlier in asked]
    written = {place: tuple(group or ()) for place, group in zip(places, queries, strict=True)}
    refused = {place for place, group in zip(places, queries, strict=True) if group is None}

    # the vote
    different = [query for group in written.values() for query in group]
    found = search_all(engines, different, k, source.manifest["hash"], store)
    votes = {
        (i, hop, query): count_votes(found, query, questions[i].sub_questions[hop].gold_ids)
        for (i, hop), group in written.items()
        for query in group
    }
    kept = {
        place: [query for query in group if is_kept(votes[*place, query])]
        for place, group in written.items()
    }

    # figures and rows
    figures = measure_votes(questions, written, refused, votes, [engine.name for engine in engines])
    rows = []
    for i, question in enumerate(questions):
        keys = [kept.get((i, hop), []) for hop in range(len(question.sub_questions))]
        rows.append(make_row(question, keys, source.documents))
    return figures, rows


def _to_lines(rows: Iterable[dict]) -> str:
    """JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _name_corpus(given: str, source: Source, out: pathlib.Path) -> str:
    """The files of the corpus, as config.data.corpus names them.

    Passages that came with the rows are written to OUT/corpus.jsonl.
    """
    files = [
        entry["path"]
        for name, entry in source.manifest.get("files", {}).items()
        if name.startswith("corpus")
    ]
    if files:
        return given or ",".join(files)
    rows = (
        {"id": document.id, "title": document.title, "text": document.text}
        for document in source.documents
    )
    write_text(out / "corpus.jsonl", _to_lines(rows))
    return str(out / "corpus.jsonl")


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Errors that a user can fix end it with one line."""
    # what is made, and how
    parser = cli.make_parser("prepare keys", __doc__, "config", "json")
    parser.add_argument(
        "--out",
        type=cli.name_path,
        required=True,
        metavar="FOLDER",
        help="where the rows and report.json are written",
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        default=[],
        metavar="SPLIT",
        help="splits to make keys for (config.data.train_split)",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["bm25:0.9:0.4", "bm25:1.2:0.75", "bm25:2.0:0.9"],
        metavar="ENGINE",
        help=f"engines that vote: {FORMS} (bm25:0.9:0.4 bm25:1.2:0.75 bm25:2.0:0.9)",
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=5,
        metavar="N",
        help="most queries for a sub-question (5)",
    )
    parser.add_argument(
        "--writer", choices=("rules", "chat"), default="rules", help="who writes them (rules)"
    )
    # the endpoint and the model, then limits and retries
    chat = parser.add_argument_group("--writer chat")
    chat.add_argument(
        "--url",
        default="",
        help="base of an OpenAI-compatible endpoint, https://HOST/v1; /chat/completions is added",
    )
    chat.add_argument(
        "--model", default="", metavar="NAME", help="the model, as the endpoint calls it"
    )
    chat.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable with the key; empty for none (OPENAI_API_KEY)",
    )
    chat.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="sampling temperature (0.7)"
    )
    chat.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (8)"
    )
    chat.add_argument(
        "--rate",
        type=float,
        default=300.0,
        metavar="N",
        help="requests a minute, retries included (300)",
    )
    chat.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to wait for an answer (60)",
    )
    chat.add_argument(
        "--retries",
        type=int,
        default=6,
        metavar="N",
        help="times that a failed request is sent again (6)",
    )
    chat.add_argument(
        "--backoff",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds before the first retry; doubled each time (1)",
    )
    chat.add_argument(
        "--attempts",
        type=int,
        default=3,
        metavar="N",
        help="requests for a sub-question whose answers hold no query (3)",
    )
    run_command(parser, arguments, make_keys, render)
