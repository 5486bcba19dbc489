"""The text side of the program: questions, documents and what happened in an episode.

Plain immutable records of strings and integers. Nothing here knows about tokens or devices; the
array side is `types.py`, and only `rollout/` turns one into the other.
"""

from __future__ import annotations

import dataclasses
import enum


class TurnStatus(enum.IntEnum):
    """What one turn of an episode was. The values are stored in `Trajectory.turn_status`."""

    NONE = 0  # the turn never happened
    SEARCH = 1  # a well-formed <search>…</search>
    INVALID = 2  # no well-formed action: a warning follows; the turn counts against the budget
    ANSWER = 3  # a well-formed <answer>…</answer>: the episode is over


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One passage of a corpus. `id` is its row in the corpus, the only identity used anywhere."""

    id: int
    title: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class SubQuestion:
    """One hop of a question, with earlier answers filled in.

    `gold_ids` are the corpus ids of the documents that hold the answer; `queries` are the accepted
    search queries (the k_ij of the key reward). `missing_gold` are title and text of gold documents
    that the corpus does not hold (text "" if the data set names them by title alone, title "" if it
    gives a title or a text without saying which).
    """

    question: str
    answer: str
    aliases: tuple[str, ...] = ()
    gold_ids: tuple[int, ...] = ()
    queries: tuple[str, ...] = ()
    missing_gold: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A multi-hop question.

    `uid` is the data set's own identifier, `shape` the graph shape or type (for tables), for
    example "2hop". `loose_gold_ids` and `loose_missing_gold` are gold documents that the data set
    assigns to no sub-question. `unordered`: each accepted answer is a list with commas, whose
    entries may stand in any order.
    """

    uid: str
    question: str
    answer: str
    aliases: tuple[str, ...] = ()
    sub_questions: tuple[SubQuestion, ...] = ()
    shape: str = ""
    loose_gold_ids: tuple[int, ...] = ()
    loose_missing_gold: tuple[tuple[str, str], ...] = ()
    unordered: bool = False

    @property
    def answers(self) -> tuple[str, ...]:
        """Every accepted answer, the canonical one first."""
        return (self.answer, *self.aliases)

    @property
    def gold_ids(self) -> tuple[int, ...]:
        """Corpus ids of all gold documents, each once, in order of the hops, loose ones last."""
        hops = (i for sub in self.sub_questions for i in sub.gold_ids)
        return tuple(dict.fromkeys((*hops, *self.loose_gold_ids)))

    @property
    def missing_gold(self) -> tuple[tuple[str, str], ...]:
        """Title and text of all gold documents that the corpus does not hold, each once."""
        hops = (passage for sub in self.sub_questions for passage in sub.missing_gold)
        return tuple(dict.fromkeys((*hops, *self.loose_missing_gold)))


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One turn: the policy's text up to its closing tag (`action`), and the observation.

    `query` is set on search turns, `answer` on the answer turn. `doc_ids` are the retrieved corpus
    ids, best first, empty when the search failed (`search_ok=False`) or nothing was searched.
    `observation` is the environment's text; nothing parses it.
    """

    status: TurnStatus
    action: str
    query: str | None = None
    answer: str | None = None
    doc_ids: tuple[int, ...] = ()
    search_ok: bool = True
    observation: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Episode:
    """What became of a question. `finished`: the policy answered. `truncated`: out of context."""

    question: Question
    prompt: str
    turns: tuple[Turn, ...]
    finished: bool
    truncated: bool

    @property
    def answer(self) -> str | None:
        """The text between the answer tags, or None when the policy never answered."""
        return self.turns[-1].answer if self.turns else None

    @property
    def search_turns(self) -> tuple[Turn, ...]:
        """The turns that searched, failed searches included."""
        return tuple(turn for turn in self.turns if turn.status == TurnStatus.SEARCH)

    @property
    def queries(self) -> tuple[str, ...]:
        """Every emitted query, in order."""
        return tuple(turn.query for turn in self.search_turns if turn.query is not None)

    @property
    def doc_ids(self) -> tuple[int, ...]:
        """Every retrieved corpus id, in order, repetitions included."""
        return tuple(i for turn in self.turns for i in turn.doc_ids)
