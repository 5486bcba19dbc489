"""Whole episodes from the two halves in `episode.py`, in two ways that give the same tokens.

`search="callback"`: one jitted program. Each shard of the rows loops on its own (`shard_map` over
every mesh axis): decode until a flush is due, call the host's search, read the observations. No
collective crosses shards, so a slow search delays only its shard.

`search="host"`: Python alternates the jitted halves and donates the state from one to the next. For
platforms whose callbacks misbehave, and for searches that need the device themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from stepsearch_jax.choices import check_choice
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.attention import KVCache
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.rollout import episode
from stepsearch_jax.rollout.state import (
    EpisodeState,
    Observations,
    Prompts,
    Record,
    RolloutSettings,
)
from stepsearch_jax.sharding import ROWS, row_shards, rows_from_mesh, rows_to_mesh
from stepsearch_jax.types import Trajectory

Search = Callable[
    [np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
]


def make_rollout(
    config: ModelConfig,
    settings: RolloutSettings,
    mesh: Mesh,
    param_specs,
    search: Search,
    mode: str,
    call: Callable = io_callback,
):
    """Makes the function that runs whole episodes. mode: "callback" or "host".

    -> rollout(params, environment, prompts, group_ids, question_ids, key, temperature)
    -> (Trajectory, counters)

    params: sharded by `param_specs` (the rollout layout: only over `tensor`); environment:
    replicated; prompts, group_ids, question_ids: rows over the mesh; temperature: 0 = greedy.
    call: how the program of "callback" calls the host; another one than jax's compiles for devices
    that are not there.
    Trajectory: rows over the mesh. counters: [shards, 3] int32, decode steps, flushes and prefilled
    tokens of each shard. Raises ValueError for a mesh whose tensor axis does not divide the model's
    sizes or whose shards cannot share the slots evenly, and for an unknown mode.
    """
    shards = mesh.shape["tensor"]
    for name, size in (
        ("num_kv_heads", config.num_kv_heads),
        ("num_heads", config.num_heads),
        ("ffn_dim", config.ffn_dim),
        ("vocab_size", config.vocab_size),
    ):
        if size % shards:
            raise ValueError(
                f"mesh axis tensor={shards} does not divide the model's {name}={size}: choose "
                "config.mesh.tensor among its divisors"
            )
    if settings.slots % row_shards(mesh):
        raise ValueError(
            f"config.rollout.slots={settings.slots} cannot be shared out among {row_shards(mesh)} "
            "mesh shards (mesh.data x mesh.fsdp)"
        )
    check_choice("rollout.search", mode)
    if mode == "host":
        return _make_host_rollout(config, settings, mesh, param_specs, search)
    return _make_callback_rollout(config, settings, mesh, param_specs, search, call)


def make_rollout_copy(config: ModelConfig, places):
    """-> copy(params), one jitted program: the learner's parameters for the rollout.

    They get the dtype in which the rollout computes, and the NamedShardings of `places`.
    """
    cast = lambda params: jax.tree.map(lambda x: x.astype(config.dtype), params)
    return jax.jit(cast, out_shardings=places)


def _state_specs(config: ModelConfig) -> EpisodeState:
    """Where the mesh cuts the state: rows over data and fsdp, heads of the cache over tensor."""
    heads = (None, "tensor") if config.cache_by_token else ("tensor",)
    blocks = PartitionSpec(None, None, ("data", "fsdp"), *heads)
    cache = KVCache(blocks, blocks, config.num_kv_heads, config.cache_by_token)
    record = Record(*[ROWS] * len(Record.__dataclass_fields__))
    rows = {name: ROWS for name in EpisodeState.__dataclass_fields__}
    return EpisodeState(**(rows | {"cache": cache, "record": record}))


def _start(
    policy: Policy, settings: RolloutSettings, mesh: Mesh, params, environment, prompts: Prompts
) -> EpisodeState:
    # 0 slots in the config: one for each episode.
    slots = settings.slots // row_shards(mesh) or prompts.tokens.shape[0]
    return episode.start_episodes(policy, settings, slots, params, environment, prompts)


def _shard(mesh: Mesh, function, in_specs, out_specs):
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _make_callback_rollout(
    config: ModelConfig,
    settings: RolloutSettings,
    mesh: Mesh,
    param_specs,
    search: Search,
    call: Callable,
):
    """One program: every shard alternates the halves and calls the host in between."""
    policy = Policy(config.place_on(mesh))

    def search_on_host(tokens, length, wanted) -> Observations:
        # Arguments and results are packed into one array each (`_search_packed`).
        width, tensor_axis = settings.max_observation_tokens, policy.config.tensor_axis
        shape = (tokens.shape[0], width + settings.documents + 2)
        result = jax.ShapeDtypeStruct(shape, jnp.int32)
        on_host = partial(_search_packed, search)
        search_rows = lambda packed: call(on_host, result, packed, ordered=False)
        flags = wanted[:, None].astype(jnp.int32)
        packed = jnp.concatenate([tokens, length[:, None], flags], axis=1)
        if tensor_axis is None:
            found = search_rows(packed)
        else:
            # One call per row shard: its other tensor slices get the result as a sum with zeros.
            first = jax.lax.axis_index(tensor_axis) == 0
            nothing = lambda _: jnp.zeros(result.shape, result.dtype)
            found = jax.lax.psum(jax.lax.cond(first, search_rows, nothing, packed), tensor_axis)
        return Observations(
            tokens=found[:, :width],
            length=found[:, width],
            doc_ids=found[:, width + 2 :],
            ok=found[:, width + 1] > 0,
        )

    def run_shard(params, environment, prompts, key, temperature) -> EpisodeState:
        state = _start(policy, settings, mesh, params, environment, prompts)

        def turn(state: EpisodeState) -> EpisodeState:
            state = episode.decode_until_wait(
                policy, settings, params, environment, prompts, key, temperature, state
            )
            # After the last flush no slot waits: an empty call, which the host answers at once.
            observations = search_on_host(*episode.read_queries(settings, state))
            return episode.read_observations(
                policy, settings, params, environment, prompts, observations, state
            )

        return jax.lax.while_loop(partial(episode.is_unfinished, prompts), turn, state)

    whole = PartitionSpec()
    in_specs = (param_specs, whole, ROWS, whole, whole)
    sharded = _shard(mesh, run_shard, in_specs, _state_specs(policy.config))

    @jax.jit
    def rollout(params, environment, prompts, group_ids, question_ids, key, temperature):
        state = sharded(params, environment, prompts, key, temperature)
        return to_trajectory(state.record, prompts, group_ids, question_ids), state.counters

    return rollout


class HostPrograms(NamedTuple):
    """The jitted programs of a rollout with search "host", in the order of their first run."""

    start: Any  # (params, environment, prompts) -> EpisodeState
    # (params, environment, prompts, key, temperature, state) -> (EpisodeState, queries as in
    # `episode.read_queries`, whether an episode runs or waits [] bool); donates the state
    decode: Any
    # (params, environment, prompts, observations, state) -> EpisodeState; donates the state
    read_observations: Any
    # (state, prompts, group_ids, question_ids) -> (Trajectory, counters); donates the state
    finish: Any


def make_host_programs(
    config: ModelConfig, settings: RolloutSettings, mesh: Mesh, param_specs
) -> HostPrograms:
    """The programs that Python alternates with the search; the arguments are `make_rollout`'s."""
    policy = Policy(config.place_on(mesh))
    # Each step of a shard.
    states, whole = _state_specs(policy.config), PartitionSpec()
    start_shards = _shard(
        mesh, partial(_start, policy, settings, mesh), (param_specs, whole, ROWS), states
    )
    decode_shards = _shard(
        mesh,
        partial(episode.decode_until_wait, policy, settings),
        (param_specs, whole, ROWS, whole, whole, states),
        states,
    )
    read_shards = _shard(
        mesh,
        partial(episode.read_observations, policy, settings),
        (param_specs, whole, ROWS, ROWS, states),
        states,
    )
    queries_of = _shard(mesh, partial(episode.read_queries, settings), (states,), ROWS)
    is_unfinished = lambda prompts, state: episode.is_unfinished(prompts, state)[None]
    unfinished_shards = _shard(mesh, is_unfinished, (ROWS, states), ROWS)

    # The programs.
    @partial(jax.jit, donate_argnums=5)
    def decode(params, environment, prompts, key, temperature, state):
        state = decode_shards(params, environment, prompts, key, temperature, state)
        return state, queries_of(state), unfinished_shards(prompts, state).any()

    @partial(jax.jit, donate_argnums=0)
    def finish(state, prompts, group_ids, question_ids):
        return to_trajectory(state.record, prompts, group_ids, question_ids), state.counters

    read_observations = jax.jit(read_shards, donate_argnums=4)
    return HostPrograms(jax.jit(start_shards), decode, read_observations, finish)


