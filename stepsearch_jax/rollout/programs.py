"""Whole episodes from the two functions of `episode.py`, composed in two ways that give the same
tokens.

`search="callback"`: one jitted program. Each shard of the rows loops on its own (`shard_map` over
every mesh axis): decode until a flush is due, call the host's search, read_observations. No
collective crosses shards, so a slow search delays only its shard.

`search="host"`: Python alternates the jitted halves, with the state donated from one to the next.
For platforms whose callbacks misbehave, and for searches that need the device themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
):
    """-> rollout(params, environment, prompts, group_ids, question_ids, key, temperature) ->
    (Trajectory, counters).

    params: sharded by `param_specs` (the rollout layout: only over `tensor`); environment:
    replicated; prompts, group_ids, question_ids: rows over the mesh; temperature: 0 = greedy.
    Trajectory: rows over the mesh. counters: [shards, 3] int32, decode steps, flushes and prefilled
    tokens of each shard. mode: "callback" or "host". Raises ValueError for a mesh that cuts a kv
    head or among which the slots cannot be shared out, and for an unknown mode.
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
    policy = Policy(config.place_on(mesh))
    check_choice("rollout.search", mode)
    make = {"callback": _make_callback_rollout, "host": _make_host_rollout}
    return make[mode](policy, settings, mesh, param_specs, search)


def make_rollout_copy(config: ModelConfig, places):
    """-> copy(params): the learner's parameters in the dtype in which the rollout computes, each
    leaf at its NamedSharding in `places`; one jitted program.
    """
    return jax.jit(
        lambda params: jax.tree.map(lambda x: x.astype(config.dtype), params), out_shardings=places
    )


def _state_specs(config: ModelConfig) -> EpisodeState:
    heads = (None, "tensor") if config.cache_by_token else ("tensor",)
    cache = PartitionSpec(None, None, ("data", "fsdp"), *heads)
    rows = {name: ROWS for name in EpisodeState.__dataclass_fields__}
    cache = KVCache(cache, cache, config.num_kv_heads, config.cache_by_token)
    return EpisodeState(
        **(rows | {"cache": cache, "record": Record(*[ROWS] * len(Record.__dataclass_fields__))})
    )


def _start(
    policy: Policy, settings: RolloutSettings, mesh: Mesh, params, environment, prompts: Prompts
) -> EpisodeState:
    slots = settings.slots // row_shards(mesh) or prompts.tokens.shape[0]
    return episode.start_episodes(policy, settings, slots, params, environment, prompts)


def _shard(mesh: Mesh, function, in_specs, out_specs):
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _make_callback_rollout(
    policy: Policy, settings: RolloutSettings, mesh: Mesh, param_specs, search: Search
):
    def search_on_host(tokens, length, wanted) -> Observations:
        O, D = settings.max_observation_tokens, settings.documents
        shape = jax.ShapeDtypeStruct((tokens.shape[0], O + D + 2), jnp.int32)
        call = lambda question: io_callback(
            partial(_search_packed, search), shape, question, ordered=False
        )
        question = jnp.concatenate(
            [tokens, length[:, None], wanted[:, None].astype(jnp.int32)], axis=1
        )
        if policy.config.tensor_axis is None:
            found = call(question)
        # one call for each row shard: the other tensor slices of the shard receive the answer as a
        # sum with zeros
        else:
            first = jax.lax.axis_index(policy.config.tensor_axis) == 0
            found = jax.lax.psum(
                jax.lax.cond(first, call, lambda _: jnp.zeros(shape.shape, shape.dtype), question),
                policy.config.tensor_axis,
            )
        return Observations(found[:, :O], found[:, O], found[:, O + 2 :], found[:, O + 1] > 0)

    def run_shard(params, environment, prompts, key, temperature) -> EpisodeState:
        state = _start(policy, settings, mesh, params, environment, prompts)

        def turn(state: EpisodeState) -> EpisodeState:
            state = episode.decode_until_wait(
                policy, settings, params, environment, prompts, key, temperature, state
            )
            # After the last flush nobody waits: one empty call per shard, which the host answers at
            # once.
            observations = search_on_host(*episode.read_queries(settings, state))
            return episode.read_observations(
                policy, settings, params, environment, prompts, observations, state
            )

        return jax.lax.while_loop(partial(episode.is_unfinished, prompts), turn, state)

    sharded = _shard(
        mesh,
        run_shard,
        (param_specs, PartitionSpec(), ROWS, PartitionSpec(), PartitionSpec()),
        _state_specs(policy.config),
    )

    @jax.jit
    def rollout(params, environment, prompts, group_ids, question_ids, key, temperature):
        state = sharded(params, environment, prompts, key, temperature)
        return to_trajectory(state.record, prompts, group_ids, question_ids), state.counters

    return rollout


def _make_host_rollout(
    policy: Policy, settings: RolloutSettings, mesh: Mesh, param_specs, search: Search
):
    states, none = _state_specs(policy.config), PartitionSpec()
    start_shards = _shard(
        mesh, partial(_start, policy, settings, mesh), (param_specs, none, ROWS), states
    )
    decode_shards = _shard(
        mesh,
        partial(episode.decode_until_wait, policy, settings),
        (param_specs, none, ROWS, none, none, states),
        states,
    )
    absorb_shards = _shard(
        mesh,
        partial(episode.read_observations, policy, settings),
        (param_specs, none, ROWS, ROWS, states),
        states,
    )
    queries_of = _shard(mesh, partial(episode.read_queries, settings), (states,), ROWS)
    unfinished_shards = _shard(
        mesh,
        lambda prompts, state: episode.is_unfinished(prompts, state)[None],
        (ROWS, states),
        ROWS,
    )
    start = jax.jit(start_shards)
    read_observations = jax.jit(absorb_shards, donate_argnums=4)

    @partial(jax.jit, donate_argnums=5)
    def decode(params, environment, prompts, key, temperature, state):
        state = decode_shards(params, environment, prompts, key, temperature, state)
        return state, queries_of(state), unfinished_shards(prompts, state).any()

    @partial(jax.jit, donate_argnums=0)
    def finish(state, prompts, group_ids, question_ids):
        return to_trajectory(state.record, prompts, group_ids, question_ids), state.counters

    def rollout(params, environment, prompts, group_ids, question_ids, key, temperature):
        state = start(params, environment, prompts)
        while True:
            state, queries, unfinished = decode(
                params, environment, prompts, key, temperature, state
            )
            if not bool(unfinished):
                return finish(state, prompts, group_ids, question_ids)
            found = search(*rows_from_mesh(queries))
            state = read_observations(
                params, environment, prompts, rows_to_mesh(mesh, Observations(*found)), state
            )

    return rollout


def _search_packed(search: Search, question) -> np.ndarray:
    """The search with one array in and one out: a callback with arrays of different ranks does not
    compile for TPUs under `shard_map` (jax 0.10).
    """
    question = np.asarray(question)
    tokens, length, doc_ids, ok = search(question[:, :-2], question[:, -2], question[:, -1] > 0)
    return np.concatenate([tokens, length[:, None], ok[:, None], doc_ids], axis=1, dtype=np.int32)


def to_trajectory(
    record: Record, prompts: Prompts, group_ids: jax.Array, question_ids: jax.Array
) -> Trajectory:
    """The record of finished episodes."""
    kept = {name: getattr(record, name) for name in Record.__dataclass_fields__}
    return Trajectory(
        token_mask=jnp.arange(record.tokens.shape[1]) < record.length[:, None],
        prompt_length=prompts.length,
        question_ids=question_ids,
        group_ids=group_ids,
        **kept,
    )
