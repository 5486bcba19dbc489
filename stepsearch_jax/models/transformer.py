"""Decoder-only transformers of the Qwen2, Qwen3 and Llama families as pure Linen modules.

They serve learning (whole sequences) and sampling (explicit KV cache).

Axis letters: B batch, S tokens of this call, T cache positions, D embed, N query heads, G kv heads,
n query heads of one kv head (N/G), H head dim, F ffn, V vocabulary, L layers.

The same modules run in two ways. Under `jit` with sharded arguments they are written as for one
device (`tensor_axis=None`), and the compiler partitions them. Inside `shard_map`, which the
sampling program needs, each device holds its slice of the heads, the ffn and the vocabulary. The
config is then `config.place_on(mesh)`, with local sizes, and the modules sum over that axis
themselves in the three places where slices meet.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.attention import (
    Branches,
    KVCache,
    attend_cached,
    attend_causal,
    rotary_frequencies,
    rotary_turns,
    rotate,
    write_cache,
)
from stepsearch_jax.sharding import spread_rows

EMBEDDING_STD = 0.02  # of fresh embeddings, as in the checkpoints of this family
REMAT = {  # which results of a layer the backward pass keeps; "none" keeps all
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layers": jax.checkpoint_policies.nothing_saveable,
}


def set_previous_token_heads(params, config: ModelConfig, peak: float):
    """Makes the query heads of layer 0's first kv head look 1, 2, … tokens back, with logit `peak`.

    Needs qkv biases: under rotary positions a constant key and a constant query turned back by o
    positions match best at distance o, so two biases are enough. This is the first half of an
    induction head. A small policy from scratch otherwise spends most of its warm start on it.
    """
    layers = params["params"]["trunk"]["layers"]
    n, half = config.num_heads // config.num_kv_heads, config.head_dim // 2
    turned = -rotary_frequencies(config) * jnp.arange(1, n + 1)[:, None]  # [n, H/2]
    scale = (peak * config.head_dim**0.5 / half) ** 0.5
    query = scale * jnp.concatenate([jnp.cos(turned), jnp.sin(turned)], axis=-1)  # [n, H]
    key = scale * jnp.concatenate([jnp.ones(half), jnp.zeros(half)])
    new = {
        "q": {
            "kernel": layers["q"]["kernel"].at[0, :, :n].multiply(0.1),
            "bias": layers["q"]["bias"].at[0, :n].set(query),
        },
        "k": {
            "kernel": layers["k"]["kernel"].at[0, :, 0].multiply(0.1),
            "bias": layers["k"]["bias"].at[0, 0].set(key),
        },
    }
    trunk = params["params"]["trunk"] | {"layers": layers | new}
    return {"params": params["params"] | {"trunk": trunk}}


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019), computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(mean_square + self.config.norm_eps)
        return (x32 * scale).astype(self.config.dtype)


class Projection(nn.Module):
    """A linear map over the trailing `inputs` axes of x, with named parameter axes."""

    config: ModelConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = False
    partial_sum: bool = False  # slices of the input add up over the tensor axis
    scale: float = 1.0  # of the initial variance

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count, dtype = len(self.inputs), self.config.dtype
        in_axis, out_axis = tuple(range(count)), tuple(range(count, len(self.axes)))
        init = nn.initializers.variance_scaling(
            self.scale, "fan_in", "normal", in_axis=in_axis, out_axis=out_axis
        )
        init = nn.with_logical_partitioning(init, self.axes)
        kernel = self.param("kernel", init, (*self.inputs, *self.outputs), jnp.float32)
        kernel = kernel.astype(dtype)
        # One matrix product: with more axes its gradient makes transposed copies on CPU.
        rows, size = x.shape[: x.ndim - count], math.prod(self.inputs)
        y = (x.reshape(-1, size) @ kernel.reshape(size, -1)).reshape(*rows, *self.outputs)
        if self.bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[count:])
            bias = self.param("bias", init, self.outputs, jnp.float32)
            y = y + bias.astype(dtype)
        return _sum_slices(y, self.config) if self.partial_sum else y


def _sum_slices(x: jax.Array, config: ModelConfig) -> jax.Array:
    return x if config.tensor_axis is None else jax.lax.psum(x, config.tensor_axis)


class Block(nn.Module):
    """One layer: grouped-query attention and SwiGLU, each on a normalised residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, carry, layer, positions, turns, rows, branches, unread):
        """-> (carry, None), as `nn.scan` wants it.

        carry: (x [b, S, D], KVCache or None); layer: []; positions: [b, S]; turns: `rotary_turns`
        of the positions; rows: [b] or None; unread: [], the number of a layer that only writes its
        keys and values to the cache and leaves x alone, or None.
        """
        config = self.config
        x, cache = carry
        x = spread_rows(x)
        D, F, H = config.embed_dim, config.ffn_dim, config.head_dim
        N, G = config.num_heads, config.num_kv_heads
        project = partial(Projection, config)
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        # Of the initial variance: 2 L results add up on the residual stream (as in GPT-2).
        residual = 0.5 / config.num_layers

        # Keys and values of the new tokens.
        normed = RMSNorm(config, name="attention_norm")(x)  # [b, S, D]
        k = project((D,), (G, H), kv_axes, bias=config.qkv_bias, name="k")(normed)  # [b, S, G, H]
        v = project((D,), (G, H), kv_axes, bias=config.qkv_bias, name="v")(normed)  # [b, S, G, H]
        if config.qk_norm:
            k = RMSNorm(config, name="k_norm")(k)
        k = rotate(k, turns)
        if cache is not None:
            index = (jnp.arange(cache.rows) if rows is None else rows)[:, None]  # [b, 1]
            cache = write_cache(cache, k, v, layer, index, positions)

        def add_results(block: Block, x: jax.Array) -> jax.Array:
            # Attention.
            q = project((D,), (N, H), q_axes, bias=config.qkv_bias, name="q")(normed)
            if config.qk_norm:
                q = RMSNorm(config, name="q_norm")(q)
            q = rotate(q, turns)  # [b, S, N, H]
            if cache is None:
                attended = attend_causal(q, k, v, branches)
            else:
                attended = attend_cached(q, cache, layer, rows, positions)  # [b, S, N, H]
            add_up = {"partial_sum": True, "scale": residual}
            out = project((N, H), (D,), ("heads", "head_dim", "embed"), **add_up, name="o")
            x = x + out(attended)

            # SwiGLU.
            ffn_normed = RMSNorm(config, name="ffn_norm")(x)
            gate = project((D,), (F,), ("embed", "ffn"), name="gate")(ffn_normed)  # [b, S, F]
            up = project((D,), (F,), ("embed", "ffn"), name="up")(ffn_normed)  # [b, S, F]
            down = project((F,), (D,), ("ffn", "embed"), **add_up, name="down")
            return x + down(nn.silu(gate) * up)

        if unread is None:
            x = add_results(self, x)
        else:
            x = nn.cond(layer == unread, lambda block, x: x, add_results, self, x)
        return (spread_rows(x), cache), None


