"""What a policy answers without searching on its own: from what it knows, from one search for the
question itself, or from the gold documents.
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
    """`system` has one split for each baseline, named after it, and settings under which a policy
    may only answer. given[name][row]: corpus ids of the documents in a question's prompt;
    given[DIRECT] is None.
    """

    system: System
    given: dict[str, list[tuple[int, ...]] | None]


def make_baselines(system: System, split_name: str, count: int) -> Baselines:
    """Prompts for the first `count` questions of a split; documents stand in them as a search would
    show them, behind the question.

    One search may fill as much as in an episode (search.max_observation_tokens), gold documents as
    much as all of an episode's searches, within rollout.context; in so much room stand as many
    documents as searches would bring there (search.k each). Of more gold documents the first are
    shown, in the order of the hops, and the others left out. Without any gold document among the
    questions there is no such baseline.
    """
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
    searches = {DIRECT: 0, SINGLE_SEARCH: 1, GOLD: system.settings.max_turns}
    prompts, given = {}, {}
    for name, of_questions in documents.items():
        encoded = [
            _encode_prompt(system, question.question, ids, searches[name])
            for question, ids in zip(questions, of_questions, strict=True)
        ]
        prompts[name], given[name] = (
            [tokens for tokens, _ in encoded],
            None if name == DIRECT else [shown for _, shown in encoded],
        )
    width = max(len(ids) for encoded in prompts.values() for ids in encoded)
    # of one width: one program for all
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
    """The question's prompt, behind it the documents that the room of so many searches holds, cut
    to share it -> its tokens, and which documents these are.
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
    """Tokens of one turn, and one more: an episode whose context is full counts as truncated."""
    return system.settings.max_turn_tokens + 1
