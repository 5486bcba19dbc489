"""Optimiser steps on episodes of different lengths: all rows as wide as the longest, or sorted.

The lengths are spread evenly from an eighth of LENGTH to LENGTH. One side runs micro-batches at the
whole width, the other sorts rows by length and cuts each micro-batch to one of a few widths
(config.rl.width_buckets). Both compute the same gradients, which is checked.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from stepsearch_jax import sharding
from stepsearch_jax.benchmark import sample_model
from stepsearch_jax.benchmark.scripted import start
from stepsearch_jax.benchmark.timing import alternate, time_call
from stepsearch_jax.benchmark.update import SETTINGS, make_optimizers
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl import learner
from stepsearch_jax.types import Batch, ModelState, TrainState

EPISODES, LENGTH, SHORTEST = 16, 1024, 8
SIDES = {"whole": 1, "sorted": 8}  # -> rl.width_buckets
MICROBATCH = 2


def measure(
    *,
    repeats: int,
    seed: int,
    config: ml_collections.ConfigDict | None = None,
    episodes: int | None = None,
    length: int = LENGTH,
    model: ModelConfig | None = None,
) -> dict:
    """-> figures: of each side the seconds of an update (median) and the fraction of padding.

    config: whose model to run, None = `sample_model.MODEL`; episodes: rows of the minibatch.
    Raises ValueError if the two sides' gradient norms differ by more than a thousandth.
    """
    start()
    model = model or sample_model.choose_models(config, "none")[0]
    batch = draw_batch(model, episodes or EPISODES, length, seed)
    runs, metrics = {}, {}
    for side, buckets in SIDES.items():
        runs[side] = make_update(model, batch, buckets, seed)
        metrics[side] = runs[side]()
    norms = {side: float(found["policy_grad_norm"]) for side, found in metrics.items()}
    if not abs(norms["whole"] - norms["sorted"]) <= 1e-3 * norms["whole"]:
        raise ValueError(f"the two sides' gradients differ: their norms are {norms}")
    times = alternate(
        {side: lambda run=run: time_call(run)[0] for side, run in runs.items()}, repeats
    )
    seconds = {side: times[side]["median_s"] for side in SIDES}
    return {
        "seconds": seconds,
        "ratio": seconds["whole"] / seconds["sorted"],
        "padding": {side: float(found["padding_fraction"]) for side, found in metrics.items()},
        "gradient_norms": norms,
        "episodes": len(batch.tokens),
        "length": length,
        "microbatch_size": MICROBATCH,
        "model": sample_model.describe(model),
        "repeats": repeats,
        "seed": seed,
        "jax": jax.__version__,
        "device": str(jax.devices()[0]),
    }


def draw_batch(model: ModelConfig, rows: int, length: int, seed: int) -> Batch:
    """A minibatch of random tokens and targets; every second token is an action."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.linspace(length // SHORTEST, length, rows).astype(int))
    inside = np.arange(length) < lengths[:, None]
    actions = inside & (np.arange(length) % 2 == 1)
    draw = lambda: rng.normal(size=(rows, length)).astype(np.float32)
    logprobs = -np.abs(draw())
    batch = Batch(
        tokens=rng.integers(0, model.vocab_size, (rows, length), np.int32),
        token_mask=inside,
        action_mask=actions,
        value_mask=actions,
        old_logprobs=logprobs,
        ref_logprobs=logprobs,
        old_values=np.zeros((rows, length), np.float32),
        advantages=draw(),
        returns=draw(),
    )
    return jax.tree.map(jnp.asarray, batch)


def make_update(model: ModelConfig, batch: Batch, buckets: int, seed: int):
    """-> a function that takes one optimiser step from where the last one ended -> metrics."""
    settings = dataclasses.replace(SETTINGS, microbatch_size=MICROBATCH, width_buckets=buckets)
    optimizers = make_optimizers()
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = sample_model.draw_params(Policy(model), seed)
    value_params = sample_model.draw_params(Value(model), seed + 1)
    models = [
        ModelState(tree, jax.jit(optimizer.init)(tree))
        for tree, optimizer in zip(
            jax.device_put((params, value_params), sharding.replicated(mesh)), optimizers
        )
    ]
    scalars = dict(
        iteration=jnp.int32(0),
        position=jnp.int32(0),
        kl_coef=jnp.float32(1e-3),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )
    held = {"state": TrainState(*models, **jax.device_put(scalars, sharding.replicated(mesh)))}
    update = learner.make_update(model, settings, *optimizers)

    def run():
        held["state"], metrics = jax.block_until_ready(update(held["state"], batch, jnp.float32(0)))
        return metrics

    return run


def render(figures: dict) -> str:
    """The figures as a table."""
    lines = [
        f"one optimiser step on {figures['episodes']} episodes of {figures['length'] // SHORTEST} "
        f"to {figures['length']} tokens, medians of {figures['repeats']} alternating runs",
        f"{'':12}{'seconds':>12}{'padding':>12}",
    ]
    for side in SIDES:
        lines.append(f"{side:12}{figures['seconds'][side]:12.2f}{figures['padding'][side]:12.1%}")
    return "\n".join([*lines, f"whole / sorted: {figures['ratio']:.2f}x"])
