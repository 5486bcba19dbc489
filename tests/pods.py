"""A fake cloud for the tests of the pod scripts.

A repository whose scripts call a fake gcloud, and hosts that are folders of this machine.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

REPO = pathlib.Path(__file__).resolve().parents[1]
NAMES = {"PROJECT": "my-project", "ZONE": "us-west4-a", "NAME": "search-1"}
TPU = NAMES | {"ACCELERATOR": "v5litepod-16", "VERSION": "v2-alpha-tpuv5-lite"}

# The python of the hosts: makes environments, installs nothing, and trains as the plan beside the
# cloud says, with one entry for each attempt and host.
FAKE_PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec {python} "$@"; fi
if [[ $1 == -u ]]; then shift; fi
echo "$PWD: $*" >>{log}
case $2 in
  venv) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  stepsearch_jax.train) exec {python} {train} "$SLURM_PROCID" "${{@:3}}" ;;
esac
"""
FAKE_TRAIN = """
import json, pathlib, sys, time
attempts = pathlib.Path({attempts!r})
plan = json.loads((attempts / "plan.json").read_text())
number = len(list(attempts.glob(f"{{sys.argv[1]}}-*")))
(attempts / f"{{sys.argv[1]}}-{{number}}").write_text(json.dumps(sys.argv[2:]))
step = plan[min(number, len(plan) - 1)]
print(step.get("say", "training"), flush=True)
time.sleep(step.get("seconds", 0))
sys.exit(step.get("status", 0))
"""


class Cloud:
    """A repository in a folder whose name has a space, and the cloud that its scripts use."""

    def __init__(self, folder: pathlib.Path, hosts: int = 2):
        self.root, self.folder = folder / "a clone", folder / "cloud"
        self.attempts, self.log = folder / "attempts", folder / "python.log"
        # the repository
        for path in (self.root, self.folder, self.attempts, folder / "bin"):
            path.mkdir()
        no_cache = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / "launch", self.root / "launch", ignore=no_cache)
        for name in ("requirements.txt", "requirements-tpu.txt"):
            (self.root / name).write_text("numpy\n")
        (self.root / "a file").write_text("kept\n")
        (self.root / ".gitignore").write_text("runs/\n")
        author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        git = ["git", *author, "-C", str(self.root)]
        for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
            subprocess.run([*git, *words], check=True)
        self.plan(hosts=hosts)
        # the fake gcloud, and the fake python and training of the hosts
        gcloud, python = folder / "bin/gcloud", folder / "python of the hosts"
        train = folder / "train.py"
        gcloud.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -S '{REPO}/tests/fake_gcloud.py' \"$@\"\n"
        )
        train.write_text(FAKE_TRAIN.format(attempts=str(self.attempts)))
        python.write_text(
            FAKE_PYTHON.format(
                python=f"'{sys.executable}'", log=f"'{self.log}'", train=f"'{train}'"
            )
        )
        for file in (gcloud, python):
            file.chmod(0o755)
        # the environment of the scripts
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in {*TPU, "CAPACITY", "DRY_RUN", "PYTHON", "CREATE_FLAGS"}
        }
        self.environment = inherited | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_GCLOUD": str(self.folder),
            "PYTHON": str(python),
            "POLL_S": "0.01",
            "RETRY_S": "0.01",
        }

    def plan(self, **values) -> None:
        (self.folder / "plan.json").write_text(json.dumps(values))

    def set_state(self, state: str, kind: str = "tpu-vm", name: str = "search-1") -> None:
        (self.folder / f"{name}.{kind}").write_text(state)

    def set_attempts(self, *steps: dict) -> None:
        (self.attempts / "plan.json").write_text(json.dumps(steps))

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.root / script), *arguments],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment | environment,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Runs a script from another folder, without input -> (exit status, stdout, stderr)."""
        process = self.start(script, *arguments, **environment)
        out, error = process.communicate(timeout=100)
        return process.returncode, out, error

    def take_calls(self) -> list[list[str]]:
        """The words of gcloud's calls since the last time, without "compute tpus"."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        calls = [json.loads(line) for line in lines]
        return [words[2:] if words[:2] == ["compute", "tpus"] else words for words in calls]

    def changes(self) -> list[list[str]]:
        """As `take_calls`, without those that only read."""
        return [words for words in self.take_calls() if words[1] != "describe"]

    def home(self, host: int, name: str = "search-1") -> pathlib.Path:
        return self.folder / "hosts" / f"{name}-{host}"

    def started(self, host: int = 0) -> list[list[str]]:
        """Arguments of the trainings that were started on a host, in order."""
        number = lambda path: int(path.name.split("-")[1])
        files = sorted(self.attempts.glob(f"{host}-*"), key=number)
        return [json.loads(file.read_text()) for file in files]


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def preempt(cloud: Cloud) -> None:
    """The machines are gone at once: their processes, then their disks."""
    cloud.set_state("PREEMPTED")
    homes = sorted((cloud.folder / "hosts").glob("search-1-*"))
    pids = [int((home / ".stepsearch-training/pid").read_text()) for home in homes]
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, pids)))
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)  # the script may be deleting it, too


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False
