"""The released training rows of StepSearch (arXiv 2505.15107), as a TFDS builder.

`python -m stepsearch_jax.prepare keys` writes the same form. A row: `question, final_answer,
answer_aliases, sub_searchs[[query, …], …], sub_support_docs[{title, paragraph_text}, …]`;
optionally `id`, `shape`, `sub_questions[…]`, `sub_answers[…]` and `sub_answer_aliases[[…], …]`, one
for each list of queries; `support_docs`, gold documents of the question as a whole; and
`unordered`, whether an answer is a list with commas whose entries may stand in any order.

A list of queries is a sub-question; without `sub_questions`, its text is its first query, and no
list may be empty. If there are as many documents (or lists of them) as lists of queries, each is
the gold document of its sub-question; otherwise all belong to the question as a whole.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Question, SubQuestion


def read_queries(row: Row, name: str, empty: bool = False) -> list[tuple[str, ...]]:
    """The accepted queries of each sub-question. empty: a list may be empty."""
    groups = row.lists(name)
    for i, group in enumerate(groups):
        if not (group or empty) or not all(
            isinstance(query, str) and query.strip() for query in group
        ):
            raise row.fault(f"{name}[{i}] should hold at least one query, and nothing but queries")
    return [tuple(dict.fromkeys(group)) for group in groups]


def read_documents(row: Row, name: str) -> list[list[tuple[str, str]]]:
    """Groups of gold documents, title and text; a document that the row names alone is a group.

    A text of "" stands for the document with this title.
    """
    groups = []
    for i, entry in enumerate(row.get(name, list)):
        documents = [
            Row(value, f"{row.where}, {name}[{i}]", row.number) if isinstance(value, dict) else None
            for value in (entry if isinstance(entry, list) else [entry])
        ]
        if None in documents:
            raise row.fault(
                f"{name}[{i}] should be an object with title and paragraph_text, or a list of such"
            )
        groups.append([_read_document(document) for document in documents])
    return groups


def _read_document(row: Row) -> tuple[str, str]:
    return row.text("title"), row.text("paragraph_text") if row.has("paragraph_text") else ""


def make_sub_questions(
    queries: list[tuple[str, ...]],
    documents: list[list[tuple[str, str]]],
    questions=(),
    answers=(),
    aliases=(),
) -> dict:
    """Sub-questions and loose gold documents, as arguments of Question.

    questions, answers, aliases: one for each list of queries, or ().
    """
    paired = len(queries) == len(documents)
    subs = []
    for i, group in enumerate(queries):
        subs.append(
            SubQuestion(
                question=questions[i] if questions else group[0],
                answer=answers[i] if answers else "",
                aliases=aliases[i] if aliases else (),
                queries=group,
                missing_gold=tuple(documents[i]) if paired else (),
            )
        )
    return dict(sub_questions=tuple(subs), loose_missing_gold=() if paired else _join(documents))


def _join(groups: list[list[tuple[str, str]]]) -> tuple[tuple[str, str], ...]:
    return tuple(document for group in groups for document in group)


def read_passages(row: Row) -> list[tuple[str, str]]:
    """The gold documents of a row, except those named by title alone; it has no others."""
    groups = read_documents(row, "sub_support_docs")
    groups += read_documents(row, "support_docs") if row.has("support_docs") else []
    return [(title, text) for group in groups for title, text in group if text]


def read_question(row: Row, split: str) -> Question:
    """The question of a row."""
    queries = read_queries(row, "sub_searchs", empty=row.has("sub_questions"))
    given = {
        name: row.texts(name) if row.has(name) else () for name in ("sub_questions", "sub_answers")
    }
    given["sub_answer_aliases"] = (
        read_queries(row, "sub_answer_aliases", empty=True) if row.has("sub_answer_aliases") else ()
    )
    for name, values in given.items():
        if values and len(values) != len(queries):
            raise row.fault(
                f"{name!r} has {len(values)} entries, but 'sub_searchs' has {len(queries)}"
            )
    parts = make_sub_questions(queries, read_documents(row, "sub_support_docs"), *given.values())
    if row.has("support_docs"):
        parts["loose_missing_gold"] += _join(read_documents(row, "support_docs"))
    return Question(
        uid=row.identifier("id", otherwise=split),
        question=row.text("question"),
        answer=row.text("final_answer"),
        aliases=row.aliases("answer_aliases"),
        shape=row.text("shape") if row.has("shape") else f"{len(queries)}hop",
        unordered=row.has("unordered") and row.get("unordered", bool),
        **parts,
    )


FORMAT = Format(
    name="StepSearch",
    stems={
        "train": ("train", "musi_answerable_train"),
        "validation": ("validation", "musi_answerable_dev"),
    },
    read_question=read_question,
    read_passages=read_passages,
    address="https://github.com/Zillwang/StepSearch",
)


class StepSearch(OfficialBuilder):
    """Rows in the form that StepSearch released."""

    VERSION = tfds.core.Version("1.0.0")
    FORMAT = FORMAT
