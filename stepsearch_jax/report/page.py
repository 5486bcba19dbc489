"""One self-contained page about a run: curves, before and after, transcripts, configuration.

`write_report` reads `metrics.jsonl` and, if they exist, `evaluation.json`, `transcripts.jsonl` and
`config.json` in a run's folder, and writes `report.html` there. The page needs no network: its
style and its curves (SVG) are inside. All text is escaped, above all that of documents; the
policy's tags are coloured in the policy's own text only.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
from etils import epath

from stepsearch_jax.files import read_json, write_text
from stepsearch_jax.metrics import METRICS_FILE, read_metrics
from stepsearch_jax.plugins import name_step_reward
from stepsearch_jax.report.curves import draw_curves
from stepsearch_jax.report.numbers import MEASURES, format_number, format_signed
from stepsearch_jax.report.transcripts import read_transcripts, select

REPORT_FILE = "report.html"


def _results(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The contents of the table.

    -> {"questions", "before", "after", "difference": measure -> number, or None,
    "controls": [(name, measures)]}.
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


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir`/report.html, atomically, from the run's files there and returns its path.

    `metrics.jsonl` must hold at least one line; it may be missing if there is an `evaluation.json`,
    as for a policy that was not trained here. `evaluation.json`, `transcripts.jsonl` and
    `config.json` may be missing; the page then says so. The same files give the same page.
    Raises FileNotFoundError for a missing folder or missing metrics, and ValueError, with file and
    line, for a malformed file.
    """
    # The run's files; without metrics only an evaluation makes a page.
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
    episodes = read_transcripts(transcripts) if transcripts.is_file() else []

    # What the page shows: curves, the last iteration of each stage, selected transcripts.
    charts, missing = draw_curves(rows)
    last_iterations: dict[str, int] = {}
    for row in rows:
        last_iterations[row["stage"]] = max(row["iteration"], last_iterations.get(row["stage"], 0))
    featured, further = select(episodes)
    shown = sum(len(pair.episodes) for pairs in (*featured.values(), further) for pair in pairs)

    # The template escapes everything but the charts, and fails on a name that it does not know.
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
        skipped=max((row.get("skipped", 0) for row in rows), default=0),
        results=_results(evaluation),
        measures=MEASURES,
        trained=trained,
        charts=charts,
        missing=missing,
        featured=featured,
        further=further,
        shown=shown,
        episodes=len(episodes),
        gain_name=name_step_reward(
            ((evaluation or {}).get("step_reward") or {}).get("function") or "gain"
        ),
        merged=((config or {}).get("reward") or {}).get("placement") == "merged",
        config=None if config is None else json.dumps(config, indent=2, ensure_ascii=False),
    )
    path = workdir / REPORT_FILE
    write_text(path, page)
    return path
