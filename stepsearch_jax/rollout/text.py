"""From recorded arrays to records of text. Only action tokens are ever parsed; positions and
statuses come from the device, not from the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax.prompting.tags import cut_action, parse_action
from stepsearch_jax.prompting.tokenizers import Tokenizer
from stepsearch_jax.records import Episode, Question, Turn, TurnStatus
from stepsearch_jax.types import Trajectory


def to_episodes(
    trajectory: Trajectory, questions: Sequence[Question], tokenizer: Tokenizer
) -> list[Episode]:
    """Trajectories with NumPy arrays (rows of this process) -> one Episode a row. questions[b]: the
    question of row b.
    """
    return [_to_episode(trajectory, b, question, tokenizer) for b, question in enumerate(questions)]


def _to_episode(
    trajectory: Trajectory, b: int, question: Question, tokenizer: Tokenizer
) -> Episode:
    length = int(trajectory.length[b])
    tokens, turn_ids, is_action = (
        array[b, :length]
        for array in (trajectory.tokens, trajectory.turn_ids, trajectory.action_mask)
    )
    turns = []
    for k in range(int(turn_ids.max(initial=-1)) + 1):
        action = cut_action(tokenizer.decode(tokens[(turn_ids == k) & is_action]))
        status = TurnStatus(int(trajectory.turn_status[b, k]))
        content = parse_action(action)[1]
        turns.append(
            Turn(
                status=status,
                action=action,
                query=content if status == TurnStatus.SEARCH else None,
                answer=content if status == TurnStatus.ANSWER else None,
                doc_ids=tuple(int(i) for i in trajectory.doc_ids[b, k] if i >= 0),
                search_ok=bool(trajectory.search_ok[b, k]) or status != TurnStatus.SEARCH,
                observation=tokenizer.decode(tokens[(turn_ids == k) & ~is_action]),
            )
        )
    prompt = tokenizer.decode(tokens[: int(trajectory.prompt_length[b])])
    return Episode(
        question,
        prompt,
        tuple(turns),
        finished=bool(trajectory.finished[b]),
        truncated=bool(trajectory.truncated[b]),
    )


@dataclasses.dataclass(frozen=True)
class Answers:
    """The first accepted answers of n questions, each as the policy would write it: "<answer>
    …</answer>".
    """

    tokens: np.ndarray  # [n, A] int32, right padded to the longest
    length: np.ndarray  # [n] int32
    opening: int  # how many tokens, the same in all, are the opening tag


def encode_answers(questions: Sequence[Question], tokenizer: Tokenizer) -> Answers:
    """The answers in tokens."""
    opening = tokenizer.encode(
        "<answer>"
    )  # apart from the rest: what it is scored on begins at a token's boundary
    encoded = [
        [*opening, *ids]
        for ids in tokenizer.encode_batch(
            [f" {question.answer}</answer>" for question in questions]
        )
    ]
    return Answers(*pad_tokens(encoded, max(map(len, encoded))), len(opening))


def encode_prompts(
    prompts: Sequence[str], uids: Sequence[str], tokenizer: Tokenizer, max_prompt_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts -> (tokens [n, max_prompt_tokens] int32, right padded; length [n] int32).

    Raises ValueError naming the question whose prompt is too long: nothing of a prompt is ever cut.
    """
    encoded = tokenizer.encode_batch(list(prompts))
    for row, ids in enumerate(encoded):
        if len(ids) > max_prompt_tokens:
            raise ValueError(
                f"the prompt of question {uids[row]} has {len(ids)} tokens, more than "
                f"config.prompt.max_prompt_tokens={max_prompt_tokens}: "
                "raise that limit (and config.rollout.context with it), or leave the question out"
            )
    return pad_tokens(encoded, max_prompt_tokens)


def pad_tokens(encoded: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, right padded [n, width] int32, and how many each row has [n] int32."""
    tokens = np.zeros((len(encoded), width), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    return tokens, np.array([len(ids) for ids in encoded], np.int32)
