"""What the commands `train` and `evaluate` share: flags, logging, devices and processes, the sampler, and the state with which a run begins."""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from stepsearch_jax import checkpoint, sharding
from stepsearch_jax.config_file import define_config
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl import learner
from stepsearch_jax.rollout.programs import make_rollout, make_rollout_copy
from stepsearch_jax.search.watchdog import EXIT_CODE, call_off
from stepsearch_jax.settings import make_optimizers
from stepsearch_jax.system import System
from stepsearch_jax.types import TrainState
from stepsearch_jax.warm_start import warm_start

logger = logging.getLogger("stepsearch_jax")
flags.disclaim_key_flags()  # --workdir is the command's own, and stands in its --help

GRACE_S = 5.0  # from Ctrl-C to the end, at the latest
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def run_command(command: Callable, again: str = "the same command begins anew") -> None:
    """Parses --config and --workdir and calls command(config, workdir). Bad input ends it with one line instead of a traceback.

    again: what the same command does after an interruption, for the user.
    """
    config_flag = define_config()
    workdir_flag = flags.DEFINE_string("workdir", None, "Folder of the run, also gs://…; one that holds a checkpoint is resumed")
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator("workdir", lambda folder: folder != "", "it names no folder")

    app.run(lambda _: run_guarded(command, config_flag.value, epath.Path(workdir_flag.value), again), flags_parser=parse_flags)


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """As absl does, with one line for a config that cannot be read or refuses its argument, for a key that it does not have, and for unknown arguments."""
    values.set_gnu_getopt()  # a stray argument does not hide the flags behind it
    try:
        program, *stray = values(argv)
    except flags.Error as error:  # the config's own refusal stands at the end
        raise SystemExit(f"stepsearch_jax: {str(error).strip().splitlines()[-1]}") from error
    except (AttributeError, KeyError) as error:  # ml_collections names the missing part of the key only
        missing = set(re.findall(r"\w+", str(error)))
        unknown = [argument for argument in argv if argument.lstrip("-").startswith("config.") and missing & set(argument.split("=")[0].split("."))]
        if not unknown:
            raise
        raise SystemExit(f"stepsearch_jax: {unknown[0]}: the config has no such key; configs/base.py lists all of them") from error
    if stray:
        raise SystemExit(f"stepsearch_jax: unexpected argument {stray[0]}; write --config.key=value")
    return [program]


