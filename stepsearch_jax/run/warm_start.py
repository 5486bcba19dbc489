"""The policy before RL: pretrained, from an earlier run, or random; then supervised fine-tuning.

Fine-tuning imitates the scripted searcher in phases (`config.sft.phases`). A policy from scratch
first learns to read: single hops, then whole questions. The last phases demonstrate poor searching,
so that RL has something to improve. For a pretrained model one phase of perfect searching is a cold
start that teaches the format.
"""

from __future__ import annotations

import logging
import pathlib

import jax
import numpy as np
from etils import epath

from stepsearch_jax import checkpoint, signals
from stepsearch_jax.files import in_bucket
from stepsearch_jax.metrics import MetricsWriter, progress
from stepsearch_jax.models.transformer import Policy, set_previous_token_heads
from stepsearch_jax.models.weights import load_policy
from stepsearch_jax.rl.model_state import init_model_state, init_params
from stepsearch_jax.rl.sft import make_sft, make_sft_optimizer
from stepsearch_jax.run.config_file import find_file
from stepsearch_jax.run.demonstrations import demonstrate
from stepsearch_jax.run.system import System, process_rows
from stepsearch_jax.sharding import rows_to_mesh

logger = logging.getLogger("stepsearch_jax")


def warm_start(system: System, abstract_params, specs, key: jax.Array, workdir: pathlib.Path):
    """-> the parameters with which RL starts, kept in WORKDIR/start.

    abstract_params, specs: shapes of the parameters, and their PartitionSpecs
    (`rl.model_state.describe_params`). key: makes random ones if the config names no others.
    """
    sft_config, start, model = system.config.sft, workdir / "start", system.learner_model
    if checkpoint.has_params(start):
        return checkpoint.load_params(
            start,
            abstract_params,
            f"give the flags of the run, or remove {start}: the same command then makes it again",
        )
    params = load_named_params(system, abstract_params)
    if params is None:
        params, _ = init_params(
            Policy(model), system.mesh, dict(system.config.mesh.train_rules), key
        )
        if system.config.model.previous_token_peak:
            params = set_previous_token_heads(
                params, model, system.config.model.previous_token_peak
            )
    if sft_config.phases:
        with signals.deferred():
            params = fine_tune(system, params, specs, workdir)
    checkpoint.save_params(start, params)
    return params


def load_named_params(system: System, abstract_params):
    """The parameters that sft.checkpoint or model.checkpoint names; None if neither does."""
    name = system.config.sft.checkpoint
    if name:
        remedy = (
            f"sft.checkpoint={name} must name parameters of this config's model, or be empty; "
            "configs/atlas_quickstart.py:anew makes those of the quickstart again"
        )
        return checkpoint.load_params(find_checkpoint(name), abstract_params, remedy)
    if system.weights is None:
        return None
    logger.info("reading %s", system.weights.path)
    return load_policy(system.weights, system.learner_model, abstract_params)


def find_checkpoint(folder: str) -> pathlib.Path:
    """`folder` as it is (also gs://…), or else among the shipped configs (`find_file`)."""
    if in_bucket(bucket := epath.Path(folder)):
        return bucket  # pathlib would make gs:/… of it
    return find_file(folder)


def fine_tune(system: System, params, specs, workdir: pathlib.Path):
    """Runs all phases of supervised fine-tuning -> parameters.

    After an interruption it resumes from its newest checkpoint; the data of a step depend only on
    the seed and the step's number. Raises ValueError, before any step, if phases ask single hops
    and a split has no sub-questions.
    """
    # Phases of single hops need questions with sub-questions, in training and held out.
    config, sft_config, mesh = system.config, system.config.sft, system.mesh
    for name in (config.data.train_split, sft_config.held_out_split):
        if any(phase[2] for phase in sft_config.phases) and not any(
            question.sub_questions for question in system.splits[name].questions
        ):
            raise ValueError(
                f"sft.phases={sft_config.phases} ask sub-questions alone, but no question of "
                f"{name} (data.kind={config.data.kind}) has any: set the third entry of each phase "
                "to False"
            )

    # Optimiser and state, new or from the newest checkpoint.
    total = sum(phase[0] for phase in sft_config.phases)
    optimizer = make_sft_optimizer(
        sft_config.optimizer, [(phase[0], phase[-1]) for phase in sft_config.phases]
    )
    run, held_out_loss = make_sft(system.learner_model, optimizer)
    state = init_model_state(optimizer, mesh, params, specs)
    checkpoints = checkpoint.Checkpoints(workdir / "sft", config.checkpoint.keep)
    done = 0
    if found := checkpoints.restore_newest(state, set_aside=True):
        done, state = found
        logger.info("resumed from fine-tuning step %d", done)
    writer = MetricsWriter(workdir, done, config.to_dict()) if jax.process_index() == 0 else None
    bar = progress(total - done, "fine-tuning")

    first = 0  # step at which the phase starts
    for number, (steps, rows, single_hop, poor_fraction, _) in enumerate(sft_config.phases):
        if done >= first + steps:
            first += steps
            continue
        # Each phase has its own demonstrations, to train on and held out.
        demonstrations = demonstrate(
            system,
            config.data.train_split,
            sft_config.demonstrations,
            single_hop=single_hop,
            poor_fraction=poor_fraction,
            seed=config.seed + number,
        )
        held_out = demonstrate(
            system,
            sft_config.held_out_split,
            sft_config.held_out,
            single_hop=single_hop,
            poor_fraction=poor_fraction,
            seed=config.seed + 1000 + number,
        )
        mine = process_rows(mesh, rows)
        held_out_rows = process_rows(mesh, len(held_out.tokens))
        exam = rows_to_mesh(
            mesh, (held_out.tokens[held_out_rows], held_out.action_mask[held_out_rows])
        )

        # Every process draws the whole minibatch and passes on its own rows.
        for step in range(max(first, done), first + steps):
            minibatch = demonstrations.draw(rows, np.random.default_rng([config.seed, step]))
            state, loss = run(state, *rows_to_mesh(mesh, tuple(array[mine] for array in minibatch)))
            bar.update(1)
            finished = step + 1

            # Metrics on the held-out episodes, and checkpoints.
            if finished % sft_config.log_every == 0 or finished == first + steps:
                held_out_value, exact = held_out_loss(state.params, *exam, rows=rows)
                metrics = {
                    "loss": float(loss),
                    "held_out_loss": float(held_out_value),
                    "held_out_exact": float(exact.mean()),
                    "phase": number,
                }
                bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()})
                logger.info(
                    "fine-tuning step %d: %s",
                    finished,
                    ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()),
                )
                if writer:
                    writer.write("sft", finished - 1, metrics)
            ending = checkpoints.keep_pace(
                finished,
                state,
                every=config.checkpoint.sft_every,
                minutes=0.0,
                last=finished == total,
            )
            if ending:
                checkpoints.close()
                if writer:
                    writer.close()
                saved = f"fine-tuning step {finished} is saved, and the same command resumes there"
                signals.end(ending, saved)
        first += steps
    bar.close()
    checkpoints.close()
    if writer:
        writer.close()
    return state.params
