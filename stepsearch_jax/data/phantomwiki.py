"""PhantomWiki (Gong et al., 2025), made-up universes of people, as a TFDS builder.

Files `questions` and `articles`; one split, test. A row of `questions`: `id, question, answer[…],
difficulty` and, if the way to the answer is known, `hops[{relation, gold_titles[…], values[…]}]`.
Several answers are one answer, a list with commas: all of them are wanted, in any order. A hop is a
sub-question about the people of `gold_titles`, whose articles are its gold documents; the question
about each of them alone is an accepted query. A first hop that looks up who has a trait (an
occupation, a hobby, a date of birth) asks for the people instead.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Question, SubQuestion

TRAITS = {"job": "occupation", "hobby": "hobby", "dob": "date of birth", "gender": "gender"}


def read_question(row: Row, split: str) -> Question:
    """The question of a row."""
    question, answers = row.text("question"), row.answers("answer")
    hops = row.objects("hops") if row.has("hops") else []
    subs = [_read_hop(hop, n == 0, question) for n, hop in enumerate(hops)]
    return Question(
        uid=row.identifier("id", otherwise=split),
        question=question,
        answer=", ".join(answers),
        sub_questions=tuple(subs),
        shape=f"difficulty {row.get('difficulty', int)}",
        unordered=len(answers) > 1,
    )


def _read_hop(hop: Row, first: bool, question: str) -> SubQuestion:
    relation = hop.text("relation")
    titles, values = hop.answers("gold_titles"), hop.answers("values")
    gold = tuple((title, "") for title in titles)
    # The question names the trait's value, but none of the people.
    names_value = values[0] in question and not any(title in question for title in titles)
    if first and relation in TRAITS and names_value:
        asked = f"Who is the person whose {TRAITS[relation]} is {values[0]}?"
        return SubQuestion(
            question=asked, answer=", ".join(titles), queries=(asked,), missing_gold=gold
        )
    start = f"What is the {TRAITS[relation]}" if relation in TRAITS else f"Who is the {relation}"
    return SubQuestion(
        question=f"{start} of {', '.join(titles)}?",
        answer=", ".join(values),
        queries=tuple(f"{start} of {title}?" for title in titles),
        missing_gold=gold,
    )


FORMAT = Format(
    name="PhantomWiki",
    stems={"test": ("questions",)},
    read_question=read_question,
    corpus_stems=("articles", "corpus"),
    address="https://huggingface.co/datasets/kilian-group/phantom-wiki-v1 "
    "or the generator, https://github.com/kilian-group/phantom-wiki (MIT)",
)


class PhantomWiki(OfficialBuilder):
    """PhantomWiki; one folder per universe."""

    VERSION = tfds.core.Version("1.0.0")
    FORMAT = FORMAT
