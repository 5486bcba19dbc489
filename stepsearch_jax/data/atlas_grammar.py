"""The relations of Atlas: their sentence patterns and question phrasings.

Placeholders: {S} the subject at the start of a sentence, {P} "His", "Her" or "Its", {p} the same in
lower case, {o} the object, {x} the thing asked about (a name, or a noun phrase in nested
questions), {n} {y} {c} {h} filler values. All words are fixed: a seed chooses among them and never
adds one.
"""

from __future__ import annotations

import dataclasses
import re

from stepsearch_jax.data.atlas_kinds import COLOURS, HOBBIES, KINDS, NUMBERS, YEARS


@dataclasses.dataclass(frozen=True)
class Relation:
    """A functional relation: one object per subject.

    `word` names it in queries, `phrases` are noun phrases of its object, and `clause` follows "who"
    or "that" in joins.
    """

    word: str
    subject: str
    object: str
    patterns: tuple[str, ...]
    phrases: tuple[str, ...]
    clause: str


RELATIONS = {
    relation.word: relation
    for relation in (
        Relation(
            "mother",
            "person",
            "person",
            (
                "{S} was raised by {p} mother {o}.",
                "{P} mother is called {o}.",
                "{S} is a child of {o}.",
            ),
            ("the mother of {x}", "the woman who raised {x}"),
            "is a child of {x}",
        ),
        Relation(
            "birthplace",
            "person",
            "city",
            (
                "{S} was born in the city of {o}.",
                "{P} birthplace is the city of {o}.",
                "{S} grew up in {p} birthplace {o}.",
            ),
            ("the birthplace of {x}", "the birth city of {x}"),
            "was born in {x}",
        ),
        Relation(
            "employer",
            "person",
            "company",
            (
                "{S} works for {p} employer {o}.",
                "{P} employer is the company {o}.",
                "{S} is employed by the company {o}.",
            ),
            ("the employer of {x}", "the company that employs {x}"),
            "works for {x}",
        ),
        Relation(
            "school",
            "person",
            "university",
            (
                "{S} studied at the university {o}.",
                "{P} school is called {o}.",
                "{S} went to school at {o}.",
            ),
            ("the school of {x}", "the university that taught {x}"),
            "studied at {x}",
        ),
        Relation(
            "country",
            "city",
            "country",
            (
                "{S} lies in the country {o}.",
                "{P} country is {o}.",
                "{S} is found in the country {o}.",
            ),
            ("the country of {x}", "the country that contains {x}"),
            "lies in {x}",
        ),
        Relation(
            "river",
            "city",
            "river",
            (
                "{S} stands on the river {o}.",
                "{P} river is called {o}.",
                "{S} was built beside the river {o}.",
            ),
            ("the river of {x}", "the river that crosses {x}"),
            "stands on {x}",
        ),
        Relation(
            "mayor",
            "city",
            "person",
            (
                "{S} is governed by the mayor {o}.",
                "{P} mayor is called {o}.",
                "{S} has elected the mayor {o}.",
            ),
            ("the mayor of {x}", "the person who governs {x}"),
            "is governed by {x}",
        ),
        Relation(
            "capital",
            "country",
            "city",
            (
                "{S} has the capital {o}.",
                "{P} capital is the city of {o}.",
                "{S} is ruled from its capital {o}.",
            ),
            ("the capital of {x}", "the capital city of {x}"),
            "is ruled from {x}",
        ),
        Relation(
            "president",
            "country",
            "person",
            (
                "{S} is led by the president {o}.",
                "{P} president is called {o}.",
                "{S} has elected the president {o}.",
            ),
            ("the president of {x}", "the person who leads {x}"),
            "is led by {x}",
        ),
        Relation(
            "founder",
            "company",
            "person",
            (
                "{S} was founded by {o}.",
                "{P} founder is called {o}.",
                "{S} was started by its founder {o}.",
            ),
            ("the founder of {x}", "the person who founded {x}"),
            "was founded by {x}",
        ),
        Relation(
            "headquarters",
            "company",
            "city",
            (
                "{S} has its headquarters in {o}.",
                "{P} headquarters are in {o}.",
                "{S} is based in the city of {o}.",
            ),
            ("the headquarters of {x}", "the headquarters city of {x}"),
            "is based in {x}",
        ),
        Relation(
            "campus",
            "university",
            "city",
            (
                "{S} has its campus in {o}.",
                "{P} campus is in the city of {o}.",
                "{S} teaches on a campus in {o}.",
            ),
            ("the campus of {x}", "the campus city of {x}"),
            "teaches in {x}",
        ),
        Relation(
            "rector",
            "university",
            "person",
            (
                "{S} is headed by the rector {o}.",
                "{P} rector is called {o}.",
                "{S} has chosen the rector {o}.",
            ),
            ("the rector of {x}", "the person who heads {x}"),
            "is headed by {x}",
        ),
        Relation(
            "author",
            "book",
            "person",
            (
                "{S} was written by {o}.",
                "{P} author is called {o}.",
                "{S} is the work of the author {o}.",
            ),
            ("the author of {x}", "the person who wrote {x}"),
            "was written by {x}",
        ),
        Relation(
            "publisher",
            "book",
            "company",
            (
                "{S} was published by the company {o}.",
                "{P} publisher is called {o}.",
                "{S} was printed by its publisher {o}.",
            ),
            ("the publisher of {x}", "the company that published {x}"),
            "was published by {x}",
        ),
        Relation(
            "director",
            "film",
            "person",
            (
                "{S} was directed by {o}.",
                "{P} director is called {o}.",
                "{S} is the work of the director {o}.",
            ),
            ("the director of {x}", "the person who directed {x}"),
            "was directed by {x}",
        ),
        Relation(
            "novel",
            "film",
            "book",
            (
                "{S} is based on the novel {o}.",
                "{P} story comes from the novel {o}.",
                "{S} follows the novel {o}.",
            ),
            ("the novel behind {x}", "the book that inspired {x}"),
            "is based on {x}",
        ),
        Relation(
            "source",
            "river",
            "country",
            (
                "{S} rises in the country {o}.",
                "{P} source is in the country {o}.",
                "{S} has its source in {o}.",
            ),
            ("the source of {x}", "the source country of {x}"),
            "rises in {x}",
        ),
        Relation(
            "outlet",
            "river",
            "river",
            (
                "{S} flows into the river {o}.",
                "{P} outlet is the river {o}.",
                "{S} ends in its outlet {o}.",
            ),
            ("the outlet of {x}", "the river that receives {x}"),
            "flows into {x}",
        ),
    )
}

