"""Several processes train as one does, each with its own questions, searches and scores.

A checkpoint resumes on another number of processes; a host makes corpus and index once.
"""

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

# A run that keeps what its process sampled, searched and scored:
# python driver.py CACHE START WORKDIR PROCESS PROCESSES PORT MESH ITERATIONS
# Plain SGD: the parameters show the gradients, which Adam would normalise.
DRIVER = """
import pathlib, sys
import numpy as np
import tiny_config
from stepsearch_jax.cli import run_guarded
from stepsearch_jax.run import collect as collect_module
from stepsearch_jax.run.system import process_rows
from stepsearch_jax.search.bm25 import Bm25Index

cache, start, workdir = sys.argv[1:4]
process, processes, port = map(int, sys.argv[4:7])
config = tiny_config.get_config(cache)
config.sft.checkpoint = start
config.mesh.data, config.mesh.fsdp, config.mesh.tensor = map(int, sys.argv[7].split("x"))
config.iterations, config.checkpoint.keep, config.evaluation.questions = int(sys.argv[8]), 3, 8
# the value model's head begins at 0, so that its trunk moves little at first
for optimizer, rate in ((config.policy, 0.1), (config.value, 1.0)):
    optimizer.optimizer, optimizer.learning_rate, optimizer.warmup = "sgd", rate, 0.0
if processes > 1:
    distributed = config.distributed
    distributed.coordinator = f"localhost:{port}"
    distributed.processes, distributed.process_id = processes, process
kept, asked = pathlib.Path(f"{workdir}-{process}"), []
kept.mkdir()
search, collect = Bm25Index.search, collect_module.collect

def keep_queries(index, queries, k):
    asked.extend(queries)
    return search(index, queries, k)

def keep_episodes(system, sample, params, *options, **named):
    asked.clear()
    rollout = collect(system, sample, params, *options, **named)
    if named["temperature"]:
        names = ("question_ids", "tokens", "turn_status", "doc_ids", "sampler_logprobs")
        arrays = {name: getattr(rollout.rows, name) for name in names}
        arrays["step_rewards"] = rollout.scores.step_rewards
        arrays["outcome"] = rollout.scores.outcome_rewards
        arrays["rows"] = process_rows(system.mesh, len(named["question_rows"]))
        arrays["queries"] = np.array(sorted(asked), dtype=str)
        np.savez(kept / f"{len(list(kept.iterdir()))}.npz", **arrays)
    return rollout

Bm25Index.search, collect_module.collect = keep_queries, keep_episodes
from stepsearch_jax.train import train  # binds the functions above

run_guarded(train, config, pathlib.Path(workdir))
"""
ITERATIONS, QUESTIONS = 3, 8


class Run:
    """Runs several processes in WORKDIR to their end."""

    def __init__(self, workdir, tmp_path_factory, mesh: str, processes: int, caches=None):
        driver, port = workdir.with_suffix(".py"), running.free_port()
        driver.write_text(DRIVER)
        caches = caches or [running.shared_cache(tmp_path_factory)] * processes
        self.workdir, self.processes = workdir, processes
        devices = int(np.prod([int(size) for size in mesh.split("x")])) // processes
        logs = [workdir.with_name(f"{workdir.name}-{process}.log") for process in range(processes)]
        policy = running.searching_start(tmp_path_factory)
        started = []
        for process, log in enumerate(logs):
            of_process = [caches[process], policy, workdir, process]
            command = [driver, *of_process, processes, port, mesh, ITERATIONS]
            started.append(running.start(command, devices=devices, log=log))
        try:
            codes = [process.wait(timeout=500) for process in started]
        finally:
            for process in started:
                process.kill()
        self.logs = [log.read_text() for log in logs]
        assert codes == [0] * processes, self.logs[0][-3000:]

    def load(self, iteration: int) -> list[dict]:
        """What each process kept of an iteration, counted from where the run began or resumed."""
        folders = [
            self.workdir.with_name(f"{self.workdir.name}-{process}")
            for process in range(self.processes)
        ]
        return [dict(np.load(folder / f"{iteration}.npz")) for folder in folders]

    def join(self, iteration: int) -> dict[str, np.ndarray]:
        """The same for all processes together, in the order of the global rows; queries sorted."""
        parts = self.load(iteration)
        order = np.argsort(np.concatenate([part["rows"] for part in parts]))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {
            name: np.sort(array) if name == "queries" else array[order]
            for name, array in joined.items()
        }

    def changes(self) -> dict[str, np.ndarray]:
        """How far the run moved each parameter of both models.

        The value model begins with the policy's trunk and a head of zeros.
        """
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
    """-> the largest difference of any leaf, relative to the leaf's largest change.

    Every leaf must have changed.
    """
    assert got.keys() == expected.keys() and len(got) > 20
    differences = [
        np.abs(got[name] - leaf).max() / np.abs(leaf).max() for name, leaf in expected.items()
    ]
    return float(max(differences))


