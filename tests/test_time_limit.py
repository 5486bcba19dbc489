"""Requests end in time, whatever part of its answer the other side sends a byte at a time."""

import contextlib
import socket
import threading
import time

import pytest
import running
import urllib3

from stepsearch_jax.search.time_limit import limit_connections, limit_time

HEAD = b"HTTP/1.1 200 OK\r\n"
DRIPS = {  # what is sent at once, and what again and again
    "first line": (b"", b"H"),
    "headers": (HEAD + b"X: ", b"x"),
    "many headers": (HEAD, b"X: x\r\n"),
    "not yet": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (HEAD + b"Content-Length: 1000\r\n\r\n", b"x"),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "body without end": (HEAD + b"Connection: close\r\n\r\n", b"x"),
}


@contextlib.contextmanager
def dripping(before: bytes, drop: bytes):
    """A server that answers every request with `before`, then repeats `drop` -> its address."""
    listener, stop = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def answer(client):
        with contextlib.suppress(OSError), client:
            while client.recv(1 << 16):
                client.sendall(before)
                while drop and not stop.wait(0.05):
                    client.sendall(drop)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=listener.accept()[:1], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.slow
@pytest.mark.parametrize("before,drop", DRIPS.values(), ids=DRIPS)
def test_a_dripping_answer_ends_in_time(before, drop):
    http, start = limit_connections(urllib3.PoolManager(retries=False)), time.monotonic()
    with (
        dripping(before, drop) as url,
        pytest.raises(urllib3.exceptions.TimeoutError, match="took longer than 0.4 s"),
    ):
        with limit_time(0.4):
            assert http.request("GET", url, timeout=5.0).data is not None
    assert 0.3 < time.monotonic() - start < 3


def test_a_dripping_proxy_ends_in_time():
    with (
        dripping(*DRIPS["headers"]) as url,
        pytest.raises(urllib3.exceptions.TimeoutError, match="took longer than 0.4 s"),
    ):
        http = limit_connections(urllib3.ProxyManager(url, retries=False))
        with limit_time(0.4):
            http.request("GET", "https://nowhere.invalid", timeout=5.0)


def test_answers_in_time_and_other_errors_are_left_alone():
    http = limit_connections(limit_connections(urllib3.PoolManager(retries=False)))
    with dripping(HEAD + b"Content-Length: 2\r\n\r\nok", b"") as url:
        for _ in range(2):
            with limit_time(0.2):
                assert http.request("GET", url).data == b"ok"
            time.sleep(0.3)  # longer than the limit; the connection stays
        assert http.connection_from_url(url).num_connections == 1
        with pytest.raises(KeyError), limit_time(5.0):
            raise KeyError
    with pytest.raises(urllib3.exceptions.NewConnectionError), limit_time(5.0):
        http.request("GET", f"http://127.0.0.1:{running.free_port()}")


def test_what_begins_after_the_end_fails_at_once():
    http = limit_connections(urllib3.PoolManager(retries=False))
    with dripping(HEAD + b"Content-Length: 2\r\n\r\nok", b"") as url:
        for _ in range(2):  # with a new connection and with one that is there
            with (
                pytest.raises(urllib3.exceptions.TimeoutError, match="took longer"),
                limit_time(0.05),
            ):
                time.sleep(0.3)
                http.request("GET", url)
            with limit_time(5.0):
                assert http.request("GET", url).data == b"ok"
