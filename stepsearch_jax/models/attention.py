"""Rotary positions, the KV cache, and attention over it (sampling) or over sequences (learning).

The functions here have no parameters.

Axis letters: B batch, S tokens of this call, T cache positions, N query heads, G kv heads, n query
heads of one kv head (N/G), H head dim, L layers.
"""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax.models.architecture import ModelConfig

TPU_LANES = 128  # elements along an array's last axis that a TPU keeps in one tile
ATTENTION_QUERY_BLOCK = 512  # queries whose scores against all keys are held at once when learning


def rotary_frequencies(config: ModelConfig) -> jax.Array:
    """By how many radians each plane of a head turns per position, after scaling: [H/2] float32."""
    half, theta, scaling = config.head_dim // 2, config.rope_theta, config.rope_scaling
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_context / (2 * math.pi) * frequencies
        kept = (turns - scaling.slow) / (scaling.fast - scaling.slow)
    else:
        fast, slow = (
            half * math.log(scaling.original_context / (2 * math.pi * turns)) / math.log(theta)
            for turns in (scaling.fast, scaling.slow)
        )
        first, last = max(math.floor(fast), 0), min(math.ceil(slow), 2 * half - 1)
        kept = 1 - (jnp.arange(half) - first) / ((last - first) or 1e-3)
    kept = jnp.clip(kept, 0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def rotary_turns(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """positions [B, S] -> sines and cosines for `rotate`, each [B, S, 1, H/2] float32.

    They are the same in all layers and are computed once.
    """
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(config)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def rotate(x: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), halves convention.

    x: [B, S, N, H]; turns: from `rotary_turns`.
    """
    sin, cos = turns
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, in J blocks of t positions of all rows.

    A block lies in one piece of memory. The cache is written by scatter at per-row positions, read
    block by block, and always passed and returned. It has two layouts:
    - as the matmuls of attention read a block. The other one makes a rollout a third slower on CPU.
    - by token (`by_token`), as tokens are written: all heads in one piece, padded to whole lanes.
      For TPUs: there an array lies in tiles over its last axes, and with the first layout the
      compiler copies the whole cache in each layer, from the layout of the write to that of the
      read.
    """

    k: jax.Array  # [L, J, B, G, H, t], by token [L, J, B, t, G * H and more]
    v: jax.Array  # [L, J, B, G, t, H], by token [L, J, B, t, G * H and more]
    kv_heads: int = flax.struct.field(pytree_node=False)
    by_token: bool = flax.struct.field(pytree_node=False)

    @property
    def rows(self) -> int:
        return self.k.shape[2]

    @property
    def positions(self) -> int:
        """Positions of each row. A token at this position or a later one is not written."""
        return self.v.shape[1] * self.block

    @property
    def block(self) -> int:
        """Positions of one block, t."""
        return self.v.shape[3 if self.by_token else 4]


def make_cache(config: ModelConfig, rows: int, context: int) -> KVCache:
    """An empty cache for `rows` sequences of up to `context` tokens, rounded up to whole blocks."""
    block, G, H = config.attention_block, config.num_kv_heads, config.head_dim
    token = -(-G * H // TPU_LANES) * TPU_LANES
    keys, values = [(block, token)] * 2 if config.cache_by_token else [(G, H, block), (G, block, H)]
    blocks = (config.num_layers, -(-context // block), rows)
    return KVCache(
        jnp.zeros((*blocks, *keys), config.dtype),
        jnp.zeros((*blocks, *values), config.dtype),
        G,
        config.cache_by_token,
    )


def write_cache(
    cache: KVCache,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
) -> KVCache:
    """Writes k, v [b, S, G, H] at layer, rows [b, 1] and positions [b, S].

    Positions beyond the cache are dropped.
    """
    j, t = positions // cache.block, positions % cache.block

    def write(at, new: jax.Array) -> jax.Array:
        return at.set(new.astype(cache.k.dtype), mode="drop", unique_indices=True)

    if not cache.by_token:
        return cache.replace(
            k=write(cache.k.at[layer, j, rows, :, :, t], k),
            v=write(cache.v.at[layer, j, rows, :, t], v),
        )

    def fill(new: jax.Array) -> jax.Array:
        """[b, S, G, H] -> [b, S, whole lanes]."""
        flat = new.reshape(*new.shape[:2], -1)
        return jnp.pad(flat, ((0, 0), (0, 0), (0, cache.k.shape[4] - flat.shape[2])))

    return cache.replace(
        k=write(cache.k.at[layer, j, rows, t], fill(k)),
        v=write(cache.v.at[layer, j, rows, t], fill(v)),
    )


def attend_cached(
    q: jax.Array, cache: KVCache, layer: jax.Array, rows: jax.Array | None, positions: jax.Array
) -> jax.Array:
    """Attention of new tokens over the cache (online softmax, Milakov & Gimelshein 2018).

    Only blocks below the longest live position are read.
    q: [b, S, N, H] already rotated; positions: [b, S], a query sees cache positions <= its own;
    rows: [b] cache rows, None for all in order.
    -> [b, S, N, H]. Rows with positions beyond the cache (idle) give finite garbage and do not
    lengthen the loop.
    """
    b, S, N, H = q.shape
    G, block, by_token = cache.kv_heads, cache.block, cache.by_token
    n = N // G
    # Queries of one kv head lie together, so that one matmul serves all of them.
    q = (q * H**-0.5).reshape(b, S, G, n, H).transpose(0, 2, 3, 1, 4).reshape(b, G, n * S, H)
    live = jnp.max(jnp.where(positions < cache.positions, positions, 0)) + 1

    def read(array: jax.Array, j: jax.Array) -> jax.Array:
        """-> keys [b, G, H, block], values [b, G, block, H]; by token both [b, block, G, H]."""
        start = (layer, j, *[0] * (array.ndim - 2))
        part = jax.lax.dynamic_slice(array, start, (1, 1, *array.shape[2:]))[0, 0]
        part = part if rows is None else part.at[rows].get(mode="clip")
        return part[..., : G * H].reshape(b, block, G, H) if by_token else part

    # The blocks in turn; each is one step of the softmax.
    keys, values = ("btgh", "btgh") if by_token else ("bght", "bgth")

    def step(j, carry):
        peak, total, out = carry  # [b, G, n, S], [b, G, n, S], [b, G, n, S, H]
        scores = jnp.einsum(
            f"bgmh,{keys}->bgmt", q, read(cache.k, j), preferred_element_type=jnp.float32
        ).reshape(b, G, n, S, block)
        # [b, S, block]
        visible = (j * block + jnp.arange(block))[None, None] <= positions[:, :, None]
        scores = jnp.where(visible[:, None, None], scores, -1e30)
        # Online softmax: what was summed so far is rescaled to the new peak.
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        update = jnp.einsum(
            f"bgmt,{values}->bgmh",
            weights.reshape(b, G, n * S, block).astype(cache.v.dtype),
            read(cache.v, j),
            preferred_element_type=jnp.float32,
        ).reshape(b, G, n, S, H)
        return new_peak, total * decay + weights.sum(-1), out * decay[..., None] + update

    zeros = jnp.zeros((b, G, n, S), jnp.float32)
    _, total, out = jax.lax.fori_loop(
        0, -(-live // block), step, (zeros - 1e30, zeros, jnp.zeros((b, G, n, S, H), jnp.float32))
    )
    out = out / total[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(b, S, N, H).astype(q.dtype)


@flax.struct.dataclass
class Branches:
    """Several continuations of one sequence, laid out behind it.

    Each sees a beginning of the sequence and itself; none sees another.
    Token s of row b sees token t <= s if t < seen[b, s] or t >= start[b, s]. Tokens of the sequence
    itself have seen = start = 0.
    """

    seen: jax.Array  # [B, S] int32: how many tokens of the sequence the branch continues
    start: jax.Array  # [B, S] int32: where the token's own branch begins
    # [B, S] int32: for the rotary embedding; a branch counts on from where it leaves the sequence
    positions: jax.Array


def attend_causal(q: jax.Array, k: jax.Array, v: jax.Array, branches: Branches | None) -> jax.Array:
    """Causal attention over whole right-padded sequences.

    q: [B, S, N, H]; k, v: [B, S, G, H] -> [B, S, N, H]. Queries are taken in blocks, and the scores
    of a block are recomputed in the backward pass: memory is linear in S.
    """
    B, S, N, H = q.shape
    G = k.shape[2]
    n = N // G
    block = min(ATTENTION_QUERY_BLOCK, S)
    blocks = -(-S // block)
    q = jnp.pad(q * H**-0.5, ((0, 0), (0, blocks * block - S), (0, 0), (0, 0)))
    q = q.reshape(B, blocks, block, G, n, H)
    # Batch axes first: the matmuls below then move no data.
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(blocks, B, G, n * block, H)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, G, S, H]

    def attend_block(args):
        q_block, first = args  # [B, G, n * block, H], []
        scores = jnp.einsum(
            "bgmh,bgth->bgmt", q_block, k, preferred_element_type=jnp.float32
        ).reshape(B, G, n, block, S)
        key, query = jnp.arange(S), first + jnp.arange(block)[:, None]
        visible = key <= query
        if branches is not None:
            take = lambda x: jnp.take(x, query, axis=1, mode="fill", fill_value=0)
            seen, start = take(branches.seen), take(branches.start)  # [B, block, 1]
            visible = (visible & ((key < seen) | (key >= start)))[:, None, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        weights = weights.astype(v.dtype).reshape(B, G, n * block, S)
        return jnp.einsum("bgmt,bgth->bgmh", weights, v)

    if blocks == 1:
        out = attend_block((q[0], jnp.int32(0)))[None]
    else:
        out = jax.lax.map(jax.checkpoint(attend_block), (q, jnp.arange(blocks) * block))
    out = out.reshape(blocks, B, G, n, block, H)
    out = out.transpose(1, 0, 4, 2, 3, 5)  # [B, blocks, block, G, n, H]
    return out.reshape(B, blocks * block, N, H)[:, :S]
