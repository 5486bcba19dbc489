"""Trains a policy to search.

    python -m stepsearch_jax.train --config=configs/X.py[:arg] --workdir=DIR [--config.key=value …]

DIR receives config.json, run.json, metrics.jsonl, tensorboard/, checkpoints/, start/ (the policy before RL), evaluation.json, transcripts.jsonl and
report.html.
A DIR with a checkpoint is resumed: the result is the same, bit for bit, as without the interruption.
"""

from __future__ import annotations

from stepsearch_jax import cli

if __name__ == "__main__":  # before the imports that take seconds
    options = cli.parse_flags(cli.make_parser("train", __doc__, "config", "workdir"))

import contextlib
import logging
import pathlib
import time
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils

from stepsearch_jax import sharding
from stepsearch_jax.data.loading import question_rows
from stepsearch_jax.evaluation.greedy import evaluate_policy, write_results
from stepsearch_jax.files import check_workdir
from stepsearch_jax.metrics import MetricsWriter, progress
from stepsearch_jax.rl import learner
from stepsearch_jax.run.checks import check_sampling
from stepsearch_jax.run.collect import Collected, collect
from stepsearch_jax.run.folder import check_resumable, lock, write_beginning, write_config
from stepsearch_jax.run.settings import learner_settings, make_optimizers
from stepsearch_jax.run.start import begin_run, bind_answer_gain, make_sampler
from stepsearch_jax.run.system import System, build_system
from stepsearch_jax.sharding import rows_to_mesh
from stepsearch_jax.types import Trajectory

logger = logging.getLogger("stepsearch_jax")


def train(config, workdir: pathlib.Path, search=None) -> dict:
    """Runs (or resumes) the whole of a training run -> the contents of evaluation.json. `search`: see `build_system`."""
    check_workdir(workdir)
    check_sampling(config)
    held_out = [config.sft.held_out_split] if config.sft.phases else []
    system = build_system(
        config,
        list(dict.fromkeys((config.data.train_split, config.evaluation.split, *held_out))),
        search,
    )
    with lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        return run_iterations(system, workdir, prepare_workdir(system, workdir))


