"""Baselines that cannot search: direct answers, answers from one search for the question itself,
and answers from the gold documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax.prompting.templates import encode_environment, render_baseline, render_document
from stepsearch_jax.rollout.text import pad_tokens
from stepsearch_jax.run.system import Split, System
from stepsearch_jax.search.observations import build_observation

DIRECT, SINGLE_SEARCH, GOLD = "direct answer", "single-shot RAG", "gold documents given"


@dataclasses.dataclass(frozen=True)
class Baselines:
    """A system with one split per baseline, named after it, in which a policy may only answer.

    given[name][row]: corpus ids of the documents in a question's prompt; given[DIRECT] is None.
    """

    system: System
    given: dict[str, list[tuple[int, ...]] | None]


def make_baselines(system: System, split_name: str, count: int) -> Baselines:
    """Prompts for the first `count` questions of a split, with documents after the question.

    Documents look as a search shows them. One search gets as many tokens as in an episode
    (search.max_observation_tokens); gold documents get as many as all searches of an episode,
    within rollout.context. That room holds as many documents as these searches return (search.k
    each). If there are more gold documents, the first ones are shown, in the order of the hops.
    Without any gold documents the split has no such baseline.
    """
    # The documents for each question.
    questions = list(system.splits[split_name].questions[:count])
    found = [
        tuple(int(i) for i in ids if i >= 0)
        for ids in system.search_documents([question.question for question in questions])
    ]
    documents = {
        DIRECT: [None] * len(questions),
        SINGLE_SEARCH: found,
        GOLD: [question.gold_ids for question in questions],
    }
    if not any(documents[GOLD]):
        del documents[GOLD]

    # The prompts, all padded to one width, so that one program serves all baselines.
    searches = {DIRECT: 0, SINGLE_SEARCH: 1, GOLD: system.settings.max_turns}
    prompts, given = {}, {}
    for name, of_questions in documents.items():
        encoded = [
            _encode_prompt(system, question.question, ids, searches[name])
            for question, ids in zip(questions, of_questions, strict=True)
        ]
        prompts[name] = [tokens for tokens, _ in encoded]
        given[name] = None if name == DIRECT else [shown for _, shown in encoded]
    width = max(len(ids) for encoded in prompts.values() for ids in encoded)
    splits = {
        name: Split(questions, *pad_tokens(encoded, width)) for name, encoded in prompts.items()
    }
    settings = dataclasses.replace(
        system.settings, max_turns=0, max_prompt_tokens=width, context=width + _turn_room(system)
    )
    return Baselines(dataclasses.replace(system, settings=settings, splits=splits), given)


def _encode_prompt(
    system: System, question: str, documents: Sequence[int] | None, searches: int
) -> tuple[list[int], tuple[int, ...]]:
    """-> (tokens of the question's prompt with documents, ids of these documents).

    The documents are those that fit into the room of `searches` searches, cut to share it.
    """
    encode, search_config = system.tokenizer.encode, system.config.search
    prompt = encode(render_baseline(system.config.prompt.template, question, documents is not None))
    if documents is None:
        return prompt, ()
    room = min(
        search_config.max_observation_tokens * searches,
        system.settings.context - _turn_room(system) - len(prompt),
    )
    shown = documents[: -(-room * search_config.k // search_config.max_observation_tokens)]
    texts = [np.array(encode(render_document(system.source.documents[i])), np.int32) for i in shown]
    return [
        *prompt,
        *build_observation(encode_environment(encode, max(len(shown), 1)), texts, room).tolist(),
    ], shown


def _turn_room(system: System) -> int:
    """Tokens of one turn plus one: an episode whose context is full counts as truncated."""
    return system.settings.max_turn_tokens + 1
