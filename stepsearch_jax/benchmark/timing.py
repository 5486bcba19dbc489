"""One timed call, and medians over runs of several sides that take turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable


def time_call(function, *arguments, **keywords):
    """-> (seconds, result); as in timeit, the garbage collector waits."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        result = function(*arguments, **keywords)
        return time.perf_counter() - start, result
    finally:
        gc.enable()


def alternate(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, dict]:
    """Runs the sides in turn -> for each side "runs_s" and their "median_s".

    `repeats` rounds count, after a first one that compiles. sides: name -> one run, which returns
    its seconds. Taking turns, all sides meet the machine's other load alike.
    """
    runs = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, run in sides.items():
            runs[name].append(run())
    return {
        name: {"runs_s": found[1:], "median_s": statistics.median(found[1:])}
        for name, found in runs.items()
    }
