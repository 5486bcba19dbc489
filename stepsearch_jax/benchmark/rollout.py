"""Multi-turn rollouts against loops around other samplers, which read the whole context again each turn, and against lock step.

Both sides have the same weights (4 layers of width 256, random; or the sizes and types of --config, such as configs/musique_qwen2_5.py:0.5b), prompts,
observations and token budgets, and sample at temperature 1 without top-k or top-p.
A random policy writes no tags, so the searches are scripted over really sampled tokens: a turn ends after a given number of them, and every search finds the
same made-up observation. The run ends with an error unless both sides' logits after the prompts, computed in float32, agree to 1e-3 and every episode has the
asked turns.

Cases: short (16 episodes, prompt 128, 4 turns of 64 sampled tokens, 3 observations of 192), long (8 episodes, prompt 512, 6 turns of 128, 5 observations of
600), turns (the short one with 1, 2, 4 and 8 turns), decode (64 episodes, prompt 128, 512 sampled tokens) and slots (64 episodes of 64, 128, 256 or 512 tokens
in 16 slots, which take the next prompt as soon as they are free, against groups of 16 that wait for their longest). --episodes changes how many there are.
Peers: transformers calls torch's `generate` once a turn; tunix calls its sampler once a turn, compiled for each turn's length. With the peer "none", which is
the default, the other side of slots is still timed. "floor" is the least time that this machine needs for the arithmetic and the memory traffic, from
rates measured here (benchmark/roofline.py has the formula).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
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
from stepsearch_jax.benchmark import roofline, sample_model
from stepsearch_jax.benchmark.cases import CASES, LOCK_STEP, Case
from stepsearch_jax.benchmark.peers.process import Peer
from stepsearch_jax.benchmark.timing import alternate, time_call
from stepsearch_jax.models.architecture import ModelConfig
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.records import TurnStatus
from stepsearch_jax.rollout.episode import Environment, Prompts, RolloutSettings
from stepsearch_jax.rollout.programs import make_rollout, make_rollout_copy
from stepsearch_jax.runtime import add_xla_flag, start_jax

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def measure(
    *,
    repeats: int,
    seed: int,
    case: Sequence[str],
    peer: str,
    peer_python: str,
    config: ml_collections.ConfigDict | None = None,
    episodes: int | None = None,
    cases: dict[str, tuple[Case, ...]] = CASES,
    model: ModelConfig | None = None,
) -> dict:
    """-> figures of the named cases: "ours_s", "peer_s" (medians), "ratio" = peer / ours, "floor_s"; at the top those of the first case
    with that peer ("case").

    peer: "none", "transformers" or "tunix"; peer_python: the interpreter that has it; config: whose model to run, None = `sample_model.MODEL`; episodes:
    instead of each case's own. Raises ImportError where the peer is not installed, ValueError where it computes something else.
    """
    if peer != "none" and set(case) == {"slots"}:
        raise ValueError(
            f"--peer={peer}: the case slots is compared with {LOCK_STEP} of our own; leave --peer out, or add a case"
        )
    cases = {name: tuple(part.resize(episodes) for part in cases[name]) for name in case}
    start()
    model = model or sample_model.choose_models(config, peer)[1]
    rates = roofline.RateBook(model)
    found = {}
    for name in case:
        if name == "slots":
            found[name] = measure_slots(model, cases[name][0], repeats, seed)
        else:
            parts = [
                measure_case(model, part, repeats, seed, peer, peer_python, rates)
                for part in cases[name]
            ]
            found[name] = parts[0] if len(parts) == 1 else join_turns(parts)
    first = next((name for name in case if name != "slots"), "slots")
    return {name: found[first][name] for name in ("ours_s", "peer_s", "ratio")} | {
        "case": first,
        "peer": LOCK_STEP if first == "slots" else peer,
        "cases": found,
        "model": sample_model.describe(model),
        "repeats": repeats,
        "seed": seed,
        "jax": jax.__version__,
        "device": str(jax.devices()[0]),
    }


def start() -> None:
    """Sets up JAX as the commands do; on CPU with a device a core, which share a pool of a thread a core.

    The CPU runtime cuts an operation into as many parts as the pool has threads, so those beyond the cores cost time: a rollout takes half as long again with
    64, which programs with collectives on several devices may need (`runtime.start_jax`). No program here has any.
    """
    add_xla_flag(f"--xla_force_host_platform_device_count={CORES}")
    start_jax(ml_collections.ConfigDict({"distributed": {"processes": 1}}))
    os.environ["NPROC"] = str(CORES)


def make_mesh(rows: int, slots: int) -> jax.sharding.Mesh:
    """The devices that share out the rows: all that there are, no more than cores on CPU, as far as they divide rows and slots."""
    devices = (
        min(len(jax.devices()), CORES) if jax.default_backend() == "cpu" else len(jax.devices())
    )
    shards = math.gcd(devices, rows, slots)
    return sharding.make_mesh(shards, 1, 1, devices=jax.devices()[:shards])


def measure_case(
    model: ModelConfig,
    case: Case,
    repeats: int,
    seed: int,
    peer: str,
    peer_python: str,
    rates: roofline.RateBook,
) -> dict:
    """Times our rollout and the peer's loop in turn."""
    inputs = Inputs.draw(model, case, seed)
    with contextlib.ExitStack() as stack:
        sides = {}
        if peer != "none":
            job = dict(
                seed=seed,
                model=sample_model.describe(model),
                turns=case.turns,
                turn_tokens=case.turn_tokens[0],
                length=case.context,
            )
            arrays = sample_model.name_arrays(inputs.params) | {
                "prompts": inputs.prompts,
                "observation": inputs.observation,
            }
            other = stack.enter_context(Peer(f"{peer}_rollout", peer_python, job, arrays))
            difference = sample_model.check_logits(
                peer, find_logits(model, inputs), other.checks["logits"]
            )
            sides["peer"] = lambda: other.run("rollout")
        rollout, clock = make_run(model, case, inputs, case.episodes)
        trajectory, counters = rollout(slice(None))
        check_episodes(case, trajectory, counters)
        times = alternate({"ours": lambda: time_call(rollout, slice(None))[0]} | sides, repeats)
        spent, _ = time_call(rollout, slice(None))
    least = find_floor(model, case, rates)
    ours, floor = times["ours"]["median_s"], sum(part["least_s"] for part in least.values())
    figures = {
        "ours_s": ours,
        "peer_s": None,
        "ratio": None,
        "floor_s": floor,
        "ours_to_floor": ours / floor,
        "ours": times["ours"],
    }
    if sides:
        theirs = times["peer"]["median_s"]
        figures |= {
            "peer_s": theirs,
            "ratio": theirs / ours,
            "peer": times["peer"] | other.versions,
            "largest_logit_difference": difference,
        }
    (steps, flushes, _), prefilled = (
        np.asarray(counters).max(0).tolist(),
        int(np.asarray(counters)[:, 2].sum()),
    )  # of the busiest device; of all
    sampled = int(np.asarray(trajectory.action_mask).sum())
    return figures | {
        "sampled_tokens": sampled,
        "sampled_tokens_s": sampled / ours,
        "roofline": least,
        "prefilled_tokens": prefilled,
        "decode_steps": steps,
        "flushes": flushes,
        "one_run": clock.describe(spent),
        "devices": len(counters),
        "size": dataclasses.asdict(case),
    }