class Trunk(nn.Module):
    """Embedding, layers (scanned: one is compiled) and final norm, for policy and value model."""

    config: ModelConfig

    def setup(self):
        config = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.normal(EMBEDDING_STD), ("vocab", "embed")
        )
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = self.param("embedding", init, shape, jnp.float32)
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[config.remat])
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_layers,
            in_axes=(0, *[nn.broadcast] * 5),
            metadata_params={nn.PARTITION_NAME: "layers"},
            # True traces the layer twice. Random parameters depend on it, nothing else does.
            check_constancy_invariants=self.is_initializing(),
        )(config)
        self.final_norm = RMSNorm(config)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [b, S] -> [b, S, D]. Vocabulary slices add zeros for the others' tokens."""
        config = self.config
        table = self.embedding.astype(config.dtype)
        if config.tensor_axis is None:
            return table[tokens]
        local = tokens - jax.lax.axis_index(config.tensor_axis) * config.vocab_size
        mine = (local >= 0) & (local < config.vocab_size)
        rows = table[jnp.clip(local, 0, config.vocab_size - 1)]  # [b, S, D]
        return _sum_slices(jnp.where(mine[..., None], rows, 0), config)

    def __call__(self, tokens, positions=None, cache=None, rows=None, branches=None, unread=None):
        """tokens [b, S] -> (hidden [b, S, D], cache).

        positions: [b, S]; None for whole sequences, which start at position 0.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        turns = rotary_turns(positions, self.config)
        (x, cache), _ = self.layers(
            (spread_rows(self.embed(tokens)), cache),
            jnp.arange(self.config.num_layers),
            positions,
            turns,
            rows,
            branches,
            unread,
        )
        return self.final_norm(x), cache


class Policy(nn.Module):
    """The language model.

    Hidden states and logits are separate calls: logits exist only where and while they are needed.
    """

    config: ModelConfig

    def setup(self):
        config = self.config
        self.trunk = Trunk(config)
        if not config.tie_embeddings:
            init = nn.with_logical_partitioning(
                nn.initializers.normal(EMBEDDING_STD), ("embed", "vocab")
            )
            shape = (config.embed_dim, config.vocab_size)
            self.lm_head = self.param("lm_head", init, shape, jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Right-padded tokens [B, T] -> hidden [B, T, D]."""
        return self.trunk(tokens)[0]

    def branch(self, tokens: jax.Array, branches: Branches) -> jax.Array:
        """Sequences [B, S] with continuations behind them, as in `branches` -> hidden [B, S, D]."""
        return self.trunk(tokens, branches.positions, branches=branches)[0]

    def extend(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache, rows: jax.Array | None
    ) -> tuple[jax.Array, KVCache]:
        """tokens [b, S] at positions [b, S] of cache rows `rows` -> (hidden [b, S, D], cache).

        rows: [b], None for all in order. A position beyond the cache marks padding: it is not
        written, and its hidden state means nothing.
        """
        return self.trunk(tokens, positions, cache, rows)

    def read(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache, rows: jax.Array | None
    ) -> KVCache:
        """`extend` without hidden states, for tokens after which nothing is sampled.

        The last layer computes its keys and values only.
        """
        last = jnp.int32(self.config.num_layers - 1)
        return self.trunk(tokens, positions, cache, rows, unread=last)[1]

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
    """The value model: the policy's trunk and one number per token.

    Its head starts at zero, so the first values are 0.
    """

    config: ModelConfig

    def setup(self):
        self.trunk = Trunk(self.config)
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        self.head = self.param("head", init, (self.config.embed_dim,), jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Right-padded tokens [B, T] -> float32 [B, T]: after reading token t."""
        hidden, _ = self.trunk(tokens)
        return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), self.head)
