"""Log-probabilities, entropies and values of recorded tokens.

Only this module shifts predictions onto the tokens that they describe.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepsearch_jax.models.attention import Branches
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.sharding import spread_rows

# Float32 logits held at once, for each device of the mesh: 80 MiB. Each chunk reads the output
# table, which a mesh gathers for it, and adds to its gradient.
LOGITS_PER_CHUNK = 5 << 22


def shift_to_tokens(predictions: jax.Array) -> jax.Array:
    """[B, T] made after reading token t -> [B, T] indexed by the token described (t + 1).

    Nothing describes token 0: it gets 0.
    """
    return jnp.pad(predictions[:, :-1], ((0, 0), (1, 0)))


def score_tokens(policy: Policy, params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-> (logprobs, entropy), float32 [B, T] each; 0 at t = 0.

    logprobs: of tokens[b, t] given tokens[b, :t]. entropy: of the distribution that it was drawn
    from. Logits exist for one chunk of positions at a time, forward and backward: never [B, T, V].
    """
    return _score(policy, params, tokens, _find_entropy)


def examine_tokens(policy: Policy, params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-> (logprobs float32, likeliest bool), [B, T] each; 0 and False at t = 0.

    logprobs: as in `score_tokens`. likeliest: whether greedy decoding chooses the same token.
    """
    is_likeliest = lambda logits, target, _: jnp.argmax(logits, axis=-1) == target
    return _score(policy, params, tokens, is_likeliest)


def _find_entropy(logits: jax.Array, target: jax.Array, log_total: jax.Array) -> jax.Array:
    return log_total - jnp.einsum("bwv,bwv->bw", jax.nn.softmax(logits), logits)


def _score(policy: Policy, params, tokens: jax.Array, measure) -> tuple[jax.Array, jax.Array]:
    """The results of `_score_hidden` for each token given those before it; 0 at t = 0."""
    hidden = policy.apply(params, tokens)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    found = _score_hidden(policy, params, hidden, targets, measure)
    return tuple(map(shift_to_tokens, found))


def _score_hidden(
    policy: Policy, params, hidden: jax.Array, targets: jax.Array, measure
) -> tuple[jax.Array, jax.Array]:
    """hidden [B, T, D], targets [B, T] -> (log-probability of each target, its measure), [B, T].

    Both are indexed by the token read, not yet shifted. measure(logits [B, w, V], target [B, w],
    log_total [B, w]) -> [B, w]; log_total: the logarithm of the sum of exp(logits).
    """
    B, T = targets.shape
    devices = max(1, jax.typeof(hidden).sharding.mesh.size)  # 0 without a mesh
    width = max(1, min(T, LOGITS_PER_CHUNK * devices // (B * policy.config.vocab_size)))
    chunks = -(-T // width)

    @jax.checkpoint
    def score_chunk(args):
        chunk, target = args  # [B, width, D], [B, width]
        logits = policy.apply(params, spread_rows(chunk), method=Policy.unembed)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        logprobs = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - log_total
        return logprobs, measure(logits, target, log_total)

    if chunks == 1:
        return score_chunk((hidden, targets))
    pad = chunks * width - T
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    hidden = hidden.reshape(B, chunks, width, -1).swapaxes(0, 1)  # [chunks, B, width, D]
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    targets = targets.reshape(B, chunks, width).swapaxes(0, 1)  # [chunks, B, width]
    scores = jax.lax.map(score_chunk, (hidden, targets))  # [chunks, B, width] each
    return tuple(x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in scores)


def score_answers(
    policy: Policy,
    params,
    tokens: jax.Array,
    seen: jax.Array,
    answers: jax.Array,
    opening: jax.Array,
    length: jax.Array,
) -> jax.Array:
    """Mean log-probability per answer token after each of P beginnings of an episode.

    tokens [B, T]; seen [B, P]: lengths of the beginnings; answers [B, A]: put behind each of
    them, right-padded; length [B]: tokens of the answer; opening []: how many of its first tokens
    are given, not scored (the opening tag). -> [B, P] float32, 0 if there is nothing to score.

    One forward pass over [B, T + P A]: every beginning has a copy of the answer behind the
    sequence, which sees that beginning and itself.
    Source: the turn-level information gain of IGPO (arXiv 2510.14967), as a log-probability.
    """
    B, T = tokens.shape
    P, A = seen.shape[1], answers.shape[1]
    offset = jnp.tile(jnp.arange(A), P)  # [P A]: place within the copy
    first = T + jnp.repeat(jnp.arange(P) * A, A)  # [P A]: where the copy begins
    behind = jnp.repeat(seen, A, axis=1)  # [B, P A]
    zeros = jnp.zeros((B, T), jnp.int32)
    # The layout: the sequence itself, then the copies.
    branches = Branches(
        seen=jnp.concatenate([zeros, behind], axis=1),
        start=jnp.concatenate([zeros, jnp.broadcast_to(first, behind.shape)], axis=1),
        positions=jnp.concatenate([zeros + jnp.arange(T), behind + offset], axis=1),
    )
    branched = jnp.concatenate([tokens, jnp.tile(answers, (1, P))], axis=1)  # [B, T + P A]
    hidden = policy.apply(params, branched, branches, method=Policy.branch)[:, T:]  # [B, P A, D]
    # Each copy's tokens are its targets, one position later.
    targets = jnp.tile(jnp.pad(answers[:, 1:], ((0, 0), (0, 1))), (1, P))  # [B, P A]
    logprobs, _ = _score_hidden(policy, params, hidden, targets, _find_entropy)
    logprobs = shift_to_tokens(logprobs).reshape(B, P, A)
    # Token 0 of a copy is described by the beginning, not by the copy: it is not scored.
    place = jnp.arange(A)
    scored = (place >= jnp.maximum(opening, 1)) & (place < length[:, None])
    scored = scored[:, None]  # [B, 1, A]
    return jnp.where(scored, logprobs, 0).sum(-1) / jnp.maximum(scored.sum(-1), 1)


def score_values(value: Value, params, tokens: jax.Array) -> jax.Array:
    """-> float32 [B, T]: the value of the state after tokens[b, :t]; 0 at t = 0."""
    return shift_to_tokens(value.apply(params, tokens))
