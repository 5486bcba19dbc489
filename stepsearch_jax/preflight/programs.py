"""The jitted programs of `train.py`, compiled for absent chips from shapes and shardings."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepsearch_jax import sharding
from stepsearch_jax.models.attention import make_cache
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.preflight.kernels import count_kernel_bytes
from stepsearch_jax.preflight.lengths import Rollout
from stepsearch_jax.prompting.tags import make_tag_automaton
from stepsearch_jax.prompting.templates import encode_environment
from stepsearch_jax.rl import learner
from stepsearch_jax.rl.model_state import describe_model_state, describe_params
from stepsearch_jax.rollout.programs import (
    HostPrograms,
    make_host_programs,
    make_rollout,
    make_rollout_copy,
)
from stepsearch_jax.rollout.state import Environment, Observations, Prompts, RolloutSettings
from stepsearch_jax.run.checks import check_config, check_sampling
from stepsearch_jax.run.settings import (
    describe_models,
    learner_settings,
    make_optimizers,
    rollout_settings,
    round_vocabulary,
)
from stepsearch_jax.types import TrainState

PHASES = ("copy", "rollout", "score", "update")  # in the order of an iteration


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip that a program needs beside its arguments."""

    temporaries: float
    fresh: float  # results, without those that take the place of a donated argument
    code: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The program of one phase, or its programs, which run one after another.

    memory is None if the compiler refused one because a chip cannot hold it.
    """

    memory: Memory | None
    texts: dict[str, str]  # name -> optimised HLO, of a rollout those of `HostPrograms`
    kernels: dict[str, float]  # Pallas kernel -> bytes that it moves in one run
    refused: float  # bytes that the refusal names, arguments included
    seconds: float  # that compiling took


@dataclasses.dataclass(frozen=True)
class Parts:
    """What train.py keeps on the device, as shapes with shardings; and the mesh.

    The cache is the rollout's own, of one shard of the rows.
    """

    mesh: Mesh
    policy: Any
    policy_optimizer: Any
    value: Any
    value_optimizer: Any
    reference: Any
    rollout_copy: Any
    environment: Any
    cache: Any

    def bytes_per_chip(self) -> dict[str, float]:
        """Name -> bytes on one chip."""
        return {
            field.name: count_bytes(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "mesh"
        }


def count_bytes(tree) -> float:
    """Bytes of a tree of shapes on one chip; those without a sharding are one chip's own."""

    def count(leaf) -> float:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return float(np.prod(shape)) * leaf.dtype.itemsize

    return sum(map(count, jax.tree.leaves(tree)))


def make_mesh(config: ml_collections.ConfigDict, devices) -> Mesh:
    """The config's mesh over these devices, checked against the rest of the config.

    Raises ValueError as `train.py` does.
    """
    mesh_config, model_config = config.mesh, config.model
    if not model_config.vocab_size:
        raise ValueError(
            "config.model.vocab_size is 0, which means the tokenizer's size, but preflight reads "
            "no file: set it to the rows of the model's embedding (151936 for Qwen2.5 up to 3B)"
        )
    mesh = sharding.make_mesh(
        mesh_config.data,
        mesh_config.fsdp,
        mesh_config.tensor,
        mesh_config.slices,
        model_config.num_kv_heads,
        devices=devices,
    )
    check_config(config, mesh)
    check_sampling(config)
    return mesh


def describe_parts(config: ml_collections.ConfigDict, mesh: Mesh) -> Parts:
    """Shapes and shardings of all that stays on the device, as `run.start.begin_run` makes them."""
    # Learner.
    model, rollout_model = describe_models(config, round_vocabulary(config.model.vocab_size))
    rules = dict(config.mesh.train_rules)
    policy_optimizer, value_optimizer = make_optimizers(config, config.iterations)
    params, specs = describe_params(Policy(model), mesh, rules)
    policy = describe_model_state(policy_optimizer, mesh, params, specs)
    value = None
    if value_optimizer is not None:
        value_params = describe_params(Value(model), mesh, rules)
        value = describe_model_state(value_optimizer, mesh, *value_params)

    # Rollout: its copy of the policy, and one shard's cache.
    rollout_params, _ = describe_params(Policy(rollout_model), mesh, sharding.ROLLOUT_RULES)
    rollout_copy = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, rollout_model.dtype, sharding=x.sharding),
        rollout_params,
    )
    episodes = config.rollout.prompts * config.rollout.group_size
    slots = (config.rollout.slots or episodes) // sharding.row_shards(mesh)
    cache = jax.eval_shape(
        lambda: make_cache(rollout_model.place_on(mesh), slots, config.rollout.context)
    )
    return Parts(
        mesh,
        policy.params,
        policy.opt_state,
        value and value.params,
        value and value.opt_state,
        params,
        rollout_copy,
        _place(describe_environment(config), mesh, PartitionSpec()),
        cache,
    )


