"""The parts of an iteration: rewards for the update, metrics, dumps and times."""

from __future__ import annotations

import io
import logging
import math
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from stepsearch_jax.files import write_bytes
from stepsearch_jax.plugins import name_metric
from stepsearch_jax.run.collect import Collected
from stepsearch_jax.sharding import rows_from_mesh
from stepsearch_jax.types import Batch

logger = logging.getLogger("stepsearch_jax")

MOST_SKIPPED_BATCHES = 3  # of each process: at the paper's size one takes 17 MiB


def choose_rewards(config, rollout: Collected, iteration: int) -> tuple[np.ndarray, np.ndarray]:
    """This process's step rewards [b, K] and outcome rewards [b], for the update.

    With reward.shuffle (a control) every episode gets the rewards of another episode, of any
    process. On turns without a successful search, the other's step reward is added to the outcome
    reward. If it were dropped, an episode could raise its return by searching more often, and late
    searches, which are the poorer ones, would still be punished.
    """
    mine = rollout.scores.step_rewards, rollout.scores.outcome_rewards
    if not config.reward.shuffle:
        return mine
    steps, outcomes = (
        np.concatenate(multihost_utils.process_allgather(x).reshape(jax.process_count(), *x.shape))
        for x in mine
    )
    order = np.random.default_rng([config.seed, iteration]).permutation(len(outcomes))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # one cycle through all episodes: none keeps its own
    other = other.reshape(jax.process_count(), -1)[jax.process_index()]
    searched = (rollout.rows.search_end >= 0) & rollout.rows.search_ok
    unplaced = np.where(searched, 0, steps[other]).sum(1)
    return np.where(searched, steps[other], 0), outcomes[other] + unplaced


def rollout_metrics(rollout: Collected, step_reward: str) -> dict[str, float]:
    """Means over the episodes of all processes, and counts.

    gold_recall: over the episodes whose gold documents are known, NaN if there are none.

    step_reward: the config's reward.step_reward (`plugins.name_metric`).
    """
    scores, measures, rows = rollout.scores, rollout.scores.measures, rollout.rows
    columns = {
        "f1": measures.f1,
        "em": measures.em,
        "gold_recall": measures.gold_recall,
        "searches": measures.searches,
        "step_reward": scores.step_rewards.sum(1),
        "outcome_reward": scores.outcome_rewards,
        name_metric(step_reward): scores.gain.sum(1),
        "redundancy": scores.redundancy.sum(1),
        "key_reward": scores.key_rewards,
        "format_ok": scores.gate_passed,
        "finished": rows.finished,
        "truncated": rows.truncated,
        "length": rows.length,
        "prompt_length": rows.prompt_length,
        "gold_known": measures.gold_known,
    }
    own = np.array([np.mean(column) for column in columns.values()])
    means = multihost_utils.process_allgather(own).reshape(-1, len(columns)).mean(0)
    metrics = dict(zip(columns, means.tolist()))
    metrics["gold_recall"] /= metrics.pop("gold_known") or math.nan

    counters = multihost_utils.process_allgather(rollout.counters.sum(0)).reshape(-1, 3).sum(0)
    for name, count in zip(("decode_steps", "flushes", "prefilled_tokens"), counters):
        metrics[name] = int(count)
    metrics["failed_searches"] = rollout.searches.failed
    metrics["seconds/search"] = rollout.searches.seconds
    return metrics


def measure_speed(metrics: Mapping[str, float], config) -> dict[str, float]:
    """Tokens a second of an iteration, of all processes, from its other metrics.

    sampled: action tokens, by the rollout. trained: tokens that are not padding, each as often as
    rl.ppo_epochs says, by scoring and update.
    """
    episodes = config.rollout.prompts * config.rollout.group_size
    trained = metrics["length"] * episodes * config.rl.ppo_epochs
    seconds = metrics["seconds/score"] + metrics["seconds/update"]
    return {
        "speed/sampled_tokens": metrics["action_tokens"] / metrics["seconds/rollout"],
        "speed/trained_tokens": trained / seconds,
    }


def keep_skipped_batch(workdir: pathlib.Path, iteration: int, batch: Batch, steps: int) -> None:
    """Says that gradients were not finite in so many steps of an iteration, and writes this
    process's rows of its batch to WORKDIR, unless `MOST_SKIPPED_BATCHES` lie there.
    """
    path = workdir / f"skipped-{iteration}-{jax.process_index()}.npz"
    kept = list(workdir.glob(f"skipped-*-{jax.process_index()}.npz"))
    if path in kept or len(kept) < MOST_SKIPPED_BATCHES:
        arrays = rows_from_mesh(batch)
        columns = {name: getattr(arrays, name) for name in batch.__dataclass_fields__}
        file = io.BytesIO()
        np.savez_compressed(file, **columns)
        write_bytes(path, file.getvalue())
        where = f"its batch is in {path}"
    else:
        where = f"its batch is not kept, because {len(kept)} are in {workdir}"
    logger.warning(
        "iteration %d: gradients were not finite; %d optimiser steps were skipped; %s",
        iteration,
        steps,
        where,
    )


class Clock:
    """Seconds of the phases of an iteration, by name."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a phase: `seconds["seconds/NAME"]` is the time since the last phase ended."""
        now = time.perf_counter()
        self.seconds[f"seconds/{name}"], self._last = now - self._last, now


class Profiler:
    """Traces one iteration with JAX's profiler into WORKDIR/profile.

    TensorBoard's profile plugin, XProf and Perfetto show the trace. chosen: the iteration; None:
    no trace. Raises ValueError for an iteration that is not in [first, iterations).
    """

    def __init__(self, workdir: pathlib.Path, chosen: int | None, first: int, iterations: int):
        if chosen is not None and not first <= chosen < iterations:
            raise ValueError(
                f"--profile={chosen} is not an iteration that this run is still to do: choose one "
                f"from {first} to {iterations - 1}"
            )
        self._folder, self._chosen = workdir / "profile", chosen

    def begin(self, iteration: int) -> None:
        """Starts the trace if this is the chosen iteration."""
        if iteration == self._chosen:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)

    def end(self, iteration: int) -> None:
        """Writes the trace if this was the chosen iteration."""
        if iteration == self._chosen:
            jax.profiler.stop_trace()
            logger.info("a trace of iteration %d is in %s", iteration, self._folder)


class CompileCounter:
    """Counts the programs that this process compiles, or loads from jax's cache.

    After a run's first iteration there should be none.
    """

    def __init__(self):
        self._durations: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._durations.append(duration)

    def take(self, iteration: int, first: int) -> dict[str, float]:
        """-> seconds and programs since the last call; logged after the iteration `first`."""
        durations, self._durations = self._durations, []
        seconds = sum(durations)
        if durations and iteration > first:
            logger.info(
                "iteration %d compiled %d programs in %.1f s", iteration, len(durations), seconds
            )
        return {"seconds/compile": seconds, "compiled_programs": len(durations)}
