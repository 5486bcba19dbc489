"""Running a sweep with a training command that trains nothing.

Which points start, what a failure or an interruption leaves, and commands for other machines.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import running as commands
from sweeping import REPO, TRAIN, Bench, define

from stepsearch_jax.sweeps import figure, running
from stepsearch_jax.sweeps.points import describe_difference


@pytest.fixture
def bench(tmp_path, capsys, monkeypatch) -> Bench:
    monkeypatch.setattr(running, "_POLL_SECONDS", 0.02)
    # The figure takes most of the time; test_sweep_results.py draws it.
    monkeypatch.setattr(figure, "draw_figure", lambda *_: None)
    return Bench(tmp_path, capsys)


def test_every_different_point_runs_once_seed_by_seed(bench):
    """ "step only" is "without key" under another name.

    The table by hand: points reach 0.1 n, in the order of running; before RL it was 0.1.
    """
    order = ["full-0", "without-key-0", "merged-0", "full-1", "without-key-1", "full-2"]
    status, out, err = bench.run()
    assert status == 0 and bench.take_starts() == order
    assert "6 points, 0 of them finished" in err and re.search(
        r"100%.*6/6 .*finished=6, failed=0, left=0", err
    )
    for name in order:
        assert (bench.workdir / "points" / f"{name}.log").exists()
    # Full reaches 0.1, 0.4, 0.6: mean 0.3667, deviations -0.2667, 0.0333, 0.2333, s^2 = 0.1267 / 2,
    # s / sqrt 3 = 0.1453, t (2) = 4.303: 0.625.
    # Without key 0.2 and 0.5: mean 0.35, s / sqrt 2 = 0.15, t (1) = 12.706: 1.906.
    # Exact match is half of F1.
    expected = """
| method | seeds | F1 | Exact match | Gold recall | Searches | F1 gain |
|---|---|---|---|---|---|---|
| before RL | | 0.100 | 0.050 | 0.900 | 2.500 | |
| Full | 3 | 0.367 ± 0.625 | 0.183 ± 0.313 | 0.900 ± 0.000 | 2.500 ± 0.000 | +0.267 ± 0.625 |
| without key | 2 | 0.350 ± 1.906 | 0.175 ± 0.953 | 0.900 ± 0.000 | 2.500 ± 0.000 | +0.250 ± 1.906 |
| merged | 1 | 0.300 | 0.150 | 0.900 | 2.500 | +0.200 |
| step only | 2 | 0.350 ± 1.906 | 0.175 ± 0.953 | 0.900 ± 0.000 | 2.500 ± 0.000 | +0.250 ± 1.906 |

