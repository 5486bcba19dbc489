"""Synthetic worlds: entities, facts, their articles, and the multi-hop questions that the articles answer.

A world is made from a seed alone. Worlds of different splits share the words of the grammar but no entity name, so only the skill of searching
carries over. Facts are functional (one object per subject and relation) and stand only in the subject's article: the gold document of a hop is its
subject's article, that of a join ("Which person was born in #1 and works for #2?") is the article of the answer.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from collections import Counter, defaultdict

import numpy as np

from stepsearch_jax.data.atlas_grammar import (
    COLOURS,
    HOBBIES,
    KINDS,
    NUMBERS,
    QUESTION_FORMS,
    RELATIONS,
    WOMEN,
    YEARS,
    Relation,
    ask,
    join_phrase,
    vocabulary,
)
from stepsearch_jax.records import Document, Question, SubQuestion

__all__ = [
    "SHAPES",
    "SPLITS",
    "Entity",
    "World",
    "build_world",
    "make_worlds",
    "vocabulary",
    "write_articles",
]

SPLITS = ("train", "validation", "test")
SHAPES = {  # graph shape -> for each sub-question, the earlier ones whose answers it needs: none = it starts from the question, two = a join
    "2hop": ((), (0,)),
    "3hop_chain": ((), (0,), (1,)),
    "3hop_join": ((), (), (0, 1)),
    "4hop_chain": ((), (0,), (1,), (2,)),
    "4hop_branch": ((), (0,), (), (1, 2)),
    "4hop_after": ((), (), (0, 1), (2,)),
}
MIN_ENTITIES = 60  # below it, some kinds have too few members for joins
MIN_QUERIES = 3  # a sub-question keeps at least so many accepted queries
PATIENCE = 5000  # so many draws in a row without a new path mean that there are hardly any more
TOP_K = 3  # an accepted query finds its gold document among so many
# Name (i, j) of a kind belongs to the split that owns (i + j) mod 4: no name in two splits, every word in all of them.
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


_WORD = re.compile(r"\w+")

# A hop is (subject row, relation word); a join is (answer row, first relation word, second relation word).
_Hop = tuple[int, str]
_Join = tuple[int, str, str]


def build_world(*, seed: int, split: str, entities: int) -> World:
    """The world of a split: `entities` entities and their facts. Raises ValueError when there are too few entities, or too few names for them."""
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


def make_worlds(
    *,
    seed: int,
    entities: int,
    k1: float,
    b: float,
    shapes: tuple[str, ...],
    questions: dict[str, int],
    extra_facts: int = 1,
) -> tuple[list[Document], dict[str, list[Question]]]:
    """One corpus with the articles of all three worlds, and the questions of each split.

    entities: size of the train world; the others have a quarter of it (at least MIN_ENTITIES). extra_facts: filler sentences an article. k1, b: of
    the BM25 that checks the search queries. shapes: subset of SHAPES, in equal parts. questions: number of questions of each split.
    Returns (documents, id = row; questions by split). Raises ValueError when a split cannot give as many questions as asked for, or for a bad
    argument.
    """
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown or not shapes or len(set(shapes)) != len(shapes):
        raise ValueError(
            f"atlas: shapes must be different ones of {tuple(SHAPES)}, not {tuple(shapes)}"
        )
    for split, count in questions.items():
        if split not in SPLITS or count < 1:
            raise ValueError(
                f"atlas: {count} questions for split {split!r}; splits are {SPLITS}, and each that is named needs at least 1 question"
            )
    worlds, first_rows, documents = {}, {}, []
    for split in SPLITS:
        worlds[split] = build_world(
            seed=seed,
            split=split,
            entities=entities if split == "train" else max(entities // 4, MIN_ENTITIES),
        )
        rng = np.random.default_rng([seed, SPLITS.index(split), 1])
        first_rows[split] = len(documents)
        for entity, text in zip(
            worlds[split].entities, write_articles(rng, worlds[split], extra_facts)
        ):
            documents.append(Document(len(documents), entity.name, text))
    retrieves = _make_retrieval_check(documents, k1, b)
    made = {}
    for split, count in questions.items():
        rng = np.random.default_rng([seed, SPLITS.index(split), 2])
        made[split] = _Questioner(rng, worlds[split], first_rows[split], retrieves).make(
            split, tuple(shapes), count
        )
    return documents, made


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


# --- entities and facts


def _choose_names(
    rng: np.random.Generator, word: str, split: str, count: int, taken: set[str]
) -> list[str]:
    """`count` names of a kind, using all words of its pools as evenly as possible (a word that never occurs in training cannot be read later)."""
    first, second = KINDS[word].first, KINDS[word].second
    free = defaultdict(list)
    for i, j in itertools.product(range(len(first)), range(len(second))):
        if (i + j) % 4 in _RESIDUES[split] and f"{first[i]} {second[j]}" not in taken:
            free[i].append(j)
    available = sum(len(row) for row in free.values())
    if available < count:
        raise ValueError(
            f"atlas: {count} names of kind {word} are needed in the {split} world, {available} exist; lower data.atlas.entities"
        )
    names, used = [], Counter()
    while len(names) < count:
        for i in rng.permutation(sorted(i for i in free if free[i])).tolist()[: count - len(names)]:
            fewest = min(used[j] for j in free[i])
            j = _pick(rng, [j for j in free[i] if used[j] == fewest])
            free[i].remove(j)
            used[j] += 1
            names.append(f"{first[i]} {second[j]}")
    return names


def _choose_facts(rng: np.random.Generator, entities: list[Entity]) -> dict[tuple[int, str], int]:
    """One object for every subject and relation, as far as there is one.

    A relation draws its objects from a pool of a third as many as its subjects, so that several subjects share an object and neither half of a join
    gives its answer away. Within one kind (mothers, outlets) facts form a forest, never a circle.
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
                facts[subject, word] = _pick(rng, objects)
    return facts


