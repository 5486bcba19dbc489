"""Ends a process that makes no progress, and says what a process was doing that came to a sudden end.

A call that hangs inside a device program cannot be interrupted, and the process then ignores polite signals; on several processes all the others
wait with it. Ending it hard is the only way out: its peers notice, and the run resumes from its last checkpoint.

A process that is killed cannot say anything any more, so a witness does: a small process that is told when watched calls begin and end.
"""

from __future__ import annotations

import contextlib
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
    print("stepsearch_jax: process " + process + " came to a sudden end while " + what + " was running", file=sys.stderr)
"""


@functools.cache
def _start_witness() -> subprocess.Popen:
    """The witness of this process. The end of this process, whatever its cause, closes the pipe between them."""
    command = [sys.executable, "-I", "-S", "-c", _WITNESS, str(os.getpid())]
    witness = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    os.set_blocking(witness.stdin.fileno(), False)
    return witness


def _tell_witness(line: str) -> None:
    with contextlib.suppress(OSError):  # without a witness the work goes on
        os.write(_start_witness().stdin.fileno(), f"{line}\n".encode())


def call_off() -> None:
    """What is watched now is nothing to tell of: this process is about to end of itself."""
    if _start_witness.cache_info().currsize:
        _tell_witness("end")


class Watchdog:
    """Watches calls from a thread of its own; one that lasts longer than `timeout_s` ends the process with `EXIT_CODE`.

    name: what sets the limit, for the message (a config key). Any number of calls may be watched at once, from any threads. The thread cannot act
    while a call holds the interpreter lock without ever releasing it. Raises ValueError if `timeout_s` is not positive.
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
        self._calls[number] = (what, time.monotonic())
        try:
            yield
        finally:
            del self._calls[number]
            _tell_witness(str(number))

    def renew(self) -> None:
        """Something that is watched goes forward: the time of all calls begins anew."""
        self._renewed = time.monotonic()

    def _watch(self) -> None:
        interval = min(1.0, self._timeout_s / 4)
        while True:
            time.sleep(interval)
            for what, start in list(self._calls.values()):
                waited = time.monotonic() - max(start, self._renewed)
                if waited > self._timeout_s:
                    limit = f"limit: {self._name} = {self._timeout_s:g}"
                    _tell_witness("end")
                    os.write(
                        2,
                        f"stepsearch_jax: {what} has not returned for {waited:.1f} s ({limit}); ending this process\n".encode(),
                    )
                    os._exit(EXIT_CODE)
