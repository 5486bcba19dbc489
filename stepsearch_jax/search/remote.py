"""Search by a server with Search-R1's /retrieve, such as `python -m stepsearch_jax.serve`: time
limits, repeated attempts, many queries a request.

The server must hold the same corpus. A document that it sends is compared with the one that has the
same id here; if there is none, or it is another one, it is found by its contents: servers may send
no ids, or ids of their own. A server may also send no scores, more documents than were asked for,
or one document several times.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import numpy as np
import urllib3
from urllib3.util import Url, parse_url

from stepsearch_jax.addresses import hide_login
from stepsearch_jax.records import Document
from stepsearch_jax.search.cache import describe_search
from stepsearch_jax.search.callback import SomeFailedError
from stepsearch_jax.search.contents import Finder, render_contents, spell
from stepsearch_jax.search.time_limit import limit_connections, limit_time

MAX_ANSWER_BYTES = 1 << 26
MAX_BODY_BYTES = 1 << 20  # of a request, in a server's default settings
_AT_ONCE = 32  # requests under way
_SAID = {"corpus": str, "retriever": str, "settings": dict}  # of a manifest: what must not change
_SERVER_AT_FAULT = (408, 429, 500, 502, 503, 504)  # worth another attempt
_QUERY_AT_FAULT = (400, 413)  # perhaps: worth an attempt for each half of the queries


class _RefusedError(ValueError):
    """A request that the server does not take, perhaps for one of its queries."""


def read_address(url: str) -> str:
    """A server's address in one form; it may end with /retrieve, as Search-R1's does, and may hold
    a user and a password. Raises ValueError, without these, for anything that is no address."""
    try:
        parsed = parse_url(url.rstrip("/").removesuffix("/retrieve"))
    except urllib3.exceptions.LocationParseError:
        parsed = Url()
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        shown = hide_login(url).rpartition("@")[2]  # a slash in a password would end a login
        raise ValueError(
            f"{shown!r} is not the address of a search server, such as http://localhost:8000 "
            "(config.search.url, or an engine remote:URL); signs in a user or password that have a "
            "meaning in addresses are written as %2F, %40, …"
        )
    return parsed.url.rstrip("/")


def _write_headers(address: str) -> dict[str, str]:
    """Of a request to an address, which may hold a user and a password."""
    headers = {"Content-Type": "application/json"}
    if login := parse_url(address).auth:
        encoded = base64.b64encode(unquote(login).encode()).decode()
        headers["Authorization"] = f"Basic {encoded}"
    return headers


class _UnknownError(ValueError):
    """A document that is none of the corpus here."""


def _read_number(value: object) -> int:
    """A server's id as a row of the corpus; -1 if it cannot be one."""
    try:
        return int(value)  # type: ignore[call-overload]  # anything may come
    except (TypeError, ValueError, OverflowError):
        return -1


