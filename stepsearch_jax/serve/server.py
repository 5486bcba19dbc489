"""uvicorn's server and its side of a connection: slow clients are cut off, and a signal ends the
server after it has answered what it accepted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from stepsearch_jax import signals
from stepsearch_jax.serve.app import ABORT

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BACKLOG = 2048  # connections that may wait to be accepted
IDLE_S = 0.5  # from a signal until connections without a request are closed
POLL_S = 0.05
DROP = struct.pack("ii", 1, 0)  # of SO_LINGER: what is not sent is dropped
CLOSING = [(b"connection", b"close")]  # header of every answer after a signal


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises OSError, with the address, if that is impossible."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        return listener
    except (OSError, UnicodeError) as error:  # the latter for a host's name that cannot be one
        raise OSError(
            f"cannot listen at {host}:{port} ({error}); choose another --host or --port"
        ) from error


def make_protocol(seconds: float) -> type[AutoHTTPProtocol]:
    """uvicorn's side of a connection, with time limits for the client.

    By itself it would wait for ever for the rest of a request's headers, for a body that nobody
    reads, and for a client to take its answer. Here a connection on which no request is being
    answered is cut off after so many seconds (uvicorn closes one that is idle sooner), and one
    whose client has kept its answer waiting for so many seconds in all. The application may cut it
    off by the function `state[ABORT]` of its scope.
    """

    class Protocol(AutoHTTPProtocol):
        _timer: asyncio.TimerHandle | None = None  # for the next request
        _taking: asyncio.TimerHandle | None = None  # runs while the client takes nothing
        _left, _since = seconds, 0.0  # of the time to take the answer; when `_taking` began

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.app_state = {**self.app_state, ABORT: self._reset}
            self._limit_wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._timer, self._taking):
                if timer:
                    timer.cancel()

        def on_response_complete(self) -> None:
            self._left = seconds
            super().on_response_complete()
            self._limit_wait()

        def _limit_wait(self) -> None:
            # The request that was answered last; the headers of the next one replace it.
            last = self.cycle
            if self._timer:
                self._timer.cancel()
            if last is None or last.response_complete:
                self._timer = self.loop.call_later(
                    seconds, lambda: self.transport.abort() if self.cycle is last else None
                )

        def pause_writing(self) -> None:
            super().pause_writing()
            self._since = self.loop.time()
            self._taking = self.loop.call_later(max(self._left, 0.0), self._reset)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._taking:
                self._taking.cancel()
            self._left -= self.loop.time() - self._since

        def _reset(self) -> None:
            # Without this the system would keep what the client has not taken.
            descriptor = self.transport.get_extra_info("socket").fileno()
            with contextlib.suppress(OSError):  # it is closed
                with socket.socket(fileno=os.dup(descriptor)) as same:
                    same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, DROP)
            self.transport.abort()

    return Protocol


class Server(uvicorn.Server):
    """uvicorn's server; SIGINT, SIGTERM or SIGHUP end it after what it accepted is answered.

    ended_by: the signal's number, 0 before one. A second signal ends the process at once. A signal
    that was ignored when the server began stays ignored.
    """

    ended_by = 0

    def handle_exit(self, sig: int, frame) -> None:
        name = signal.Signals(sig).name
        if self.ended_by:
            signals.leave(128 + sig, f"received {name}; requests under way are not answered")
        self.ended_by, self.should_exit = sig, True
        with contextlib.suppress(OSError):  # stderr is closed, or its terminal
            message = "answering what was accepted, then ending; a second signal ends at once"
            os.write(2, f"stepsearch_jax: received {name}: {message}\n".encode())

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Has `handle_exit` hear the signals within the context."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {number: signal.getsignal(number) for number in ENDING}
        heard = {number: it for number, it in kept.items() if it not in (signal.SIG_IGN, None)}
        for number in heard:
            signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in heard.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers what was accepted, however long that takes, and closes all connections.

        Clients hear with their answer that the connection ends. A connection without a request may
        bring one for IDLE_S more: it was perhaps under way.
        """
        state, loop = self.server_state, asyncio.get_running_loop()
        state.default_headers = state.default_headers + CLOSING
        for connection in state.connections:
            cycle = connection.cycle
            if cycle is not None and not cycle.response_started:
                cycle.default_headers = cycle.default_headers + CLOSING
        for listener in sockets or ():
            await self._accept_waiting(listener)
        for server in self.servers:
            server.close()
        idle_end = loop.time() + IDLE_S
        while state.connections or state.tasks:
            await asyncio.sleep(POLL_S)
            if loop.time() > idle_end:
                for connection in list(state.connections):
                    if not connection.transport.is_closing():
                        connection.shutdown()  # closes it if it has no request
        await self.lifespan.shutdown()

    async def _accept_waiting(self, listener: socket.socket) -> None:
        """Accepts who has connected already; closing the listener would hang up on them."""
        loop = asyncio.get_running_loop()
        make = lambda: self.config.http_protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                await loop.connect_accepted_socket(make, connection)