def describe_environment(config: ml_collections.ConfigDict) -> Environment:
    """The environment's arrays, for a vocabulary of the model's size.

    Their texts count one token for each byte, more than any tokenizer makes of them; the
    automaton's states do not depend on the tokenizer.
    """
    automaton = make_tag_automaton([bytes([byte]) for byte in range(256)], [])
    fixed = encode_environment(lambda text: list(text.encode()), config.search.k)
    next_state = np.broadcast_to(
        automaton.next_state[:, :1],
        (len(automaton.next_state), round_vocabulary(config.model.vocab_size)),
    )
    return Environment(
        next_state,
        automaton.event,
        np.int32(automaton.start),
        fixed.invalid_warning,
        fixed.last_turn_warning,
    )


def _place(tree, mesh: Mesh, spec: PartitionSpec):
    """Shapes of a tree of arrays or shapes, all with one sharding."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree
    )


def compile_programs(
    config: ml_collections.ConfigDict,
    parts: Parts,
    log: Callable[[str], None],
    width_buckets: int = 1,
) -> dict[str, Compiled]:
    """Phase -> its program, compiled for the mesh of `parts`.

    log: called before each compilation, which takes minutes. width_buckets: of micro-batches; if
    all rows count as the longest, the greatest width is the only one that runs.
    """
    mesh, rollout_config = parts.mesh, config.rollout
    model, rollout_model = describe_models(config, round_vocabulary(config.model.vocab_size))
    settings = dataclasses.replace(learner_settings(config), width_buckets=width_buckets)
    optimizers = make_optimizers(config, config.iterations)
    compiled = {}

    def compile_one(phase: str, function, *arguments):
        """-> the shardings of the results; None if the compiler refused the program."""
        log(f"compiling the {phase}")
        compiled[phase], places = _compile(phase, function, *arguments)
        return places

    # The learner's parameters as the rollout reads them.
    shardings = jax.tree.map(lambda x: x.sharding, parts.rollout_copy)
    compile_one("copy", make_rollout_copy(rollout_model, shardings), parts.policy)

    # Episodes. The search is never called.
    episodes = rollout_config.prompts * rollout_config.group_size
    specs = jax.tree.map(lambda place: place.spec, shardings)
    row = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
        (episodes, *shape), dtype, sharding=NamedSharding(mesh, sharding.ROWS)
    )
    prompts = Prompts(row(config.prompt.max_prompt_tokens), row(), row(), row(dtype=bool))
    key, scalar = _place(
        (jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.float32)),
        mesh,
        PartitionSpec(),
    )
    arguments = (parts.rollout_copy, parts.environment, prompts, row(), row(), key, scalar)
    rollout = make_rollout(
        rollout_model,
        rollout_settings(config),
        mesh,
        specs,
        lambda *question: question,
        "callback",
        call=io_callback if mesh.devices.flat[0].platform != "gpu" else _call_nobody,
    )
    if rollout_config.search == "host":
        log("compiling the rollout")
        programs = make_host_programs(rollout_model, rollout_settings(config), mesh, specs)
        compiled["rollout"] = _compile_host_rollout(
            programs, rollout_settings(config), mesh, *arguments
        )
    else:
        compile_one("rollout", rollout, *arguments)
    trajectory = _place(jax.eval_shape(rollout, *arguments)[0], mesh, sharding.ROWS)

    # Scores of the whole rollout, at its greatest length.
    integer = _place(jax.ShapeDtypeStruct((), jnp.int32), mesh, PartitionSpec())
    value = None if parts.value is None else learner.ModelState(parts.value, parts.value_optimizer)
    policy = learner.ModelState(parts.policy, parts.policy_optimizer)
    state = TrainState(policy, value, integer, integer, scalar, integer, integer)
    turns = rollout_settings(config).turns
    build_batch = learner.make_build_batch(model, settings)
    rewards = row(turns, dtype=jnp.float32), row(dtype=jnp.float32)  # of steps, of outcomes
    arguments = (state, parts.reference, trajectory, *rewards)
    found = compile_one("score", build_batch, *arguments)
    batch = jax.eval_shape(build_batch, *arguments)[0]
    batch = _place(batch, mesh, sharding.ROWS) if found is None else _put(batch, found[0])

    # Optimiser steps.
    compile_one("update", learner.make_update(model, settings, *optimizers), state, batch, scalar)
    return compiled


def _put(shapes, places):
    """Shapes with the shardings of a tree like theirs."""
    put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(put, shapes, places)


def _call_nobody(_, result, packed, **__):
    """In the place of a callback, which cannot be compiled for CUDA devices that are not there."""
    return jnp.zeros(result.shape, result.dtype) + packed.sum()


def _compile(name: str, function, *arguments) -> tuple[Compiled, Any]:
    """One jitted function -> (its program, shardings of its results or None if it is refused)."""
    begun = time.perf_counter()
    traced = function.trace(*arguments)
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := read_refusal(str(error))) is None:
            raise
        return Compiled(None, {}, {}, needed, time.perf_counter() - begun), None
    analysis = program.memory_analysis()
    memory = Memory(
        temporaries=analysis.temp_size_in_bytes,
        fresh=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )
    kernels, seconds = count_kernel_bytes(traced.jaxpr.jaxpr), time.perf_counter() - begun
    compiled = Compiled(memory, {name: program.as_text()}, kernels, 0, seconds)
    return compiled, program.output_shardings


def _compile_host_rollout(
    programs: HostPrograms,
    settings: RolloutSettings,
    mesh: Mesh,
    params,
    environment,
    prompts: Prompts,
    group_ids,
    question_ids,
    key,
    temperature,
) -> Compiled:
    """The programs of a rollout whose search runs between them, as one phase.

    The state with the cache is the first one's result and an argument of the others; its memory
    counts among the temporaries.
    """
    given = (params, environment, prompts)
    state = jax.eval_shape(programs.start, *given)
    rows = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
        (*state.phase.shape, *shape), dtype, sharding=NamedSharding(mesh, sharding.ROWS)
    )
    observations = Observations(
        rows(settings.max_observation_tokens), rows(), rows(settings.documents), rows(dtype=bool)
    )
    first, places = _compile("start", programs.start, *given)
    if places is None:
        return first
    state = _put(state, places)
    held, found = count_bytes(state), {"start": first}
    for name, arguments in (
        ("decode", (*given, key, temperature, state)),
        ("read_observations", (*given, observations, state)),
        ("finish", (state, prompts, group_ids, question_ids)),
    ):
        found[name], _ = _compile(name, getattr(programs, name), *arguments)
    seconds = sum(program.seconds for program in found.values())
    memories = {name: program.memory for name, program in found.items()}
    if None in memories.values():
        refused = max(program.refused for program in found.values())
        return Compiled(None, {}, {}, refused, seconds)
    trajectory, _ = jax.eval_shape(programs.finish, state, prompts, group_ids, question_ids)
    memory = Memory(
        temporaries=max(
            memory.temporaries + memory.fresh + (held if name != "start" else 0)
            for name, memory in memories.items()
        ),
        fresh=count_bytes(_place(trajectory, mesh, sharding.ROWS)),
        code=sum(memory.code for memory in memories.values()),
    )
    return Compiled(
        memory,
        {name: program.texts[name] for name, program in found.items()},
        {kernel: size for program in found.values() for kernel, size in program.kernels.items()},
        0,
        seconds,
    )


def read_refusal(message: str) -> float | None:
    """Bytes that a program needs, from the compiler's message that a chip cannot hold it.

    None for other messages. If the temporaries alone are too large, the message names only these.
    """
    found = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of|\) exceeds)", message)
    return float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))) if found else None


def count_parameters(tree) -> int:
    """Numbers in a tree of shapes, on all chips together."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def count_model_flops(
    config: ml_collections.ConfigDict, parts: Parts, plan: Rollout, tokens: dict[str, float]
) -> dict[str, Any]:
    """Phase -> operations of all chips by the rule of thumb; "rule" -> that rule in words.

    tokens: phase of the learner -> tokens that it computes, padding included. The rule, for each
    parameter that multiplies and each token: 2 forward, 4 more backward, and 2 more if layers are
    recomputed (6·N·D, or 8·N·D). Tables from which rows are only looked up do not count.
    """
    looked_up = round_vocabulary(config.model.vocab_size) * config.model.embed_dim
    policy = count_parameters(parts.policy) - (0 if config.model.tie_embeddings else looked_up)
    value = count_parameters(parts.value) - looked_up if parts.value is not None else 0
    episodes = config.rollout.prompts * config.rollout.group_size
    each = 8 if config.model.remat == "layers" else 6
    passes = policy * (2 if config.rl.old_logprobs == "learner" else 1) + value
    return {
        "copy": 0,
        "rollout": 2 * policy * episodes * plan.episode_tokens,
        "score": 2 * tokens["score"] * passes,
        "update": each * tokens["update"] * config.rl.ppo_epochs * (policy + value),
        "rule": f"{each}·N·D (update), 2·N·D (each pass, rollout)",
    }
