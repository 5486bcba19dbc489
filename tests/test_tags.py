"""The rule that ends a turn: by hand, and the automaton over tokens against a string search."""

import pathlib
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsearch_jax.prompting.tags import (
    TAGS,
    cut_action,
    decode_query,
    make_tag_automaton,
    parse_action,
)
from stepsearch_jax.prompting.tokenizers import load_tokenizer
from stepsearch_jax.records import TurnStatus

REFERENCE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "reference.md"
SEARCH, ANSWER, INVALID = TurnStatus.SEARCH, TurnStatus.ANSWER, TurnStatus.INVALID

# Pieces that are, nearly are, hide or overlap tags.
FRAGMENTS = (
    *TAGS, *TAGS, "<", ">", "/", "</", "<<", "<search", "search>", "</sea", "</ans", "<answer",
    " <search> ", "?</search>\n\n", "</search>\n", "<search>\n", "<<search>", "</sea</search>",
    "</answer>.", "<Search>", "< search>", "<search >", "</search", "<answers>", "<information>",
    "</information>", "<think>", "who wrote it?", " Rome", "é", "€", "\n\n", "search", "answer",
    "<searc", "h>", "<s", "<a", "</a", "/search>", "><", " ", "<|im_end|>",
)  # fmt: skip


def search_strings(ids, token_bytes, eos_ids):
    """The rule by plain string search after every token.

    Returns (index of the token that ends the turn, status), or (None, 0) if nothing ends it.
    """
    text = b""
    for index, i in enumerate(ids):
        if i in eos_ids:
            return index, INVALID
        text += token_bytes[i]
        closings = [
            (text.find(b"</search>"), b"<search>", SEARCH),
            (text.find(b"</answer>"), b"<answer>", ANSWER),
        ]
        closings = [closing for closing in closings if closing[0] >= 0]
        if closings:
            end, kind, status = min(closings)
            other = {b"<search>": b"<answer>", b"<answer>": b"<search>"}[kind]
            matches = text.rfind(kind, 0, end) > text.rfind(other, 0, end)
            return index, status if matches else INVALID
    return None, 0


def run_automaton(ids, automaton):
    state = automaton.start
    for index, i in enumerate(ids):
        state = automaton.next_state[state, i]
        if automaton.event[state]:
            return index, automaton.event[state]
    return None, 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<search> capital of France </search>", (SEARCH, "capital of France")),
        ("<think> so </think> <answer>Paris</answer>", (ANSWER, "Paris")),
        # The first closing tag decides.
        ("<search>a</search> and <answer>b</answer>", (SEARCH, "a")),
        ("<answer>b</answer><search>a</search>", (ANSWER, "b")),
        # The last opening tag counts, and must be of the closing tag's kind.
        ("<search>a<search>b</search>", (SEARCH, "b")),
        ("<answer>a<search>b</search>", (SEARCH, "b")),
        ("<search>a <answer>b</search>", (INVALID, None)),
        ("b</search>", (INVALID, None)),
        ("</answer><search>a</search>", (INVALID, None)),
        ("<search>never closed", (INVALID, None)),
        ("", (INVALID, None)),
        ("<search></search>", (SEARCH, "")),
        ("<answer> \n </answer>", (ANSWER, "")),
        ("<search>a</search>\n\n", (SEARCH, "a")),  # a token may hold more than the tag's end
        ("<<search>a</sea</search>", (SEARCH, "a</sea")),
        ("<Search>a</Search>", (INVALID, None)),
        ("<search >a</search>", (INVALID, None)),
        ("<search>a</search >", (INVALID, None)),
    ],
)
def test_parse_action_by_hand(text, expected):
    assert parse_action(text) == expected


@pytest.mark.parametrize(
    "text,cut",
    [
        ("<answer> b </answer>.", "<answer> b </answer>"),
        ("a<search>q</search>\n\n", "a<search>q</search>"),
        ("x</search></answer>", "x</search>"),
        ("<answer>b</answer>", "<answer>b</answer>"),
        ("<answer>b", "<answer>b"),
        ("", ""),
    ],
)
def test_an_action_ends_with_its_closing_tag(text, cut):
    assert cut_action(text) == cut and parse_action(cut) == parse_action(text)


