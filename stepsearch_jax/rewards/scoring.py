"""What each episode earned, from its text records (host; StepSearch, arXiv 2505.15107: "the paper" below; its released code where a line says so).

    global reward   r_global = r_answer + gamma_key * r_key                             [B], belongs on the last action token
    step reward     r_step^t = step_scale * (G^t - P^t) - search_cost                   [B, K], belongs on the token that closes turn t's search

Only `action`, `query`, `answer`, `doc_ids`, `status` and `search_ok` of a turn are read. Observations never are, so no document can earn or lose
anything by the tags that it contains. A search is paid for what it found, also where the context had no room left to show it.
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
    """How good the episodes were, whatever they were rewarded for; arrays [B]."""

    em: np.ndarray  # [B] float32: exact match, best over the accepted answers
    f1: np.ndarray  # [B] float32: word F1, best over the accepted answers
    cover_em: np.ndarray  # [B] float32: an accepted answer occurs in the given one
    gold_recall: (
        np.ndarray
    )  # [B] float32: share of the gold documents that were retrieved, 0 where none are known
    gold_known: (
        np.ndarray
    )  # [B] bool: the question names gold documents (average gold_recall over these)
    searches: np.ndarray  # [B] int32: search turns, failed ones included


@dataclasses.dataclass(frozen=True, slots=True)
class StepScores:
    """The rewards of B episodes with K turns, and what they are made of."""

    step_rewards: (
        np.ndarray
    )  # [B, K] float32: 0 on turns that did not search and on failed searches
    outcome_rewards: np.ndarray  # [B] float32: r_global
    gain: np.ndarray  # [B, K] float32: G, also where switched off
    redundancy: np.ndarray  # [B, K] float32: P, also where switched off
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

    similarity: tf-idf cosines by corpus id (`rewards.tfidf`). gain [B, K]: what each turn gained, if it is measured otherwise than by `information_gain`; on
    turns without a successful search it must be 0. num_turns: K. The other keywords are the keys of `config.reward`; `rendered[i]` is
    title and text of document i, or whatever else is equal for documents that render alike, needed by redundancy_scope="rendered" only, else None;
    `texts[i]` is document i, title and text in one, needed by a retrieved_answer_credit other than 0 only, else None.

    format_gate     strict: the paper's format gate (`passes_strict_gate`); ends_with_answer.
    format_failure  zero_answer: r_answer = 0, the key reward and the step rewards stay; minus_one.
    Reference: the paper gates as the first of each. The released code asks only that the text ends with an answer, and a failure makes the whole
      reward -1: no key reward, no step rewards.
    Reference: step_scale is 1 in the paper; the released code means 0.6 and really adds 1.6 (it updates the row through a view of itself).
    Reference: gamma_key = 0.618 stands only in the released code.
    search_cost     taken off for every search that was not a failed one, at its own turn; step_scale does not touch it.
    retrieved_answer_credit  stands in for r_answer where the F1 is 0 and a retrieved document holds an accepted answer (`retrieved_answer`).
      It passes through the gate as r_answer does: otherwise a malformed wrong answer would earn more than a malformed right one, and an episode without an
      answer as much as one that tries.
    Reference: the last two are ours, and 0 in the paper and its released code.

    Raises ValueError if an unknown choice is asked for, if what a choice needs is missing, or if an episode searches in a turn beyond K.
    """
    check_choice("reward.format_gate", format_gate)
    check_choice("reward.format_failure", format_failure)
    check_choice("reward.key_match", key_match)
    check_choice("reward.redundancy_scope", redundancy_scope)
    if redundancy_scope == "rendered" and rendered is None:
        raise ValueError(
            "reward.redundancy_scope is 'rendered', which needs rendered: title and text of each document"
        )
    if retrieved_answer_credit and texts is None:
        raise ValueError(
            f"reward.retrieved_answer_credit is {retrieved_answer_credit}, which needs the documents' texts"
        )

    shape = len(episodes), num_turns
    redundancy, served = np.zeros(shape, np.float32), np.zeros(shape, bool)
    key_rewards, gate_passed, held = (
        np.zeros(shape[0], np.float32),
        np.zeros(shape[0], bool),
        np.zeros(shape[0], bool),
    )
    measures = measure_episodes(episodes)
    for b, episode in enumerate(episodes):
        if any(turn.status == TurnStatus.SEARCH for turn in episode.turns[num_turns:]):
            raise ValueError(
                f"episode {b} (question {episode.question.uid}) searches after turn {num_turns}, the last that rewards have room for"
            )
        turns = episode.turns[:num_turns]
        if redundancy_scope == "earlier_turns":
            redundancy[b, : len(turns)] = redundancy_by_id(turns)
        elif measures.gold_known[b]:
            redundancy[b, : len(turns)] = redundancy_by_rendering(turns, rendered)
        served[b, : len(turns)] = [
            turn.status == TurnStatus.SEARCH and turn.search_ok for turn in turns
        ]
        key_rewards[b] = key_reward(episode.queries, episode.question, key_match=key_match)
        gate_passed[b] = _GATES[format_gate](episode)
        held[b] = (
            retrieved_answer_credit and measures.f1[b] == 0 and retrieved_answer(episode, texts)
        )

    gain = np.asarray(
        information_gain(episodes, similarity, num_turns=num_turns) if gain is None else gain,
        np.float32,
    )
    step_rewards = (
        np.float32(step_scale) * (gain * use_gain - redundancy * use_redundancy)
        - np.float32(search_cost) * served
    )
    answer_rewards = np.where(
        gate_passed, np.where(held, np.float32(retrieved_answer_credit), measures.f1), 0
    )
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
    """Answer and retrieval quality of B episodes -> `EpisodeMeasures`. No format gate, no similarity: what evaluation reports."""
    answers = np.array(
        [
            text_metrics.compare_answer(episode.answer, episode.question.answers)
            for episode in episodes
        ],
        np.float32,
    ).reshape(-1, 3)
    gold = [set(episode.question.gold_ids) for episode in episodes]
    return EpisodeMeasures(
        em=answers[:, 0],
        f1=answers[:, 1],
        cover_em=answers[:, 2],
        gold_recall=np.array(
            [
                len(ids.intersection(episode.doc_ids)) / max(len(ids), 1)
                for ids, episode in zip(gold, episodes)
            ],
            np.float32,
        ),
        gold_known=np.array([bool(ids) for ids in gold], bool),
        searches=np.array([len(episode.search_turns) for episode in episodes], np.int32),
    )


