"""The watchdog ends a process whose call hangs, even with the interpreter lock held, and no other.

Each case has a process of its own, because a mistake would end this one."""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from stepsearch_jax.search.watchdog import EXIT_CODE, Watchdog

TESTS = pathlib.Path(__file__).resolve().parent
CALLBACK = """
import ctypes, os, sys, time
import numpy as np
from test_search_callback import ENVIRONMENT, DOCUMENTS, make_search_callback, array
from stepsearch_jax.search.watchdog import Watchdog

def hang(queries):
    time.sleep(600)

def hang_with_the_lock(queries):
    ctypes.PyDLL(None).sleep(600)

search, stderr = globals()[sys.argv[1]], sys.argv[2]
watchdog = Watchdog(1.0, "search.timeout_s")
callback = make_search_callback(
    search, lambda ids: "a", DOCUMENTS, ENVIRONMENT, 20, 2, watchdog
)
if stderr == "closed":
    os.close(2)
if stderr == "replaced":
    sys.stderr = None
print("calling", flush=True)
callback(np.ones((1, 1), np.int32), array(1), np.array([True]))
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def run_callback(search: str, stderr: str) -> tuple[int, str, float]:
    """-> exit status, stderr, seconds from the call to the end of the process. The limit is 1 s."""
    process = subprocess.Popen(
        [sys.executable, "-c", CALLBACK, search, stderr],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "calling\n"
        start = time.monotonic()
        code = process.wait(timeout=60)
        seconds = time.monotonic() - start
        return code, process.communicate()[1], seconds
    finally:
        process.kill()


@pytest.mark.parametrize("stderr", ["there", pytest.param("replaced", marks=pytest.mark.slow)])
def test_a_hanging_search_ends_the_process(stderr):
    """With one line, which names it and the limit. (A busy machine has 15 s for it.)"""
    code, output, seconds = run_callback("hang", stderr)
    assert code == EXIT_CODE == 70 and 0.9 < seconds < 15
    (line,) = output.splitlines()
    assert re.match(r"stepsearch_jax: the search .* \d+\.\d s .*search\.timeout_s = 1\)", line)


@pytest.mark.parametrize("stderr", ["there", pytest.param("replaced", marks=pytest.mark.slow)])
def test_a_search_that_holds_the_interpreter_lock_ends_the_process(stderr):
    """The call begins before any tick of the watchdog's thread, which then never runs again."""
    code, output, seconds = run_callback("hang_with_the_lock", stderr)
    assert code == 1 and 1.9 < seconds < 15
    assert re.search(r'File "<string>", line \d+ in hang_with_the_lock\n', output)
    assert re.search(r"callback\.py\", line \d+ in __call__\n", output)
    assert "came to a sudden end while the search was running" in output


@pytest.mark.slow
@pytest.mark.parametrize("search,status", [("hang", EXIT_CODE), ("hang_with_the_lock", 1)])
def test_a_closed_stderr_does_not_save_the_process(search, status):
    code, _, seconds = run_callback(search, "closed")
    assert code == status and seconds < 15


def test_many_short_calls_and_failing_ones_do_not_add_up():
    """20 calls of 0.1 s, every other one raising, under a limit of 1.5 s."""
    done = run("""
import contextlib, time
from stepsearch_jax.search.watchdog import Watchdog
watchdog = Watchdog(1.5, "limit")
for i in range(20):
    with contextlib.suppress(ValueError), watchdog.watching("a call"):
        time.sleep(0.1)
        if i % 2:
            raise ValueError
print("done")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_the_timer_never_runs_for_calls_that_return_in_time():
    """Even while the watchdog's thread cannot run: here it never starts.

    Each part takes 0.3 s of a limit of 1 s. Calls one after another, calls that overlap, a call of
    a watchdog with a longer limit, and one that is renewed: a timer that stayed as the first part
    set it would end the process after 2 s. Each stretch lasts longer, also after the last call.
    """
    done = run("""
import contextlib, threading, time
from stepsearch_jax.search.watchdog import Watchdog
start, threading.Thread.start = threading.Thread.start, lambda self: None
watchdog, patient = Watchdog(1.0, "limit"), Watchdog(60, "long limit")
threading.Thread.start = start
with patient.watching("all"):
    for _ in range(7):
        with watchdog.watching("a call"):
            time.sleep(0.3)
    with watchdog.watching("a renewed call"):
        for _ in range(7):
            time.sleep(0.3)
            watchdog.renew()
    before = contextlib.nullcontext()
    for _ in range(7):  # a call begins before the last one ends
        call = watchdog.watching("an overlapping call")
        call.__enter__()
        before.__exit__(None, None, None)
        before = call
        time.sleep(0.3)
call.__exit__(None, None, None)
time.sleep(2.5)
print("done")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_slow_calls_that_hold_the_interpreter_lock_go_on():
    """Each takes 0.5 s of a limit of 1 s, and together they last longer than the timer."""
    done = run("""
import ctypes
from stepsearch_jax.search.watchdog import Watchdog
watchdog = Watchdog(1.0, "limit")
for _ in range(5):
    with watchdog.watching("a call"):
        ctypes.PyDLL(None).usleep(500_000)
print("done")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_smallest_remaining_time_of_all_watchdogs_counts():
    """A call with a limit of 1 s holds the lock while others, begun before and after, have 60 s."""
    start = time.monotonic()
    done = run("""
import ctypes, threading, time
from stepsearch_jax.search.watchdog import Watchdog
patient, strict = Watchdog(60, "long limit"), Watchdog(1.0, "limit")
with patient.watching("all"), strict.watching("a call"), patient.watching("a part"):
    patient.renew()
    with patient.watching("a short part"):
        pass
    ctypes.PyDLL(None).sleep(600)
""")
    assert done.returncode == 1 and "line 9 in <module>" in done.stderr
    assert time.monotonic() - start < 15


@pytest.mark.slow
def test_the_timer_is_taken_back():
    """Another user of faulthandler's only timer does not switch the watchdog off for long."""
    done = run("""
import ctypes, faulthandler, time
from stepsearch_jax.search.watchdog import Watchdog
with Watchdog(2.0, "limit").watching("a call"):
    faulthandler.cancel_dump_traceback_later()
    time.sleep(1.2)  # the watchdog's thread runs every 0.5 s
    ctypes.PyDLL(None).sleep(600)
""")
    assert done.returncode == 1 and "line 7 in <module>" in done.stderr


@pytest.mark.slow
def test_a_call_that_makes_progress_may_take_longer():
    """Eight parts of 0.3 s under a limit of 1.5 s, then one that hangs."""
    done = run("""
import time
from stepsearch_jax.search.watchdog import Watchdog
watchdog = Watchdog(1.5, "limit")
with watchdog.watching("a call"):
    for _ in range(8):
        time.sleep(0.3)
        watchdog.renew()
    print("done", flush=True)
    time.sleep(600)
""")
    assert (done.returncode, done.stdout) == (EXIT_CODE, "done\n")
    assert re.match(r"stepsearch_jax: a call .* \d+\.\d s", done.stderr)


def test_a_limit_must_be_positive():
    with pytest.raises(ValueError, match="search.timeout_s = 0"):
        Watchdog(0, "search.timeout_s")
