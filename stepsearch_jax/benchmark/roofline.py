"""What this machine can do at best: measured copy bandwidth and matmul rates, and from them the least time that decoding, prefilling and an update need.

With N matmul parameters of the layers, V D of the output table, L layers, N_q query heads of width H, G kv heads, b bytes a number, r rows at context t; and
N' as N with the last layer's matmuls for keys and values only, since nothing is sampled from what a prefill reads:

    a decode step   FLOPs = 2 r (N + V D) + 4 r L N_q H t      bytes = b (N + V D + 2 r t L G H)
    a prefill of r rows x s tokens up to context t
                    FLOPs = 2 r s N' + 4 r (L - 1) N_q H sum(t - s + 1 .. t)      bytes = b (N' + 2 r t (L - 1) G H)
    floor           = sum over steps of max(FLOPs / matmul rate, bytes / copy bandwidth)
    an update of n tokens in rows of length T, forward and backward, nothing recomputed
                    FLOPs = 3 (2 n (N + V D) + 4 n L N_q H (T + 1) / 2), without V D for a value model
                    bytes = 11 x 4 x parameters: read forward and backward; gradients written, and read for their norm; AdamW reads gradients,
                            parameters and two moments, and writes the latter three. Activations are free

The matmul rate is that of the model's own matmuls at the step's own number of rows, one after another, with each layer's own weights; the bandwidth is that
of going over as many bytes as a decode step reads, read and written bytes both counted. Norms, rotations, softmax, sampling, embedding and the host are free.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from stepsearch_jax.models.architecture import ModelConfig

MEASURE_SECONDS = 0.3  # how long each rate is measured
COPIES = 32  # in one program


@dataclasses.dataclass(frozen=True)
class Work:
    """What a piece of computation needs at least."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the machine reaches."""

    copy_bytes_s: float
    matmul_flops_s: float

    def floor_s(self, work: Sequence[Work]) -> float:
        """The least time for pieces that run one after another, each bound by its arithmetic or by its memory traffic."""
        return sum(max(w.flops / self.matmul_flops_s, w.bytes / self.copy_bytes_s) for w in work)

    def describe(self, work: Sequence[Work]) -> dict:
        """The pieces, their mean FLOPs and bytes, the rates, and the least seconds of all."""
        mean = lambda name: sum(getattr(w, name) for w in work) / len(work)
        return {
            "pieces": len(work),
            "flops": mean("flops"),
            "bytes": mean("bytes"),
            "least_s": self.floor_s(work),
        } | dataclasses.asdict(self)


def count_layer_parameters(c: ModelConfig) -> int:
    """N: matmul parameters of all layers."""
    return (
        c.num_layers
        * c.embed_dim
        * (2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim + 3 * c.ffn_dim)
    )


def decode_step(c: ModelConfig, rows: int, context: int) -> Work:
    """One token of each of `rows` episodes, the token itself at position `context` - 1."""
    parameters, wide = (
        count_layer_parameters(c) + c.vocab_size * c.embed_dim,
        c.num_layers * c.num_heads * c.head_dim,
    )
    live = 2 * rows * context * c.num_layers * c.num_kv_heads * c.head_dim
    return Work(
        2 * rows * parameters + 4 * rows * wide * context,
        jnp.dtype(c.dtype).itemsize * (parameters + live),
    )


def prefill(c: ModelConfig, rows: int, tokens: int, context: int) -> Work:
    """`tokens` tokens of each of `rows` episodes, which then hold `context`. The last layer's queries, attention and ffn are left out."""
    attending = dataclasses.replace(c, num_layers=c.num_layers - 1)
    parameters = count_layer_parameters(attending) + 2 * c.embed_dim * c.num_kv_heads * c.head_dim
    wide = attending.num_layers * c.num_heads * c.head_dim
    seen = sum(range(context - tokens + 1, context + 1))
    live = 2 * rows * context * attending.num_layers * c.num_kv_heads * c.head_dim
    return Work(
        2 * rows * tokens * parameters + 4 * rows * wide * seen,
        jnp.dtype(c.dtype).itemsize * (parameters + live),
    )


