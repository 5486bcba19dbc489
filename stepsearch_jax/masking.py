"""Statistics over the entries that a mask keeps, defined (as 0) when it keeps none.

Entries outside a mask may be anything, NaN too: they touch neither the results nor their gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_sum(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Sum of `x` where `mask`."""
    return jnp.where(mask, x, 0).sum(axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Mean of `x` where `mask`, 0 where the mask is empty."""
    return masked_sum(x, mask, axis) / jnp.maximum(mask.sum(axis), 1)


def masked_var(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Population variance of `x` where `mask`, 0 where the mask is empty."""
    mean = masked_mean(x, mask, axis)
    if axis is not None:
        mean = jnp.expand_dims(mean, axis)
    return masked_mean(jnp.square(jnp.where(mask, x, 0) - mean), mask, axis)


def whiten(
    x: jax.Array, mask: jax.Array, *, shift_mean: bool = True, epsilon: float = 1e-8
) -> jax.Array:
    """`x` scaled to variance 1 over `mask`, and shifted to mean 0 there if `shift_mean`; 0 outside.

    x, mask: same shape. (x - mean) / sqrt(variance + epsilon): entries that are all equal, or only one, become 0 up to rounding (or the mean,
    unshifted).
    """
    mean = masked_mean(x, mask)
    whitened = (jnp.where(mask, x, 0) - mean) * jax.lax.rsqrt(masked_var(x, mask) + epsilon)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0)


def standardize_in_groups(
    x: jax.Array, mask: jax.Array, group_ids: jax.Array, *, epsilon: float
) -> jax.Array:
    """x, mask [B, N], group_ids [B] -> [B, N]: (x - mean) / (standard deviation + epsilon) where `mask`, 0 elsewhere.

    Both statistics are those of all kept entries, of whatever row, of the row's group: the rows with the same id, in any order and number. The deviation is the
    population's. A group whose entries are all equal, or only one, becomes exactly 0: entries are measured from the group's least, so no rounding is left
    for a small epsilon to blow up.
    """
    same = group_ids[:, None] == group_ids  # [B, B]

    def sum_group(per_row):
        return jnp.where(same, per_row, 0).sum(axis=1)

    least = jnp.where(same, jnp.where(mask, x, jnp.inf).min(axis=1), jnp.inf).min(axis=1)
    count = jnp.maximum(sum_group(mask.sum(axis=1)), 1)
    x = jnp.where(mask, x - least[:, None], 0)
    centred = jnp.where(mask, x - (sum_group(x.sum(axis=1)) / count)[:, None], 0)
    deviation = jnp.sqrt(sum_group(jnp.square(centred).sum(axis=1)) / count)
    return centred / (deviation[:, None] + epsilon)
