"""Decoder-only transformers of the Qwen2, Qwen3 and Llama families as pure Linen modules, for learning (whole sequences) and sampling (explicit KV cache).

Axis letters: B batch, S tokens of this call, T cache positions, D embed, N query heads, G kv heads, n query heads of one kv head (N/G), H head dim, F ffn,
V vocabulary, L layers.

The same modules run in two ways. Under `jit` with sharded arguments they are written as for one device (`tensor_axis=None`) and the compiler partitions them.
Inside `shard_map`, which the sampling program needs, each device holds its slice of the heads, the ffn and the vocabulary: the config is then
`config.place_on(mesh)`, with local sizes, and the three places where slices meet sum over that axis by hand.
"""
from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stepsearch_jax.sharding import spread_rows

EMBEDDING_STD = 0.02  # of fresh embeddings, as in the checkpoints of this family
REMAT = {  # which intermediate results of a layer the backward pass finds again; "none" keeps all
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layers": jax.checkpoint_policies.nothing_saveable,
}
TPU_LANES = 128  # elements along an array's last axis that a TPU keeps in one tile
ATTENTION_QUERY_BLOCK = 512  # queries whose scores against all keys are held at once when learning


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies f are lowered to f / factor, so that a model reads texts longer than those it was first trained on.

    kind: "linear" lowers all of them (Chen et al. 2023). "llama3" (Llama 3.1) and "yarn" (Peng et al. 2023) lower those that turn fewer than `slow` times in
    `original_context` tokens, keep those that turn more than `fast` times, and mix in between: llama3 linearly in the number of turns, yarn linearly in the
    index of the frequency, from the last whole index before to the first behind. Queries and keys are multiplied by `attention_factor`.
    """

    kind: str
    factor: float
    original_context: int
    slow: float
    fast: float
    attention_factor: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model, and how a device holds it, which `place_on` sets: `tensor_axis` names the mesh axis over which it holds a slice (None: everything),
    `cache_by_token` is the layout of its `KVCache`."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool  # RMSNorm over each head of queries and keys, before the rotation
    tie_embeddings: bool
    dtype: jnp.dtype
    remat: str  # what the backward pass computes again: "none", or a key of REMAT
    attention_block: int  # cache positions read at a time when sampling
    tensor_axis: str | None = None
    cache_by_token: bool = False

    def place_on(self, mesh: Mesh) -> ModelConfig:
        """The config of what one device of the mesh samples with: an equal slice over mesh axis `tensor`, whose modules sum over that axis."""
        shards, by_token = mesh.shape["tensor"], mesh.devices.flat[0].platform == "tpu"
        return dataclasses.replace(
            self, vocab_size=self.vocab_size // shards, num_heads=self.num_heads // shards, num_kv_heads=self.num_kv_heads // shards,
            ffn_dim=self.ffn_dim // shards, tensor_axis="tensor" if shards > 1 else None, cache_by_token=by_token)


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, in J blocks of t positions of all rows, so that a block lies in one piece of memory.

    Written by scatter at per-row positions, read block by block; always passed and returned. There are two layouts. As the matmuls of attention read a block:
    on CPU a rollout takes a third longer with the other. By token, all heads in one piece, as they are written, filled up to whole lanes: for TPUs, where an
    array lies in tiles over its last axes, and the compiler else copies the whole cache in each layer, from the layout of the write to that of the read.
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
        """Of each row. A token at this position or a later one is not written."""
        return self.v.shape[1] * self.block

    @property
    def block(self) -> int:
        """Positions of one block, t."""
        return self.v.shape[3 if self.by_token else 4]


def make_cache(config: ModelConfig, rows: int, context: int) -> KVCache:
    """An empty cache for `rows` sequences of up to `context` tokens (rounded up to whole attention blocks)."""
    block, G, H = config.attention_block, config.num_kv_heads, config.head_dim
    token = -(-G * H // TPU_LANES) * TPU_LANES
    keys, values = [(block, token)] * 2 if config.cache_by_token else [(G, H, block), (G, block, H)]
    blocks = (config.num_layers, -(-context // block), rows)
    return KVCache(jnp.zeros((*blocks, *keys), config.dtype), jnp.zeros((*blocks, *values), config.dtype), G, config.cache_by_token)


def rotary_frequencies(config: ModelConfig) -> jax.Array:
    """Radians a position by which each plane of a head turns, [H/2] float32, scaled as `config.rope_scaling` says."""
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
        fast, slow = (half * math.log(scaling.original_context / (2 * math.pi * turns)) / math.log(theta) for turns in (scaling.fast, scaling.slow))
        first, last = max(math.floor(fast), 0), min(math.ceil(slow), 2 * half - 1)
        kept = 1 - (jnp.arange(half) - first) / max(last - first, 1e-3)
    kept = jnp.clip(kept, 0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def rotary_turns(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines of the angles by which `rotate` turns, each [B, S, 1, H/2] float32: the same in all layers, so found once. positions: [B, S]."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(config)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return jnp.sin(angles) * factor, jnp.cos(angles) * factor


def rotate(x: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), halves convention. x: [B, S, N, H]; turns: of `rotary_turns`."""
    sin, cos = turns
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@flax.struct.dataclass
class Branches:
    """Several continuations of one sequence, laid out behind it: each sees a beginning of the sequence and itself, none sees another.

    Token s of row b sees token t <= s if t < seen[b, s] or t >= start[b, s]. Tokens of the sequence itself have seen = start = 0.
    """

    seen: jax.Array  # [B, S] int32: how many tokens of the sequence the branch continues
    start: jax.Array  # [B, S] int32: where the token's own branch begins
    positions: jax.Array  # [B, S] int32: for the rotary embedding; a branch counts on from where it leaves the sequence


