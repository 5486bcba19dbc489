"""Search keys for every sub-question, as StepSearch makes them: written, put to the vote of several search engines, stored as training rows.

    python -m stepsearch_jax.prepare keys --config=configs/X.py[:arg] --out FOLDER [--splits SPLIT …] [--engines ENGINE …] [--queries N]
        [--writer rules | --writer chat --url URL --model NAME [--key-env VARIABLE] …] [--json FILE] [--config.key=value …]

A writer gives queries for each sub-question, with the earlier answers filled in. A query is kept if at least half of the engines (⌈M/2⌉ of M) return a gold
document of the sub-question among their first config.search.k. FOLDER/SPLIT.jsonl then holds the rows in StepSearch's form, which
--config.data.kind=stepsearch --config.data.path=FOLDER reads. Engines: bm25:K1:B; dense, the encoder of config.search; or remote:URL, a search server such as
`python -m stepsearch_jax.serve`, which must hold the same corpus (config.search.attempt_s, attempts, backoff_s and batch say how it is asked).

`rules` needs no model. `chat` asks any OpenAI-compatible endpoint; its key comes from an environment variable. Answers and searches are kept in
config.data.cache_dir: a run that was ended goes on where it stood, pays for no answer twice, and writes the same files.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib
from collections.abc import Collection, Sequence

import ml_collections
import requests
import urllib3

from stepsearch_jax import cli
from stepsearch_jax.data.loading import Source, open_source
from stepsearch_jax.files import write_json, write_text
from stepsearch_jax.prepare.chat import ChatSettings, ChatWriter
from stepsearch_jax.prepare.engines import (
    FORMS,
    build_engine,
    check_engines,
    count_votes,
    is_kept,
    search_all,
)
from stepsearch_jax.prepare.options import run_command
from stepsearch_jax.prepare.rules import write_queries
from stepsearch_jax.prepare.store import Store
from stepsearch_jax.records import Document, Question
from stepsearch_jax.search.bm25 import check_settings
from stepsearch_jax.search.cache import locate_corpus, lock_cache, one_at_a_time

logger = logging.getLogger("stepsearch_jax")
MOST = 1_000_000  # no flag needs more, and some calls of the system know no more
Keys = dict[tuple[int, int], tuple[str, ...]]  # (question, hop), from 0 -> queries


def list_hops(questions: Sequence[Question]) -> list[tuple[int, int]]:
    """(question, hop) of the sub-questions whose gold documents the corpus holds: for the others no query could be kept."""
    return [
        (i, hop)
        for i, question in enumerate(questions)
        for hop, sub in enumerate(question.sub_questions)
        if sub.gold_ids
    ]


def measure_votes(
    questions: Sequence[Question],
    written: Keys,
    refused: Collection[tuple[int, int]],
    votes: dict[tuple[int, int, str], list[bool]],
    engines: Sequence[str],
) -> dict:
    """What the vote kept, over all hops and hop by hop. refused: the sub-questions, of those in `written`, for which the writer's endpoint would not write.

    -> of each: sub_questions; asked, those with a gold document in the corpus; unwritten, of these the ones without any query; refused, of these again those
    that the endpoint refused; with_key, those with a kept query; written and kept queries, and kept_fraction; and for each engine `found`, the share of the
    written queries for which it returns the gold document; `kept_recall`, the same of the kept queries; `reached`, the share of the asked sub-questions that
    one of its kept queries finds there. None where there is nothing to measure.
    """
    hops = max((len(question.sub_questions) for question in questions), default=0)
    figures = {}
    for name, wanted in (
        ("all", range(hops)),
        *((f"hop {hop + 1}", (hop,)) for hop in range(hops)),
    ):
        places = [place for place in written if place[1] in wanted]
        of_sub = [[votes[*place, query] for query in written[place]] for place in places]
        of_query = [of_one for group in of_sub for of_one in group]
        kept = [of_one for of_one in of_query if is_kept(of_one)]
        figures[name] = dict(
            sub_questions=sum(
                len([hop for hop in wanted if hop < len(question.sub_questions)])
                for question in questions
            ),
            asked=len(places),
            unwritten=sum(not group for group in of_sub),
            refused=sum(place in refused for place in places),
            with_key=sum(any(map(is_kept, group)) for group in of_sub),
            written=len(of_query),
            kept=len(kept),
            kept_fraction=_share(map(is_kept, of_query)),
            engines={
                engine: dict(
                    found=_share(of_one[e] for of_one in of_query),
                    kept_recall=_share(of_one[e] for of_one in kept),
                    reached=_share(
                        any(of_one[e] for of_one in group if is_kept(of_one)) for group in of_sub
                    ),
                )
                for e, engine in enumerate(engines)
            },
        )
    return figures


def _share(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def make_row(
    question: Question, keys: Sequence[Sequence[str]], documents: Sequence[Document]
) -> dict:
    """A question in StepSearch's form (data/stepsearch.py). keys: the accepted queries of each sub-question, none where none was kept."""

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
    loose = show(question.loose_gold_ids, question.loose_missing_gold)
    return {**row, "support_docs": loose} if loose else row


