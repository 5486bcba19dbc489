"""Metrics of a run: `metrics.jsonl` with its copies for loggers, and progress bars.

`metrics.jsonl` is what everything else reads. It has one JSON object per line, `{"stage": "rl",
"iteration": 12, "f1": 0.41, …}`. The file of a run that was killed and resumed equals that of an
uninterrupted run, except for `seconds/…`, `speed/…` and `compiled_programs`, which depend on the
process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import numpy as np
import tqdm
from etils import epath

from stepsearch_jax.files import in_bucket, naming_failures, read_json_lines, write_text
from stepsearch_jax.loggers import Loggers

METRICS_FILE = "metrics.jsonl"
_LINE_SECONDS = 30.0  # between two progress lines if stderr is not a terminal


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """All lines of `workdir`/metrics.jsonl, in order.

    A line is {"stage": str, "iteration": int, name: float or None (was NaN or infinite), …}.
    Raises FileNotFoundError if the run has no metrics.jsonl, and ValueError, with the line number,
    if a line is malformed.
    """
    path = epath.Path(workdir) / METRICS_FILE
    rows = read_json_lines(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("stage"), str) or type(row.get("iteration")) is not int:
            raise ValueError(
                f'{path}, entry {number}: "stage" (text) or "iteration" (whole number) is missing; '
                "repair or delete the line"
            )
    return rows


def moving_average(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` <= n neighbours, fewer at the ends; ignores NaN. y: [n] -> [n]."""
    kernel, finite = np.ones(window), np.isfinite(y)
    total = np.convolve(np.where(finite, y, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(float), kernel, mode="same")
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


class MetricsWriter:
    """Appends metrics to `workdir`/metrics.jsonl, and to the config's loggers.

    config: of the run, as a dict; of it, `metrics` is read (`loggers.Loggers`).
    start_iteration: the iteration at which this process starts or resumes its first stage; a
    checkpoint of s finished iterations resumes at s. Before the first line of a stage is written,
    lines of that stage that an earlier process wrote for `start_iteration` or later (or for the new
    line's iteration, if that is earlier) are dropped, and so is a line that a kill cut off. Lines
    of other stages stay. In a program of several processes, only one may write.
    """

    def __init__(self, workdir: str | os.PathLike, start_iteration: int, config: Mapping[str, Any]):
        self._workdir = epath.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._start_iteration = start_iteration
        self._stages: set[str] = set()  # that this process has written to
        self._loggers = Loggers(self._workdir, config)

    def write(self, stage: str, iteration: int, values: Mapping[str, float]) -> None:
        """Appends one line and flushes it.

        values: name -> number (a Python, NumPy or device scalar). NaN and infinite values become
        null, so that the line is valid JSON, and are kept from the loggers. Raises ValueError for a
        value that is not a number, and for a metric called "stage" or "iteration".
        """
        row: dict[str, Any] = {"stage": stage, "iteration": int(iteration)}
        for name, value in values.items():
            if name in ("stage", "iteration"):
                raise ValueError(
                    f'a metric cannot be called "{name}": every line has that key already'
                )
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f'metric "{name}" of stage "{stage}", iteration {iteration}, is not a number: '
                    f"{value!r}"
                ) from None
            row[name] = number if math.isfinite(number) else None
        if stage not in self._stages:
            self._open_stage(stage, min(self._start_iteration, row["iteration"]))
        path = self._workdir / METRICS_FILE
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        if in_bucket(path):
            write_text(path, (path.read_text(encoding="utf-8") if path.exists() else "") + line)
        else:
            with naming_failures(path), path.open("a", encoding="utf-8") as file:
                file.write(line)  # closing flushes
        finite = {name: row[name] for name in values if row[name] is not None}
        self._loggers.write(stage, row["iteration"], finite)

    def _open_stage(self, stage: str, first_iteration: int) -> None:
        path = self._workdir / METRICS_FILE
        if path.exists():
            kept = [
                row
                for row in read_metrics(self._workdir)
                if row["stage"] != stage or row["iteration"] < first_iteration
            ]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        self._stages.add(stage)
        self._loggers.open_stage(stage, first_iteration)

    def close(self) -> None:
        """Closes the loggers; `metrics.jsonl` needs no closing."""
        self._loggers.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _Lines:
    """A text stream for tqdm that turns its redrawn bar into plain lines, for log files."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            with contextlib.suppress(OSError):  # a full disk, or a pipe that nobody reads
                self._stream.write(line + "\n")

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _Bar(tqdm.tqdm):
    def set_postfix(self, ordered_dict=None, refresh: bool | None = False, **values):
        """Like tqdm's, but waits for the next regular drawing: a log gets no line at every call."""
        super().set_postfix(ordered_dict, refresh=refresh, **values)


def progress(work: Iterable | int, description: str) -> tqdm.tqdm:
    """A progress bar on stderr with the time left.

    Iterate over it or, if `work` is a number of units, call its `update(n)`.
    `bar.set_postfix(f1=0.41)` shows named metrics after the bar. If stderr is not a terminal, plain
    lines about 30 s apart replace the bar.
    """
    description = description.removesuffix(":")  # tqdm adds its own
    iterable, total = (None, work) if isinstance(work, int) else (work, None)
    if sys.stderr.isatty():
        return _Bar(iterable, total=total, desc=description, dynamic_ncols=True)
    return _Bar(
        iterable,
        total=total,
        desc=description,
        file=_Lines(sys.stderr),
        mininterval=_LINE_SECONDS,
        maxinterval=_LINE_SECONDS,
        miniters=1,
    )
