"""The tags of an action, and the automaton that finds them in sampled tokens at the exact byte.

The rule, for one turn: the action ends at the first closing tag, `</search>` or `</answer>`, at the
token that completes it; what that token holds beyond the tag is ignored. The action is well-formed
if the last opening tag before it is of the same kind; otherwise, or if an end token comes first,
the turn is invalid.

`parse_action` applies the rule to text. `make_tag_automaton` compiles the same rule into a table
over
token ids, because a tag has no stable split into tokens: in byte-pair encodings `>` merges with the
text that follows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stepsearch_jax.records import TurnStatus

KINDS = {"search": TurnStatus.SEARCH, "answer": TurnStatus.ANSWER}
TAGS = tuple(f"<{slash}{kind}>" for kind in KINDS for slash in ("", "/"))
_TAG = re.compile("<(/?)(" + "|".join(KINDS) + ")>")


class TagAutomaton(NamedTuple):
    """The rule as a finite automaton over S states and V token ids.

    next_state [S, V] smallest signed integer type that holds S: the state after a token. States
        with an event lead to themselves, whatever the token.
    mode [S] int8: kind of the last opening tag: 0 none, 1 search, 2 answer; 0 in states with an
        event.
    event [S] int8: 0 = the action goes on, else the `TurnStatus` with which it ended (SEARCH,
        INVALID or ANSWER).
    start: the state before the first token of a turn.
    """

    next_state: np.ndarray
    mode: np.ndarray
    event: np.ndarray
    start: int


def make_tag_automaton(token_bytes: Sequence[bytes], eos_ids: Sequence[int]) -> TagAutomaton:
    """Compiles the rule for a vocabulary.

    token_bytes: the bytes of each of the V tokens (control tokens have none, so they can never be
    part of a tag). eos_ids: tokens that end a turn as invalid, unless they complete a closing tag,
    as `</answer>` does for a policy that ends its texts with it. Raises ValueError if an end token
    is not in the vocabulary.
    """
    vocab = len(token_bytes)
    if bad := [i for i in eos_ids if not 0 <= i < vocab]:
        raise ValueError(f"end token {bad[0]} is not in the vocabulary of {vocab} tokens")
    table, mode, event, start = _make_byte_automaton()

    # With the longest tokens first, those with a byte at some position are a leading slice.
    order = np.argsort([-len(b) for b in token_bytes], kind="stable")
    ordered = [token_bytes[i] for i in order]
    lengths = np.array([len(b) for b in ordered])
    columns = []
    for position in range(lengths.max(initial=0)):
        count = int(np.searchsorted(-lengths, -position))  # tokens longer than `position`
        columns.append(np.frombuffer(bytes(b[position] for b in ordered[:count]), np.uint8))

    next_state = np.empty((len(table), vocab), table.dtype)
    for state in range(len(table)):
        reached = np.full(vocab, state, table.dtype)
        for column in columns:
            reached[: len(column)] = table[reached[: len(column)], column]
        next_state[state, order] = reached
    going_on = np.flatnonzero(event == 0)
    invalid = int(np.flatnonzero(event == TurnStatus.INVALID)[0])
    for end in eos_ids:
        unended = going_on[event[next_state[going_on, end]] == 0]
        next_state[unended, end] = invalid
    return TagAutomaton(next_state, mode, event, start)


def _make_byte_automaton() -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The automaton over bytes: (next_state [S, 256], mode [S], event [S], start).

    A state is (the longest prefix of a tag that the text ends with, kind of the last opening tag),
    or one of three ends. A tag holds `<` only at its start, so a byte that does not continue the
    prefix falls back to `<` or to nothing: the failure links of Aho and Corasick (1975) have no
    other targets here.
    """
    prefixes = sorted({tag[:n] for tag in TAGS for n in range(len(tag))})
    modes = (0, *range(1, len(KINDS) + 1))
    states = [(prefix, mode) for mode in modes for prefix in prefixes]
    number = {state: i for i, state in enumerate(states)}
    ends = {
        status: len(states) + i
        for i, status in enumerate((TurnStatus.SEARCH, TurnStatus.INVALID, TurnStatus.ANSWER))
    }
    size = len(states) + len(ends)

    next_state = np.empty((size, 256), np.min_scalar_type(-size))
    next_state[:] = np.arange(size)[:, None]
    statuses = (None, *KINDS.values())
    for (prefix, mode), state in number.items():
        next_state[state] = number["", mode]
        next_state[state, ord("<")] = number["<", mode]
        for byte in {tag[len(prefix)] for tag in TAGS if tag.startswith(prefix)}:
            text = prefix + byte
            if text not in TAGS:
                target = number[text, mode]
            elif text.startswith("</"):
                status = KINDS[text[2:-1]]
                target = ends[status if statuses[mode] == status else TurnStatus.INVALID]
            else:
                target = number["", list(KINDS).index(text[1:-1]) + 1]
            next_state[state, ord(byte)] = target

    mode_of = np.array([mode for _, mode in states] + [0] * len(ends), np.int8)
    event_of = np.array([0] * len(states) + [int(status) for status in ends], np.int8)
    return next_state, mode_of, event_of, number["", 0]


def cut_action(text: str) -> str:
    """One turn's text up to its closing tag: the token that completes it may hold more."""
    closing = re.search("</(" + "|".join(KINDS) + ")>", text)
    return text[: closing.end()] if closing else text


def parse_action(text: str) -> tuple[TurnStatus, str | None]:
    """Status and content of one turn, from the text of its action tokens alone.

    The text must not hold documents. Returns (SEARCH, query), (ANSWER, answer) or (INVALID, None);
    query and answer without surrounding white space, possibly empty. Agrees with the automaton for
    every text; the rollout limits the number of tokens.
    """
    opened: tuple[str, int] | None = None
    for match in _TAG.finditer(text):
        slash, kind = match.groups()
        if not slash:
            opened = (kind, match.end())
        elif opened is not None and opened[0] == kind:
            return KINDS[kind], text[opened[1] : match.start()].strip()
        else:
            break
    return TurnStatus.INVALID, None


def decode_query(ids: np.ndarray, token_bytes: Sequence[bytes]) -> str:
    """The query in the last tokens of a search turn: between the last `<search>` and `</search>`.

    ids: [n] token ids; they must reach back far enough to hold the whole opening tag. Raises
    ValueError if they hold no well-formed search.
    """
    text = b"".join(token_bytes[i] for i in ids).decode("utf-8", errors="replace")
    status, query = parse_action(text)
    if status != TurnStatus.SEARCH or query is None:
        raise ValueError(f"no <search>…</search> in the query tokens: {text!r}")
    return query
