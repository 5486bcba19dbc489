"""The losses of PPO with step-wise rewards: pure jitted functions of arrays and keyword scalars (device).

Every loss is an `aggregate` of what its tokens contribute, divided by `normalizer`, the `loss_normalizer` of everything that one optimiser step sees. The
parts of a minibatch, whole rows each, divided by the whole's normalizer, add up to the whole: loss, metrics and gradient. All arrays are [B, T], indexed by
the token they describe; nothing outside a loss's mask reaches its result or a gradient. Over an empty mask everything is 0.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from stepsearch_jax.choices import check_choice
from stepsearch_jax.masking import masked_mean, masked_sum
from stepsearch_jax.rl.advantages import (
    bounded_log_ratio,
    kl_penalty,
    stepwise_advantages,
    uses_critic,
)

Metrics = dict[str, jax.Array]


@functools.partial(jax.jit, static_argnames=("aggregation",))
def aggregate(
    x: jax.Array,
    mask: jax.Array,
    *,
    aggregation: str = "token_mean",
    normalizer: jax.Array | None = None,
) -> jax.Array:
    """x, mask [B, T] -> [], the mean of x where mask.

        token_mean      Σ_bt x_bt / normalizer             every token counts the same, a long episode more
        sequence_mean   Σ_b mean_t(x_bt) / normalizer      every episode counts the same, its tokens less the more they are

    normalizer []: `loss_normalizer` of the whole minibatch, of which x may be a part; None: of this mask.
    Reference: the paper and its code take token means; GRPO (arXiv 2402.03300, eq. 3) takes sequence means.
    Raises ValueError on an unknown aggregation.
    """
    check_choice("rl.aggregation", aggregation)
    if normalizer is None:
        normalizer = loss_normalizer(mask, aggregation=aggregation)
    total = (
        masked_sum(x, mask) if aggregation == "token_mean" else masked_mean(x, mask, axis=1).sum()
    )
    return total / jnp.maximum(normalizer, 1)


@functools.partial(jax.jit, static_argnames=("aggregation",))
def loss_normalizer(mask: jax.Array, *, aggregation: str = "token_mean") -> jax.Array:
    """mask [B, T] -> []: its number of tokens (token_mean), or of rows that have any (sequence_mean). Raises ValueError on an unknown aggregation."""
    check_choice("rl.aggregation", aggregation)
    return mask.sum() if aggregation == "token_mean" else mask.any(axis=1).sum()


@functools.partial(jax.jit, static_argnames=("aggregation",))
def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    action_mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_ratio: float = math.inf,
    aggregation: str = "token_mean",
    normalizer: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """logprobs, old_logprobs, advantages, action_mask [B, T] -> (loss [], metrics) (Schulman et al. 2017, eq. 7; minimised, hence the sign).

        rho = exp(logprobs - old_logprobs), at most max_ratio
        loss = -aggregate(min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A))

    Differentiable in logprobs; advantages and old_logprobs are constants. log rho is limited to ±20. A rho that is cut to max_ratio keeps its gradient, with
    that weight, max_ratio A ∇logprobs: the clip leaves what is to become less likely (A < 0) without a bound above, and one token far from the policy that
    sampled it could outweigh a batch. max_ratio: 1 + clip_high or more; inf = nothing is cut.
    metrics: `clip_fraction`, share of tokens where the clipped term is the smaller; `truncated_fraction`, share of those with rho > max_ratio; `approx_kl`, k3
    estimate of KL(old || new) per token; all aggregated as the loss is.
    Reference: the paper and its code have one bound for both sides, 0.2, and cut no ratio; two bounds are from DAPO (arXiv 2503.14476, 3.1). Weights truncated
      from above: Ionides 2008, "Truncated importance sampling"; V-trace has them for lagging samplers (arXiv 1802.01561, 4.1).
    """
    old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
    # Zeros stand in outside the mask before exp: whatever lies there (padding at -inf) must not poison the gradient.
    logprobs, old_logprobs = (
        jnp.where(action_mask, logprobs, 0),
        jnp.where(action_mask, old_logprobs, 0),
    )
    ratio = jnp.exp(bounded_log_ratio(logprobs, old_logprobs))
    truncated = action_mask & (ratio > max_ratio)
    ratio = ratio * jax.lax.stop_gradient(jnp.minimum(1, max_ratio / ratio))
    unclipped, clipped = (
        ratio * advantages,
        jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages,
    )
    mean = functools.partial(
        aggregate, mask=action_mask, aggregation=aggregation, normalizer=normalizer
    )
    loss = -mean(jnp.minimum(unclipped, clipped))
    metrics = {
        "clip_fraction": mean(clipped < unclipped),
        "truncated_fraction": mean(truncated),
        "approx_kl": mean(kl_penalty(old_logprobs, logprobs, estimator="k3")),
    }
    return loss, jax.lax.stop_gradient(metrics)


@functools.partial(jax.jit, static_argnames=("aggregation",))
def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    value_mask: jax.Array,
    *,
    value_clip: float = 0.5,
    aggregation: str = "token_mean",
    normalizer: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """values, old_values, returns, value_mask [B, T] -> (loss [], metrics).

        v_clip = old_values + clip(values - old_values, -value_clip, value_clip)
        loss = aggregate(max((values - returns)^2, (v_clip - returns)^2) / 2)

    value_mask: the tokens whose values the advantages were made from (`estimate_advantages`); normalizer counts these.
    Differentiable in values; old_values and returns are constants.
    metrics: `value_clip_fraction`, share of tokens where the clipped term is the larger; `value_error`, mean squared error without clipping.
    Reference: the paper does not speak of clipping values; its released code does, with 0.5.
    """
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    values, old_values, returns = (
        jnp.where(value_mask, x, 0) for x in (values, old_values, returns)
    )
    clipped_values = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
    unclipped, clipped = jnp.square(values - returns), jnp.square(clipped_values - returns)
    mean = functools.partial(
        aggregate, mask=value_mask, aggregation=aggregation, normalizer=normalizer
    )
    loss = 0.5 * mean(jnp.maximum(unclipped, clipped))
    clips = (jnp.abs(values - old_values) > value_clip) & (
        clipped > unclipped
    )  # within the range both are the same number but for rounding
    return loss, jax.lax.stop_gradient(
        {"value_clip_fraction": mean(clips), "value_error": mean(unclipped)}
    )


@functools.partial(jax.jit, static_argnames=("aggregation",))
def entropy_bonus(
    entropy: jax.Array,
    action_mask: jax.Array,
    *,
    aggregation: str = "token_mean",
    normalizer: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """entropy, action_mask [B, T] -> (bonus [], metrics): the mean of the policy's entropy, to be subtracted from a loss with its weight.

    Reference: only the released code has it (weight 1e-3); the paper does not.
    """
    bonus = aggregate(entropy, action_mask, aggregation=aggregation, normalizer=normalizer)
    return bonus, {"entropy": jax.lax.stop_gradient(bonus)}


@functools.partial(jax.jit, static_argnames=("estimator", "aggregation"))
def kl_loss(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    action_mask: jax.Array,
    *,
    estimator: str = "k3",
    aggregation: str = "token_mean",
    normalizer: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """logprobs, ref_logprobs, action_mask [B, T] -> (loss [], metrics): the mean of `kl_penalty`, to be added to a loss with its weight.

    Differentiable in logprobs; ref_logprobs is a constant. Which divergence goes down depends on the estimator, because the tokens are the policy's own and
    the gradient does not see that. In expectation over them it is, with x = logprobs - ref_logprobs,
        k1    E[∇ log p] = 0: pure noise. Use it in the reward, not here.
        k2    E[x ∇ log p] = ∇ KL(policy || reference)
        k3    E[(1 - exp(-x)) ∇ log p] = ∇ KL(reference || policy), what GRPO charges (arXiv 2402.03300, eq. 4)
    Reference: the paper and its code charge the KL in the reward; a loss term is GRPO's way.
    """
    # As in policy_loss: nothing outside the mask may reach the gradient.
    logprobs, ref_logprobs = (
        jnp.where(action_mask, logprobs, 0),
        jnp.where(action_mask, jax.lax.stop_gradient(ref_logprobs), 0),
    )
    loss = aggregate(
        kl_penalty(logprobs, ref_logprobs, estimator=estimator),
        action_mask,
        aggregation=aggregation,
        normalizer=normalizer,
    )
    return loss, {"kl_loss": jax.lax.stop_gradient(loss)}


@functools.partial(
    jax.jit,
    static_argnames=(
        "advantage",
        "aggregation",
        "kl_placement",
        "kl_estimator",
        "placement",
        "outcome_overwrites",
        "over_observations",
        "whiten_advantages",
    ),
)
def stepwise_ppo_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    values: jax.Array | None,
    old_values: jax.Array | None,
    entropy: jax.Array,
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
    whiten_advantages: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_ratio: float = math.inf,
    aggregation: str = "token_mean",
    value_clip: float = 0.5,
    value_coef: float = 1.0,
    entropy_coef: float = 0.0,
    kl_coef: float | jax.Array = 1e-3,
    kl_placement: str = "reward",
    kl_estimator: str = "k1",
    placement: str = "step",
    outcome_overwrites: bool = False,
    over_observations: bool = False,
) -> tuple[jax.Array, Metrics]:
    """StePPO's whole objective on one batch, with its baselines and variants -> (loss [], metrics) (arXiv 2505.15107).

    logprobs, old_logprobs, ref_logprobs: of the tokens under the current, the sampling and the frozen reference policy; values, old_values: of the
    value model now and at sampling; entropy: of the current policy; token_mask: bool, not padding; action_mask: bool, sampled by the policy; turn_ids: int, the
    turn of the token, -1 in prompt and padding; all [B, T]. group_ids [B]: int, episodes of one question share it. search_end [B, K]: int, index of the token
    that closes turn k's search, -1 = none; step_rewards [B, K]; outcome_rewards [B]. Keywords: the keys of config.rl, and of config.reward placement and
    outcome_overwrites; value_coef is 1 in the learner, which has an optimiser for each model.

        loss = policy_loss + value_coef * value_loss - entropy_coef * entropy_bonus [+ kl_coef * kl_loss]

    on the advantages, returns and value_mask of `stepwise_advantages`: step rewards at their turn's search_end, the outcome at the last action token
    (`place_rewards`), minus kl_coef * KL(old || reference) unless kl_placement is "loss", then one of the estimators of `estimate_advantages`. With one that
    has no value model there is no value_loss; values and old_values are not read and may be None. Differentiable in logprobs, values and entropy;
    rewards, advantages and returns carry no gradient. All-masked rows, no searches, no action tokens at all: defined, they add nothing.
    Raises ValueError on an unknown word.
    """
    advantages, returns, value_mask, metrics = jax.lax.stop_gradient(
        stepwise_advantages(
            old_logprobs,
            ref_logprobs,
            old_values,
            token_mask,
            action_mask,
            turn_ids,
            group_ids,
            search_end,
            step_rewards,
            outcome_rewards,
            advantage=advantage,
            gamma=gamma,
            gae_lambda=gae_lambda,
            kl_coef=kl_coef,
            kl_placement=kl_placement,
            kl_estimator=kl_estimator,
            placement=placement,
            outcome_overwrites=outcome_overwrites,
            over_observations=over_observations,
            whiten_advantages=whiten_advantages,
        )
    )
    over_actions = dict(
        aggregation=aggregation, normalizer=loss_normalizer(action_mask, aggregation=aggregation)
    )
    policy, policy_metrics = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        action_mask,
        clip_low=clip_low,
        clip_high=clip_high,
        max_ratio=max_ratio,
        **over_actions,
    )
    bonus, entropy_metrics = entropy_bonus(entropy, action_mask, **over_actions)
    loss = policy - entropy_coef * bonus
    metrics |= {"policy_loss": policy} | policy_metrics | entropy_metrics
    if uses_critic(advantage):
        normalizer = loss_normalizer(value_mask, aggregation=aggregation)
        value, value_metrics = value_loss(
            values,
            old_values,
            returns,
            value_mask,
            value_clip=value_clip,
            aggregation=aggregation,
            normalizer=normalizer,
        )
        loss += value_coef * value
        metrics |= {"value_loss": value} | value_metrics
    if kl_placement == "loss":
        kl, kl_metrics = kl_loss(
            logprobs, ref_logprobs, action_mask, estimator=kl_estimator, **over_actions
        )
        loss += kl_coef * kl
        metrics |= kl_metrics
    return loss, jax.lax.stop_gradient(metrics)
