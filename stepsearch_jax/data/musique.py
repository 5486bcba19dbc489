"""MuSiQue (Trivedi et al., 2022) from its official rows, as a TFDS builder.

A row: `id, question, answer, answer_aliases, question_decomposition[{question, answer,
paragraph_support_idx}], paragraphs[{idx, title, paragraph_text}]`; all other fields are ignored.
The earlier answers replace #1, #2 … in a sub-question, and its text is its accepted query. A rank
("the #1 single") is no reference; see `_fill`.
"""

from __future__ import annotations

import re

import tensorflow_datasets as tfds

from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Question, SubQuestion

_REFERENCE = re.compile(r"#(\d+)")
# What stands before and behind a rank: "the #1 ranked rower", "how many #1 hits". Behind an only
# #n, which may well be a name ("the #1 season"), these words alone.
_BEFORE_RANK = re.compile(
    r"\b(?:the|a|an|which|what|many|any|most|first|last|his|her|its|their|\d+)\s+$", re.IGNORECASE
)
_BEHIND = re.compile(r"[\s-]+\w")
_BEHIND_ALONE = re.compile(
    r"[\s-]+(?:ranked|rated|ranking|rating|seed|seeded|hits?|singles?|songs?|albums?|records?)\b",
    re.IGNORECASE,
)


def read_passages(row: Row) -> list[tuple[str, str]]:
    """The paragraphs of a row."""
    return list(_paragraphs(row).values())


def read_question(row: Row, split: str) -> Question:
    """The question of a row."""
    if row.values.get("answerable") is False:
        raise row.fault("the question is marked as not answerable; use the files of MuSiQue-Ans")
    paragraphs = _paragraphs(row)
    aliases = row.aliases("answer_aliases")
    hops = row.objects("question_decomposition")
    subs: list[SubQuestion] = []
    for hop in hops:
        support = hop.get("paragraph_support_idx", int)
        if support not in paragraphs:
            raise hop.fault(
                f"paragraph_support_idx {support} is not the idx of a paragraph of this row"
            )
        question = _fill(hop.text("question"), [sub.answer for sub in subs])
        last = len(subs) == len(hops) - 1
        subs.append(
            SubQuestion(
                question=question,
                answer=hop.text("answer"),
                aliases=aliases if last else (),
                queries=(question,),
                missing_gold=(paragraphs[support],),
            )
        )
    uid = row.text("id")
    return Question(
        uid=uid,
        question=row.text("question"),
        answer=row.text("answer"),
        aliases=aliases,
        sub_questions=tuple(subs),
        shape=uid.split("__")[0],
    )


def _paragraphs(row: Row) -> dict[int, tuple[str, str]]:
    """Title and text of each paragraph by its idx."""
    paragraphs: dict[int, tuple[str, str]] = {}
    for paragraph in row.objects("paragraphs"):
        idx = paragraph.get("idx", int)
        if idx in paragraphs:
            raise paragraph.fault(f"idx {idx} is that of another paragraph of this row as well")
        paragraphs[idx] = paragraph.text("title"), paragraph.text("paragraph_text")
    return paragraphs


def _fill(question: str, answers: list[str]) -> str:
    """The sub-question with #n replaced by the n-th earlier answer.

    A #n without an earlier sub-question n is part of the text ("a #40 hit"), and so is a rank: of
    several #n with the same number those that follow an article or "how many" and precede a word
    (or, if all do, all but the last), and "the #1 hit" beside a reference of another number.
    """
    found = [m for m in _REFERENCE.finditer(question) if 1 <= int(m[1]) <= len(answers)]
    kept: set[int] = set()  # where a rank begins
    for number in {m[1] for m in found}:
        same = [m for m in found if m[1] == number]
        ranks = [
            m
            for m in same
            if _BEFORE_RANK.search(question[: m.start()])
            and (_BEHIND if len(same) > 1 else _BEHIND_ALONE).match(question, m.end())
        ]
        if len(ranks) == len(same) > 1:
            ranks.pop()
        kept.update(m.start() for m in ranks)
    if len(kept) == len(found):  # nothing else refers to an earlier answer
        kept.clear()

    def answer(match: re.Match) -> str:
        refers = 1 <= int(match[1]) <= len(answers) and match.start() not in kept
        return answers[int(match[1]) - 1] if refers else match[0]

    return _REFERENCE.sub(answer, question)


FORMAT = Format(
    name="MuSiQue",
    stems={
        "train": ("train", "musique_ans_v1.0_train"),
        "validation": ("validation", "musique_ans_v1.0_dev"),
        "test": ("test",),
    },
    read_question=read_question,
    read_passages=read_passages,
    address="https://github.com/StonyBrookNLP/musique (CC BY 4.0)",
)


class Musique(OfficialBuilder):
    """MuSiQue-Ans."""

    VERSION = tfds.core.Version("1.0.0")
    FORMAT = FORMAT
