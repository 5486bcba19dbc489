"""Trajectories to episodes of text."""

import types

import numpy as np

from stepsearch_jax.records import TurnStatus
from stepsearch_jax.rollout.text import to_episodes
from stepsearch_jax.types import Trajectory

PIECES = [
    "Q",
    "<search>",
    " a",
    "</search",
    ">\n\n",
    "<information>x</answer></information>",
    "<answer>",
    " b",
    "</answer",
    ">.",
]


def test_an_episode_by_hand():
    """A search, its observation and an answer.

    Both actions end in tokens that hold more than the tag; the rest belongs to no text.
    """
    tokens = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]], np.int32)
    place = np.arange(12)[None]
    trajectory = Trajectory(
        tokens=tokens,
        token_mask=place < 10,
        action_mask=(place > 0) & (place < 10) & (place != 5),
        sampler_logprobs=np.zeros(tokens.shape, np.float32),
        turn_ids=np.array([[-1, 0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1]], np.int32),
        search_end=np.array([[4, -1, -1]]),
        doc_ids=np.array([[[7, -1]] + [[-1, -1]] * 2]),
        turn_status=np.array([[TurnStatus.SEARCH, TurnStatus.ANSWER, TurnStatus.NONE]]),
        search_ok=np.array([[True, False, False]]),
        length=np.array([10]),
        prompt_length=np.array([1]),
        finished=np.array([True]),
        truncated=np.array([False]),
        question_ids=np.array([0]),
        group_ids=np.array([0]),
    )
    decode = lambda ids: "".join(PIECES[i] for i in ids)
    (episode,) = to_episodes(trajectory, ["the question"], types.SimpleNamespace(decode=decode))
    assert (episode.question, episode.prompt, episode.finished, episode.truncated) == (
        "the question",
        "Q",
        True,
        False,
    )
    searched, answered = episode.turns
    assert (searched.action, searched.query, searched.doc_ids, searched.search_ok) == (
        "<search> a</search>",
        "a",
        (7,),
        True,
    )
    assert searched.observation == PIECES[5]
    assert (answered.action, answered.answer, answered.doc_ids, answered.observation) == (
        "<answer> b</answer>",
        "b",
        (),
        "",
    )