def join_turns(parts: Sequence[dict]) -> dict:
    """Cases that differ in their number of turns -> their figures, and how many times as long twice the turns took."""
    last = {name: parts[-1][name] for name in ("ours_s", "peer_s", "ratio")}
    return last | {
        "parts": list(parts),
        "doubling": [b["ours_s"] / a["ours_s"] for a, b in itertools.pairwise(parts)],
        "peer_doubling": [
            b["peer_s"] / a["peer_s"] for a, b in itertools.pairwise(parts) if a["peer_s"]
        ],
    }


def measure_slots(model: ModelConfig, case: Case, repeats: int, seed: int) -> dict:
    """Times slots that are filled again against groups of as many episodes, which end together. Raises ValueError where their tokens differ."""
    inputs = Inputs.draw(model, case, seed)
    in_slots, _ = make_run(model, case, inputs, case.episodes)
    one_group, _ = make_run(
        model, dataclasses.replace(case, slots=0, prefill_rows=case.slots), inputs, case.slots
    )
    groups = [slice(first, first + case.slots) for first in range(0, case.episodes, case.slots)]
    in_lock_step = lambda: [one_group(group) for group in groups]
    trajectory, counters = in_slots(slice(None))
    check_episodes(case, trajectory, counters)
    other, other_counters = zip(
        *((np.asarray(found.tokens), np.asarray(counted)) for found, counted in in_lock_step())
    )
    if not np.array_equal(np.asarray(trajectory.tokens), np.concatenate(other)):
        raise ValueError("episodes in slots and in groups have different tokens: one side is wrong")
    times = alternate(
        {
            "ours": lambda: time_call(in_slots, slice(None))[0],
            "peer": lambda: time_call(in_lock_step)[0],
        },
        repeats,
    )
    ours, theirs = times["ours"]["median_s"], times["peer"]["median_s"]
    steps, other_steps = (
        sum(int(part[:, 0].max()) for part in counted)
        for counted in ([np.asarray(counters)], other_counters)
    )  # of the busiest device
    return {
        "ours_s": ours,
        "peer_s": theirs,
        "ratio": theirs / ours,
        "ours": times["ours"],
        "peer": times["peer"] | {"name": LOCK_STEP},
        "sampled_tokens": int(np.asarray(trajectory.action_mask).sum()),
        "decode_steps": steps,
        "peer_decode_steps": other_steps,
        "devices": len(counters),
        "size": dataclasses.asdict(case),
    }


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
    """-> (run(slice of `rows` episodes[, the learner's parameters]) -> (Trajectory, counters), the clock at its searches). mesh: None = that of make_mesh."""
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
    mesh = mesh or make_mesh(rows, case.slots)
    everywhere = sharding.replicated(mesh)
    specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), inputs.params)
    to_rollout_layout = make_rollout_copy(model, jax.tree.map(lambda _: everywhere, inputs.params))
    clock = Clock(inputs.observation, mesh.size)
    rollout = make_rollout(model, settings, mesh, specs, clock, "callback")
    params = to_rollout_layout(jax.device_put(inputs.params, everywhere))
    environment, key = jax.device_put(
        (make_environment(model.vocab_size, case.turn_tokens), inputs.key), everywhere
    )
    ids = np.arange(case.episodes, dtype=np.int32)

    def place(part: slice):
        own = ids[part]
        prompts = Prompts(
            inputs.prompts[part], np.full(rows, case.prompt, np.int32), own, np.ones(rows, bool)
        )
        return sharding.rows_to_mesh(mesh, (prompts, own, own))

    def run(part: slice, learned=None):
        clock.start()
        own = params if learned is None else to_rollout_layout(learned)
        return jax.block_until_ready(rollout(own, environment, *place(part), key, jnp.float32(1)))

    return run, clock