def information_gain(
    episodes: Sequence[Episode], similarity: Similarity, *, num_turns: int
) -> np.ndarray:
    """G [B, K] float64 (paper, information gain): how much closer turn t brought the documents to the gold ones; all episodes in one pass.

    c_i^t = max_j cos(gold_i, d_j^t);  m_i^0 = 0;  m_i^t = max(m_i^{t-1}, c_i^t);  G^t = (1/n) Σ_i max(c_i^t - m_i^{t-1}, 0) = (1/n) Σ_i (m_i^t - m_i^{t-1}).
    The sum over t telescopes to (1/n) Σ_i m_i <= 1. 0 without gold documents; a failed search has no gain and leaves no memory.
    """
    gold_ids = [episode.question.gold_ids for episode in episodes]
    found = [
        [(t, turn.doc_ids) for t, turn in enumerate(e.turns[:num_turns]) if _retrieved(turn)]
        if ids
        else []
        for e, ids in zip(episodes, gold_ids)
    ]
    rows = [(b, t, len(ids)) for b, turns in enumerate(found) for t, ids in turns]
    if not rows:
        return np.zeros((len(episodes), num_turns))
    cosines = similarity.similarity(
        gold_ids, [[i for _, ids in turns for i in ids] for turns in found]
    )  # [n, R]
    b, t, documents = np.array(rows).T
    best = np.zeros(
        (len(cosines), len(episodes), num_turns)
    )  # c; 0, which changes no memory, where nothing was retrieved
    best[:, b, t] = np.maximum.reduceat(cosines, np.cumsum(documents) - documents, axis=1)
    memory = np.maximum.accumulate(best, axis=2)
    # Python's sum adds one gold document after the other: the last bit of an episode's gain does not depend on the batch around it.
    reached = sum(memory) / np.maximum([len(ids) for ids in gold_ids], 1)[:, None]
    return np.diff(reached, axis=1, prepend=0)


