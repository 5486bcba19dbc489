"""Several processes train as one does, each with its own questions, searches and scores; a checkpoint goes on with another number of them; corpus and index
are made once a host."""

import contextlib
import fcntl
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import running

from stepsearch_jax.search.cache import one_at_a_time

# A run that keeps what its process sampled, searched and scored: python driver.py CACHE START WORKDIR PROCESS PROCESSES PORT MESH ITERATIONS
# Plain SGD: the parameters show the gradients, which Adam would divide by themselves.
DRIVER = """
import pathlib, sys
import numpy as np
import tiny_config
from stepsearch_jax.evaluation import greedy
from stepsearch_jax.search.bm25 import Bm25Index
from stepsearch_jax.cli import run_guarded
from stepsearch_jax.run.system import process_rows
from stepsearch_jax.train import train

cache, start, workdir = sys.argv[1:4]
process, processes, port = map(int, sys.argv[4:7])
config = tiny_config.get_config(cache)
config.sft.checkpoint = start
config.mesh.data, config.mesh.fsdp, config.mesh.tensor = map(int, sys.argv[7].split("x"))
config.iterations, config.checkpoint.keep, config.evaluation.questions = int(sys.argv[8]), 3, 8
for optimizer, rate in ((config.policy, 0.1), (config.value, 1.0)):  # the value model's head begins at 0, so that its trunk moves little at first
    optimizer.optimizer, optimizer.learning_rate, optimizer.warmup = "sgd", rate, 0.0
if processes > 1:
    d = config.distributed
    d.coordinator, d.processes, d.process_id = f"localhost:{port}", processes, process
kept, asked = pathlib.Path(f"{workdir}-{process}"), []
kept.mkdir()
search, collect = Bm25Index.search, collect.collect

def keep_queries(index, queries, k):
    asked.extend(queries)
    return search(index, queries, k)

def keep_episodes(system, sample_episodes, params, split, rows, key, temperature, *options, **others):
    asked.clear()
    got = collect(system, sample_episodes, params, split, rows, key, temperature, *options, **others)
    if temperature:
        names = ("question_ids", "tokens", "turn_status", "doc_ids", "sampler_logprobs")
        arrays = {name: getattr(got.rows, name) for name in names} | {"step_rewards": got.scores.step_rewards, "outcome": got.scores.outcome_rewards}
        number = len(list(kept.iterdir()))
        np.savez(kept / f"{number}.npz", rows=process_rows(system.mesh, len(rows)), queries=np.array(sorted(asked), dtype=str), **arrays)
    return got

Bm25Index.search, collect.collect = keep_queries, keep_episodes
run_guarded(train, config, pathlib.Path(workdir))
"""
ITERATIONS, QUESTIONS = 3, 8


class Run:
    """A run of several processes in WORKDIR to its end."""

    def __init__(self, workdir, tmp_path_factory, mesh: str, processes: int, caches=None):
        driver, port = workdir.with_suffix(".py"), running.free_port()
        driver.write_text(DRIVER)
        caches = caches or [running.shared_cache(tmp_path_factory)] * processes
        self.workdir, self.processes = workdir, processes
        devices = int(np.prod([int(size) for size in mesh.split("x")])) // processes
        logs = [workdir.with_name(f"{workdir.name}-{process}.log") for process in range(processes)]
        started = [
            running.start(
                [
                    driver,
                    caches[process],
                    running.searching_start(tmp_path_factory),
                    workdir,
                    process,
                    processes,
                    port,
                    mesh,
                    ITERATIONS,
                ],
                devices=devices,
                log=log,
            )
            for process, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=500) for process in started]
        finally:
            for process in started:
                process.kill()
        self.logs = [log.read_text() for log in logs]
        assert codes == [0] * processes, self.logs[0][-3000:]

    def load(self, iteration: int) -> list[dict]:
        """What each process kept of the run's iteration `iteration`, counted from where the run began or went on."""
        return [
            dict(
                np.load(
                    self.workdir.with_name(f"{self.workdir.name}-{process}") / f"{iteration}.npz"
                )
            )
            for process in range(self.processes)
        ]

    def join(self, iteration: int) -> dict[str, np.ndarray]:
        """The same of all processes together, in the order of the global rows; the queries sorted."""
        parts = self.load(iteration)
        order = np.argsort(np.concatenate([part["rows"] for part in parts]))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {
            name: np.sort(array) if name == "queries" else array[order]
            for name, array in joined.items()
        }

    def changes(self) -> dict[str, np.ndarray]:
        """How far the run moved each parameter of both models; the value model begins with the policy's trunk and a head of zeros."""
        end = running.final_state(self.workdir, ITERATIONS)
        start = running.read_tree(self.workdir / "start")
        return {
            name: leaf - start.get(name.split("['params']", 1)[1], 0)
            for name, leaf in end.items()
            if "['params']" in name
        }