def attend_causal(q: jax.Array, k: jax.Array, v: jax.Array, branches: Branches | None) -> jax.Array:
    """Causal attention over whole right-padded sequences. q: [B, S, N, H]; k, v: [B, S, G, H] -> [B, S, N, H].

    Queries are taken in blocks whose scores are recomputed in the backward pass, so memory is linear in S.
    """
    B, S, N, H = q.shape
    G = k.shape[2]
    n = N // G
    block = min(ATTENTION_QUERY_BLOCK, S)
    blocks = -(-S // block)
    q = jnp.pad(q * H**-0.5, ((0, 0), (0, blocks * block - S), (0, 0), (0, 0))).reshape(B, blocks, block, G, n, H)
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(blocks, B, G, n * block, H)  # batch axes first: the matmuls below then move no data
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, G, S, H]

    def attend_block(args):
        q_block, first = args  # [B, G, n * block, H], []
        scores = jnp.einsum("bgmh,bgth->bgmt", q_block, k, preferred_element_type=jnp.float32).reshape(B, G, n, block, S)
        key, query = jnp.arange(S), first + jnp.arange(block)[:, None]
        visible = key <= query
        if branches is not None:
            seen, start = (jnp.take(x, query, axis=1, mode="fill", fill_value=0) for x in (branches.seen, branches.start))  # [B, block, 1]
            visible = (visible & ((key < seen) | (key >= start)))[:, None, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1).astype(v.dtype).reshape(B, G, n * block, S)
        return jnp.einsum("bgmt,bgth->bgmh", weights, v)

    if blocks == 1:
        out = attend_block((q[0], jnp.int32(0)))[None]
    else:
        out = jax.lax.map(jax.checkpoint(attend_block), (q, jnp.arange(blocks) * block))
    out = out.reshape(blocks, B, G, n, block, H).transpose(1, 0, 4, 2, 3, 5)  # [B, blocks, block, G, n, H]
    return out.reshape(B, blocks * block, N, H)[:, :S]


