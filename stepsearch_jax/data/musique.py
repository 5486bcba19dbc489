"""MuSiQue (Trivedi et al., 2022) from its official rows, as a TFDS builder.

A row: `id, question, answer, answer_aliases, question_decomposition[{question, answer,
paragraph_support_idx}], paragraphs[{idx, title, paragraph_text}]`; all other fields are ignored.
The earlier answers replace #1, #2 … in a sub-question, and its text is its accepted query.
"""

from __future__ import annotations

import re

import tensorflow_datasets as tfds

from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Question, SubQuestion

_REFERENCE = re.compile(r"#(\d+)")


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
        question = _fill(hop.text("question"), [sub.answer for sub in subs], len(hops), hop)
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


def _fill(question: str, answers: list[str], hops: int, hop: Row) -> str:
    """The sub-question with #n replaced by the n-th earlier answer.

    A number beyond the decomposition is part of the text ("a #40 hit").
    """

    def answer(match: re.Match) -> str:
        number = int(match[1])
        if not 1 <= number <= hops:
            return match[0]
        if number > len(answers):
            raise hop.fault(f"{match[0]} refers to a sub-question that does not come before it")
        return answers[number - 1]

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
