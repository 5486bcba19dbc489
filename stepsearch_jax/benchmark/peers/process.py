"""A peer in a process of its own, perhaps of another interpreter: the two ends of its pipe.

The benchmark (`Peer`) writes a job into a folder, starts
`python -m stepsearch_jax.benchmark.peers.NAME FOLDER` and asks it for one run at a time. The peer's
process (`serve`) prepares, answers with the arrays that the benchmark compares before it times
anything, and then with the seconds of each run. Between runs it sleeps. This file imports nothing
beyond NumPy: it must load in the peer's environment.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable

import numpy as np

from stepsearch_jax.benchmark.timing import time_call

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
INSTALL = (
    "pip install -r requirements-bench.txt (which says when a peer needs an environment of its "
    "own; --peer-python names its interpreter)"
)


class Peer:
    """A peer's process, ready to run. A context manager: the process ends with it.

    name: of its module in this package; python: its interpreter; job: sizes and numbers, as JSON
    has them; arrays: weights and inputs by name.
    Raises ImportError if its packages are missing, ChildProcessError if it fails, FileNotFoundError
    without that interpreter.
    """

    def __init__(self, name: str, python: str, job: dict, arrays: dict[str, np.ndarray]):
        # The job's files.
        self._name = name
        self._folder = tempfile.TemporaryDirectory(prefix="stepsearch-peer-")
        folder = pathlib.Path(self._folder.name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        np.savez(folder / "arrays.npz", **arrays)
        self._log = folder / "log.txt"
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

        # The process, and its first answer.
        command = [python, "-m", f"stepsearch_jax.benchmark.peers.{name}", str(folder)]
        try:
            with self._log.open("w", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        except OSError as error:
            self._folder.cleanup()
            raise FileNotFoundError(
                f"--peer-python={python} cannot be started: {error.strerror}"
            ) from error
        try:
            self.versions = self._answer()["versions"]
            with np.load(folder / "checks.npz") as checks:
                self.checks = dict(checks)
        except BaseException:
            self.__exit__()
            raise

    def run(self, what: str) -> float:
        """One run of `what` -> its seconds, as the peer's own process measured them."""
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            silent = (
                f"it ended without a word; --peer-python={self._process.args[0]} must be a Python "
                "interpreter"
            )
            last = (self._log.read_text(encoding="utf-8").strip().splitlines() or [silent])[-1]
            answer = {"missing" if last.startswith("ModuleNotFoundError") else "failed": last}
        else:
            answer = json.loads(line)
        if "missing" in answer:
            raise ImportError(
                f"the peer {self._name} needs packages that are not installed "
                f"({answer['missing']}): {INSTALL}"
            )
        if "failed" in answer:
            raise ChildProcessError(f"the peer {self._name} failed: {answer['failed']}")
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


def serve(
    make: Callable[
        [dict, dict[str, np.ndarray]],
        tuple[dict, dict[str, np.ndarray], dict[str, Callable[[], object]]],
    ],
) -> None:
    """The peer's end. Its printed output goes to the log.

    make(job, arrays) -> (versions of its packages, arrays to compare, runs by name).
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**answer) -> None:
        print(json.dumps(answer), file=replies, flush=True)

    folder = pathlib.Path(sys.argv[1])
    try:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        with np.load(folder / "arrays.npz") as arrays:
            versions, checks, runs = make(job, dict(arrays))
        np.savez(folder / "checks.npz", **checks)
        reply(versions=versions)
        for what in sys.stdin:
            reply(seconds=time_call(runs[what.strip()])[0])
    except ImportError as error:
        reply(missing=str(error))
    except Exception as error:
        traceback.print_exc()
        reply(failed=f"{type(error).__name__}: {error}")
