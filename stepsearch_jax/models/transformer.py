"""Decoder-only transformers of the Qwen2, Qwen3 and Llama families as pure Linen modules, for
learning (whole sequences) and sampling (explicit KV cache).

Axis letters: B batch, S tokens of this call, T cache positions, D embed, N query heads, G kv heads,
n query heads of one kv head (N/G), H head dim, F ffn, V vocabulary, L layers.

The same modules run in two ways. Under `jit` with sharded arguments they are written as for one
device (`tensor_axis=None`) and the compiler partitions them. Inside `shard_map`, which the sampling
program needs, each device holds its slice of the heads, the ffn and the vocabulary: the config is
then `config.place_on(mesh)`, with local sizes, and the three places where slices meet sum over that
axis by hand.
"""

from __future__ import annotations

import math

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
REMAT = {  # which intermediate results of a layer the backward pass finds again; "none" keeps all
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layers": jax.checkpoint_policies.nothing_saveable,
}


def set_previous_token_heads(params, config: ModelConfig, peak: float):
    """Starts the query heads of layer 0's first kv head as heads that look 1, 2, … tokens back;
    `peak` is their logit there. Needs qkv biases.

    Under rotary positions a constant key and a constant query turned back by o positions match best
    at distance o, so two biases are enough. It is the first half of an induction head, and what a
    small policy from scratch otherwise spends most of its warm start on.
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
    return {
        "params": params["params"] | {"trunk": params["params"]["trunk"] | {"layers": layers | new}}
    }


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019), computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
            (x.shape[-1],),
            jnp.float32,
        )
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(
            jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.config.norm_eps
        )
        return (x32 * scale).astype(self.config.dtype)


class Projection(nn.Module):
    """A linear map over the trailing `inputs` axes of x, with named parameter axes. `partial_sum`:
    slices of the input add up over the tensor axis.
    """

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
        init = nn.initializers.variance_scaling(
            self.scale,
            "fan_in",
            "normal",
            in_axis=tuple(range(count)),
            out_axis=tuple(range(count, len(self.axes))),
        )
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.axes),
            (*self.inputs, *self.outputs),
            jnp.float32,
        ).astype(dtype)
        # One matrix product: with more axes its gradient would go through transposed copies on CPU.
        rows, size = x.shape[: x.ndim - count], math.prod(self.inputs)
        y = (x.reshape(-1, size) @ kernel.reshape(size, -1)).reshape(*rows, *self.outputs)
        if self.bias:
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.zeros, self.axes[count:]),
                self.outputs,
                jnp.float32,
            )
            y = y + bias.astype(dtype)
        return _sum_slices(y, self.config) if self.partial_sum else y


def _sum_slices(x: jax.Array, config: ModelConfig) -> jax.Array:
    return x if config.tensor_axis is None else jax.lax.psum(x, config.tensor_axis)


class Block(nn.Module):
    """One layer: grouped-query attention and SwiGLU, each on a normalised residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, carry, layer, positions, turns, rows, branches, unread):
        """carry: (x [b, S, D], KVCache or None); layer: []; positions: [b, S], turns: of
        `rotary_turns` for them; rows: [b] or None; unread: [], a layer of whose results only its
        keys and values in the cache are wanted, or None -> (carry, None), as `nn.scan` wants it.
        """
        c = self.config
        x, cache = carry
        x = spread_rows(x)
        D, N, G, H, F = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.ffn_dim
        residual = (
            0.5 / c.num_layers
        )  # 2 L of these add up on the residual stream (GPT-2's initialisation)
        h = RMSNorm(c, name="attention_norm")(x)
        k = Projection(
            c, (D,), (G, H), ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias, name="k"
        )(h)  # [b, S, G, H]
        v = Projection(
            c, (D,), (G, H), ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias, name="v"
        )(h)
        if c.qk_norm:
            k = RMSNorm(c, name="k_norm")(k)
        k = rotate(k, turns)
        if cache is not None:
            index = (jnp.arange(cache.rows) if rows is None else rows)[:, None]  # [b, 1]
            cache = write_cache(cache, k, v, layer, index, positions)

        def add_results(block: Block, x: jax.Array) -> jax.Array:
            q = Projection(
                c, (D,), (N, H), ("embed", "heads", "head_dim"), bias=c.qkv_bias, name="q"
            )(h)  # [b, S, N, H]
            if c.qk_norm:
                q = RMSNorm(c, name="q_norm")(q)
            q = rotate(q, turns)
            attended = (
                attend_causal(q, k, v, branches)
                if cache is None
                else attend_cached(q, cache, layer, rows, positions)
            )
            x = x + Projection(
                c,
                (N, H),
                (D,),
                ("heads", "head_dim", "embed"),
                partial_sum=True,
                scale=residual,
                name="o",
            )(attended)
            normed = RMSNorm(c, name="ffn_norm")(x)
            gate = Projection(c, (D,), (F,), ("embed", "ffn"), name="gate")(normed)  # [b, S, F]
            up = Projection(c, (D,), (F,), ("embed", "ffn"), name="up")(normed)
            return x + Projection(
                c, (F,), (D,), ("ffn", "embed"), partial_sum=True, scale=residual, name="down"
            )(nn.silu(gate) * up)

        x = (
            add_results(self, x)
            if unread is None
            else nn.cond(layer == unread, lambda block, x: x, add_results, self, x)
        )
        return (spread_rows(x), cache), None


