"""The entities of an Atlas world and the facts about them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict

import numpy as np

from stepsearch_jax.data.atlas_grammar import RELATIONS
from stepsearch_jax.data.atlas_kinds import KINDS, WOMEN

SPLITS = ("train", "validation", "test")
MIN_ENTITIES = 60  # below it, some kinds have too few members for joins
# Name (i, j) of a kind belongs to the split that owns (i + j) mod 4: no name is in two splits, and
# every word is in all of them.
_RESIDUES = {"train": (0, 1), "validation": (2,), "test": (3,)}


@dataclasses.dataclass(frozen=True)
class Entity:
    """One thing of a world. `kind` is a key of KINDS, `name` two words."""

    kind: str
    name: str

    @property
    def pronouns(self) -> tuple[str, str]:
        """Subject pronoun and possessive, in lower case."""
        if self.kind != "person":
            return "it", "its"
        return ("she", "her") if self.name.split()[0] in WOMEN else ("he", "his")


@dataclasses.dataclass(frozen=True)
class World:
    """`facts[row of subject, relation word]` is the row of the object in `entities`."""

    entities: tuple[Entity, ...]
    facts: dict[tuple[int, str], int]


def build_world(*, seed: int, split: str, entities: int) -> World:
    """The world of a split: `entities` entities and their facts.

    Raises ValueError when there are too few entities, or too few names for them.
    """
    if entities < MIN_ENTITIES:
        raise ValueError(f"atlas: a world needs at least {MIN_ENTITIES} entities, not {entities}")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    counts = {word: math.floor(kind.share * entities) for word, kind in KINDS.items()}
    counts["person"] += entities - sum(counts.values())
    named, taken = [], set()
    for word, count in counts.items():
        names = _choose_names(rng, word, split, count, taken)
        taken.update(names)
        named += [Entity(word, name) for name in names]
    return World(tuple(named), _choose_facts(rng, named))


def _choose_names(
    rng: np.random.Generator, word: str, split: str, count: int, taken: set[str]
) -> list[str]:
    """`count` names of a kind, using all words of its pools as evenly as possible.

    A word that never occurs in training could not be read later.
    """
    first, second = KINDS[word].first, KINDS[word].second
    free = defaultdict(list)
    for i, j in itertools.product(range(len(first)), range(len(second))):
        if (i + j) % 4 in _RESIDUES[split] and f"{first[i]} {second[j]}" not in taken:
            free[i].append(j)
    available = sum(len(row) for row in free.values())
    if available < count:
        raise ValueError(
            f"atlas: {count} names of kind {word} are needed in the {split} world, "
            f"but only {available} exist; lower data.atlas.entities"
        )
    names, used = [], Counter()
    while len(names) < count:
        for i in rng.permutation(sorted(i for i in free if free[i])).tolist()[: count - len(names)]:
            fewest = min(used[j] for j in free[i])
            j = pick(rng, [j for j in free[i] if used[j] == fewest])
            free[i].remove(j)
            used[j] += 1
            names.append(f"{first[i]} {second[j]}")
    return names


def _choose_facts(rng: np.random.Generator, entities: list[Entity]) -> dict[tuple[int, str], int]:
    """One object for every subject and relation, if there is one.

    A relation draws its objects from a pool a third the size of its subjects: several subjects
    share an object, so neither half of a join gives its answer away. Within one kind (mothers,
    outlets) facts form a forest, never a circle.
    """
    rows = defaultdict(list)
    for row, entity in enumerate(entities):
        rows[entity.kind].append(row)
    facts: dict[tuple[int, str], int] = {}
    for word, relation in RELATIONS.items():
        subjects = rows[relation.subject]
        possible = [
            row
            for row in rows[relation.object]
            if word != "mother" or entities[row].pronouns[0] == "she"
        ]
        if word == "capital":  # a capital lies in its country
            for subject, city in zip(subjects, rng.permutation(possible).tolist()):
                facts[subject, word] = city
                facts[city, "country"] = subject
            continue
        pool = rng.permutation(possible).tolist()[: max(2, math.ceil(len(subjects) / 3))]
        for subject in subjects:
            objects = pool
            if relation.subject == relation.object and subject in pool:
                objects = pool[: pool.index(subject)]
            if objects:
                facts[subject, word] = pick(rng, objects)
    return facts


def pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]
