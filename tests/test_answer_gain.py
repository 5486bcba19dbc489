"""The step reward without gold documents: gains in the answer's log-probability."""

import dataclasses

import numpy as np
import pytest
import running
import text_episodes
import tiny

from stepsearch_jax.metrics import read_metrics
from stepsearch_jax.models.scoring import score_tokens
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.prompting.tokenizers import make_word_tokenizer
from stepsearch_jax.records import Question
from stepsearch_jax.rewards.scoring import score_episodes
from stepsearch_jax.rl.learner import make_answer_gain
from stepsearch_jax.rollout.text import encode_answers
from stepsearch_jax.types import Trajectory

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=24, embed_dim=16, head_dim=4, ffn_dim=24)
POLICY = Policy(CONFIG)
OPENING = 2


def make_trajectory(rng: np.random.Generator) -> Trajectory:
    """Four episodes of a prompt of 3 tokens and up to 3 turns; the rest is padding.

    A turn has 2 action tokens, then 2 or 3 of observation.
    """
    B, T, K = 4, 20, 3
    turn_ids, search_end = np.full((B, T), -1, np.int32), np.full((B, K), -1, np.int32)
    turns = [3, 1, 2, 0]
    for b, count in enumerate(turns):
        for k in range(count):
            start = 3 + 5 * k
            turn_ids[b, start : start + 4 + (k == 0)] = k
            if k == 1:  # no gap: the second turn begins where the first one ends
                turn_ids[b, start : start + 5] = k
            search_end[b, k] = start + 1
    token_mask = (turn_ids >= 0) | (np.arange(T) < 3)
    search_end[2, 0] = -1  # an invalid turn
    search_ok = search_end >= 0
    search_ok[0, 1] = False  # a search that failed
    none = np.zeros(B, np.int32)
    return Trajectory(
        tokens=rng.integers(0, 24, (B, T)).astype(np.int32),
        token_mask=token_mask,
        action_mask=token_mask & (turn_ids >= 0),
        turn_ids=turn_ids,
        sampler_logprobs=np.zeros((B, T), np.float32),
        search_end=search_end,
        turn_status=search_end,
        doc_ids=search_end[..., None],
        search_ok=search_ok,
        length=token_mask.sum(1).astype(np.int32),
        prompt_length=none + 3,
        finished=none > 0,
        truncated=none > 0,
        question_ids=none,
        group_ids=none,
    )


@pytest.mark.slow
def test_gain_is_the_rise_from_turn_to_turn():
    """Against one forward pass per prefix: prompt, prompt and turn 0, …, each with the answer."""
    rng, params = np.random.default_rng(3), tiny.draw_params(POLICY, 1)
    trajectory = make_trajectory(rng)
    answers, length = rng.integers(0, 24, (4, 6)).astype(np.int32), np.array([6, 5, 4, 6], np.int32)
    got = np.asarray(make_answer_gain(CONFIG, OPENING, 0, 1)(params, trajectory, answers, length))

    def mean_logprob(b, end):
        alone = np.concatenate([trajectory.tokens[b, :end], answers[b, : length[b]]])
        return np.asarray(score_tokens(POLICY, params, alone[None])[0])[0, end + OPENING :].mean()

    def length_before(b, turn):
        return (trajectory.token_mask[b] & (trajectory.turn_ids[b] < turn)).sum()

    expected = np.zeros((4, 3))
    # Not the failed search of row 0, nor the invalid turn of row 2.
    for b, k in ((0, 0), (0, 2), (1, 0), (2, 1)):
        before, behind = (length_before(b, turn) for turn in (k, k + 1))
        expected[b, k] = mean_logprob(b, behind) - mean_logprob(b, before)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert (np.abs(expected) > 1e-3).sum() == 4
    in_parts = make_answer_gain(CONFIG, OPENING, 2, 3)(params, trajectory, answers, length)
    np.testing.assert_allclose(in_parts, got, atol=1e-5)


def test_padding_changes_nothing():
    rng, params = np.random.default_rng(4), tiny.draw_params(POLICY, 1)
    trajectory = make_trajectory(rng)
    answers, length = rng.integers(0, 24, (4, 6)).astype(np.int32), np.array([6, 5, 4, 6], np.int32)
    gain = make_answer_gain(CONFIG, OPENING, 0, 1)
    other = trajectory.replace(tokens=np.where(trajectory.token_mask, trajectory.tokens, 23))
    behind = np.where(np.arange(6) < length[:, None], answers, 23)
    np.testing.assert_allclose(
        gain(params, other, behind, length), gain(params, trajectory, answers, length), atol=1e-6
    )


def test_answers_in_tokens():
    tokenizer = make_word_tokenizer(["Ola", "Brin", "Rome"])
    answers = encode_answers(
        [Question("a", "?", "Ola Brin", ("Brin",)), Question("b", "?", "Rome")], tokenizer
    )
    assert [tokenizer.decode(ids[:n]) for ids, n in zip(answers.tokens, answers.length)] == [
        "<answer> Ola Brin</answer>",
        "<answer> Rome</answer>",
    ]
    assert answers.tokens.shape[1] == answers.length.max() > answers.length[1]
    assert all(tokenizer.decode(ids[: answers.opening]) == "<answer>" for ids in answers.tokens)


@pytest.mark.parametrize(
    "change,expected",
    [({}, [0.7, -0.2]), ({"use_gain": False}, [0, -0.5]), ({"step_scale": 2.0}, [1.4, -0.4])],
)
def test_the_gain_takes_the_place_of_the_documents(change, expected):
    """Two searches, of which the second brings one of its two documents again: P = (0, 1/2)."""
    episode = text_episodes.make_episode(
        text_episodes.search("a", 1, 2),
        text_episodes.search("b", 2, 3),
        question=text_episodes.make_question(gold=()),
    )
    gain = np.array([[0.7, 0.3, 0, 0]])
    scores = score_episodes(
        [episode], text_episodes.NOTHING_SIMILAR, **text_episodes.PAPER | change | {"gain": gain}
    )
    np.testing.assert_allclose(scores.step_rewards, [[*expected, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(scores.gain, gain, atol=1e-6)


@pytest.mark.slow
def test_a_whole_run(tmp_path, tmp_path_factory):
    """On two devices: the command trains with it, and logs gains that are not the documents'."""
    cache, start = running.shared_cache(tmp_path_factory), running.searching_start(tmp_path_factory)
    options = [f"--config.sft.checkpoint={start}", "--config.sft.phases=()"]
    options += ["--config.iterations=1"]
    gains = {}
    for step_reward in ("gain", "answer_logprob"):
        workdir, choice = tmp_path / step_reward, f"--config.reward.step_reward={step_reward}"
        running.run_command("train", cache, workdir, *options, choice, devices=2)
        (row,) = [row for row in read_metrics(workdir) if row["stage"] == "rl"]
        gains[step_reward] = row["gain"]
    assert np.isfinite(list(gains.values())).all()
    assert gains["answer_logprob"] not in (0, gains["gain"])
