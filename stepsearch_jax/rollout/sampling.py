"""Choosing the next token, reproducibly: the noise of a token depends only on the run's key, the
episode and the token's index.

Within `shard_map` every device holds a slice of the vocabulary (`axis` names the mesh axis); what
crosses slices is one number per block of tokens, one block, the few likeliest tokens where top_k
asks for them, and a few sums where top_p does. Logits are never gathered.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# blocks of the vocabulary; 2^7 * 3, so that whole blocks fit into the slices of any usual tensor
# axis
MAX_BLOCKS = 384


def count_blocks(vocab_size: int) -> int:
    """How many blocks of equal size the vocabulary is cut into. A slice of it holds whole blocks."""
    return math.gcd(vocab_size, MAX_BLOCKS)


def gather_slices(x: jax.Array, axis: str | None) -> jax.Array:
    """[b, n] of this slice -> [b, n * slices], in the order of the vocabulary."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)


def sum_slices(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over all slices."""
    return x if axis is None else jax.lax.psum(x, axis)


def restrict(logits: jax.Array, *, top_k: int, top_p: float, axis: str | None = None) -> jax.Array:
    """Logits [b, V] with every token outside the k likeliest and outside the nucleus of mass top_p
    set to -inf (Holtzman et al. 2020).

    top_k = 0 and top_p = 1.0 keep everything. The likeliest token always stays; tokens tied with
    the last one kept stay too. With top_k the nucleus is taken among the k likeliest; without, its
    threshold is found by bisection: nothing is ever sorted as a whole.
    Reference: the released code samples with top_p = 0.95, which biases ratio and KL against the
    learner's full distribution; the default is 1.
    """
    vocab_size = logits.shape[-1] * (1 if axis is None else jax.lax.axis_size(axis))
    limited, kept = 0 < top_k < vocab_size, min(top_k, logits.shape[-1])
    if not limited and top_p >= 1.0:
        return logits
    if limited:
        best = jax.lax.top_k(gather_slices(jax.lax.top_k(logits, kept)[0], axis), top_k)[
            0
        ]  # [b, k], descending
        if top_p < 1.0:
            mass = jax.nn.softmax(best, axis=-1)
            before = jnp.cumsum(mass, axis=-1) - mass  # mass of strictly better ones
            best = jnp.where(before < top_p, best, jnp.inf)
        threshold = best.min(-1, keepdims=True)
    else:
        threshold = find_nucleus(logits, top_p, axis)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def find_nucleus(logits: jax.Array, top_p: float, axis: str | None) -> jax.Array:
    """The lowest logit of the nucleus [b, 1]: the smallest of those above which there is less mass
    than top_p.

    Bisection over the bits of a float32, whose order as integers is that of the numbers: exact
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
    token of the block. That is a draw from the same distribution with noise for blocks + V / blocks
    numbers instead of V, which would otherwise cost more than the logits themselves.
    logprobs are under the unrestricted distribution at temperature 1, which is what the learner
    computes.
    """
    b, width = logits.shape
    slices, own = (1, 0) if axis is None else (jax.lax.axis_size(axis), jax.lax.axis_index(axis))
    blocks = count_blocks(width * slices)
    if blocks % slices:
        raise ValueError(
            f"a vocabulary of {width * slices} has {blocks} blocks for sampling, which {slices} "
            f"slices (mesh axis {axis}) cannot share: choose "
            f"config.mesh.{axis} among the divisors of {blocks}"
        )
    size = width * slices // blocks
    keys = jax.vmap(
        lambda episode, index: jax.random.fold_in(jax.random.fold_in(key, episode), index)
    )(episode_ids, token_index)
    noise = jax.vmap(lambda k: jax.random.gumbel(k, (blocks + size,), jnp.float32))(
        keys
    )  # [b, blocks + size]

    tempered = restrict(
        logits / jnp.where(temperature > 0, temperature, 1.0), top_k=top_k, top_p=top_p, axis=axis
    )
    parts = tempered.reshape(b, blocks // slices, size)
    block = jnp.argmax(
        gather_slices(jax.nn.logsumexp(parts, axis=-1), axis) + noise[:, :blocks], axis=-1
    )  # [b]
    local = block - own * (blocks // slices)
    mine = (local >= 0) & (local < blocks // slices)
    inner = jnp.take_along_axis(
        parts, jnp.clip(local, 0, blocks // slices - 1)[:, None, None], axis=1
    )[:, 0]  # [b, size]
    inner = sum_slices(jnp.where(mine[:, None], inner, 0), axis)
    drawn = block * size + jnp.argmax(inner + noise[:, blocks:], axis=-1)

    peak = logits.max(-1, keepdims=True)
    best = jnp.where(logits == peak, jnp.arange(width), width - 1).min(
        -1
    )  # as argmax, but for NaN, in a seventh of its time on CPU
    peaks = gather_slices(peak, axis)  # [b, slices]
    first = jnp.argmax(peaks, axis=-1)[:, None]
    greedy = (
        first[:, 0] * width
        + jnp.take_along_axis(gather_slices(best[:, None], axis), first, axis=1)[:, 0]
    )

    tokens = jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
    local = tokens - own * width
    mine = (local >= 0) & (local < width)
    chosen = sum_slices(
        jnp.where(
            mine,
            jnp.take_along_axis(logits, jnp.clip(local, 0, width - 1)[:, None], axis=-1)[:, 0],
            0,
        ),
        axis,
    )
    return tokens, chosen - jax.nn.logsumexp(
        gather_slices(jax.nn.logsumexp(logits, axis=-1, keepdims=True), axis), axis=-1
    )
