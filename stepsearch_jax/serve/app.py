"""The application behind `serve`: reads a request, searches, and answers in pieces.

A piece of an answer is searched for and written when the client has taken the piece before it, so
a client that does not read costs one piece, however long its answer would be. All pieces together
stay within a budget of bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import prometheus_client
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stepsearch_jax.records import Document
from stepsearch_jax.search.contents import render_contents
from stepsearch_jax.serve.limits import Budget, Limits

logger = logging.getLogger("stepsearch_jax")

PIECE_BYTES = 1 << 16  # of an answer; also what the transport of a connection holds
# Of a large request, so many documents are searched for before others have their turn.
DOCUMENTS_AT_ONCE = 192
# Of each body, what the budget does not count: small requests always get through.
UNCOUNTED_BYTES = 1 << 16
BODY = "http.response.body"
ABORT = "abort"  # key of an ASGI scope's state: the function that cuts its connection off


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
    """-> queries, topk, whether scores are wanted.

    Search-R1's clients also send no queries, and servers of theirs read a topk of 0 or null as
    their own. Raises RefusedError for anything else than a request within the limits.
    """
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
    if len(queries) > limits.queries:
        raise RefusedError(
            400, f"'queries' holds {len(queries)}; up to {limits.queries} are answered at a time"
        )
    if max(map(len, queries), default=0) > limits.query_characters:
        raise RefusedError(400, f"a query is longer than {limits.query_characters} characters")
    if topk is not None and (type(topk) is not int or not 0 <= topk <= limits.topk):
        raise RefusedError(
            400,
            f"'topk' must be an integer from 1 to {limits.topk}, or 0 for the server's "
            f"{default_topk}",
        )
    if type(scores) is not bool:
        raise RefusedError(400, "'return_scores' must be true or false")
    return queries, topk or default_topk, scores


def write_answer(
    engine: Engine, queries: Sequence[str], topk: int, with_scores: bool
) -> Iterator[str]:
    """Searches, and yields the answer's JSON in fragments of a document or less.

    They are ASCII, so that halves of surrogate pairs pass.
    """
    yield '{"result": ['
    at_once = max(1, DOCUMENTS_AT_ONCE // topk)
    for start in range(0, len(queries), at_once):
        found = engine.search(queries[start : start + at_once], topk)
        for row, (ids, scores) in enumerate(zip(*found, strict=True), start):
            yield ", [" if row else "["
            comma = ""
            for i, score in zip(ids.tolist(), scores.tolist(), strict=True):
                if i >= 0:
                    shown = show_document(i, engine.documents[i])
                    entry = {"document": shown, "score": score} if with_scores else shown
                    yield comma + json.dumps(entry)
                    comma = ", "
            yield "]"
    yield f'], "manifest": {json.dumps(engine.describe(topk))}}}'


def show_document(row: int, document: Document) -> dict[str, str]:
    """A document in the form of Search-R1's servers, with title and text."""
    return {
        "id": str(row),
        "title": document.title,
        "text": document.text,
        "contents": render_contents(document),
    }


class Answer:
    """The answer to one request, made in pieces, by one thread at a time.

    queries: how many it answers, from the first piece on; is_whole: whether the last piece is made.
    """

    def __init__(self, body: bytes, engine: Engine, default_topk: int, limits: Limits):
        self.queries, self.is_whole = 0, False
        self._body = body
        self._engine, self._default_topk, self._limits = engine, default_topk, limits
        self._fragments: Iterator[str] | None = None

    def make_piece(self) -> bytes:
        """The next piece: PIECE_BYTES and at most a document more.

        Raises RefusedError, at the first piece, for a bad request.
        """
        if self._fragments is None:
            queries, topk, with_scores = parse_request(self._body, self._default_topk, self._limits)
            self._body, self.queries = b"", len(queries)
            self._fragments = write_answer(self._engine, queries, topk, with_scores)
        parts, size = [], 0
        for part in self._fragments:
            parts.append(part)
            size += len(part)
            if size >= PIECE_BYTES:
                break
        else:
            self.is_whole = True
        return "".join(parts).encode("ascii")