@pytest.mark.slow
@pytest.mark.parametrize(
    "most", [pytest.param(2, id="two"), pytest.param(4, id="four", marks=pytest.mark.nightly)]
)
def test_several_processes_train_as_one(tmp_path, tmp_path_factory, most):
    """Three iterations on one and on two processes; with most=4 on four as well.

    The third iteration also from the checkpoint that two wrote, on one process or on four.
    """
    # one process
    one = Run(tmp_path / "one", tmp_path_factory, "1x1x1", 1)
    expected, changes = [one.join(iteration) for iteration in range(ITERATIONS)], one.changes()
    assert sum(len(part["queries"]) for part in expected) > 10
    assert any(part["step_rewards"].any() for part in expected)
    asked = np.concatenate([part["question_ids"] for part in expected])
    # all of the 24 training questions, each once
    assert len(set(asked.tolist())) == len(asked) == ITERATIONS * QUESTIONS

    # two processes, as on hosts that share no disk; only the first one writes
    disks = [tmp_path / "disk 0", tmp_path / "disk 1"]
    two = Run(tmp_path / "two", tmp_path_factory, "2x1x2", 2, caches=disks)
    assert all(list(disk.glob("corpus-*/bm25-*/manifest.json")) for disk in disks)
    assert [log.count("\nreport: ") for log in two.logs] == [1, 0]
    boards = (two.workdir / "tensorboard").iterdir()
    assert all(len(list(folder.iterdir())) == 1 for folder in boards)

    # another number of processes, from the checkpoint of two
    mesh, processes = ("1x2x1", 1) if most == 2 else ("2x2x1", 4)
    shutil.copytree(two.workdir, tmp_path / "later")
    shutil.rmtree(tmp_path / "later" / "checkpoints" / "3")
    later = Run(tmp_path / "later", tmp_path_factory, mesh, processes)
    assert all("resumed from iteration 2" in log for log in later.logs)
    compare_iterations(later.join(0), expected[2])
    whole = [two]
    if most == 4:
        whole.append(Run(tmp_path / "four", tmp_path_factory, mesh, processes))

    # all equal one process; each process searched for its own rows alone
    print()
    for run in whole:
        for iteration in range(ITERATIONS):
            compare_iterations(run.join(iteration), expected[iteration])
            for part in run.load(iteration):
                assert len(part["rows"]) == QUESTIONS // run.processes
    for run in (*whole, later):
        difference = compare_changes(run.changes(), changes)
        print(
            f"{run.workdir.name}: parameters after three iterations, largest difference relative "
            f"to the leaf's largest change: {difference:.1e}"
        )
        assert difference < 2e-4
        compare_figures(run.workdir, one.workdir)


def compare_figures(got, expected) -> None:
    """Metrics of every iteration but for times, the evaluation's means, every prediction."""
    ignored = ("stage", "compiled_programs", "decode_steps", "flushes")
    lines, wanted = (read_lines(workdir / "metrics.jsonl") for workdir in (got, expected))
    assert len(lines) == len(wanted) == ITERATIONS
    for line, other in zip(lines, wanted):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if not name.startswith(("seconds/", "speed/")) and name not in ignored:
                np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=1e-4, err_msg=name)
    means, wanted = (
        json.loads((workdir / "evaluation.json").read_text()) for workdir in (got, expected)
    )
    assert means["questions"] == wanted["questions"] == QUESTIONS
    for when in ("before", "after"):
        values, others = list(means[when].values()), list(wanted[when].values())
        np.testing.assert_allclose(values, others, atol=1e-4)
    predictions, wanted = (
        [
            (episode["when"], episode["uid"], episode["prediction"])
            for episode in read_lines(workdir / "transcripts.jsonl")
        ]
        for workdir in (got, expected)
    )
    assert predictions == wanted and len(predictions) == 2 * QUESTIONS


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- once a host

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
    made = sorted(process.communicate(timeout=60)[0].strip() for process in here)
    assert made == ["False", "False", "True"]
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
