"""One rollout, with its text and its scores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax.records import Episode
from stepsearch_jax.rewards.scoring import StepScores
from stepsearch_jax.rollout.text import to_episodes
from stepsearch_jax.run.system import Split, System, check_searches, process_rows
from stepsearch_jax.search.callback import SearchCounts
from stepsearch_jax.sharding import rows_from_mesh, rows_to_mesh
from stepsearch_jax.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Collected:
    """One rollout: on the mesh, as text, and scored. The text is of this process's rows only."""

    trajectory: Trajectory
    rows: Trajectory  # the same as NumPy
    episodes: list[Episode]
    scores: StepScores
    counters: np.ndarray  # [shards, 3]: decode steps, flushes, prefilled tokens
    searches: SearchCounts  # on all processes together


def collect(
    system: System,
    sample_episodes,
    params,
    split: Split,
    question_rows: np.ndarray,
    key: jax.Array,
    temperature: float,
    group_size: int = 1,
    answer_gain=None,
) -> Collected:
    """Runs and scores `group_size` episodes for each of the global `question_rows` (-1: padding).

    answer_gain: from `run.start.bind_answer_gain`, for step rewards by what a search did for the
    answer; None: by its documents.

    The rows of the batch, their noise and their groups depend only on their global position, so the
    number of processes changes nothing. Raises SystemExit if a larger fraction of searches failed,
    on all processes together, than config.search.max_failure_fraction.
    """
    every = np.repeat(question_rows, group_size)
    mine = process_rows(system.mesh, len(every))
    prompts, questions = split.take(every[mine], mine)
    inputs = rows_to_mesh(
        system.mesh, (prompts, (mine // group_size).astype(np.int32), every[mine].astype(np.int32))
    )
    trajectory, counters = sample_episodes(params, *inputs, key, jnp.float32(temperature))
    rows = rows_from_mesh(trajectory)
    searches = check_searches(system)
    episodes = to_episodes(rows, questions, system.tokenizer)
    gain = None if answer_gain is None else answer_gain(params, trajectory, split, every[mine])
    return Collected(
        trajectory, rows, episodes, system.score(episodes, gain), rows_from_mesh(counters), searches
    )
