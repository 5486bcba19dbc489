"""Measuring policies: rollouts with their scores, means over every question of a split under greedy
decoding, and what is written of them.
"""

from __future__ import annotations

import json
import logging
import math
import operator
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from stepsearch_jax.files import write_json, write_text
from stepsearch_jax.metrics import progress
from stepsearch_jax.records import Episode
from stepsearch_jax.report.numbers import format_number
from stepsearch_jax.report.page import write_report
from stepsearch_jax.rewards.scoring import StepScores
from stepsearch_jax.rollout.scripted import PERFECT, list_hops, run_script
from stepsearch_jax.rollout.text import to_episodes
from stepsearch_jax.run.collect import Collected, collect
from stepsearch_jax.run.system import System, check_searches, process_rows

logger = logging.getLogger("stepsearch_jax")

# Data gathered from all processes are padded to a multiple of this, so that one program serves many
# lengths.
GATHERED_BYTES = 1 << 20
MEANS = ("em", "f1", "gold_recall", "searches", "invalid", "truncated")


def count_questions(system: System, split_name: str) -> int:
    """How many questions of a split are evaluated."""
    count = len(system.splits[split_name].questions)
    return min(count, system.config.evaluation.questions or count)


def collect_greedily(
    system: System, sample_episodes, params, split_name: str, description: str, answer_gain=None
) -> Iterator[tuple[np.ndarray, Collected]]:
    """One greedy episode for every question of the split, one rollout after the other.

    Yields (row of each of this process's episodes, -1: padding; the rollout).
    """
    total = count_questions(system, split_name)
    size = system.config.rollout.prompts * system.config.rollout.group_size
    mine = process_rows(system.mesh, size)
    for start in progress(range(0, total, size), description):
        rows = np.arange(start, start + size)
        rows[rows >= total] = -1
        rollout = collect(
            system,
            sample_episodes,
            params,
            system.splits[split_name],
            rows,
            jax.random.key(0),
            temperature=0.0,
            answer_gain=answer_gain,
        )
        yield rows[mine], rollout


def evaluate_policy(
    system: System, sample_episodes, params, split_name: str, description: str, answer_gain=None
) -> tuple[dict[str, float], list[dict]]:
    """Evaluates greedily, every question of the split exactly once -> (means, dumps).

    Means: em, f1, gold_recall (NaN if no gold document is known), searches, invalid, truncated.
    Dumps: one per question, in their order (`dump_episode`). Both cover all processes.
    """
    total = count_questions(system, split_name)
    sums, dumps = np.zeros(len(MEANS) + 2), {}
    for rows, rollout in collect_greedily(
        system, sample_episodes, params, split_name, description, answer_gain
    ):
        sums += _sum_measures(rollout.episodes, rollout.scores, rows >= 0)
        dumps |= {
            int(rows[b]): dump_episode(system, rollout.episodes[b], rollout.scores, b)
            for b in np.flatnonzero(rows >= 0)
        }
    sums = multihost_utils.process_allgather(sums).reshape(-1, len(sums)).sum(0)
    if sums[0] != total:
        raise RuntimeError(f"evaluation counted {int(sums[0])} questions instead of {total}")
    means = _divide(sums)
    logger.info(
        "%s %d questions of %s, %d searches: %s",
        description,
        total,
        split_name,
        round(means["searches"] * total),
        ", ".join(f"{name} {format_number(value)}" for name, value in means.items()),
    )
    return means, gather_dumps(dumps)


