"""From rewards of turns and episodes to rewards of tokens (device).

Axis letters: B episodes, K turns, T tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from stepsearch_jax.choices import check_choice


@functools.partial(jax.jit, static_argnames=("placement", "outcome_overwrites"))
def place_rewards(
    step_rewards: jax.Array,
    outcome_rewards: jax.Array,
    search_end: jax.Array,
    action_mask: jax.Array,
    *,
    placement: str = "step",
    outcome_overwrites: bool = False,
) -> jax.Array:
    """Rewards at their tokens (StepSearch, arXiv 2505.15107).

        r_token[b, search_end[b, k]] += step_rewards[b, k]
        r_token[b, last action token] += outcome_rewards[b]

    step_rewards [B, K], outcome_rewards [B], search_end [B, K], action_mask [B, T] -> [B, T].

    search_end: index of the token that closes turn k's search, -1 = no search. Step rewards at -1
    or at a token that is not an action token are ignored; an episode without action tokens gets
    nothing. Positions are recorded while sampling; no text is tokenised again.
    placement "merged" puts the same total on the last action token: the control that separates
    what is rewarded from where.

    Reference (`outcome_overwrites=True`): the released code assigns the global reward instead of
      adding it, so a step reward on the last action token is lost (from the merged total too).
    Raises ValueError on an unknown placement.
    """
    check_choice("reward.placement", placement)
    position = jnp.arange(action_mask.shape[1])
    # [B, 1], -1 without action tokens
    last = jnp.where(action_mask, position, -1).max(axis=1, keepdims=True)
    is_last = position == last  # [B, T]
    at_end = search_end[:, :, None] == position  # [B, K, T]
    step = jnp.where(at_end & action_mask[:, None, :], step_rewards[:, :, None], 0).sum(axis=1)
    kept = jnp.where(is_last, 0, step) if outcome_overwrites else step
    rewards = kept + jnp.where(is_last, outcome_rewards[:, None], 0)
    if placement == "merged":
        rewards = jnp.where(is_last, rewards.sum(axis=1, keepdims=True), 0)
    return rewards
