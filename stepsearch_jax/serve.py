"""Serves a search index over HTTP, with the request and the answer of Search-R1's /retrieve.

    python -m stepsearch_jax.serve --index FOLDER [--port 8000]
        an index that `python -m stepsearch_jax.prepare index` made
    python -m stepsearch_jax.serve --config=configs/X.py [--config.key=value …]
        the corpus of a config, by its search.kind: bm25 or dense

POST /retrieve  {"queries": ["…"], "topk": 3, "return_scores": true}
             -> {"result": [[{"document": {"id", "title", "text", "contents"}, "score": 9.1}, …],
                 …], "manifest": …}, one list for each query; without scores, plain documents.
                An id is a row of the corpus.
GET /health     the manifest: corpus (its hash), documents, retriever, k, settings
GET /metrics    counts and times, for Prometheus

A bad request gets status 400, 408 (too slow) or 413 (too large) with {"error": …}; 503 means: busy,
try again; 500: the index failed. Clients that send or read too slowly are cut off.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from stepsearch_jax import cli
from stepsearch_jax.records import Document
from stepsearch_jax.search.bm25 import load_index
from stepsearch_jax.search.callback import MAX_QUERY_CHARACTERS
from stepsearch_jax.search.remote import MAX_BODY_BYTES, render_contents

logger = logging.getLogger("stepsearch_jax")

BACKLOG = 2048  # connections that may wait to be accepted


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how much is done at once. FLAGS explains each."""

    body_bytes: int
    transfer_seconds: float
    queries: int
    query_characters: int
    topk: int
    searches: int
    waiting: int


@dataclasses.dataclass(frozen=True)
class Engine:
    """What is served. search: queries, k -> ids and scores [q, k]; describe: k -> manifest."""

    search: Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]]
    documents: Sequence[Document]
    describe: Callable[[int], dict]


class RefusedError(Exception):
    """A request that is answered with an error. status: HTTP's."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def parse_request(body: bytes, default_topk: int, limits: Limits) -> tuple[list[str], int, bool]:
    """-> queries, topk, whether scores are wanted. Raises RefusedError for anything else than a
    request within the limits."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is not JSON") from None
    if not isinstance(asked, dict):
        raise RefusedError(400, "the body must be an object with the field 'queries'")
    queries, topk = asked.get("queries"), asked.get("topk")
    scores = asked.get("return_scores", False)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RefusedError(400, "'queries' must be a list of strings")
    if not 1 <= len(queries) <= limits.queries:
        raise RefusedError(
            400,
            f"'queries' holds {len(queries)}; from 1 to {limits.queries} are answered at a time",
        )
    if max(map(len, queries)) > limits.query_characters:
        raise RefusedError(400, f"a query is longer than {limits.query_characters} characters")
    topk = default_topk if topk is None else topk
    if type(topk) is not int or not 1 <= topk <= limits.topk:
        raise RefusedError(400, f"'topk' must be an integer from 1 to {limits.topk}")
    if type(scores) is not bool:
        raise RefusedError(400, "'return_scores' must be true or false")
    return queries, topk, scores


