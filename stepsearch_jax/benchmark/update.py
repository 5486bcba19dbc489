"""One PPO step and its updates against tunix's PPO learner; FLOP rate and memory of the updates.

Both sides: 16 rows (--episodes) of a prompt of 128 tokens and 128 sampled ones, the rollout
benchmark's model (--config) as policy and reference, a value model of the same size, one device (on
CPU with one thread for each core), float32 unless --config says otherwise, one minibatch, one
epoch, AdamW after clipping. "step" is everything that an iteration does on the device: rollout,
log-probabilities of policy and reference, values, advantages, both updates; "updates" is the two
optimiser steps alone. Ours also computes the entropy, which the peer leaves out, and without
--config keeps only matrix products for the backward pass (model.remat=dots), the faster way on
CPUs. The run ends with an error unless both sides' logits after the prompts agree to 1e-3.

Model FLOPs of the updates are counted without recomputation and compared with the rate of the
model's own matmuls at as many tokens (benchmark/roofline.py). Temporaries are those of the compiled
update at vocabulary 151936 and 4 x 2048 tokens, with a small trunk, less one gradient of each
model. The rest is compared with the [B, T, V] float32 logits that a plain cross-entropy would hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from stepsearch_jax import sharding
from stepsearch_jax.benchmark import roofline, sample_model
from stepsearch_jax.benchmark.cases import CONFIGURED, Case
from stepsearch_jax.benchmark.peers.process import Peer
from stepsearch_jax.benchmark.scripted import Inputs, find_logits, make_run, start
from stepsearch_jax.benchmark.timing import alternate, time_call
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl import learner
from stepsearch_jax.types import Batch, ModelState, TrainState

CASE = Case(
    episodes=16,
    prompt=128,
    turns=1,
    turn_tokens=(128,),
    observation=1,
    slots=0,
    **CONFIGURED | {"prefill_tokens": 128},
)
# The settings of both sides.
RULES = dict(
    policy_rate=7e-7,
    value_rate=7e-6,
    b1=0.9,
    b2=0.999,
    weight_decay=0.01,
    max_grad_norm=1.0,
    gamma=1.0,
    gae_lambda=1.0,
    kl_coef=1e-3,
    clip=0.2,
    value_clip=0.5,
)
SETTINGS = learner.LearnerSettings(
    advantage="gae",
    gamma=RULES["gamma"],
    gae_lambda=RULES["gae_lambda"],
    over_observations=False,
    whiten_advantages=True,
    clip_low=RULES["clip"],
    clip_high=RULES["clip"],
    old_logprobs="learner",
    max_ratio=math.inf,
    aggregation="token_mean",
    value_clip=RULES["value_clip"],
    entropy_coef=0.0,
    kl_placement="reward",
    kl_estimator="k1",
    kl_target=0.0,
    kl_horizon=1e4,
    minibatches=1,
    ppo_epochs=1,
    microbatch_size=0,
    width_buckets=1,
    placement="step",
    outcome_overwrites=False,
)


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    """The update whose memory is read from its compiled program."""

    rows: int
    length: int
    model: ModelConfig


MEMORY = MemoryCase(
    rows=4,
    length=2048,
    model=dataclasses.replace(
        sample_model.MODEL,
        vocab_size=151_936,
        num_layers=2,
        embed_dim=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        ffn_dim=128,
        remat="layers",
    ),
)


def measure(
    *,
    repeats: int,
    seed: int,
    peer: str,
    peer_python: str,
    config: ml_collections.ConfigDict | None = None,
    episodes: int | None = None,
    case: Case = CASE,
    model: ModelConfig | None = None,
    memory: MemoryCase = MEMORY,
) -> dict:
    """-> figures: "ours_s", "peer_s" (medians) and "ratio" = peer / ours of the whole step.

    The same of "updates", FLOP rates, and bytes of temporaries.

    peer: "none" or "tunix"; peer_python: the interpreter that has it; config: whose model to run,
    None = `sample_model.MODEL`; episodes: instead of the case's own.
    Raises ImportError if the peer is not installed, ValueError if it computes something else.
    """
    case = case.resize(episodes)
    start()
    model, sampler = (model, model) if model else sample_model.choose_models(config, peer)
    inputs = Inputs.draw(model, case, seed)
    with contextlib.ExitStack() as stack:
        # The peer's process, with our weights and prompts. It must compute our logits.
        other = None
        if peer != "none":
            job = RULES | dict(model=sample_model.describe(model), tokens=case.turn_tokens[0])
            arrays = sample_model.name_arrays(inputs.params) | {"prompts": inputs.prompts}
            other = stack.enter_context(Peer(f"{peer}_update", peer_python, job, arrays))
            logits = find_logits(model, inputs)
            difference = sample_model.check_logits(peer, logits, other.checks["logits"])

        # Both sides in turn: the whole step, then the updates alone.
        step, updates = make_steps(model, sampler, case, inputs, seed)
        found = {}
        for name, run in (("step", step), ("updates", updates)):
            sides = {"ours": lambda run=run: time_call(run)[0]}
            if other:
                sides["peer"] = lambda name=name: other.run(name)
            times = alternate(sides, repeats)
            ours = times["ours"]["median_s"]
            theirs = times["peer"]["median_s"] if other else None
            found[name] = {
                "ours_s": ours,
                "peer_s": theirs,
                "ratio": theirs / ours if other else None,
                "runs_s": {side: runs["runs_s"] for side, runs in times.items()},
            }

    # The FLOP rate of the updates beside that of the model's matmuls.
    length = case.context
    flops = sum(
        roofline.update_flops(model, case.episodes, length, unembeds=unembeds)
        for unembeds in (True, False)
    )
    held = count_parameter_bytes(model)
    copy_rate = roofline.measure_copy(held)
    matmul_rate = roofline.measure_matmuls(model, case.episodes * length, unembeds=True)
    rates = roofline.Rates(copy_rate, matmul_rate)
    least = rates.describe([roofline.Work(flops, roofline.update_bytes(held))])
    reached = flops / found["updates"]["ours_s"]
    return (
        {name: found["step"][name] for name in ("ours_s", "peer_s", "ratio")}
        | found
        | {
            "model_flops": flops,
            "reached_flops_s": reached,
            "matmul_fraction": reached / rates.matmul_flops_s,
            "roofline": least,
            "memory": measure_memory(memory),
            "peer": peer,
            "versions": other.versions if other else None,
            "largest_logit_difference": difference if other else None,
            "model": sample_model.describe(model),
            "size": dataclasses.asdict(case),
            "repeats": repeats,
            "seed": seed,
            "jax": jax.__version__,
            "device": str(jax.devices()[0]),
        }
    )


def make_steps(model: ModelConfig, sampler: ModelConfig, case: Case, inputs: Inputs, seed: int):
    """-> (a run of the whole step, a run of both updates on a batch that is ready).

    model: as the learner computes it; sampler: as the rollout does. Each run starts with the
    parameters that the previous run left.
    """
    # The learner's state on one device.
    value_params = sample_model.draw_params(Value(model), seed + 1)
    optimizers = make_optimizers()
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params, value_params, reference = jax.device_put(
        (inputs.params, value_params, jax.tree.map(np.copy, inputs.params)),
        sharding.replicated(mesh),
    )
    models = [
        ModelState(tree, jax.jit(optimizer.init)(tree))
        for tree, optimizer in zip((params, value_params), optimizers)
    ]
    scalars = dict(
        iteration=jnp.int32(0),
        position=jnp.int32(0),
        kl_coef=jnp.float32(RULES["kl_coef"]),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )
    state = TrainState(*models, **jax.device_put(scalars, sharding.replicated(mesh)))

    # The programs, and made-up rewards.
    collect, _ = make_run(sampler, case, inputs, case.episodes, mesh)
    build_batch = learner.make_build_batch(model, SETTINGS)
    update = learner.make_update(model, SETTINGS, *optimizers)
    no_steps = np.zeros((case.episodes, case.turns), np.float32)
    outcomes = np.linspace(0.0, 1.0, case.episodes, dtype=np.float32)
    step_rewards, outcome_rewards = sharding.rows_to_mesh(mesh, (no_steps, outcomes))
    held = {"state": state}  # the state is donated from one update to the next

    def build():
        trajectory, _ = collect(slice(None), held["state"].policy.params)
        return build_batch(held["state"], reference, trajectory, step_rewards, outcome_rewards)[0]

    def apply(batch: Batch):
        held["state"], metrics = jax.block_until_ready(update(held["state"], batch, jnp.float32(0)))
        return metrics

    ready = jax.block_until_ready(build())
    sampled, asked = int(ready.action_mask.sum()), case.episodes * case.turn_tokens[0]
    if sampled != asked:
        raise ValueError(f"the rollout sampled {sampled} tokens instead of {asked}")

    # Arrays that an update returns have other shardings than those made here, so every program is
    # compiled once more. After these two calls nothing is compiled.
    apply(ready)
    apply(build())
    return lambda: apply(build()), lambda: apply(ready)


def make_optimizers():
    """-> (policy's, value model's): AdamW after clipping, at constant rates."""
    make = lambda rate: learner.make_optimizer(
        "adamw",
        rate,
        warmup=0.0,
        iterations=1,
        steps_per_iteration=1,
        b1=RULES["b1"],
        b2=RULES["b2"],
        weight_decay=RULES["weight_decay"],
        max_grad_norm=RULES["max_grad_norm"],
    )
    return make(RULES["policy_rate"]), make(RULES["value_rate"])


def count_parameter_bytes(model: ModelConfig) -> int:
    """Of the policy and the value model."""
    return sum(
        leaf.size * leaf.dtype.itemsize
        for kind in (Policy, Value)
        for leaf in jax.tree.leaves(sample_model.box_params(kind(model)))
    )


def measure_memory(memory: MemoryCase) -> dict:
    """Compiles the update at this size, from shapes alone -> figures in bytes.

    Its temporaries, one gradient of each model, the rest, and [B, T, V] in float32.
    """
    # The learner's state and a batch as shapes.
    optimizers = make_optimizers()
    shapes = [nn.unbox(sample_model.box_params(kind(memory.model))) for kind in (Policy, Value)]
    states = [
        ModelState(tree, jax.eval_shape(optimizer.init, tree))
        for tree, optimizer in zip(shapes, optimizers)
    ]
    number = lambda dtype: jax.ShapeDtypeStruct((), dtype)
    state = TrainState(
        *states,
        iteration=number(jnp.int32),
        position=number(jnp.int32),
        kl_coef=number(jnp.float32),
        skipped=number(jnp.int32),
        skipped_in_a_row=number(jnp.int32),
    )
    masks = ("token_mask", "action_mask", "value_mask")
    kinds = {"tokens": jnp.int32} | dict.fromkeys(masks, jnp.bool_)
    shape = (memory.rows, memory.length)
    batch = {
        field.name: jax.ShapeDtypeStruct(shape, kinds.get(field.name, jnp.float32))
        for field in dataclasses.fields(Batch)
    }

    # The compiled program, and what to compare its temporaries with.
    update = learner.make_update(memory.model, SETTINGS, *optimizers)
    compiled = update.lower(state, Batch(**batch), number(jnp.float32)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    gradients = count_parameter_bytes(memory.model)
    logits = 4 * memory.rows * memory.length * memory.model.vocab_size
    return {
        "temporary_bytes": temporary,
        "gradient_bytes": gradients,
        "beyond_bytes": temporary - gradients,
        "logits_bytes": logits,
        "share_of_logits": (temporary - gradients) / logits,
        "rows": memory.rows,
        "length": memory.length,
        "vocab_size": memory.model.vocab_size,
    }


def render(figures: dict) -> str:
    """The figures as a table."""
    rows = [("", "ours", f"peer ({figures['peer']})", "peer / ours")]
    number = lambda value, unit: "" if value is None else f"{value:.2f}{unit}"
    for name in ("step", "updates"):
        part = figures[name]
        times = number(part["ours_s"], " s"), number(part["peer_s"], " s")
        rows.append((name, *times, number(part["ratio"], "x")))
    memory = figures["memory"]
    return "\n".join(
        [
            f"medians of {figures['repeats']} alternating runs",
            *("".join(f"{cell:>20}" for cell in row) for row in rows),
            f"the updates reach {figures['reached_flops_s'] / 1e9:.1f} GFLOP/s, "
            f"{figures['matmul_fraction']:.0%} of the model's own matmuls'",
            roofline.render("both updates", figures["roofline"]),
            f"temporaries beyond gradients at vocabulary {memory['vocab_size']} and "
            f"{memory['rows']} x {memory['length']} tokens: {memory['beyond_bytes'] / 2**20:.0f} "
            f"MiB, {memory['share_of_logits']:.1%} of [B, T, V] float32",
        ]
    )
