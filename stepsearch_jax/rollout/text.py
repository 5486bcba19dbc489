"""From recorded arrays to text and back: episodes as records, prompts and answers as tokens.

Only action tokens are ever parsed; positions and statuses come from the device, not from the text.
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
    """Trajectories with NumPy arrays (rows of this process) -> one Episode per row.

    questions: one per row.
    """
    return [
        _to_episode(trajectory, row, question, tokenizer) for row, question in enumerate(questions)
    ]


def _to_episode(
    trajectory: Trajectory, row: int, question: Question, tokenizer: Tokenizer
) -> Episode:
    length = int(trajectory.length[row])
    tokens = trajectory.tokens[row, :length]
    turn_ids, is_action = trajectory.turn_ids[row, :length], trajectory.action_mask[row, :length]
    turns = []
    for turn in range(int(turn_ids.max(initial=-1)) + 1):
        in_turn = turn_ids == turn
        action = cut_action(tokenizer.decode(tokens[in_turn & is_action]))
        status = TurnStatus(int(trajectory.turn_status[row, turn]))
        content = parse_action(action)[1]
        turns.append(
            Turn(
                status=status,
                action=action,
                query=content if status == TurnStatus.SEARCH else None,
                answer=content if status == TurnStatus.ANSWER else None,
                doc_ids=tuple(int(i) for i in trajectory.doc_ids[row, turn] if i >= 0),
                search_ok=bool(trajectory.search_ok[row, turn]) or status != TurnStatus.SEARCH,
                observation=tokenizer.decode(tokens[in_turn & ~is_action]),
            )
        )
    prompt = tokenizer.decode(tokens[: int(trajectory.prompt_length[row])])
    return Episode(
        question,
        prompt,
        tuple(turns),
        finished=bool(trajectory.finished[row]),
        truncated=bool(trajectory.truncated[row]),
    )


@dataclasses.dataclass(frozen=True)
class Answers:
    """The first accepted answers of n questions, as the policy would write them.

    That is "<answer> …</answer>".
    """

    tokens: np.ndarray  # [n, A] int32, right padded to the longest
    length: np.ndarray  # [n] int32
    opening: int  # tokens of the opening tag, the same number in all


def encode_answers(questions: Sequence[Question], tokenizer: Tokenizer) -> Answers:
    """The answers in tokens."""
    # Encoded apart from the rest: the scored part has to begin at a token boundary.
    opening = tokenizer.encode("<answer>")
    endings = tokenizer.encode_batch([f" {question.answer}</answer>" for question in questions])
    encoded = [[*opening, *ids] for ids in endings]
    return Answers(*pad_tokens(encoded, max(map(len, encoded))), len(opening))


def encode_prompts(
    prompts: Sequence[str], uids: Sequence[str], tokenizer: Tokenizer, max_prompt_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts -> (tokens [n, max_prompt_tokens] int32, right padded; length [n] int32).

    Raises ValueError, naming the question, for a prompt that is too long: prompts are never cut.
    """
    encoded = tokenizer.encode_batch(list(prompts))
    for row, ids in enumerate(encoded):
        if len(ids) > max_prompt_tokens:
            raise ValueError(
                f"the prompt of question {uids[row]} has {len(ids)} tokens, more than "
                f"config.prompt.max_prompt_tokens={max_prompt_tokens}: raise that limit (and "
                "config.rollout.context with it), or leave the question out"
            )
    return pad_tokens(encoded, max_prompt_tokens)


def pad_tokens(encoded: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of token ids -> (tokens [n, width] int32, right padded; length [n] int32)."""
    tokens = np.zeros((len(encoded), width), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    return tokens, np.array([len(ids) for ids in encoded], np.int32)
