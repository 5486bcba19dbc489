"""The words of Atlas: names, sentence patterns, question phrasings. All of it is fixed: a seed chooses among these words and never adds one.

Placeholders: {S} the subject at the start of a sentence, {P} "His", "Her" or "Its", {p} the same in lower case, {o} the object, {x} the thing asked
about (a name, or a noun phrase in nested questions), {n} {y} {c} {h} filler values.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Kind:
    """An entity type. A name is a word of `first` and one of `second`; `share` is its part of a world; no question needs `fillers`."""

    word: str
    share: float
    first: tuple[str, ...]
    second: tuple[str, ...]
    fillers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Relation:
    """A functional relation. `word` names it in queries, `phrases` are noun phrases of its object, `clause` follows "who" or "that" in joins."""

    word: str
    subject: str
    object: str
    patterns: tuple[str, ...]
    phrases: tuple[str, ...]
    clause: str


def _compose(starts: str, ends: str) -> tuple[str, ...]:
    return tuple(start + end for end in ends.split() for start in starts.split())


WOMEN = _compose("Bel Dar Fen Gal Hal Jor Kel Mir Sel Tam", "ia ine ora")
MEN = _compose("Bel Dar Fen Gal Hal Jor Kel Mir Sel Tam", "en os ric")
SURNAMES = _compose("Ask Brom Cald Dren Farn Grim Holt Kest Lund Marl", "er by wick ley sen mont")
STEMS = _compose("Vel Nor Sar Tor Quil Zan Ost Ryd Wex Pell", "mar dra gard una ith ova")
ADJECTIVES = tuple(
    "Silent Golden Broken Hidden Distant Frozen Gentle Hollow Ivory Jagged Little Modern Narrow Ancient Scarlet Quiet Restless Tender "
    "Velvet Wandering Crystal Burning Empty Wooden".split()
)
NOUNS = tuple(
    "Lantern Garden Mirror Shadow Orchard Compass Harvest Mountain Journey Kitchen Letter Meadow Needle Ocean Palace Riddle Season Tower "
    "Umbrella Voyage Window Anchor Forest Candle".split()
)

NUMBERS = tuple("20 30 40 50 60 70 80 90".split())
YEARS = tuple("1820 1835 1850 1865 1880 1895 1910 1925".split())
COLOURS = tuple("red blue green white black grey yellow brown".split())
HOBBIES = tuple("painting chess music fishing dancing gardening poetry sailing".split())

KINDS = {
    kind.word: kind
    for kind in (
        Kind(
            "person",
            0.36,
            WOMEN + MEN,
            SURNAMES,
            (
                "{S} enjoys {h} in the evening.",
                "{P} favourite colour is {c}.",
                "{S} keeps {n} {c} birds.",
                "{S} has won {n} prizes for {h}.",
            ),
        ),
        Kind(
            "city",
            0.15,
            tuple("Port Fort Mount Lake Saint New Old Upper Lower Great".split()),
            STEMS,
            (
                "{S} has about {n} thousand inhabitants.",
                "{S} is known for its {c} roofs.",
                "{S} has a festival of {h}.",
                "{P} market sells {c} cloth.",
            ),
        ),
        Kind(
            "country",
            0.07,
            STEMS,
            tuple("Republic Kingdom Union Islands Federation".split()),
            (
                "{S} has about {n} million inhabitants.",
                "{P} flag shows a {c} star.",
                "{S} is proud of its {h}.",
                "{S} has {n} public holidays.",
            ),
        ),
        Kind(
            "company",
            0.12,
            STEMS + SURNAMES,
            tuple("Group Mills Motors Foods Traders Bank".split()),
            (
                "{S} has about {n} thousand workers.",
                "{P} sign is painted {c}.",
                "{S} sells goods for {h}.",
                "{S} was opened in {y}.",
            ),
        ),
        Kind(
            "university",
            0.08,
            STEMS,
            tuple("Institute College Academy Seminary Polytechnic".split()),
            (
                "{S} has about {n} thousand students.",
                "{P} library is painted {c}.",
                "{S} is known for {h}.",
                "{S} was opened in {y}.",
            ),
        ),
        Kind(
            "book",
            0.08,
            ADJECTIVES,
            NOUNS,
            (
                "{S} has {n} chapters.",
                "{P} cover is {c}.",
                "{S} is about {h}.",
                "{S} appeared in {y}.",
            ),
        ),
        Kind(
            "film",
            0.07,
            ADJECTIVES,
            NOUNS,
            (
                "{S} lasts {n} minutes.",
                "{P} poster is {c}.",
                "{S} is about {h}.",
                "{S} appeared in {y}.",
            ),
        ),
        Kind(
            "river",
            0.07,
            STEMS,
            tuple("Creek Brook Stream Rapids Burn".split()),
            (
                "{S} is about {n} miles long.",
                "{P} water looks {c}.",
                "{S} is known for {h}.",
                "{S} is crossed by {n} bridges.",
            ),
        ),
    )
}

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

QUESTION_FORMS = (
    "{who} is {x}?",
    "Name {x}.",
    "Find {x}.",
    "Which {kind} is {x}?",
)  # {who}: "Who" or "What", {kind}: type of the answer
_WORD = re.compile(r"[A-Za-z0-9]+|[.,?]")


def ask(noun_phrase: str, kind: str, form: int) -> str:
    """The question whose answer is `noun_phrase`, of type `kind`, in the phrasing QUESTION_FORMS[form]."""
    start = f"the {kind} {_relative(kind)} "
    if QUESTION_FORMS[form].startswith("Which") and noun_phrase.startswith(
        start
    ):  # not: Which person is the person who …?
        return f"Which {kind} {noun_phrase.removeprefix(start)}?"
    return QUESTION_FORMS[form].format(
        who="Who" if kind == "person" else "What", kind=kind, x=noun_phrase
    )


def join_phrase(kind: str, clauses: list[str]) -> str:
    """The noun phrase of the one `kind` of which both clauses hold."""
    return f"the {kind} {_relative(kind)} {clauses[0]} and {clauses[1]}"


def _relative(kind: str) -> str:
    return "who" if kind == "person" else "that"


def split_words(text: str) -> list[str]:
    """Words and punctuation marks of an Atlas text, in order."""
    return _WORD.findall(text)


def vocabulary() -> list[str]:
    """Every word and punctuation mark of any Atlas article, question, sub-question, query, answer or alias, sorted. The same for every seed."""
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


def name_groups() -> list[tuple[str, ...]]:
    """Words of names that may be exchanged for one another, all at once, in any text of a split without making a name of another split.

    Which split owns a name depends on the positions of its two words in their pools modulo 4 (`atlas_world`), and these exchanges keep them.
    """
    return [
        pool[residue::4]
        for pool in (WOMEN, MEN, SURNAMES, STEMS, ADJECTIVES, NOUNS)
        for residue in range(4)
    ]
