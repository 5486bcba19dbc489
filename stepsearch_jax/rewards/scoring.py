"""Rewards of episodes from their text records (host).

    r_global = r_answer + gamma_key * r_key             [B], for the last action token
    r_step^t = step_scale * (G^t - P^t) - search_cost   [B, K], for the token that closes search t

Source: StepSearch, arXiv 2505.15107, "the paper" below; `Reference:` lines say what its released
code does. Of a turn only `action`, `query`, `answer`, `doc_ids`, `status` and `search_ok` are read.
Observations are not, so tags in a document cannot change a reward. A search is rewarded for what it
found, even if the context had no room left to show it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Sequence

import numpy as np

from stepsearch_jax.choices import check_choice
from stepsearch_jax.records import Episode, Question, Turn, TurnStatus
from stepsearch_jax.rewards import text_metrics
from stepsearch_jax.rewards.tfidf import Similarity

_TAG = re.compile(r"<(/?)(think|plan|observation|search|answer|information|warning)>")
_ENVIRONMENT_TAGS = {"information", "warning"}  # not the policy's to write


@dataclasses.dataclass(frozen=True, slots=True)
class EpisodeMeasures:
    """Quality of the episodes, independent of their rewards; arrays [B]."""

    em: np.ndarray  # [B] float32: exact match, best over the accepted answers
    f1: np.ndarray  # [B] float32: word F1, best over the accepted answers
    cover_em: np.ndarray  # [B] float32: an accepted answer occurs in the given one
    gold_recall: np.ndarray  # [B] float32: fraction of gold documents retrieved, 0 if none known
    gold_known: np.ndarray  # [B] bool: gold documents are known (average gold_recall over these)
    searches: np.ndarray  # [B] int32: search turns, failed ones included


@dataclasses.dataclass(frozen=True, slots=True)
class StepScores:
    """The rewards of B episodes with K turns, and what they are made of."""

    step_rewards: np.ndarray  # [B, K] float32: 0 on turns without a search and on failed searches
    outcome_rewards: np.ndarray  # [B] float32: r_global
    gain: np.ndarray  # [B, K] float32: G, also when switched off
    redundancy: np.ndarray  # [B, K] float32: P, also when switched off
    key_rewards: np.ndarray  # [B] float32: r_key, before gamma_key and before a format failure
    gate_passed: np.ndarray  # [B] bool: the answer's format
    measures: EpisodeMeasures


def score_episodes(
    episodes: Sequence[Episode],
    similarity: Similarity,
    *,
    gain: np.ndarray | None,
    num_turns: int,
    format_gate: str,
    format_failure: str,
    gamma_key: float,
    key_match: str,
    use_gain: bool,
    use_redundancy: bool,
    redundancy_scope: str,
    step_scale: float,
    search_cost: float,
    retrieved_answer_credit: float,
    rendered: Sequence[Hashable] | None,
    texts: Sequence[str] | None,
) -> StepScores:
    """Rewards of B episodes -> `StepScores`.

        r_answer = F1 if the format gate passes, else 0
        r_global = r_answer + gamma_key * r_key                            [B]
        r_step^t = step_scale * (G^t - P^t) - search_cost * [t searched]   [B, K]

    similarity: tf-idf cosines by corpus id (`rewards.tfidf`). gain [B, K]: replaces
    `information_gain` as G; it must be 0 on turns without a successful search. num_turns: K.
    rendered[i]: the text of document i, or anything that is equal for documents of equal texts;
    only redundancy_scope="rendered" needs it. texts[i]: document i, title and text in one;
    only a retrieved_answer_credit other than 0 needs it. The other keywords are keys of
    `config.reward`:

    format_gate: "strict" is the paper's (`passes_strict_gate`), or "ends_with_answer".
    format_failure: "zero_answer" sets r_answer = 0 and keeps key and step rewards; "minus_one" sets
      r_global = -1 and the step rewards to 0.
      Reference: the paper has the first of each, the released code the second.
    step_scale. Reference: 1 in the paper; the released code intends 0.6 and really adds 1.6 (it
      updates the row through a view of itself).
    gamma_key. Reference: 0.618 in the released code; the paper does not state it.
    search_cost: subtracted at every search that did not fail, unscaled. Ours; 0 in the paper and
      its code.
    retrieved_answer_credit: replaces r_answer if the F1 is 0 and a retrieved document holds an
      accepted answer (`retrieved_answer`). The gate applies to it too: otherwise a malformed wrong
      answer would earn more than a malformed right one, and an episode without an answer as much as
      one that tries. Ours; 0 in the paper and its code.

    Raises ValueError on an unknown choice, if a choice lacks its data, or if an episode searches in
    a turn beyond K.
    """
    check_choice("reward.format_gate", format_gate)
    check_choice("reward.format_failure", format_failure)
    check_choice("reward.key_match", key_match)
    check_choice("reward.redundancy_scope", redundancy_scope)
    if redundancy_scope == "rendered" and rendered is None:
        raise ValueError(
            "reward.redundancy_scope is 'rendered', which needs rendered: the text of each document"
        )
    if retrieved_answer_credit and texts is None:
        raise ValueError(
            f"reward.retrieved_answer_credit is {retrieved_answer_credit}, which needs texts: title"
            " and text of each document"
        )

    # Per episode: penalties, answered searches, key reward, gate, and whether it found an answer.
    shape = len(episodes), num_turns
    redundancy, served = np.zeros(shape, np.float32), np.zeros(shape, bool)
    key_rewards = np.zeros(shape[0], np.float32)
    gate_passed, held = np.zeros(shape[0], bool), np.zeros(shape[0], bool)
    measures = measure_episodes(episodes)
    for b, episode in enumerate(episodes):
        if any(turn.status == TurnStatus.SEARCH for turn in episode.turns[num_turns:]):
            raise ValueError(
                f"episode {b} (question {episode.question.uid}) searches after turn {num_turns},"
                " the last with a step reward; give a larger num_turns"
            )
        turns = episode.turns[:num_turns]
        if redundancy_scope == "earlier_turns":
            redundancy[b, : len(turns)] = redundancy_by_id(turns)
        elif measures.gold_known[b]:
            assert rendered is not None  # checked above
            redundancy[b, : len(turns)] = redundancy_by_rendering(turns, rendered)
        served[b, : len(turns)] = [
            turn.status == TurnStatus.SEARCH and turn.search_ok for turn in turns
        ]
        key_rewards[b] = key_reward(episode.queries, episode.question, key_match=key_match)
        gate_passed[b] = _GATES[format_gate](episode)
        if retrieved_answer_credit and measures.f1[b] == 0:
            assert texts is not None  # checked above
            held[b] = retrieved_answer(episode, texts)

    # Step and outcome rewards of all episodes.
    if gain is None:
        gain = information_gain(episodes, similarity, num_turns=num_turns)
    gain = np.asarray(gain, np.float32)
    step_rewards = (
        np.float32(step_scale) * (gain * use_gain - redundancy * use_redundancy)
        - np.float32(search_cost) * served
    )
    credit = np.float32(retrieved_answer_credit)
    answer_rewards = np.where(gate_passed, np.where(held, credit, measures.f1), 0)
    outcome_rewards = answer_rewards + np.float32(gamma_key) * key_rewards
    if format_failure == "minus_one":
        step_rewards = np.where(gate_passed[:, None], step_rewards, 0)
        outcome_rewards = np.where(gate_passed, outcome_rewards, -1)
    return StepScores(
        step_rewards=step_rewards.astype(np.float32),
        outcome_rewards=outcome_rewards.astype(np.float32),
        gain=gain,
        redundancy=redundancy,
        key_rewards=key_rewards,
        gate_passed=gate_passed,
        measures=measures,
    )


def measure_episodes(episodes: Sequence[Episode]) -> EpisodeMeasures:
    """Answer and retrieval quality of B episodes -> `EpisodeMeasures`.

    Evaluation reports these; no format gate and no similarity enters.
    """
    answers = [
        text_metrics.compare_answer(
            episode.answer, episode.question.answers, episode.question.unordered
        )
        for episode in episodes
    ]
    answers = np.array(answers, np.float32).reshape(-1, 3)
    gold = [set(episode.question.gold_ids) for episode in episodes]
    recall = [
        len(ids.intersection(episode.doc_ids)) / max(len(ids), 1)
        for ids, episode in zip(gold, episodes)
    ]
    return EpisodeMeasures(
        em=answers[:, 0],
        f1=answers[:, 1],
        cover_em=answers[:, 2],
        gold_recall=np.array(recall, np.float32),
        gold_known=np.array([bool(ids) for ids in gold], bool),
        searches=np.array([len(episode.search_turns) for episode in episodes], np.int32),
    )


def information_gain(
    episodes: Sequence[Episode], similarity: Similarity, *, num_turns: int
) -> np.ndarray:
    """G (paper, information gain): how much closer each turn came to the gold documents.

        c_i^t = max_j cos(gold_i, d_j^t)
        m_i^t = max(m_i^{t-1}, c_i^t),    m_i^0 = 0
        G^t = (1/n) Σ_i max(c_i^t - m_i^{t-1}, 0) = (1/n) Σ_i (m_i^t - m_i^{t-1})

    -> [B, K] float64, over the n gold documents of each question and the documents d_j^t of turn t.
    The sum over t telescopes to (1/n) Σ_i m_i <= 1. Without gold documents G is 0; a failed search
    has no gain and leaves no memory.
    """
    gold_ids = [episode.question.gold_ids for episode in episodes]
    # Per episode with gold documents: its searches as (turn, retrieved ids).
    found = [
        [(t, turn.doc_ids) for t, turn in enumerate(episode.turns[:num_turns]) if _retrieved(turn)]
        if ids
        else []
        for episode, ids in zip(episodes, gold_ids)
    ]
    rows = [(b, t, len(ids)) for b, turns in enumerate(found) for t, ids in turns]
    if not rows:
        return np.zeros((len(episodes), num_turns))
    doc_ids = [[i for _, ids in turns for i in ids] for turns in found]
    next_ranks = [[rank for _, ids in turns for rank in _next_ranks(len(ids))] for turns in found]
    cosines = similarity.similarity(gold_ids, doc_ids, next_ranks)  # [n, R]
    b, t, documents = np.array(rows).T
    # c [n, B, K]: 0, which changes no memory, on turns that retrieved nothing.
    best = np.zeros((len(cosines), len(episodes), num_turns))
    best[:, b, t] = np.maximum.reduceat(cosines, np.cumsum(documents) - documents, axis=1)
    memory = np.maximum.accumulate(best, axis=2)
    # Python's sum adds one gold document after the other, so the last bit of an episode's gain does
    # not depend on the batch around it.
    reached = sum(memory) / np.maximum([len(ids) for ids in gold_ids], 1)[:, None]
    return np.diff(reached, axis=1, prepend=0)


def redundancy_by_id(turns: Sequence[Turn]) -> np.ndarray:
    """P [len(turns)] (paper, redundancy penalty), by corpus id.

        P^t = (1/k) Σ_j [d_j^t seen in an earlier turn]

    k counts the documents that came back, which may be fewer than config.search.k in a small corpus
    or for a rare query. A failed search is not penalised and its documents do not count as seen.
    Gold documents are not needed.
    """
    penalty, seen = np.zeros(len(turns)), set()
    for t, turn in enumerate(turns):
        if _retrieved(turn):
            penalty[t] = sum(i in seen for i in turn.doc_ids) / len(turn.doc_ids)
            seen.update(turn.doc_ids)
    return penalty


def redundancy_by_rendering(turns: Sequence[Turn], rendered: Sequence[Hashable]) -> np.ndarray:
    """P [len(turns)] as the released code counts it.

    Reference: it compares texts, each with the label of the next rank behind it ("… Doc 2"), which
      it fails to cut off. So a document is redundant only if it was seen at the same rank before,
      and also last, or not last. It has no penalty for questions without gold documents either
      (`score_episodes` leaves those out).
    """
    penalty, seen = np.zeros(len(turns)), set()
    for t, turn in enumerate(turns):
        ids = turn.doc_ids if _retrieved(turn) else ()
        for shown in zip((rendered[i] for i in ids), _next_ranks(len(ids))):
            penalty[t] += (shown in seen) / len(ids)
            seen.add(shown)
    return penalty


def _next_ranks(documents: int) -> list[int]:
    """The rank that follows each document of a search, from 2; 0 behind the last."""
    return [*range(2, documents + 1), 0][:documents]


def key_reward(queries: Sequence[str], question: Question, *, key_match: str) -> float:
    """Search-key reward (paper), in [0, 1].

        r_key = (1/M) Σ_i max_{j,t} F1(q_t, k_ij)

    q_t: emitted queries. k_ij: accepted queries of sub-question i. M: number of sub-questions with
    accepted queries; r_key = 0 if M = 0 or nothing was searched.
    Reference ("overwrite"): the released code assigns each query to the one sub-question that it
      fits best and overwrites the F1 there. So a later, worse query lowers the reward, and one
      query never serves two sub-questions. Ties go to the first; a query that fits none overwrites
      nothing.
    """
    groups = [sub.queries for sub in question.sub_questions if sub.queries]
    if not groups or not queries:
        return 0.0
    matches = text_metrics.match_queries(queries, groups)  # [t][i]
    if key_match == "max":
        return sum(map(max, zip(*matches))) / len(groups)
    matched = [0.0] * len(groups)
    for row in matches:
        best = max(row)
        if best > 0:
            matched[row.index(best)] = best
    return sum(matched) / len(groups)


def retrieved_answer(episode: Episode, texts: Sequence[str]) -> bool:
    """Whether a retrieved document holds an accepted answer as whole words, both normalised.

    Document i is `texts[i]`, not what the episode showed of it.
    """
    ids = {i for turn in episode.turns if _retrieved(turn) for i in turn.doc_ids}
    answers, unordered = episode.question.answers, episode.question.unordered
    return any(text_metrics.holds_answer(texts[i], answers, unordered) for i in ids)


def passes_strict_gate(episode: Episode) -> bool:
    """The paper's format gate: a search, exactly one answer at the very end, well-formed turns.

    The answer is one <answer>…</answer> in all actions together; white space may follow. Well
    formed: no invalid turn; in each action every tag is closed before the next one opens, so
    nothing is nested or left open; and the policy never writes the environment's <information> or
    <warning>.
    """
    if not episode.search_turns or any(turn.status == TurnStatus.INVALID for turn in episode.turns):
        return False
    tags = [_TAG.findall(turn.action) for turn in episode.turns]
    names = [name for turn_tags in tags for _, name in turn_tags]
    return (
        all(_is_flat(turn_tags) for turn_tags in tags)
        and _ENVIRONMENT_TAGS.isdisjoint(names)
        and names.count("answer") == 2
        and passes_ending_gate(episode)
    )


def passes_ending_gate(episode: Episode) -> bool:
    """The released code's format gate: the text ends with a whole <answer>…</answer>.

    White space may follow.
    Reference: the released code reads the whole text, documents included; here only the policy's
      actions are read.
    """
    if not episode.turns or not episode.turns[-1].action.rstrip().endswith("</answer>"):
        return False
    text = "".join(turn.action for turn in episode.turns).rstrip()
    # Opened since the last one was closed.
    return "<answer>" in text[text[:-1].rfind("</answer>") + 1 :]


_GATES = {"strict": passes_strict_gate, "ends_with_answer": passes_ending_gate}


def _is_flat(tags: Sequence[tuple[str, str]]) -> bool:
    """Each opening tag is directly followed by its closing one; tags are ("" or "/", name)."""
    closing = [("/", name) for slash, name in tags[::2] if not slash]
    return len(tags) % 2 == 0 and closing == tags[1::2]


def _retrieved(turn: Turn) -> bool:
    """The turn searched, and documents came back."""
    return turn.status == TurnStatus.SEARCH and turn.search_ok and bool(turn.doc_ids)
