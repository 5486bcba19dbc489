"""Whole runs of the commands: all their files, and the same result after a kill or a pause."""

import collections
import html
import json
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
import tiny_config

from stepsearch_jax.metrics import read_metrics
from stepsearch_jax.run.iteration import (
    CompileCounter,
    Profiler,
    choose_rewards,
    keep_skipped_batch,
    measure_speed,
)
from stepsearch_jax.types import Batch, TrainState

# Fine-tuning with a checkpoint in its middle; the KL coefficient adapts: it is resumed, too.
LONG = (
    "--config.sft.phases=((30,8,True,0.0,0.02),(40,8,False,0.5,0.01))",
    "--config.checkpoint.sft_every=20",
    "--config.iterations=5",
    "--config.rl.kl_target=0.001",
    "--config.rl.kl_horizon=100.0",
)


def test_shuffled_rewards_stay_together():
    """The control gives each episode the rewards of another, and others in every iteration."""
    Scores = collections.namedtuple("Scores", "step_rewards outcome_rewards")
    Config = collections.namedtuple("Config", "reward seed")
    Reward, Rows, Got = (
        collections.namedtuple("Reward", "shuffle"),
        collections.namedtuple("Rows", "search_end search_ok"),
        collections.namedtuple("Got", "scores rows"),
    )
    scores = Scores(np.arange(16.0)[:, None] * [1, 10], np.arange(16.0) + 0.5)
    choose = lambda shuffle, rows, iteration: choose_rewards(
        Config(Reward(shuffle), 0), Got(scores, rows), iteration
    )
    everywhere = Rows(np.zeros((16, 2), int), np.ones((16, 2), bool))
    assert choose(False, everywhere, 3) == (scores.step_rewards, scores.outcome_rewards)
    steps, outcomes = choose(True, everywhere, 3)
    assert (
        sorted(outcomes) == scores.outcome_rewards.tolist()
        and (steps == (outcomes[:, None] - 0.5) * [1, 10]).all()
    )
    assert (outcomes != scores.outcome_rewards).all() and (
        outcomes != choose(True, everywhere, 4)[1]
    ).any()
    # An episode gets all that the other one earned: the step rewards for which it has no
    # successful search are added to its outcome reward.
    ends, ok = (
        np.where(np.arange(16)[:, None] % 3 > [0, 1], 5, -1),
        np.arange(32).reshape(16, 2) % 7 > 0,
    )
    fewer, more = choose(True, Rows(ends, ok), 3)
    assert (
        (fewer == np.where((ends >= 0) & ok, steps, 0)).all()
        and (fewer.sum(1) + more == steps.sum(1) + outcomes).all()
        and (more > outcomes).sum() >= 10
    )


def test_few_skipped_batches_are_kept_and_all_are_told(tmp_path, caplog):
    arrays = {name: jnp.zeros((2, 3)) for name in Batch.__dataclass_fields__}
    for iteration in (2, 5, 7, 9, 5):
        caplog.clear()
        keep_skipped_batch(tmp_path, iteration, Batch(**arrays), steps=4)
        assert f"iteration {iteration}" in caplog.text and "4 optimiser steps" in caplog.text
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"skipped-{iteration}-0.npz" for iteration in (2, 5, 7)}
    with np.load(tmp_path / "skipped-5-0.npz") as kept:
        assert set(kept) == set(arrays)


@pytest.mark.slow
def test_steps_that_diverge_end_the_run(tmp_path_factory, tmp_path):
    """With an absurd learning rate the first step makes parameters without finite gradients."""
    log = running.run_command(
        "train",
        running.shared_cache(tmp_path_factory),
        tmp_path / "run",
        f"--config.sft.checkpoint={running.searching_start(tmp_path_factory)}",
        "--config.iterations=9",
        "--config.policy.learning_rate=1e30",
        "--config.policy.warmup=0.0",
        "--config.rl.max_skipped_in_a_row=3",
        status=1,
    )
    last = log.splitlines()[-1]
    assert "rl.max_skipped_in_a_row=3" in last and "policy.learning_rate" in last
    assert not (tmp_path / "run/evaluation.json").exists()
    assert len(list((tmp_path / "run").glob("skipped-*.npz"))) <= 3


