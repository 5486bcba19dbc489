"""Search queries written by a language model behind an OpenAI-compatible endpoint: several requests at a time, none of them paid for twice.

A chat completion is kept, whatever the model says in it, before it is read. One that holds no query is asked for again as another request (with another
`seed`), at most so many times. Whatever else comes with status 200 (a web page, an error, half of a completion) is a request that failed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import http.cookiejar
import json
import logging
import random
import re
import threading
import time
from collections.abc import Sequence

import requests
import urllib3
from tqdm import tqdm

from stepsearch_jax.prepare.store import Store
from stepsearch_jax.search.time_limit import limit_connections, limit_time

logger = logging.getLogger("stepsearch_jax")

MAX_QUERY = 300  # characters; a longer line is no query
MAX_ANSWER_BYTES = 1 << 22
MAX_REFUSED = 5  # sub-questions that an endpoint may refuse before it has taken one
MAX_PAUSE_S = 600.0  # an endpoint that asks for a longer one ends the run
_OF_ONE_REQUEST = (
    400,
    413,
    422,
)  # statuses that may be about one question; the others are about address, key or model
_SYSTEM = "You write queries for a search engine over encyclopedia passages. Answer with the queries alone, one a line, without numbers or quotation marks."
_TASK = (
    "Write {count} different search queries, each of which should find the passage that answers the question. Vary the wording: keywords, entity and "
    "relation, a full question. Name every entity in each query.\n\nQuestion: {question}"
)
_EARLIER = "\nAnswered before: {answers}"
_THOUGHT = re.compile(
    r"^.*</think>|<think>.*$", re.DOTALL
)  # some models open it in their template, and some do not come to its end
_MARK = re.compile(r"^\s*(?:[-•]|\*(?!\*)|\(?\d{1,2}[.):](?!\d))\s*")
_EMPHASIS = re.compile(r"[*`]|(?<!\w)_+(?=\w)|(?<=[^\W_])_+(?!\w)")  # Markdown's
_QUOTED = re.compile(r"[\"“]([^\"“”]*)[\"”]")


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """url: the endpoint's base ("https://host/v1"), model, key ("": the endpoint needs none), temperature: as the endpoint takes them. count: queries of a
    request. concurrency: requests at a time. rate: requests a minute, repeated ones included. timeout: seconds without a word of the endpoint, and twice as
    many for a whole answer. attempts: requests for a sub-question whose answers hold no query. retries: how often a request that failed (429, 5xx, no answer in
    time) is sent again. backoff: seconds before the first of these."""

    url: str
    model: str
    key: str
    temperature: float
    count: int
    concurrency: int
    rate: float
    timeout: float
    attempts: int
    retries: int
    backoff: float


class ChatWriter:
    """Writes queries with a model. As far as this process knows, `sent`: requests that were sent; `received`: completions that came; `refused`: sub-questions
    that the endpoint does not take (a content filter, say) though it takes others; these get no query."""

    def __init__(self, settings: ChatSettings, store: Store):
        self.settings, self._store = settings, store
        self.sent = self.received = self.refused = 0
        self._taken, self._refusal = (
            False,
            "",
        )  # whether the endpoint has taken any request like these, and what it said of the last that it did not
        self._most_refused = MAX_REFUSED
        self._stopped, self._lock, self._next = threading.Event(), threading.Lock(), 0.0
        self._session = requests.Session()
        self._session.mount(settings.url, _Adapter(pool_maxsize=settings.concurrency))
        self._session.cookies.set_policy(
            http.cookiejar.DefaultCookiePolicy(allowed_domains=())
        )  # a request says the same whatever came before it

    def write_all(self, asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[list[str] | None]:
        """For each (sub-question, answers before it): its queries, none where no answer of the model held one; None where the endpoint refused it.

        Raises ValueError where the endpoint refuses requests, and not those of a few sub-questions only, and OSError where it goes on failing. What was
        received until then is kept.
        """
        different = list(dict.fromkeys(asked))
        self._most_refused = max(
            MAX_REFUSED, len(different) // 10
        )  # beyond a tenth it is not about single sub-questions
        with (
            concurrent.futures.ThreadPoolExecutor(self.settings.concurrency) as pool,
            tqdm(total=len(different), desc="writing", unit=" sub-questions", disable=None) as bar,
        ):
            tasks = {pool.submit(self._write, *of_one): of_one for of_one in different}
            written = {}
            try:
                for task in concurrent.futures.as_completed(tasks):
                    written[tasks[task]] = task.result()
                    bar.update()
            except BaseException:
                self._stopped.set()  # requests that are on their way are waited for, and their answers kept
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if self._refusal and not self._taken:
            raise ValueError(self._refusal)
        return [written[of_one] for of_one in asked]

    def _write(self, question: str, earlier: tuple[str, ...]) -> list[str] | None:
        for seed in range(self.settings.attempts):
            body = self._ask(self._make_request(question, earlier, seed))
            if body is None:
                return None
            if queries := read_answer(body, self.settings.count):
                return queries
        return []

    def _make_request(self, question: str, earlier: tuple[str, ...], seed: int) -> dict:
        task = _TASK.format(count=self.settings.count, question=question) + (
            _EARLIER.format(answers="; ".join(earlier)) if earlier else ""
        )
        return {
            "model": self.settings.model,
            "temperature": self.settings.temperature,
            "seed": seed,
            "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": task}],
        }

    def _ask(self, request: dict) -> str | None:
        """The body of the answer, from the store or the endpoint; None if that refuses this request, and perhaps only this."""
        key = hashlib.sha256(json.dumps([self.settings.url, request]).encode()).hexdigest()
        (body,) = self._store.get([key])
        if body is None:
            body = self._send(request)
            if body is None:
                return None
            self._store.put({key: body})
        self._taken = True
        return body

    def _send(self, request: dict) -> str | None:
        s = self.settings
        for attempt in range(s.retries + 1):
            self._pace()
            pause = min(60.0, s.backoff * 2 ** min(attempt, 30)) * random.uniform(0.5, 1.5)
            try:
                with (
                    limit_time(2 * s.timeout),
                    self._session.post(
                        f"{s.url}/chat/completions",
                        json=request,
                        timeout=s.timeout,
                        auth=self._authorize,
                        stream=True,
                        allow_redirects=False,
                    ) as answer,
                ):  # where one leads, the request would arrive as another one
                    body = _read_body(answer).decode("utf-8", errors="replace")
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                fault = f"{type(error).__name__}: {error}"[:400]
            else:
                fault = f"status {answer.status_code}: {body[:200]!r}"
                if answer.status_code == 200:
                    if _read_message(body) is not None:
                        with self._lock:
                            self.received += 1
                        return body
                    fault = f"{fault}, which is no chat completion"
                elif answer.status_code not in (408, 409, 429) and answer.status_code < 500:
                    self._refusal = (
                        f"{s.url} refuses a request with {fault}; check --url, --model and the key. Answers received are kept: run again to "
                        "go on"
                    )
                    with self._lock:
                        self.refused += 1
                    if answer.status_code not in _OF_ONE_REQUEST or self.refused >= (
                        self._most_refused if self._taken else MAX_REFUSED
                    ):
                        raise ValueError(self._refusal)
                    logger.warning(
                        "%s refuses a request with %s: its sub-question gets no query", s.url, fault
                    )
                    return None
                wanted = _read_retry_after(answer.headers.get("Retry-After"))
                if wanted > MAX_PAUSE_S:
                    raise OSError(
                        f"{s.url} wants a pause of {wanted:.0f} s, with {fault}. Answers received are kept: run again after it to go on"
                    )
                pause = max(pause, wanted)
            if attempt < s.retries and self._stopped.wait(pause):
                break
        raise OSError(
            f"{s.url} failed {attempt + 1} times for one request, at last with {fault}. Answers received are kept: run again to go on"
        )

    def _authorize(self, request):
        """Sets the key itself: otherwise `requests` would prefer what a .netrc file says of the host."""
        if self.settings.key:
            request.headers["Authorization"] = f"Bearer {self.settings.key}"
        return request

    def _pace(self) -> None:
        """Waits for this request's turn: turns are 60 / rate seconds apart."""
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + 60.0 / self.settings.rate
            self.sent += 1
        if self._stopped.wait(start - time.monotonic()):
            raise OSError("stopped")