def attend_cached(q: jax.Array, cache: KVCache, layer: jax.Array, rows: jax.Array | None, positions: jax.Array) -> jax.Array:
    """Attention of new tokens over the cache, reading only blocks below the longest live position (online softmax, Milakov & Gimelshein 2018).

    q: [b, S, N, H] already rotated; positions: [b, S], a query sees cache positions <= its own; rows: [b] cache rows, None for all in order.
    -> [b, S, N, H]. Rows whose positions lie beyond the cache (idle) give finite garbage and do not lengthen the loop.
    """
    b, S, N, H = q.shape
    G, block, by_token = cache.kv_heads, cache.block, cache.by_token
    n = N // G
    q = (q * H**-0.5).reshape(b, S, G, n, H).transpose(0, 2, 3, 1, 4).reshape(b, G, n * S, H)
    live = jnp.max(jnp.where(positions < cache.positions, positions, 0)) + 1

    def read(array: jax.Array, j: jax.Array) -> jax.Array:  # -> keys [b, G, H, block], values [b, G, block, H]; by token [b, block, G, H]
        part = jax.lax.dynamic_slice(array, (layer, j, *[0] * (array.ndim - 2)), (1, 1, *array.shape[2:]))[0, 0]
        part = part if rows is None else part.at[rows].get(mode="clip")
        return part[..., : G * H].reshape(b, block, G, H) if by_token else part

    keys, values = ("btgh", "btgh") if by_token else ("bght", "bgth")

    def step(j, carry):
        peak, total, out = carry  # [b, G, n, S], [b, G, n, S], [b, G, n, S, H]
        scores = jnp.einsum(f"bgmh,{keys}->bgmt", q, read(cache.k, j), preferred_element_type=jnp.float32).reshape(b, G, n, S, block)
        visible = (j * block + jnp.arange(block))[None, None] <= positions[:, :, None]  # [b, S, block]
        scores = jnp.where(visible[:, None, None], scores, -1e30)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        update = jnp.einsum(f"bgmt,{values}->bgmh", weights.reshape(b, G, n * S, block).astype(cache.v.dtype), read(cache.v, j),
                            preferred_element_type=jnp.float32).reshape(b, G, n, S, H)
        return new_peak, total * decay + weights.sum(-1), out * decay[..., None] + update

    zeros = jnp.zeros((b, G, n, S), jnp.float32)
    _, total, out = jax.lax.fori_loop(0, -(-live // block), step, (zeros - 1e30, zeros, jnp.zeros((b, G, n, S, H), jnp.float32)))
    out = out / total[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(b, S, N, H).astype(q.dtype)


def set_previous_token_heads(params, config: ModelConfig, peak: float):
    """Starts the query heads of layer 0's first kv head as heads that look 1, 2, … tokens back; `peak` is their logit there. Needs qkv biases.

    Under rotary positions a constant key and a constant query turned back by o positions match best at distance o, so two biases are enough. It is the first
    half of an induction head, and what a small policy from scratch otherwise spends most of its warm start on.
    """
    layers = params["params"]["trunk"]["layers"]
    n, half = config.num_heads // config.num_kv_heads, config.head_dim // 2
    turned = -rotary_frequencies(config) * jnp.arange(1, n + 1)[:, None]  # [n, H/2]
    scale = (peak * config.head_dim**0.5 / half) ** 0.5
    query = scale * jnp.concatenate([jnp.cos(turned), jnp.sin(turned)], axis=-1)  # [n, H]
    key = scale * jnp.concatenate([jnp.ones(half), jnp.zeros(half)])
    new = {
        "q": {"kernel": layers["q"]["kernel"].at[0, :, :n].multiply(0.1), "bias": layers["q"]["bias"].at[0, :n].set(query)},
        "k": {"kernel": layers["k"]["kernel"].at[0, :, 0].multiply(0.1), "bias": layers["k"]["bias"].at[0, 0].set(key)},
    }
    return {"params": params["params"] | {"trunk": params["params"]["trunk"] | {"layers": layers | new}}}


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019), computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x32 * scale).astype(self.config.dtype)


class Projection(nn.Module):
    """A linear map over the trailing `inputs` axes of x, with named parameter axes. `partial_sum`: slices of the input add up over the tensor axis."""

    config: ModelConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = False
    partial_sum: bool = False
    scale: float = 1.0  # of the initial variance

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count, dtype = len(self.inputs), self.config.dtype
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "normal", in_axis=tuple(range(count)), out_axis=tuple(range(count, len(self.axes))))
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), (*self.inputs, *self.outputs), jnp.float32).astype(dtype)
        # One matrix product: with more axes its gradient would go through transposed copies on CPU.
        rows, size = x.shape[: x.ndim - count], math.prod(self.inputs)
        y = (x.reshape(-1, size) @ kernel.reshape(size, -1)).reshape(*rows, *self.outputs)
        if self.bias:
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, self.axes[count:]), self.outputs, jnp.float32)
            y = y + bias.astype(dtype)
        return _sum_slices(y, self.config) if self.partial_sum else y