BYTES = [bytes([i]) for i in range(256)] + [b""]  # one token a byte, and a control token
BYTE_AUTOMATON = make_tag_automaton(BYTES, (256,))


def test_automaton_shape_and_absorbing_ends():
    automaton = BYTE_AUTOMATON
    assert automaton.next_state.dtype == np.int8
    assert automaton.next_state.shape == (len(automaton.event), 257)
    ends = np.flatnonzero(automaton.event)
    assert sorted(automaton.event[ends]) == [SEARCH, INVALID, ANSWER]
    assert (automaton.next_state[ends] == ends[:, None]).all()
    assert automaton.event[automaton.start] == 0 and automaton.mode[automaton.start] == 0


@pytest.mark.parametrize(
    "text, mode",
    [
        ("a <", 0),
        ("<search>", 1),
        ("<search> x <ans", 1),
        ("<search> x <answer> y", 2),
        ("<answer></sear", 2),
    ],
)
def test_mode_is_the_kind_of_the_last_opening_tag(text, mode):
    state = BYTE_AUTOMATON.start
    for byte in text.encode():
        state = BYTE_AUTOMATON.next_state[state, byte]
    assert BYTE_AUTOMATON.mode[state] == mode


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(FRAGMENTS), st.text("<>/searchnw", max_size=9), st.text(max_size=3)
        ),
        max_size=12,
    ),
    st.integers(0, 60),
)
def test_bytes_agree_with_string_search_and_parser(parts, end_at):
    """Over single bytes, for any text: automaton, string search and parser agree on the turn."""
    text = "".join(parts).encode(errors="replace")
    ids = [*text[:end_at], 256, *text[end_at:]] if end_at < len(text) else list(text)
    expected = search_strings(ids, BYTES, (256,))
    assert run_automaton(ids, BYTE_AUTOMATON) == expected
    turn = ids if expected[0] is None else ids[: expected[0] + 1]
    status, _ = parse_action(b"".join(BYTES[i] for i in turn).decode(errors="replace"))
    assert status == (expected[1] or INVALID)


# What the released code makes of one generation: it keeps the text up to the first </search>, or
# else the first </answer>, and takes the first pair of equal tags. docs/reference.md has this list.
RELEASED = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
NESTED = {
    "<search> a <search> b </search>": ((SEARCH, "b"), ("search", "a <search> b")),
    "<search> a <answer> b </search>": ((INVALID, None), ("search", "a <answer> b")),
    "<search> a </answer> b </search>": ((INVALID, None), ("search", "a </answer> b")),
    "</answer> <search> a </search>": ((INVALID, None), ("search", "a")),
    "<answer> a <search> b </search>": ((SEARCH, "b"), ("search", "b")),
    "<search> a </search> <answer> b </answer>": ((SEARCH, "a"), ("search", "a")),
    "<answer> a </answer> <search> b </search>": ((ANSWER, "a"), ("answer", "a")),
}


@pytest.mark.parametrize("text", NESTED)
def test_nested_tags_here_and_in_the_released_code(text):
    here, released = NESTED[text]
    assert parse_action(text) == here
    ids = list(text.encode())
    assert run_automaton(ids, BYTE_AUTOMATON)[1] == here[0]
    kept = re.match(r".*?</search>|.*?</answer>", text)[0]
    kind, content = RELEASED.search(kept).groups()
    assert (kind, content.strip()) == released
    differs = (here[0].name.lower(), here[1]) != released
    row = f"| `{text}` |"
    assert (row in REFERENCE.read_text()) == differs


@pytest.mark.parametrize("end", TAGS)
def test_an_end_token_that_is_a_tag(end):
    """A policy may end its texts with a tag: it closes the turn as the tag does, if it does."""
    token_bytes = [*BYTES[:256], end.encode()]
    automaton = make_tag_automaton(token_bytes, (256,))
    for text in ("", "<search> a", "<answer> b", "so </sea"):
        expected = run_automaton(list((text + end).encode()), BYTE_AUTOMATON)[1] or INVALID
        assert run_automaton([*text.encode(), 256], automaton) == (len(text), expected)


def test_end_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="token 300 .*257"):
        make_tag_automaton(BYTES, (300,))


