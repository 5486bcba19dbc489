"""Reproducible sampling: a token's noise depends only on the run's key, the episode and its index.

Within `shard_map` every device holds a slice of the vocabulary (`axis` names the mesh axis).
Between slices go one number per block of tokens, one block, the likeliest tokens for top_k, and a
few sums for top_p. Logits are never gathered.

Axis letters: b rows, V vocabulary (of this device's slice).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Blocks of the vocabulary; 2^7 * 3, so that the slices of any usual tensor axis hold whole blocks.
MAX_BLOCKS = 384


def count_blocks(vocab_size: int) -> int:
    """Into how many blocks of equal size the vocabulary is cut. A slice holds whole blocks."""
    return math.gcd(vocab_size, MAX_BLOCKS)


def gather_slices(x: jax.Array, axis: str | None) -> jax.Array:
    """[b, n] of this slice -> [b, n * slices], in the order of the vocabulary."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)


def sum_slices(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over all slices."""
    return x if axis is None else jax.lax.psum(x, axis)


def restrict(logits: jax.Array, *, top_k: int, top_p: float, axis: str | None = None) -> jax.Array:
    """Logits [b, V], -inf outside the k likeliest and the nucleus of mass top_p.

    top_k = 0 and top_p = 1.0 keep everything. The likeliest token always stays, and so do tokens
    tied with the last one kept. With top_k the nucleus (Holtzman et al. 2020) is taken among the k
    likeliest. Without, its threshold is found by bisection, so the vocabulary is never sorted.
    Reference: the released code samples with top_p = 0.95, which biases ratio and KL against the
    learner's full distribution; the default is 1.
    """
    vocab_size = logits.shape[-1] * (1 if axis is None else jax.lax.axis_size(axis))
    limited, kept = 0 < top_k < vocab_size, min(top_k, logits.shape[-1])
    if not limited and top_p >= 1.0:
        return logits
    if limited:
        best, _ = jax.lax.top_k(logits, kept)  # of this slice
        best, _ = jax.lax.top_k(gather_slices(best, axis), top_k)  # [b, k], descending
        if top_p < 1.0:
            mass = jax.nn.softmax(best, axis=-1)
            before = jnp.cumsum(mass, axis=-1) - mass  # mass of strictly better ones
            best = jnp.where(before < top_p, best, jnp.inf)
        threshold = best.min(-1, keepdims=True)
    else:
        threshold = find_nucleus(logits, top_p, axis)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def find_nucleus(logits: jax.Array, top_p: float, axis: str | None) -> jax.Array:
    """The lowest logit of the nucleus [b, 1]: the smallest with less mass than top_p above it.

    Bisection over the bits of a float32, which as integers have the order of the numbers: exact
    after 32 halvings.
    """
    peak = gather_slices(logits.max(-1, keepdims=True), axis).max(-1, keepdims=True)  # [b, 1]
    mass = jnp.exp(logits - peak)
    total = sum_slices(mass.sum(-1, keepdims=True), axis)
    order = as_ordered(logits)

    def halve(_, bounds):
        low, high = bounds  # too much mass lies above low, little enough above high
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = sum_slices(jnp.where(order > middle, mass, 0).sum(-1, keepdims=True), axis)
        enough = above < top_p * total
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low = jnp.full_like(peak, jnp.iinfo(jnp.int32).min, jnp.int32)
    _, high = jax.lax.fori_loop(0, 32, halve, (low, as_ordered(peak)))
    return as_float(high)


def as_ordered(x: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # no negative zero
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def as_float(order: jax.Array) -> jax.Array:
    """The inverse of `as_ordered`."""
    return jax.lax.bitcast_convert_type(
        jnp.where(order < 0, order ^ 0x7FFFFFFF, order), jnp.float32
    )


def sample(
    logits: jax.Array,
    key: jax.Array,
    episode_ids: jax.Array,
    token_index: jax.Array,
    temperature: jax.Array,
    *,
    top_k: int,
    top_p: float,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row -> (tokens [b] int32, logprobs [b] float32).

    logits: [b, V], of this device's slice; key: [] typed PRNG key; episode_ids, token_index: [b];
    temperature: [] float, 0 = greedy.
    The Gumbel-max trick, twice: it draws a block of tokens by the blocks' total masses, then a
    token of the block. The distribution is the same, but it takes noise for blocks + V / blocks
    numbers instead of V, which would cost more than the logits themselves.
    logprobs are under the unrestricted distribution at temperature 1, as the learner computes them.
    """
    b, width = logits.shape
    slices, own = (1, 0) if axis is None else (jax.lax.axis_size(axis), jax.lax.axis_index(axis))
    blocks = count_blocks(width * slices)
    if blocks % slices:
        raise ValueError(
            f"a vocabulary of {width * slices} has {blocks} blocks for sampling, which {slices} "
            f"slices (mesh axis {axis}) cannot share: choose config.mesh.{axis} among the divisors "
            f"of {blocks}"
        )
    # Noise, from a key per episode and token.
    size = width * slices // blocks
    fold = lambda episode, index: jax.random.fold_in(jax.random.fold_in(key, episode), index)
    keys = jax.vmap(fold)(episode_ids, token_index)
    draw = lambda key: jax.random.gumbel(key, (blocks + size,), jnp.float32)
    noise = jax.vmap(draw)(keys)  # [b, blocks + size]

    # The drawn token: its block first.
    tempered = logits / jnp.where(temperature > 0, temperature, 1.0)
    tempered = restrict(tempered, top_k=top_k, top_p=top_p, axis=axis)
    parts = tempered.reshape(b, blocks // slices, size)
    masses = gather_slices(jax.nn.logsumexp(parts, axis=-1), axis)  # [b, blocks]
    block = jnp.argmax(masses + noise[:, :blocks], axis=-1)  # [b]
    local = block - own * (blocks // slices)
    mine = (local >= 0) & (local < blocks // slices)
    place = jnp.clip(local, 0, blocks // slices - 1)[:, None, None]
    inner = jnp.take_along_axis(parts, place, axis=1)[:, 0]  # [b, size]
    inner = sum_slices(jnp.where(mine[:, None], inner, 0), axis)
    drawn = block * size + jnp.argmax(inner + noise[:, blocks:], axis=-1)

    # The greedy token: as argmax, except for NaN, in a seventh of its time on CPU.
    peak = logits.max(-1, keepdims=True)
    best = jnp.where(logits == peak, jnp.arange(width), width - 1).min(-1)
    peaks = gather_slices(peak, axis)  # [b, slices]
    first = jnp.argmax(peaks, axis=-1)[:, None]
    best = gather_slices(best[:, None], axis)  # [b, slices]
    greedy = first[:, 0] * width + jnp.take_along_axis(best, first, axis=1)[:, 0]

    # The log-probability of the token, whose logit one slice holds.
    tokens = jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
    local = tokens - own * width
    mine = (local >= 0) & (local < width)
    place = jnp.clip(local, 0, width - 1)[:, None]
    chosen = jnp.take_along_axis(logits, place, axis=-1)[:, 0]
    chosen = sum_slices(jnp.where(mine, chosen, 0), axis)
    totals = gather_slices(jax.nn.logsumexp(logits, axis=-1, keepdims=True), axis)  # [b, slices]
    return tokens, chosen - jax.nn.logsumexp(totals, axis=-1)