class Trunk(nn.Module):
    """Embedding, layers (scanned: one layer is compiled) and final norm, shared by policy and value
    model.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.normal(EMBEDDING_STD), ("vocab", "embed")
        )
        self.embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim), jnp.float32)
        block = (
            Block
            if c.remat == "none"
            else nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
        )
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_layers,
            in_axes=(0, *[nn.broadcast] * 5),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [b, S] -> [b, S, D]; a sliced vocabulary contributes zeros for tokens of other
        slices.
        """
        c = self.config
        table = self.embedding.astype(c.dtype)
        if c.tensor_axis is None:
            return table[tokens]
        local = tokens - jax.lax.axis_index(c.tensor_axis) * c.vocab_size
        mine = (local >= 0) & (local < c.vocab_size)
        return _sum_slices(
            jnp.where(mine[..., None], table[jnp.clip(local, 0, c.vocab_size - 1)], 0), c
        )

    def __call__(self, tokens, positions=None, cache=None, rows=None, branches=None, unread=None):
        """tokens [b, S] -> (hidden [b, S, D], cache). Without positions: whole sequences from
        position 0.
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
    """The language model. Hidden states and logits are separate calls, so that logits are only ever
    made where and as long as they are needed.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.trunk = Trunk(c)
        if not c.tie_embeddings:
            init = nn.with_logical_partitioning(
                nn.initializers.normal(EMBEDDING_STD), ("embed", "vocab")
            )
            self.lm_head = self.param("lm_head", init, (c.embed_dim, c.vocab_size), jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Right-padded tokens [B, T] -> hidden [B, T, D]."""
        return self.trunk(tokens)[0]

    def branch(self, tokens: jax.Array, branches: Branches) -> jax.Array:
        """Sequences with continuations behind them [B, S], laid out as `branches` says -> hidden
        [B, S, D].
        """
        return self.trunk(tokens, branches.positions, branches=branches)[0]

    def extend(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache, rows: jax.Array | None
    ) -> tuple[jax.Array, KVCache]:
        """Runs tokens [b, S] at positions [b, S] of cache rows `rows` (None: all rows in order) ->
        (hidden [b, S, D], cache).

        A position beyond the cache marks padding: it is not written, and its hidden state means
        nothing.
        """
        return self.trunk(tokens, positions, cache, rows)

    def read(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache, rows: jax.Array | None
    ) -> KVCache:
        """`extend` for tokens after which nothing is to be sampled: of the last layer only the keys
        and values are computed.
        """
        return self.trunk(
            tokens, positions, cache, rows, unread=jnp.int32(self.config.num_layers - 1)
        )[1]

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
    """The value model: the policy's trunk and one number per token. Its head starts at zero, so
    that first values are 0.
    """

    config: ModelConfig

    def setup(self):
        self.trunk = Trunk(self.config)
        self.head = self.param(
            "head",
            nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
            (self.config.embed_dim,),
            jnp.float32,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Right-padded tokens [B, T] -> float32 [B, T]: after reading token t."""
        return jnp.einsum("btd,d->bt", self.trunk(tokens)[0].astype(jnp.float32), self.head)