def gather_dumps(dumps: dict[int, dict]) -> list[dict]:
    """This process's dumps by row -> the dumps of all processes, in the order of the rows."""
    raw = np.frombuffer(json.dumps(list(dumps.items())).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(raw)))
    padded = np.zeros(-(-int(sizes.max()) // GATHERED_BYTES) * GATHERED_BYTES, np.uint8)
    padded[: len(raw)] = raw
    pairs = [
        pair
        for part, size in zip(multihost_utils.process_allgather(padded), sizes)
        for pair in json.loads(part[:size].tobytes())
    ]
    return [dump for _, dump in sorted(pairs, key=operator.itemgetter(0))]


def evaluate_script(
    system: System, split_name: str, decision_weights: dict[str, float]
) -> dict[str, float]:
    """The same means for the scripted searcher."""
    split, total = system.splits[split_name], count_questions(system, split_name)
    questions = list(split.questions[:total])
    trajectory = run_script(
        questions,
        split.prompts[:total],
        split.prompt_length[:total],
        system.source.documents,
        system.search,
        system.tokenizer,
        system.settings,
        system.environment.last_turn_warning,
        decision_weights,
        system.config.sft.known_fraction,
        system.config.seed,
    )
    check_searches(system)
    episodes = to_episodes(trajectory, questions, system.tokenizer)
    return _divide(_sum_measures(episodes, system.score(episodes), np.ones(total, bool)))


def _sum_measures(episodes: list[Episode], scores: StepScores, valid: np.ndarray) -> np.ndarray:
    """Over the valid episodes: their number, the sums of MEANS, and how many have known gold
    documents.
    """
    measures = scores.measures
    invalid = [any(turn.status.name == "INVALID" for turn in episode.turns) for episode in episodes]
    truncated = [episode.truncated for episode in episodes]
    columns = [
        np.ones(len(episodes)),
        measures.em,
        measures.f1,
        measures.gold_recall,
        measures.searches,
        invalid,
        truncated,
        measures.gold_known,
    ]
    return np.array([np.asarray(column, float)[valid].sum() for column in columns])


def _divide(sums: np.ndarray) -> dict[str, float]:
    """Means over questions; gold recall over those with known gold documents, NaN without any."""
    total, *sums, known = sums.tolist()
    means = {name: value / total for name, value in zip(MEANS, sums)}
    return means | {"gold_recall": means["gold_recall"] * total / known if known else math.nan}


def dump_episode(system: System, episode: Episode, scores: StepScores, b: int) -> dict:
    """One line of transcripts.jsonl, without "when" (`report/transcripts.py` checks its keys)."""
    # One entry per turn; a document is "seen" if an earlier turn returned it.
    question, gold, seen, turns = episode.question, set(episode.question.gold_ids), set(), []
    for k, turn in enumerate(episode.turns):
        documents = [system.source.documents[i] for i in turn.doc_ids]
        turns.append(
            {
                "status": turn.status.name.lower(),
                "action": turn.action,
                "query": turn.query,
                "search_ok": turn.search_ok,
                "observation": turn.observation,
                "documents": [
                    {
                        "id": document.id,
                        "title": document.title,
                        "text": document.text,
                        "gold": document.id in gold,
                        "seen": document.id in seen,
                    }
                    for document in documents
                ],
                "gain": float(scores.gain[b, k]),
                "redundancy": float(scores.redundancy[b, k]),
                "step_reward": float(scores.step_rewards[b, k]),
            }
        )
        seen.update(turn.doc_ids)
    return {
        "uid": question.uid,
        "question": question.question,
        "shape": question.shape,
        "answers": list(question.answers),
        "prediction": episode.answer,
        "em": float(scores.measures.em[b]),
        "f1": float(scores.measures.f1[b]),
        "finished": episode.finished,
        "truncated": episode.truncated,
        "outcome_reward": float(scores.outcome_rewards[b]),
        "key_reward": float(scores.key_rewards[b]),
        "turns": turns,
    }


def write_transcripts(folder: pathlib.Path, dumps: dict[str, list[dict]]) -> None:
    """Writes transcripts.jsonl from {"before": […], "after": […]}."""
    lines = [
        json.dumps({"when": when} | episode) + "\n"
        for when, episodes in dumps.items()
        for episode in episodes
    ]
    write_text(folder / "transcripts.jsonl", "".join(lines))


def evaluate_controls(system: System, split_name: str) -> dict[str, dict[str, float]]:
    """Means of two scripts on the split: the demonstrated searcher, and a perfect one.

    Raises ValueError if they would have to answer questions without knowing what to search.
    """
    questions = system.splits[split_name].questions
    blind = sum(not list_hops(question, system.source.documents) for question in questions)
    if blind:
        raise ValueError(
            f"{blind} of the {len(questions)} questions of {split_name} name neither sub-questions "
            "nor gold documents in the corpus, so a script does not know what to search"
        )
    poor = dict(system.config.sft.decision_weights)
    return {
        "scripted searcher": evaluate_script(system, split_name, poor),
        "perfect searcher": evaluate_script(system, split_name, PERFECT),
    }


def _none_for_nan(value):
    return None if isinstance(value, float) and math.isnan(value) else value


def write_results(
    system: System, folder: pathlib.Path, before: dict, after: dict, dumps: dict[str, list[dict]]
) -> dict:
    """Writes evaluation.json, transcripts.jsonl and report.html into `folder` and prints the table,
    on process 0 -> the contents of evaluation.json.

    before, after: from `evaluate_policy`; a mean that is NaN, not known, becomes null.
    """
    evaluation_config = system.config.evaluation
    result = {
        "questions": count_questions(system, evaluation_config.split),
        "before": before,
        "after": after,
        "retrieval": system.retrieval,
        "step_reward": system.describe_step_reward(),
    }
    if evaluation_config.controls:
        try:
            result["controls"] = evaluate_controls(system, evaluation_config.split)
        except ValueError as error:  # a script's episode may not fit, even if the policy's do
            logger.warning("the controls are left out: %s", error)
    if jax.process_index() == 0:
        write_transcripts(folder, dumps)
        write_json(folder / "evaluation.json", jax.tree.map(_none_for_nan, result))
        rows = {"before RL": before, "after RL": after} | result.get("controls", {})
        print(
            f"{result['questions']} questions of {evaluation_config.split}".ljust(36)
            + "".join(name.rjust(12) for name in MEANS)
        )
        for name, means in rows.items():
            print(name.ljust(36) + "".join(format_number(means[mean]).rjust(12) for mean in MEANS))
        print(f"report: {write_report(folder)}", flush=True)
    return result
