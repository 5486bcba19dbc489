"""The results of a sweep: for every method its means over seeds with intervals.

Written as table.json and, laid out like the paper's Tables 2 and 3, as table.md.
"""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from stepsearch_jax.files import read_json, write_json, write_text
from stepsearch_jax.report.numbers import MEASURES, format_number, format_signed
from stepsearch_jax.sweeps.points import Method, Sweep
from stepsearch_jax.sweeps.running import POINTS, Times, is_finished

TABLE_FILES = ("table.md", "table.json")


def mean_interval(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """{"mean", "interval"}: the mean and half of its 95 % interval.

    The half is t_{0.975, n-1} s / sqrt(n) with Student's t; None for one value. Values that are not
    known (None) do not count. No values: None.
    """
    values = [value for value in values if value is not None]
    n = len(values)
    if not n:
        return None
    interval = None
    if n > 1:
        from scipy.special import stdtrit  # half a second, for which --help need not wait

        interval = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": statistics.fmean(values), "interval": interval}


def read_results(
    sweeps: Sequence[Sweep], workdir: pathlib.Path, config_file: str
) -> dict[str, Any]:
    """The contents of table.json.

    {"config", "wall_s": how long sweeps were at work in `workdir`, "sweeps": [{"name", "before":
    measure -> mean before RL or None, "methods": […]}]}.

    Each method: "method", "overrides", "same_as" (the method above with the same runs, or None),
    "budget" (iterations, episodes and optimiser steps of a run), measure -> `mean_interval` after
    RL, "f1_gain" (after minus before, run by run), and "runs".

    Each run: "seed", "name", "finished", "wall_s" (None if unknown), and if it is finished
    "questions" (how many, and which), "before" and "after".
    """
    times = Times(workdir).read()
    tables = []
    for sweep in sweeps:
        rows: list[dict[str, Any]] = []
        for method in sweep.methods:
            rows.append(_read_method(method, workdir, times["points"]))
            names = {point.name for point in method.points.values()}
            same = [
                above.name
                for above in sweep.methods[: len(rows) - 1]
                if {point.name for point in above.points.values()} == names
            ]
            rows[-1]["same_as"] = same[0] if same else None
        finished = [run for row in rows for run in row["runs"] if run["finished"]]
        before = {
            key: (mean_interval([run["before"][key] for run in finished]) or {}).get("mean")
            for key, _ in MEASURES
        }
        tables.append({"name": sweep.name, "before": before if finished else None, "methods": rows})
    return {"config": config_file, "wall_s": times["sweep"], "sweeps": tables}


def _read_method(
    method: Method, workdir: pathlib.Path, seconds: dict[str, float]
) -> dict[str, Any]:
    runs = []
    for seed, point in method.points.items():
        run = {
            "seed": seed,
            "name": point.name,
            "finished": is_finished(point, workdir),
            "wall_s": seconds.get(point.name),
        }
        if run["finished"]:
            evaluation = read_json(workdir / POINTS / point.name / "evaluation.json")
            split = point.config["evaluation"]["split"]
            run["questions"] = f"{evaluation['questions']} questions of {split}"
            for when in ("before", "after"):
                run[when] = {key: evaluation[when][key] for key, _ in MEASURES}
        runs.append(run)
    finished = [run for run in runs if run["finished"]]
    config = next(iter(method.points.values())).config
    iterations = config["iterations"]
    episodes = config["rollout"]["prompts"] * config["rollout"]["group_size"]
    steps = config["rl"]["minibatches"] * config["rl"]["ppo_epochs"]
    budget = {
        "iterations": iterations,
        "episodes": iterations * episodes,
        "optimiser steps": iterations * steps,
    }
    measures = {key: mean_interval([run["after"][key] for run in finished]) for key, _ in MEASURES}
    gain = mean_interval([run["after"]["f1"] - run["before"]["f1"] for run in finished])
    return {
        "method": method.name,
        "overrides": dict(method.overrides),
        "same_as": None,
        "budget": budget,
        **measures,
        "f1_gain": gain,
        "runs": runs,
    }


def format_table(results: dict[str, Any]) -> str:
    """table.md from the contents of table.json."""
    lines = [
        f"Config: `{results['config']}`. Answers are greedy. Mean over seeds ± half of its 95 % "
        "interval (Student's t); one seed has no interval."
    ]
    if results["wall_s"]:
        lines[0] += f" Wall time of the sweep: {format_duration(results['wall_s'])}."
    for table in results["sweeps"]:
        # The heading: the budget of each run, and the columns.
        rows = table["methods"]
        budget = ", ".join(
            f"{_join_values(row['budget'][key] for row in rows)} {key}" for key in rows[0]["budget"]
        )
        questions = _join_values(
            run["questions"] for row in rows for run in row["runs"] if run["finished"]
        )
        titles = ["method", "seeds", *(title for _, title in MEASURES), "F1 gain"]
        lines += [
            "",
            f"## {table['name']}",
            "",
            f"Each run: {budget}{questions and f'; measured on {questions}'}.",
            "",
            "| " + " | ".join(titles) + " |",
            "|" + "---|" * len(titles),
        ]
        # The policy before RL, then one row for each method.
        if table["before"]:
            cells = " | ".join(format_number(table["before"][key]) for key, _ in MEASURES)
            lines.append(f"| before RL | | {cells} | |")
        for row in rows:
            done, planned = sum(run["finished"] for run in row["runs"]), len(row["runs"])
            cells = [
                row["method"],
                str(done) if done == planned else f"{done} of {planned}",
                *(_format_mean(row[key]) for key, _ in MEASURES),
                _format_mean(row["f1_gain"], format_signed),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        # Methods whose runs are the same.
        shared = [f"*{row['method']}* and *{row['same_as']}*" for row in rows if row["same_as"]]
        if shared:
            lines += ["", f"Equal settings, and so the same runs: {'; '.join(shared)}."]
    return "\n".join(lines) + "\n"


def write_tables(results: dict[str, Any], workdir: pathlib.Path) -> None:
    """Writes table.json and table.md, each whole or not at all."""
    write_json(workdir / "table.json", results)
    write_text(workdir / "table.md", format_table(results))


def format_duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"; below a minute in seconds."""
    if seconds < 60:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _format_mean(value: dict[str, float | None] | None, format_one=format_number) -> str:
    if value is None:
        return "–"
    mean, interval = format_one(value["mean"]), value["interval"]
    return mean if interval is None else f"{mean} ± {format_number(interval)}"


def _join_values(values: Iterable[Any]) -> str:
    """The different values, in order of appearance."""
    different = dict.fromkeys(values)
    return " or ".join(
        f"{value:,}" if isinstance(value, int) else str(value) for value in different
    )
