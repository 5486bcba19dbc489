"""How a run begins: its sampler, and its state, new or from the newest checkpoint."""

from __future__ import annotations

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax import checkpoint, sharding
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl import learner
from stepsearch_jax.rl.model_state import describe_params, init_model_state, init_value_params
from stepsearch_jax.rollout.programs import make_rollout, make_rollout_copy
from stepsearch_jax.run.settings import make_optimizers
from stepsearch_jax.run.system import System
from stepsearch_jax.run.warm_start import load_named_params, warm_start
from stepsearch_jax.types import TrainState

logger = logging.getLogger("stepsearch_jax")


def make_sampler(system: System):
    """-> (sample_episodes, to_rollout_layout).

    sample_episodes(params, prompts, group_ids, question_ids, key, temperature) -> (Trajectory,
    counters), as `make_rollout` describes them. Its params are to_rollout_layout(the learner's).
    """
    config, mesh = system.config, system.mesh
    boxed = jax.eval_shape(
        lambda: Policy(system.rollout_model).init(
            jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method=Policy.init_all
        )
    )
    specs = sharding.partition_specs(boxed, sharding.ROLLOUT_RULES)
    rollout = make_rollout(
        system.rollout_model, system.settings, mesh, specs, system.search, config.rollout.search
    )
    environment = jax.device_put(system.environment, sharding.replicated(mesh))
    to_rollout_layout = make_rollout_copy(system.rollout_model, sharding.shardings(mesh, specs))
    return lambda params, *arguments: rollout(params, environment, *arguments), to_rollout_layout


def bind_answer_gain(system: System):
    """-> answer_gain(params, trajectory, split, rows) -> [b, K] float32; None if
    config.reward.step_reward does not need it.

    The gain is how much each search of this process's rows raised the log-probability of the answer
    (`learner.make_answer_gain`) under the sampler's parameters. rows [b]: the questions' rows in
    their split; -1 is padding.
    """
    openings = {split.answers.opening for split in system.splits.values() if split.answers}
    if not openings:
        return None
    rl_config = system.config.rl
    gain = learner.make_answer_gain(
        system.learner_model, *openings, rl_config.microbatch_size, rl_config.width_buckets
    )

    def answer_gain(params, trajectory, split, rows):
        rows = np.maximum(rows, 0)
        answers = split.answers.tokens[rows], split.answers.length[rows]
        gains = gain(params, trajectory, *sharding.rows_to_mesh(system.mesh, answers))
        return sharding.rows_from_mesh(gains)

    return answer_gain


def load_newest_policy(system: System, workdir: pathlib.Path | None):
    """The newest policy of the run in WORKDIR; None: the one that the config names.

    Nothing else is read, and nothing written. Raises FileNotFoundError if there is none.
    """
    abstract_params, _ = describe_params(
        Policy(system.learner_model), system.mesh, dict(system.config.mesh.train_rules)
    )
    if workdir is not None:
        if (folder := workdir / "checkpoints").is_dir():
            checkpoints = checkpoint.Checkpoints(folder, keep=1, read_only=True)
            wanted = {"policy": {"params": abstract_params}}
            found = checkpoints.restore_newest(wanted, partial=True)
            checkpoints.close()
            if found:
                number, state = found
                logger.info("read the policy of iteration %d", number)
                return state["policy"]["params"]
        remedy = "the run has no policy yet; let `train` continue"
        return checkpoint.load_params(workdir / "start", abstract_params, remedy)
    params = load_named_params(system, abstract_params)
    if params is None:
        raise FileNotFoundError(
            "the config names no policy: give the --workdir of a run, model.checkpoint, or "
            "sft.checkpoint"
        )
    return params


def begin_run(system: System, workdir: pathlib.Path, *, set_aside: bool = False):
    """-> (state, reference_params, checkpoints, rollout_key): resumed from the newest checkpoint in
    WORKDIR, or new.

    set_aside: rename damaged checkpoints (`Checkpoints.restore_newest`), which the run itself does.
    A new run starts from a random, pretrained or warm-started policy. The value model, if
    rl.advantage needs one, starts with the policy's trunk; the frozen reference is a copy of the
    policy.
    """
    config, mesh, model = system.config, system.mesh, system.learner_model
    rules = dict(config.mesh.train_rules)
    policy_key, value_key, rollout_key = jax.random.split(jax.random.key(config.seed), 3)
    abstract_params, specs = describe_params(Policy(model), mesh, rules)
    reference_params = warm_start(system, abstract_params, specs, policy_key, workdir)
    policy_optimizer, value_optimizer = make_optimizers(config, config.iterations)
    value = None
    if value_optimizer is not None:
        value_params, value_specs = init_value_params(
            Value(model), mesh, rules, value_key, reference_params
        )
        value = init_model_state(value_optimizer, mesh, value_params, value_specs)
    scalars = dict(
        iteration=jnp.int32(0),
        position=jnp.int32(0),
        kl_coef=jnp.float32(config.rl.kl_coef),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )
    state = TrainState(
        policy=init_model_state(
            policy_optimizer, mesh, jax.tree.map(jnp.copy, reference_params), specs
        ),
        value=value,
        **jax.device_put(scalars, sharding.replicated(mesh)),
    )
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    if found := checkpoints.restore_newest(state, set_aside=set_aside):
        _, state = found
        done = "resumed from" if set_aside else "read"  # the run itself goes on
        logger.info("%s iteration %d", done, int(state.iteration))
    return state, reference_params, checkpoints, rollout_key
