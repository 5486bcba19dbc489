"""The kinds of entities in Atlas: the words of their names, and their filler sentences."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of entity: a name is a word of `first` and one of `second`.

    `share` is its fraction of a world's entities; no question needs the sentences `fillers`.
    """

    word: str
    share: float
    first: tuple[str, ...]
    second: tuple[str, ...]
    fillers: tuple[str, ...]


def _compose(starts: str, ends: str) -> tuple[str, ...]:
    return tuple(start + end for end in ends.split() for start in starts.split())


WOMEN = _compose("Bel Dar Fen Gal Hal Jor Kel Mir Sel Tam", "ia ine ora")
MEN = _compose("Bel Dar Fen Gal Hal Jor Kel Mir Sel Tam", "en os ric")
SURNAMES = _compose("Ask Brom Cald Dren Farn Grim Holt Kest Lund Marl", "er by wick ley sen mont")
STEMS = _compose("Vel Nor Sar Tor Quil Zan Ost Ryd Wex Pell", "mar dra gard una ith ova")
ADJECTIVES = tuple(
    "Silent Golden Broken Hidden Distant Frozen Gentle Hollow Ivory Jagged Little Modern Narrow "
    "Ancient Scarlet Quiet Restless Tender Velvet Wandering Crystal Burning Empty Wooden".split()
)
NOUNS = tuple(
    "Lantern Garden Mirror Shadow Orchard Compass Harvest Mountain Journey Kitchen Letter Meadow "
    "Needle Ocean Palace Riddle Season Tower Umbrella Voyage Window Anchor Forest Candle".split()
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


def name_groups() -> list[tuple[str, ...]]:
    """Groups of name words that can be exchanged in any text without making another split's name.

    The exchange must be made everywhere at once. The positions of a name's two words in their
    pools, modulo 4, decide which split owns it (`atlas_facts`); these exchanges keep them.
    """
    return [
        pool[residue::4]
        for pool in (WOMEN, MEN, SURNAMES, STEMS, ADJECTIVES, NOUNS)
        for residue in range(4)
    ]
