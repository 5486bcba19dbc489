"""What Ctrl-C (SIGINT), SIGTERM and SIGHUP do: each ends a command with one line.

The exit status is 128 + the signal's number. A signal ends the process at once, but for two cases:
within `deferred` the first SIGTERM or SIGHUP is only noted, so that training can save its state
first; and Ctrl-C raises KeyboardInterrupt in work that has something to tidy up, which has GRACE_S
seconds for it.

A thread of its own hears the signals. Python's handlers wait until the program on the device
returns, and their exceptions are lost in callbacks and finalizers. A signal that was ignored when
the process began stays ignored, as under nohup. Commands listen before they load libraries, so this
module loads as little as it can.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

TYPE_CHECKING = False  # as typing's, which takes longer to load than all of the above
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

GRACE_S = 5.0  # from Ctrl-C to the end, at the latest
INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_BEFORE_WORK = "nothing was begun"

_after = _BEFORE_WORK  # what the line says the user can do, or what is lost
_received: list[int] = []  # signals so far
_is_deferred = False
_is_listening = False


def _note(number, frame) -> None:
    """A handler that does nothing: the thread hears the signal."""


def listen() -> None:
    """From now on signals end the process with one line. Call it in the main thread."""
    global _is_listening
    if _is_listening or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _note)
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _note)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(reader,), name="signals", daemon=True).start()
    _is_listening = True


def begin_work(after: str, *, tidies_up: bool) -> None:
    """The work begins.

    after: what the line about a signal says the user can do afterwards, or what is lost. tidies_up:
    Ctrl-C raises KeyboardInterrupt from now on.
    """
    global _after
    _after = after
    if tidies_up and signal.getsignal(signal.SIGINT) is _note:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def take_back() -> None:
    """Hears the signals again after a library has put handlers of its own in their place, as libtpu
    does, whose handlers print their stack."""
    for number in (signal.SIGINT, *_ENDING):
        handler = signal.getsignal(number)
        if handler in (_note, signal.default_int_handler):
            signal.signal(number, handler)


def raise_at_each() -> None:
    """From now on each signal raises KeyboardInterrupt, and the process has all the time it wants:
    for commands that wait for others."""
    for number in (signal.SIGINT, *_ENDING):
        if signal.getsignal(number) in (_note, signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _interrupt)


def _interrupt(number, frame) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the context the first SIGTERM or SIGHUP does nothing but to set `requested`."""
    global _is_deferred
    _is_deferred = True
    try:
        yield
    finally:
        _is_deferred = False
    if number := requested():  # it came when nobody asked any more
        leave(128 + number, _describe(number))


def requested() -> int:
    """The number of the signal by which this process is to end after the work at hand; 0: none."""
    return next((number for number in _received if number in _ENDING), 0)


def end(number: int, what: str) -> NoReturn:
    """Ends the program with one line, in the usual way: contexts are left, files are closed.

    number: from `requested` of any process; what: was saved, and how to go on.
    """
    _write_line(f"received {signal.Signals(number).name}; {what}")
    raise SystemExit(128 + number)


def leave(status: int, message: str) -> NoReturn:
    """Ends this process at once with one line, without waiting for the device or other threads.

    They would print pages of errors, or crash. A checkpoint that is being saved is lost; the one
    before it stays.
    """
    if watchdog := sys.modules.get("stepsearch_jax.search.watchdog"):
        watchdog.call_off()  # its witness need not say that this process ended
    with contextlib.suppress(OSError, AttributeError):  # a pipe that nobody reads, or no stdout
        sys.stdout.flush()
    _write_line(message)
    os._exit(status)


def _hear(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            _receive(number)


def _receive(number: int) -> None:
    """What the thread does about a signal."""
    handler = signal.getsignal(number)
    if handler not in (_note, signal.default_int_handler):  # somebody else's, as a server's
        return
    is_first = not _received
    _received.append(number)
    message = _describe(number)
    if is_first and number in _ENDING and _is_deferred:
        _write_line(
            f"received {signal.Signals(number).name}: saving after this step, then ending; "
            "a second signal ends at once"
        )
        if number == signal.SIGHUP:
            _let_go_of_terminal()
    elif is_first and handler is signal.default_int_handler:
        threading.Thread(target=_leave_later, args=(message,), daemon=True).start()
    else:
        leave(128 + number, message)


def _leave_later(message: str) -> None:
    time.sleep(GRACE_S)
    leave(INTERRUPTED, message)


def _describe(number: int) -> str:
    what = "interrupted" if number == signal.SIGINT else f"received {signal.Signals(number).name}"
    return f"{what}; {_after}"


def _let_go_of_terminal() -> None:
    """Writing to a terminal that has closed would fail, and end the work before it is saved."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            if os.isatty(descriptor):
                os.dup2(nowhere, descriptor)


def _write_line(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr is closed, or its terminal
        os.write(2, f"stepsearch_jax: {message}\n".encode())
