"""What is set before JAX starts."""

import ctypes
import os
import subprocess
import sys
import types

import ml_collections
import pytest
from conftest import slow_but_for

from stepsearch_jax import runtime

ONE_PROCESS = ml_collections.ConfigDict({"distributed": {"processes": 1}})
VECTORS = "--xla_backend_extra_options=-unroll-full-max-count=8"


@pytest.fixture
def start(monkeypatch):
    """-> (flags of the environment, jax_platforms, installed plugins) -> the flags XLA reads."""

    def run(flags, platforms, plugins):
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setenv("NPROC", os.environ.get("NPROC", "64"))
        monkeypatch.setattr(
            runtime.importlib.metadata,
            "entry_points",
            lambda group: plugins if group == "jax_plugins" else (),
        )
        monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(
            runtime,
            "jax",
            types.SimpleNamespace(
                config=types.SimpleNamespace(jax_platforms=platforms, update=lambda *_: None)
            ),
        )
        # this process's own would stay changed
        monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)
        runtime.start_jax(ONE_PROCESS)
        return os.environ["XLA_FLAGS"]

    return run


@pytest.mark.parametrize("platforms, plugins", [("cpu", ("cuda",)), (None, ())])
def test_rows_are_copied_as_vectors_on_cpu(platforms, plugins, start):
    assert start("", platforms, plugins).split() == [VECTORS]


@pytest.mark.parametrize("platforms, plugins", [("tpu,cpu", ()), ("cuda", ()), (None, ("cuda",))])
def test_loops_of_other_platforms_are_left_alone(platforms, plugins, start):
    assert start("--xla_some=1", platforms, plugins) == "--xla_some=1"


def test_a_file_of_flags_is_refused(start, tmp_path):
    """XLA reads a value that does not begin with - as the name of a file; behind a flag the name
    would be lost, and all that the file holds.
    """
    with pytest.raises(ValueError, match="names a file"):
        start(str(tmp_path / "flags"), "cpu", ())
    assert start(str(tmp_path / "flags"), "tpu", ()) == str(tmp_path / "flags")


def test_flags_of_the_user_come_last_and_so_count(start):
    own = (
        "--xla_backend_extra_options=-unroll-full-max-count=64 "
        "--xla_force_host_platform_device_count=2"
    )
    assert start(own, "cpu", ()).split() == [VECTORS, *own.split()]


INTERRUPTED = """
import os, pathlib, signal, sys, threading, time
import jax, jax.numpy as jnp
from ml_collections import ConfigDict
from stepsearch_jax import cli
from stepsearch_jax.search.watchdog import Watchdog

# A shell that starts the tests in the background has had it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def press(x):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
    return x

def command(config, workdir):
    if sys.argv[1] == "plainly":
        press(0)
    if sys.argv[1] == "in a callback":
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(press, x, x))(jnp.ones(2)))
    if sys.argv[1] == "in a program":  # that never ends
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        endless = lambda x: jax.lax.while_loop(lambda x: x[0] > 0, lambda x: x + 1, x)
        jax.block_until_ready(jax.jit(endless)(jnp.ones(2)))
    if sys.argv[1] == "in a finalizer":  # where an exception would be lost
        class Ended:
            def __del__(self):
                press(0)
        Ended()
    if sys.argv[1] == "beside a search":
        def search():
            with Watchdog(60, "a limit").watching("the search"):
                time.sleep(60)
        threading.Thread(target=search, daemon=True).start()
        time.sleep(0.5)
        press(0)

config = ConfigDict({"distributed": {"processes": 1}, "sft": {"checkpoint": ""}})
cli.run_guarded(command, config, pathlib.Path("run"), "the same command goes on")
"""


@pytest.mark.parametrize(
    "where",
    slow_but_for(
        ("in a callback",),
        ["plainly", "in a callback", "in a program", "in a finalizer", "beside a search"],
    ),
)
def test_an_interruption_ends_with_one_line(where):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, where],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    line = "stepsearch_jax: interrupted; the same command goes on\n"
    assert done.returncode == 130 and done.stderr == line


PAGES = """
import resource, sys
import jax, jax.numpy as jnp
from ml_collections import ConfigDict
from stepsearch_jax import runtime

if sys.argv[1] == "left":
    runtime.keep_freed_memory = lambda: None
runtime.start_jax(ConfigDict({"distributed": {"processes": 1}}))
double = jax.jit(lambda x: x[:, None] * jnp.ones(2))
x = jnp.ones(8 * 2**20)
faults = []
for _ in range(12):  # 64 MiB are allocated and freed each time
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    double(x).block_until_ready().delete()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[6] * resource.getpagesize() // 2**20)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or sys.platform != "linux",
    reason="malloc is not glibc's",
)
@pytest.mark.slow
@pytest.mark.parametrize("memory, fresh", [("kept", range(0, 8)), ("left", range(48, 80))])
def test_freed_memory_is_reused(memory, fresh):
    """MiB of pages that a call of a program faults in, the median of twelve: a freed block may be
    slightly too small for the next one.
    """
    found = subprocess.run(
        [sys.executable, "-c", PAGES, memory],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) in fresh


@pytest.mark.parametrize("module", ["train", "prepare"])
def test_help_is_printed_in_any_locale(module):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", f"stepsearch_jax.{module}", "--help"],
        env=os.environ | ascii_only,
        capture_output=True,
    )
    assert done.returncode == 0 and b"config" in done.stdout and not done.stderr


PAGES_OF_LIBRARIES = """
from absl import logging
from stepsearch_jax import cli

cli.start_logging()
try:
    raise ValueError("no room")
except ValueError:
    logging.exception("a save failed, %d of 2\\n%s", 1, "details " * 500)
"""


def test_an_error_that_a_library_logs_is_one_line():
    done = subprocess.run(
        [sys.executable, "-c", PAGES_OF_LIBRARIES], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0 and "a save failed, 1 of 2 details" in done.stderr
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 500
