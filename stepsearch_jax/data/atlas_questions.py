"""The multi-hop questions of an Atlas world and the check of their search queries."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict

import numpy as np

from stepsearch_jax.data.atlas_facts import World, pick
from stepsearch_jax.data.atlas_grammar import QUESTION_FORMS, RELATIONS, Relation, ask, join_phrase
from stepsearch_jax.records import Document, Question, SubQuestion
from stepsearch_jax.words import split_words

# Graph shape -> for each sub-question, the earlier ones whose answers it needs.
# None: it starts from the question; two: it is a join.
SHAPES = {
    "2hop": ((), (0,)),
    "3hop_chain": ((), (0,), (1,)),
    "3hop_join": ((), (), (0, 1)),
    "4hop_chain": ((), (0,), (1,), (2,)),
    "4hop_branch": ((), (0,), (), (1, 2)),
    "4hop_after": ((), (), (0, 1), (2,)),
}
MIN_QUERIES = 3  # accepted queries that a sub-question has at least
PATIENCE = 5000  # draws in a row without a new path after which a shape counts as exhausted
TOP_K = 3  # an accepted query ranks its gold document among the first TOP_K

# A hop is (subject row, relation word).
# A join is (answer row, first relation word, second relation word).
_Hop = tuple[int, str]
_Join = tuple[int, str, str]


def make_retrieval_check(documents: list[Document], k1: float, b: float):
    """Returns a function (queries, row) -> the queries for which BM25 finds document `row`.

    "Finds" means among the first TOP_K, however ties are broken. The function returns no query at
    all when it rejects the first, canonical one or fewer than MIN_QUERIES remain. Words are split
    as in the search index.
    """
    import bm25s  # initialises jax: only where it is needed

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
    words = [split_words(f"{d.title}\n{d.text}") for d in documents]
    index.index(words, show_progress=False)

    def retrieves(queries: list[str], row: int) -> tuple[str, ...]:
        kept = []
        for query in queries:
            scores = index.get_scores(split_words(query))
            if scores[row] > 0 and int((scores >= scores[row]).sum()) <= TOP_K:
                kept.append(query)
        return tuple(kept) if len(kept) >= MIN_QUERIES and kept[0] == queries[0] else ()

    return retrieves


class Questioner:
    """Makes the questions of one world: draws random paths through its facts and words them."""

    def __init__(self, rng: np.random.Generator, world: World, first_row: int, retrieves):
        self.rng, self.world, self.first_row = rng, world, first_row
        self.names = [entity.name for entity in world.entities]
        self.kinds = [entity.kind for entity in world.entities]
        # Accepted queries of each usable hop and join.
        self.hops: dict[_Hop, tuple[str, ...]] = {}
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
                first, second = (subjects[word, world.facts[row, word]] for word in (one, two))
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
                    f"atlas: {wanted} questions of shape {shape} were asked for, but only "
                    f"{len(paths)} could be made in the {split} world of {len(self.names)} "
                    "entities; ask for fewer questions, more entities or other shapes"
                )
            drawn += [(shape, path) for path in paths]
        order = self.rng.permutation(len(drawn))
        return [self._write(f"{split}-{number}", *drawn[i]) for number, i in enumerate(order)]

    def _object(self, hop: _Hop) -> int:
        return self.world.facts[hop]

    def _draw(self, shape: str) -> tuple | None:
        """A random path of the shape: hops and joins in the order of the sub-questions.

        None when the draw meets a dead end, or the same entity twice.
        """
        depends = SHAPES[shape]
        if () not in depends[1:]:  # a chain: walk forwards from anywhere
            path = [pick(self.rng, self.starts)] if self.starts else []
        else:  # start from the join and look for ways into its two conditions
            if not self.join_list:
                return None
            row, one, two = join = pick(self.rng, self.join_list)
            path = [*(self._before(self._object((row, word))) for word in (one, two)), join]
            if depends[1] == (0,) and path[0]:
                path.insert(0, self._before(path[0][0]))
        while len(path) < len(depends) and None not in path:
            after = self.outgoing[self._answer(path[-1])] if path else []
            path.append(pick(self.rng, after) if after else None)
        if None in path:
            return None
        met = [self._answer(part) for part in path] + [
            part[0] for part, needs in zip(path, depends) if not needs
        ]
        return tuple(path) if len(set(met)) == len(met) else None

    def _before(self, row: int) -> _Hop | None:
        hops = self.incoming[row]
        return pick(self.rng, hops) if hops else None

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
        """The answer of one sub-question as a noun phrase about `nouns` (hop: one, join: two)."""
        if len(part) == 2:
            return pick(self.rng, RELATIONS[part[1]].phrases).format(x=nouns[0])
        clauses = [RELATIONS[word].clause.format(x=noun) for word, noun in zip(part[1:], nouns)]
        return join_phrase(self.kinds[part[0]], clauses)

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
        answers, subs = [], []
        nested = []  # the answers as noun phrases of the whole question
        for part, needs in zip(path, SHAPES[shape]):
            answer = self._answer(part)
            start = [self.names[part[0]]]
            phrase = self._phrase(part, [self.names[answers[i]] for i in needs] or start)
            subs.append(
                SubQuestion(
                    question=self._ask(phrase, answer),
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
