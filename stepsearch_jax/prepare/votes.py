"""The vote of search engines on queries, and what it kept: figures and tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from stepsearch_jax.records import Question

Keys = dict[tuple[int, int], tuple[str, ...]]  # (question, hop), from 0 -> queries


def count_votes(
    found: Sequence[dict[str, list[int]]], query: str, gold: Sequence[int]
) -> list[bool]:
    """For each engine: whether it returned a gold document for the query."""
    return [not set(gold).isdisjoint(of_engine[query]) for of_engine in found]


def is_kept(votes: Sequence[bool]) -> bool:
    """Whether at least ⌈M/2⌉ of M engines vote for a query (StepSearch, data pipeline)."""
    return 2 * sum(votes) >= len(votes)


def list_hops(questions: Sequence[Question]) -> list[tuple[int, int]]:
    """(question, hop) of the sub-questions with a gold document in the corpus.

    For the others no query could be kept.
    """
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
    all_votes: dict[tuple[int, int, str], list[bool]],
    engines: Sequence[str],
) -> dict:
    """What the vote kept, over all hops and for each hop.

    refused: the sub-questions of `written` that the writer's endpoint refused.

    -> for each of these: sub_questions; asked, those with a gold document in the corpus; unwritten,
    asked ones without a query; refused, unwritten ones that the endpoint refused; with_key, asked
    ones with a kept query; written and kept, numbers of queries; kept_fraction; and for each engine
    `found`, the fraction of written queries for which it returns a gold document; `kept_recall`,
    the same for kept queries; `reached`, the fraction of asked sub-questions for which it finds a
    gold document with a kept query. None if there is nothing to measure.
    """
    hops = max((len(question.sub_questions) for question in questions), default=0)
    groups = {"all": range(hops)} | {f"hop {hop + 1}": (hop,) for hop in range(hops)}
    figures = {}
    for name, wanted in groups.items():
        # the votes of this group: by sub-question, by query, and by kept query
        places = [place for place in written if place[1] in wanted]
        of_sub = [[all_votes[*place, query] for query in written[place]] for place in places]
        of_query = [votes for group in of_sub for votes in group]
        kept = [votes for votes in of_query if is_kept(votes)]
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
            kept_fraction=_average(map(is_kept, of_query)),
            engines={
                engine: dict(
                    found=_average(votes[number] for votes in of_query),
                    kept_recall=_average(votes[number] for votes in kept),
                    reached=_average(
                        any(votes[number] for votes in group if is_kept(votes)) for group in of_sub
                    ),
                )
                for number, engine in enumerate(engines)
            },
        )
    return figures


def _average(values: Iterable[bool]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def render(figures: dict) -> str:
    """The figures as Markdown tables."""
    show = lambda value: "–" if value is None else f"{value:.3f}"
    k, lines = figures["k"], []
    for split, of_split in figures["splits"].items():
        # a row for all hops and for each hop
        engines = list(of_split["all"]["engines"])
        lines += [
            f"{split}: queries kept by at least half of {len(engines)} engines, first {k} "
            "documents",
            "",
            "| hop | sub-questions | with gold in the corpus | with a kept query | written | kept "
            "| fraction |" + "".join(f" {engine} finds |" for engine in engines),
            "|---|" + "---|" * (6 + len(engines)),
        ]
        for hop, of_hop in of_split.items():
            counts = [of_hop[n] for n in ("sub_questions", "asked", "with_key", "written", "kept")]
            found = [show(of_hop["engines"][engine]["found"]) for engine in engines]
            cells = [hop, *map(str, counts), show(of_hop["kept_fraction"]), *found]
            lines.append(f"| {' | '.join(cells)} |")
        # a row for each engine
        lines += [
            "",
            f"| {split}, engine | recall@{k} of a kept query "
            "| sub-questions that a kept query finds |",
            "|---|---|---|",
        ]
        lines += [
            f"| {engine} | {show(of_one['kept_recall'])} | {show(of_one['reached'])} |"
            for engine, of_one in of_split["all"]["engines"].items()
        ]
        refused = of_split["all"]["refused"]
        unread = of_split["all"]["unwritten"] - refused
        if unread or refused:
            lines += [
                "",
                f"Sub-questions without a query: {unread} for which the model's answers held none, "
                f"{refused} that the endpoint refused",
            ]
        lines.append("")
    return "\n".join(lines).rstrip()
