"""Trains a policy to search.

    python -m stepsearch_jax.train --config=configs/X.py[:arg] --workdir=DIR [--config.key=value …]

DIR receives config.json, run.json, metrics.jsonl, tensorboard/, checkpoints/, start/ (the policy
before RL), evaluation.json, transcripts.jsonl and report.html. Rerun the same command to resume:
the result is the same, bit for bit, as without the interruption.
"""

from __future__ import annotations

from stepsearch_jax import cli, signals

if __name__ == "__main__":  # parsed before the imports below, which take seconds
    parser = cli.make_parser("train", __doc__, "config", "workdir")
    parser.add_argument(
        "--profile",
        type=int,
        metavar="ITERATION",
        help="trace this iteration (the first is 0) with JAX's profiler into DIR/profile",
    )
    options = cli.parse_flags(parser)

import contextlib
import logging
import pathlib
from functools import partial

import jax

from stepsearch_jax.data.loading import question_rows
from stepsearch_jax.evaluation.greedy import evaluate_policy, write_results
from stepsearch_jax.files import check_workdir
from stepsearch_jax.loggers import check_loggers
from stepsearch_jax.metrics import MetricsWriter, progress
from stepsearch_jax.report.numbers import format_number
from stepsearch_jax.rl import learner
from stepsearch_jax.run.checks import check_sampling
from stepsearch_jax.run.collect import collect
from stepsearch_jax.run.folder import check_resumable, lock, write_beginning, write_config
from stepsearch_jax.run.iteration import (
    Clock,
    CompileCounter,
    Profiler,
    choose_rewards,
    keep_skipped_batch,
    measure_speed,
    rollout_metrics,
)
from stepsearch_jax.run.settings import learner_settings, make_optimizers
from stepsearch_jax.run.start import begin_run, bind_answer_gain, make_sampler
from stepsearch_jax.run.system import System, build_system
from stepsearch_jax.sharding import rows_to_mesh

logger = logging.getLogger("stepsearch_jax")


def train(config, workdir: pathlib.Path, search=None, profile: int | None = None) -> dict:
    """Runs, or resumes, a training run -> the contents of evaluation.json.

    search: a function queries -> ids [q, k] instead of the config's engine (`build_system`).
    profile: an iteration to trace (`run.iteration.Profiler`).
    Raises ValueError or OSError for bad input, before anything is compiled.
    """
    check_workdir(workdir)
    check_sampling(config)
    check_loggers(config.metrics.loggers)
    held_out = [config.sft.held_out_split] if config.sft.phases else []
    splits = dict.fromkeys((config.data.train_split, config.evaluation.split, *held_out))
    system = build_system(config, list(splits), search)
    with lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        return run_iterations(system, workdir, prepare_workdir(system, workdir), profile)


def prepare_workdir(system: System, workdir: pathlib.Path) -> int:
    """Writes config.json and run.json and logs what the data holds -> the run's first iterations.

    Learning-rate warm-ups are shares of the iterations that a run was first asked for, however long
    it is continued. Raises ValueError if WORKDIR holds a run of another config or other data.
    """
    beginning = check_resumable(workdir, system.config, system.describe_data())
    if jax.process_index() == 0:
        write_config(workdir, system.config)
        write_beginning(workdir, beginning)
    for name, split in system.splits.items():
        logger.info(
            "%s: %d questions; %d passages; "
            "recall@%d of the gold passages for the gold sub-questions: %s",
            name,
            len(split.questions),
            len(system.source.documents),
            system.config.search.k,
            format_number(system.measure_retrieval(name)),
        )
    warn_of_no_gold(system)
    return beginning["iterations"]


def warn_of_no_gold(system: System) -> None:
    """Warns if every information gain will be 0 because no question names gold documents."""
    reward_config, name = system.config.reward, system.config.data.train_split
    by_gold = reward_config.step_reward == "gain" and reward_config.use_gain
    if by_gold and not any(question.gold_ids for question in system.splits[name].questions):
        logger.warning(
            "no question of split %s has gold documents in the corpus, so every information gain "
            "is 0: add `gold` to the questions, or set reward.step_reward=answer_logprob",
            name,
        )


