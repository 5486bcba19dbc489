"""Runs a sweep on several TPUs, a point at a time on each; then one table and one figure of all.

    PROJECT=… ZONE=… ACCELERATOR=… VERSION=… python launch/sweep_pod.py \\
        --pods=search-1,search-2 --storage=gs://my-bucket/sweep \\
        --sweep=configs/sweeps/baselines.py --config=configs/atlas_sweep.py --workdir=runs/sweep \\
        [--copy=SOURCE=FOLDER …] [--config.key=value …]

Create and set up the TPUs first (launch/pod/create.sh, launch/pod/setup.sh). They belong to the
sweep: it first ends other training on them. launch/pod/train_pod.sh runs each point, and also
replaces a preempted TPU. The runs are in STORAGE/points; the files that the table needs are fetched
to WORKDIR/points. Rerun the same command to continue: finished points are skipped, unfinished ones
resumed. DRY_RUN=1 prints the points' commands.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "launch")]

# What table and figure read.
FILES = ("config.json", "run.json", "evaluation.json", "metrics.jsonl")
VARIABLES = ("PROJECT", "ZONE", "ACCELERATOR", "VERSION")
# As train_pod.sh sets it: the points' configs hold it, too.
EVERY_HOST = "--config.distributed.processes=0"
POINT = "--on-a-free-pod"


def main(arguments: Sequence[str]) -> int:
    """The command -> exit status, as launch/sweep.py's."""
    import sweep  # here, because the processes of the points need none of it

    from stepsearch_jax.run.folder import lock
    from stepsearch_jax.sweeps.points import list_points, load_sweeps
    from stepsearch_jax.sweeps.running import is_finished, make_command

    # Flags of its own; launch/sweep.py parses the others.
    parser = argparse.ArgumentParser(
        prog="python launch/sweep_pod.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Further arguments: python launch/sweep.py --help",
    )
    parser.add_argument("--pods", required=True, metavar="NAME[,NAME…]", help="the TPUs")
    parser.add_argument(
        "--storage",
        required=True,
        metavar="gs://…",
        help="the bucket's folder in which the runs are kept",
    )
    parser.add_argument(
        "--copy",
        action="append",
        default=[],
        metavar="SOURCE=FOLDER",
        help="data that a new TPU gets (launch/pod/setup.sh)",
    )
    options, rest = parser.parse_known_args(arguments)
    pods, copies = options.pods.split(","), [f"--copy={pair}" for pair in options.copy]
    # Check the flags and the environment before any TPU is touched.
    if not re.match("gs://[^/]", options.storage):
        parser.error(f"--storage={options.storage}: a folder of a bucket is needed, gs://…")
    if len(set(pods)) < len(pods) or not all(pods):
        parser.error(f"--pods={options.pods}: names are needed, each once")
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        parser.error(
            f"{missing[0]} is missing: set {', '.join(VARIABLES)} as for launch/pod/create.sh"
        )
    storage, rest = options.storage.rstrip("/"), [*rest, f"--jobs={len(pods)}", EVERY_HOST]
    swept, common = sweep.parse_arguments(rest)
    workdir = pathlib.Path(swept.workdir)

    try:
        # Print the commands instead of running them.
        if os.environ.get("DRY_RUN") == "1":
            for point in list_points(load_sweeps(swept.sweep.split(","), swept.config, common)):
                if not is_finished(point, workdir):
                    flags = make_command(copies, swept.config, point, workdir)
                    print(f"NAME={'|'.join(pods)}", shlex.join(make_train(storage, flags)))
            return 0
        # End what trains on the TPUs, unless another sweep is at work in the folder.
        if not swept.table_only:
            with lock(workdir):
                stop(pods)
    except (ValueError, OSError) as error:
        print(f"sweep_pod: {error}", file=sys.stderr)
        return 2
    # Each point runs this script again, which takes a free TPU: one point per TPU at a time.
    train = (sys.executable, __file__, POINT, options.pods, storage, *copies)
    status = sweep.main(rest, train=train)
    if status == 130:  # interrupted
        stop(pods)
    return status


def stop(pods: Sequence[str]) -> None:
    """Ends what trains on the TPUs; an unreachable one is gone, or train_pod.sh reports it.

    The trainings have time to save their state; Ctrl-C meanwhile ends them at once.
    """
    try:
        _stop(pods)
    except KeyboardInterrupt:
        _stop(pods, WAIT_S="0")


def _stop(pods: Sequence[str], **environment: str) -> None:
    command = ["bash", "launch/pod/stop.sh"]
    ending = [
        subprocess.Popen(command, env=os.environ | environment | {"NAME": pod}) for pod in pods
    ]
    for process in ending:
        process.wait()


def make_train(storage: str, flags: Sequence[str]) -> list[str]:
    """The command that runs a point.

    flags: those of the training command; the point's local folder becomes its folder in `storage`.
    """
    moved = f"--workdir={storage}/points/{pathlib.Path(find_workdir(flags)).name}"
    flags = [moved if flag.startswith("--workdir=") else flag for flag in flags]
    return ["bash", "launch/pod/train_pod.sh", *flags]


def find_workdir(flags: Sequence[str]) -> str:
    return next(flag.removeprefix("--workdir=") for flag in flags if flag.startswith("--workdir="))


def run_point(pods: Sequence[str], storage: str, flags: Sequence[str]) -> int:
    """Runs a point on a free TPU and fetches what the table needs -> exit status."""
    folder = pathlib.Path(find_workdir(flags))
    folder.mkdir(parents=True, exist_ok=True)
    pod, held = take_free(pods, folder.parent)
    print(f"on {pod}", flush=True)
    with held:
        process = subprocess.Popen(make_train(storage, flags), env=os.environ | {"NAME": pod})
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        status = process.wait()
    for name in FILES:
        if status == 0:
            source = f"{storage}/points/{folder.name}/{name}"
            command = ["gcloud", "storage", "cp", source, str(folder / name)]
            status = subprocess.run(command).returncode
    return status


def take_free(pods: Sequence[str], folder: pathlib.Path) -> tuple[str, IO]:
    """-> (the first TPU that no other point has, its lock; closing the lock frees the TPU)."""
    for pod in pods:
        file = open(folder / f".{pod}.lock", "w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return pod, file
        except BlockingIOError:
            file.close()
    raise SystemExit(f"none of {', '.join(pods)} is free")


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    if sys.argv[1:2] == [POINT]:
        sys.exit(run_point(sys.argv[2].split(","), sys.argv[3], sys.argv[4:]))
    from stepsearch_jax import cli, signals  # the processes of the points need none of it

    cli.begin_command()
    signals.raise_at_each()  # each ends the runs, too
    sys.exit(main(sys.argv[1:]))
