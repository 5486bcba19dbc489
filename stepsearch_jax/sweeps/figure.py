"""The figure of a sweep, one row of panels per table: F1 during training, and F1 after it."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepsearch_jax.files import replacing
from stepsearch_jax.metrics import moving_average, read_metrics
from stepsearch_jax.sweeps.results import mean_interval
from stepsearch_jax.sweeps.running import POINTS

FIGURE_FILES = ("figure.png", "figure.svg")
# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_REFERENCE, _INK, _SOFT, _LINES = "#9a9a9a", "#222222", "#666666", "#dddddd"
_STYLE = {
    "font.size": 9,
    "axes.edgecolor": _LINES,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "axes.unicode_minus": True,
}
_SMOOTHING = 5  # iterations in the moving average of each run's curve
_COLUMNS = 4  # of small panels, if there are more methods than colours
_NAME_GAP = 0.065  # between two names at the ends of curves, in heights of the panel


def draw_figure(results: dict[str, Any], workdir: pathlib.Path) -> Figure | None:
    """The figure of the contents of table.json; None while no run is finished.

    Curves come from the finished runs' metrics.jsonl. Left: F1 of the sampled training episodes
    over iterations, as the mean over seeds of moving averages with its 95 % interval as a band. All
    methods share one panel; if there are more methods than colours, each has its own, in front of
    the table's first method in grey. Right: greedy F1 after RL, with mean, interval, every seed as
    a ring, and F1 before RL as a broken line. Methods that share their runs are drawn once, under
    both names.
    """
    tables = [(table, _list_methods(table, workdir)) for table in results["sweeps"]]
    tables = [(table, methods) for table, methods in tables if methods]
    if not tables:
        return None
    heights = [
        _panel_rows(methods) * 1.6 + 0.9 if _is_crowded(methods) else 3.6 for _, methods in tables
    ]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.5, sum(heights)), layout="constrained")
        parts = np.atleast_1d(figure.subfigures(len(tables), 1, height_ratios=heights))
        for part, (table, methods) in zip(parts, tables):
            part.suptitle(table["name"], x=0.01, ha="left", fontweight="bold")
            left, right = part.subfigures(1, 2, width_ratios=(3, 2))
            (_draw_small_panels if _is_crowded(methods) else _draw_one_panel)(left, methods)
            _draw_final(right.subplots(), methods, table["before"]["f1"])
    return figure


def write_figure(figure: Figure, workdir: pathlib.Path) -> None:
    """Writes figure.png and figure.svg, each whole or not at all.

    The same figure gives the same files.
    """
    for name in FIGURE_FILES:
        kind = name.rpartition(".")[2]
        metadata = {"Date": None} if kind == "svg" else None
        with (
            replacing(workdir / name) as temporary,
            matplotlib.rc_context({"svg.hashsalt": "sweep", "svg.fonttype": "none"}),
        ):
            figure.savefig(temporary, dpi=160, metadata=metadata, format=kind)


def _list_methods(table: dict[str, Any], workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What to draw of the methods with a finished run.

    Each: label, color, f1 (mean and interval), seeds (F1 after RL), and curve = (iterations, mean,
    half of the interval).
    """
    methods: dict[str, dict[str, Any]] = {}
    for row in table["methods"]:
        finished = [run for run in row["runs"] if run["finished"]]
        if row["same_as"] in methods:
            methods[row["same_as"]]["label"] += f" = {row['method']}"
        elif finished:
            curves = [_read_curve(workdir / POINTS / run["name"]) for run in finished]
            methods[row["method"]] = {
                "label": row["method"],
                "f1": row["f1"],
                "seeds": [run["after"]["f1"] for run in finished],
                "curve": _average(curves),
            }
    for n, method in enumerate(methods.values()):
        method["color"] = _COLORS[n % len(_COLORS)] if len(methods) <= len(_COLORS) else _COLORS[0]
    return list(methods.values())


def _read_curve(folder: pathlib.Path) -> dict[int, float]:
    """Iteration (from 1) -> F1 of its training episodes, smoothed."""
    rows = [row for row in read_metrics(folder) if row["stage"] == "rl" and "f1" in row]
    y = np.array([row["f1"] for row in rows], dtype=float)
    smooth = moving_average(y, _SMOOTHING) if len(y) >= _SMOOTHING else y
    return dict(zip((row["iteration"] + 1 for row in rows), smooth))


