"""Per-token estimates of the KL divergence, and its adaptive coefficient (device)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from stepsearch_jax.choices import check_choice

_LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: far past any sane update, and finite in float32


def bounded_log_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """log p - log q, clipped to ±20 so that its exponential and that gradient stay finite.

    numerator, denominator: log-probabilities of equal shapes.
    """
    return jnp.clip(numerator - denominator, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)


@functools.partial(jax.jit, static_argnames=("estimator",))
def kl_penalty(logprobs: jax.Array, ref_logprobs: jax.Array, *, estimator: str) -> jax.Array:
    """Per-token estimate of KL(policy || reference) for tokens drawn from the policy.

        k1 = x                      unbiased, may be negative
        k2 = x^2 / 2                biased, its gradient is that of the KL
        k3 = exp(-x) - 1 + x        unbiased, never negative ("low_var_kl"), x clipped to ±20

    with x = logprobs - ref_logprobs (Schulman 2020, "Approximating KL divergence").
    logprobs, ref_logprobs: equal shapes, which is also the shape of the result.
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
    """The next KL coefficient beta (Ziegler et al. 2019, section 2.2, with their code's horizon).

        e = clip(mean_kl / target - 1, -0.2, 0.2)
        beta' = beta * (1 + e * min(num_episodes / horizon, 1))

    kl_coef []: beta. mean_kl []: mean over the action tokens of the iteration; if it is not finite,
    beta stays as it is. target: above 0. num_episodes: the number of episodes in the iteration.
    Reference: the released code has no min; beta would turn negative as soon as one iteration held
      more than 5 horizons.
    """
    error = jnp.clip(mean_kl / target - 1, -0.2, 0.2)
    return jnp.where(
        jnp.isfinite(mean_kl),
        kl_coef * (1 + error * jnp.minimum(num_episodes / horizon, 1)),
        kl_coef,
    )
