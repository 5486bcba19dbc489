"""Search queries from a language model behind an OpenAI-compatible endpoint.

Several requests run at a time, and no answer is paid for twice: every chat completion is stored
before it is read. If it holds no query, the sub-question is sent again with another `seed`, up to
`attempts` times. Anything else with status 200 (a web page, an error, half of a completion) counts
as a failed request.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import http.cookiejar
import json
import logging
import os
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
from stepsearch_jax.words import compose

logger = logging.getLogger("stepsearch_jax")

MAX_QUERY = 300  # characters; a longer line is no query
MAX_ANSWER_BYTES = 1 << 22
MAX_REFUSED = 5  # sub-questions that an endpoint may refuse before it has accepted one
MAX_PAUSE_S = 600.0  # a longer Retry-After ends the run
# statuses that may be about one question; the others are about address, key or model
_OF_ONE_REQUEST = (400, 413, 422)
# the store finds answers by these texts: changing one asks and pays for all answers again
_SYSTEM = (
    "You write queries for a search engine over encyclopedia passages. Answer with the queries "
    "alone, one a line, without numbers or quotation marks."
)
_TASK = (
    "Write {count} different search queries, each of which should find the passage that answers "
    "the question. Vary the wording: keywords, entity and relation, a full question. Name every "
    "entity in each query.\n\nQuestion: {question}"
)
_EARLIER = "\nAnswered before: {answers}"
# <think> may stand in the model's template, and </think> may be missing
_THOUGHT = re.compile(r"^.*</think>|<think>.*$", re.DOTALL)
_MARK = re.compile(r"^\s*(?:[-•]|\*(?!\*)|\(?\d{1,2}[.):](?!\d))\s*")
_EMPHASIS = re.compile(r"[*`]|(?<!\w)_+(?=\w)|(?<=[^\W_])_+(?!\w)")  # Markdown's
_QUOTED = re.compile(r"[\"“]([^\"“”]*)[\"”]")


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """The endpoint, the model and the limits of requests."""

    url: str  # the endpoint's base, "https://host/v1"
    model: str
    key: str  # "": the endpoint needs none
    temperature: float
    count: int  # queries a request
    concurrency: int  # requests at a time
    rate: float  # requests a minute, retries included
    timeout: float  # seconds without a byte from the endpoint; twice as many for a whole answer
    attempts: int  # requests for a sub-question whose answers hold no query
    retries: int  # of a failed request (429, 5xx, no answer in time)
    backoff: float  # seconds before the first retry


def read_settings(options: argparse.Namespace) -> ChatSettings:
    """The settings of --writer chat. Raises ValueError for missing or wrong ones."""
    if not options.url.startswith(("http://", "https://")) or not options.model:
        raise ValueError(
            "--writer chat needs --url, the endpoint's base (https://HOST/v1), and --model"
        )
    key = os.environ.get(options.key_env, "").strip() if options.key_env else ""
    if options.key_env and not key:
        raise ValueError(
            f"the environment variable {options.key_env} holds no key for {options.url}: set it, "
            "name another one with --key-env, or pass --key-env= for an endpoint that needs none"
        )
    if not (key.isascii() and key.isprintable()):  # the message does not show the key
        raise ValueError(
            f"the environment variable {options.key_env} holds characters that no key has, such as "
            "a line break"
        )
    try:
        requests.Request("POST", options.url).prepare()
        urllib3.util.parse_url(options.url).host.encode("idna")
    except (requests.RequestException, UnicodeError) as error:
        raise ValueError(
            f"--url {options.url} is not the address of an endpoint ({error})"
        ) from None
    return ChatSettings(
        url=options.url.rstrip("/"),
        model=options.model,
        key=key,
        count=options.queries,
        backoff=options.backoff,
        **{
            name: getattr(options, name)
            for name in ("temperature", "concurrency", "rate", "timeout", "attempts", "retries")
        },
    )


class ChatWriter:
    """Writes queries with a model.

    Counts of this process: `sent`, requests; `received`, completions; `refused`, sub-questions that
    the endpoint refuses (a content filter, say) while it accepts others. These get no query.
    """

    def __init__(self, settings: ChatSettings, store: Store):
        self.settings, self._store = settings, store
        self.sent = self.received = self.refused = 0
        self._taken = False  # whether the endpoint has accepted any of these requests
        self._refusal = ""  # the message of its last refusal
        self._most_refused = MAX_REFUSED
        self._stopped, self._lock, self._next = threading.Event(), threading.Lock(), 0.0
        self._session = requests.Session()
        self._session.mount(settings.url, _Adapter(pool_maxsize=settings.concurrency))
        # no cookies: a request does not depend on earlier ones
        no_cookies = http.cookiejar.DefaultCookiePolicy(allowed_domains=())
        self._session.cookies.set_policy(no_cookies)

    def write_all(self, asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[list[str] | None]:
        """For each (sub-question, answers before it): its queries.

        [] if no answer of the model held one; None if the endpoint refused the sub-question. Raises
        ValueError if the endpoint refuses more than a few sub-questions, and OSError if it keeps
        failing. Answers received before are kept.
        """
        different = list(dict.fromkeys(asked))
        # more than a tenth: the endpoint does not refuse single sub-questions, but all
        self._most_refused = max(MAX_REFUSED, len(different) // 10)
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
                self._stopped.set()  # waits for requests under way and keeps their answers
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
        """The answer's body, from the store or the endpoint; None if it refuses this request."""
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
        """The body of the endpoint's answer; None if it refuses this request and perhaps no other.

        Raises ValueError or OSError as `write_all` does.
        """
        settings = self.settings
        for attempt in range(settings.retries + 1):
            self._pace()
            pause = min(60.0, settings.backoff * 2 ** min(attempt, 30)) * random.uniform(0.5, 1.5)
            # one attempt; a redirection would turn the request into another one
            try:
                with (
                    limit_time(2 * settings.timeout),
                    self._session.post(
                        f"{settings.url}/chat/completions",
                        json=request,
                        timeout=settings.timeout,
                        auth=self._authorize,
                        stream=True,
                        allow_redirects=False,
                    ) as answer,
                ):
                    body = _read_body(answer).decode("utf-8", errors="replace")
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                fault = f"{type(error).__name__}: {error}"[:400]
            else:
                status = answer.status_code
                fault = f"status {status}: {body[:200]!r}"
                # an answer, which counts only if it is a completion
                if status == 200:
                    if _read_message(body) is not None:
                        with self._lock:
                            self.received += 1
                        return body
                    fault = f"{fault}, which is no chat completion"
                # a refusal, which another attempt would not change
                elif status not in (408, 409, 429) and status < 500:
                    self._note_refusal(status, fault)
                    return None
                # a failure: the endpoint may ask for a longer pause than ours
                wanted = _read_retry_after(answer.headers.get("Retry-After"))
                if wanted > MAX_PAUSE_S:
                    raise OSError(
                        f"{settings.url} wants a pause of {wanted:.0f} s, with {fault}. Run again "
                        "after it to continue: answers received are kept"
                    )
                pause = max(pause, wanted)
            if attempt < settings.retries and self._stopped.wait(pause):
                break
        raise OSError(
            f"{settings.url} failed {attempt + 1} times for one request, at last with {fault}. Run "
            "again to continue: answers received are kept"
        )

    def _note_refusal(self, status: int, fault: str) -> None:
        """Counts a refused request. Raises ValueError if the endpoint refuses more than a few."""
        url = self.settings.url
        self._refusal = (
            f"{url} refuses a request with {fault}; check --url, --model and the key. Run again to "
            "continue: answers received are kept"
        )
        with self._lock:
            self.refused += 1
        most = self._most_refused if self._taken else MAX_REFUSED
        if status not in _OF_ONE_REQUEST or self.refused >= most:
            raise ValueError(self._refusal)
        logger.warning("%s refuses a request with %s: its sub-question gets no query", url, fault)

    def _authorize(self, request):
        """Sets the key. Without this, `requests` would prefer an entry of .netrc."""
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
    """`limit_time` covers its connections, also those to proxies."""

    def init_poolmanager(self, *arguments, **options) -> None:
        super().init_poolmanager(*arguments, **options)
        limit_connections(self.poolmanager)

    def proxy_manager_for(self, *arguments, **options) -> urllib3.ProxyManager:
        return limit_connections(super().proxy_manager_for(*arguments, **options))


