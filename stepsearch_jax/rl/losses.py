"""The losses of PPO with step-wise rewards, as pure jitted functions (device).

    loss = Σ_bt term_bt / normalizer    over the tokens of a mask

normalizer is the `loss_normalizer` of everything that one optimiser step sees; without it a loss is
the mean over its own mask. If a minibatch is split by rows and each part uses the minibatch's
normalizer, then losses, metrics and gradients of the parts add up to those of the minibatch. All
arrays are [B, T], indexed by the token they describe. Entries outside a loss's mask affect neither
its result nor a gradient. Over an empty mask everything is 0. The defaults are the paper's setting
(configs/base.py).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from stepsearch_jax.choices import check_choice
from stepsearch_jax.masking import check_masks, masked_mean, masked_sum
from stepsearch_jax.rl.advantages import stepwise_advantages, uses_critic
from stepsearch_jax.rl.kl import bounded_log_ratio, kl_penalty

Metrics = dict[str, jax.Array]


@functools.partial(jax.jit, static_argnames=("aggregation",))
def aggregate(
    x: jax.Array,
    mask: jax.Array,
    *,
    aggregation: str = "token_mean",
    normalizer: jax.Array | None = None,
) -> jax.Array:
    """Mean of x over mask: x, mask [B, T] -> [].

        token_mean      Σ_bt x_bt / normalizer           all tokens weigh the same
        sequence_mean   Σ_b mean_t(x_bt) / normalizer    all episodes weigh the same

    normalizer []: `loss_normalizer` of the whole minibatch, of which x may be a part; None: of this
    mask.
    Reference: the paper and its code take token means; GRPO (arXiv 2402.03300, eq. 3) takes
      sequence means.
    Raises ValueError on an unknown aggregation.
    """
    check_masks(mask=mask)
    check_choice("rl.aggregation", aggregation)
    count = loss_normalizer(mask, aggregation=aggregation) if normalizer is None else normalizer
    total = (
        masked_sum(x, mask) if aggregation == "token_mean" else masked_mean(x, mask, axis=1).sum()
    )
    return total / jnp.maximum(count, 1)


@functools.partial(jax.jit, static_argnames=("aggregation",))
def loss_normalizer(mask: jax.Array, *, aggregation: str = "token_mean") -> jax.Array:
    """Number of tokens (token_mean), or of rows with tokens (sequence_mean): mask [B, T] -> [].

    Raises ValueError on an unknown aggregation.
    """
    check_masks(mask=mask)
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
    """Clipped surrogate of PPO (Schulman et al. 2017, eq. 7), negated because it is minimised.

        rho = min(exp(logprobs - old_logprobs), max_ratio)
        loss = -aggregate(min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A))

    logprobs, old_logprobs, advantages A, action_mask [B, T] -> (loss [], metrics).

    Differentiable in logprobs; advantages and old_logprobs are constants. log rho is clipped to
    ±20. A truncated rho keeps the gradient max_ratio A ∇logprobs. Without truncation rho has no
    upper bound at A < 0, and one token far from the policy that sampled it could outweigh a batch.
    max_ratio: at least 1 + clip_high; inf = no truncation.
    metrics, aggregated like the loss: `clip_fraction`, fraction of tokens whose clipped term is the
    smaller one; `truncated_fraction`, fraction with rho > max_ratio; `approx_kl`, k3 estimate of
    KL(old || new) per token.
    Reference: the paper and its code clip both sides at 0.2 and truncate nothing; separate bounds
      are from DAPO (arXiv 2503.14476, section 3.1). Weights truncated from above: Ionides 2008,
      "Truncated importance sampling"; V-trace uses them for lagging samplers (arXiv 1802.01561,
      section 4.1).
    """
    check_masks(action_mask=action_mask)
    old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
    # Zeros outside the mask before exp: padding at -inf must not poison the gradient.
    logprobs = jnp.where(action_mask, logprobs, 0)
    old_logprobs = jnp.where(action_mask, old_logprobs, 0)
    ratio = jnp.exp(bounded_log_ratio(logprobs, old_logprobs))
    truncated = action_mask & (ratio > max_ratio)
    ratio = ratio * jax.lax.stop_gradient(jnp.minimum(1, max_ratio / ratio))
    unclipped = ratio * advantages
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
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
    """Half the squared error of the values, the larger of the clipped and the unclipped one.

        v_clip = old_values + clip(values - old_values, -value_clip, value_clip)
        loss = aggregate(max((values - returns)^2, (v_clip - returns)^2) / 2)

    values, old_values, returns, value_mask [B, T] -> (loss [], metrics).

    value_mask: the tokens whose values the estimator reads (`estimate_advantages`); normalizer
    counts these. Differentiable in values; old_values and returns are constants.
    metrics: `value_clip_fraction`, share of tokens whose clipped term is the larger one;
    `value_error`, mean squared error without clipping.
    Reference: the paper does not mention clipping of values; its released code clips at 0.5.
    """
    check_masks(value_mask=value_mask)
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
    # Within the range both terms are the same number but for rounding.
    clips = (jnp.abs(values - old_values) > value_clip) & (clipped > unclipped)
    metrics = {"value_clip_fraction": mean(clips), "value_error": mean(unclipped)}
    return loss, jax.lax.stop_gradient(metrics)


@functools.partial(jax.jit, static_argnames=("aggregation",))
def entropy_bonus(
    entropy: jax.Array,
    action_mask: jax.Array,
    *,
    aggregation: str = "token_mean",
    normalizer: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Mean entropy of the policy, which a loss subtracts with a weight.

        bonus = aggregate(entropy)

    entropy, action_mask [B, T] -> (bonus [], metrics).
    Reference: only the released code has it (weight 1e-3); the paper does not.
    """
    check_masks(action_mask=action_mask)
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
    """Mean KL penalty against the reference, which a loss adds with a weight.

        loss = aggregate(kl_penalty(logprobs, ref_logprobs))

    logprobs, ref_logprobs, action_mask [B, T] -> (loss [], metrics).

    Differentiable in logprobs; ref_logprobs is a constant. The gradient ignores that the tokens
    are the policy's own samples, so the estimator decides which divergence falls. In expectation,
    with x = logprobs - ref_logprobs, the gradient is
        k1    E[∇ log p] = 0: pure noise. Use it in the reward, not here.
        k2    E[x ∇ log p] = ∇ KL(policy || reference)
        k3    E[(1 - exp(-x)) ∇ log p] = ∇ KL(reference || policy), as in GRPO
    Reference: the paper and its code charge the KL in the reward; the loss term is GRPO's (arXiv
      2402.03300, eq. 4), and so is the default estimator.
    """
    check_masks(action_mask=action_mask)
    # As in policy_loss: nothing outside the mask may reach the gradient.
    logprobs = jnp.where(action_mask, logprobs, 0)
    ref_logprobs = jnp.where(action_mask, jax.lax.stop_gradient(ref_logprobs), 0)
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
    """The whole objective of StePPO and its baselines (arXiv 2505.15107) -> (loss [], metrics).

        r_token = place_rewards(step, outcome) - kl_coef * KL(old || reference)
        A, returns, value_mask = estimate_advantages(r_token, old_values, …)
        loss = policy_loss + value_coef * value_loss - entropy_coef * entropy_bonus

    With kl_placement "loss" r_token has no KL term and the loss has + kl_coef * kl_loss.

    logprobs, old_logprobs, ref_logprobs [B, T]: of the tokens, under the current policy, the one
      that sampled and the frozen reference
    values, old_values [B, T]: of the value model, now and at sampling
    entropy [B, T]: of the current policy
    token_mask, action_mask [B, T] bool: not padding; sampled by the policy
    turn_ids [B, T] int: turn of the token, -1 in prompt and padding
    group_ids [B] int: episodes of one question share an id
    search_end [B, K] int: index of the token that closes turn k's search, -1 = no search
    step_rewards [B, K], outcome_rewards [B]

    Defaults: the paper's setting, as in configs/base.py; the paper does not state gamma,
    gae_lambda, whiten_advantages and value_clip, which are the released code's. The keywords are
    keys of config.rl, and placement and outcome_overwrites of config.reward. Two differ: value_coef
    is no key, because the learner has one optimiser per model; config.rl.max_ratio applies only to
    log-probabilities of the sampler, otherwise nothing is truncated, as here.

    Differentiable in logprobs, values and entropy; rewards, advantages and returns are constants.
    An estimator without a value model (grpo, rloo, turn_return) has no value_loss; values and
    old_values are not read and may be None. Rows without action tokens or searches add nothing, and
    a batch of such rows is defined.
    Raises ValueError on an unknown word.
    """
    # Rewards at their tokens, then advantages: constants of the update.
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
    # The policy's terms, over action tokens.
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
    # The value model's term, over the tokens whose values the estimator reads.
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
    # The KL as a loss term instead of a reward.
    if kl_placement == "loss":
        kl, kl_metrics = kl_loss(
            logprobs, ref_logprobs, action_mask, estimator=kl_estimator, **over_actions
        )
        loss += kl_coef * kl
        metrics |= kl_metrics
    return loss, jax.lax.stop_gradient(metrics)
