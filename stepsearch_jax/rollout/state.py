"""What a rollout works on: its settings, the text world, the prompts, and the state of a shard.

Axis letters: B episodes of the shard, S slots, T context, K turns (max_turns searches and a last
one that may only answer), D documents, O observation tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax

from stepsearch_jax.models.attention import KVCache

DECODING, WAITING, FREE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """The static sizes and rules of a rollout; see `configs/base.py` for their meaning."""

    max_turns: int
    max_turn_tokens: int
    context: int
    max_prompt_tokens: int
    max_observation_tokens: int
    documents: int
    top_k: int
    top_p: float
    slots: int
    flush_fraction: float
    prefill_rows: int
    prefill_tokens: int

    @property
    def turns(self) -> int:
        """K: the searching turns and the last one, which may only answer."""
        return self.max_turns + 1


@flax.struct.dataclass
class Environment:
    """The text world as arrays: the tag automaton over token ids, and the fixed warnings.

    A is the number of automaton states.
    """

    next_state: jax.Array  # [A, V] int
    event: jax.Array  # [A] int: TurnStatus reached in this state, NONE while the turn goes on
    start: jax.Array  # [] int: state at the beginning of a turn
    invalid_warning: jax.Array  # [W] int32, observation of an invalid turn
    last_turn_warning: jax.Array  # [W'] int32, appended to the observation before the last turn


@flax.struct.dataclass
class Prompts:
    """The episodes to run."""

    tokens: jax.Array  # [B, P] int32, right padded
    length: jax.Array  # [B] int32
    episode_ids: jax.Array  # [B] int32: seeds the row's noise
    active: jax.Array  # [B] bool: False for rows that only fill up the batch


@flax.struct.dataclass
class Record:
    """What a rollout returns for each episode; see `types.Trajectory`."""

    tokens: jax.Array  # [B, T] int32
    action_mask: jax.Array  # [B, T] bool
    turn_ids: jax.Array  # [B, T] int32
    sampler_logprobs: jax.Array  # [B, T] float32
    length: jax.Array  # [B] int32
    turn_status: jax.Array  # [B, K] int32
    search_end: jax.Array  # [B, K] int32
    doc_ids: jax.Array  # [B, K, D] int32
    search_ok: jax.Array  # [B, K] bool
    finished: jax.Array  # [B] bool
    truncated: jax.Array  # [B] bool


@flax.struct.dataclass
class EpisodeState:
    """A shard in the middle of its rollout: the record of all episodes, and the slots."""

    record: Record
    cache: KVCache  # of S rows
    episode: jax.Array  # [S] int32: row of the record
    phase: jax.Array  # [S] int32: DECODING, WAITING or FREE
    length: jax.Array  # [S] int32: tokens so far; the last one is not yet in the cache
    last_token: jax.Array  # [S] int32: the one that is not yet in the cache
    turn: jax.Array  # [S] int32
    turn_start: jax.Array  # [S] int32: index of the turn's first action token
    status: jax.Array  # [S] int32: how the turn ended, while WAITING
    automaton: jax.Array  # [S] int32
    begun: jax.Array  # [1] int32: episodes that have got a slot so far
    counters: jax.Array  # [1, 3] int32: decode steps, flushes, tokens prefilled


@flax.struct.dataclass
class Observations:
    """What the search callback returns; `search/callback.py` has its contract."""

    tokens: jax.Array  # [B, O] int32
    length: jax.Array  # [B] int32
    doc_ids: jax.Array  # [B, D] int32
    ok: jax.Array  # [B] bool
