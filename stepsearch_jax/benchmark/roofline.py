"""The least time that decoding, prefilling and an update need, at rates measured on this machine.

The rates: copy bandwidth and matmuls. With N matmul parameters of the layers, V D of the output
table, L layers, N_q query heads of width H, G kv heads, b bytes a number, r rows at context t; and
N' as N with the last layer's matmuls for keys and values only, since nothing is sampled from what a
prefill reads:

    a decode step   FLOPs = 2 r (N + V D) + 4 r L N_q H t      bytes = b (N + V D + 2 r t L G H)
    a prefill of r rows x s tokens up to context t
                    FLOPs = 2 r s N' + 4 r (L - 1) N_q H sum(t - s + 1 .. t)
                    bytes = b (N' + 2 r t (L - 1) G H)
    floor           = sum over steps of max(FLOPs / matmul rate, bytes / copy bandwidth)
    an update of n tokens in rows of length T, forward and backward, nothing recomputed
                    FLOPs = 3 (2 n (N + V D) + 4 n L N_q H (T + 1) / 2), a value model without V D
                    bytes = 11 x 4 x parameters: read forward and backward; gradients written, and
                            read for their norm; AdamW reads gradients, parameters and two moments,
                            and writes the latter three. Activations are free

The matmul rate is that of the model's own matmuls at the step's own number of rows, one after
another, with each layer's own weights; the bandwidth is that of going over as many bytes as a
decode step reads, read and written bytes both counted. Norms, rotations, softmax, sampling,
embedding and the host are free.
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
        """The least time for pieces that run one after another.

        Each is bound by its arithmetic or by its memory traffic.
        """
        return sum(
            max(piece.flops / self.matmul_flops_s, piece.bytes / self.copy_bytes_s)
            for piece in work
        )

    def describe(self, work: Sequence[Work]) -> dict:
        """The pieces, their mean FLOPs and bytes, the rates, and the least seconds of all."""
        mean = lambda name: sum(getattr(piece, name) for piece in work) / len(work)
        return {
            "pieces": len(work),
            "flops": mean("flops"),
            "bytes": mean("bytes"),
            "least_s": self.floor_s(work),
        } | dataclasses.asdict(self)


def count_layer_parameters(model: ModelConfig) -> int:
    """N: matmul parameters of all layers."""
    columns = (
        2 * model.num_heads * model.head_dim
        + 2 * model.num_kv_heads * model.head_dim
        + 3 * model.ffn_dim
    )
    return model.num_layers * model.embed_dim * columns


def decode_step(model: ModelConfig, rows: int, context: int) -> Work:
    """One token of each of `rows` episodes, the token itself at position `context` - 1."""
    parameters = count_layer_parameters(model) + model.vocab_size * model.embed_dim
    wide = model.num_layers * model.num_heads * model.head_dim
    live = 2 * rows * context * model.num_layers * model.num_kv_heads * model.head_dim
    flops = 2 * rows * parameters + 4 * rows * wide * context
    return Work(flops, jnp.dtype(model.dtype).itemsize * (parameters + live))


def prefill(model: ModelConfig, rows: int, tokens: int, context: int) -> Work:
    """`tokens` tokens of each of `rows` episodes, which then hold `context`.

    Without the last layer's queries, attention and ffn.
    """
    attending = dataclasses.replace(model, num_layers=model.num_layers - 1)
    parameters = (
        count_layer_parameters(attending)
        + 2 * model.embed_dim * model.num_kv_heads * model.head_dim
    )
    wide = attending.num_layers * model.num_heads * model.head_dim
    seen = sum(range(context - tokens + 1, context + 1))
    live = 2 * rows * context * attending.num_layers * model.num_kv_heads * model.head_dim
    flops = 2 * rows * tokens * parameters + 4 * rows * wide * seen
    return Work(flops, jnp.dtype(model.dtype).itemsize * (parameters + live))


def update_flops(model: ModelConfig, rows: int, length: int, *, unembeds: bool) -> float:
    """Model FLOPs of forward and backward pass over rows x length tokens.

    The backward pass has twice the matmuls of the forward pass.
    """
    parameters = count_layer_parameters(model) + (
        model.vocab_size * model.embed_dim if unembeds else 0
    )
    wide = model.num_layers * model.num_heads * model.head_dim
    return 3 * (2 * rows * length * parameters + 4 * rows * wide * length * (length + 1) / 2)


def update_bytes(parameter_bytes: int) -> int:
    """Least memory traffic of one step of AdamW after clipping by the global norm.

    parameter_bytes: size of the parameters, in float32.
    """
    return 11 * parameter_bytes


def measure_copy(nbytes: float) -> float:
    """-> bytes per second, read and written, of going over an array of `nbytes` on the device.

    Within one program: fresh memory would cost page faults.
    """
    source = jnp.arange(max(1, int(nbytes) // 4), dtype=jnp.float32)
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, COPIES, lambda _, x: x + 1.0, x))
    return 2 * COPIES * source.nbytes / _best_seconds(copy, source)


def measure_matmuls(model: ModelConfig, rows: int, *, unembeds: bool) -> float:
    """-> FLOPs per second of the model's own matmuls, one after another, for `rows` tokens."""
    D, Q, K, F = (
        model.embed_dim,
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
        model.ffn_dim,
    )
    keys = iter(jax.random.split(jax.random.key(0), 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape, model.dtype) * shape[-2] ** -0.5
    shapes = dict(q=(D, Q), k=(D, K), v=(D, K), o=(Q, D), gate=(D, F), up=(D, F), down=(F, D))
    layers = {name: draw(model.num_layers, *shape) for name, shape in shapes.items()}
    table_shape = (model.vocab_size, D) if model.tie_embeddings else (D, model.vocab_size)
    table = draw(*table_shape) if unembeds else None

    @jax.jit
    def run(x, layers, table):
        def layer(x, own):
            # Every product is used, so that the compiler leaves none out.
            pair = x @ own["k"] + x @ own["v"]
            x = x @ own["q"] @ own["o"] + jnp.pad(pair, ((0, 0), (0, max(0, D - K))))[:, :D]
            return (x @ own["gate"] + x @ own["up"]) @ own["down"], None

        x = jax.lax.scan(layer, x, layers)[0]
        return x if table is None else x @ (table.T if model.tie_embeddings else table)

    flops = 2 * rows * (count_layer_parameters(model) + (model.vocab_size * D if unembeds else 0))
    return flops / _best_seconds(run, draw(rows, D), layers, table)


def render(name: str, found: dict) -> str:
    """What `Rates.describe` found, as a line."""
    return (
        f"{found['pieces']} x {name}: {found['flops'] / 1e9:.3g} GFLOP and "
        f"{found['bytes'] / 2**20:,.0f} MiB each; at least {found['least_s']:.2f} s at "
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
