"""Signals: each ends a command with one line and its status; training saves its state first."""

import signal
import subprocess
import sys
import time

import pytest
import running

from stepsearch_jax.metrics import read_metrics

START = """
import os, signal, sys, time
from stepsearch_jax import signals

for word in sys.argv[2:]:
    signal.signal(getattr(signal, word), signal.SIG_IGN)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and "SIGINT" not in sys.argv[2:]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background
signals.listen()
if sys.argv[1] != "loading":
    signals.begin_work("the same command goes on", tidies_up=sys.argv[1] == "tidy")

def work():
    print("ready", flush=True)
    time.sleep(20)

if sys.argv[1] == "deferred":
    with signals.deferred():
        print("ready", flush=True)
        while not signals.requested():
            time.sleep(0.01)
        print("step", flush=True)
        sys.stdin.readline()  # the state is saved
        signals.end(signals.requested(), "all is saved")
elif sys.argv[1] == "forgotten":
    with signals.deferred():
        print("ready", flush=True)
        while not signals.requested():
            time.sleep(0.01)
    print("not reached", flush=True)
elif sys.argv[1] == "tidy":
    signals.GRACE_S = 1.0
    try:
        work()
    except KeyboardInterrupt:
        print("tidying up", flush=True)
        time.sleep(20)
elif sys.argv[1] == "native":  # holds the interpreter back from Python's own handlers
    import ctypes
    print("ready", flush=True)
    for _ in range(20):  # a signal wakes it
        ctypes.CDLL(None).sleep(1)
else:
    work()
"""


class Process:
    """A process of START that is ready for signals."""

    def __init__(self, *arguments: str):
        self.popen = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout.readline() == "ready\n"

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.popen.send_signal(number)

    def end(self, text: str = "") -> tuple[int, list[str], list[str]]:
        """-> status, lines of stdout and of stderr."""
        try:
            out, error = self.popen.communicate(text, timeout=15)
        finally:
            self.popen.kill()
        return self.popen.returncode, out.splitlines(), error.splitlines()


@pytest.mark.parametrize("phase", ["loading", "work", "native"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["term", "hup"])
def test_a_signal_ends_at_once_with_one_line(phase, number):
    process = Process(phase)
    process.send(number)
    status, out, error = process.end()
    assert status == 128 + number and out == [] and len(error) == 1 and number.name in error[0]


def test_work_that_tidies_up_has_some_seconds_for_it():
    process = Process("tidy")
    process.send(signal.SIGINT)
    status, out, error = process.end()
    assert status == 130 and out == ["tidying up"] and len(error) == 1


@pytest.mark.parametrize("phase", ["loading", "work", "deferred"])
def test_an_interrupt_is_one_line(phase):
    process = Process(phase)
    process.send(signal.SIGINT)
    status, _, error = process.end()
    assert status == 130 and len(error) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["term", "hup"])
def test_within_deferred_the_work_saves_first(number):
    process = Process("deferred")
    process.send(number)
    assert process.popen.stdout.readline() == "step\n"
    status, _, error = process.end("saved\n")
    assert status == 128 + number and len(error) == 2 and "all is saved" in error[1]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_second_signal_ends_at_once(second):
    process = Process("deferred")
    process.send(signal.SIGTERM)
    assert process.popen.stdout.readline() == "step\n"
    process.send(second)
    assert process.popen.wait(timeout=15) == 128 + second
    process.end()


def test_a_request_that_nobody_asks_for_ends_after_the_work():
    process = Process("forgotten")
    process.send(signal.SIGTERM)
    status, out, _ = process.end()
    assert status == 143 and out == []


def test_what_was_ignored_stays_ignored():
    process = Process("work", "SIGHUP", "SIGINT")
    process.send(signal.SIGHUP, signal.SIGINT)
    time.sleep(0.3)
    assert process.popen.poll() is None
    process.send(signal.SIGTERM)
    assert process.end()[0] == 143


# Runs a command at a terminal of its own and closes that once a file is there; its child's status:
# python TERMINAL FILE COMMAND…
TERMINAL = """
import contextlib, os, pathlib, select, sys, time

child, terminal = os.forkpty()
if not child:
    os.execv(sys.argv[2], sys.argv[2:])
while not pathlib.Path(sys.argv[1]).exists():
    if select.select([terminal], [], [], 0.1)[0]:
        os.read(terminal, 1 << 16)  # a full terminal would stop the command
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_run_whose_terminal_closes_is_saved(tmp_path, tmp_path_factory):
    """Its output goes nowhere then, and must not fail."""
    workdir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "stepsearch_jax.train", f"--workdir={workdir}"),
        f"--config=tests/tiny_config.py:{running.shared_cache(tmp_path_factory)}",
        f"--config.sft.checkpoint={running.searching_start(tmp_path_factory)}",
        *("--config.iterations=200", "--config.checkpoint.every=1000"),
    ]
    log = tmp_path / "terminal.log"
    process = running.start(["-c", TERMINAL, workdir / "metrics.jsonl", *command], log=log)
    try:
        status = process.wait(timeout=200)
    finally:
        process.kill()
    assert status == 129, log.read_text()
    (saved,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    finished = [row["iteration"] for row in read_metrics(workdir) if row["stage"] == "rl"]
    assert finished == list(range(saved)) and saved < 200