def run_iterations(system: System, workdir: pathlib.Path, first_iterations: int) -> dict:
    """What `train` does once everything that can be wrong with the input has been looked for. first_iterations: with which the run began."""
    # ---- The parts. ------------------------------------------------------------------------------------------------------------------------------
    config, mesh = system.config, system.mesh
    split, rollout_config, rl_config, checkpoint_config = (
        system.splits[config.data.train_split],
        config.rollout,
        config.rl,
        config.checkpoint,
    )
    settings = learner_settings(config)
    build_batch = learner.make_build_batch(system.learner_model, settings)
    update = learner.make_update(
        system.learner_model, settings, *make_optimizers(config, first_iterations)
    )
    sample_episodes, to_rollout_layout = make_sampler(system)
    state, reference_params, checkpoints, rollout_key = begin_run(system, workdir)
    start = int(state.iteration)

    answer_gain = bind_answer_gain(
        system
    )  # None, unless searches are paid by what they do for the answer
    roll_out = partial(collect, system, sample_episodes, answer_gain=answer_gain)
    measure = partial(
        evaluate_policy,
        system,
        sample_episodes,
        split_name=config.evaluation.split,
        answer_gain=answer_gain,
    )

    before, dumps = measure(to_rollout_layout(reference_params), description="before RL:")

    # ---- The loop: data, rollout, rewards, advantages, update. -----------------------------------------------------------------------------------
    compilations = Compilations()
    with MetricsWriter(workdir, start) if jax.process_index() == 0 else _NoWriter() as writer:
        bar = progress(range(start, config.iterations), "training")
        for iteration in bar:
            clock = Clock()
            # Questions, in an order that follows from the seed: the position alone says where a resumed run goes on.
            position = int(state.position)
            rows = question_rows(
                position, rollout_config.prompts, len(split.questions), config.seed
            )
            # Rollout: episodes on the device, with searches on the host; then their text, and what each search and each answer earned.
            # The rollout's copy of the policy is gone when they are done.
            sampling_key = jax.random.fold_in(rollout_key, iteration)
            rollout = roll_out(
                to_rollout_layout(state.policy.params),
                split,
                rows,
                sampling_key,
                rollout_config.temperature,
                rollout_config.group_size,
            )
            trajectory = cut_padding(rollout, rl_config.pad_to_multiple_of)
            clock.lap("rollout")
            # Rewards to their tokens, less the KL; advantages and returns. All this stays fixed during the optimiser steps.
            rewards = rows_to_mesh(mesh, choose_rewards(config, rollout, iteration))
            batch, batch_metrics = build_batch(state, reference_params, trajectory, *rewards)
            clock.lap("score")
            # Optimiser steps, a minibatch each, on the policy's clipped loss and the value model's.
            skipped = int(state.skipped)
            state, update_metrics = update(state, batch, batch_metrics["kl"])
            state = state.replace(position=state.position + rollout_config.prompts)
            if int(state.skipped) > skipped:
                dump_batch(workdir, iteration, batch)
            clock.lap("update")

            metrics = rollout_metrics(rollout) | {
                name: float(x) for name, x in (batch_metrics | update_metrics).items()
            }
            metrics |= (
                {"kl_coef": float(state.kl_coef), "skipped": int(state.skipped)}
                | clock.seconds
                | compilations.take(iteration, start)
            )
            writer.write("rl", iteration, metrics)
            bar.set_postfix(
                {name: f"{metrics[name]:.3f}" for name in ("f1", "step_reward", "gold_recall")}
            )
            if (
                config.evaluation.every
                and (iteration + 1) % config.evaluation.every == 0
                and iteration + 1 < config.iterations
            ):
                means, _ = measure(
                    to_rollout_layout(state.policy.params),
                    description=f"after {iteration + 1} iterations:",
                )
                writer.write("evaluation", iteration, means)
            # A checkpoint in the background, where one is due. An iteration is longer than a preemption's notice: what counts is the last checkpoint.
            if checkpoints.keep_pace(
                iteration + 1,
                state,
                every=checkpoint_config.every,
                minutes=checkpoint_config.minutes,
                last=iteration + 1 == config.iterations,
            ):
                checkpoints.close()
                raise SystemExit(
                    f"stepsearch_jax: told to end; iteration {iteration + 1} is saved, and the same command goes on from there"
                )
    checkpoints.close()

    # ---- What came of it. --------------------------------------------------------------------------------------------------------------------------
    after, after_dumps = measure(to_rollout_layout(state.policy.params), description="after RL:")
    return write_results(system, workdir, before, after, {"before": dumps, "after": after_dumps})


