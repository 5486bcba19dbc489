"""A time limit for a whole HTTP request. urllib3 and requests only limit each wait for the other
side, which may send a byte now and then for ever."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import urllib3
from urllib3.connection import HTTPConnection

_of_thread = threading.local()  # .limit: the one under which this thread works


class _Limit:
    """over: whether time has run out; sock: what is to be shut then."""

    over, sock = False, None

    def take(self, sock: socket.socket) -> None:
        self.sock = sock
        if self.over:
            raise urllib3.exceptions.TimeoutError

    def end(self) -> None:
        """Whoever waits for the socket wakes up."""
        self.over = True
        if self.sock is not None:
            with contextlib.suppress(OSError):  # it is closed
                self.sock.shutdown(socket.SHUT_RDWR)


class _Limited(HTTPConnection):
    """What makes a connection show its socket to the limit of its thread."""

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        _of_thread.limit.take(sock)  # a proxy may be asked next
        return sock

    def connect(self) -> None:
        super().connect()
        _of_thread.limit.take(self.sock)  # with TLS it is another one

    def getresponse(self):
        _of_thread.limit.take(self.sock)  # which may have been there before
        return super().getresponse()


def limit_connections(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    """The manager; its connections from now on obey `limit_time`, and work within it alone."""

    def limit(pool: type) -> type:
        connection = pool.ConnectionCls
        if issubclass(connection, _Limited):
            return pool
        limited = type(connection.__name__, (_Limited, connection), {})
        return type(pool.__name__, (pool,), {"ConnectionCls": limited})

    manager.pool_classes_by_scheme = {
        scheme: limit(pool) for scheme, pool in manager.pool_classes_by_scheme.items()
    }
    return manager


@contextlib.contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Within the context this thread's request may take so long, up to the last byte of its answer;
    then urllib3's TimeoutError is raised.

    Only the attempt to connect is not cut short: urllib3 has a time limit for it, for each address
    of the server's name and for TLS.
    """
    limit = _of_thread.limit = _Limit()
    timer = threading.Timer(seconds, limit.end)
    timer.daemon = True
    timer.start()
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
        if not limit.over:
            raise
    finally:
        timer.cancel()
        del _of_thread.limit
    if limit.over:  # also without an error: an answer of no given length ends with its socket
        message = f"the answer took longer than {seconds:g} s"
        raise urllib3.exceptions.TimeoutError(message) from error
