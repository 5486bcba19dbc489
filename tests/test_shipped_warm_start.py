"""The shipped warm start is what its command makes: same held-out loss."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import REPO

from configs import atlas_quickstart
from stepsearch_jax import checkpoint
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.rl.model_state import init_params
from stepsearch_jax.rl.sft import make_sft, make_sft_optimizer
from stepsearch_jax.run.demonstrations import demonstrate
from stepsearch_jax.run.system import build_system
from stepsearch_jax.run.warm_start import find_checkpoint
from stepsearch_jax.sharding import make_mesh

LOG = REPO / "configs" / "warm_starts" / "atlas.jsonl"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """-> function: folder of a policy -> its loss and exactness.

    Measured on the last phase's held-out demonstrations.
    """
    config = atlas_quickstart.get_config("anew")
    config.rl.microbatch_size = 0  # the tests' mesh has more shards
    config.data.cache_dir = str(tmp_path_factory.mktemp("cache"))
    sft_config = config.sft
    system = build_system(config, [sft_config.held_out_split])
    last = len(sft_config.phases) - 1
    _, rows, single_hop, poor_fraction, _ = sft_config.phases[last]
    exam = demonstrate(
        system,
        sft_config.held_out_split,
        sft_config.held_out,
        single_hop=single_hop,
        poor_fraction=poor_fraction,
        seed=config.seed + 1000 + last,
    )
    # the loss, whose optimizer is not used
    optimizer = make_sft_optimizer(
        "adamw",
        [(1, 0.0)],
        warmup_steps=0,
        final_fraction=1.0,
        b2=0.9,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    _, held_out_loss = make_sft(system.learner_model, optimizer)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    abstract_params, _ = init_params(
        Policy(system.learner_model), mesh, dict(config.mesh.train_rules), jax.random.key(0)
    )

    def measure(folder):
        params = checkpoint.load_params(folder, abstract_params, "none")
        loss, exact = held_out_loss(params, exam.tokens, exam.action_mask, rows=rows)
        return float(loss), float(np.mean(exact))

    return measure


@pytest.mark.slow
def test_shipped_policy_has_the_loss_that_its_log_ends_with(held_out):
    logged = json.loads(LOG.read_text().splitlines()[-1])
    loss, exact = held_out(find_checkpoint(atlas_quickstart.WARM_START))
    assert loss == pytest.approx(logged["held_out_loss"], rel=1e-3)
    assert exact == pytest.approx(logged["held_out_exact"], abs=0.01)


def test_shipped_policy_is_small():
    files = find_checkpoint(atlas_quickstart.WARM_START).rglob("*")
    assert sum(file.stat().st_size for file in files) < 8 * 2**20


def start_warm_start(folder: pathlib.Path) -> subprocess.Popen:
    """The command that makes the warm start, in FOLDER/run; one thread, as for the shipped one."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "NPROC": "1"}
    command = [
        sys.executable,
        "-m",
        "stepsearch_jax.train",
        "--config=configs/atlas_quickstart.py:anew",
        f"--workdir={folder / 'run'}",
        f"--config.data.cache_dir={folder / 'cache'}",
        "--config.iterations=0",
        "--config.evaluation.questions=64",
    ]
    return subprocess.Popen(command, cwd=REPO, env=environment)


def check_first_look(folder: pathlib.Path) -> None:
    """The first logged loss, after 50 steps, is that of the shipped policy's log."""
    logs = folder / "run/metrics.jsonl", LOG
    first, logged = (json.loads(path.read_text().splitlines()[0]) for path in logs)
    assert first["held_out_loss"] == pytest.approx(logged["held_out_loss"], rel=1e-3)


@pytest.mark.slow
def test_command_begins_as_it_did_for_the_shipped_policy(tmp_path):
    """The short twin of the test below: the same command up to its first logged loss."""
    process = start_warm_start(tmp_path)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 900
    try:
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    check_first_look(tmp_path)


@pytest.mark.nightly
def test_command_makes_the_shipped_policy(held_out, tmp_path):
    """The whole warm start again: same first loss, and same last loss within 0.05 nats a token.

    Rounding differs between machines and with the number of threads, and grows over 1,700 steps:
    with two threads the command ended 0.028 below the shipped policy, which one thread made. The
    loss of the untrained policy is several nats, the first logged one 0.61, that of the script's
    own randomness 0.07.
    """
    assert start_warm_start(tmp_path).wait() == 0
    check_first_look(tmp_path)
    again = held_out(tmp_path / "run" / "start")
    shipped = held_out(find_checkpoint(atlas_quickstart.WARM_START))
    assert again[0] == pytest.approx(shipped[0], abs=0.05)
    assert abs(again[1] - shipped[1]) < 0.1
