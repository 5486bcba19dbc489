"""The scripts in examples/ run."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from examples.losses_in_a_test import *  # noqa: F403 (its tests are tests here, too)

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_training_loop(tmp_path):
    """Two iterations, in another working directory: the shipped config and warm start are found."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    for name in ("XLA_FLAGS", "NPROC"):  # set by conftest.py for this process
        environment.pop(name)
    done = subprocess.run(
        [sys.executable, REPO / "examples" / "training_loop.py", "2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    f1 = [float(value) for value in re.findall(r"f1 ([\d.]+)", done.stdout)]
    assert len(f1) == 2 and min(f1) > 0.1  # the warm start was found: random policies get 0