class RemoteIndex:
    """N documents that a server searches. May be searched from several threads at once.

    documents: the same ones, here; corpus: their hash. attempt_s: time for one attempt's connection
    and again for its answer; attempts: before a search has failed; backoff_s: longest first pause
    between two, doubled each time; batch: queries in one request. ended: is called whenever a
    request is answered or given up, and often while documents are listed by their contents. Raises
    ValueError for a bad address and for numbers that are too small.
    """

    def __init__(
        self,
        url: str,
        documents: Sequence[Document],
        corpus: str,
        attempt_s: float,
        attempts: int,
        backoff_s: float,
        batch: int,
        ended: Callable[[], None] = lambda: None,
    ):
        if not (attempt_s > 0 and attempts >= 1 and backoff_s >= 0 and batch >= 1):
            raise ValueError(
                f"config.search.attempt_s={attempt_s} must be more than 0, attempts={attempts} and "
                f"batch={batch} at least 1, and backoff_s={backoff_s} at least 0"
            )
        address = read_address(url)
        self._url, self._headers = hide_login(address), _write_headers(address)
        self._documents, self._ended = documents, ended
        self._finder = Finder(documents, ended)
        self._attempt_s, self._attempts, self._backoff_s = attempt_s, attempts, backoff_s
        self._batch = batch
        self._http = limit_connections(urllib3.PoolManager(maxsize=_AT_ONCE, retries=False))
        self._threads = ThreadPoolExecutor(_AT_ONCE, "remote search")
        # Also holds retriever and settings, once the server has said them.
        self._about: dict[str, Any] = {"corpus": corpus}

    def __len__(self) -> int:
        return len(self._documents)

    def check(self) -> None:
        """Asks the server what it holds. Raises ValueError if it does not answer or names another
        corpus; a server without /health passes."""
        try:
            manifest = self._repeat("GET", "/health", None)
        except urllib3.exceptions.HTTPError as error:
            raise ValueError(
                f"the search server at {self._url} does not answer: {type(error).__name__}: {error}"
            ) from error
        except ValueError:
            manifest = None
        self._about |= self._read_manifest(manifest)

    def _read_manifest(self, manifest: object) -> dict:
        """The corpus, retriever and settings that a server names in /health and with every answer;
        each may be missing.

        Raises ValueError if the corpus is another one than here, or if retriever or settings have
        changed: another index may have taken the server's place.
        """
        manifest = manifest if isinstance(manifest, dict) else {}
        said = {
            name: manifest[name]
            for name, kind in _SAID.items()
            if isinstance(manifest.get(name), kind)
        }
        for name, value in said.items():
            first = self._about.get(name, value)
            if value != first and name == "corpus":
                raise ValueError(
                    f"the search server at {self._url} holds the corpus {value}, but this run "
                    f"needs {first}: serve an index of the same documents in the same order"
                )
            if value != first:
                raise ValueError(
                    f"the search server at {self._url} has changed: its {name}, at first {first}, "
                    f"is now {value}: serve the first index again, or start a new run"
                )
        return said

    def describe(self, k: int) -> dict:
        """The manifest of results for k documents (`cache.describe_search`), with the server's
        retriever and settings."""
        settings = {"url": self._url, "retriever": self._about.get("retriever")}
        settings |= self._about.get("settings", {})
        return describe_search(self._about["corpus"], len(self), "remote", k, settings)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The server's first k different documents for each of q queries: (ids [q, k] int32, best
        first, -1 where there are no more; scores [q, k] float32, 0 there and where it sends none).

        Raises urllib3's HTTPError when all attempts have failed, ValueError for an answer that
        makes no sense or comes from another index, and SomeFailedError (with the ids) if the server
        refuses some of the queries even alone.
        """
        ids, scores = self._make_empty(len(queries), k)
        refused: dict[int, str] = {}
        every = range(len(queries))
        batches = [every[start : start + self._batch] for start in every[:: self._batch]]
        search_rows = lambda rows: self._search_batch(queries[rows.start : rows.stop], k)
        while batches:
            answers = list(self._threads.map(search_rows, batches))
            halves = []
            for rows, answer in zip(batches, answers):
                if not isinstance(answer, str):
                    ids[rows.start : rows.stop], scores[rows.start : rows.stop] = answer
                elif len(rows) > 1:  # perhaps because of only one of them
                    halves += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
                else:
                    refused[rows.start] = answer
            batches = halves
        if refused:
            raise SomeFailedError(ids, refused)
        return ids, scores

    def _search_batch(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray] | str:
        """Ids and scores, or why these queries cannot be asked for together."""
        body = json.dumps({"queries": list(queries), "topk": k, "return_scores": True})
        if len(body) > MAX_BODY_BYTES:
            return (
                f"a request of {len(body)} bytes is longer than the {MAX_BODY_BYTES} "
                "that a server takes"
            )
        try:
            answer = self._repeat("POST", "/retrieve", body)
        except _RefusedError as refusal:
            return str(refusal)
        finally:
            self._ended()
        self._read_manifest(answer.get("manifest") if isinstance(answer, dict) else None)
        ids, scores = self._make_empty(len(queries), k)
        try:
            for row, (found, _) in enumerate(zip(answer["result"], queries, strict=True)):
                best = self._read_documents(found, k)
                ids[row, : len(best)] = list(best)
                scores[row, : len(best)] = list(best.values())
        except _UnknownError:
            raise
        except (TypeError, LookupError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"the answer of {self._url} does not have the form of /retrieve "
                f"({type(error).__name__}: {error})"
            ) from None
        return ids, scores

    @staticmethod
    def _make_empty(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((queries, k), -1, np.int32), np.zeros((queries, k), np.float32)

    def _read_documents(self, found: list[dict], k: int) -> dict[int, float]:
        """The first k different documents of one query: id -> score."""
        best: dict[int, float] = {}
        for entry in found:
            if len(best) == k:
                break
            has_score = "document" in entry  # without scores there are plain documents
            row = self._find_document(entry["document"] if has_score else entry)
            score = entry.get("score") if has_score else None
            best.setdefault(row, 0.0 if score is None else float(score))
        return best

    def _find_document(self, shown: dict) -> int:
        """The id, here, of a document that the server sends."""
        if "contents" in shown:
            sent = shown["contents"]
        else:
            sent = render_contents(Document(0, shown["title"], shown["text"]))
        number = _read_number(shown.get("id"))
        if 0 <= number < len(self._documents):
            if spell(sent) == spell(render_contents(self._documents[number])):
                return number
        row = self._finder.find(sent)
        if row is None:
            name = f"the id {shown['id']!r}" if "id" in shown else "no id"
            raise _UnknownError(
                f"the answer of {self._url} holds a document with {name} whose contents "
                f"({sent[:60]!r}…) are none of the {len(self._documents)} documents here: serve "
                "the same documents"
            )
        return row

    def _repeat(self, method: str, path: str, body: str | None) -> Any:
        """The answer of the first attempt that succeeds. Pauses are random, so that many clients do
        not return at once."""
        for attempt in range(self._attempts):
            try:
                return self._ask(method, path, body)
            except urllib3.exceptions.HTTPError:
                if attempt + 1 == self._attempts:
                    raise
            time.sleep(self._backoff_s * 2**attempt * random.uniform(0.5, 1.0))

    def _ask(self, method: str, path: str, body: str | None) -> Any:
        """The answer to one attempt, which takes 2 * attempt_s at most."""
        with limit_time(2 * self._attempt_s):
            answer = self._http.request(
                method,
                self._url + path,
                body=body,
                preload_content=False,
                headers=self._headers,
                timeout=urllib3.Timeout(self._attempt_s),
            )
            try:
                raw = bytearray()
                while part := answer.read1(1 << 16):
                    raw += part
                    if len(raw) > MAX_ANSWER_BYTES:
                        raise ValueError(
                            f"the answer of {self._url} is longer than {MAX_ANSWER_BYTES} bytes"
                        )
            except BaseException:
                answer.close()
                raise
        answer.release_conn()
        message = f"{self._url} answered {answer.status}: {raw[:200].decode(errors='replace')}"
        if answer.status == 401:
            message += (
                "; write config.search.url as http://USER:PASSWORD@HOST (run folders do not keep "
                "user and password: give it again with every command)"
            )
        if answer.status in _SERVER_AT_FAULT:
            raise urllib3.exceptions.HTTPError(message)
        if answer.status != 200:
            raise (_RefusedError if answer.status in _QUERY_AT_FAULT else ValueError)(message)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            message = (
                f"the answer of {self._url} is not JSON ({error}): "
                f"{raw[:200].decode(errors='replace')!r}"
            )
        if "Content-Length" not in answer.headers and not answer.chunked:
            # Its end is that of the connection, which may have come too soon.
            raise urllib3.exceptions.HTTPError(message)
        raise ValueError(message)


def open_remote(
    url: str,
    documents: Sequence[Document],
    corpus: str,
    attempt_s: float,
    attempts: int,
    backoff_s: float,
    batch: int,
    ended: Callable[[], None] = lambda: None,
) -> RemoteIndex:
    """A `RemoteIndex` after its `check`. Raises ValueError as both do."""
    index = RemoteIndex(url, documents, corpus, attempt_s, attempts, backoff_s, batch, ended)
    index.check()
    return index
