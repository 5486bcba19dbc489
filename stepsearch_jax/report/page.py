"""One self-contained page about a run: curves, before and after, transcripts, configuration.

`write_report` reads `metrics.jsonl` and, where they exist, `evaluation.json`, `transcripts.jsonl`
and `config.json` of a run's folder and writes `report.html` there. The page needs no network: its
style and its curves (SVG) are inside. Text that anybody else wrote, a document's above all, is only
ever shown escaped; the policy's tags are looked for in the policy's own text and nowhere else.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import matplotlib.ticker
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from stepsearch_jax.files import read_json, read_json_lines, write_text
from stepsearch_jax.metrics import METRICS_FILE, moving_average, read_metrics

REPORT_FILE = "report.html"
_SHOWN_EPISODES = 60  # transcripts on the page; the file may hold thousands
_FEATURED_QUESTIONS = 3  # unfolded questions of each kind: improved, failed, typical
# a series at least so long gets a moving average over a fifteenth of its length
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
    """A chart of the report. `names`: the metrics of `stage` that it draws; one that ends in "*"
    stands for all that begin so. `from_zero`: where the value axis starts, unless a value is
    negative.
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
        "Imitation loss",
        "sft",
        ("loss", "loss/*"),
        from_zero=True,
        explanation=(
            "The warm start: how badly the policy predicts a scripted searcher's transcripts. "
            "Should fall until it is flat."
        ),
    ),
)
MEASURES = (
    ("f1", "F1"),
    ("em", "Exact match"),
    ("gold_recall", "Gold recall"),
    ("searches", "Searches"),
)


# Curves
# ---------------------------------------------------------------------------------------------------------------------------------------------