# {who}: "Who" or "What", {kind}: kind of the answer.
QUESTION_FORMS = ("{who} is {x}?", "Name {x}.", "Find {x}.", "Which {kind} is {x}?")
_WORD = re.compile(r"[A-Za-z0-9]+|[.,?]")


def ask(noun_phrase: str, kind: str, form: int) -> str:
    """The question whose answer is `noun_phrase`, of this kind, in the phrasing of this form."""
    start = f"the {kind} {_relative(kind)} "
    # Not: Which person is the person who …?
    if QUESTION_FORMS[form].startswith("Which") and noun_phrase.startswith(start):
        return f"Which {kind} {noun_phrase.removeprefix(start)}?"
    who = "Who" if kind == "person" else "What"
    return QUESTION_FORMS[form].format(who=who, kind=kind, x=noun_phrase)


def join_phrase(kind: str, clauses: list[str]) -> str:
    """The noun phrase of the one entity of this kind for which both clauses hold."""
    return f"the {kind} {_relative(kind)} {clauses[0]} and {clauses[1]}"


def _relative(kind: str) -> str:
    return "who" if kind == "person" else "that"


def split_words(text: str) -> list[str]:
    """Words and punctuation marks of an Atlas text, in order."""
    return _WORD.findall(text)


def vocabulary() -> list[str]:
    """Every word and punctuation mark of any Atlas text, sorted; the same for every seed.

    Texts are articles, questions, sub-questions, queries, answers and aliases.
    """
    texts = [
        "Who What who that and the The It He She His Her Its his her its . , ?",
        *NUMBERS,
        *YEARS,
        *COLOURS,
        *HOBBIES,
        *QUESTION_FORMS,
    ]
    for kind in KINDS.values():
        texts += [kind.word, *kind.first, *kind.second, *kind.fillers]
    for relation in RELATIONS.values():
        texts += [relation.word, relation.clause, *relation.patterns, *relation.phrases]
    return sorted({word for text in texts for word in split_words(re.sub(r"\{\w+\}", " ", text))})