def _read_body(answer: requests.Response) -> bytes:
    """A whole answer. Raises urllib3's HTTPError if it is too long."""
    body = bytearray()
    while part := answer.raw.read1(1 << 16, decode_content=True):
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            raise urllib3.exceptions.HTTPError(
                f"the answer is longer than {MAX_ANSWER_BYTES} bytes"
            )
    return bytes(body)


def _read_message(body: str) -> dict | None:
    """The message of a chat completion, perhaps without a text; None if `body` is no completion."""
    try:
        message = json.loads(body)["choices"][0]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def read_answer(body: str, count: int) -> list[str]:
    """At most `count` different queries from a chat completion; [] if `body` is no completion.

    Removes the model's thoughts and each line's list mark, number, quotes and emphasis.
    """
    text = (_read_message(body) or {}).get("content")
    if not isinstance(text, str):
        return []
    lines = [_clean_line(line) for line in _THOUGHT.sub("", compose(text)).splitlines()]
    return list(dict.fromkeys(filter(_is_query, lines)))[:count]


def _clean_line(line: str) -> str:
    line = _EMPHASIS.sub("", _MARK.sub("", line)).strip()
    whole = _QUOTED.fullmatch(line)
    return whole[1].strip() if whole else line


def _is_query(line: str) -> bool:
    is_short = any(map(str.isalnum, line)) and len(line) <= MAX_QUERY
    return is_short and line[-1] != ":" and _is_writable(line)


def _is_writable(text: str) -> bool:
    """Whether a file can hold it: JSON, but no file, can hold half of a surrogate pair."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _read_retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header (a number or a date); 0 if missing or unreadable."""
    try:
        return urllib3.Retry().parse_retry_after(value) if value else 0.0
    # the last two: thousands of digits, a year beyond the calendar
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0.0
