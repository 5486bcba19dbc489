"""2WikiMultihopQA (Ho et al., 2020) from its official rows, as a TFDS builder.

A row: as HotpotQA's, with `evidences[[subject, relation, object]]`. Every evidence is a
sub-question that asks for the object; its text comes from `qa_pairs` if the row has them, and from
subject and relation otherwise. Objects of the same subject and relation are answers of one
sub-question. The gold document of a sub-question is its subject's article. Subjects and articles do
not always have the same name: an article without a certain subject stays a gold document of the
question as a whole.
"""

from __future__ import annotations

import re

import tensorflow_datasets as tfds

from stepsearch_jax.data import hotpotqa
from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Question, SubQuestion
from stepsearch_jax.words import compose

_BRACKETS = re.compile(r"\s*\([^()]*\)$")  # "Get Low (Dillon Francis song)"


def read_question(row: Row, split: str) -> Question:
    """The question of a row."""
    gold = hotpotqa.read_gold(row)
    hops = _read_hops(row)
    titles = match_titles(list(dict.fromkeys(subject for subject, _ in hops)), list(gold))
    subs = []
    for (subject, _), (question, *answers) in hops.items():
        articles = ((titles[subject], gold[titles[subject]]),) if subject in titles else ()
        subs.append(
            SubQuestion(
                question=question,
                answer=answers[0],
                aliases=tuple(answers[1:]),
                queries=(question,),
                missing_gold=articles,
            )
        )
    loose = tuple((title, text) for title, text in gold.items() if title not in titles.values())
    return Question(
        uid=row.identifier("_id", "id", otherwise=split),
        question=row.text("question"),
        answer=row.text("answer"),
        sub_questions=tuple(subs),
        shape=row.text("type"),
        loose_missing_gold=loose,
    )


def match_titles(subjects: list[str], titles: list[str]) -> dict[str, str]:
    """Subject -> title of its article.

    The same text, else the same apart from case and a bracket at the end, else the only ones left
    of both.
    """
    found = {subject: subject for subject in subjects if subject in titles}

    def left() -> tuple[list[str], list[str]]:
        open_subjects = [subject for subject in subjects if subject not in found]
        return open_subjects, [title for title in titles if title not in found.values()]

    open_subjects, open_titles = left()
    for subject in open_subjects:
        alike = [
            title
            for title in open_titles
            if title not in found.values() and _plain(title) == _plain(subject)
        ]
        if len(alike) == 1:
            found[subject] = alike[0]
    open_subjects, open_titles = left()
    if len(open_subjects) == len(open_titles) == 1:
        found[open_subjects[0]] = open_titles[0]
    return found


def _plain(title: str) -> str:
    return _BRACKETS.sub("", compose(title)).casefold()


def _read_hops(row: Row) -> dict[tuple[str, str], list[str]]:
    """(subject, relation) -> the sub-question and its answers."""
    # The second names: "fact" and "entity", as some copies on the Hugging Face Hub have them.
    evidences = row.lists("evidences", ("subject", "fact"), ("relation",), ("object", "entity"))
    written = None
    if row.has("qa_pairs"):
        written = [pair.text("question") for pair in row.objects("qa_pairs")]
        if len(written) != len(evidences):
            raise row.fault(
                f"'qa_pairs' holds {len(written)} pairs for {len(evidences)} evidences; "
                "it should hold one for each"
            )
    hops: dict[tuple[str, str], list[str]] = {}
    for i, evidence in enumerate(evidences):
        match evidence:
            case [str(subject), str(relation), str(answer)] if (
                subject.strip() and relation.strip() and answer.strip()
            ):
                question = written[i] if written else f"What is the {relation} of {subject}?"
                hops.setdefault((subject, relation), [question]).append(answer)
            case _:
                raise row.fault(f"evidences[{i}] should be a subject, a relation and an object")
    return hops


FORMAT = Format(
    name="2WikiMultihopQA",
    stems={"train": ("train",), "validation": ("validation", "dev")},
    read_question=read_question,
    read_passages=hotpotqa.read_passages,
    address="https://github.com/Alab-NII/2wikimultihop (Apache-2.0)",
)


class TwoWiki(OfficialBuilder):
    """2WikiMultihopQA."""

    VERSION = tfds.core.Version("1.0.0")
    FORMAT = FORMAT
