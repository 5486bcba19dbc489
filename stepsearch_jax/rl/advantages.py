"""From token rewards to advantages and returns (device).

Axis letters: B episodes, T tokens, K turns. Arrays [B, T] are indexed by the token they describe;
action_mask marks the tokens that the policy sampled. `estimate_advantages` chooses an estimator by
name; each estimator is also a function of its own. `stepwise_advantages` does the whole step from
rewards of turns and episodes. docs/losses.md derives the estimators.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from stepsearch_jax.choices import CRITIC_ESTIMATORS, check_choice
from stepsearch_jax.masking import (
    check_masks,
    masked_mean,
    masked_sum,
    standardize_in_groups,
    whiten,
)
from stepsearch_jax.rewards.placement import place_rewards
from stepsearch_jax.rl.kl import kl_penalty

_STD_EPSILON = 1e-6  # added to a group's standard deviation


@jax.jit
def gae(
    rewards: jax.Array,
    values: jax.Array,
    action_mask: jax.Array,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over action tokens (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma V_t' - V_t
        A_t = delta_t + gamma gae_lambda A_t'
        return_t = A_t + V_t

    t' is the next action token after t; after the last one V and A are 0.
    rewards, values, action_mask [B, T] -> (advantages, returns) [B, T], 0 outside action_mask.

    The recursion skips observation tokens and ignores their rewards and values, so credit passes
    from turn to turn through action tokens alone. Walking through 400 observation tokens at
    gae_lambda = 0.95 would leave 1e-9 of it.
    Reference: the released code steps through observation tokens too (pass its mask as
      `action_mask`). At its gamma = gae_lambda = 1 the values in between cancel, and action tokens
      get the same advantage either way.
    """
    check_masks(action_mask=action_mask)
    rewards = jnp.where(action_mask, rewards, 0).astype(jnp.float32)
    values = jnp.where(action_mask, values, 0).astype(jnp.float32)

    def step_back(following, token):
        next_value, next_advantage = following
        reward, value, keep = token
        advantage = reward + gamma * next_value - value + gamma * gae_lambda * next_advantage
        return (
            jnp.where(keep, value, next_value),
            jnp.where(keep, advantage, next_advantage),
        ), jnp.where(keep, advantage, 0)

    end = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(
        step_back, (end, end), (rewards.T, values.T, action_mask.T), reverse=True
    )
    advantages = advantages.T
    return advantages, advantages + values


