"""Statistics over the entries that a mask keeps (device); 0 when it keeps none.

Entries outside a mask may be anything, even NaN: they affect neither results nor gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def check_masks(**masks: jax.Array) -> None:
    """Raises TypeError, naming the argument, for a mask of numbers: "not 0" would be a guess."""
    for name, mask in masks.items():
        if mask.dtype != bool:
            raise TypeError(f"{name} has dtype {mask.dtype}, not bool: pass {name} > 0")


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
    """`x` scaled to variance 1 over `mask`, with mean 0 there if `shift_mean`; 0 outside.

        (x - mean) / sqrt(variance + epsilon) [+ mean, unless shift_mean]

    x, mask: same shape. A single entry, or entries that are all equal, become 0 up to rounding (or
    the mean, unshifted).
    """
    mean = masked_mean(x, mask)
    whitened = (jnp.where(mask, x, 0) - mean) * jax.lax.rsqrt(masked_var(x, mask) + epsilon)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0)


def standardize_in_groups(
    x: jax.Array, mask: jax.Array, group_ids: jax.Array, *, epsilon: float
) -> jax.Array:
    """Entries standardised within their groups: x, mask [B, N], group_ids [B] -> [B, N].

        (x - mean) / (std + epsilon)    over all kept entries of the row's group; 0 outside mask

    A group is all rows with the same id, in any order. std is the population's. A group with a
    single entry, or with equal ones, becomes exactly 0: entries are measured from the group's
    minimum, which leaves no rounding error for a small epsilon to magnify.
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
