"""The transcripts of the report: reads them, splits the policy's tags, selects what to show."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from stepsearch_jax.files import read_json_lines

_SHOWN_EPISODES = 60  # transcripts on the page; the file may hold thousands
_FEATURED_QUESTIONS = 3  # unfolded questions of each kind: improved, failed, typical

_POLICY_TAGS = ("think", "plan", "search", "answer")
_TAG = re.compile(rf"</?({'|'.join(_POLICY_TAGS)})>")


def split_tags(action: str) -> list[tuple[str, str, bool]]:
    """The policy's text in pieces, which joined are `action`.

    A piece is (tag that it belongs to or "", text, whether it is the tag itself).
    """
    pieces, inside, at = [], "", 0
    for match in _TAG.finditer(action):
        if match.start() > at:
            pieces.append((inside, action[at : match.start()], False))
        pieces.append((match[1], match[0], True))
        inside = "" if match[0].startswith("</") else match[1]
        at = match.end()
    if at < len(action):
        pieces.append((inside, action[at:], False))
    return pieces


def _closing_warning(turn: Mapping[str, Any]) -> str:
    """The environment's warning after the documents, or ""; text in a document is never one."""
    tail = turn["observation"].rpartition("</information>")[2].strip()
    is_warning = tail.startswith("<warning>") and tail.endswith("</warning>")
    in_document = any(
        tail in document["text"] or tail in document["title"] for document in turn["documents"]
    )
    return tail if is_warning and not in_document else ""


_EPISODE_KEYS = (
    "when",
    "uid",
    "question",
    "shape",
    "answers",
    "prediction",
    "em",
    "f1",
    "finished",
    "truncated",
    "outcome_reward",
    "key_reward",
    "turns",
)
_TURN_KEYS = (
    "status",
    "action",
    "query",
    "search_ok",
    "observation",
    "documents",
    "gain",
    "redundancy",
    "step_reward",
)
_DOCUMENT_KEYS = ("id", "title", "text", "gold", "seen")


def read_transcripts(path: pathlib.Path) -> list[dict[str, Any]]:
    """The episodes of the file; each turn gets "pieces" (of its action, to colour) and "warning".

    Raises ValueError, with the episode's number, for a malformed one.
    """
    episodes = read_json_lines(path)
    for number, episode in enumerate(episodes, start=1):
        turns = episode.get("turns", [])
        checks = [("the episode", _EPISODE_KEYS, episode)]
        for k, turn in enumerate(turns, start=1):
            checks.append((f"turn {k}", _TURN_KEYS, turn))
            checks += [
                (f"a document of turn {k}", _DOCUMENT_KEYS, document)
                for document in turn.get("documents", [])
            ]
        for what, keys, found in checks:
            absent = [key for key in keys if key not in found]
            if absent:
                raise ValueError(
                    f"{path}, episode {number}: {what} has no {', '.join(absent)}; write the "
                    "file again with python -m stepsearch_jax.evaluate"
                )
        if episode["when"] not in ("before", "after"):
            raise ValueError(
                f'{path}, episode {number}: "when" is {episode["when"]!r}; it must be "before" or '
                '"after"'
            )
        for k, turn in enumerate(turns, start=1):
            if turn["status"] not in ("search", "invalid", "answer"):
                raise ValueError(
                    f'{path}, episode {number}, turn {k}: "status" is {turn["status"]!r}; it must '
                    'be "search", "invalid" or "answer"'
                )
            turn["pieces"] = split_tags(turn["action"].strip())
            turn["warning"] = _closing_warning(turn)
    return episodes


@dataclasses.dataclass(frozen=True)
class _Pair:
    """One question with its episodes: before RL, after it, or both, in this order."""

    episodes: tuple[dict[str, Any], ...]

    @property
    def final(self) -> dict[str, Any]:
        return self.episodes[-1]

    @property
    def change(self) -> float:
        """Rise of F1; 0 when there is nothing to compare."""
        return self.final["f1"] - self.episodes[0]["f1"]


def select(episodes: Iterable[dict[str, Any]]) -> tuple[dict[str, list[_Pair]], list[_Pair]]:
    """-> (questions to show unfolded, further ones to show folded), at most 60 episodes in all.

    Unfolded are three kinds. "improved": the largest rises of F1. "failed": F1 fell, or is 0 at the
    end; the deepest falls first. "typical": at even distances among all others. The further ones
    keep the order of the file.
    """
    # The n-th episode before RL with an id belongs to the n-th after it: ids may recur in merged
    # data sets.
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    seen: collections.Counter = collections.Counter()
    for episode in episodes:
        uid, when = episode["uid"], episode["when"]
        found.setdefault((uid, seen[uid, when]), {})[when] = episode
        seen[uid, when] += 1
    pairs = [
        _Pair(tuple(asked[when] for when in ("before", "after") if when in asked))
        for asked in found.values()
    ]

    better = [pair for pair in pairs if pair.change > 0]
    wrong = [
        pair for pair in pairs if pair.change < 0 or (pair.change == 0 and pair.final["f1"] == 0)
    ]
    improved = sorted(better, key=lambda pair: -pair.change)[:_FEATURED_QUESTIONS]
    failed = sorted(wrong, key=lambda pair: pair.change)[:_FEATURED_QUESTIONS]
    taken = {id(pair) for pair in improved + failed}
    rest = [pair for pair in pairs if id(pair) not in taken]
    count = min(_FEATURED_QUESTIONS, len(rest))
    typical = [rest[(2 * i + 1) * len(rest) // (2 * count)] for i in range(count)]
    taken |= {id(pair) for pair in typical}

    further, shown = [], sum(len(pair.episodes) for pair in pairs if id(pair) in taken)
    for pair in pairs:
        if id(pair) not in taken and shown + len(pair.episodes) <= _SHOWN_EPISODES:
            further.append(pair)
            shown += len(pair.episodes)
    return {"improved": improved, "failed": failed, "typical": typical}, further