@jax.jit
def turn_gae(
    rewards: jax.Array,
    values: jax.Array,
    action_mask: jax.Array,
    turn_ids: jax.Array,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """GAE with one state and one action per turn.

        r_k = sum of r_t over the action tokens of turn k
        V_k = value at the first action token of turn k
        A_k, return_k = the recursion of `gae` over turns

    rewards, values, action_mask, turn_ids [B, T] -> (advantages, returns, starts) [B, T].

    gamma and gae_lambda apply once per turn. All action tokens of a turn share its advantage.
    starts (bool) marks the first action token of each turn; returns are 0 elsewhere, and only the
    values there are read and trained.
    Reference: neither the paper nor its code has it; both run GAE over tokens. At gamma =
      gae_lambda = 1 the first action token of a turn has the same advantage as under token GAE.
    """
    check_masks(action_mask=action_mask)
    starts = _turn_starts(action_mask, turn_ids)
    advantages, returns = gae(
        _sum_turns(rewards, action_mask, starts), values, starts, gamma=gamma, gae_lambda=gae_lambda
    )
    return _spread_turns(advantages, action_mask, starts), returns, starts


@jax.jit
def grpo(rewards: jax.Array, action_mask: jax.Array, group_ids: jax.Array) -> jax.Array:
    """Group-relative advantages of episodes (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

        R_b = Σ_t r_bt                       over action tokens
        A_b = (R_b - mean) / (std + 1e-6)    mean and std over the episodes of b's group

    rewards, action_mask [B, T], group_ids [B] -> advantages [B, T], equal on all action tokens of
    an episode.

    Rows with the same id form a group, except rows without action tokens. An episode alone in its
    group gets 0.
    Reference: std is the population's; some implementations take the sample's, which is
      sqrt(n / (n - 1)) times as large.
    """
    check_masks(action_mask=action_mask)
    present = action_mask.any(axis=1, keepdims=True)
    returns = masked_sum(rewards, action_mask, axis=1)[:, None]
    return jnp.where(
        action_mask, standardize_in_groups(returns, present, group_ids, epsilon=_STD_EPSILON), 0
    )


@jax.jit
def rloo(rewards: jax.Array, action_mask: jax.Array, group_ids: jax.Array) -> jax.Array:
    """REINFORCE with a leave-one-out baseline (RLOO: Ahmadian et al. 2024, arXiv 2402.14740).

        R_b = Σ_t r_bt                                         over action tokens
        A_b = R_b - mean of R over the other episodes of b's group

    rewards, action_mask [B, T], group_ids [B] -> advantages [B, T], equal on all action tokens of
    an episode.

    The baseline leaves out the episode itself, so it does not bias the gradient. Groups, rows
    without action tokens and lone episodes: as in `grpo`.
    """
    check_masks(action_mask=action_mask)
    present, returns = action_mask.any(axis=1), masked_sum(rewards, action_mask, axis=1)
    # [B, B]
    others = (group_ids[:, None] == group_ids) & present & ~jnp.eye(len(group_ids), dtype=bool)
    advantages = masked_mean(returns[:, None] - returns, others, axis=1)
    return jnp.where(action_mask, advantages[:, None], 0)


@jax.jit
def turn_return(
    rewards: jax.Array,
    action_mask: jax.Array,
    turn_ids: jax.Array,
    group_ids: jax.Array,
    *,
    gamma: float = 1.0,
) -> jax.Array:
    """Step rewards without a value model: each turn's return, compared within the group.

        r_bk = sum of r_bt over the action tokens of turn k
        G_bk = Σ_{j >= k} gamma^(j - k) r_bj
        A_bk = (G_bk - mean) / (std + 1e-6)    over the group's episodes i, of G_i,min(k, last of i)

    rewards, action_mask, turn_ids [B, T], group_ids [B] -> advantages [B, T], equal on all action
    tokens of a turn.

    At turn k the episodes of a group are at the same depth, so what follows is compared with what
    follows for the others. Episodes that have ended by then stand in with their last turn. One more
    search is worth what it changes of the return: a cost of c a search lowers its advantage by c,
    before the division. Groups, lone episodes and rows without action tokens: as in `grpo`, which
    this is for episodes of one turn.
    Reference: ours. IGPO (arXiv 2510.14967) and GRPO with process supervision (arXiv 2402.03300,
      section 4.1.3) sum standardised rewards instead; then a cost of every search cancels.
    """
    check_masks(action_mask=action_mask)
    starts = _turn_starts(action_mask, turn_ids)
    turn_rewards = _sum_turns(rewards, action_mask, starts)
    # GAE without values is the discounted sum.
    zeros = jnp.zeros_like(turn_rewards)
    returns, _ = gae(turn_rewards, zeros, starts, gamma=gamma, gae_lambda=1.0)
    number = jnp.where(starts, jnp.cumsum(starts, axis=1) - 1, -1)  # of the turn that starts here
    last = number.max(axis=1, keepdims=True)  # -1 in rows without action tokens

    def compare_turn(k, advantages):
        here = starts & (number == jnp.minimum(k, last))
        compared = standardize_in_groups(
            jnp.where(here, returns, 0).sum(axis=1, keepdims=True),
            last >= 0,
            group_ids,
            epsilon=_STD_EPSILON,
        )
        return jnp.where(number == k, compared, advantages)

    advantages = jax.lax.fori_loop(0, last.max() + 1, compare_turn, zeros)
    return _spread_turns(advantages, action_mask, starts)


def _turn_starts(action_mask: jax.Array, turn_ids: jax.Array) -> jax.Array:
    """[B, T] bool: the first action token of each turn. turn_ids never fall along a row."""
    turns = jnp.where(action_mask, turn_ids, -1)
    before = jnp.pad(jax.lax.cummax(turns, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return turns > before


def _sum_turns(x: jax.Array, action_mask: jax.Array, starts: jax.Array) -> jax.Array:
    """[B, T]: sums of `x` over a turn's action tokens at its first action token, 0 elsewhere."""

    def step_back(following, token):
        value, start = token
        total = following + value
        return jnp.where(start, 0, total), jnp.where(start, total, 0)

    x = jnp.where(action_mask, x, 0).astype(jnp.float32)
    _, sums = jax.lax.scan(step_back, jnp.zeros_like(x[:, 0]), (x.T, starts.T), reverse=True)
    return sums.T


def _spread_turns(x: jax.Array, action_mask: jax.Array, starts: jax.Array) -> jax.Array:
    """[B, T]: on every action token the value at the first one of its turn, 0 elsewhere."""
    start = jax.lax.cummax(jnp.where(starts, jnp.arange(starts.shape[1]), 0), axis=1)
    return jnp.where(action_mask, jnp.take_along_axis(x, start, axis=1), 0)


def uses_critic(estimator: str) -> bool:
    """Whether an advantage estimator reads values, and so trains a value model.

    The other estimators compare the episodes of a group.
    Raises ValueError on an unknown estimator.
    """
    check_choice("rl.advantage", estimator)
    return estimator in CRITIC_ESTIMATORS


@functools.partial(jax.jit, static_argnames=("estimator", "whiten_advantages"))
def estimate_advantages(
    rewards: jax.Array,
    values: jax.Array | None,
    action_mask: jax.Array,
    credit_mask: jax.Array,
    turn_ids: jax.Array,
    group_ids: jax.Array,
    *,
    estimator: str = "gae",
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    whiten_advantages: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token rewards -> (advantages, returns, value_mask) [B, T], by the estimator named.

        estimator     one advantage per      discount per   value_mask
        gae           token of credit_mask   token          credit_mask
        turn_gae      turn                   turn           first action token of each turn
        grpo, rloo    episode                none           nothing
        turn_return   turn                   turn           nothing

    Defaults: the paper's setting (configs/base.py).

    rewards [B, T]: minus the KL charge, if the KL is part of the reward. values [B, T]: of the
    states in which the tokens were chosen. action_mask [B, T] bool. credit_mask [B, T] bool: the
    tokens that `gae` walks over (`action_mask`, or a wider mask as in the released code); the
    others do not read it. turn_ids [B, T] int, never falling along a row. group_ids [B] int:
    episodes of one question share an id.
    returns: targets of the value model on value_mask, 0 elsewhere.

    `gae` and `turn_gae` whiten their advantages over credit_mask and action_mask respectively. The
    others normalise within groups instead: they do not read values (may be None), gae_lambda or
    whiten_advantages. Rows without action tokens enter no statistic.
    Reference: the paper does not mention whitening; its released code whitens token GAE.
    Raises ValueError on an unknown estimator.
    """
    check_masks(action_mask=action_mask, credit_mask=credit_mask)
    if not uses_critic(estimator):
        if estimator == "turn_return":
            advantages = turn_return(rewards, action_mask, turn_ids, group_ids, gamma=gamma)
        else:
            advantages = {"grpo": grpo, "rloo": rloo}[estimator](rewards, action_mask, group_ids)
        return advantages, jnp.zeros_like(advantages), jnp.zeros_like(action_mask)
    if estimator == "turn_gae":
        covered = action_mask
        advantages, returns, value_mask = turn_gae(
            rewards, values, action_mask, turn_ids, gamma=gamma, gae_lambda=gae_lambda
        )
    else:
        covered = value_mask = credit_mask
        advantages, returns = gae(rewards, values, credit_mask, gamma=gamma, gae_lambda=gae_lambda)
    return whiten(advantages, covered) if whiten_advantages else advantages, returns, value_mask


@functools.partial(
    jax.jit,
    static_argnames=(
        "advantage",
        "kl_placement",
        "kl_estimator",
        "placement",
        "outcome_overwrites",
        "over_observations",
        "whiten_advantages",
    ),
)
def stepwise_advantages(
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    old_values: jax.Array | None,
    token_mask: jax.Array,
    action_mask: jax.Array,
    turn_ids: jax.Array,
    group_ids: jax.Array,
    search_end: jax.Array,
    step_rewards: jax.Array,
    outcome_rewards: jax.Array,
    *,
    advantage: str = "gae",
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    kl_coef: float | jax.Array = 1e-3,
    kl_placement: str = "reward",
    kl_estimator: str = "k1",
    placement: str = "step",
    outcome_overwrites: bool = False,
    over_observations: bool = False,
    whiten_advantages: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Rewards of turns and episodes -> (advantages, returns, value_mask [B, T], metrics).

        r_token = place_rewards(step, outcome) - kl_coef * KL(old policy || reference)
        advantages, returns, value_mask = estimate_advantages(r_token, …)

    with the KL on action tokens (arXiv 2505.15107). All of it stays fixed during the updates on a
    rollout.

    old_logprobs, ref_logprobs, old_values, token_mask, action_mask, turn_ids (-1 in prompt and
    padding) [B, T]; group_ids, outcome_rewards [B]; search_end, step_rewards [B, K]. The keywords
    are keys of config.rl, and placement and outcome_overwrites of config.reward. Defaults: the
    paper's setting (configs/base.py).

    The KL belongs to the policy that sampled, so it is a constant. With kl_placement "loss" it is
    left out here, and `kl_loss` charges it.
    metrics: `kl`, mean of the estimator per action token under either placement; `reward`, mean
    over episodes of the summed rewards before the KL.
    Reference (`over_observations=True`): the released code runs token GAE over every token after
      the prompt, observations included, and takes whitening statistics and the value loss from all
      of them; rewards, KL and policy loss stay on action tokens.
    Raises ValueError on an unknown kl_placement.
    """
    check_masks(token_mask=token_mask, action_mask=action_mask)
    check_choice("rl.kl_placement", kl_placement)
    # Rewards at their tokens, and the KL charge of each action token.
    placed = place_rewards(
        step_rewards,
        outcome_rewards,
        search_end,
        action_mask,
        placement=placement,
        outcome_overwrites=outcome_overwrites,
    )
    kl = jnp.where(action_mask, kl_penalty(old_logprobs, ref_logprobs, estimator=kl_estimator), 0)
    # Token GAE walks over action tokens, or over everything after the prompt.
    advantages, returns, value_mask = estimate_advantages(
        placed - kl_coef * kl if kl_placement == "reward" else placed,
        old_values,
        action_mask,
        token_mask & (turn_ids >= 0) if over_observations else action_mask,
        turn_ids,
        group_ids,
        estimator=advantage,
        gamma=gamma,
        gae_lambda=gae_lambda,
        whiten_advantages=whiten_advantages,
    )
    metrics = {"kl": masked_mean(kl, action_mask), "reward": placed.sum(axis=1).mean()}
    return advantages, returns, value_mask, metrics