def _series(
    rows: Iterable[Mapping[str, Any]], curve: Curve
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (iterations [n], values [n], NaN where the run recorded null), for the metrics of a
    curve that have at least one finite value.
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
    """The chart as an <svg> element; the same series give the same text. `identity` keeps its ids
    apart from other charts' on the page.
    """
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
        for (name, (x, y)), color in zip(
            series.items(), [*_SERIES] * (1 + len(series) // len(_SERIES))
        ):
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
                axes.plot(
                    x,
                    moving_average(y, max(3, len(y) // 15)),
                    color=color,
                    linewidth=2.0,
                    label=name,
                )
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


def _draw_curves(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(charts, titles of the curves for which the run recorded nothing)."""
    charts, missing = [], []
    for number, curve in enumerate(CURVES):
        series = _series(rows, curve)
        if not series:
            missing.append(curve.title)
            continue
        charts.append({"curve": curve, "svg": _draw(curve, series, f"c{number}")})
    return charts, missing


# Results
# --------------------------------------------------------------------------------------------------------------------------------------------


def _results(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the table shows: {"questions", "before", "after", "difference" (measure -> number or
    None), "controls": [(name, measures)]}.
    """
    if evaluation is None:
        return None
    before, after = evaluation.get("before"), evaluation.get("after")
    difference = None
    if before and after:
        known = [
            key for key, _ in MEASURES if before.get(key) is not None and after.get(key) is not None
        ]
        difference = {key: after[key] - before[key] for key in known}
    controls = list((evaluation.get("controls") or {}).items())
    return {
        "questions": evaluation.get("questions"),
        "before": before,
        "after": after,
        "difference": difference,
        "controls": controls,
    }


# Transcripts
# ----------------------------------------------------------------------------------------------------------------------------------------

_POLICY_TAGS = ("think", "plan", "search", "answer")
_TAG = re.compile(rf"</?({'|'.join(_POLICY_TAGS)})>")


def split_tags(action: str) -> list[tuple[str, str, bool]]:
    """The policy's text in pieces: (tag that the piece belongs to or "", text, whether it is the
    tag itself). The joined texts are `action`.
    """
    pieces, inside, at = [], "", 0
    for match in _TAG.finditer(action):
        if match.start() > at:
            pieces.append((inside, action[at : match.start()], False))
        pieces.append((match[1], match[0], True))
        inside = "" if match[0].startswith("</") else match[1]
        at = match.end()
    if at < len(action):
        pieces.append((inside, action[at:], False))
    return pieces


def _closing_warning(turn: Mapping[str, Any]) -> str:
    """The warning that the environment put behind the documents, or "". Text that stands in a
    document is never taken for one.
    """
    tail = turn["observation"].rpartition("</information>")[2].strip()
    is_warning = tail.startswith("<warning>") and tail.endswith("</warning>")
    return (
        tail
        if is_warning
        and not any(
            tail in document["text"] or tail in document["title"] for document in turn["documents"]
        )
        else ""
    )


_EPISODE_KEYS = (
    "when",
    "uid",
    "question",
    "shape",
    "answers",
    "prediction",
    "em",
    "f1",
    "finished",
    "truncated",
    "outcome_reward",
    "key_reward",
    "turns",
)
_TURN_KEYS = (
    "status",
    "action",
    "query",
    "search_ok",
    "observation",
    "documents",
    "gain",
    "redundancy",
    "step_reward",
)
_DOCUMENT_KEYS = ("id", "title", "text", "gold", "seen")


def _read_transcripts(path: pathlib.Path) -> list[dict[str, Any]]:
    """The episodes of the file; each turn also gets "pieces" (of its action, to colour) and
    "warning". ValueError for a bad one.
    """
    episodes = read_json_lines(path)
    for number, episode in enumerate(episodes, start=1):
        turns = episode.get("turns", [])
        checks = [("the episode", _EPISODE_KEYS, episode)]
        for k, turn in enumerate(turns, start=1):
            checks.append((f"turn {k}", _TURN_KEYS, turn))
            checks += [
                (f"a document of turn {k}", _DOCUMENT_KEYS, document)
                for document in turn.get("documents", [])
            ]
        for what, keys, found in checks:
            absent = [key for key in keys if key not in found]
            if absent:
                raise ValueError(
                    f"{path}, episode {number}: {what} has no {', '.join(absent)}; run the "
                    "evaluation again to write the file anew"
                )
        if episode["when"] not in ("before", "after"):
            raise ValueError(
                f'{path}, episode {number}: "when" is {episode["when"]!r}; it must be "before" or '
                '"after"'
            )
        for k, turn in enumerate(turns, start=1):
            if turn["status"] not in ("search", "invalid", "answer"):
                raise ValueError(
                    f'{path}, episode {number}, turn {k}: "status" is {turn["status"]!r}; it must '
                    'be "search", "invalid" or "answer"'
                )
            turn["pieces"] = split_tags(turn["action"].strip())
            turn["warning"] = _closing_warning(turn)
    return episodes


@dataclasses.dataclass(frozen=True)
class _Pair:
    """One question with its episodes: before RL, after it, or both, in this order."""

    episodes: tuple[dict[str, Any], ...]

    @property
    def final(self) -> dict[str, Any]:
        return self.episodes[-1]

    @property
    def change(self) -> float:
        """Rise of F1; 0 when there is nothing to compare."""
        return self.final["f1"] - self.episodes[0]["f1"]


def select(episodes: Iterable[dict[str, Any]]) -> tuple[dict[str, list[_Pair]], list[_Pair]]:
    """({"improved", "failed", "typical": pairs to show unfolded}, further pairs, to show folded);
    at most 60 episodes in all.

    Improved: the greatest rises of F1. Failed: F1 fell, or nothing of the answer is right at the
    end; the deepest falls first. Typical: at even distances among all that remain, whatever their
    result. Otherwise the order is the file's.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for episode in episodes:
        found.setdefault(episode["uid"], {}).setdefault(episode["when"], episode)
    pairs = [
        _Pair(tuple(found[uid][when] for when in ("before", "after") if when in found[uid]))
        for uid in found
    ]

    improved = sorted((pair for pair in pairs if pair.change > 0), key=lambda pair: -pair.change)[
        :_FEATURED_QUESTIONS
    ]
    wrong = [
        pair for pair in pairs if pair.change < 0 or (pair.change == 0 and pair.final["f1"] == 0)
    ]
    failed = sorted(wrong, key=lambda pair: pair.change)[:_FEATURED_QUESTIONS]
    taken = {id(pair) for pair in improved + failed}
    rest = [pair for pair in pairs if id(pair) not in taken]
    count = min(_FEATURED_QUESTIONS, len(rest))
    typical = [rest[(2 * i + 1) * len(rest) // (2 * count)] for i in range(count)]
    taken |= {id(pair) for pair in typical}

    further, shown = [], sum(len(pair.episodes) for pair in pairs if id(pair) in taken)
    for pair in pairs:
        if id(pair) not in taken and shown + len(pair.episodes) <= _SHOWN_EPISODES:
            further.append(pair)
            shown += len(pair.episodes)
    return {"improved": improved, "failed": failed, "typical": typical}, further


# The page
# -------------------------------------------------------------------------------------------------------------------------------------------


def format_number(value: float | None, digits: int = 3) -> str:
    """0.1234 -> "0.123"; None, for what was not measured -> "–"."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def format_signed(value: float | None, digits: int = 3) -> str:
    """As `format_number`, with + or −."""
    return "–" if value is None else ("+" if value >= 0 else "−") + f"{abs(value):.{digits}f}"


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir`/report.html, atomically, from the run's files there and returns its path.

    `metrics.jsonl` must hold at least one line, or be missing where there is an `evaluation.json`
    of a policy that was not trained here; `evaluation.json`, `transcripts.jsonl` and `config.json`
    may be missing, and the page says so. The same files give the same page. Raises
    FileNotFoundError for a missing folder or missing metrics, ValueError with file and line for a
    malformed file.
    """
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is not a folder: give the --workdir of a training run")
    trained = (workdir / METRICS_FILE).is_file()
    if not trained and not (workdir / "evaluation.json").is_file():
        raise FileNotFoundError(
            f"{workdir} holds no {METRICS_FILE}: give the --workdir of a training run that has "
            "finished an iteration"
        )
    rows = read_metrics(workdir) if trained else []
    if trained and not rows:
        raise ValueError(
            f"{workdir / METRICS_FILE} holds no line yet: wait until the run has finished an "
            "iteration"
        )
    config = read_json(workdir / "config.json")
    evaluation = read_json(workdir / "evaluation.json")
    transcripts = workdir / "transcripts.jsonl"
    episodes = _read_transcripts(transcripts) if transcripts.is_file() else []

    charts, missing = _draw_curves(rows)
    last_iterations: dict[str, int] = {}
    for row in rows:
        last_iterations[row["stage"]] = max(row["iteration"], last_iterations.get(row["stage"], 0))
    featured, further = select(episodes)
    shown = sum(len(pair.episodes) for pairs in (*featured.values(), further) for pair in pairs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, signed=format_signed)
    page = environment.get_template("page.html.j2").render(
        name=workdir.resolve().name,
        last_iterations=last_iterations,
        results=_results(evaluation),
        measures=MEASURES,
        trained=trained,
        charts=charts,
        missing=missing,
        featured=featured,
        further=further,
        shown=shown,
        episodes=len(episodes),
        merged=((config or {}).get("reward") or {}).get("placement") == "merged",
        config=None if config is None else json.dumps(config, indent=2, ensure_ascii=False),
    )
    path = workdir / REPORT_FILE
    write_text(path, page)
    return path