class _Adapter(requests.adapters.HTTPAdapter):
    """Its connections, to proxies as well, obey `limit_time`."""

    def init_poolmanager(self, *arguments, **options) -> None:
        super().init_poolmanager(*arguments, **options)
        limit_connections(self.poolmanager)

    def proxy_manager_for(self, *arguments, **options) -> urllib3.ProxyManager:
        return limit_connections(super().proxy_manager_for(*arguments, **options))


def _read_body(answer: requests.Response) -> bytes:
    """All of an answer. Raises urllib3's HTTPError for one that is too long."""
    body = bytearray()
    while part := answer.raw.read1(1 << 16, decode_content=True):
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            raise urllib3.exceptions.HTTPError(
                f"the answer is longer than {MAX_ANSWER_BYTES} bytes"
            )
    return bytes(body)


def _read_message(body: str) -> dict | None:
    """The message of a chat completion, which may lack a text; None for whatever is not one."""
    try:
        message = json.loads(body)["choices"][0]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def read_answer(body: str, count: int) -> list[str]:
    """At most `count` queries from the body of a chat completion, none twice; [] for whatever is not one. What the model thinks aloud is left out, and marks,
    numbers, quotes and emphasis at lines are taken off."""
    text = (_read_message(body) or {}).get("content")
    lines = (
        [_clean_line(line) for line in _THOUGHT.sub("", text).splitlines()]
        if isinstance(text, str)
        else []
    )
    fit = [
        line
        for line in lines
        if any(map(str.isalnum, line))
        and len(line) <= MAX_QUERY
        and line[-1] != ":"
        and _is_writable(line)
    ]
    return list(dict.fromkeys(fit))[:count]


def _clean_line(line: str) -> str:
    line = _EMPHASIS.sub("", _MARK.sub("", line)).strip()
    whole = _QUOTED.fullmatch(line)
    return whole[1].strip() if whole else line


def _is_writable(text: str) -> bool:
    """Whether a file can hold it: no half of a surrogate pair, which JSON can name alone."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _read_retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header: a number or a date; 0 for none, or one that cannot be read."""
    try:
        return urllib3.Retry().parse_retry_after(value) if value else 0.0
    except (
        urllib3.exceptions.InvalidHeader,
        ValueError,
        OverflowError,
    ):  # the last two: thousands of digits, a year beyond the calendar
        return 0.0
