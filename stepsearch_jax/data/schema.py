"""Questions as flat rows of strings, as they are stored.

Nested parts are JSON text, so that no stored feature is ragged.
"""

from __future__ import annotations

import dataclasses
import json

from stepsearch_jax.records import Question, SubQuestion

COLUMNS = (
    "uid",
    "question",
    "answer",
    "aliases",
    "sub_questions",
    "shape",
    "loose_gold",
    "unordered",
)


def encode_question(question: Question) -> dict[str, str]:
    """The row of a question."""
    return dict(
        uid=question.uid,
        question=question.question,
        answer=question.answer,
        aliases=_dump(question.aliases),
        sub_questions=_dump([dataclasses.asdict(sub) for sub in question.sub_questions]),
        shape=question.shape,
        loose_gold=_dump([question.loose_gold_ids, question.loose_missing_gold]),
        unordered=_dump(question.unordered),
    )


def decode_question(row: dict[str, str | bytes]) -> Question:
    """The question of a row; values may be UTF-8 bytes, as files return them."""
    texts = {name: _text(row[name]) for name in COLUMNS}
    subs = [
        SubQuestion(
            question=sub["question"],
            answer=sub["answer"],
            aliases=tuple(sub["aliases"]),
            gold_ids=tuple(sub["gold_ids"]),
            queries=tuple(sub["queries"]),
            missing_gold=_pairs(sub["missing_gold"]),
        )
        for sub in json.loads(texts.pop("sub_questions"))
    ]
    ids, missing = json.loads(texts.pop("loose_gold"))
    unordered = json.loads(texts.pop("unordered"))
    return Question(
        **{**texts, "aliases": tuple(json.loads(texts["aliases"]))},
        sub_questions=tuple(subs),
        loose_gold_ids=tuple(ids),
        loose_missing_gold=_pairs(missing),
        unordered=unordered,
    )


def _pairs(values: list[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((title, text) for title, text in values)


def _dump(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
