"""The curves of the report: which metrics it draws, and each chart as SVG."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from stepsearch_jax.metrics import moving_average

# A series of at least this length gets a moving average over a fifteenth of its length.
_SMOOTHED_POINTS = 30

# Colours are drawn as these stand-ins and then replaced by CSS variables, so that the curves follow
# the page into dark mode.
_SERIES = {
    "#0a0001": "var(--series-1)",
    "#0a0002": "var(--series-2)",
    "#0a0003": "var(--series-3)",
    "#0a0004": "var(--series-4)",
}
_INK, _GRID = "#0a0005", "#0a0006"
_VARIABLES = {**_SERIES, _INK: "var(--soft)", _GRID: "var(--line)"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A chart of the report.

    names: the metrics of `stage` that it draws; a name that ends in "*" is a prefix.
    from_zero: the value axis starts at 0, unless a value is negative.
    """

    title: str
    stage: str
    names: tuple[str, ...]
    from_zero: bool
    explanation: str


CURVES = (
    Curve(
        "F1",
        "rl",
        ("f1",),
        from_zero=True,
        explanation=(
            "How many words of the right answer the policy's answers share, from 0 to 1. These "
            "answers are sampled, with some luck in them; the table of results is without "
            "sampling. Should rise."
        ),
    ),
    Curve(
        "Step reward",
        "rl",
        ("step_reward",),
        from_zero=False,
        explanation=(
            "What the searches of an episode earned: how much each brought closer to the needed "
            "documents, minus a penalty for documents already seen. Should rise."
        ),
    ),
    Curve(
        "Outcome reward",
        "rl",
        ("outcome_reward",),
        from_zero=False,
        explanation=(
            "What the end of an episode earned: the answer's F1 if its form is right, plus credit "
            "for queries that name the right things. Should rise."
        ),
    ),
    Curve(
        "Gold-document recall",
        "rl",
        ("gold_recall",),
        from_zero=True,
        explanation=(
            "Of the documents needed to answer, the share that the policy's searches found. "
            "Should rise."
        ),
    ),
    Curve(
        "Searches per question",
        "rl",
        ("searches",),
        from_zero=True,
        explanation=(
            "How often the policy searches before it answers. Should settle near the number of "
            "facts that a question needs; a fall to zero means that it guesses."
        ),
    ),
    Curve(
        "KL divergence",
        "rl",
        ("kl",),
        from_zero=False,
        explanation=(
            "How far the policy has moved from the one it started as, per token. Should grow "
            "slowly; a jump means that training is coming apart."
        ),
    ),
    Curve(
        "Entropy",
        "rl",
        ("entropy",),
        from_zero=True,
        explanation=(
            "How undecided the policy is about its next token. Should fall gently; near zero it "
            "tries nothing new."
        ),
    ),
    Curve(
        "Fine-tuning loss",
        "sft",
        ("loss", "loss/*"),
        from_zero=True,
        explanation=(
            "The warm start: how badly the policy predicts a scripted searcher's transcripts. "
            "Should fall until it is flat."
        ),
    ),
)


def _series(
    rows: Iterable[Mapping[str, Any]], curve: Curve
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (iterations [n], values [n]), for a curve's metrics that have a finite value.

    Values are NaN where the run recorded null.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["stage"] != curve.stage:
            continue
        for name, value in row.items():
            if name in curve.names or any(
                pattern.endswith("*") and name.startswith(pattern[:-1]) for pattern in curve.names
            ):
                points.setdefault(name, []).append(
                    (row["iteration"], math.nan if value is None else float(value))
                )
    arrays = {name: np.asarray(pairs, dtype=float).T for name, pairs in points.items()}
    return {name: (x, y) for name, (x, y) in arrays.items() if np.isfinite(y).any()}


def _draw(curve: Curve, series: Mapping[str, tuple[np.ndarray, np.ndarray]], identity: str) -> str:
    """The chart as an <svg> element; the same series give the same text.

    identity: a prefix of its ids, which must differ from those of other charts on the page.
    """
    # The hash salt makes matplotlib's ids the same each time; text stays text.
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": identity,
        "font.size": 10,
        "path.simplify": True,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.4, 2.5))
        axes = figure.add_axes((0.09, 0.15, 0.89, 0.81))
        colors = [*_SERIES] * (1 + len(series) // len(_SERIES))

        # A long series is drawn faintly, with its moving average on top; lone points get a marker.
        for (name, (x, y)), color in zip(series.items(), colors):
            smooth = len(y) >= _SMOOTHED_POINTS
            lone = np.count_nonzero(np.isfinite(y)) < 3
            axes.plot(
                x,
                y,
                color=color,
                linewidth=1.0 if smooth else 1.8,
                alpha=0.35 if smooth else 1.0,
                marker="o" if lone else None,
                markersize=4,
                label=None if smooth else name,
            )
            if smooth:
                average = moving_average(y, max(3, len(y) // 15))
                axes.plot(x, average, color=color, linewidth=2.0, label=name)

        # Legend, axes and grid.
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=_INK, fontsize=10)
        axes.set_xlabel("iteration", color=_INK, fontsize=10, loc="right", labelpad=1)
        if curve.from_zero and min(np.nanmin(y) for _, y in series.values()) >= 0:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.tick_params(length=0, colors=_INK, labelsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)

    # For the page: no metadata, namespaces or fonts; its own ids; the page's colours; a label.
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| font-family: [^;"]*;?|font-family: [^;"]*;?', "", svg)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{identity}-", svg)
    svg = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], svg)
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 role="img" aria-label="{curve.title}">',
        svg,
        count=1,
    )


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(charts, titles of the curves for which the run recorded nothing)."""
    charts, missing = [], []
    for number, curve in enumerate(CURVES):
        series = _series(rows, curve)
        if not series:
            missing.append(curve.title)
            continue
        charts.append({"curve": curve, "svg": _draw(curve, series, f"c{number}")})
    return charts, missing