def _sum_slices(x: jax.Array, config: ModelConfig) -> jax.Array:
    return x if config.tensor_axis is None else jax.lax.psum(x, config.tensor_axis)


class Block(nn.Module):
    """One layer: grouped-query attention and SwiGLU, each on a normalised residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, carry, layer, positions, turns, rows, branches, unread):
        """carry: (x [b, S, D], KVCache or None); layer: []; positions: [b, S], turns: of `rotary_turns` for them; rows: [b] or None; unread: [], a layer of
        whose results only its keys and values in the cache are wanted, or None -> (carry, None), as `nn.scan` wants it."""
        c = self.config
        x, cache = carry
        x = spread_rows(x)
        D, N, G, H, F = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.ffn_dim
        residual = 0.5 / c.num_layers  # 2 L of these add up on the residual stream (GPT-2's initialisation)
        h = RMSNorm(c, name="attention_norm")(x)
        k = Projection(c, (D,), (G, H), ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias, name="k")(h)  # [b, S, G, H]
        v = Projection(c, (D,), (G, H), ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias, name="v")(h)
        if c.qk_norm:
            k = RMSNorm(c, name="k_norm")(k)
        k = rotate(k, turns)
        if cache is not None:
            index = (jnp.arange(cache.rows) if rows is None else rows)[:, None]  # [b, 1]
            cache = _write(cache, k, v, layer, index, positions)

        def add_results(block: Block, x: jax.Array) -> jax.Array:
            q = Projection(c, (D,), (N, H), ("embed", "heads", "head_dim"), bias=c.qkv_bias, name="q")(h)  # [b, S, N, H]
            if c.qk_norm:
                q = RMSNorm(c, name="q_norm")(q)
            q = rotate(q, turns)
            attended = attend_causal(q, k, v, branches) if cache is None else attend_cached(q, cache, layer, rows, positions)
            x = x + Projection(c, (N, H), (D,), ("heads", "head_dim", "embed"), partial_sum=True, scale=residual, name="o")(attended)
            normed = RMSNorm(c, name="ffn_norm")(x)
            gate = Projection(c, (D,), (F,), ("embed", "ffn"), name="gate")(normed)  # [b, S, F]
            up = Projection(c, (D,), (F,), ("embed", "ffn"), name="up")(normed)
            return x + Projection(c, (F,), (D,), ("ffn", "embed"), partial_sum=True, scale=residual, name="down")(nn.silu(gate) * up)

        x = add_results(self, x) if unread is None else nn.cond(layer == unread, lambda block, x: x, add_results, self, x)
        return (spread_rows(x), cache), None


def _write(cache: KVCache, k: jax.Array, v: jax.Array, layer: jax.Array, rows: jax.Array, positions: jax.Array) -> KVCache:
    """Writes k, v [b, S, G, H] at layer, rows [b, 1] and positions [b, S]; positions beyond the cache are dropped."""
    j, t = positions // cache.block, positions % cache.block

    def write(at, new: jax.Array) -> jax.Array:
        return at.set(new.astype(cache.k.dtype), mode="drop", unique_indices=True)

    if not cache.by_token:
        return cache.replace(k=write(cache.k.at[layer, j, rows, :, :, t], k), v=write(cache.v.at[layer, j, rows, :, t], v))

    def fill(new: jax.Array) -> jax.Array:  # [b, S, G, H] -> [b, S, whole lanes]
        flat = new.reshape(*new.shape[:2], -1)
        return jnp.pad(flat, ((0, 0), (0, 0), (0, cache.k.shape[4] - flat.shape[2])))

    return cache.replace(k=write(cache.k.at[layer, j, rows, t], fill(k)), v=write(cache.v.at[layer, j, rows, t], fill(v)))


class Trunk(nn.Module):
    """Embedding, layers (scanned: one layer is compiled) and final norm, shared by policy and value model."""

    config: ModelConfig

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(EMBEDDING_STD), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim), jnp.float32)
        block = Block if c.remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
        self.layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers,
                              in_axes=(0, *[nn.broadcast] * 5), metadata_params={nn.PARTITION_NAME: "layers"})(c)
        self.final_norm = RMSNorm(c)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [b, S] -> [b, S, D]; a sliced vocabulary contributes zeros for tokens of other slices."""
        c = self.config
        table = self.embedding.astype(c.dtype)
        if c.tensor_axis is None:
            return table[tokens]
        local = tokens - jax.lax.axis_index(c.tensor_axis) * c.vocab_size
        mine = (local >= 0) & (local < c.vocab_size)
        return _sum_slices(jnp.where(mine[..., None], table[jnp.clip(local, 0, c.vocab_size - 1)], 0), c)

    def __call__(self, tokens, positions=None, cache=None, rows=None, branches=None, unread=None):
        """tokens [b, S] -> (hidden [b, S, D], cache). Without positions: whole sequences from position 0."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        turns = rotary_turns(positions, self.config)
        (x, cache), _ = self.layers((spread_rows(self.embed(tokens)), cache), jnp.arange(self.config.num_layers), positions, turns, rows, branches, unread)
        return self.final_norm(x), cache


class Policy(nn.Module):
    """The language model. Hidden states and logits are separate calls, so that logits are only ever made where and as long as they are needed."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.trunk = Trunk(c)
        if not c.tie_embeddings:
            init = nn.with_logical_partitioning(nn.initializers.normal(EMBEDDING_STD), ("embed", "vocab"))
            self.lm_head = self.param("lm_head", init, (c.embed_dim, c.vocab_size), jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Right-padded tokens [B, T] -> hidden [B, T, D]."""
        return self.trunk(tokens)[0]

    def branch(self, tokens: jax.Array, branches: Branches) -> jax.Array:
        """Sequences with continuations behind them [B, S], laid out as `branches` says -> hidden [B, S, D]."""
        return self.trunk(tokens, branches.positions, branches=branches)[0]

    def extend(self, tokens: jax.Array, positions: jax.Array, cache: KVCache, rows: jax.Array | None) -> tuple[jax.Array, KVCache]:
        """Runs tokens [b, S] at positions [b, S] of cache rows `rows` (None: all rows in order) -> (hidden [b, S, D], cache).

        A position beyond the cache marks padding: it is not written, and its hidden state means nothing.
        """
        return self.trunk(tokens, positions, cache, rows)

    def read(self, tokens: jax.Array, positions: jax.Array, cache: KVCache, rows: jax.Array | None) -> KVCache:
        """`extend` for tokens after which nothing is to be sampled: of the last layer only the keys and values are computed."""
        return self.trunk(tokens, positions, cache, rows, unread=jnp.int32(self.config.num_layers - 1))[1]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., V] (the local slice of V under `tensor_axis`)."""
        kernel = self.trunk.embedding.T if self.config.tie_embeddings else self.lm_head
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.dot(flat, kernel.astype(self.config.dtype), preferred_element_type=jnp.float32)
        return logits.reshape(*hidden.shape[:-1], -1)

    def init_all(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter; the method to pass to `init`."""
        return self.unembed(self(tokens))


class Value(nn.Module):
    """The value model: the policy's trunk and one number per token. Its head starts at zero, so that first values are 0."""

    config: ModelConfig

    def setup(self):
        self.trunk = Trunk(self.config)
        self.head = self.param("head", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), (self.config.embed_dim,), jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Right-padded tokens [B, T] -> float32 [B, T]: after reading token t."""
        return jnp.einsum("btd,d->bt", self.trunk(tokens)[0].astype(jnp.float32), self.head)
