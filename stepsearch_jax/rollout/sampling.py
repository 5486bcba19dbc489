"""Choosing the next token, reproducibly: the noise of a token depends only on the run's key, the episode and the token's index."""
from __future__ import annotations

import jax
import jax.numpy as jnp


def restrict(logits: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
    """Logits [b, V] with every token outside the k likeliest and outside the nucleus of mass top_p set to -inf (Holtzman et al. 2020).

    top_k = 0 and top_p = 1.0 keep everything. The likeliest token always stays; tokens tied with the last one kept stay too.
    Reference: the released code samples with top_p = 0.95, which biases ratio and KL against the learner's full distribution; the default is 1.
    """
    V = logits.shape[-1]
    kept = top_k if 0 < top_k < V else V
    if kept == V and top_p >= 1.0:
        return logits
    best = jax.lax.top_k(logits, kept)[0]  # [b, kept], descending
    if top_p < 1.0:
        mass = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass  # mass of strictly better ones
        kept_logits = jnp.where(before < top_p, best, jnp.inf)
    else:
        kept_logits = best
    return jnp.where(logits >= kept_logits.min(-1, keepdims=True), logits, -jnp.inf)


def sample(logits: jax.Array, key: jax.Array, episode_ids: jax.Array, token_index: jax.Array, temperature: jax.Array, *,
           top_k: int, top_p: float) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row by the Gumbel-max trick -> (tokens [b] int32, logprobs [b] float32).

    logits: [b, V]; key: [] typed PRNG key; episode_ids, token_index: [b]; temperature: [] float, 0 = greedy.
    argmax(logits + temperature * noise) is a draw at that temperature, and at 0 the best token: one program serves both.
    logprobs are under the unrestricted distribution at temperature 1, which is what the learner computes.
    """
    keys = jax.vmap(lambda episode, index: jax.random.fold_in(jax.random.fold_in(key, episode), index))(episode_ids, token_index)
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[-1:], jnp.float32))(keys)
    tempered = restrict(logits / jnp.where(temperature > 0, temperature, 1.0), top_k=top_k, top_p=top_p)
    tokens = jnp.argmax(tempered + jnp.where(temperature > 0, noise, 0.0), axis=-1).astype(jnp.int32)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    return tokens, logprobs