def redundancy_by_id(turns: Sequence[Turn]) -> np.ndarray:
    """P [len(turns)] (paper, redundancy penalty): P^t = (1/k) Σ_j [d_j^t seen in an earlier turn], compared by corpus id. Needs no gold documents.

    k counts the documents that came back, which a small corpus or a rare query may leave below config.search.k. A failed search is not penalised and adds
    nothing to what was seen.
    """
    penalty, seen = np.zeros(len(turns)), set()
    for t, turn in enumerate(turns):
        if _retrieved(turn):
            penalty[t] = sum(i in seen for i in turn.doc_ids) / len(turn.doc_ids)
            seen.update(turn.doc_ids)
    return penalty


def redundancy_by_rendering(turns: Sequence[Turn], rendered: Sequence[Hashable]) -> np.ndarray:
    """P [len(turns)] as the released code counts it.

    Reference: documents are compared by their rendered text, and one that stands twice in the same round counts as seen the second time. The
      released code has no penalty for questions without gold documents either (`score_episodes` sees to that).
    """
    penalty, seen = np.zeros(len(turns)), set()
    for t, turn in enumerate(turns):
        for document in (rendered[i] for i in turn.doc_ids) if _retrieved(turn) else ():
            penalty[t] += (document in seen) / len(turn.doc_ids)
            seen.add(document)
    return penalty


def key_reward(queries: Sequence[str], question: Question, *, key_match: str) -> float:
    """r_key in [0, 1] (paper, search-key reward): r_key = (1/M) Σ_i max_{j,t} F1(q_t, k_ij).

    q_t are the emitted queries, k_ij the accepted queries of sub-question i.
    M counts the sub-questions that have accepted queries; with none, or without a search, r_key = 0.
    Reference ("overwrite"): the released code gives each query to the one sub-question that it fits best and overwrites what stood there, so a later,
      worse query lowers the reward and one query never serves two sub-questions. Ties go to the first; a query that fits none overwrites nothing.
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
    """Whether a retrieved document holds an accepted answer as whole words, both normalised; document i reads `texts[i]`, whatever the episode shows."""
    ids = {i for turn in episode.turns if _retrieved(turn) for i in turn.doc_ids}
    return any(text_metrics.holds_answer(texts[i], episode.question.answers) for i in ids)


def passes_strict_gate(episode: Episode) -> bool:
    """The paper's format gate: at least one search; one <answer>…</answer> in all actions, at the very end; every turn well formed.

    Well formed: no invalid turn; in each action every tag is closed before the next one opens, so nothing is nested or left open; and the policy
    never writes the environment's <information> or <warning>. White space may follow the answer.
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
    """The text ends with a whole <answer>…</answer>, white space aside.

    Reference: the released code asks for no more. It reads the whole text, documents included; here only the policy's actions are read.
    """
    if not episode.turns or not episode.turns[-1].action.rstrip().endswith("</answer>"):
        return False
    text = "".join(turn.action for turn in episode.turns).rstrip()
    return (
        "<answer>" in text[text[:-1].rfind("</answer>") + 1 :]
    )  # opened since the last one was closed


_GATES = {"strict": passes_strict_gate, "ends_with_answer": passes_ending_gate}


def _is_flat(tags: Sequence[tuple[str, str]]) -> bool:
    """Tags, as ("" or "/", name), come in pairs: each opening one directly followed by its own closing one."""
    return (
        len(tags) % 2 == 0 and [("/", name) for slash, name in tags[::2] if not slash] == tags[1::2]
    )


def _retrieved(turn: Turn) -> bool:
    """The turn searched, and documents came back."""
    return turn.status == TurnStatus.SEARCH and turn.search_ok and bool(turn.doc_ids)