class Clock:
    """The search callback: every search finds the same observation. It notes when it is called and when it has answered.

    Several devices are told apart by their threads, of which the runtime has one for each; a single one may be served by any thread.
    """

    def __init__(self, observation: np.ndarray, devices: int):
        self._observation, self._single = observation, devices == 1
        self.start()

    def start(self) -> None:
        """Forgets the last run."""
        self._begun, self._ready = time.perf_counter(), {}
        self._flushes: dict[
            int, list[tuple[float, float]]
        ] = {}  # by thread: seconds of device work before the search, seconds of the search

    def __call__(self, query_tokens, query_length, wanted):
        called = time.perf_counter()
        tokens = np.where(wanted[:, None], self._observation, 0).astype(np.int32)
        found = (
            tokens,
            np.where(wanted, len(self._observation), 0).astype(np.int32),
            np.zeros((len(wanted), 1), np.int32),
            wanted,
        )
        thread, answered = 0 if self._single else threading.get_ident(), time.perf_counter()
        self._flushes.setdefault(thread, []).append(
            (called - self._ready.get(thread, self._begun), answered - called)
        )
        self._ready[thread] = answered
        return found

    def describe(self, seconds: float) -> dict:
        """Of the run that has just taken `seconds`, for each device: its time before each flush and after the last, and how long it waited for the host."""
        shards = [[list(column) for column in zip(*flushes)] for flushes in self._flushes.values()]
        return {
            "device_s": [device for device, _ in shards],
            "search_s": [host for _, host in shards],
            "rest_s": [seconds - sum(device) - sum(host) for device, host in shards],
        }


def make_environment(vocab_size: int, turn_tokens: Sequence[int]) -> Environment:
    """The scripted environment: an automaton that counts a turn's tokens down and then searches; in the last turn that ends the episode.

    State r: r tokens are left; the state above them is the beginning of a turn, whose first token t chooses turn_tokens[t mod n].
    """
    start = max(turn_tokens)
    left = np.maximum(np.arange(start) - 1, 0)
    first = np.asarray(turn_tokens)[np.arange(vocab_size) % len(turn_tokens)] - 1
    next_state = np.concatenate(
        [np.broadcast_to(left[:, None], (start, vocab_size)), first[None]]
    ).astype(np.int16)
    event = np.full(start + 1, int(TurnStatus.NONE), np.int32)
    event[0] = TurnStatus.SEARCH
    nothing = np.zeros(0, np.int32)
    return Environment(next_state, event, np.int32(start), nothing, nothing)


