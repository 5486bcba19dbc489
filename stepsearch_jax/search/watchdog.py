"""Ends a process that makes no progress, and says what a process was doing when it ended suddenly.

A call that hangs inside a device program cannot be interrupted, and the process then ignores polite
signals; on several processes all the others wait with it. Ending it hard is the only way out: its
peers notice, and the run resumes from its last checkpoint.

A thread ends the process, with one line and `EXIT_CODE`. It cannot run while a call holds the
interpreter lock, so `faulthandler` stands behind it: its timer needs no lock, writes the stack of
every thread to stderr and ends the process with status 1.

A killed process cannot say anything, so a witness does: a small process that hears when watched
calls begin and end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
BACKSTOP_S = 1.0  # from the end of a limit to faulthandler's timer: the thread comes first

_LONGEST_S = 1e9  # faulthandler's timer takes no infinite time

_numbers = itertools.count()  # of watched calls, for all watchdogs together
_WITNESS = """
import sys
calls = {}
for line in sys.stdin:
    number, _, what = line.strip().partition(" ")
    if what:
        calls[number] = what
    elif number == "end":
        calls.clear()
    else:
        calls.pop(number, None)
if calls:
    what, process = next(iter(calls.values())), sys.argv[1]
    end = " came to a sudden end while " + what + " was running"
    print("stepsearch_jax: process " + process + end, file=sys.stderr)
"""


@functools.cache
def _start_witness() -> subprocess.Popen:
    """The witness of this process, which sees the pipe between them close when this one ends."""
    command = [sys.executable, "-I", "-S", "-c", _WITNESS, str(os.getpid())]
    witness = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert witness.stdin is not None  # the pipe
    os.set_blocking(witness.stdin.fileno(), False)
    return witness


def _tell_witness(line: str) -> None:
    with contextlib.suppress(OSError):  # without a witness the work goes on
        pipe = _start_witness().stdin
        assert pipe is not None  # _start_witness asked for one
        os.write(pipe.fileno(), f"{line}\n".encode())


def call_off() -> None:
    """Keeps the witness silent: this process is about to end on purpose."""
    if _start_witness.cache_info().currsize:
        _tell_witness("end")


class _Backstop:
    """faulthandler's timer, which acts without the interpreter lock. All watchdogs of a process
    share it, because there is only one; so nothing else in the process may use it.

    It is set whenever a call begins, ends or is renewed, so that it never runs for a call that has
    returned, and at each tick of a watchdog, in case something else has taken it.
    """

    def __init__(self):
        self.lock = threading.Lock()  # guards the timer and the calls of all watchdogs
        self._deadlines: dict[Watchdog, float] = {}
        self._earliest = math.inf  # the deadline for which the timer is set

    def set(self, watchdog: Watchdog, deadline: float, again: bool = False) -> None:
        """Notes by when the calls of `watchdog` must return (inf: it has none) and sets the timer
        for the earliest of all. again: also if it is set for that. The caller holds the lock."""
        self._deadlines[watchdog] = deadline
        before, self._earliest = self._earliest, min(self._deadlines.values())
        if math.isinf(self._earliest):
            if not math.isinf(before):
                faulthandler.cancel_dump_traceback_later()
        elif again or self._earliest != before:
            left = self._earliest + BACKSTOP_S - time.monotonic()
            with contextlib.suppress(RuntimeError):  # no thread can be started for the timer
                # File descriptor 2 and not sys.stderr, which may be replaced by what has none.
                faulthandler.dump_traceback_later(
                    min(max(left, 1e-3), _LONGEST_S), exit=True, file=2
                )


_backstop = _Backstop()


class Watchdog:
    """Watches calls; one that lasts longer than `timeout_s` ends the process: its own thread with
    `EXIT_CODE` and a line that names the call, or, a second later, faulthandler with status 1 and
    the stacks of all threads, if the call holds the interpreter lock.

    name: what sets the limit, for the message (a config key). Any number of calls may be watched at
    once, from any threads. Raises ValueError if `timeout_s` is not positive.
    """

    def __init__(self, timeout_s: float, name: str):
        if not timeout_s > 0:
            raise ValueError(f"{name} = {timeout_s}: a time limit must be positive")
        self._timeout_s = timeout_s
        self._name = name
        self._calls: dict[int, tuple[str, float]] = {}  # in the order of their starts
        self._renewed = -math.inf
        _start_witness()
        threading.Thread(target=self._watch, name=f"watchdog of {name}", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Within the context, the time limit runs; `what` names the work in the message."""
        number = next(_numbers)
        _tell_witness(f"{number} {what}")
        try:
            with _backstop.lock:
                self._calls[number] = (what, time.monotonic())
                _backstop.set(self, self._find_deadline())
            yield
        finally:
            with _backstop.lock:
                self._calls.pop(number, None)
                _backstop.set(self, self._find_deadline())
            _tell_witness(str(number))

    def renew(self) -> None:
        """Restarts the time of all watched calls, because one of them has made progress."""
        with _backstop.lock:
            self._renewed = time.monotonic()
            _backstop.set(self, self._find_deadline())

    def _find_deadline(self) -> float:
        """By when the oldest call must return, in seconds of time.monotonic(); inf without one."""
        for _, start in self._calls.values():
            return max(start, self._renewed) + self._timeout_s
        return math.inf

    def _watch(self) -> None:
        interval = min(1.0, self._timeout_s / 4)
        left = math.inf
        while True:
            # Calls that begin meanwhile are due later than this thread wakes up.
            time.sleep(min(interval, max(left, 0.0)))
            with _backstop.lock:
                deadline = self._find_deadline()
                left = deadline - time.monotonic()
                if left >= 0:
                    _backstop.set(self, deadline, again=True)
                    continue
                what, start = next(iter(self._calls.values()))
                waited = time.monotonic() - max(start, self._renewed)
            message = (
                f"stepsearch_jax: {what} has not returned for {waited:.1f} s "
                f"(limit: {self._name} = {self._timeout_s:g}); ending this process\n"
            )
            _tell_witness("end")
            with contextlib.suppress(OSError):  # stderr is closed
                os.write(2, message.encode())
            os._exit(EXIT_CODE)
