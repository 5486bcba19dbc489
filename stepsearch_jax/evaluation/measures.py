"""Measures of evaluated questions and their means with bootstrap intervals (host).

    mean over questions = Σ amount / Σ weight

A measure of one question is a pair (amount, weight), with weight 0 if it is undefined. The mean is
over the questions that define it, or a fraction of all their turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stepsearch_jax.records import Episode, TurnStatus
from stepsearch_jax.rewards.text_metrics import compare_answer, holds_answer

LEVEL = 0.95  # fraction of the bootstrap's means that lie within an interval


class Estimate(NamedTuple):
    """A measure over many questions with its interval; all None if no question defines it."""

    mean: float | None
    low: float | None
    high: float | None


def list_measures(hops: int) -> list[str]:
    """Names of the measures, for questions of up to `hops` sub-questions."""
    return [
        "em",
        "f1",
        "cover_em",
        "answer_in_evidence",
        "gold_recall",
        *[f"gold_recall_hop_{hop}" for hop in range(1, hops + 1)],
        "searches",
        "invalid_turns",
        "truncated",
    ]


def measure_episode(
    episode: Episode, given: Sequence[int] | None, texts: Sequence[str], hops: int
) -> np.ndarray:
    """Amount and weight of each measure of one episode -> [len(list_measures(hops)), 2] float64.

    given: corpus ids of documents in the prompt, which count as retrieved; None: the episode had no
    documents and could not search. texts[i]: document i, title and text.

    em, f1, cover_em       the answer against the accepted ones, 0 for none
    answer_in_evidence     1 if a retrieved document holds an accepted answer as whole words
    gold_recall            fraction of the gold documents retrieved; undefined if none are known
    gold_recall_hop_i      the same of sub-question i alone
    searches               search turns, failed ones included
    invalid_turns          fraction of turns without a valid action
    truncated              1 if the context ran out
    """
    question = episode.question
    evidence = None if given is None else {*given, *episode.doc_ids}

    def recall(gold):
        if evidence is None or not gold:
            return 0.0, 0.0
        return len(evidence.intersection(gold)) / len(set(gold)), 1.0

    scores = compare_answer(episode.answer, question.answers, question.unordered)
    held = evidence is not None and any(
        holds_answer(texts[i], question.answers, question.unordered) for i in evidence
    )
    of_hops = [sub.gold_ids for sub in question.sub_questions[:hops]]
    of_hops += [()] * (hops - len(of_hops))
    invalid = sum(turn.status == TurnStatus.INVALID for turn in episode.turns)
    return np.array(
        [
            *[(score, 1.0) for score in scores],
            (held, evidence is not None),
            recall(question.gold_ids),
            *map(recall, of_hops),
            (len(episode.search_turns), 1.0),
            (invalid, len(episode.turns)),
            (episode.truncated, 1.0),
        ],
        np.float64,
    )


def estimate(pairs: np.ndarray, resamples: int, seed: int) -> list[Estimate]:
    """Each measure's mean with its percentile bootstrap interval (Efron 1979).

    pairs [n questions, M measures, 2]: from `measure_episode`. n questions are drawn with
    replacement `resamples` times, the same ones for all measures; a measure skips draws that leave
    it undefined. With 0 resamples the intervals are the means.
    """
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        times = np.bincount(rng.integers(len(pairs), size=len(pairs)), minlength=len(pairs))
        draws.append(np.tensordot(times, pairs, axes=1))  # [M, 2]
    draws = np.array(draws).reshape(resamples, *pairs.shape[1:])
    estimates = []
    for m, (amount, weight) in enumerate(pairs.sum(0)):
        if weight == 0:
            estimates.append(Estimate(None, None, None))
            continue
        of_draws = draws[draws[:, m, 1] > 0, m]
        ratios = of_draws[:, 0] / of_draws[:, 1] if len(of_draws) else np.array([amount / weight])
        low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        estimates.append(Estimate(float(amount / weight), float(low), float(high)))
    return estimates