def test_only_an_iteration_that_is_still_to_come_is_profiled(tmp_path):
    for chosen in (None, 2, 4):
        Profiler(tmp_path, chosen, first=2, iterations=5).begin(3)
    for chosen in (-1, 1, 5):
        with pytest.raises(ValueError, match=f"--profile={chosen} .*2 to 4"):
            Profiler(tmp_path, chosen, first=2, iterations=5)
    assert not list(tmp_path.iterdir())


def test_speed_is_tokens_by_seconds():
    config = tiny_config.get_config("")
    config.rl.ppo_epochs = 3
    metrics = {"action_tokens": 120, "length": 100.0} | {
        f"seconds/{phase}": seconds for phase, seconds in dict(rollout=4, score=2, update=6).items()
    }
    assert measure_speed(metrics, config) == {
        "speed/sampled_tokens": 30,
        "speed/trained_tokens": 8 * 100 * 3 / 8,
    }


def test_compiled_programs_are_counted(caplog):
    compilations, double = CompileCounter(), jax.jit(lambda x: 2 * x)
    compilations.take(0, 0)
    counts = []
    with caplog.at_level("INFO", logger="stepsearch_jax"):
        for width in (3, 3, 4):
            double(np.ones(width, np.float32)).block_until_ready()
            found = compilations.take(5, 0)
            counts.append(found["compiled_programs"])
            assert (found["seconds/compile"] > 0) == (counts[-1] > 0)
    assert counts == [1, 0, 1]
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == [
        "iteration 5 compiled 1 programs"
    ] * 2


def check_results(workdir: pathlib.Path, iterations: int) -> None:
    """The files of a finished run agree with one another."""
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["questions"] == 20
    transcripts = [
        json.loads(line) for line in (workdir / "transcripts.jsonl").read_text().splitlines()
    ]
    for when in ("before", "after"):
        episodes = [episode for episode in transcripts if episode["when"] == when]
        assert sorted(episode["uid"] for episode in episodes) == sorted(
            f"validation-{n}" for n in range(20)
        )
        for mean, measure in (
            ("f1", lambda e: e["f1"]),
            ("em", lambda e: e["em"]),
            ("searches", lambda e: sum(t["status"] == "search" for t in e["turns"])),
        ):
            np.testing.assert_allclose(
                evaluation[when][mean],
                np.mean([measure(episode) for episode in episodes]),
                atol=1e-6,
            )
    assert [row["iteration"] for row in read_metrics(workdir) if row["stage"] == "rl"] == list(
        range(iterations)
    )
    page = html.unescape((workdir / "report.html").read_text())
    assert all(episode["question"] in page for episode in transcripts)
    assert json.loads((workdir / "config.json").read_text())["rollout"]["context"] == 256
    assert (workdir / "checkpoints" / str(iterations)).is_dir() and (workdir / "start").is_dir()


@pytest.mark.slow
def test_a_run_and_its_continuation(tmp_path, tmp_path_factory):
    cache, start, workdir = (
        running.shared_cache(tmp_path_factory),
        running.searching_start(tmp_path_factory),
        tmp_path / "run",
    )
    options = (
        f"--config.sft.checkpoint={start}",
        "--config.sft.phases=((10,8,False,0.5,0.02),)",
        "--config.evaluation.every=1",
    )
    log = running.run_command("train", cache, workdir, *options)
    assert "train: 24 questions; 180 passages; recall@1 of the gold passages" in log
    check_results(workdir, 2)
    rows = read_metrics(workdir)
    assert [(row["stage"], row["iteration"]) for row in rows] == [
        ("sft", 9),
        ("rl", 0),
        ("evaluation", 0),
        ("rl", 1),
    ]
    assert sum(row["searches"] for row in rows if row["stage"] == "rl") > 0
    first = json.loads((workdir / "evaluation.json").read_text())

    # `evaluate` gives the same figures, in files of its own; here after another split.
    running.run_command(
        "evaluate",
        cache,
        workdir,
        "--config.evaluation.split=test",
        "--config.evaluation.questions=10",
    )
    assert json.loads((workdir / "evaluation/test/evaluation.json").read_text())["questions"] == 10
    running.run_command("evaluate", cache, workdir, "--config.evaluation.controls=True")
    again = json.loads((workdir / "evaluation/validation/evaluation.json").read_text())
    check_results(workdir, 2)
    assert {name: again[name] for name in first} == first and set(again["controls"]) >= {
        "scripted searcher",
        "perfect searcher",
    }

    # More iterations go on from where the run stopped; the start and the figures before RL stay.
    longer = "--config.iterations=3", "--profile=2"
    log = running.run_command("train", cache, workdir, *options, *longer)
    assert "resumed from iteration 2" in log and "fine-tun" not in log
    check_results(workdir, 3)
    assert json.loads((workdir / "evaluation.json").read_text())["before"] == first["before"]
    # The last iteration was traced.
    assert list(workdir.glob("profile/plugins/profile/*/*.xplane.pb"))