def make_keys(config: ml_collections.ConfigDict, options: argparse.Namespace) -> dict:
    """The command: files in options.out -> the figures of its report. Raises ValueError or OSError, the sooner the better, for what is wrong."""
    chat = _read_chat(options) if options.writer == "chat" else None
    check_engines(options.engines, config.search)
    for name in ("queries", "concurrency", "attempts", "rate", "timeout"):
        if not 0 < getattr(options, name) <= MOST:
            raise ValueError(
                f"--{name} {getattr(options, name)}: a number above 0 is needed, {MOST:,} at most"
            )
    for name in ("retries", "temperature", "backoff"):
        if not 0 <= getattr(options, name) <= MOST:
            raise ValueError(
                f"--{name} {getattr(options, name)}: 0 or more is needed, {MOST:,} at most"
            )
    check_settings(config.search.bm25_k1, config.search.bm25_b)
    if config.search.k < 1:
        raise ValueError(f"config.search.k is {config.search.k}; it must be at least 1")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is not a folder")
    if config.data.path and options.out.resolve() == pathlib.Path(config.data.path).resolve():
        raise ValueError(
            f"--out {options.out} is config.data.path, whose files would be replaced: choose another folder"
        )
    if any(
        options.out.resolve() == pathlib.Path(file).resolve().parent
        for file in config.data.corpus.split(",")
        if file
    ):
        raise ValueError(
            f"--out {options.out} holds a file of config.data.corpus, which might be replaced: choose another folder"
        )
    cache = pathlib.Path(config.data.cache_dir)
    with lock_cache(config.data.cache_dir):
        source = open_source(config.data, config.search.bm25_k1, config.search.bm25_b)
        splits = options.splits or [config.data.train_split]
        for split in splits:
            if split not in source.splits:
                raise ValueError(f"--splits {split}: the data set has {', '.join(source.splits)}")
            if not list_hops(list(source.splits[split])):
                raise ValueError(
                    f"no question of split {split} has a sub-question with a gold document in the corpus: {config.data.kind} gives nothing to "
                    "write queries for"
                )
        folder = locate_corpus(config.data.cache_dir, source.manifest["hash"])
        engines = [
            build_engine(name, source.documents, folder, config.search) for name in options.engines
        ]
    options.out.mkdir(parents=True, exist_ok=True)  # before anything is paid for
    with one_at_a_time(
        cache / "keys"
    ):  # another process with this cache would pay for the same answers
        store = Store(cache / "keys" / "store.sqlite")
        try:
            figures = dict(
                data={
                    "kind": config.data.kind,
                    **{
                        name: source.manifest[name]
                        for name in ("hash", "files")
                        if name in source.manifest
                    },
                },
                writer=options.writer,
                model=options.model or None,
                queries=options.queries,
                k=config.search.k,
                splits={},
            )
            texts = {}
            for split in splits:
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
                    writer = ChatWriter(chat, store)
                    queries = writer.write_all(asked)
                    logger.info(
                        "split %s: %d requests sent, %d answers received and %d sub-questions refused in this process",
                        split,
                        writer.sent,
                        writer.received,
                        writer.refused,
                    )
                else:
                    queries = [
                        write_queries(question, earlier, options.queries)
                        for question, earlier in asked
                    ]
                written = {
                    place: tuple(group or ()) for place, group in zip(places, queries, strict=True)
                }
                refused = {
                    place for place, group in zip(places, queries, strict=True) if group is None
                }
                found = search_all(
                    engines,
                    [query for group in written.values() for query in group],
                    config.search.k,
                    source.manifest["hash"],
                    store,
                )
                votes = {
                    (i, hop, query): count_votes(
                        found, query, questions[i].sub_questions[hop].gold_ids
                    )
                    for (i, hop), group in written.items()
                    for query in group
                }
                kept = {
                    place: [query for query in group if is_kept(votes[*place, query])]
                    for place, group in written.items()
                }
                figures["splits"][split] = measure_votes(
                    questions, written, refused, votes, options.engines
                )
                texts[split] = "".join(
                    json.dumps(
                        make_row(
                            question,
                            [kept.get((i, hop), []) for hop in range(len(question.sub_questions))],
                            source.documents,
                        ),
                        ensure_ascii=False,
                    )
                    + "\n"
                    for i, question in enumerate(questions)
                )
        finally:
            store.close()
    for split, text in texts.items():
        write_text(options.out / f"{split}.jsonl", text)
    corpora = _name_corpus(config.data.corpus, source, options.out)
    write_json(options.out / "report.json", figures)
    logger.info(
        "to train on them: --config.data.kind=stepsearch --config.data.path=%s --config.data.corpus=%s",
        options.out,
        corpora,
    )
    return figures


