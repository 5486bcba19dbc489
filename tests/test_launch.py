"""The launch scripts with a fake Python."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import pytest

from configs.atlas_quickstart import VARIANTS
from stepsearch_jax.run.folder import lock

REPO = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((REPO / "launch").glob("*.sh")), REPO / ".ci/run"]

# Passes code to a real python, logs which modules are run; its training command leaves a run.
FAKE_PYTHON = """#!/usr/bin/env bash
if [[ $1 != -m ]]; then exec {python} "$@"; fi
shift
echo "$@" >>{log}
case $1 in
  venv) mkdir -p "$3/bin"; rm -f "$3"/made-with "$3"/installed-*; cp "$0" "$3/bin/python" ;;
  stepsearch_jax.train)
    for argument in "$@"; do
      case $argument in --workdir=*) workdir=${{argument#--workdir=}} ;; esac
    done
    mkdir -p "$workdir"
    echo '{{}}' >"$workdir/config.json"
    echo "the table" ;;
esac
exit {status}
"""


class Clone:
    """The scripts in a folder of their own, whose name has a space."""

    def __init__(self, folder: pathlib.Path):
        self.root, self.log = folder / "a clone", folder / "log"
        self.root.mkdir()
        shutil.copytree(REPO / "launch", self.root / "launch")
        shutil.copytree(REPO / ".ci", self.root / ".ci")
        for name in ("requirements.txt", "requirements-test.txt", "requirements-ci.txt"):
            shutil.copy(REPO / name, self.root)
        self.python = folder / "python of ours"
        self.set_python(sys.executable)

    def set_python(self, python: str, status: int = 0) -> None:
        text = FAKE_PYTHON.format(python=f"'{python}'", log=f"'{self.log}'", status=status)
        self.python.write_text(text)
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs a script from another folder, without input."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("SLOW", "DRY_RUN", "PYTHON")
        }
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=inherited | {"PYTHON": str(self.python)} | environment,
            timeout=60,
        )

    def take_log(self) -> list[str]:
        """What was run as a module since the last time."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.name == "venv.sh" or os.access(script, os.X_OK)


PIP = "pip install --quiet --no-compile --disable-pip-version-check -r "
PYTEST = "pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15"


def test_test_script_installs_only_what_changed(clone):
    checks = [
        "ruff check --quiet --output-format=concise .",
        "ruff format --quiet --check .",
        f"{PYTEST} tests/test_x.py -k a b",
    ]
    arguments = ("tests/test_x.py", "-k", "a b")
    done = clone.run("launch/test.sh", *arguments)
    assert done.returncode == 0, done.stderr
    assert clone.take_log() == [
        "venv --clear .venv",
        PIP + "requirements.txt",
        PIP + "requirements-test.txt",
        *checks,
    ]
    clone.run("launch/test.sh", *arguments)
    assert clone.take_log() == checks
    with (clone.root / "requirements-test.txt").open("a") as file:
        file.write("another  # because\n")
    clone.run("launch/test.sh", *arguments)
    assert clone.take_log() == [PIP + "requirements-test.txt", *checks]
    (clone.root / ".venv/made-with").write_text("3.9.0 (an older Python)\n")
    clone.run("launch/test.sh", *arguments)
    assert clone.take_log()[:2] == ["venv --clear .venv", PIP + "requirements.txt"]


def test_failed_installation_is_tried_again_and_fails_the_script(clone):
    clone.set_python(sys.executable, status=1)
    assert clone.run("launch/test.sh").returncode != 0
    assert clone.take_log() == ["venv --clear .venv"]
    clone.set_python(sys.executable)
    assert clone.run("launch/test.sh").returncode == 0
    assert len(clone.take_log()) == 6
    (clone.root / "requirements.txt").write_text("new\n")
    clone.set_python(sys.executable, status=1)
    shutil.copy(clone.python, clone.root / ".venv/bin/python")
    for _ in range(2):
        assert clone.run("launch/test.sh").returncode != 0
        assert clone.take_log() == [PIP + "requirements.txt"]


def test_failing_check_fails_the_script(clone):
    clone.run("launch/test.sh")
    clone.take_log()
    clone.set_python(sys.executable, status=1)
    shutil.copy(clone.python, clone.root / ".venv/bin/python")
    assert clone.run("launch/test.sh").returncode != 0
    assert clone.take_log() == ["ruff check --quiet --output-format=concise ."]


def test_ci_runs_the_slow_tests_too(clone):
    variables = "SLOW=${SLOW:-} offline=${HF_HUB_OFFLINE:-}"
    text = clone.python.read_text().replace('echo "$@"', f'echo "$@ {variables}"')
    clone.python.write_text(text)
    assert clone.run(".ci/run", CI="true").returncode == 0
    assert clone.take_log()[-1] == f"{PYTEST} SLOW=1 offline=1"
    clone.run("launch/test.sh", SLOW="0")
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    assert clone.take_log()[-1] == f"{PYTEST} SLOW= offline={offline}"


def test_ci_stops_at_a_type_error(clone):
    text = clone.python.read_text().replace("case $1 in", "case $1 in\n  basedpyright) exit 1 ;;")
    clone.python.write_text(text)
    assert clone.run(".ci/run").returncode != 0
    assert clone.take_log()[-1] == "basedpyright"


@pytest.mark.parametrize(
    "script,last", [("launch/test.sh", "pytest"), ("launch/quickstart.sh", "stepsearch_jax.train")]
)
def test_dry_run_prints_the_commands_and_does_nothing(clone, script, last):
    before = sorted(clone.root.rglob("*"))
    done = clone.run(script, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if " -m " in line]
    assert commands[0].endswith("-m venv --clear .venv ")
    assert PIP + "requirements.txt" in commands[1] and f" -m {last} " in commands[-1]
    assert sorted(clone.root.rglob("*")) == before and clone.take_log() == []


@pytest.mark.parametrize("script", ["launch/test.sh", "launch/quickstart.sh"])
def test_old_or_missing_python_is_named(clone, script):
    old = clone.root / "python3.10"
    old.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c \"import sys; sys.version_info = (3, 10, 9); $2\"\n"
    )
    old.chmod(0o755)
    for python in (str(old), "/no/such/python"):
        done = clone.run(script, PYTHON=python)
        assert done.returncode != 0
        assert done.stderr.startswith("Python 3.11") and python in done.stderr
        assert not (clone.root / ".venv").exists()


def test_quickstart_trains(clone):
    done = clone.run("launch/quickstart.sh", "--config.seed=1", "--config.search.k=2")
    assert done.returncode == 0, done.stderr
    assert clone.take_log() == [
        "venv --clear .venv",
        PIP + "requirements.txt",
        "stepsearch_jax.train --config=configs/atlas_quickstart.py --workdir=runs/quickstart "
        "--config.seed=1 --config.search.k=2",
    ]
    assert re.search(r"\nthe table\ntook 0 min \d+ s\n$", done.stdout)
    assert (clone.root / "runs/quickstart").is_dir()


def test_quickstart_passes_a_variant_on(clone):
    clone.run("launch/quickstart.sh", "one_search", "--config.seed=1")
    assert clone.take_log()[-1] == (
        "stepsearch_jax.train --config=configs/atlas_quickstart.py:one_search "
        "--workdir=runs/quickstart-one_search --config.seed=1"
    )


def test_failed_training_fails_the_quickstart(clone):
    clone.run("launch/quickstart.sh")
    clone.set_python(sys.executable, status=1)
    shutil.copy(clone.python, clone.root / ".venv/bin/python")
    done = clone.run("launch/quickstart.sh")
    assert done.returncode != 0 and "took" not in done.stdout


def test_quickstart_resumes_a_run_or_replaces_it(clone):
    workdir = clone.root / "runs/my run"
    clone.run("launch/quickstart.sh", "--workdir=runs/my run")
    (workdir / "checkpoint").touch()
    done = clone.run("launch/quickstart.sh", "--workdir=runs/my run")
    assert "resuming" in done.stdout and "runs/my run" in done.stdout
    assert (workdir / "checkpoint").exists()
    done = clone.run("launch/quickstart.sh", "--workdir=runs/my run", "--fresh", DRY_RUN="1")
    assert "rm -r -- runs/my\\ run" in done.stdout and (workdir / "checkpoint").exists()
    done = clone.run("launch/quickstart.sh", "--workdir=runs/my run", "--fresh")
    assert "removing the earlier run in runs/my run" in done.stdout and done.returncode == 0
    assert (workdir / "config.json").exists() and not (workdir / "checkpoint").exists()


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock here")
def test_fresh_removes_no_run_that_is_at_work(clone):
    workdir = clone.root / "runs/quickstart"
    workdir.mkdir(parents=True)
    (workdir / "config.json").touch()
    with lock(workdir):
        done = clone.run("launch/quickstart.sh", "--fresh")
        assert done.returncode == 2 and "runs/quickstart" in done.stderr
        assert (workdir / "config.json").exists()
    assert clone.run("launch/quickstart.sh", "--fresh", DRY_RUN="1").returncode == 0


def test_fresh_removes_nothing_but_runs(clone):
    done = clone.run("launch/quickstart.sh", "--workdir=launch", "--fresh")
    assert done.returncode != 0 and "not the folder of a run" in done.stderr
    assert (clone.root / "launch/quickstart.sh").exists() and clone.take_log() == []


def test_quickstart_explains_itself_and_refuses_what_it_does_not_know(clone):
    done = clone.run("launch/quickstart.sh", "--help", PYTHON="/no/such/python")
    words = ("--fresh", "--workdir", "DRY_RUN", "--config.seed=1")
    assert done.returncode == 0 and all(word in done.stdout for word in words)
    assert "pipefail" not in done.stdout and "#" not in done.stdout
    for arguments in (["--sede=1"], ["bogus"], ["seed=1"], ["continued", "shuffled"]):
        done = clone.run("launch/quickstart.sh", *arguments)
        assert done.returncode == 2 and arguments[-1] in done.stderr and clone.take_log() == []


def test_quickstart_knows_the_variants_of_its_config(clone):
    for variant in VARIANTS:
        done = clone.run("launch/quickstart.sh", *[variant] * bool(variant), DRY_RUN="1")
        assert f"--config=configs/atlas_quickstart.py{':' * bool(variant)}{variant} " in done.stdout


def test_test_script_explains_itself(clone):
    done = clone.run("launch/test.sh", "--help", PYTHON="/no/such/python")
    assert done.returncode == 0 and "SLOW=1" in done.stdout
    assert "pipefail" not in done.stdout and clone.take_log() == []
