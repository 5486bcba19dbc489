"""One's own questions, as a TFDS builder: the form for data sets that have none yet.

The folder holds `train.jsonl`, `validation.jsonl` and `test.jsonl`, at least one of them, and
`corpus.jsonl`. A row of questions:

    question        text
    answers         every accepted answer, the best first; `answer` may hold a single one
    id, shape       optional: a name, and the kind of question, for tables
    gold            optional: the passages that are needed to answer
    sub_questions   optional: the steps, each an object with

        queries     the search queries that would find what the step needs
        gold        the passages that the step needs
        question, answer    optional; without a question, the first query

A passage of `gold` is a title, or a passage's whole text, or an object with both (`title`, `text`).
A row of the corpus has `title` and `text`. Without `gold` a search earns no information gain, and
without `queries` no key reward: such questions train on their answers alone.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Question, SubQuestion


def read_question(row: Row, split: str) -> Question:
    """The question of a row. Raises ValueError with file, line and field."""
    if not (row.has("answers") or row.has("answer")):
        raise row.fault("field 'answers' is missing: a list of the accepted answers")
    whole = not row.has("answers") or (
        isinstance(row.values["answers"], str) and not row.holds_json("answers")
    )
    answers = (row.text("answers", "answer"),) if whole else row.answers("answers")
    steps = (
        row.objects("sub_questions") if row.values.get("sub_questions") not in (None, []) else []
    )
    return Question(
        uid=row.identifier("id", otherwise=split),
        question=row.text("question"),
        answer=answers[0],
        aliases=answers[1:],
        sub_questions=tuple(map(_read_step, steps)),
        shape=row.text("shape") if row.has("shape") else f"{len(steps)}hop" if steps else "",
        loose_missing_gold=_read_gold(row),
    )


def _read_step(row: Row) -> SubQuestion:
    queries = row.texts("queries") if row.has("queries") else ()
    if not all(query.strip() for query in queries):
        raise row.fault("'queries' should hold no empty query")
    if not (queries or row.has("question")):
        raise row.fault("it needs 'queries' or a 'question'")
    return SubQuestion(
        question=row.text("question") if row.has("question") else queries[0],
        answer=row.text("answer") if row.has("answer") else "",
        queries=tuple(dict.fromkeys(queries)),
        missing_gold=_read_gold(row),
    )


def _read_gold(row: Row) -> tuple[tuple[str, str], ...]:
    """Title and text of the gold passages; title "" = the text may be either."""
    entries = row.values.get("gold")
    if entries is None:
        return ()
    columns = isinstance(entries, dict) and isinstance(entries.get("title"), list)
    if columns or row.holds_json("gold"):
        entries = row.get("gold", list)
    passages = []
    for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if isinstance(entry, dict):
            if not entry.get("text"):
                raise row.fault(f"gold[{i}] has no 'text': write the title alone, as a string")
            passage = Row(entry, f"{row.where}, gold[{i}]", row.number)
            passages.append((passage.text("title"), passage.text("text")))
        elif isinstance(entry, str) and entry.strip():
            passages.append(("", entry))
        else:
            raise row.fault(
                f"gold[{i}] should be a title, a passage's text, or an object with title and text"
            )
    return tuple(dict.fromkeys(passages))


FORMAT = Format(
    name="your own questions",
    stems={"train": ("train",), "validation": ("validation",), "test": ("test",)},
    read_question=read_question,
    address="your own files: docs/data.md shows the rows",
)


class Jsonl(OfficialBuilder):
    """One's own questions and corpus."""

    VERSION = tfds.core.Version("1.0.0")
    FORMAT = FORMAT
