"""Loggers are copies: each gets the metrics, and may fail without harm to the run."""

import json
import logging
import pathlib
import struct
import sys
import types

import pytest

from configs import base
from stepsearch_jax import loggers
from stepsearch_jax.metrics import MetricsWriter, read_metrics


def configure(*names: str) -> dict:
    config = base.get_config()
    config.metrics.loggers = names
    return config.to_dict()


class FakeRun:
    """What wandb.init returns; keeps what it is given."""

    def __init__(self, fails: str = ""):
        self.fails, self.rows, self.metrics, self.finished = fails, [], [], False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        if self.fails == "log":
            raise ConnectionError("no network")
        self.rows.append(row)

    def finish(self):
        if self.fails == "finish":
            raise ConnectionError("no network")
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; its attribute `asked` has the arguments of every init."""
    module = types.ModuleType("wandb")
    module.asked, module.run = [], FakeRun()

    def init(**arguments):
        module.asked.append(arguments)
        return module.run

    module.init = init
    module.Settings = dict
    module.api = types.SimpleNamespace(api_key="a key")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_stage_with_its_own_steps(tmp_path, wandb):
    with MetricsWriter(tmp_path, 0, configure("wandb")) as writer:
        writer.write("sft", 9, {"loss": 0.5})
        writer.write("rl", 0, {"f1": 0.25, "kl": float("nan")})
    assert wandb.run.rows == [
        {"sft/loss": 0.5, "sft/iteration": 9},
        {"rl/f1": 0.25, "rl/iteration": 0},
    ]
    assert ("rl/*", "rl/iteration") in wandb.run.metrics and wandb.run.finished
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_continues_its_wandb_run(tmp_path, wandb):
    for start in range(2):
        with MetricsWriter(tmp_path / "a", start, configure("wandb")) as writer:
            writer.write("rl", start, {"f1": 0.5})
    MetricsWriter(tmp_path / "b", 0, configure("wandb")).close()
    first, second, other = (asked["id"] for asked in wandb.asked)
    assert first == second != other
    assert wandb.asked[0]["resume"] == "allow" and wandb.asked[0]["config"]["seed"] == 0


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_logger_that_fails_is_dropped_with_one_warning(fails, tmp_path, wandb, caplog):
    wandb.run = FakeRun(fails)
    with caplog.at_level(logging.WARNING, "stepsearch_jax"):
        with MetricsWriter(tmp_path, 0, configure("wandb", "tensorboard")) as writer:
            for iteration in range(3):
                writer.write("rl", iteration, {"f1": 0.5})
    assert [record.args[0] for record in caplog.records] == ["wandb"]
    assert len(read_metrics(tmp_path)) == 3
    assert list((tmp_path / "tensorboard" / "rl").iterdir())


def test_a_logger_that_cannot_begin_is_dropped(tmp_path, wandb, caplog):
    def init(**_):
        raise ConnectionError("not logged in")

    wandb.init = init
    with caplog.at_level(logging.WARNING, "stepsearch_jax"):
        with MetricsWriter(tmp_path, 0, configure("wandb")) as writer:
            writer.write("rl", 0, {"f1": 0.5})
    assert "not logged in" in caplog.text and len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("mode,begins", [("online", False), ("offline", True)])
def test_wandb_never_asks_for_a_key(tmp_path, wandb, caplog, monkeypatch, mode, begins):
    wandb.api.api_key = None
    monkeypatch.setenv("WANDB_MODE", mode)
    with caplog.at_level(logging.WARNING, "stepsearch_jax"):
        MetricsWriter(tmp_path, 0, configure("wandb")).close()
    assert bool(wandb.asked) == begins and ("wandb login" in caplog.text) == (not begins)


def test_a_full_disk_costs_tensorboard_alone(tmp_path, caplog, monkeypatch):
    writer = MetricsWriter(tmp_path, 0, configure("tensorboard"))
    writer.write("rl", 0, {"f1": 0.5})

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loggers.RecordWriter, "flush", refuse)
    with caplog.at_level(logging.WARNING, "stepsearch_jax"):
        for iteration in range(1, 9):
            writer.write("rl", iteration, {"f1": 0.5})
        writer.close()
    assert len(caplog.records) == 1 and len(read_metrics(tmp_path)) == 9


def test_a_clock_that_jumped_back_leaves_the_files_in_order(tmp_path, monkeypatch):
    """TensorBoard reads them in the order of their names."""
    for start, now in enumerate((2e9, 1.9e9)):
        monkeypatch.setattr(loggers.time, "time", lambda now=now: now)
        writer = MetricsWriter(tmp_path, start, configure("tensorboard"))
        writer.write("rl", start, {"f1": 0.5})  # never closed, as by a kill
    files = sorted((tmp_path / "tensorboard/rl").iterdir())
    assert [steps(file) for file in files] == [[0, 0], [1, 1]]


def steps(file: pathlib.Path) -> list[int]:
    """The iterations of a file's events, but for its first, which says what the file is."""
    raw, found = file.read_bytes(), []
    while raw:
        (length,) = struct.unpack("<Q", raw[:8])
        found.append(loggers.Event.FromString(raw[12 : 12 + length]).step)
        raw = raw[16 + length :]
    return found[1:]


def test_a_missing_package_is_named_before_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    loggers.check_loggers(("tensorboard",))
    with pytest.raises(ValueError, match=r"metrics\.loggers.*pip install wandb"):
        loggers.check_loggers(("wandb",))


@pytest.mark.slow
def test_the_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with MetricsWriter(tmp_path, 0, configure("wandb")) as writer:
        writer.write("rl", 0, {"f1": 0.5})
        writer.write("rl", 1, {"f1": 0.75})
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert run.name.endswith((tmp_path / "wandb-run-id").read_text())
    assert (
        list(run.glob("*.wandb"))
        and json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["f1"] == 0.75
    )
