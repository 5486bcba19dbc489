"""Search keys from an endpoint that is slow, fails, refuses or answers nonsense."""

import collections
import http.server
import json
import re
import threading
import time
from types import SimpleNamespace

import pytest
from test_time_limit import DRIPS, HEAD, dripping

from stepsearch_jax.prepare.chat import (
    MAX_ANSWER_BYTES,
    MAX_REFUSED,
    ChatSettings,
    ChatWriter,
    read_answer,
)
from stepsearch_jax.prepare.store import Store

SETTINGS = dict(
    model="m",
    key="secret",
    temperature=0.7,
    count=2,
    concurrency=4,
    rate=60_000.0,
    timeout=5.0,
    attempts=2,
    retries=8,
    backoff=0.01,
)


class Endpoint:
    """Answers with answer(question, n-th request for it) -> (status, body, headers).

    `paid` counts the answers of status 200 that were sent whole.
    """

    def __init__(self, answer, delay=0.0):
        self.paid, self.asked = collections.Counter(), collections.Counter()
        self.keys, self.times, lock = set(), [], threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                content = json.loads(body)["messages"][1]["content"]
                question = re.search(r"Question: (.*)", content)[1]
                with lock:
                    self.asked[body] += 1
                    self.keys.add(handler.headers.get("Authorization"))
                    self.times.append(time.monotonic())
                    status, text, headers = answer(question, self.asked[body])
                time.sleep(delay)
                headers = {"Content-Length": str(len(text.encode())), **headers}
                try:
                    handler.send_response(status)
                    for name, value in headers.items():
                        handler.send_header(name, value)
                    handler.end_headers()
                    handler.wfile.write(text.encode())
                except OSError:  # the client is gone
                    return
                if status == 200:
                    with lock:
                        self.paid[body] += 1

            def log_message(handler, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def complete(text) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def answer_q(question, count):
    return 200, complete("q"), {}


def write_with(endpoint, path, asked, **changes):
    store = Store(path)
    settings = ChatSettings(url=endpoint.url, **{**SETTINGS, **changes})
    try:
        return ChatWriter(settings, store).write_all(asked)
    finally:
        store.close()


@pytest.mark.parametrize(
    "body, queries",
    [
        (complete('1. Rome country\n- "Rome nation"\n\nmore'), ["Rome country", "Rome nation"]),
        (complete("one line"), ["one line"]),
        (complete("Here they are:\n\na\na\n3) b"), ["a", "b"]),
        ("<html>busy</html>", []),
        ('{"choices": []}', []),
        ('{"choices": [{"message": {}}]}', []),
        (
            complete("<think>Rome\nor not\n</think>\n\n**Rome country**\n* _Rome_ nation"),
            ["Rome country", "Rome nation"],
        ),
        (complete("Rome?\nyes\n</think>a\n<think>b"), ["a"]),
        (complete("<think>Rome\nnot yet"), []),
        (complete("3.5 mm jack\n2.b\n"), ["3.5 mm jack", "b"]),
        (complete('**Query:** `Rome`\n"Ann" of Rome'), ["Query: Rome", '"Ann" of Rome']),
        (complete("“snake_case word”\n12.30 train"), ["snake_case word", "12.30 train"]),
        (complete("half a \ud800 pair\nb"), ["b"]),
        pytest.param("[" * 200_000, [], id="deep"),
        (complete(None), []),
        (complete("\n ?!\n" + "x" * 400), []),
        ("[]", []),
        ("7", []),
        (complete(["a"]), []),
    ],
)
def test_answers_are_read_or_refused(body, queries):
    assert read_answer(body, 2) == queries


def test_failures_are_repeated_and_nonsense_is_asked_once_more(tmp_path):
    def answer(question, count):
        kind = question.split()[0]
        if kind == "failing" and count < 4:
            return (500, 429, 503)[count - 1], "busy", {"Retry-After": "0"}
        text = f"{question} a\n{question} b\n{question} c"
        return 200, complete(None if kind == "nonsense" else text), {}

    asked = [("good one", ()), ("failing one", ("Ann",)), ("nonsense one", ()), ("good one", ())]
    with Endpoint(answer) as endpoint:
        expected = [
            ["good one a", "good one b"],
            ["failing one a", "failing one b"],
            [],
            ["good one a", "good one b"],
        ]
        assert write_with(endpoint, tmp_path / "s", asked) == expected
        # good once, failing once, nonsense with two seeds
        assert endpoint.paid.total() == 4 and set(endpoint.paid.values()) == {1}
        assert endpoint.asked.total() == 7 and endpoint.keys == {"Bearer secret"}
        # every answer is known by now, the nonsense too
        assert write_with(endpoint, tmp_path / "s", asked) == expected
        assert endpoint.asked.total() == 7
        write_with(endpoint, tmp_path / "s", asked[:1], model="other", key="")
        assert endpoint.asked.total() == 8 and None in endpoint.keys


@pytest.mark.parametrize(
    "body",
    [
        "<html>log in</html>",
        '{"error": {"message": "overloaded"}}',
        "",
        complete("q")[:-3],
        '{"choices": [{"message": "q"}]}',
    ],
)
def test_what_is_no_completion_is_a_failure_and_not_kept(tmp_path, body):
    answer = lambda question, count: (200, body if count < 3 else complete("q"), {})
    with Endpoint(answer) as endpoint:
        assert write_with(endpoint, tmp_path / "s", [("x", ())]) == [["q"]]
        assert endpoint.asked.total() == 3
    with Endpoint(lambda question, count: (200, body, {})) as endpoint:
        with pytest.raises(OSError, match="3 times.*status 200: .*no chat completion"):
            write_with(endpoint, tmp_path / "t", [("x", ())], retries=2)
        with pytest.raises(OSError, match="1 times"):
            write_with(endpoint, tmp_path / "t", [("x", ())], retries=0)


def test_cookies_are_not_kept(tmp_path):
    cookies = []
    answer = lambda question, count: (200, complete("q"), {"Set-Cookie": "who=me; Path=/"})
    with Endpoint(answer) as endpoint:
        handle = endpoint.server.RequestHandlerClass.do_POST

        def note_cookie(handler):
            cookies.append(handler.headers.get("Cookie"))
            handle(handler)

        endpoint.server.RequestHandlerClass.do_POST = note_cookie
        write_with(endpoint, tmp_path / "s", [("x", ()), ("y", ()), ("z", ())], concurrency=1)
    assert cookies == [None] * 3


def test_refusal_and_lasting_failure_end_the_run_and_keep_what_came(tmp_path):
    def refuse_bad(question, count):
        return (401, "no such key", {}) if question == "bad" else answer_q(question, count)

    with Endpoint(refuse_bad) as endpoint:
        with pytest.raises(ValueError, match="status 401: 'no such key'.*--url, --model"):
            write_with(endpoint, tmp_path / "s", [("good", ()), ("bad", ())], concurrency=1)
        assert write_with(endpoint, tmp_path / "s", [("good", ())]) == [["q"]]
        assert endpoint.asked.total() == 2
    with Endpoint(lambda question, count: (500, "", {})) as endpoint:
        with pytest.raises(OSError, match="3 times.*status 500"):
            write_with(endpoint, tmp_path / "t", [("x", ())], retries=2)
    with Endpoint(answer_q, delay=1.0) as endpoint:
        with pytest.raises(OSError, match="ReadTimeout"):
            write_with(endpoint, tmp_path / "u", [("x", ())], retries=0, timeout=0.2)


def test_a_question_that_is_refused_alone_gets_no_query(tmp_path):
    """A content filter always answers one question, the first one, with 400.

    An endpoint that answers so to all questions ends the run.
    """

    def filter_one(question, count):
        return (400, "filtered", {}) if question == "bad" else answer_q(question, count)

    asked = [("bad", ()), ("good", ()), ("fine", ())]
    with Endpoint(filter_one) as endpoint:
        # the second run sends the refused question again, but no answered one
        for sent in (3, 4):
            written = write_with(endpoint, tmp_path / "s", asked, concurrency=1)
            assert written == [None, ["q"], ["q"]]
            assert endpoint.asked.total() == sent
    for many in (1, 40):
        asked = [(f"x{i}", ()) for i in range(many)]
        with Endpoint(lambda question, count: (400, "no such field", {})) as endpoint:
            with pytest.raises(ValueError, match="status 400: 'no such field'.*--url"):
                write_with(endpoint, tmp_path / "t", asked, concurrency=1)
            # one more may be under way
            sent = endpoint.asked.total()
            assert min(many, MAX_REFUSED) <= sent <= min(many, MAX_REFUSED + 1)


def test_an_endpoint_that_refuses_everything_after_a_while_ends_the_run(tmp_path):
    """Its credit is used up, say, and it answers with 400."""

    def answer(question, count):
        return answer_q(question, count) if int(question[1:]) < 3 else (400, "no credit", {})

    asked = [(f"x{i}", ()) for i in range(90)]
    with Endpoint(answer) as endpoint:
        with pytest.raises(ValueError, match="status 400: 'no credit'.*--url"):
            write_with(endpoint, tmp_path / "s", asked, concurrency=1)
        assert endpoint.asked.total() <= 3 + 9 + 1


@pytest.mark.slow
@pytest.mark.parametrize("drip", ["first line", "headers", "body"])
def test_an_answer_that_comes_a_byte_at_a_time_is_a_failure(tmp_path, drip):
    with (
        dripping(*DRIPS[drip]) as url,
        pytest.raises(OSError, match="1 times.*TimeoutError: .*1 s"),
    ):
        write_with(SimpleNamespace(url=url), tmp_path / "s", [("x", ())], retries=0, timeout=0.5)


def test_an_answer_longer_than_any_is_a_failure(tmp_path):
    with (
        dripping(HEAD + b"Connection: close\r\n\r\n", b" " * (MAX_ANSWER_BYTES + 1)) as url,
        pytest.raises(OSError, match=f"1 times.*HTTPError: .*{MAX_ANSWER_BYTES} bytes"),
    ):
        write_with(SimpleNamespace(url=url), tmp_path / "s", [("x", ())], retries=0, timeout=5.0)


@pytest.mark.slow
def test_a_long_pause_or_another_place_ends_the_run(tmp_path):
    """It neither waits for hours nor takes the page behind a redirection for the model's answer."""
    for wanted in ("86400", "9" * 30):
        answer = lambda question, count, wanted=wanted: (429, "quota", {"Retry-After": wanted})
        with Endpoint(answer) as endpoint:
            with pytest.raises(OSError, match="pause of [0-9]+ s.*status 429: 'quota'"):
                write_with(endpoint, tmp_path / "s", [("x", ())])
    with Endpoint(answer_q) as other:
        redirect = {"Location": f"{other.url}/chat/completions"}
        with Endpoint(lambda question, count: (307, "", redirect)) as endpoint:
            with pytest.raises(ValueError, match="status 307"):
                write_with(endpoint, tmp_path / "t", [("x", ())])
        assert not other.asked


def pause_first(wanted: str):
    """An endpoint's `answer`: the first request has to be sent again after a pause."""

    def answer(question, count):
        return (429, "", {"Retry-After": wanted}) if count == 1 else answer_q(question, count)

    return answer


@pytest.mark.parametrize("wanted", ["9" * 5000, "Fri, 31 Dec 99999 23:59:59 GMT", "soon"])
def test_a_pause_that_cannot_be_read_is_our_own(tmp_path, wanted):
    with Endpoint(pause_first(wanted)) as endpoint:
        assert write_with(endpoint, tmp_path / "s", [("x", ())]) == [["q"]]
        assert endpoint.asked.total() == 2


@pytest.mark.slow
def test_retry_after_and_rate_are_honoured(tmp_path):
    with Endpoint(pause_first("1")) as endpoint:
        write_with(endpoint, tmp_path / "s", [("x", ())])
        assert endpoint.times[1] - endpoint.times[0] >= 1.0
    with Endpoint(answer_q) as endpoint:
        write_with(endpoint, tmp_path / "t", [(f"x{i}", ()) for i in range(6)], rate=600.0)
        # six turns, a tenth of a second apart
        assert endpoint.times[-1] - endpoint.times[0] >= 0.45
