"""Rollouts with scripted searches: their inputs, how our side runs them, and checks of the result.

A random policy writes no tags, so the searches are scripted over really sampled tokens: a turn ends
after a given number of tokens, and every search finds the same made-up observation.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from stepsearch_jax import sharding
from stepsearch_jax.benchmark import sample_model
from stepsearch_jax.benchmark.cases import Case
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.records import TurnStatus
from stepsearch_jax.rollout.programs import make_rollout, make_rollout_copy
from stepsearch_jax.rollout.state import Environment, Prompts, RolloutSettings
from stepsearch_jax.runtime import add_xla_flag, start_jax

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start() -> None:
    """Sets up JAX as the commands do; on CPU with one device for each core, and as many threads.

    The CPU runtime cuts an operation into as many parts as its pool has threads, so threads beyond
    the cores cost time: a rollout takes half as long again with 64, which programs with collectives
    on several devices may need (`runtime.start_jax`). No program here has collectives.
    """
    add_xla_flag(f"--xla_force_host_platform_device_count={CORES}")
    start_jax(ml_collections.ConfigDict({"distributed": {"processes": 1}}))
    os.environ["NPROC"] = str(CORES)


def make_mesh(rows: int, slots: int) -> jax.sharding.Mesh:
    """The devices that share the rows: as many as divide rows and slots; on CPU one core each."""
    devices = len(jax.devices())
    if jax.default_backend() == "cpu":
        devices = min(devices, CORES)
    shards = math.gcd(devices, rows, slots)
    return sharding.make_mesh(shards, 1, 1, devices=jax.devices()[:shards])


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What both sides read."""

    params: dict
    prompts: np.ndarray  # [B, P] int32
    observation: np.ndarray  # [O] int32
    key: jax.Array

    @staticmethod
    def draw(model: ModelConfig, case: Case, seed: int) -> Inputs:
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.integers(0, model.vocab_size, shape).astype(np.int32)
        return Inputs(
            sample_model.draw_params(Policy(model), seed),
            draw(case.episodes, case.prompt),
            draw(case.observation),
            jax.random.key(seed),
        )


def make_run(
    model: ModelConfig, case: Case, inputs: Inputs, rows: int, mesh: jax.sharding.Mesh | None = None
):
    """-> (run, the clock at its searches). mesh: None = that of make_mesh.

    run(slice of `rows` episodes[, the learner's parameters]) -> (Trajectory, counters).
    """
    settings = RolloutSettings(
        max_turns=case.turns - 1,
        max_turn_tokens=max(case.turn_tokens),
        context=case.context,
        max_prompt_tokens=case.prompt,
        max_observation_tokens=case.observation,
        documents=1,
        top_k=0,
        top_p=1.0,
        slots=case.slots,
        flush_fraction=case.flush_fraction,
        prefill_rows=case.prefill_rows,
        prefill_tokens=case.prefill_tokens,
    )

    # The program, on a copy of the parameters as the rollout reads them.
    mesh = mesh or make_mesh(rows, case.slots)
    everywhere = sharding.replicated(mesh)
    specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), inputs.params)
    to_rollout_layout = make_rollout_copy(model, jax.tree.map(lambda _: everywhere, inputs.params))
    clock = Clock(inputs.observation, mesh.size)
    rollout = make_rollout(model, settings, mesh, specs, clock, "callback")
    params = to_rollout_layout(jax.device_put(inputs.params, everywhere))
    environment = make_environment(model.vocab_size, case.turn_tokens)
    environment, key = jax.device_put((environment, inputs.key), everywhere)
    ids = np.arange(case.episodes, dtype=np.int32)

    def place(part: slice):
        own, lengths = ids[part], np.full(rows, case.prompt, np.int32)
        prompts = Prompts(inputs.prompts[part], lengths, own, np.ones(rows, bool))
        return sharding.rows_to_mesh(mesh, (prompts, own, own))

    def run(part: slice, learned=None):
        clock.start()
        own = params if learned is None else to_rollout_layout(learned)
        return jax.block_until_ready(rollout(own, environment, *place(part), key, jnp.float32(1)))

    return run, clock