def run_iterations(
    system: System, workdir: pathlib.Path, first_iterations: int, profile: int | None = None
) -> dict:
    """The training loop -> the contents of evaluation.json. The input has been checked.

    first_iterations: from `prepare_workdir`; profile: from `train`.
    """
    # ---- Programs: jitted once, called in every iteration. --------------------------------------
    config = system.config
    split = system.splits[config.data.train_split]
    settings = learner_settings(config)
    optimizers = make_optimizers(config, first_iterations)
    sample_episodes, to_rollout_layout = make_sampler(system)
    build_batch = learner.make_build_batch(system.learner_model, settings)
    update = learner.make_update(system.learner_model, settings, *optimizers)
    answer_gain = bind_answer_gain(system)  # None unless reward.step_reward is answer_logprob
    roll_out = partial(
        collect,
        system,
        sample_episodes,
        split=split,
        temperature=config.rollout.temperature,
        group_size=config.rollout.group_size,
        answer_gain=answer_gain,
    )
    measure = partial(
        evaluate_policy,
        system,
        sample_episodes,
        split_name=config.evaluation.split,
        answer_gain=answer_gain,
    )

    # ---- State: of the newest checkpoint, or of a new run. --------------------------------------
    # The reference is the policy before RL. It stays frozen: the KL is measured against it.
    state, reference_params, checkpoints, rollout_key = begin_run(system, workdir, set_aside=True)
    start = int(state.iteration)
    profiler = Profiler(workdir, profile, start, config.iterations)
    before, dumps = measure(to_rollout_layout(reference_params), description="before RL:")

    # ---- The loop. One iteration is one rollout and the optimiser steps on it. ------------------
    compilations = CompileCounter()
    own = jax.process_index() == 0
    make_writer = partial(MetricsWriter, workdir, start, config.to_dict()) if own else _NoWriter
    with make_writer() as writer, signals.deferred():
        bar = progress(range(start, config.iterations), "training")
        for iteration in bar:
            clock = Clock()
            profiler.begin(iteration)
            number = iteration + 1  # finished iterations, once this one is

            # -- Data. The order of the questions follows from the seed, so the position alone says
            # where a resumed run continues.
            position = int(state.position)
            rows = question_rows(
                position, config.rollout.prompts, len(split.questions), config.seed
            )

            # -- Rollout. Episodes run on the device and search on the host; then they become text
            # and are scored. The policy's copy in the rollout's layout is freed afterwards.
            key = jax.random.fold_in(rollout_key, iteration)
            params = to_rollout_layout(state.policy.params)
            rollout = roll_out(params, question_rows=rows, key=key)
            del params
            clock.lap("rollout")

            # -- Rewards at their tokens, minus the KL; advantages and returns. These stay fixed
            # during the optimiser steps.
            rewards = rows_to_mesh(system.mesh, choose_rewards(config, rollout, iteration))
            batch, batch_metrics = build_batch(
                state, reference_params, rollout.trajectory, *rewards
            )
            clock.lap("score")

            # -- Update: one optimiser step a minibatch, for the policy and the value model. A step
            # whose gradient is not finite changes nothing; its batch is kept for a post-mortem.
            # Many in a row mean that no later step will be better.
            skipped = int(state.skipped)
            state, update_metrics = update(state, batch, batch_metrics["kl"])
            state = state.replace(position=state.position + config.rollout.prompts)
            if skipped := int(state.skipped) - skipped:
                keep_skipped_batch(workdir, iteration, batch, skipped)
                check_progress(config, iteration, int(state.skipped_in_a_row))
            clock.lap("update")

            # -- Report.
            metrics = rollout_metrics(rollout, config.reward.step_reward)
            metrics |= {name: float(x) for name, x in (batch_metrics | update_metrics).items()}
            metrics |= {"kl_coef": float(state.kl_coef), "skipped": int(state.skipped)}
            metrics |= clock.seconds | compilations.take(iteration, start)
            metrics |= measure_speed(metrics, config)
            writer.write("rl", iteration, metrics)
            profiler.end(iteration)
            shown = ("f1", "step_reward", "gold_recall")
            speeds = (metrics[f"speed/{kind}_tokens"] for kind in ("sampled", "trained"))
            bar.set_postfix(
                {name: format_number(metrics[name]) for name in shown}
                | {"tok/s": " | ".join(f"{speed:,.0f}" for speed in speeds)}
            )

            # -- Evaluate now and then; the last iteration is evaluated below.
            every = config.evaluation.every
            if every and number % every == 0 and number < config.iterations:
                means, _ = measure(
                    to_rollout_layout(state.policy.params),
                    description=f"after {number} iterations:",
                )
                writer.write("evaluation", iteration, means)

            # -- Checkpoint, in the background. After a SIGTERM or SIGHUP the iteration is the last.
            # A preemption may not wait for it: a run can lose all since its last checkpoint.
            ending = checkpoints.keep_pace(
                number,
                state,
                every=config.checkpoint.every,
                minutes=config.checkpoint.minutes,
                last=number == config.iterations,
            )
            if ending:
                checkpoints.close()
                saved = f"iteration {number} is saved, and the same command resumes after it"
                signals.end(ending, saved)
    checkpoints.close()

    # ---- Results. -------------------------------------------------------------------------------
    after, after_dumps = measure(to_rollout_layout(state.policy.params), description="after RL:")
    return write_results(system, workdir, before, after, {"before": dumps, "after": after_dumps})


def check_progress(config, iteration: int, skipped_in_a_row: int) -> None:
    """Raises ValueError, which ends the run, if too many steps in a row had no finite gradient."""
    if skipped_in_a_row >= config.rl.max_skipped_in_a_row:
        raise ValueError(
            f"iteration {iteration}: the gradients of {skipped_in_a_row} optimiser steps in a row "
            f"were not finite (rl.max_skipped_in_a_row={config.rl.max_skipped_in_a_row}), so "
            "nothing is learned any more: lower policy.learning_rate and value.learning_rate in a "
            "new --workdir, or look into the batches in WORKDIR/skipped-*.npz"
        )


class _NoWriter:
    """Stands in for the metrics writer on all processes but the first."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def write(self, stage, iteration, values):
        pass


if __name__ == "__main__":
    resume = "the same command resumes from the last checkpoint"
    command = partial(train, profile=options.profile)
    cli.run_guarded(command, options.config, options.workdir, resume)