def make_app(engine: Engine, default_topk: int, limits: Limits) -> Starlette:
    """The application, for any ASGI server."""
    threads = ThreadPoolExecutor(limits.searches, "serve")
    busy = 0  # requests under way; only touched by the event loop

    # What is counted, for /metrics.
    registry = prometheus_client.CollectorRegistry()
    requests = prometheus_client.Counter(
        "stepsearch_requests", "requests to /retrieve", ["status"], registry=registry
    )
    searched = prometheus_client.Counter(
        "stepsearch_queries", "queries answered", registry=registry
    )
    seconds = prometheus_client.Histogram(
        "stepsearch_seconds", "seconds from a request's headers to its answer", registry=registry
    )
    prometheus_client.Gauge(
        "stepsearch_busy", "requests under way", registry=registry
    ).set_function(lambda: busy)

    def answer(value, status: int = 200) -> Response:
        # ASCII only, so that halves of surrogate pairs pass.
        return Response(json.dumps(value), status, media_type="application/json")

    # A request: its body is read within the limits, a thread searches, the answer is sent.
    async def read_body(request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(limits.transfer_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limits.body_bytes:
                        raise RefusedError(
                            413, f"the body is longer than {limits.body_bytes} bytes"
                        )
        except TimeoutError:
            raise RefusedError(
                408, f"the body did not arrive within {limits.transfer_seconds:g} seconds"
            ) from None
        return bytes(body)

    def search(body: bytes) -> tuple[Response, int]:
        queries, topk, with_scores = parse_request(body, default_topk, limits)
        result = []
        for ids, scores in zip(*engine.search(queries, topk), strict=True):
            found = []
            for i, score in zip(ids.tolist(), scores.tolist(), strict=True):
                if i >= 0:
                    document = engine.documents[i]
                    shown = {
                        "id": str(i),
                        "title": document.title,
                        "text": document.text,
                        "contents": render_contents(document),
                    }
                    found.append({"document": shown, "score": score} if with_scores else shown)
            result.append(found)
        return answer({"result": result, "manifest": engine.describe(topk)}), len(queries)

    async def retrieve(request: Request) -> Response:
        nonlocal busy
        start, answered = time.perf_counter(), 0
        busy += 1
        try:
            if busy > limits.searches + limits.waiting:
                raise RefusedError(503, "too many requests at once; try again")
            body = await read_body(request)
            response, answered = await asyncio.get_running_loop().run_in_executor(
                threads, search, body
            )
        except RefusedError as error:
            response = answer({"error": str(error)}, error.status)
            response.headers["Connection"] = "close"  # what may follow of this body is not read
        except ClientDisconnect:
            response = answer({"error": "the client has gone"}, 400)
        except Exception as error:  # of the index
            logger.exception("the search failed")
            response = answer({"error": f"the search failed: {type(error).__name__}"}, 500)
        finally:
            busy -= 1
        requests.labels(response.status_code).inc()
        searched.inc(answered)
        seconds.observe(time.perf_counter() - start)
        return response

    # The other two addresses.
    async def health(request: Request) -> Response:
        return answer({"status": "ok", **engine.describe(default_topk)})

    async def metrics(request: Request) -> Response:
        return Response(
            prometheus_client.generate_latest(registry),
            media_type=prometheus_client.CONTENT_TYPE_LATEST,
        )

    return Starlette(
        routes=[
            Route("/retrieve", retrieve, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", metrics),
        ]
    )


def make_protocol(seconds: float) -> type[AutoHTTPProtocol]:
    """uvicorn's side of a connection, with a time limit for the client.

    By itself it would wait for ever for the rest of a request's headers, for a body that nobody
    reads, and for a client to take its answer. Here a connection on which no request is being
    answered is cut off after so many seconds; uvicorn closes one that is idle sooner.
    """

    class Protocol(AutoHTTPProtocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._limit_wait()

        def on_response_complete(self) -> None:
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

    return Protocol


FLAGS = {  # of the limits: default, help
    "body_bytes": (MAX_BODY_BYTES, "longest body of a request"),
    "queries": (512, "queries a request"),
    "transfer_seconds": (
        10.0,
        "time for a request's headers to arrive, again for its body, and again for its answer to "
        "be taken",
    ),
    "query_characters": (MAX_QUERY_CHARACTERS, "longest query"),
    "topk": (100, "most documents a query"),
    "searches": (4, "requests searched for at a time"),
    "waiting": (256, "requests that may wait for it; more are answered 503"),
}


def open_engine(options: argparse.Namespace) -> Engine:
    """The index that --index or --config names."""
    if options.index:
        index = load_index(options.index)
        return Engine(index.search, index.documents, index.describe)
    from stepsearch_jax.run.corpus import open_corpus  # it brings jax, which an index does not need

    source, index = open_corpus(options.config)
    return Engine(index.search, source.documents, index.describe)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until it is stopped. An error that a user can correct ends it with one line."""
    # The flags.
    parser = cli.make_parser("serve", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--index",
        type=cli.name_path,
        metavar="FOLDER",
        help="made by python -m stepsearch_jax.prepare index",
    )
    what.add_argument(
        "--config", metavar="FILE", help="configs/X.py; --config.KEY=VALUE changes a key"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 = all (default: %(default)s; there is no password)",
    )
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--topk",
        type=int,
        default=3,
        help="documents a query if a request does not say (default: %(default)s)",
    )
    for name, (default, text) in FLAGS.items():
        parser.add_argument(
            f"--max-{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    options = cli.parse_flags(parser, arguments)
    limits = Limits(**{name: getattr(options, f"max_{name}") for name in FLAGS})
    # Bad flags, a missing index and a taken address are reported before anything is served.
    with cli.one_line_errors("run the same command again; what is already prepared is kept"):
        for name, value in dataclasses.asdict(limits).items():
            if not value >= (0 if name == "waiting" else 1e-3 if name == "transfer_seconds" else 1):
                raise ValueError(f"--max-{name.replace('_', '-')}={value} is too little")
        if not 1 <= options.topk <= limits.topk:
            raise ValueError(f"--topk={options.topk} must lie in 1 to --max-topk={limits.topk}")
        if not 1 <= options.port < 1 << 16:
            raise ValueError(f"--port={options.port} must lie in 1 to 65535")
        engine = open_engine(options)
        listener = listen(options.host, options.port)
    # The server, until Ctrl-C or a signal ends it.
    count = len(engine.documents)
    print(
        f"serving {count} document{'s' * (count > 1)} at http://{options.host}:{options.port}",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        settings = uvicorn.Config(
            make_app(engine, options.topk, limits),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
            http=make_protocol(limits.transfer_seconds),
        )
        uvicorn.Server(settings).run([listener])


if __name__ == "__main__":
    main()
