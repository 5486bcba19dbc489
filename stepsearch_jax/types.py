"""The array side of the program: pytrees of arrays only.

Axis letters: B episodes, T tokens, K turns, D documents a turn. Every per-token array is indexed by
the token that it describes: `logprobs[b, t]` is the log-probability of `tokens[b, t]` given
`tokens[b, :t]`. The one shift between predictions and tokens lives in `models.scoring`.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Trajectory:
    """The recorded arrays of B episodes."""

    tokens: jax.Array  # [B, T] int32: prompt, then actions and observations in turn
    token_mask: jax.Array  # [B, T] bool: not padding
    action_mask: jax.Array  # [B, T] bool: sampled by the policy (a subset of token_mask)
    turn_ids: jax.Array  # [B, T] int32: turn of the token, -1 in the prompt and padding
    # [B, T] float32: of action tokens under the sampling policy at temperature 1, 0 elsewhere
    sampler_logprobs: jax.Array
    # [B, K] int32: index of the token that closes the turn's search, -1 if the turn did not search
    search_end: jax.Array
    turn_status: jax.Array  # [B, K] int32: records.TurnStatus
    doc_ids: jax.Array  # [B, K, D] int32: retrieved corpus ids, -1 = none
    search_ok: jax.Array  # [B, K] bool: the search of the turn succeeded
    length: jax.Array  # [B] int32: number of tokens that are not padding
    prompt_length: jax.Array  # [B] int32
    finished: jax.Array  # [B] bool: the policy answered
    truncated: jax.Array  # [B] bool: the context ran out before the policy answered
    question_ids: jax.Array  # [B] int32: row of the question in its split
    group_ids: jax.Array  # [B] int32: episodes of one question in one iteration share it


@flax.struct.dataclass
class Batch:
    """What an update reads: trajectories, and all that stays fixed during the optimiser steps."""

    tokens: jax.Array  # [B, T] int32
    token_mask: jax.Array  # [B, T] bool
    action_mask: jax.Array  # [B, T] bool
    # [B, T] bool: the tokens whose value is learned, none without a value model
    value_mask: jax.Array
    old_logprobs: jax.Array  # [B, T] float32: of the policy before the optimiser steps
    ref_logprobs: jax.Array  # [B, T] float32: of the frozen reference
    old_values: jax.Array  # [B, T] float32: before the optimiser steps, 0 without a value model
    advantages: jax.Array  # [B, T] float32
    returns: jax.Array  # [B, T] float32: targets of the values, read at value_mask


@flax.struct.dataclass
class ModelState:
    """One model under training."""

    params: Any
    opt_state: Any


@flax.struct.dataclass
class TrainState:
    """Everything a resumed run needs, apart from the frozen reference policy's parameters."""

    policy: ModelState
    value: ModelState | None  # None with an advantage estimator that needs no values
    # [] int32: finished iterations (one = one rollout and its optimiser steps)
    iteration: jax.Array
    position: jax.Array  # [] int32: training questions taken so far, by all processes together
    kl_coef: jax.Array  # [] float32: beta, adapted when the controller is on
    skipped: jax.Array  # [] int32: optimiser steps skipped because a gradient was not finite
    skipped_in_a_row: jax.Array  # [] int32: those since the last step that was taken
