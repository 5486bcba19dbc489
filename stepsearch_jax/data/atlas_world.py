"""Synthetic worlds: entities, facts, their articles, and the multi-hop questions that they answer.

A seed alone determines a world. Worlds of different splits share the words of the grammar but no
entity name, so only the skill of searching carries over. Facts are functional (one object per
subject and relation) and appear only in the subject's article. The gold document of a hop is
therefore its subject's article; that of a join ("Which person was born in #1 and works for #2?") is
the article of the answer.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from stepsearch_jax.data.atlas_facts import MIN_ENTITIES, SPLITS, Entity, World, build_world, pick
from stepsearch_jax.data.atlas_grammar import RELATIONS
from stepsearch_jax.data.atlas_kinds import COLOURS, HOBBIES, KINDS, NUMBERS, YEARS
from stepsearch_jax.data.atlas_questions import SHAPES, Questioner, make_retrieval_check
from stepsearch_jax.records import Document, Question


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

    entities: size of the train world; the others have a quarter of that (at least MIN_ENTITIES).
    extra_facts: filler sentences per article. k1, b: of the BM25 that checks the search queries.
    shapes: subset of SHAPES, in equal parts. questions: number of questions of each split.

    Returns (documents, id = row; questions by split). Raises ValueError for a bad argument, or when
    a split cannot give that many questions.
    """
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown or not shapes or len(set(shapes)) != len(shapes):
        raise ValueError(
            f"atlas: shapes must be different ones of {tuple(SHAPES)}, not {tuple(shapes)}"
        )
    for split, count in questions.items():
        if split not in SPLITS or count < 1:
            raise ValueError(
                f"atlas: {count} questions for split {split!r}; "
                f"splits are {SPLITS}, and each that is named needs at least 1 question"
            )
    worlds, first_rows, documents = {}, {}, []
    for split in SPLITS:
        size = entities if split == "train" else max(entities // 4, MIN_ENTITIES)
        world = worlds[split] = build_world(seed=seed, split=split, entities=size)
        rng = np.random.default_rng([seed, SPLITS.index(split), 1])
        first_rows[split] = len(documents)
        for entity, text in zip(world.entities, write_articles(rng, world, extra_facts)):
            documents.append(Document(len(documents), entity.name, text))
    retrieves = make_retrieval_check(documents, k1, b)
    made = {}
    for split, count in questions.items():
        rng = np.random.default_rng([seed, SPLITS.index(split), 2])
        questioner = Questioner(rng, worlds[split], first_rows[split], retrieves)
        made[split] = questioner.make(split, tuple(shapes), count)
    return documents, made


def write_articles(rng: np.random.Generator, world: World, extra_facts: int) -> list[str]:
    """One article per entity, in order: its facts in random order and wording, and some fillers.

    extra_facts: number of filler sentences, inserted at random after the first sentence.
    """
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
        # The first sentence takes a pattern that begins with the subject, so that it is named;
        # the others may begin with a possessive.
        sentences = []
        for position, (relation, target) in enumerate(facts):
            patterns = [
                pattern for pattern in relation.patterns if position or pattern.startswith("{S}")
            ]
            sentences.append((pick(rng, patterns), world.entities[target].name))
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
        subject = pronoun.capitalize() if person else pick(rng, ("It", f"The {entity.kind}"))
    fill = {
        "n": pick(rng, NUMBERS),
        "y": pick(rng, YEARS),
        "c": pick(rng, COLOURS),
        "h": pick(rng, HOBBIES),
    }
    return pattern.format(S=subject, P=possessive.capitalize(), p=possessive, o=name, **fill)
