"""Runs commands for tests: as processes, with a random policy that searches, on shared data."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import tiny_config
from conftest import COMPILE_FAST

from stepsearch_jax import checkpoint
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.run.folder import FORMAT, write_beginning, write_config
from stepsearch_jax.run.system import System, build_system

REPO = pathlib.Path(__file__).resolve().parents[1]


def shared_cache(tmp_path_factory) -> pathlib.Path:
    """The folder in which all tests keep the tiny data set."""
    return tmp_path_factory.getbasetemp() / "tiny_data"


def here(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config, for a run on the eight devices of the tests' own process."""
    config.mesh.data, config.mesh.tensor = 4, 2
    return config


def searching_start(tmp_path_factory) -> pathlib.Path:
    """A start/ folder with a random policy of the tiny model that prefers the search tags.

    An episode has about one search.
    """
    folder = tmp_path_factory.getbasetemp() / "searching_start"
    if not folder.is_dir():
        config = here(tiny_config.get_config(str(shared_cache(tmp_path_factory))))
        system = build_system(config, ["train"])
        checkpoint.save_params(folder, make_searching_params(system, seed=26))
    return folder


def make_searching_params(system: System, seed: int):
    rng, scale = np.random.default_rng(seed), system.learner_model.embed_dim**-0.5

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape)
        if path[-1].key == "lm_head":
            drawn = rng.normal(scale=scale, size=leaf.shape[::-1]).T
        else:
            drawn = rng.normal(scale=scale, size=leaf.shape)
        return jnp.asarray(drawn, leaf.dtype)

    def init():
        tokens = jnp.zeros((1, 2), jnp.int32)
        return Policy(system.learner_model).init(jax.random.key(0), tokens, method=Policy.init_all)

    params = jax.tree_util.tree_map_with_path(draw, nn.unbox(jax.eval_shape(init)))
    # tokens matter more than their neighbours: greedy decoding does not repeat itself
    params["params"]["trunk"]["embedding"] *= 4.0
    tags = jnp.array([system.tokenizer.encode(tag)[0] for tag in ("<search>", "</search>")])
    params["params"]["lm_head"] = params["params"]["lm_head"].at[:, tags].multiply(8.0)
    return params


def write_run(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """The files that a run writes first: config.json and run.json."""
    write_config(workdir, config)
    write_beginning(workdir, {"format": FORMAT, "iterations": config.iterations, "data": {}})


def start(command: list, *, devices: int = 1, log: pathlib.Path) -> subprocess.Popen:
    """Starts `python …command` in the repository with `devices` fake CPU devices.

    log: file for its output, in the test's tmp_path. Programs are compiled without optimisation and
    cached beside the folders of the tests. The locale is one that knows only ASCII.
    """
    environment = os.environ | {
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{COMPILE_FAST} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
        "JAX_COMPILATION_CACHE_DIR": str(log.parents[1] / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.pop("NPROC", None)  # tests/conftest.py sets it for this process only
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=REPO,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def start_command(
    module: str, cache: pathlib.Path, workdir: pathlib.Path, *options: str, devices: int = 1
) -> subprocess.Popen:
    """Starts a command on the tiny config, its output in WORKDIR.log."""
    command = [
        "-m",
        f"stepsearch_jax.{module}",
        f"--config=tests/tiny_config.py:{cache}",
        f"--workdir={workdir}",
        *options,
    ]
    return start(command, devices=devices, log=workdir.with_suffix(".log"))


def run_command(*arguments, status: int = 0, **options) -> str:
    """Runs a command, which must end with `status` -> its output."""
    process = start_command(*arguments, **options)
    log = arguments[2].with_suffix(".log")
    try:
        assert process.wait(timeout=900) == status, log.read_text()[-3000:]
    finally:
        process.kill()
    return log.read_text()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def read_tree(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every leaf of a saved tree by its path; the devices that saved it do not matter."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder.resolve()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(folder.resolve(), restore_args=as_numpy)
    leaves = jax.tree_util.tree_leaves_with_path(tree["tree"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def final_state(workdir: pathlib.Path, iteration: int) -> dict[str, np.ndarray]:
    """Every leaf of a run's checkpoint by its path."""
    return read_tree(workdir / "checkpoints" / str(iteration) / "default")