Equal settings, and so the same runs: *step only* and *without key*.
"""
    table = (bench.workdir / "table.md").read_text()
    assert table.endswith(expected) and table in out
    heading = (
        "## small\n\nEach run: 6 iterations, 48 episodes, 12 optimiser steps; "
        "measured on 20 questions of test.\n"
    )
    assert heading in table
    (sweep,) = bench.read_table()["sweeps"]
    assert [row["same_as"] for row in sweep["methods"]] == [None, None, None, "without key"]
    runs = sweep["methods"][1]["runs"]
    assert [(run["seed"], run["name"], run["finished"]) for run in runs] == [
        (0, "without-key-0", True),
        (1, "without-key-1", True),
    ]
    assert [run["after"]["f1"] for run in runs] == [0.2, 0.5] and sweep["methods"][1][
        "overrides"
    ] == {"reward.gamma_key": 0.0}


def test_what_a_point_is_started_with(bench):
    bench.run("--config.iterations=4", "--config.data.shapes=('3 hop',)")
    notes = {name: flags for name, _, flags in bench.take_notes()}
    folder = bench.workdir / "points"
    assert notes["without-key-1"] == [
        f"--config={bench.config}",
        f"--workdir={folder / 'without-key-1'}",
        "--config.iterations=4",
        "--config.data.shapes=('3 hop',)",
        "--config.reward.gamma_key=0.0",
        "--config.seed=1",
    ]


def test_finished_points_are_skipped_and_the_table_is_the_same(bench):
    bench.run()
    bench.take_starts()
    first = {name: (bench.workdir / name).read_bytes() for name in ("table.md", "table.json")}
    status, _, err = bench.run()
    assert status == 0 and bench.take_starts() == [] and "6 points, 6 of them finished" in err
    assert {name: (bench.workdir / name).read_bytes() for name in first} == first


def test_unfinished_points_are_started_again_with_what_they_left(bench):
    bench.run()
    bench.take_starts()
    (bench.workdir / "points/full-1/evaluation.json").unlink()
    (bench.workdir / "points/full-1/checkpoint").touch()
    for file in (bench.workdir / "points/merged-0").iterdir():
        file.unlink()
    assert bench.run()[0] == 0 and bench.take_starts() == ["merged-0", "full-1"]
    assert (bench.workdir / "points/full-1/checkpoint").exists()


def test_more_seeds_and_methods_add_to_what_is_there(bench):
    bench.run()
    bench.take_starts()
    bench.set_sweep(
        'def sweep(add):\n    add("Full", {}, range(4))\n    add("new", {"iterations": 3}, [0])\n',
        name="more.py",
    )
    assert bench.run()[0] == 0 and bench.take_starts() == ["new-0", "full-3"]


def test_a_failed_point_leaves_the_others_alone(bench):
    bench.change_plan(
        without_key_0=dict(fail="the world is flat"), full_1=dict(fail="left nothing", status=0)
    )
    status, _, err = bench.run()
    assert status == 1 and len(bench.take_starts()) == 6
    log = bench.workdir / "points/without-key-0.log"
    assert err.splitlines()[-2:] == [
        f"failed: without-key-0: exit status 3: ValueError: the world is flat (log: {log})",
        "failed: full-1: exit status 0: ValueError: left nothing "
        f"(log: {log.with_name('full-1.log')})",
    ]
    assert "finished=4, failed=2, left=0" in err
    table = (bench.workdir / "table.md").read_text()
    assert (
        "| Full | 2 of 3 | 0.350 " in table and "| without key | 1 of 2 | 0.500 |" in table
    )  # 0.1 and 0.6 are left of Full, 0.5 of without key
    runs = bench.read_table()["sweeps"][0]["methods"][1]["runs"]
    assert [run["finished"] for run in runs] == [False, True] and "after" not in runs[0]

    bench.change_plan(without_key_0=dict(fail=""), full_1=dict(fail="still nothing"))
    assert bench.run()[0] == 1 and bench.take_starts() == ["without-key-0", "full-1"]
    assert (
        "ValueError: left nothing" in log.with_name("full-1.log").read_text()
        and "still nothing" in log.with_name("full-1.log").read_text()
    )


def test_a_silent_failure_and_a_run_of_another_config_are_failures(bench):
    bench.train.write_text("#!/bin/sh\nexit 7\n")
    status, out, err = bench.run()
    assert (
        status == 1
        and err.count("exit status 7: its log is empty") == 6
        and "| Full | 0 of 3 | – | – | – | – | – |" in out
    )
    bench.train.write_text(TRAIN.replace("{python}", sys.executable))
    bench.change_plan(full_0=dict(config=bench.plan["merged-0"]["config"]))
    status, _, err = bench.run()
    assert status == 2 and re.search(
        "full-0 holds a run with another config .reward.placement: merged, now step", err
    )
    assert (bench.workdir / "points/full-2/evaluation.json").exists()  # the others ran all the same


def test_a_changed_config_is_refused_before_anything_starts(bench):
    bench.set_sweep(
        'def sweep(add):\n    add("new", {}, [1])\n    add("Full", {"iterations": 5}, [0])\n'
    )
    bench.run()
    bench.take_starts()
    bench.set_sweep(
        define(
            'add("another", {}, [0])',
            'add("Full", {"iterations": 7, "reward.use_gain": False}, [0])',
        )
    )
    before = {path: path.read_bytes() for path in bench.workdir.rglob("*") if path.is_file()}
    for more in ([], ["--table-only"], ["--print-commands"]):
        status, out, err = bench.run(*more)
        folder = bench.workdir / "points/full-0"
        assert (status, out) == (2, "") and bench.take_starts() == []
        assert err.startswith(f"sweep: {folder} ") and err.count("\n") == 1
        assert "(iterations: 5, now 7; reward.use_gain: True, now False)" in err
        assert f"remove {folder}" in err and "--workdir" in err
    assert {
        path: path.read_bytes() for path in bench.workdir.rglob("*") if path.is_file()
    } == before


def test_differences_are_named():
    old, new = (
        {"a": {"b": 1, "c": 2}, "d": 3, "e": 4, "f": 5},
        {"a": {"b": 1}, "d": 4, "e": 5, "f": 6},
    )
    assert (
        describe_difference(old, new) == "a.c: 2, now nothing; d: 3, now 4; e: 4, now 5; and 1 more"
    )
    assert describe_difference(old, old | {"d": 7}) == "d: 3, now 7"


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores and a platform that pins processes",
)
def test_jobs_share_out_the_cores(bench):
    bench.run("--jobs=2")
    notes = bench.take_notes()
    mine, used = os.sched_getaffinity(0), {tuple(cores) for _, cores, _ in notes}
    assert (
        len(notes) == 6
        and len(used) == 2
        and sorted(core for cores in used for core in cores) == sorted(mine)
    )
    bench.set_sweep('def sweep(add):\n    add("alone", {}, [7])\n')
    bench.run("--jobs=1")
    assert bench.take_notes()[0][1] == sorted(mine)


def test_cores_are_shared_only_where_there_are_enough(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 6, 7, 9}, raising=False)
    assert (
        running._share_cores(2) == [{3, 6, 9}, {4, 7}]
        and running._share_cores(1) == [None]
        and running._share_cores(6) == [None] * 6
    )
    monkeypatch.delattr(os, "sched_getaffinity")
    assert running._share_cores(2) == [None, None]


@pytest.mark.slow
def test_times_add_up(bench):
    """Every run takes 0.3 s at least; times are rounded to tenths."""
    bench.change_plan(**{name.replace("-", "_"): dict(seconds=0.3) for name in bench.plan})
    start = time.monotonic()
    bench.run()
    elapsed = time.monotonic() - start
    wall = bench.read_table()["wall_s"]
    seconds = {
        run["name"]: run["wall_s"]
        for row in bench.read_table()["sweeps"][0]["methods"]
        for run in row["runs"]
    }
    assert set(seconds) == set(bench.plan) and all(second >= 0.3 for second in seconds.values())
    assert (
        sum(seconds.values()) - 0.1 * len(seconds) <= wall <= elapsed + 0.1 * len(seconds)
    )  # one at a time
    (bench.workdir / "points/full-0/evaluation.json").unlink()
    bench.write(
        "sweep/times.json", json.dumps({"sweep": 2000.0, "points": seconds | {"full-0": 1000.0}})
    )
    bench.run()
    times = running.Times(bench.workdir).read()
    assert (
        1000 < times["points"]["full-0"] < 1100
        and times["points"]["full-1"] == seconds["full-1"]
        and 2000 < times["sweep"] < 2100
    )
    (bench.workdir / "table.json").unlink()
    assert bench.run("--table-only")[0] == 0 and bench.read_table()["wall_s"] == times["sweep"]


# --- interruptions


class Process:
    """The command itself, as a process, whose training command is the bench's."""

    def __init__(self, bench: Bench):
        self.log = bench.folder / "process.log"
        driver = bench.write(
            "driver.py",
            f"import runpy, sys\nsys.executable = {str(bench.train)!r}\n"
            f"sys.argv = ['sweep', *{bench.arguments('--jobs=2')!r}]\n"
            f"runpy.run_path({str(REPO / 'launch/sweep.py')!r}, run_name='__main__')\n",
        )
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(driver)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            self.children = [
                self._wait_for_pid(bench.workdir / "points" / name / "pid")
                for name in ("full-0", "without-key-0")
            ]
        except BaseException:
            self.process.kill()
            raise

    def _wait_for_pid(self, path: pathlib.Path) -> int:
        end = time.monotonic() + 60
        while not (path.exists() and path.read_text()):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        return int(path.read_text())


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = pathlib.Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="ctrl-c"),
        pytest.param(signal.SIGTERM, id="terminate", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_sweep_ends_its_runs_and_goes_on_later(bench, number):
    bench.change_plan(full_0=dict(hang=True), without_key_0=dict(hang=True))
    process = Process(bench)
    process.process.send_signal(number)
    assert process.process.wait(timeout=30) == 130 and not any(map(is_running, process.children))
    assert "interrupted" in process.log.read_text() and "Traceback" not in process.log.read_text()
    assert set(running.Times(bench.workdir).read()["points"]) == {"full-0", "without-key-0"}
    bench.take_starts()
    bench.change_plan(full_0=dict(hang=False), without_key_0=dict(hang=False))
    assert bench.run()[0] == 0 and len(bench.take_starts()) == 6


@pytest.mark.slow
def test_an_interrupted_sweep_waits_until_its_runs_are_saved(bench):
    """However long that takes; a second Ctrl-C ends them at once."""
    bench.change_plan(full_0=dict(hang=True, saving=3), without_key_0=dict(hang=True, saving=600))
    process = Process(bench)
    process.process.send_signal(signal.SIGINT)
    end = time.monotonic() + 30
    while not (bench.workdir / "points/full-0/saved").exists():
        assert process.process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    assert "Ctrl-C ends them" in process.log.read_text()
    process.process.send_signal(signal.SIGINT)
    assert process.process.wait(timeout=30) == 130 and not any(map(is_running, process.children))
    assert not (bench.workdir / "points/without-key-0/saved").exists()
    assert "Traceback" not in process.log.read_text()


@pytest.mark.slow
def test_runs_that_a_killed_sweep_left_keep_the_next_one_out(bench):
    """Otherwise two processes would write one folder."""
    bench.change_plan(full_0=dict(hang=True), without_key_0=dict(hang=True))
    process = Process(bench)
    try:
        process.process.kill()
        process.process.wait()
        assert all(map(is_running, process.children))
        bench.take_starts()
        bench.change_plan(full_0=dict(hang=False), without_key_0=dict(hang=False))
        status, _, err = bench.run()
        assert status == 2 and f"is at work in {bench.workdir}" in err and bench.take_starts() == []
        assert bench.run("--table-only")[0] == 0
    finally:
        for pid in process.children:
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while any(map(is_running, process.children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert bench.run()[0] == 0


# --- commands for other machines


def test_commands_are_printed_for_what_is_not_finished(bench):
    bench.run()
    bench.take_starts()
    for name in ("full-0", "without-key-1"):
        (bench.workdir / "points" / name / "evaluation.json").unlink()
    (bench.workdir / "table.md").unlink()
    status, out, err = bench.run(
        "--print-commands",
        "--command-prefix=bash launch/pod.sh --name={name} --",
        "--config.data.shapes=('2hop',)",
    )
    expected = [
        [
            "bash",
            "launch/pod.sh",
            f"--name={name}",
            "--",
            "python",
            "-m",
            "stepsearch_jax.train",
            f"--config={bench.config}",
            f"--workdir={bench.workdir / 'points' / name}",
            "--config.data.shapes=('2hop',)",
            *more,
            f"--config.seed={name[-1]}",
        ]
        for name, more in (("full-0", []), ("without-key-1", ["--config.reward.gamma_key=0.0"]))
    ]
    assert (status, err) == (0, "") and [shlex.split(line) for line in out.splitlines()] == expected
    assert bench.take_starts() == [] and not (bench.workdir / "table.md").exists()
    assert (
        bench.run("--dry-run")[1]
        .splitlines()[0]
        .startswith("python -m stepsearch_jax.train --config=")
    )


# --- the real thing


@pytest.mark.nightly
def test_two_real_points(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(REPO)
    cache = commands.shared_cache(tmp_path_factory)
    start = commands.searching_start(tmp_path_factory)
    sweep = tmp_path / "two.py"
    f1_only = {"reward.gamma_key": 0.0, "reward.use_gain": False, "reward.use_redundancy": False}
    sweep.write_text(define('add("StePPO", {}, [0])', f'add("F1 only", {f1_only}, [0])'))
    log = tmp_path / "log"
    arguments = [
        "launch/sweep.py",
        f"--sweep={sweep}",
        f"--config=tests/tiny_config.py:{cache}",
        f"--workdir={tmp_path / 'sweep'}",
        "--jobs=2",
        "--config.iterations=1",
        f"--config.sft.checkpoint={start}",
    ]
    for expected in (
        "2 points, 0 of them finished",
        "2 points, 2 of them finished",
    ):  # the second time nothing is left to do: configs are as foreseen
        process = commands.start(arguments, log=log)
        assert process.wait(timeout=600) == 0, log.read_text()
        assert expected in log.read_text() and "| F1 only | 1 | 0." in log.read_text()
    assert (tmp_path / "sweep/figure.png").exists()
