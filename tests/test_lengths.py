"""How often a rollout's loops run: by hand, against real rollouts, and from recorded lengths."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_config

from stepsearch_jax.preflight.lengths import (
    EpisodeLengths,
    ShardLoops,
    plan_rollout,
    width_fractions,
)
from stepsearch_jax.preflight.recorded import read_lengths
from stepsearch_jax.rl.microbatches import choose_widths, padding_fraction
from stepsearch_jax.rollout.state import RolloutSettings

SETTINGS = RolloutSettings(
    max_turns=3,
    max_turn_tokens=4,
    context=40,
    max_prompt_tokens=10,
    max_observation_tokens=7,
    documents=1,
    top_k=0,
    top_p=1.0,
    slots=0,
    flush_fraction=0.5,
    prefill_rows=2,
    prefill_tokens=4,
)


def test_the_longest_episode_and_its_loops():
    """Context 40: prompt 10, turns of 4 with observations of 7 up to 21, 32 and 36; after that one
    no observation fits (36 + 7 > 40): 14 + 7 + 4 + 7 + 4. Eight episodes in four slots: two waves
    of three outer steps, 12 sampled tokens a wave. Prefill, two rows of four tokens at a time:
    prompts in 3 chunks (9 tokens), observations in 2 (7 tokens, from the action's last on)."""
    plan = plan_rollout(SETTINGS, attention_block=8, episodes=8, slots=4)
    assert (plan.prompt, plan.sampled, plan.searches, plan.observed) == (10, 12, 2, 14)
    assert (plan.outer_steps, plan.steps) == (6, 2 * 12)
    assert plan.decode_steps == 2 * 12 / 6
    # Sampled at 10-13, 21-24, 32-35 from the token before each, blocks of 8: 2 2 2 2, 3 3 3 3 and
    # 4 5 5 5 hold positions up to 9-12, 20-23, 31-34.
    assert plan.decode_blocks == (4 * 2 + 4 * 3 + 4 + 3 * 5) / 12
    assert (plan.start_chunks, plan.start_blocks) == (2 * 3, (1 + 1 + 2) / 3)  # up to 3, 7, 8
    # Observations are read from 13 and 24 on: up to 16, 19 and 27, 30; twice, and the second wave's
    # prompts.
    assert plan.prefill_chunks == 2 * (2 * 4 + 3) / 6
    assert plan.prefill_blocks == (2 * (3 + 3 + 4 + 4) + 1 + 1 + 2) / 11


def test_loops_are_known_by_their_functions():
    plan = plan_rollout(SETTINGS, attention_block=8, episodes=8, slots=4)
    decode = ("decode_until_wait", "turn", "run_shard", "rollout")
    prefill = ("_prefill", "read_observations", "turn", "run_shard", "rollout")
    assert plan.trips(decode) == plan.decode_steps
    assert plan.trips(("attend_cached", "extend", *decode)) == plan.decode_blocks
    assert plan.trips(("_prefill", "start_episodes", "_start", "run_shard")) == plan.start_chunks
    assert plan.trips(("attend_cached", *prefill)) == plan.prefill_blocks
    assert plan.trips(("run_shard", "rollout")) == plan.outer_steps
    for unknown in ((), ("attend_cached",), ("spin", "turn", "run_shard")):
        with pytest.raises(ValueError, match="no trip count is known"):
            plan.trips(unknown)


def measure_episodes(trajectory) -> list[EpisodeLengths]:
    """The lengths of recorded episodes: what each turn sampled, and what it read afterwards."""
    episodes = []
    for row in range(len(trajectory.length)):
        turn_ids = trajectory.turn_ids[row, : trajectory.length[row]]
        actions = trajectory.action_mask[row, : trajectory.length[row]]
        counts = [
            (int((actions & (turn_ids == turn)).sum()), int((~actions & (turn_ids == turn)).sum()))
            for turn in range(turn_ids.max() + 1)
        ]
        episodes.append(EpisodeLengths(int(trajectory.prompt_length[row]), tuple(counts)))
    return episodes


@pytest.mark.parametrize("slots", [0, 4])
def test_the_loops_are_those_of_a_real_rollout(slots):
    """Decode steps, flushes and prefilled tokens of a rollout of random lengths, with a slot for
    each episode and with slots that are filled again."""
    settings = dataclasses.replace(tiny.SETTINGS, context=160, slots=slots)
    prompts = tiny.make_prompts(12)
    trajectory, counters = tiny.run_rollout(
        "callback", (1, 1, 1), prompts, jax.random.key(3), 1.0, settings=settings
    )
    assert not trajectory.truncated.any()  # such episodes wait for a flush before they end
    episodes = measure_episodes(trajectory)
    assert len({len(episode.turns) for episode in episodes}) > 1
    loops = ShardLoops(settings, tiny.CONFIG.attention_block, episodes, slots or 12)
    loops.run()
    assert (len(loops.decode_blocks), loops.outer_steps) == tuple(counters[0, :2])
    read = sum(episode.prompt - 1 + episode.observed for episode in episodes)
    assert read == counters[0, 2]


def test_short_episodes_take_fewer_steps():
    """Half of the episodes are short: the slots still wait for the long ones, but attend to less,
    and to less still if the short ones take turns in fewer slots."""
    short, long = EpisodeLengths(5, ((2, 0),)), EpisodeLengths(10, ((4, 7), (4, 0)))
    plan = lambda lengths, slots: plan_rollout(SETTINGS, 8, 8, slots, lengths)
    mixed, longest = plan([short, long], 8), plan([long], 8)
    assert (mixed.searches, mixed.sampled, mixed.prompt) == (0.5, 5, 7.5)
    assert mixed.steps == longest.steps == 8
    assert mixed.live < longest.live
    assert plan([short, long], 4).steps < plan([long], 4).steps
    assert plan([short], 8).steps == 2


@pytest.mark.parametrize("size", [0, 1, 2])
def test_widths_are_those_of_the_learner(size):
    """The same padding as the learner's own measure of it, over its two minibatches."""
    lengths, widths = np.array([9, 60, 17, 33, 64, 12, 50, 40]), choose_widths(64, 4)
    fractions = width_fractions(lengths, 2, size, widths)
    computed = len(lengths) * np.dot(fractions, widths)
    expected = [
        lengths[part::2].sum() / (1 - padding_fraction(jnp.array(lengths[part::2]), size, widths))
        for part in range(2)
    ]
    assert computed == pytest.approx(sum(map(float, expected)), rel=1e-5)


# ---- Files of lengths


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_quantiles_are_spread_over_episodes(tmp_path):
    """The median is the middle one of three quantiles; a mean of 1.5 searches is one or two."""
    config = tiny_config.get_config("unused")
    found = read_lengths(
        write(
            tmp_path / "lengths.json",
            dict(prompt=30, length=[60, 100, 240], searches=1.5, observed=10),
        ),
        config,
    )
    totals = [episode.total for episode in found]
    assert totals == sorted(totals) and 60 <= totals[0] < 65 and 230 < totals[-1] <= 240
    assert np.median(totals) == pytest.approx(100, abs=3)
    assert np.mean([len(episode.turns) - 1 for episode in found]) == 1.5
    assert {episode.prompt for episode in found} == {30}
    assert {observed for episode in found for _, observed in episode.turns} == {0, 10}


def test_metrics_give_means(tmp_path):
    """Eight episodes an iteration: 400 action tokens are 50 each; 100 - 30 - 50 were observed."""
    config = tiny_config.get_config("unused")
    row = dict(stage="rl", length=100.0, prompt_length=30.0, searches=2.0, action_tokens=400)
    path = write(tmp_path / "metrics.jsonl", dict(stage="sft", loss=1.0), row, row)
    found = read_lengths(path, config)
    assert {episode.total for episode in found} == {100}
    assert {episode.turns for episode in found} == {((16, 10), (17, 10), (17, 0))}


def test_transcripts_give_every_episode(tmp_path):
    """In tokens of the config's tokenizer, after training if there are such episodes."""
    config = tiny_config.get_config("unused")
    turn = lambda action, observation: dict(action=action, observation=observation)
    turns = [turn("<search> Olin </search>", "<information> </information>")]
    turns.append(turn("<answer> Olin </answer>", ""))
    path = write(
        tmp_path / "transcripts.jsonl",
        dict(when="before", question="Who?", turns=turns * 3),
        dict(when="after", question="Who?", turns=turns),
    )
    (found,) = read_lengths(path, config)
    assert len(found.turns) == 2 and found.turns[0][1] > 0 == found.turns[1][1]
    assert 0 < found.prompt < 20 and found.sampled > 2


@pytest.mark.parametrize(
    "rows,complaint",
    [
        ([dict(prompt=30, length=60, searches=1)], "neither the keys"),
        ([dict(prompt=30, length=60, searches=3, observed=20)], "no room"),
        ([dict(prompt=30, length=[90, 60], searches=1, observed=5)], "ascending"),
        ([dict(prompt=30, length=9000, searches=1, observed=5)], "rollout.context"),
        ([dict(stage="sft", loss=1.0)], "neither the keys"),
    ],
)
def test_files_without_lengths_are_refused(tmp_path, rows, complaint):
    path = write(tmp_path / "lengths.jsonl", *rows)
    with pytest.raises(ValueError, match=rf"--lengths=.*lengths.jsonl.*{complaint}"):
        read_lengths(path, tiny_config.get_config("unused"))