@pytest.mark.slow
def test_kills_change_nothing(tmp_path, tmp_path_factory):
    """SIGTERM during fine-tuning, kill -9 during RL: the same command then gives the same result.

    Fine-tuning saves the step at hand first. Equal bit for bit are all parameters, both optimisers'
    states and all figures.
    """
    cache, start = running.shared_cache(tmp_path_factory), running.searching_start(tmp_path_factory)
    options = (*LONG, f"--config.sft.checkpoint={start}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    running.run_command("train", cache, whole, *options)

    reached = lambda: (killed / "sft" / "20").is_dir()
    assert end_when(reached, signal.SIGTERM, "train", cache, killed, *options) == 143
    assert not (killed / "start").exists()
    saved = max(int(path.name) for path in (killed / "sft").iterdir())
    assert 20 < saved < 70 and f"step {saved} is saved" in killed.with_suffix(".log").read_text()
    # The second kill comes within a later iteration: the second has its line, the last is far.
    reached = lambda: (killed / "checkpoints" / "1").is_dir() and count_rl_lines(killed) >= 2
    status = end_when(reached, signal.SIGKILL, "train", cache, killed, *options)
    assert status == -signal.SIGKILL
    assert not (killed / "checkpoints" / "5").exists()
    assert "resumed from iteration" in running.run_command("train", cache, killed, *options)

    expected, got = running.final_state(whole, 5), running.final_state(killed, 5)
    assert expected.keys() == got.keys() and {name.split("'")[1] for name in got} == set(
        TrainState.__dataclass_fields__
    )
    for name, leaf in expected.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    assert (expected["['position']"], expected["['iteration']"]) == (40, 5) and expected[
        "['kl_coef']"
    ] != np.float32(1e-3)
    of_this_process = lambda name: name.startswith(("seconds/", "speed/", "compiled_programs"))
    figures = [
        [
            {name: value for name, value in row.items() if not of_this_process(name)}
            for row in read_metrics(workdir)
        ]
        for workdir in (whole, killed)
    ]
    assert figures[0] == figures[1] and len(figures[0]) > 5
    for name in ("evaluation.json", "transcripts.jsonl"):
        assert (whole / name).read_text() == (killed / name).read_text()


def count_rl_lines(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"stage": "rl"') if path.exists() else 0


def end_when(reached, number: int, *arguments) -> int:
    """Starts a command and sends it a signal as soon as `reached()` -> its exit status."""
    process = running.start_command(*arguments)
    end = time.monotonic() + 300
    try:
        while not reached():
            assert process.poll() is None and time.monotonic() < end, (
                arguments[2].with_suffix(".log").read_text()[-3000:]
            )
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(timeout=120)
    finally:
        process.kill()


@pytest.mark.nightly
def test_musique_runs_the_whole_way(shared_data, tmp_path):
    """configs/musique_tiny.py with one step of fine-tuning, one iteration and eight questions."""
    workdir = tmp_path / "run"
    options = (
        f"--config.data.path={shared_data / 'musique'}",
        f"--config.prompt.tokenizer={shared_data / 'tokenizer_qwen2_5'}",
        "--config.iterations=1",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.sft.phases=((1,8,False,0.0,0.001),)",
        "--config.evaluation.questions=8",
        "--config.sft.demonstrations=16",
    )
    process = running.start(
        [
            "-m",
            "stepsearch_jax.train",
            "--config=configs/musique_tiny.py",
            f"--workdir={workdir}",
            *options,
        ],
        log=tmp_path / "log",
    )
    try:
        assert process.wait(timeout=1500) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        process.kill()
    log = (tmp_path / "log").read_text()
    assert (
        "validation: 200 questions; 13196 passages; "
        "recall@3 of the gold passages for the gold sub-questions: 0.7" in log
    )
    assert json.loads((workdir / "evaluation.json").read_text())["questions"] == 8
    assert sum(row["stage"] == "rl" for row in read_metrics(workdir)) == 1