def read_config(parser: argparse.ArgumentParser, file: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The config of --config=FILE with --config.key=value …; whatever else `overrides` holds is refused."""
    argv = [parser.prog, f"--config={file}", *overrides]
    values = flags.FlagValues()
    define_config(values, argv)
    parse_flags(argv, values)
    return values.config


def run_guarded(command: Callable, config, workdir: pathlib.Path, again: str = "the same command begins anew") -> None:
    """Sets up logging, devices and processes and calls command(config, workdir). What a user can mend ends it with one line, and so does Ctrl-C.

    One process of several that fails ends at once, without waiting for the others, which then lose their connection to it and end as well.
    """
    start_logging()
    interrupted = 128 + signal.SIGINT, f"interrupted; {again}"
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it may be ignored
        end_after_interrupt(*interrupted)
    try:
        check_buckets(str(workdir), config.imitation.checkpoint)
        start_jax(config)
        command(config, workdir)
        multihost_utils.sync_global_devices("done")  # the first process writes the results, and the others must not leave it
    except KeyboardInterrupt:
        leave(*interrupted)
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        if "KeyboardInterrupt" in str(error):  # in a callback from the device
            leave(*interrupted)
        if jax.process_count() > 1:
            leave(EXIT_CODE, f"process {jax.process_index()} of {jax.process_count()} ends: {error} (when one dies, the others lose their connection: the log "
                             "of the first to die says why)")
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        leave(1, str(error))


def end_after_interrupt(status: int, told: str) -> None:
    """Has this process `leave` GRACE_S after Ctrl-C if nothing else has ended it: Python hears of it only when a program on the device returns, and functions
    that jax calls lose its exception. The signal's number comes through a pipe, without Python."""
    heard, told_of = os.pipe()
    os.set_blocking(told_of, False)
    signal.set_wakeup_fd(told_of, warn_on_full_buffer=False)

    def wait() -> None:
        while signal.SIGINT not in os.read(heard, 64):
            pass
        time.sleep(GRACE_S)
        leave(status, told)

    threading.Thread(target=wait, name="end after an interrupt", daemon=True).start()


def leave(status: int, told: str) -> None:
    """Ends this process at once with one line, whatever the device and other threads are at: they would fill pages, or crash. A checkpoint that is just being
    saved is not there then, and the one before is."""
    call_off()
    with contextlib.suppress(OSError):  # a pipe that nobody reads
        sys.stdout.flush()
    os.write(2, f"stepsearch_jax: {told}\n".encode())
    os._exit(status)


def check_buckets(*folders: str) -> None:
    """Raises ValueError if one of the folders is in a bucket and nothing is installed with which etils reads and writes buckets: gcsfs, or TensorFlow."""
    for folder in folders:
        if folder.startswith("gs://") and not any(importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")):
            raise ValueError(f"{folder} is in a bucket, and the package gcsfs is missing: pip install gcsfs (requirements-tpu.txt has it)")


def start_logging() -> None:
    """This package's messages to stderr; of the libraries only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


def start_jax(config) -> None:
    """What must happen before the first use of a device, on CPU above all; and processes joined.

    Asynchronous dispatch is off: callbacks could deadlock. Several fake devices of one process share a pool with a thread for each of them, and a device can
    wait in several collectives at once, a thread in each; a pool that all wait in never moves again, and the runtime ends the process after 40 seconds.
    LLVM would unroll loops of 64 steps or fewer before it looks at them as vectors, and then copy rows of that length, such as a head's, number by number.
    """
    if _has_only_cpus():
        add_xla_flag("--xla_backend_extra_options=-unroll-full-max-count=8")
        keep_freed_memory()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    d = config.distributed
    if d.processes != 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        named = dict(coordinator_address=d.coordinator, num_processes=d.processes, process_id=d.process_id) if d.coordinator else {}
        try:
            jax.distributed.initialize(**named, heartbeat_timeout_seconds=d.heartbeat_s, shutdown_timeout_seconds=d.heartbeat_s)
        except ValueError as error:
            raise ValueError(f"config.distributed.processes={d.processes} cannot be joined ({error}): set config.distributed.coordinator to HOST:PORT of "
                             "the first and process_id to its number in each, or processes to 1") from error
    elif "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ["NPROC"] = "64"  # so many threads: what the CPU runtime takes for the number of cores


def keep_freed_memory() -> None:
    """Lets this process reuse the memory that it frees, where malloc is glibc's (mallopt(3)); elsewhere nothing changes.

    Each call of a program allocates its temporary arrays. Large ones would go back to the system afterwards, and every page of the next ones would be a page
    fault: a tenth of an update's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def add_xla_flag(flag: str) -> None:
    """Puts a flag before those of the user, whose own values therefore count. Raises ValueError where XLA_FLAGS names a file of flags instead."""
    own = os.environ.get("XLA_FLAGS", "").strip()
    if own and not own.startswith("-"):
        raise ValueError(f"XLA_FLAGS={own} names a file, beside which no flag can stand: put what it holds into XLA_FLAGS itself")
    os.environ["XLA_FLAGS"] = f"{flag} {own}".strip()


def _has_only_cpus() -> bool:
    """Whether JAX will run on CPU, found without starting it: it is told to, or no other platform is installed."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))


def make_sampler(system: System):
    """-> (sample_episodes, to_rollout_layout): the episode program, and the jitted copy of the learner's parameters that it reads.

    sample_episodes(params, prompts, group_ids, question_ids, key, temperature) -> (Trajectory, counters), as `make_rollout` describes them.
    """
    config, mesh = system.config, system.mesh
    boxed = jax.eval_shape(lambda: Policy(system.rollout_model).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method=Policy.init_all))
    specs = sharding.partition_specs(boxed, dict(config.mesh.rollout_rules))
    rollout = make_rollout(system.rollout_model, system.settings, mesh, specs, system.search, config.rollout.search)
    environment = jax.device_put(system.environment, sharding.replicated(mesh))
    to_rollout_layout = make_rollout_copy(system.rollout_model, sharding.shardings(mesh, specs))
    return lambda params, *arguments: rollout(params, environment, *arguments), to_rollout_layout


def bind_answer_gain(system: System):
    """-> answer_gain(params, trajectory, split, rows) -> [b, K] float32, or None if config.reward.step_reward does not ask for it.

    What each search of this process's rows did for the log-probability of the answer (`learner.make_answer_gain`), under the sampler's parameters. rows [b]:
    of the questions in their split; -1 fills up the batch.
    """
    openings = {split.answers.opening for split in system.splits.values() if split.answers}
    if not openings:
        return None
    gain = learner.make_answer_gain(system.learner_model, *openings, system.config.rl.micro_rows)

    def answer_gain(params, trajectory, split, rows):
        rows = np.maximum(rows, 0)
        return sharding.rows_from_mesh(gain(params, trajectory, *sharding.rows_to_mesh(system.mesh, (split.answers.tokens[rows], split.answers.length[rows]))))

    return answer_gain


def begin_run(system: System, workdir: pathlib.Path):
    """-> (state, reference_params, checkpoints, rollout_key): the state of the newest checkpoint in WORKDIR, or of a new run.

    A new run starts from a random, a pretrained or a warm-started policy; the value model, where rl.advantage needs one, is born from its trunk, and the frozen
    reference is a copy of it.
    """
    config, mesh, model, rules = system.config, system.mesh, system.learner_model, dict(system.config.mesh.train_rules)
    policy_key, value_key, rollout_key = jax.random.split(jax.random.key(config.seed), 3)
    like, specs = learner.describe_params(Policy(model), mesh, rules)
    reference_params = warm_start(system, like, specs, policy_key, workdir)
    policy_optimizer, value_optimizer = make_optimizers(config, config.iterations)
    value = None
    if value_optimizer is not None:
        value_params, value_specs = learner.init_value_params(Value(model), mesh, rules, value_key, reference_params)
        value = learner.init_model_state(value_optimizer, mesh, value_params, value_specs)
    scalars = dict(iteration=jnp.int32(0), position=jnp.int32(0), kl_coef=jnp.float32(config.rl.kl_coef), skipped=jnp.int32(0))
    state = TrainState(
        policy=learner.init_model_state(policy_optimizer, mesh, jax.tree.map(jnp.copy, reference_params), specs),
        value=value,
        **jax.device_put(scalars, sharding.replicated(mesh)))
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    if checkpoints.latest() is not None:
        state = checkpoints.restore(checkpoints.latest(), state)
        logger.info("resumed from iteration %d", int(state.iteration))
    return state, reference_params, checkpoints, rollout_key