def _name_corpus(given: str, source: Source, out: pathlib.Path) -> str:
    """The files of the corpus, as config.data.corpus names them; passages that rows brought along are written to OUT/corpus.jsonl."""
    files = [
        entry["path"]
        for name, entry in source.manifest.get("files", {}).items()
        if name.startswith("corpus")
    ]
    if files:
        return given or ",".join(files)
    write_text(
        out / "corpus.jsonl",
        "".join(
            json.dumps(
                {"id": document.id, "title": document.title, "text": document.text},
                ensure_ascii=False,
            )
            + "\n"
            for document in source.documents
        ),
    )
    return str(out / "corpus.jsonl")


def _read_chat(options: argparse.Namespace) -> ChatSettings:
    """The settings of --writer chat. Raises ValueError for what is missing."""
    if not options.url.startswith(("http://", "https://")) or not options.model:
        raise ValueError(
            "--writer chat needs --url, the endpoint's base (https://HOST/v1), and --model"
        )
    key = os.environ.get(options.key_env, "").strip() if options.key_env else ""
    if options.key_env and not key:
        raise ValueError(
            f"the environment variable {options.key_env} holds no key for {options.url}: set it, name another one with --key-env, or none "
            "(--key-env=) for an endpoint that needs none"
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"the environment variable {options.key_env} holds characters that no key has, such as a line break"
        )  # without saying the key
    try:
        requests.Request("POST", options.url).prepare()
        urllib3.util.parse_url(options.url).host.encode("idna")
    except (requests.RequestException, UnicodeError) as error:
        raise ValueError(
            f"--url {options.url} is not the address of an endpoint ({error})"
        ) from None
    return ChatSettings(
        url=options.url.rstrip("/"),
        model=options.model,
        key=key,
        count=options.queries,
        backoff=options.backoff,
        **{
            name: getattr(options, name)
            for name in ("temperature", "concurrency", "rate", "timeout", "attempts", "retries")
        },
    )


def render(figures: dict) -> str:
    """The figures as Markdown tables."""
    show = lambda value: "–" if value is None else f"{value:.3f}"
    k, lines = figures["k"], []
    for split, of_split in figures["splits"].items():
        engines = list(of_split["all"]["engines"])
        lines += [
            f"{split}: queries kept by at least half of {len(engines)} engines, first {k} documents",
            "",
            "| hop | sub-questions | with gold in the corpus | with a kept query | written | kept | share |"
            + "".join(f" {engine} finds |" for engine in engines),
            "|---|" + "---|" * (6 + len(engines)),
        ]
        for hop, of_hop in of_split.items():
            lines.append(
                f"| {hop} | {of_hop['sub_questions']} | {of_hop['asked']} | {of_hop['with_key']} | {of_hop['written']} | {of_hop['kept']} | "
                f"{show(of_hop['kept_fraction'])} | "
                + " | ".join(show(of_hop["engines"][engine]["found"]) for engine in engines)
                + " |"
            )
        lines += [
            "",
            f"| {split}, engine | recall@{k} of a kept query | sub-questions that a kept query finds |",
            "|---|---|---|",
        ]
        lines += [
            f"| {engine} | {show(of_one['kept_recall'])} | {show(of_one['reached'])} |"
            for engine, of_one in of_split["all"]["engines"].items()
        ]
        unread, refused = (
            of_split["all"]["unwritten"] - of_split["all"]["refused"],
            of_split["all"]["refused"],
        )
        if unread or refused:
            lines += [
                "",
                f"Sub-questions without a query: {unread} for which no answer of the model held one, {refused} that the endpoint refused",
            ]
        lines.append("")
    return "\n".join(lines).rstrip()


def main(arguments: Sequence[str]) -> None:
    """The command, with the arguments that follow its name. What a user can mend ends it with one line."""
    parser = cli.make_parser("prepare keys", __doc__, "config", "json")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
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
        help=f"who votes, each {FORMS} (bm25:0.9:0.4 bm25:1.2:0.75 bm25:2.0:0.9)",
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=5,
        metavar="N",
        help="queries written for a sub-question, at most (5)",
    )
    parser.add_argument(
        "--writer", choices=("rules", "chat"), default="rules", help="who writes them (rules)"
    )
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
        "--temperature", type=float, default=0.7, metavar="T", help="of the model's sampling (0.7)"
    )
    chat.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (8)"
    )
    chat.add_argument(
        "--rate",
        type=float,
        default=300.0,
        metavar="N",
        help="requests a minute, repeated ones included (300)",
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
        help="how often a request that failed is sent again (6)",
    )
    chat.add_argument(
        "--backoff",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds before the first of these; doubled each time (1)",
    )
    chat.add_argument(
        "--attempts",
        type=int,
        default=3,
        metavar="N",
        help="requests for a sub-question whose answers hold no query (3)",
    )
    run_command(parser, arguments, make_keys, render)
