"""What is set before JAX starts."""
import os
import types

import ml_collections
import pytest

from stepsearch_jax import startup

ONE_PROCESS = ml_collections.ConfigDict({"distributed": {"processes": 1}})
VECTORS = "--xla_backend_extra_options=-unroll-full-max-count=8"


@pytest.fixture
def start(monkeypatch):
    """-> (flags of the environment, platforms JAX is told, installed plugins) -> the flags XLA then reads."""

    def run(flags, platforms, plugins):
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setenv("NPROC", os.environ.get("NPROC", "64"))
        monkeypatch.setattr(startup.importlib.metadata, "entry_points", lambda group: plugins if group == "jax_plugins" else ())
        monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(startup, "jax", types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms=platforms, update=lambda *_: None)))
        startup.start_jax(ONE_PROCESS)
        return os.environ["XLA_FLAGS"]

    return run


@pytest.mark.parametrize("platforms, plugins", [("cpu", ("cuda",)), (None, ())])
def test_rows_are_copied_as_vectors_on_cpu(platforms, plugins, start):
    assert start("", platforms, plugins).split() == [VECTORS]


@pytest.mark.parametrize("platforms, plugins", [("tpu,cpu", ()), ("cuda", ()), (None, ("cuda",))])
def test_loops_of_other_platforms_are_left_alone(platforms, plugins, start):
    assert start("--xla_some=1", platforms, plugins) == "--xla_some=1"


def test_a_file_of_flags_is_refused(start, tmp_path):
    """XLA reads a value that does not begin with - as the name of a file; behind a flag the name would be lost, and all that the file holds."""
    with pytest.raises(ValueError, match="names a file"):
        start(str(tmp_path / "flags"), "cpu", ())
    assert start(str(tmp_path / "flags"), "tpu", ()) == str(tmp_path / "flags")


def test_flags_of_the_user_come_last_and_so_count(start):
    own = "--xla_backend_extra_options=-unroll-full-max-count=64 --xla_force_host_platform_device_count=2"
    assert start(own, "cpu", ()).split() == [VECTORS, *own.split()]