def cut_padding(rollout: Collected, multiple: int) -> Trajectory:
    """The trajectories up to the longest of all processes, rounded up: short rollouts do not pay for the whole context. One program per rounded length."""
    longest = int(np.max(multihost_utils.process_allgather(rollout.rows.length.max())))
    width = -(-longest // multiple) * multiple
    per_token = ("tokens", "token_mask", "action_mask", "turn_ids", "sampler_logprobs")
    return rollout.trajectory.replace(
        **{name: getattr(rollout.trajectory, name)[:, :width] for name in per_token}
    )


def choose_rewards(config, rollout: Collected, iteration: int) -> tuple[np.ndarray, np.ndarray]:
    """This process's step rewards [b, K] and outcome rewards [b]; the shuffled control gives every episode those of another one, of any process.

    On turns without a search, or with a failed one, the control adds the other's step reward to the outcome reward: were it lost, an episode could raise its
    return by its number of searches alone, and poor searches, which come late, would still be punished.
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
    other[order] = np.roll(order, 1)  # one cycle through all episodes: nobody keeps its own
    other = other.reshape(jax.process_count(), -1)[jax.process_index()]
    searched = (rollout.rows.search_end >= 0) & rollout.rows.search_ok
    return np.where(searched, steps[other], 0), outcomes[other] + np.where(
        searched, 0, steps[other]
    ).sum(1)


def rollout_metrics(rollout: Collected) -> dict[str, float]:
    """Means over the episodes of all processes; the gold recall over those whose gold documents are known."""
    s, m = rollout.scores, rollout.scores.measures
    columns = {
        "f1": m.f1,
        "em": m.em,
        "gold_recall": m.gold_recall,
        "searches": m.searches,
        "step_reward": s.step_rewards.sum(1),
        "outcome_reward": s.outcome_rewards,
        "gain": s.gain.sum(1),
        "redundancy": s.redundancy.sum(1),
        "key_reward": s.key_rewards,
        "format_ok": s.gate_passed,
        "finished": rollout.rows.finished,
        "truncated": rollout.rows.truncated,
        "length": rollout.rows.length,
        "gold_known": m.gold_known,
    }
    means = (
        multihost_utils.process_allgather(
            np.array([np.mean(column) for column in columns.values()])
        )
        .reshape(-1, len(columns))
        .mean(0)
    )
    means = dict(zip(columns, means.tolist()))
    means["gold_recall"] /= means.pop("gold_known") or 1
    decode_steps, flushes, prefilled = (
        multihost_utils.process_allgather(rollout.counters.sum(0)).reshape(-1, 3).sum(0)
    )
    counts = {
        "decode_steps": int(decode_steps),
        "flushes": int(flushes),
        "prefilled_tokens": int(prefilled),
        "failed_searches": rollout.searches.failed,
        "seconds/search": rollout.searches.seconds,
    }
    return means | counts


class Clock:
    """Seconds of the phases of an iteration, by name."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"seconds/{name}"], self._last = now - self._last, now


class Compilations:
    """Counts the programs that this process compiles, or loads from jax's cache. After a run's first iteration there should be none but for a rollout whose
    rounded length has not been seen before."""

    def __init__(self):
        self._durations: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._durations.append(duration)

    def take(self, iteration: int, first: int) -> dict[str, float]:
        """-> seconds spent and programs compiled since the last time; logged if the iteration is not the first."""
        durations, self._durations = self._durations, []
        if durations and iteration > first:
            logger.info(
                "iteration %d compiled %d programs in %.1f s",
                iteration,
                len(durations),
                sum(durations),
            )
        return {"seconds/compile": sum(durations), "compiled_programs": len(durations)}


class _NoWriter:
    """Stands in for the metrics writer on all processes but the first."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def write(self, stage, iteration, values):
        pass


def prepare_workdir(system: System, workdir: pathlib.Path) -> int:
    """Writes config.json and run.json, unless another config or other data have begun a run here (ValueError), and logs what the data holds -> the iterations
    with which the run began."""
    beginning = check_resumable(workdir, system.config, system.describe_data())
    if jax.process_index() == 0:
        write_config(workdir, system.config)
        write_beginning(workdir, beginning)
    for name, split in system.splits.items():
        recall = system.measure_retrieval(name)
        logger.info(
            "%s: %d questions; %d passages; recall@%d of the gold passages for the gold sub-questions: %.3f",
            name,
            len(split.questions),
            len(system.source.documents),
            system.config.search.k,
            recall,
        )
    return beginning["iterations"]


def dump_batch(workdir: pathlib.Path, iteration: int, batch) -> None:
    """Keeps this process's rows of a batch whose gradient was not finite."""
    arrays = sharding.rows_from_mesh(batch)
    with (workdir / f"skipped-{iteration}-{jax.process_index()}.npz").open("wb") as file:
        np.savez_compressed(
            file, **{name: getattr(arrays, name) for name in batch.__dataclass_fields__}
        )
    logger.warning(
        "iteration %d: a gradient was not finite; the step was skipped and the batch kept in %s",
        iteration,
        workdir,
    )


if __name__ == "__main__":
    cli.run_guarded(
        train, options.config, options.workdir, "the same command goes on from the last checkpoint"
    )