def check_episodes(case: Case, trajectory, counters) -> None:
    """Raises ValueError unless every episode has the turns, the lengths and the observations that the case asks for, and no token was prefilled twice."""
    t = jax.tree.map(np.asarray, trajectory)
    first = np.asarray(case.turn_tokens)[t.tokens[:, case.prompt] % len(case.turn_tokens)]
    searches = (t.search_end >= 0).sum(1)
    sampled = t.action_mask.sum(1)
    asked = first if case.turns == 1 else np.full(len(first), case.turns * case.turn_tokens[0])
    observed = (case.turns - 1) * case.observation
    right = (
        (searches == case.turns - 1)
        & (sampled == asked)
        & (t.length == case.prompt + asked + observed)
    )
    if not right.all() or int(np.asarray(counters)[:, 2].sum()) != case.prefilled:
        raise ValueError(
            f"{(~right).sum()} of {len(right)} episodes do not have the asked turns and lengths, and {np.asarray(counters)[:, 2].sum()} tokens "
            f"were prefilled where {case.prefilled} were to be read"
        )


def find_logits(model: ModelConfig, inputs: Inputs) -> np.ndarray:
    """Logits after the prompts [B, V] in float32, without cache."""
    policy = Policy(dataclasses.replace(model, dtype=jnp.dtype("float32")))
    find = lambda params, tokens: policy.apply(
        params, policy.apply(params, tokens)[:, -1], method=Policy.unembed
    )
    with jax.default_matmul_precision("highest"):  # accelerators round the factors otherwise
        return np.asarray(jax.jit(find)(inputs.params, inputs.prompts))


def list_work(model: ModelConfig, case: Case) -> tuple[list[roofline.Work], list[roofline.Work]]:
    """-> (prefills, decode steps) of a case whose turns are all of one length and whose rows run together."""
    prefills, steps, context = [], [], 0
    for turn in range(case.turns):
        read = (
            case.observation if turn else case.prompt - 1
        )  # the token sampled last is read with the observation, whose last is read by a decode step
        prefills.append(roofline.prefill(model, case.episodes, read, context + read))
        context += read
        steps += [
            roofline.decode_step(model, case.episodes, context + 1 + i)
            for i in range(case.turn_tokens[0])
        ]
        context += case.turn_tokens[0]
    return prefills, steps


def find_floor(model: ModelConfig, case: Case, rates: roofline.RateBook) -> dict[str, dict]:
    """What the prefills and the decode steps of a case need on this machine, as `roofline.Rates.describe` has it."""
    prefills, steps = list_work(model, case)
    widest = case.episodes * max(case.prompt, case.observation)
    return {
        "prefill": rates.at(steps[-1].bytes, widest, unembeds=False).describe(prefills),
        "decode step": rates.at(steps[-1].bytes, case.episodes, unembeds=True).describe(steps),
    }


def render(figures: dict) -> str:
    """The figures as a table."""
    lines, rows = (
        [],
        [
            (
                "case",
                "ours",
                f"peer ({figures['peer']})",
                "peer / ours",
                "floor",
                "ours / floor",
                "prefilled",
            )
        ],
    )
    number = lambda value, unit: "" if value is None else f"{value:.2f}{unit}"
    for name, found in figures["cases"].items():
        for part in found.get("parts", [found]):
            label = f"{name}, {part['size']['turns']} turns" if "parts" in found else name
            rows.append(
                (
                    label,
                    number(part["ours_s"], " s"),
                    number(part["peer_s"], " s"),
                    number(part["ratio"], "x"),
                    number(part.get("floor_s"), " s"),
                    number(part.get("ours_to_floor"), "x"),
                    str(part.get("prefilled_tokens", "")),
                )
            )
            if "roofline" in part:
                lines.append(f"{label}: {part['sampled_tokens_s']:,.0f} sampled tokens a second")
                lines += [
                    f"    {roofline.render(kind, least)}"
                    for kind, least in part["roofline"].items()
                ]
    lines = ["".join(f"{cell:>20}" for cell in row) for row in rows] + lines
    if "turns" in figures["cases"]:
        lines.append(
            "twice the turns take "
            + ", ".join(f"{x:.2f}" for x in figures["cases"]["turns"]["doubling"])
            + " times as long"
        )
    if "slots" in figures["cases"]:
        lines.append("slots: the peer is lock step, groups of as many episodes as there are slots")
    return "\n".join([f"medians of {figures['repeats']} alternating runs", *lines])
