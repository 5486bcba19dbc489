"""From token rewards to advantages and returns (device). Arrays [B, T] are indexed by the token they describe; action_mask keeps sampled tokens.

`estimate_advantages` is the one function that the rest of the program calls; the estimators behind it stand alone as well.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from stepsearch_jax.choices import CRITIC_ESTIMATORS, check_choice
from stepsearch_jax.masking import masked_mean, masked_sum, standardize_in_groups, whiten
from stepsearch_jax.rewards.placement import place_rewards

_STD_EPSILON = 1e-6  # added to a group's standard deviation
_LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: far past any sane update, and finite in float32


def bounded_log_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """log p - log q, limited to ±20 so that its exponential and the exponential's gradient stay finite. Shapes: equal."""
    return jnp.clip(numerator - denominator, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)


@functools.partial(jax.jit, static_argnames=("estimator",))
def kl_penalty(logprobs: jax.Array, ref_logprobs: jax.Array, *, estimator: str) -> jax.Array:
    """logprobs, ref_logprobs: equal shapes -> per-token estimate of KL(policy || reference) for tokens drawn from the policy.

    With x = logprobs - ref_logprobs (Schulman 2020, "Approximating KL divergence"):
        k1 = x                      unbiased, may be negative
        k2 = x^2 / 2                biased, its gradient is that of the KL
        k3 = exp(-x) - 1 + x        unbiased, never negative ("low_var_kl"; x is limited to ±20 in it)
    Raises ValueError on an unknown estimator.
    """
    check_choice("rl.kl_estimator", estimator)
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * jnp.square(difference)
    bounded = bounded_log_ratio(ref_logprobs, logprobs)
    return jnp.expm1(bounded) - bounded


@jax.jit
def adapt_kl_coef(
    kl_coef: jax.Array,
    mean_kl: jax.Array,
    *,
    target: float,
    horizon: float,
    num_episodes: int | jax.Array,
) -> jax.Array:
    """The next beta [] (adaptive controller of Ziegler et al. 2019, section 2.2, with the horizon of their code; target > 0).

        e = clip(mean_kl / target - 1, -0.2, 0.2);  beta' = beta * (1 + e * min(num_episodes / horizon, 1))

    mean_kl: mean over the action tokens of the iteration; num_episodes: how many it had. A mean KL that is not finite leaves beta as it is.
    Reference: the released code has no min; beta would turn negative as soon as one iteration held more than 5 horizons.
    """
    error = jnp.clip(mean_kl / target - 1, -0.2, 0.2)
    return jnp.where(
        jnp.isfinite(mean_kl),
        kl_coef * (1 + error * jnp.minimum(num_episodes / horizon, 1)),
        kl_coef,
    )


