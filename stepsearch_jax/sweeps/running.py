"""Runs the unfinished points of a sweep as processes of the training command, some at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from stepsearch_jax.files import CONFIG_FILE, read_json, write_json
from stepsearch_jax.metrics import progress
from stepsearch_jax.run.folder import check_format, describe_difference, lock
from stepsearch_jax.sweeps.points import Point

# WORKDIR/points/NAME is the folder of a run, WORKDIR/points/NAME.log its output.
POINTS = "points"
TIMES_FILE = "times.json"
# A process that is to end at once is killed after this time; its checkpoints are always whole.
_GRACE_SECONDS = 10.0
_PATIENCE_SECONDS = 2.0  # before a line says what is waited for
_POLL_SECONDS = 0.2


def is_finished(point: Point, workdir: pathlib.Path) -> bool:
    """Whether the point's run is complete: training has written its evaluation.json.

    Nothing else writes it. Raises ValueError if the folder holds a run of another config or another
    format, or something unreadable.
    """
    folder = workdir / POINTS / point.name
    config = read_json(folder / CONFIG_FILE)
    if config is not None:
        check_format(folder)
    if config is not None and config != point.config:
        raise ValueError(
            f"{folder} holds a run with another config "
            f"({describe_difference(config, point.config)}): "
            f"remove {folder} to run it again, or choose another --workdir"
        )
    return config is not None and read_json(folder / "evaluation.json") is not None


def make_command(
    train: Sequence[str], config_file: str, point: Point, workdir: pathlib.Path
) -> list[str]:
    """The arguments of the process that runs, or resumes, a point.

    train: the training command, without flags.
    """
    folder = workdir / POINTS / point.name
    return [*train, f"--config={config_file}", f"--workdir={folder}", *point.flags]


@dataclasses.dataclass
class _Run:
    point: Point
    process: subprocess.Popen
    log: pathlib.Path
    started: float


def run_points(
    points: Sequence[Point],
    workdir: pathlib.Path,
    *,
    train: Sequence[str],
    config_file: str,
    jobs: int,
) -> dict[str, str]:
    """Runs the points, `jobs` at a time.

    Returns {name of a failed point: its exit status and the last line of its log}. Adds the times
    to WORKDIR/times.json. If the platform can pin processes, several jobs share the cores evenly.
    When this function ends, also by Ctrl-C, it ends the processes that it started, which save their
    state first; the next sweep resumes unfinished runs. Raises ValueError when another sweep is at
    work in `workdir`.
    """
    waiting, running, failed = list(points), {}, {}
    shares = _share_cores(jobs)
    times = Times(workdir)
    with lock(workdir) as held, progress(len(points), "sweep") as bar:
        try:
            while waiting or running:
                # Start a point in every free slot.
                free = [slot for slot in range(jobs) if slot not in running]
                for slot in free[: len(waiting)]:
                    point = waiting.pop(0)
                    command = make_command(train, config_file, point, workdir)
                    running[slot] = _start(point, workdir, command, shares[slot], held)
                time.sleep(_POLL_SECONDS)
                # Take the ended ones out, with their times and failures.
                for slot, run in list(running.items()):
                    if run.process.poll() is None:
                        continue
                    del running[slot]
                    times.add(run.point.name, time.monotonic() - run.started)
                    if reason := _find_failure(run, workdir):
                        failed[run.point.name] = reason
                    left = len(waiting) + len(running)
                    finished = len(points) - left - len(failed)
                    bar.set_postfix(dict(finished=finished, failed=len(failed), left=left))
                    bar.update(1)
        finally:  # also after Ctrl-C: no process outlives the sweep
            _end([run.process for run in running.values()])
            for run in running.values():
                times.add(run.point.name, time.monotonic() - run.started)
    return failed


class Times:
    """WORKDIR/times.json, in seconds.

    `sweep`: how long sweeps were at work here; `points`: how long each run took, over all attempts.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path, self._last = workdir / TIMES_FILE, time.monotonic()

    def read(self) -> dict:
        return read_json(self._path) or {"sweep": 0.0, "points": {}}

    def add(self, name: str, seconds: float) -> None:
        """Adds the time of a run, and to the sweep's the time since the last call."""
        times, now = self.read(), time.monotonic()
        times["points"][name] = round(times["points"].get(name, 0.0) + seconds, 1)
        times["sweep"], self._last = round(times["sweep"] + now - self._last, 1), now
        write_json(self._path, times)


def _share_cores(jobs: int) -> list[set[int] | None]:
    """The cores of each job; None: not pinned."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[job::jobs]) if 1 < jobs <= len(cores) else None for job in range(jobs)]


def _start(
    point: Point, workdir: pathlib.Path, command: list[str], cores: set[int] | None, held: int
) -> _Run:
    log = workdir / POINTS / f"{point.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        # A session of its own: Ctrl-C reaches only this process, which then ends the others.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(held,),
        )
    if cores:
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            os.sched_setaffinity(process.pid, cores)
    return _Run(point, process, log, time.monotonic())


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Has the processes save their state and end; Ctrl-C meanwhile ends them at once."""
    for process in processes:
        process.terminate()
    try:
        if not _wait(processes, _PATIENCE_SECONDS):
            print(
                "sweep: waiting until the runs have saved their state; Ctrl-C ends them at once",
                file=sys.stderr,
                flush=True,
            )
            _wait(processes, math.inf)
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        _wait(processes, _GRACE_SECONDS)
        raise
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen], seconds: float) -> bool:
    """Waits until all have ended, or for so long -> whether they have."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return all(process.poll() is not None for process in processes)


def _find_failure(run: _Run, workdir: pathlib.Path) -> str | None:
    """Why an ended run is not finished, None if it is."""
    try:
        if run.process.returncode == 0 and is_finished(run.point, workdir):
            return None
    except ValueError as error:
        return str(error)
    lines = run.log.read_text(errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    return f"exit status {run.process.returncode}: {lines[-1] if lines else 'its log is empty'}"
