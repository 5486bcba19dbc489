"""Bamboogle (Press et al., 2023), 125 questions for testing only, as a TFDS builder.

A row: `question, golden_answers[…]` and optionally `id`; or `Question, Answer`, the columns of the
official table. Rows name neither sub-questions nor gold documents, and bring no passages.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Question


def read_question(row: Row, split: str) -> Question:
    """The question of a row."""
    answers = (row.text("Answer"),) if row.has("Answer") else row.texts_or_numbers("golden_answers")
    return Question(
        uid=row.identifier("id", otherwise=split),
        question=row.text("question", "Question"),
        answer=answers[0],
        aliases=answers[1:],
    )


FORMAT = Format(
    name="Bamboogle",
    stems={"test": ("test", "bamboogle")},
    read_question=read_question,
    address="https://docs.google.com/spreadsheets/d/1jwcsA5kE4TObr9YHn9Gc-wQHYjTbLhDGx6tmIzMhl_U, "
    "saved as bamboogle.csv (MIT)",
)


class Bamboogle(OfficialBuilder):
    """Bamboogle."""

    VERSION = tfds.core.Version("1.0.0")
    FORMAT = FORMAT