def _make_host_rollout(
    config: ModelConfig, settings: RolloutSettings, mesh: Mesh, param_specs, search: Search
):
    """Several programs, which Python alternates with the search."""
    start, decode, read_observations, finish = make_host_programs(
        config, settings, mesh, param_specs
    )

    def rollout(params, environment, prompts, group_ids, question_ids, key, temperature):
        state = start(params, environment, prompts)
        while True:
            state, queries, unfinished = decode(
                params, environment, prompts, key, temperature, state
            )
            if not bool(unfinished):
                return finish(state, prompts, group_ids, question_ids)
            found = search(*rows_from_mesh(queries))
            observations = rows_to_mesh(mesh, Observations(*found))
            state = read_observations(params, environment, prompts, observations, state)

    return rollout


def _search_packed(search: Search, packed) -> np.ndarray:
    """The search with one array in and one array out.

    A callback with arrays of different ranks does not compile for TPUs under `shard_map` (jax
    0.10).
    """
    packed = np.asarray(packed)
    tokens, length, doc_ids, ok = search(packed[:, :-2], packed[:, -2], packed[:, -1] > 0)
    return np.concatenate([tokens, length[:, None], ok[:, None], doc_ids], axis=1, dtype=np.int32)


def to_trajectory(
    record: Record, prompts: Prompts, group_ids: jax.Array, question_ids: jax.Array
) -> Trajectory:
    """The record of finished episodes, with what follows from it and the ids of its rows."""
    kept = {name: getattr(record, name) for name in Record.__dataclass_fields__}
    return Trajectory(
        token_mask=jnp.arange(record.tokens.shape[1]) < record.length[:, None],
        prompt_length=prompts.length,
        question_ids=question_ids,
        group_ids=group_ids,
        **kept,
    )