class Service:
    """Answers requests. Its methods run in one event loop; engine.search in threads."""

    def __init__(self, engine: Engine, default_topk: int, limits: Limits):
        self._engine, self._default_topk, self._limits = engine, default_topk, limits
        self._threads = ThreadPoolExecutor(limits.searches, "serve")
        self._turns = asyncio.Semaphore(limits.searches)
        # Of long answers so few wait for a turn at a time: short ones pass the others by.
        self._later_turns = asyncio.Semaphore(limits.searches)
        self._bodies, self._answers = Budget(limits.held_bytes), Budget(limits.held_bytes)
        self._busy = 0  # requests whose answer has not begun

        # What is counted, for /metrics.
        self._registry = registry = prometheus_client.CollectorRegistry()
        self._requests = prometheus_client.Counter(
            "stepsearch_requests", "requests to /retrieve", ["status"], registry=registry
        )
        self._searched = prometheus_client.Counter(
            "stepsearch_queries", "queries answered", registry=registry
        )
        self._unfinished = prometheus_client.Counter(
            "stepsearch_unfinished",
            "answers that were begun and not finished: the client left or was cut off, or a later "
            "part of the search failed",
            registry=registry,
        )
        self._seconds = prometheus_client.Histogram(
            "stepsearch_seconds",
            "seconds from a request's headers to the beginning of its answer",
            registry=registry,
        )
        for name, text, value in (
            ("stepsearch_busy", "requests whose answer has not begun", lambda: self._busy),
            ("stepsearch_held_bytes", "bytes of answers not taken yet", lambda: self._answers.held),
        ):
            prometheus_client.Gauge(name, text, registry=registry).set_function(value)

    async def retrieve(self, request: Request) -> ASGIApp:
        """POST /retrieve."""
        start = time.perf_counter()
        held = contextlib.ExitStack()  # frees the body when the answer ends
        self._busy += 1
        try:
            response, status = await self._begin_answer(request, held), 200
        except RefusedError as error:
            response, status = _answer({"error": str(error)}, error.status), error.status
            response.headers["Connection"] = "close"  # what may follow of this body is not read
        except ClientDisconnect:
            response, status = _answer({"error": "the client has gone"}, 400), 400
        except Exception as error:  # of the index
            logger.exception("the search failed")
            message = f"the search failed: {type(error).__name__}"
            response, status = _answer({"error": message}, 500), 500
        finally:
            self._busy -= 1
        if status != 200:
            held.close()
        self._requests.labels(status).inc()
        self._seconds.observe(time.perf_counter() - start)
        return response

    async def _begin_answer(self, request: Request, held: contextlib.ExitStack) -> ASGIApp:
        if self._busy > self._limits.searches + self._limits.waiting:
            raise RefusedError(503, "too many requests at once; try again")
        body = await self._read_body(request, held)
        answer = Answer(body, self._engine, self._default_topk, self._limits)
        pieces = self._make_pieces(answer)
        first = await anext(pieces)
        return functools.partial(self._send_answer, answer, first, pieces, held)

    async def _read_body(self, request: Request, held: contextlib.ExitStack) -> bytes:
        limits, body, counted = self._limits, bytearray(), 0
        try:
            async with asyncio.timeout(limits.transfer_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limits.body_bytes:
                        message = f"the body is longer than {limits.body_bytes} bytes"
                        raise RefusedError(413, message)
                    more = max(0, len(body) - UNCOUNTED_BYTES) - counted
                    if not self._bodies.try_take(more):
                        raise RefusedError(503, "too many long requests at once; try again")
                    held.callback(self._bodies.free, more)
                    counted += more
        except TimeoutError:
            raise RefusedError(
                408, f"the body did not arrive within {limits.transfer_seconds:g} seconds"
            ) from None
        return bytes(body)

    async def _make_pieces(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The pieces. Each counts as held until the next one is asked for.

        A piece that waits for the budget keeps its turn: at most `searches` pieces do not count.
        """
        loop, is_first = asyncio.get_running_loop(), True
        while not answer.is_whole:
            async with contextlib.AsyncExitStack() as turns:
                if not is_first:
                    await turns.enter_async_context(self._later_turns)
                await turns.enter_async_context(self._turns)
                piece = await loop.run_in_executor(self._threads, answer.make_piece)
                await self._answers.take(len(piece))
            try:
                yield piece
            finally:
                self._answers.free(len(piece))
            is_first = False

    async def _send_answer(
        self,
        answer: Answer,
        first: bytes,
        pieces: AsyncGenerator[bytes, None],
        held: contextlib.ExitStack,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """The response of ASGI: `first`, and the other pieces if the answer is longer."""
        headers = [(b"content-type", b"application/json")]
        gone, is_sent = None, False  # gone: a task that ends when the client has left
        if answer.is_whole:
            headers.append((b"content-length", str(len(first)).encode()))
        else:
            gone = asyncio.ensure_future(_wait_until_gone(receive))
        with held:
            try:
                async with contextlib.aclosing(pieces):
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    piece: bytes | None = first
                    while piece is not None:
                        await send({"type": BODY, "body": piece, "more_body": True})
                        # It returns when the client has taken the piece, but for 64 KiB at most.
                        await send({"type": BODY, "body": b"", "more_body": True})
                        if gone is not None and gone.done():
                            break
                        piece = await anext(pieces, None)
                    is_sent = piece is None
            except Exception:  # of the index
                logger.exception("the search failed")
            finally:
                if gone is not None:
                    gone.cancel()
        if is_sent:
            self._searched.inc(answer.queries)
            await send({"type": BODY, "body": b"", "more_body": False})
        else:
            self._unfinished.inc()
            await _cut_off(scope)

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return _answer({"status": "ok", **self._engine.describe(self._default_topk)})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(
            prometheus_client.generate_latest(self._registry),
            media_type=prometheus_client.CONTENT_TYPE_LATEST,
        )


def make_app(engine: Engine, default_topk: int, limits: Limits) -> Starlette:
    """The application, for any ASGI server."""
    service = Service(engine, default_topk, limits)
    return Starlette(
        routes=[
            Route("/retrieve", service.retrieve, methods=["POST"]),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
        ]
    )


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _answer(value, status: int = 200) -> Response:
    # ASCII only, so that halves of surrogate pairs pass.
    return Response(json.dumps(value), status, media_type="application/json")


async def _cut_off(scope: Scope) -> None:
    """Resets the connection, so that half an answer does not pass for a whole one."""
    if abort := scope.get("state", {}).get(ABORT):
        abort()
        await asyncio.sleep(0)  # uvicorn hears of it