def test_decode_query():
    def query(text):
        return decode_query(np.frombuffer(text.encode(), np.uint8).astype(np.int32), BYTES)

    assert query("so <search> é of <search> the river Po </search>\n") == "the river Po"
    assert query("<search></search>") == ""
    with pytest.raises(ValueError, match="</search>"):
        query("rch> cut off at its start </search>")
    with pytest.raises(ValueError, match="<search>"):
        query("<answer> x </answer>")


# --- the real vocabulary


@pytest.fixture(scope="module")
def qwen(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizer_qwen2_5"), ())
    return tokenizer, make_tag_automaton(tokenizer.token_bytes, tokenizer.eos_ids)


def list_splits(tag, id_of):
    """Every way to write `tag` as tokens."""
    if not tag:
        return [[]]
    return [
        [id_of[tag[:n]], *rest]
        for n in range(1, len(tag) + 1)
        if tag[:n] in id_of
        for rest in list_splits(tag[n:], id_of)
    ]


def test_every_split_of_every_tag_is_found(qwen):
    tokenizer, automaton = qwen
    id_of = {text: i for i, text in enumerate(tokenizer.token_bytes) if text}
    counts = {}
    for kind, status in (("search", SEARCH), ("answer", ANSWER)):
        openings, closings = (
            list_splits(tag.encode(), id_of) for tag in (f"<{kind}>", f"</{kind}>")
        )
        for opening in openings:
            for closing in closings:
                ids = [*opening, id_of[b" x"], *closing, id_of[b" y"]]
                assert run_automaton(ids, automaton) == (len(ids) - 2, status)
        counts[kind] = len(openings) * len(closings)
    assert counts["search"] > 1000 and counts["answer"] > 1000


def test_the_stop_token_may_hold_more_than_the_tag(qwen):
    """`?</search>` and a blank line: [26055, 1836, 1339]; the last token is `>\\n\\n`."""
    tokenizer, automaton = qwen
    ids = tokenizer.encode("<search>who?</search>\n\n")
    assert ids[-3:] == [26055, 1836, 1339]
    assert run_automaton(ids, automaton) == (len(ids) - 1, SEARCH)
    assert decode_query(np.array(ids), tokenizer.token_bytes) == "who?"


def make_continuation(rng, tokenizer, by_text, tag_like):
    """A random turn of fragments around tags.

    The tokenizer encodes it, or it is cut into tokens at random; then random tokens are inserted.
    """
    opening = rng.choice(("", "<search>", "<answer>"))
    text = opening + "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(1, 12)))
    if rng.random() < 0.3:
        ids = tokenizer.encode(text)
    else:
        ids, rest = [], text.encode()
        while rest:
            ids.append(rng.choice([by_text[rest[:n]] for n in range(1, 13) if rest[:n] in by_text]))
            rest = rest[len(tokenizer.token_bytes[ids[-1]]) :]
    for _ in range(rng.randrange(3)):
        kind = rng.random()
        if kind < 0.5:
            new = rng.choice(tag_like)
        elif kind < 0.9:
            new = rng.randrange(tokenizer.vocab_size)
        else:
            new = rng.choice(tokenizer.eos_ids)
        ids.insert(rng.randrange(len(ids) + 1), new)
    return ids


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_real_vocabulary_agrees_with_string_search(qwen, count):
    tokenizer, automaton = qwen
    by_text = {text: i for i, text in enumerate(tokenizer.token_bytes) if text}
    tag_like = [
        i
        for i, text in enumerate(tokenizer.token_bytes)
        if any(piece in text for piece in (b"<", b">", b"search", b"answer"))
    ]
    rng = random.Random(count)
    seen = {0: 0, SEARCH: 0, ANSWER: 0, INVALID: 0}
    mismatches = []
    for _ in range(count):
        ids = make_continuation(rng, tokenizer, by_text, tag_like)
        expected = search_strings(ids, tokenizer.token_bytes, tokenizer.eos_ids)
        seen[expected[1]] += 1
        turn = ids if expected[0] is None else ids[: expected[0] + 1]
        parsed = parse_action(tokenizer.decode(turn))[0]
        if run_automaton(ids, automaton) != expected or parsed != (expected[1] or INVALID):
            mismatches.append((ids, expected, parsed))
    assert mismatches == []
    assert min(seen.values()) > count / 40, seen  # all four outcomes were tried