def _average(curves: list[dict[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Iterations, mean and half of the interval [n] of several curves, at their common points.

    No interval is 0.
    """
    x = sorted(set.intersection(*(set(curve) for curve in curves)))
    means = [mean_interval([curve[iteration] for curve in curves]) for iteration in x]
    return (
        np.array(x),
        np.array([mean["mean"] for mean in means]),
        np.array([mean["interval"] or 0.0 for mean in means]),
    )


def _is_crowded(methods: list[dict[str, Any]]) -> bool:
    return len(methods) > len(_COLORS)


def _panel_rows(methods: list[dict[str, Any]]) -> int:
    return -(-len(methods) // _COLUMNS)


def _draw_curve(axes: Axes, method: dict[str, Any], color: str) -> None:
    x, y, half = method["curve"]
    axes.fill_between(x, y - half, y + half, color=color, alpha=0.15, linewidth=0)
    axes.plot(x, y, color=color, linewidth=1.8)


def _finish(axes: Axes, methods: list[dict[str, Any]]) -> None:
    """The scale that all curves of a table share, and a plain look."""
    curves = [method["curve"] for method in methods]
    top = max(float(np.max(np.append(y + half, 0.0))) for _, y, half in curves)
    axes.set_ylim(0, min(1.0, top * 1.08) or 1.0)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    _plain(axes, "y")


def _plain(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color=_LINES, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_one_panel(part, methods: list[dict[str, Any]]) -> None:
    axes = part.subplots()
    for method in methods:
        _draw_curve(axes, method, method["color"])
    _finish(axes, methods)
    axes.set_title("F1 of training episodes, by iteration", loc="left", fontsize=9, color=_SOFT)
    bottom, top = axes.get_ylim()
    drawn = [method for method in methods if len(method["curve"][0])]
    places = _spread([(method["curve"][1][-1] - bottom) / (top - bottom) for method in drawn])
    for method, place in zip(drawn, places):
        axes.annotate(
            method["label"],
            (1.01, place),
            xycoords="axes fraction",
            color=method["color"],
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def _draw_small_panels(part, methods: list[dict[str, Any]]) -> None:
    grid = part.subplots(_panel_rows(methods), _COLUMNS, sharex=True, sharey=True, squeeze=False)
    part.supxlabel("F1 of training episodes, by iteration", fontsize=9, color=_SOFT)
    for axes in grid.flat[len(methods) :]:
        axes.set_visible(False)
    for axes, method in zip(grid.flat, methods):
        axes.plot(*methods[0]["curve"][:2], color=_REFERENCE, linewidth=1.2)
        _draw_curve(axes, method, _REFERENCE if method is methods[0] else method["color"])
        _finish(axes, methods)
        axes.set_title(
            method["label"].replace(" = ", "\n= "),
            loc="left",
            fontsize=8,
            color=_SOFT if method is methods[0] else method["color"],
        )


def _draw_final(axes: Axes, methods: list[dict[str, Any]], before: float) -> None:
    # F1 before RL, as a broken line.
    axes.axvline(before, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "before RL",
        (before, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, -2),
        textcoords="offset points",
        color=_SOFT,
        va="top",
        fontsize=8,
    )
    # One line per method: its interval, its seeds as rings below, and its mean with the number.
    ends = [before]
    for n, method in enumerate(methods):
        mean, half, color = method["f1"]["mean"], method["f1"]["interval"], method["color"]
        if half is not None:
            span = [mean - half, mean + half]
            axes.plot(span, [n, n], color=color, linewidth=2, solid_capstyle="round")
        if len(method["seeds"]) > 1:
            axes.plot(
                method["seeds"],
                [n + 0.2] * len(method["seeds"]),
                "o",
                markersize=4,
                markerfacecolor="none",
                markeredgecolor=color,
            )
        axes.plot(mean, n, "o", color=color, markersize=7)
        axes.annotate(
            f"{mean:.3f}",
            (mean, n),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=color,
            fontsize=8,
        )
        ends += [*method["seeds"], mean - (half or 0.0), mean + (half or 0.0)]
    # The methods' names, and a scale that shows everything with a margin, within 0 to 1.
    labels = [method["label"].replace(" = ", "\n= ") for method in methods]
    axes.set_yticks(range(len(methods)), labels, color=_INK)
    axes.set_ylim(len(methods) - 0.5, -1.0)
    axes.set_xlim(max(min(ends) - 0.03, 0.0), min(max(ends) + 0.03, 1.0))
    axes.set_title("F1 after RL, greedy", loc="left", fontsize=9, color=_SOFT)
    _plain(axes, "x")


def _spread(places: list[float]) -> list[float]:
    """Heights near `places`, in the same order, at least a name's height apart.

    They stay below the panel's top if there is room.
    """
    order = np.argsort(places)
    spread = np.array(places, dtype=float)[order]
    for n in range(1, len(spread)):
        spread[n] = max(spread[n], spread[n - 1] + _NAME_GAP)
    spread[-1:] = np.minimum(spread[-1:], 1.0)
    for n in range(len(spread) - 2, -1, -1):
        spread[n] = min(spread[n], spread[n + 1] - _NAME_GAP)
    result = np.empty(len(spread))
    result[order] = spread
    return result.tolist()
