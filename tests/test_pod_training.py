"""Training on fake TPUs: a sweep on two of them, and the real command on two hosts that vanish."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import sweeping
from pods import NAMES, REPO, TPU, Cloud, preempt, wait_until


class PodSweep(sweeping.Bench):
    """A small sweep, and a cloud with two TPUs that train its points as planned."""

    def __init__(self, cloud: Cloud, folder: pathlib.Path, capsys):
        super().__init__(folder, capsys)
        self.cloud = cloud
        for name in ("pod-a", "pod-b"):
            cloud.set_state("READY", name=name)
            assert cloud.run("launch/pod/setup.sh", **NAMES | {"NAME": name})[0] == 0
        # The first host runs the training of the sweep's tests, in the bucket's folder.
        bucket = cloud.folder / "buckets"
        (cloud.attempts.parent / "train.py").write_text(f"""
import os, subprocess, sys
flags = [flag.replace("--workdir=gs://", "--workdir={bucket}/") for flag in sys.argv[2:]]
if sys.argv[1] == "0":
    sys.exit(subprocess.run([sys.executable, "{self.train}", *flags]).returncode)
""")
        script = cloud.root / "launch/sweep_pod.py"
        spec = importlib.util.spec_from_file_location("sweep_pod", script)
        self.command = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.command)

    def set_sweep(self, text: str, name: str = "small.py", **changes) -> None:
        super().set_sweep(text, name)
        for plan in self.plan.values():
            plan["config"]["distributed"] = {"processes": 0}
        self.change_plan(**changes)

    def run_pods(self, *more: str) -> tuple[int, str, str]:
        """-> (exit status, stdout, stderr)."""
        self.capsys.readouterr()
        flags = ["--pods=pod-a,pod-b", "--storage=gs://b/my sweep/", *self.arguments(*more)]
        try:
            status = self.command.main(flags)
        except SystemExit as end:  # argparse
            status = end.code
        return status, *self.capsys.readouterr()


@pytest.fixture
def pod_sweep(tmp_path, capsys, monkeypatch):
    config = sweeping.CONFIG.replace("seed=0,", "seed=0, distributed=dict(processes=1),")
    sweep = sweeping.define(
        'add("Full", {}, range(2))', 'add("merged", {"reward.placement": "merged"}, [0])'
    )
    monkeypatch.setattr(sweeping, "CONFIG", config)
    monkeypatch.setattr(sweeping, "SWEEP", sweep)
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading the command adds to it
    folder = tmp_path / "bench"
    folder.mkdir()
    bench = PodSweep(Cloud(tmp_path), folder, capsys)
    for name, value in (bench.cloud.environment | TPU).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(bench.cloud.root)
    return bench


@pytest.mark.slow
def test_sweep_on_two_tpus(pod_sweep, monkeypatch):
    """Both run at once, a point at a time on each; the next sweep repeats failed points alone."""
    monkeypatch.setenv("RESTARTS", "1")
    pod_sweep.change_plan(
        **{"merged-0": dict(fail="no luck", status=1)},
        **{name: dict(seconds=3.0) for name in ("full-0", "full-1")},
    )
    status, _, error = pod_sweep.run_pods("--config.iterations=6")
    assert status == 1 and "failed: merged-0: exit status 1" in error, error
    assert set(pod_sweep.take_starts()) == set(pod_sweep.plan)
    runs = pod_sweep.cloud.folder / "buckets/b/my sweep/points"
    assert {path.name for path in runs.iterdir()} == set(pod_sweep.plan)
    points = pod_sweep.workdir / "points"
    copied = (points / "full-0/metrics.jsonl").read_text()
    assert copied == (runs / "full-0/metrics.jsonl").read_text()
    logs = [(points / f"full-{seed}.log").read_text() for seed in (0, 1)]
    assert sorted(re.search(r"on (pod-.)", log)[1] for log in logs) == ["pod-a", "pod-b"]
    table = pod_sweep.read_table()["sweeps"][0]["methods"]
    assert [len([run for run in method["runs"] if run["finished"]]) for method in table] == [2, 0]
    pod_sweep.change_plan(**{"merged-0": dict(fail="")})
    status, out, error = pod_sweep.run_pods("--config.iterations=6")
    assert status == 0 and pod_sweep.take_starts() == ["merged-0"] and "merged" in out, error


def test_sweep_dry_run_and_bad_input(pod_sweep, monkeypatch):
    pod_sweep.cloud.take_calls()
    for wrong in ("--storage=/disk", "--storage=gs://", "--pods=a,a", "--sede=1"):
        status, _, error = pod_sweep.run_pods(wrong)
        assert status == 2 and wrong in error
    monkeypatch.setenv("DRY_RUN", "1")
    status, out, error = pod_sweep.run_pods()
    lines = out.splitlines()
    assert status == 0 and len(lines) == len(pod_sweep.plan), error
    command = "NAME=pod-a|pod-b bash launch/pod/train_pod.sh "
    assert all(line.startswith(command) for line in lines)
    assert "'--workdir=gs://b/my sweep/points/full-0'" in lines[0]
    monkeypatch.delenv("ZONE")
    status, _, error = pod_sweep.run_pods()
    assert status == 2 and "ZONE is missing" in error
    assert pod_sweep.cloud.take_calls() == []


@pytest.mark.nightly
def test_real_training_survives_a_preemption_bit_for_bit(tmp_path, tmp_path_factory):
    """Two hosts train together; after the first checkpoint their machines vanish.

    The script makes others, and the result equals that of an undisturbed run.
    """
    import running

    # a repository with the real package, and hosts that run it
    cloud = Cloud(tmp_path, hosts=2)
    no_cache = shutil.ignore_patterns("__pycache__")
    for name in ("stepsearch_jax", "configs"):
        shutil.copytree(REPO / name, cloud.root / name, ignore=no_cache)
    (cloud.root / "tests").mkdir()
    shutil.copy(REPO / "tests/tiny_config.py", cloud.root / "tests")
    (cloud.attempts.parent / "train.py").write_text(
        "import os, sys\n"
        "command = [sys.executable, '-m', 'stepsearch_jax.train', *sys.argv[2:]]\n"
        "os.execv(sys.executable, command)\n"
    )
    cloud.environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": running.COMPILE_FAST,
        "PYTHONPATH": ".",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
    }
    cloud.set_state("READY")
    assert cloud.run("launch/pod/setup.sh", **NAMES)[0] == 0
    whole, preempted = tmp_path / "disk/whole", tmp_path / "disk/preempted"
    flags = [
        f"--config=tests/tiny_config.py:{running.shared_cache(tmp_path_factory)}",
        f"--config.sft.checkpoint={running.searching_start(tmp_path_factory)}",
        "--config.iterations=4",
        "--config.evaluation.questions=8",
    ]

    def start(workdir: pathlib.Path) -> subprocess.Popen:
        return cloud.start("launch/pod/train_pod.sh", *flags, f"--workdir={workdir}", **TPU)

    # one run undisturbed, one with a preemption
    process = start(whole)
    out, error = process.communicate(timeout=600)
    logs = cloud.root.glob("runs/pods/*/*/*.log")
    assert process.returncode == 0, error + "".join(log.read_text()[-3000:] for log in logs)
    process = start(preempted)
    wait_until(lambda: (preempted / "checkpoints/1").is_dir(), 300)
    preempt(cloud)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0 and "search-1 is PREEMPTED" in error, error
    logs = [path.read_text() for path in sorted(cloud.root.glob("runs/pods/search-1/*/1.log"))]
    assert ["resumed from iteration" in log for log in logs] == [False, False, True]
    # the same parameters and figures
    expected, resumed = running.final_state(whole, 4), running.final_state(preempted, 4)
    assert expected.keys() == resumed.keys()
    for name, leaf in expected.items():
        assert (leaf == resumed[name]).all(), name
    assert (whole / "evaluation.json").read_text() == (preempted / "evaluation.json").read_text()