def update_flops(c: ModelConfig, rows: int, length: int, *, unembeds: bool) -> float:
    """Model FLOPs of forward and backward pass over rows x length tokens; the backward pass has twice the matmuls of the forward one."""
    parameters = count_layer_parameters(c) + (c.vocab_size * c.embed_dim if unembeds else 0)
    wide = c.num_layers * c.num_heads * c.head_dim
    return 3 * (2 * rows * length * parameters + 4 * rows * wide * length * (length + 1) / 2)


def update_bytes(parameter_bytes: int) -> int:
    """Least memory traffic of one optimiser step of AdamW behind clipping by the global norm; the parameters, float32, take `parameter_bytes`."""
    return 11 * parameter_bytes


def measure_copy(nbytes: float) -> float:
    """-> bytes per second, read and written, of going over an array of `nbytes` on the device, within one program: fresh memory would cost page faults."""
    source = jnp.arange(max(1, int(nbytes) // 4), dtype=jnp.float32)
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, COPIES, lambda _, x: x + 1.0, x))
    return 2 * COPIES * source.nbytes / _best_seconds(copy, source)


def measure_matmuls(c: ModelConfig, rows: int, *, unembeds: bool) -> float:
    """-> FLOPs per second of the model's own matmuls, one after another, for `rows` tokens."""
    D, Q, K, F = c.embed_dim, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.ffn_dim
    keys = iter(jax.random.split(jax.random.key(0), 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape, c.dtype) * shape[-2] ** -0.5
    shapes = dict(q=(D, Q), k=(D, K), v=(D, K), o=(Q, D), gate=(D, F), up=(D, F), down=(F, D))
    layers = {name: draw(c.num_layers, *shape) for name, shape in shapes.items()}
    table = (
        draw(*((c.vocab_size, D) if c.tie_embeddings else (D, c.vocab_size))) if unembeds else None
    )

    @jax.jit
    def run(x, layers, table):
        def layer(x, w):
            pair = x @ w["k"] + x @ w["v"]
            x = (
                x @ w["q"] @ w["o"] + jnp.pad(pair, ((0, 0), (0, max(0, D - K))))[:, :D]
            )  # every product is used, so none is left out
            return (x @ w["gate"] + x @ w["up"]) @ w["down"], None

        x = jax.lax.scan(layer, x, layers)[0]
        return x if table is None else x @ (table.T if c.tie_embeddings else table)

    flops = 2 * rows * (count_layer_parameters(c) + (c.vocab_size * D if unembeds else 0))
    return flops / _best_seconds(run, draw(rows, D), layers, table)


def render(name: str, found: dict) -> str:
    """What `Rates.describe` found, as a line."""
    return (
        f"{found['pieces']} x {name}: {found['flops'] / 1e9:.3g} GFLOP and {found['bytes'] / 2**20:,.0f} MiB each; at least {found['least_s']:.2f} s at "
        f"{found['matmul_flops_s'] / 1e9:,.0f} GFLOP/s and {found['copy_bytes_s'] / 1e9:,.1f} GB/s"
    )


def _best_seconds(function, *arguments) -> float:
    """The shortest of several runs: a rate that the machine is known to reach."""
    jax.block_until_ready(function(*arguments))
    found, end = [], time.perf_counter() + MEASURE_SECONDS
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(time.perf_counter() - start)
    return min(found)


class RateBook:
    """Rates of this machine, measured when they are first asked for."""

    def __init__(self, model: ModelConfig):
        self._model = model
        self._copies: dict[int, float] = {}
        self._matmuls: dict[tuple[int, bool], float] = {}

    def at(self, nbytes: float, rows: int, *, unembeds: bool) -> Rates:
        """The bandwidth of copying `nbytes`, and the matmul rate with `rows` tokens at a time."""
        if int(nbytes) not in self._copies:
            self._copies[int(nbytes)] = measure_copy(nbytes)
        if (rows, unembeds) not in self._matmuls:
            self._matmuls[rows, unembeds] = measure_matmuls(self._model, rows, unembeds=unembeds)
        return Rates(self._copies[int(nbytes)], self._matmuls[rows, unembeds])