# --- articles


def write_articles(rng: np.random.Generator, world: World, extra_facts: int) -> list[str]:
    """One article per entity, in their order: its facts in random order and wording, with `extra_facts` fillers between them."""
    own = defaultdict(list)
    for (row, word), target in world.facts.items():
        own[row].append((RELATIONS[word], target))
    articles = []
    for row, entity in enumerate(world.entities):
        fillers = KINDS[entity.kind].fillers
        if not 0 <= extra_facts <= len(fillers):
            raise ValueError(
                f"atlas: extra_facts must be between 0 and {len(fillers)}, not {extra_facts}"
            )
        facts = [own[row][i] for i in rng.permutation(len(own[row]))]
        # The first sentence names the subject, so it takes a pattern that begins with it; the others may begin with a possessive.
        sentences = []
        for position, (relation, target) in enumerate(facts):
            patterns = [
                pattern for pattern in relation.patterns if position or pattern.startswith("{S}")
            ]
            sentences.append((_pick(rng, patterns), world.entities[target].name))
        for i in rng.permutation(len(fillers))[:extra_facts]:
            sentences.insert(int(rng.integers(1, len(sentences) + 1)), (fillers[i], ""))
        articles.append(
            " ".join(
                _write_sentence(rng, entity, pattern, name, first=i == 0)
                for i, (pattern, name) in enumerate(sentences)
            )
        )
    return articles


def _write_sentence(
    rng: np.random.Generator, entity: Entity, pattern: str, name: str, *, first: bool
) -> str:
    pronoun, possessive = entity.pronouns
    person = entity.kind == "person"
    if first:
        subject = entity.name if person else f"The {entity.kind} {entity.name}"
    else:
        subject = pronoun.capitalize() if person else _pick(rng, ("It", f"The {entity.kind}"))
    fill = {
        "n": _pick(rng, NUMBERS),
        "y": _pick(rng, YEARS),
        "c": _pick(rng, COLOURS),
        "h": _pick(rng, HOBBIES),
    }
    return pattern.format(S=subject, P=possessive.capitalize(), p=possessive, o=name, **fill)


