"""TensorBoard and Weights & Biases: copies of metrics.jsonl for people to look at.

A logger may fail (a full disk, no network) without stopping, blocking or changing the run: one
warning says so, and the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pathlib
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from stepsearch_jax.addresses import hide_logins
from stepsearch_jax.files import in_bucket, write_text

# tensorboardX loads torch where it is installed, for tensors that nobody gives it here: 3 seconds.
_hides_torch = sys.modules.setdefault("torch", None) is None  # pyright: ignore[reportArgumentType]
try:
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import scalar
finally:
    if _hides_torch:
        del sys.modules["torch"]

logger = logging.getLogger("stepsearch_jax")

_EVENTS = "events.out.tfevents"  # how TensorBoard knows its files
_WANDB_SECONDS = 30  # to reach the server; then the run goes on without it
RUN_ID_FILE = "wandb-run-id"


class TensorBoard:
    """Event files under WORKDIR/tensorboard/STAGE; none in a bucket.

    One TensorBoard run per stage, so that each stage is resumed by itself. Events are written at
    once, by the caller: a kill loses none, and a full disk is noticed. tensorboardX's own writer
    has a thread, which dies of a full disk; then its queue fills up, and adding to it never ends.
    """

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]):
        self._folder = None if in_bucket(workdir) else pathlib.Path(workdir) / "tensorboard"
        self._events: dict[str, RecordWriter] = {}

    def open_stage(self, stage: str, first_iteration: int) -> None:
        """Has TensorBoard forget points of earlier processes from this iteration on."""
        if self._folder is None:
            return
        folder = self._folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files by the times in their names, and the clock may jump back.
        earlier = [int(path.name.split(".")[3]) for path in folder.glob(f"{_EVENTS}.*.*")]
        number = max([int(time.time()), *(number + 1 for number in earlier)])
        path = folder / f"{_EVENTS}.{number}.{socket.gethostname()}.{os.getpid()}"
        self._events[stage] = RecordWriter(str(path))
        begin = SessionLog(status=SessionLog.START)
        self._add(stage, Event(file_version="brain.Event:2"))
        self._add(stage, Event(step=first_iteration, session_log=begin))

    def write(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        if self._folder is None:
            return
        for name, value in values.items():
            self._add(stage, Event(step=iteration, summary=scalar(name, value)))
        self._events[stage].flush()

    def close(self) -> None:
        for events in self._events.values():
            events.close()

    def _add(self, stage: str, event: Event) -> None:
        event.wall_time = time.time()
        self._events[stage].write(event.SerializeToString())


class Wandb:
    """A run at Weights & Biases, with the settings of its own variables (WANDB_MODE, …).

    A run that is resumed continues it: its id is kept in WORKDIR.
    """

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]):
        import wandb  # an optional extra

        # Without a key, wandb would ask for one at a terminal, and wait.
        is_online = os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun")
        if is_online and not wandb.api.api_key:
            raise OSError("no API key: run `wandb login`, or set WANDB_MODE=offline")
        path = workdir / RUN_ID_FILE
        if not path.exists():
            write_text(path, uuid.uuid4().hex[:8])
        folder = pathlib.Path("wandb") if in_bucket(workdir) else pathlib.Path(workdir)
        self._run = wandb.init(
            project=config["metrics"]["wandb_project"],
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            name=workdir.name,
            dir=str(folder),
            config=hide_logins(config),
            settings=wandb.Settings(init_timeout=_WANDB_SECONDS),
        )

    def open_stage(self, stage: str, first_iteration: int) -> None:
        self._run.define_metric(f"{stage}/iteration")
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/iteration")

    def write(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        row = {f"{stage}/{name}": value for name, value in values.items()}
        self._run.log(row | {f"{stage}/iteration": iteration})

    def close(self) -> None:
        self._run.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_loggers(names: Sequence[str]) -> None:
    """Raises ValueError for a logger whose package is not installed."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "config.metrics.loggers holds wandb, which is not installed: pip install wandb"
        )


class Loggers:
    """The loggers that `config["metrics"]["loggers"]` names; each is dropped when it fails.

    config: of the run, as a dict.
    """

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]):
        self._loggers: dict[str, Any] = {}
        for name in config["metrics"]["loggers"]:
            make = lambda name=name: self._loggers.update({name: KINDS[name](workdir, config)})
            self._try(name, make)

    def open_stage(self, stage: str, first_iteration: int) -> None:
        """Called before the first `write` of a stage. first_iteration: of what follows."""
        self._call("open_stage", stage, first_iteration)

    def write(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        """values: finite numbers by name."""
        self._call("write", stage, iteration, values)

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *arguments) -> None:
        for name in list(self._loggers):
            self._try(name, lambda name=name: getattr(self._loggers[name], method)(*arguments))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._loggers.pop(name, None)
            logger.warning(
                "%s failed (%s: %s); the run goes on without it, and metrics.jsonl has everything",
                name,
                type(error).__name__,
                error,
            )