class Clock:
    """The search callback: every search finds the same observation. It notes its call times.

    The thread tells which device calls, since the runtime has one thread for each; a single device
    may call from any thread.
    """

    def __init__(self, observation: np.ndarray, devices: int):
        self._observation, self._single = observation, devices == 1
        self.start()

    def start(self) -> None:
        """Forgets the last run."""
        self._begun, self._ready = time.perf_counter(), {}
        # By thread: (seconds of device work before the search, seconds of the search).
        self._flushes: dict[int, list[tuple[float, float]]] = {}

    def __call__(self, query_tokens, query_length, wanted):
        called = time.perf_counter()
        tokens = np.where(wanted[:, None], self._observation, 0).astype(np.int32)
        length = np.where(wanted, len(self._observation), 0).astype(np.int32)
        found = tokens, length, np.zeros((len(wanted), 1), np.int32), wanted
        thread, answered = 0 if self._single else threading.get_ident(), time.perf_counter()
        before = called - self._ready.get(thread, self._begun)
        self._flushes.setdefault(thread, []).append((before, answered - called))
        self._ready[thread] = answered
        return found

    def describe(self, seconds: float) -> dict:
        """Times of the run that has just taken `seconds`, for each device.

        "device_s": before each flush; "search_s": waiting for the host; "rest_s": after the last.
        """
        shards = [[list(column) for column in zip(*flushes)] for flushes in self._flushes.values()]
        return {
            "device_s": [device for device, _ in shards],
            "search_s": [host for _, host in shards],
            "rest_s": [seconds - sum(device) - sum(host) for device, host in shards],
        }


def make_environment(vocab_size: int, turn_tokens: Sequence[int]) -> Environment:
    """The scripted environment: an automaton that counts a turn's tokens down and then searches.

    In the last turn a search ends the episode. State r: r tokens are left; the state above them is
    the beginning of a turn, whose first token t chooses turn_tokens[t mod n].
    """
    start = max(turn_tokens)
    left = np.maximum(np.arange(start) - 1, 0)
    first = np.asarray(turn_tokens)[np.arange(vocab_size) % len(turn_tokens)] - 1
    rows = np.broadcast_to(left[:, None], (start, vocab_size))
    next_state = np.concatenate([rows, first[None]]).astype(np.int16)
    event = np.full(start + 1, int(TurnStatus.NONE), np.int32)
    event[0] = TurnStatus.SEARCH
    nothing = np.zeros(0, np.int32)
    return Environment(next_state, event, np.int32(start), nothing, nothing)


def check_episodes(case: Case, trajectory, counters) -> None:
    """Raises ValueError unless every episode has the case's turns, lengths and observations.

    And unless as many tokens were prefilled as are read: none twice.
    """
    rows = jax.tree.map(np.asarray, trajectory)
    first = np.asarray(case.turn_tokens)[rows.tokens[:, case.prompt] % len(case.turn_tokens)]
    searches = (rows.search_end >= 0).sum(1)
    sampled = rows.action_mask.sum(1)
    asked = first if case.turns == 1 else np.full(len(first), case.turns * case.turn_tokens[0])
    observed = (case.turns - 1) * case.observation
    right = (searches == case.turns - 1) & (sampled == asked)
    right &= rows.length == case.prompt + asked + observed
    prefilled = int(np.asarray(counters)[:, 2].sum())
    if not right.all() or prefilled != case.prefilled:
        raise ValueError(
            f"{(~right).sum()} of {len(right)} episodes do not have the case's turns and lengths, "
            f"or {prefilled} tokens were prefilled instead of {case.prefilled}"
        )


def find_logits(model: ModelConfig, inputs: Inputs) -> np.ndarray:
    """Logits after the prompts [B, V] in float32, without cache."""
    policy = Policy(dataclasses.replace(model, dtype=jnp.dtype("float32")))
    find = lambda params, tokens: policy.apply(
        params, policy.apply(params, tokens)[:, -1], method=Policy.unembed
    )
    with jax.default_matmul_precision("highest"):  # accelerators round the factors otherwise
        return np.asarray(jax.jit(find)(inputs.params, inputs.prompts))