# --- the check of the search queries


def _make_retrieval_check(documents: list[Document], k1: float, b: float):
    """A function (queries, row) -> those of the queries that BM25 answers with document `row` among the first TOP_K, however ties are broken.

    It returns none at all when the first, canonical query is not among them or fewer than MIN_QUERIES remain. Words are split as by the search index.
    """
    import bm25s  # initialises jax: only where it is needed

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
    index.index(
        [_WORD.findall(f"{d.title}\n{d.text}".lower()) for d in documents], show_progress=False
    )

    def retrieves(queries: list[str], row: int) -> tuple[str, ...]:
        kept = []
        for query in queries:
            scores = index.get_scores(_WORD.findall(query.lower()))
            if scores[row] > 0 and int((scores >= scores[row]).sum()) <= TOP_K:
                kept.append(query)
        return tuple(kept) if len(kept) >= MIN_QUERIES and kept[0] == queries[0] else ()

    return retrieves


# --- questions


class _Questioner:
    """Makes the questions of one world: draws paths through its facts at random and writes them down."""

    def __init__(self, rng: np.random.Generator, world: World, first_row: int, retrieves):
        self.rng, self.world, self.first_row = rng, world, first_row
        self.names = [entity.name for entity in world.entities]
        self.kinds = [entity.kind for entity in world.entities]
        self.hops: dict[_Hop, tuple[str, ...]] = {}  # accepted queries of each usable hop and join
        self.joins: dict[_Join, tuple[str, ...]] = {}
        self.incoming: dict[int, list[_Hop]] = defaultdict(list)
        self.outgoing: dict[int, list[_Hop]] = defaultdict(list)
        own, subjects = defaultdict(list), defaultdict(set)
        for (row, word), target in world.facts.items():
            own[row].append(word)
            subjects[word, target].add(row)
            queries = retrieves(self._hop_queries(row, RELATIONS[word]), first_row + row)
            if queries:
                self.hops[row, word] = queries
                self.outgoing[row].append((row, word))
                self.incoming[target].append((row, word))
        for row, words in own.items():
            for one, two in itertools.permutations(words, 2):
                first, second = (
                    subjects[one, world.facts[row, one]],
                    subjects[two, world.facts[row, two]],
                )
                # Both conditions are needed, and together they leave one answer.
                if first & second == {row} and len(first) > 1 and len(second) > 1:
                    queries = retrieves(self._join_queries((row, one, two)), first_row + row)
                    if queries:
                        self.joins[row, one, two] = queries
        self.starts, self.join_list = list(self.hops), list(self.joins)

    def make(self, split: str, shapes: tuple[str, ...], count: int) -> list[Question]:
        """`count` different questions, the shapes in equal parts, shuffled."""
        drawn = []
        for i, shape in enumerate(shapes):
            wanted = count // len(shapes) + (i < count % len(shapes))
            paths, misses = {}, 0
            while len(paths) < wanted and misses < PATIENCE:
                path = self._draw(shape)
                misses = misses + 1 if path is None or path in paths else 0
                if path is not None:
                    paths[path] = None
            if len(paths) < wanted:
                raise ValueError(
                    f"atlas: {wanted} questions of shape {shape} were asked for, but only {len(paths)} could be made in the {split} "
                    f"world of {len(self.names)} entities; ask for fewer questions, more entities or other shapes"
                )
            drawn += [(shape, path) for path in paths]
        order = self.rng.permutation(len(drawn))
        return [self._write(f"{split}-{number}", *drawn[i]) for number, i in enumerate(order)]

    def _object(self, hop: _Hop) -> int:
        return self.world.facts[hop]

    def _draw(self, shape: str) -> tuple | None:
        """A random path of the shape: hops and joins in the order of the sub-questions; None when the draw meets a dead end or an entity twice."""
        depends = SHAPES[shape]
        if () not in depends[1:]:  # a chain: walk forwards from anywhere
            path = [_pick(self.rng, self.starts)] if self.starts else []
        else:  # start from the join and look for ways into its two conditions
            if not self.join_list:
                return None
            row, one, two = join = _pick(self.rng, self.join_list)
            path = [
                self._before(self._object((row, one))),
                self._before(self._object((row, two))),
                join,
            ]
            if depends[1] == (0,) and path[0]:
                path.insert(0, self._before(path[0][0]))
        while len(path) < len(depends) and None not in path:
            after = self.outgoing[self._answer(path[-1])] if path else []
            path.append(_pick(self.rng, after) if after else None)
        if None in path:
            return None
        met = [self._answer(part) for part in path] + [
            part[0] for part, needs in zip(path, depends) if not needs
        ]
        return tuple(path) if len(set(met)) == len(met) else None

    def _before(self, row: int) -> _Hop | None:
        hops = self.incoming[row]
        return _pick(self.rng, hops) if hops else None

    def _answer(self, part: _Hop | _Join) -> int:
        return part[0] if len(part) == 3 else self._object(part)

    # Wording

    def _hop_queries(self, row: int, relation: Relation) -> list[str]:
        name = self.names[row]
        return [
            f"{name} {relation.word}",
            *(phrase.format(x=name).removeprefix("the ") for phrase in relation.phrases),
            name,
        ]

    def _join_queries(self, join: _Join) -> list[str]:
        row, one, two = join
        names = [self.names[self._object((row, word))] for word in (one, two)]
        kind = self.kinds[row]
        clauses = [RELATIONS[word].clause.format(x=name) for word, name in zip((one, two), names)]
        return [
            f"{names[0]} {names[1]} {kind}",
            join_phrase(kind, clauses).removeprefix("the "),
            f"{names[0]} {one} {names[1]} {two}",
            f"{names[0]} {names[1]}",
        ]

    def _phrase(self, part: _Hop | _Join, nouns: list[str]) -> str:
        """Noun phrase of the answer of one sub-question about `nouns` (one of a hop, two of a join)."""
        if len(part) == 2:
            return _pick(self.rng, RELATIONS[part[1]].phrases).format(x=nouns[0])
        return join_phrase(
            self.kinds[part[0]],
            [RELATIONS[word].clause.format(x=noun) for word, noun in zip(part[1:], nouns)],
        )

    def _ask(self, phrase: str, row: int) -> str:
        return ask(phrase, self.kinds[row], int(self.rng.integers(len(QUESTION_FORMS))))

    def _aliases(self, row: int) -> tuple[str, ...]:
        first, last = self.names[row].split()
        if self.kinds[row] == "person":
            return (f"{last}, {first}",)
        if self.kinds[row] == "city":
            return (f"{self.names[row]}, {self.names[self._object((row, 'country'))]}",)
        return ()

    def _write(self, uid: str, shape: str, path: tuple) -> Question:
        answers, nested, subs = (
            [],
            [],
            [],
        )  # nested: noun phrases of the answers in the whole question
        for part, needs in zip(path, SHAPES[shape]):
            answer = self._answer(part)
            start = [self.names[part[0]]]
            subs.append(
                SubQuestion(
                    question=self._ask(
                        self._phrase(part, [self.names[answers[i]] for i in needs] or start), answer
                    ),
                    answer=self.names[answer],
                    aliases=self._aliases(answer),
                    gold_ids=(self.first_row + part[0],),
                    queries=self.hops[part] if len(part) == 2 else self.joins[part],
                )
            )
            nested.append(self._phrase(part, [nested[i] for i in needs] or start))
            answers.append(answer)
        return Question(
            uid=uid,
            question=self._ask(nested[-1], answer),
            answer=self.names[answer],
            aliases=self._aliases(answer),
            sub_questions=tuple(subs),
            shape=shape,
        )