@jax.jit
def gae(
    rewards: jax.Array,
    values: jax.Array,
    action_mask: jax.Array,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """rewards, values, action_mask [B, T] -> (advantages, returns) [B, T], 0 outside action_mask (Schulman et al. 2016, eq. 16).

    With t' the next action token after t (value and advantage 0 after the last one):
        delta_t = r_t + gamma V_t' - V_t;   A_t = delta_t + gamma gae_lambda A_t';   return_t = A_t + V_t

    The recursion passes over observation tokens: they take no part, whatever rewards and values hold there. One turn's credit thus reaches the turn
    before it through its action tokens alone: walking through 400 observation tokens at gae_lambda = 0.95 would leave 1e-9 of it.
    Reference: the released code steps through observation tokens as well (pass its mask as `action_mask`). It does so at gamma = gae_lambda = 1,
      where the values in between cancel and action tokens get the same advantage either way.
    """
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
    """GAE with one state and one action a turn: rewards, values, action_mask, turn_ids [B, T] -> (advantages, returns, starts) [B, T].

    The turn's state is the one before its first action token, whose value it has; its reward is the sum over its action tokens; the recursion of `gae` goes
    from turn to turn, with gamma and gae_lambda once a turn. All action tokens of a turn share its advantage; returns stand at `starts`, the first action
    token of each turn, alone: the values elsewhere are neither used nor trained.
    Reference: in neither the paper nor its code, which run GAE over tokens. At gamma = gae_lambda = 1 the first action token of each turn has the advantage
      that token GAE gives it.
    """
    starts = _turn_starts(action_mask, turn_ids)
    advantages, returns = gae(
        _sum_turns(rewards, action_mask, starts), values, starts, gamma=gamma, gae_lambda=gae_lambda
    )
    return _spread_turns(advantages, action_mask, starts), returns, starts


@jax.jit
def grpo(rewards: jax.Array, action_mask: jax.Array, group_ids: jax.Array) -> jax.Array:
    """rewards, action_mask [B, T], group_ids [B] -> advantages [B, T], one for all action tokens of an episode (Shao et al. 2024, arXiv 2402.03300, 4.1.2).

        R_b = Σ_t r_bt over action tokens;    A_b = (R_b - mean) / (std + 1e-6) over the episodes of b's group

    Groups are the rows with the same id. An episode without action tokens is none of a group's; an episode alone in its group gets 0.
    Reference: std is that of the population; some implementations take the sample's, sqrt(n / (n - 1)) times as large.
    """
    present = action_mask.any(axis=1, keepdims=True)
    returns = masked_sum(rewards, action_mask, axis=1)[:, None]
    return jnp.where(
        action_mask, standardize_in_groups(returns, present, group_ids, epsilon=_STD_EPSILON), 0
    )


@jax.jit
def rloo(rewards: jax.Array, action_mask: jax.Array, group_ids: jax.Array) -> jax.Array:
    """rewards, action_mask [B, T], group_ids [B] -> advantages [B, T], one for all action tokens of an episode (RLOO: Ahmadian et al. 2024, arXiv 2402.14740).

        A_b = R_b - mean of R over the other episodes of b's group

    The baseline leaves the episode itself out, so it biases no gradient. Groups, absent episodes and lone ones: as `grpo`.
    """
    present, returns = action_mask.any(axis=1), masked_sum(rewards, action_mask, axis=1)
    others = (
        (group_ids[:, None] == group_ids) & present & ~jnp.eye(len(group_ids), dtype=bool)
    )  # [B, B]
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
    """rewards, action_mask, turn_ids [B, T], group_ids [B] -> advantages [B, T], one for all action tokens of a turn: step rewards without a value model.

    Turn rewards r_bk are sums over the turn's action tokens. The last turn's, which holds the outcome, is standardised over the last turns of the group's
    episodes; the earlier turns' over all earlier turns of the group's episodes, as (r - mean) / (std + 1e-6). With r' the standardised rewards,
        A_bk = Σ_{j >= k} gamma^(j - k) r'_bj

    Apart, because step rewards and outcomes differ in scale and in number: together, many small step rewards would set the mean and the deviation that the
    outcome is measured by. An episode alone in its group gets 0 for its last turn. Groups and absent episodes: as `grpo`.
    Reference: IGPO (arXiv 2510.14967) sums turn rewards in the same way, but standardises outcomes and step rewards of a group jointly, as does GRPO with
      process supervision (arXiv 2402.03300, 4.1.3).
    """
    starts = _turn_starts(action_mask, turn_ids)
    position = jnp.arange(action_mask.shape[1])
    is_last = position == jnp.where(starts, position, -1).max(axis=1, keepdims=True)
    turn_rewards = _sum_turns(rewards, action_mask, starts)
    standardized = sum(
        standardize_in_groups(turn_rewards, part, group_ids, epsilon=_STD_EPSILON)
        for part in (starts & is_last, starts & ~is_last)
    )
    advantages, _ = gae(
        standardized, jnp.zeros_like(standardized), starts, gamma=gamma, gae_lambda=1.0
    )  # without values: the discounted sum
    return _spread_turns(advantages, action_mask, starts)


def _turn_starts(action_mask: jax.Array, turn_ids: jax.Array) -> jax.Array:
    """[B, T] bool: the first action token of each turn. turn_ids never fall along a row."""
    turns = jnp.where(action_mask, turn_ids, -1)
    before = jnp.pad(jax.lax.cummax(turns, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return turns > before


def _sum_turns(x: jax.Array, action_mask: jax.Array, starts: jax.Array) -> jax.Array:
    """[B, T]: at each turn's first action token the sum of `x` over the turn's action tokens, 0 elsewhere."""

    def step_back(following, token):
        value, start = token
        total = following + value
        return jnp.where(start, 0, total), jnp.where(start, total, 0)

    x = jnp.where(action_mask, x, 0).astype(jnp.float32)
    _, sums = jax.lax.scan(step_back, jnp.zeros_like(x[:, 0]), (x.T, starts.T), reverse=True)
    return sums.T


def _spread_turns(x: jax.Array, action_mask: jax.Array, starts: jax.Array) -> jax.Array:
    """[B, T]: on every action token what stands at the first one of its turn, 0 elsewhere."""
    start = jax.lax.cummax(jnp.where(starts, jnp.arange(starts.shape[1]), 0), axis=1)
    return jnp.where(action_mask, jnp.take_along_axis(x, start, axis=1), 0)


def uses_critic(estimator: str) -> bool:
    """Whether an advantage estimator reads values, so that a value model is trained; the others compare the episodes of a group.

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
    """Token rewards to what the losses need: (advantages, returns, value_mask) [B, T].

    rewards: of tokens, the KL already subtracted where it is part of the reward; values: of the states in which the tokens were chosen; action_mask: bool;
    turn_ids int, never falling along a row; all [B, T]. group_ids [B] int: episodes of one question share it.

        estimator     advantage of                             discount     value_mask
        gae           each token of credit_mask (`gae`)        a token      credit_mask
        turn_gae      each turn (`turn_gae`)                   a turn       first action token of each turn
        grpo, rloo    each episode (`grpo`, `rloo`)            none         nothing
        turn_return   each turn (`turn_return`)                a turn       nothing

    credit_mask [B, T] bool: the tokens that token GAE walks over: `action_mask`, or a wider mask as the released code has it; the others do not read it.
    returns: what the value model should say where value_mask, 0 elsewhere. The estimators without a value model read neither values, which may be None, nor
    gae_lambda, nor whiten_advantages: groups have normalised their advantages already. The other two are whitened over the tokens that they cover:
    credit_mask or action_mask. Rows without action tokens take part in no statistic.
    Reference: the paper does not speak of whitening; its released code whitens token GAE.
    Raises ValueError on an unknown estimator.
    """
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
    """What stays fixed during the updates on a rollout: (advantages, returns, value_mask [B, T], metrics).

    old_logprobs, ref_logprobs, old_values, token_mask, action_mask, turn_ids (-1 in prompt and padding) [B, T]; group_ids [B]; search_end, step_rewards [B, K];
    outcome_rewards [B]. Keywords: the keys of config.rl, and of config.reward placement and outcome_overwrites.

        r_token = place_rewards(step, outcome) - kl_coef * KL(old policy || reference)    on action tokens
        advantages, returns, value_mask = estimate_advantages(r_token, …)

    The KL is that of the policy that sampled, so it is a reward and carries no gradient; with kl_placement "loss" it is left out here and `kl_loss` charges it.
    metrics: `kl`, mean of the estimator per action token, wherever it is charged; `reward`, mean over episodes of the summed rewards before the KL.
    Reference (`over_observations=True`): the released code walks token GAE over every token after the prompt, observations included, and takes the statistics
      of the whitening and the value loss from all of them; rewards, KL and policy loss stay on action tokens.
    Raises ValueError on an unknown kl_placement.
    """
    check_choice("rl.kl_placement", kl_placement)
    placed = place_rewards(
        step_rewards,
        outcome_rewards,
        search_end,
        action_mask,
        placement=placement,
        outcome_overwrites=outcome_overwrites,
    )
    kl = jnp.where(action_mask, kl_penalty(old_logprobs, ref_logprobs, estimator=kl_estimator), 0)
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
    return (
        advantages,
        returns,
        value_mask,
        {"kl": masked_mean(kl, action_mask), "reward": placed.sum(axis=1).mean()},
    )
