"""TensorBoard and Weights & Biases: copies of metrics.jsonl for people to look at.

A logger may fail (a full disk, no network) without stopping, blocking or changing the run: one
warning says so, and the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from stepsearch_jax.addresses import hide_logins
from stepsearch_jax.files import in_bucket, write_text

# tensorboardX loads torch where it is installed, for tensors that nobody gives it here: 3 seconds.
_hides_torch = sys.modules.setdefault("torch", None) is None  # pyright: ignore[reportArgumentType]
try:
    import tensorboardX
finally:
    if _hides_torch:
        del sys.modules["torch"]

logger = logging.getLogger("stepsearch_jax")

_TENSORBOARD_SECONDS = 10  # a kill loses at most this much of the TensorBoard curves
# Events that may wait for TensorBoard's thread. If it dies, adding to a full queue blocks for ever.
_TENSORBOARD_QUEUE = 10_000
_WANDB_SECONDS = 30  # to reach the server; then the run goes on without it
RUN_ID_FILE = "wandb-run-id"


class TensorBoard:
    """Event files under WORKDIR/tensorboard/STAGE; none in a bucket.

    One TensorBoard run per stage, so that each stage is resumed by itself.
    """

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]):
        self._workdir = workdir
        self._events: dict[str, tensorboardX.SummaryWriter] = {}

    def open_stage(self, stage: str, first_iteration: int) -> None:
        """Has TensorBoard forget points of earlier processes from this iteration on."""
        self._events[stage] = tensorboardX.SummaryWriter(
            str(self._workdir / "tensorboard" / stage),
            purge_step=first_iteration,
            max_queue=_TENSORBOARD_QUEUE,
            flush_secs=_TENSORBOARD_SECONDS,
            write_to_disk=not in_bucket(self._workdir),
            # two processes that start within one second keep their own files
            filename_suffix=f".{os.getpid()}.{first_iteration}",
        )

    def write(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        self._check_threads()
        for name, value in values.items():
            self._events[stage].add_scalar(name, value, iteration)

    def close(self) -> None:
        self._check_threads()  # closing waits for them
        for events in self._events.values():
            events.close()

    def _check_threads(self) -> None:
        """Raises OSError if a thread that writes events has died, of a full disk for example."""
        for stage, events in self._events.items():
            files = getattr(events.file_writer, "event_writer", None)
            if files is not None and not files._worker.is_alive():
                raise OSError(
                    f"the thread that writes {self._workdir / 'tensorboard' / stage} died"
                )


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
            id=path.read_text().strip(),
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
