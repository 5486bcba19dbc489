"""A scripted searcher that follows the questions' own decomposition, or their gold documents.

It searches perfectly, or poorly in chosen proportions, and reads without error. Its episodes are
`Trajectory`s with NumPy arrays, so they are scored, shown and imitated like the policy's own.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from stepsearch_jax.prompting.tokenizers import Tokenizer
from stepsearch_jax.records import Document, Question, SubQuestion, TurnStatus
from stepsearch_jax.rollout.programs import Search
from stepsearch_jax.rollout.state import RolloutSettings
from stepsearch_jax.types import Trajectory

PERFECT = {"good": 1.0}
KINDS = ("good", "vague", "repeat", "wrong", "early")


@dataclasses.dataclass
class _Searcher:
    """What the script knows in one episode: the hops resolved so far, and what it has seen."""

    question: Question
    hops: Sequence[SubQuestion]  # `list_hops`
    rng: np.random.Generator
    known_fraction: float
    resolved: int = 0
    tried: int = 0  # good queries for the current hop so far
    thought: str = ""  # what the last search found out, "" for nothing
    last_query: str = ""
    seen_titles: list[str] = dataclasses.field(default_factory=list)

    def act(self, decision_weights: Mapping[str, float], last_turn: bool) -> tuple[TurnStatus, str]:
        """The next action: (SEARCH, query) or (ANSWER, answer)."""
        hops = self.hops
        if self.resolved == len(hops):
            return TurnStatus.ANSWER, self.question.answer
        queries = hops[self.resolved].queries or (hops[self.resolved].question,)
        words = queries[0].split()
        fractions = np.array(list(decision_weights.values())) / sum(decision_weights.values())
        kind = str(self.rng.choice(list(decision_weights), p=fractions))
        # The last word is the relation that the hop asks for. Known ones are always queried well.
        if zlib.crc32(words[-1].encode()) < self.known_fraction * 2**32:
            kind = "good"
        if last_turn or (kind == "early" and self.resolved):
            guesses = self.seen_titles or [self.last_query]
            found = hops[self.resolved - 1].answer if self.resolved else ""
            return TurnStatus.ANSWER, found or guesses[-1]
        if kind == "good":
            query = queries[self.tried % len(queries)]
            self.tried += 1
        elif kind == "repeat" and self.last_query:
            query = self.last_query
        elif kind == "wrong" and self.seen_titles:
            query = f"{self.rng.choice(self.seen_titles)} {words[-1]}"
        else:
            query = words[-1]  # vague: the relation without the entity
        self.last_query = query
        return TurnStatus.SEARCH, query

    def read(self, doc_ids: np.ndarray, documents: Sequence[Document]) -> None:
        """Resolves the current hop if its document was found, and remembers the titles."""
        hops = self.hops
        found = {int(i) for i in doc_ids if i >= 0}
        self.thought = ""
        if self.resolved < len(hops) and found.intersection(hops[self.resolved].gold_ids):
            hop = hops[self.resolved]
            if hop.answer:
                self.thought = f"{(hop.queries or (hop.question,))[0].split()[-1]}: {hop.answer}"
            self.resolved += 1  # one search settles one hop: the next query needs this answer
            self.tried = 0
        self.seen_titles += [documents[i].title for i in sorted(found)]


def list_hops(question: Question, documents: Sequence[Document]) -> tuple[SubQuestion, ...]:
    """What the script searches for, in order: the sub-questions, or else the gold documents by
    their titles. Empty if the question names neither.
    """
    if question.sub_questions:
        return question.sub_questions
    gold = ((i, documents[i]) for i in question.gold_ids)
    return tuple(
        SubQuestion(document.title or document.text, "", gold_ids=(i,)) for i, document in gold
    )


def format_action(thought: str, status: TurnStatus, content: str) -> str:
    """The text of an action, as demonstrations teach it.

    Saying what was read before using it makes reading far easier to learn.
    """
    tag = "search" if status == TurnStatus.SEARCH else "answer"
    return (f"<think> {thought}</think>" if thought else "") + f"<{tag}> {content}</{tag}>"


def run_script(
    questions: Sequence[Question],
    prompts: np.ndarray,
    prompt_length: np.ndarray,
    documents: Sequence[Document],
    search: Search,
    tokenizer: Tokenizer,
    settings: RolloutSettings,
    last_turn_warning: np.ndarray,
    decision_weights: Mapping[str, float],
    known_fraction: float,
    seed: int,
) -> Trajectory:
    """Runs the script on B questions, turn by turn in step -> Trajectory with NumPy arrays.

    prompts: [B, P] int32; prompt_length: [B]; search: the rollout's own callback; decision_weights:
    relative frequency of each of `KINDS` per decision (`PERFECT` for a searcher without fault);
    known_fraction: of relations that it always queries well, drawn by a hash of the last word of a
    hop's first query. Raises ValueError for an unknown kind, and for an episode that does not fit
    into the context.
    """
    if unknown := set(decision_weights) - set(KINDS):
        raise ValueError(
            f"config.sft.decision_weights names {sorted(unknown)}; known are {', '.join(KINDS)}"
        )
    # The record of B episodes (see `Trajectory`), and a searcher for each.
    B, T, K = len(questions), settings.context, settings.turns
    tokens, actions = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    turn_ids = np.full((B, T), -1, np.int32)
    tokens[:, : prompts.shape[1]] = prompts
    length = prompt_length.astype(np.int32).copy()
    search_end, statuses = np.full((B, K), -1, np.int32), np.zeros((B, K), np.int32)
    doc_ids, ok = np.full((B, K, settings.documents), -1, np.int32), np.zeros((B, K), bool)
    searchers = [
        _Searcher(
            question,
            list_hops(question, documents),
            np.random.default_rng([seed, row]),
            known_fraction,
        )
        for row, question in enumerate(questions)
    ]
    finished = np.zeros(B, bool)

    def append(row: int, ids: Sequence[int], turn: int, is_action: bool) -> None:
        end = length[row] + len(ids)
        if end > T:
            raise ValueError(
                f"the scripted episode of question {questions[row].uid} needs more than "
                f"config.rollout.context={T} tokens: raise it"
            )
        tokens[row, length[row] : end] = ids
        actions[row, length[row] : end] = is_action
        turn_ids[row, length[row] : end] = turn
        length[row] = end

    for turn in range(K):
        # The action of every episode that has not answered yet.
        query_tokens = np.zeros((B, settings.max_turn_tokens), np.int32)
        query_length = np.zeros(B, np.int32)
        for row in np.flatnonzero(~finished):
            status, content = searchers[row].act(decision_weights, last_turn=turn == K - 1)
            ids = tokenizer.encode(format_action(searchers[row].thought, status, content))
            if len(ids) > settings.max_turn_tokens:
                raise ValueError(
                    f"a scripted action of question {questions[row].uid} has {len(ids)} tokens, "
                    "more than config.rollout.max_turn_tokens: raise it"
                )
            append(row, ids, turn, is_action=True)
            statuses[row, turn] = status
            finished[row] = status == TurnStatus.ANSWER
            if status == TurnStatus.SEARCH:
                search_end[row, turn] = length[row] - 1
                query_tokens[row, : len(ids)], query_length[row] = ids, len(ids)
        # One search for all, and what each reads; before the last turn also the warning.
        wanted = statuses[:, turn] == TurnStatus.SEARCH
        observed, observed_length, found, found_ok = search(query_tokens, query_length, wanted)
        for row in np.flatnonzero(wanted):
            observation = observed[row, : observed_length[row]]
            if turn == K - 2:
                observation = np.concatenate([observation, last_turn_warning])
            append(row, observation, turn, is_action=False)
            doc_ids[row, turn], ok[row, turn] = found[row], found_ok[row]
            searchers[row].read(found[row], documents)
    ids = np.arange(B, dtype=np.int32)
    return Trajectory(
        tokens=tokens,
        token_mask=np.arange(T) < length[:, None],
        action_mask=actions,
        turn_ids=turn_ids,
        sampler_logprobs=np.zeros((B, T), np.float32),
        search_end=search_end,
        turn_status=statuses,
        doc_ids=doc_ids,
        search_ok=ok,
        length=length,
        prompt_length=prompt_length.astype(np.int32),
        finished=finished,
        truncated=np.zeros(B, bool),
        question_ids=ids,
        group_ids=ids,
    )