def compare_iterations(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Token for token, search for search; rewards and log-probabilities to rounding."""
    for name in ("rows", "question_ids", "tokens", "turn_status", "doc_ids", "queries"):
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    for name, tolerance in (("step_rewards", 1e-6), ("outcome", 1e-6), ("sampler_logprobs", 1e-4)):
        np.testing.assert_allclose(got[name], expected[name], atol=tolerance, err_msg=name)


def compare_changes(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """-> the largest difference of a leaf in shares of its largest change, which all leaves have seen."""
    assert got.keys() == expected.keys() and len(got) > 20
    return max(
        float(np.abs(got[name] - leaf).max() / np.abs(leaf).max())
        for name, leaf in expected.items()
    )


@pytest.mark.slow
def test_several_processes_train_as_one(tmp_path, tmp_path_factory):
    """Three iterations on one, two and four processes; and the third one once more on four processes and on one, from the checkpoint that two wrote."""
    one = Run(tmp_path / "one", tmp_path_factory, "1x1x1", 1)
    expected, changes = [one.join(iteration) for iteration in range(ITERATIONS)], one.changes()
    assert sum(len(part["queries"]) for part in expected) > 10 and any(
        part["step_rewards"].any() for part in expected
    )
    asked = np.concatenate([part["question_ids"] for part in expected])
    assert (
        len(set(asked.tolist())) == len(asked) == ITERATIONS * QUESTIONS
    )  # all of the 24 training questions, each once

    two = Run(
        tmp_path / "two",
        tmp_path_factory,
        "2x1x2",
        2,
        caches=[tmp_path / "disk 0", tmp_path / "disk 1"],
    )  # as on hosts that share no disk
    assert all(
        list((tmp_path / f"disk {n}").glob("corpus-*/bm25-*/manifest.json")) for n in range(2)
    )
    assert (
        two.logs[0].count("\nreport: ") == 1 and "\nreport: " not in two.logs[1]
    )  # only the first process writes
    assert all(
        len(list(folder.iterdir())) == 1 for folder in (two.workdir / "tensorboard").iterdir()
    )
    later = []
    for name, mesh, processes in (("one after two", "1x2x1", 1), ("four after two", "2x2x1", 4)):
        shutil.copytree(two.workdir, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "3")
        later.append(Run(tmp_path / name, tmp_path_factory, mesh, processes))
        assert all("resumed from iteration 2" in log for log in later[-1].logs)
        compare_iterations(later[-1].join(0), expected[2])
    four = Run(tmp_path / "four", tmp_path_factory, "2x2x1", 4)

    print()
    for run in (two, four):
        for iteration in range(ITERATIONS):
            compare_iterations(run.join(iteration), expected[iteration])
            for part in run.load(
                iteration
            ):  # each process searched for its own rows alone, and for as many as its episodes asked
                assert len(part["rows"]) == QUESTIONS // run.processes
    for run in (two, four, *later):
        difference = compare_changes(run.changes(), changes)
        print(
            f"{run.workdir.name}: parameters after three iterations, largest difference in shares of the leaf's largest change: {difference:.1e}"
        )
        assert difference < 2e-4
        compare_figures(run.workdir, one.workdir)


def compare_figures(got, expected) -> None:
    """Metrics of every iteration, the evaluation's means and every prediction; times excepted."""
    lines, wanted = (
        [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (got, expected)
    )
    assert len(lines) == len(wanted) == ITERATIONS
    for a, b in zip(lines, wanted):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith("seconds/") and name not in (
                "stage",
                "compiled_programs",
                "decode_steps",
                "flushes",
            ):
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-4, err_msg=name)
    a, b = (json.loads((workdir / "evaluation.json").read_text()) for workdir in (got, expected))
    assert a["questions"] == b["questions"] == QUESTIONS
    for when in ("before", "after"):
        np.testing.assert_allclose(list(a[when].values()), list(b[when].values()), atol=1e-4)
    a, b = (
        [json.loads(line) for line in (workdir / "transcripts.jsonl").read_text().splitlines()]
        for workdir in (got, expected)
    )
    told = [
        [(episode["when"], episode["uid"], episode["prediction"]) for episode in episodes]
        for episodes in (a, b)
    ]
    assert told[0] == told[1] and len(a) == 2 * QUESTIONS


# ---- Once a host -----------------------------------------------------------------------------------------------------------------------------------

STAGE = """
import pathlib, sys, time
from stepsearch_jax.search.cache import one_at_a_time, prepare_folder
folder = pathlib.Path(sys.argv[1])
def write(path):
    time.sleep(0.5)
    (path / "index").write_text("made")
with one_at_a_time(folder):
    if sys.argv[2] == "die":
        import os
        print("inside", flush=True)
        os._exit(9)
    print(prepare_folder(folder / "index", {"kind": "test"}, write))
"""


def stage(folder, mode="make") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, str(folder), mode],
        cwd=running.REPO,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_one_process_of_each_disk_makes_what_is_not_there(tmp_path):
    here = [stage(tmp_path / "here") for _ in range(3)]
    elsewhere = stage(tmp_path / "elsewhere")
    assert sorted(process.communicate(timeout=60)[0].strip() for process in here) == [
        "False",
        "False",
        "True",
    ]
    assert elsewhere.communicate(timeout=60)[0].strip() == "True"


def test_a_process_that_dies_gives_way(tmp_path):
    assert stage(tmp_path, "die").communicate(timeout=60)[0].strip() == "inside"
    assert stage(tmp_path).communicate(timeout=60)[0].strip() == "True"


@pytest.mark.parametrize("fault", ["no locks", "not writable"])
def test_without_locks_nobody_waits(tmp_path, monkeypatch, fault):
    def refuse(*arguments):
        raise OSError("not supported")

    folder = tmp_path / "disk"
    if fault == "no locks":
        monkeypatch.setattr(fcntl, "flock", refuse)
    else:
        folder.write_text("a file where the folder should be")
    done = []
    with one_at_a_time(folder):
        done.append("body")
    with contextlib.suppress(ValueError), one_at_a_time(folder):
        raise ValueError
    assert done == ["body"]
