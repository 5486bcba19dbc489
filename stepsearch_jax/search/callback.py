"""Searching as device programs see it: arrays of fixed shape in and out, and no exception ever.

Called from inside device programs, by several device threads at once. An exception there can hang
an accelerator, so a failure becomes a flag, a count and a remembered message; the caller decides
afterwards whether to continue.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stepsearch_jax.search.observations import EnvironmentTokens, build_observation
from stepsearch_jax.search.watchdog import Watchdog

# All engines see only the beginning of a longer query, and a search server refuses it.
MAX_QUERY_CHARACTERS = 4096


class SomeFailedError(ValueError):
    """A search that failed for some of its queries only. found: the result, valid for the others;
    failures: place of a query -> why it failed."""

    def __init__(self, found: np.ndarray, failures: dict[int, str]):
        super().__init__(next(iter(failures.values())))
        self.found, self.failures = found, failures


class SearchResult(NamedTuple):
    """observation_tokens [b, O] int32, 0 beyond the length; observation_length [b] int32; doc_ids
    [b, D] int32, best first, -1 = none; ok [b] bool.

    Rows that were not wanted: length 0, no documents, ok. Failed rows: the observation says so, no
    documents, not ok.
    """

    observation_tokens: np.ndarray
    observation_length: np.ndarray
    doc_ids: np.ndarray
    ok: np.ndarray


@dataclasses.dataclass(frozen=True)
class SearchCounts:
    """What happened since the last `take_counts`. seconds: summed over calls, which may overlap.
    first_error: the first failure's message, or ""."""

    calls: int = 0
    searches: int = 0
    failed: int = 0
    seconds: float = 0.0
    first_error: str = ""


class SearchCallback:
    """Searches for the rows that want it. `make_search_callback` describes the fields."""

    def __init__(
        self,
        search: Callable[[list[str]], np.ndarray],
        decode_query: Callable[[np.ndarray], str],
        document_tokens: Sequence[np.ndarray],
        environment: EnvironmentTokens,
        max_observation_tokens: int,
        k: int,
        watchdog: Watchdog,
    ):
        self._search = search
        self._decode_query = decode_query
        self._document_tokens = document_tokens
        self._environment = environment
        self.max_observation_tokens = max_observation_tokens
        self.k = k
        self._watchdog = watchdog
        self._lock = threading.Lock()
        self._counts = SearchCounts()
        self._nothing = build_observation(environment, [], max_observation_tokens)
        self._failed = np.concatenate(
            [environment.head, environment.search_failed, environment.tail]
        )

    def __call__(
        self, query_tokens: np.ndarray, query_length: np.ndarray, wanted: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Searches for the rows in `wanted`; returns the fields of `SearchResult` as a plain tuple.

        query_tokens [b, Q] int32: the last tokens of each row's action, up to its closing tag;
        query_length [b] int32: how many of them; wanted [b] bool.
        """
        start = time.perf_counter()
        rows = len(wanted)
        result = SearchResult(
            observation_tokens=np.zeros((rows, self.max_observation_tokens), np.int32),
            observation_length=np.zeros(rows, np.int32),
            doc_ids=np.full((rows, self.k), -1, np.int32),
            ok=np.ones(rows, bool),
        )
        wanted = np.asarray(wanted)
        failures: dict[int, str] = {}
        with self._watchdog.watching("the search"):
            try:
                self._fill(
                    result, np.asarray(query_tokens), np.asarray(query_length), wanted, failures
                )
            except (Exception, SystemExit) as error:  # either would leave the device waiting
                failures = dict.fromkeys(np.flatnonzero(wanted).tolist(), _describe(error))
        for row in failures:
            _put(result, row, self._failed, ())
            result.ok[row] = False
        self._count(int(wanted.sum()), failures, time.perf_counter() - start)
        return tuple(result)

    def _fill(
        self,
        result: SearchResult,
        tokens: np.ndarray,
        length: np.ndarray,
        wanted: np.ndarray,
        failures: dict[int, str],
    ) -> None:
        """Writes the rows that want documents. Rows whose query cannot be read or fails alone go to
        `failures` (row -> message) and do not disturb others."""
        rows_of: dict[str, list[int]] = {}
        for row in np.flatnonzero(wanted).tolist():
            try:
                query = self._decode_query(tokens[row, : length[row]])
                rows_of.setdefault(query[:MAX_QUERY_CHARACTERS], []).append(row)
            except Exception as error:
                failures[row] = _describe(error)
        for row in rows_of.pop("", []):
            _put(result, row, self._nothing, ())
        if not rows_of:
            return
        try:
            found, failed = np.asarray(self._search(list(rows_of))), {}
        except SomeFailedError as error:
            found, failed = error.found, error.failures
        shape = (len(rows_of), self.k)
        if found.shape != shape or found.dtype.kind != "i":
            raise ValueError(
                f"the search returned {found.dtype} {found.shape}; "
                f"expected integer ids of shape {shape}"
            )
        for place, (ids, rows) in enumerate(zip(found, rows_of.values(), strict=True)):
            if place in failed:
                failures.update(dict.fromkeys(rows, failed[place]))
                continue
            # A document that was returned several times counts once, at its best rank.
            ids = list(dict.fromkeys(ids[ids >= 0].tolist()))
            observation = build_observation(
                self._environment,
                [self._document_tokens[i] for i in ids],
                self.max_observation_tokens,
            )
            for row in rows:
                _put(result, row, observation, ids)

    def _count(self, searches: int, failures: dict[int, str], seconds: float) -> None:
        first = next(iter(failures.values()), "")
        with self._lock:
            old = self._counts
            self._counts = SearchCounts(
                old.calls + 1,
                old.searches + searches,
                old.failed + len(failures),
                old.seconds + seconds,
                old.first_error or first,
            )

    def take_counts(self) -> SearchCounts:
        """The counts since the last time they were taken."""
        with self._lock:
            counts, self._counts = self._counts, SearchCounts()
        return counts


def make_search_callback(
    search: Callable[[list[str]], np.ndarray],
    decode_query: Callable[[np.ndarray], str],
    document_tokens: Sequence[np.ndarray],
    environment: EnvironmentTokens,
    max_observation_tokens: int,
    k: int,
    watchdog: Watchdog,
) -> SearchCallback:
    """A search callback for the rollout.

    search: q distinct, non-empty queries of at most MAX_QUERY_CHARACTERS -> corpus ids [q, k], best
    first, -1 = none; a repeated one counts once. SomeFailedError if only some failed. decode_query:
    token ids -> query, "" for an empty one (which finds nothing and is no failure).
    document_tokens: corpus id -> token ids. max_observation_tokens: O, the width of an observation.
    k: D, documents a search. Raises ValueError if the environment's texts do not fit into an
    observation or have no prefix for each rank.
    """
    if len(environment.ranks) != k:
        raise ValueError(
            f"the environment has texts for {len(environment.ranks)} ranks, "
            f"but a search returns {k} documents"
        )
    return SearchCallback(
        search, decode_query, document_tokens, environment, max_observation_tokens, k, watchdog
    )


def _put(
    result: SearchResult, row: int, observation: np.ndarray, ids: Sequence[int] | np.ndarray
) -> None:
    result.observation_tokens[row] = 0
    result.observation_tokens[row, : len(observation)] = observation
    result.observation_length[row] = len(observation)
    result.doc_ids[row] = -1
    result.doc_ids[row, : len(ids)] = ids


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
