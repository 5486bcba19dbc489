"""Draws docs/quickstart.png, the picture of the README, from a finished run.

    python docs/draw_quickstart.py runs/quickstart docs/quickstart.png

On the left F1 and gold recall of the sampled episodes, iteration by iteration; on the right one
question of the unseen world, searched before and after RL, with the reward of every search.
"""

import argparse
import pathlib
import re
import textwrap

import numpy as np
from matplotlib.figure import Figure

from stepsearch_jax.files import read_json_lines
from stepsearch_jax.metrics import moving_average, read_metrics

INK, SOFT, LINE = "#1f2933", "#66737f", "#d9dee3"
BLUE, ORANGE, GREEN, RED = "#2563a8", "#c2661a", "#1d7d46", "#b3312c"
CURVES = (("f1", "F1", BLUE), ("gold_recall", "gold recall", ORANGE))
WIDTH = 52  # characters of a line of a transcript


def choose_question(episodes: list[dict]) -> tuple[dict, dict]:
    """The first question of three hops that was answered wrongly before and rightly after RL."""
    before, after = (
        {episode["uid"]: episode for episode in episodes if episode["when"] == when}
        for when in ("before", "after")
    )
    for uid, episode in after.items():
        searches = [turn for turn in episode["turns"] if turn["status"] == "search"]
        clean = all(not turn["redundancy"] for turn in searches)
        if len(searches) == 3 and clean and episode["em"] == 1 and before[uid]["f1"] == 0:
            return before[uid], episode
    raise SystemExit(
        "draw_quickstart: no question was answered wrongly before and rightly after RL"
    )


def list_lines(episode: dict) -> list[tuple[str, str, str, str]]:
    """(text, its colour, reward, its colour) of each line of a transcript."""
    lines = []
    for number, turn in enumerate(episode["turns"], start=1):
        action = re.sub(r"\s+", " ", re.sub("<think>.*?</think>", "", turn["action"])).strip()
        if turn["status"] == "search":
            reward = turn["step_reward"]
            shown = f"{reward:+.2f}".replace("-", "−")
            lines.append((action, BLUE, shown, GREEN if reward > 0 else RED))
            for document in turn["documents"][:1]:
                mark = "★" if document["gold"] else "↺" if document["seen"] else "·"
                text = f"{mark} {document['title']}: {document['text']}"
                text = textwrap.shorten(text, WIDTH, placeholder=" …")
                lines.append((f"   {text}", SOFT, "", INK))
        elif turn["status"] == "answer":
            right = episode["em"] == 1
            reward = f"{episode['outcome_reward']:+.2f}".replace("-", "−")
            lines.append(
                (f"{action}  {'✓' if right else '✗'}", INK, reward, GREEN if right else RED)
            )
        else:
            lines.append((f"turn {number}: no valid action", RED, "", INK))
    return lines


def draw_curves(axes, workdir: pathlib.Path) -> None:
    rows = [row for row in read_metrics(workdir) if row["stage"] == "rl"]
    iterations = [row["iteration"] for row in rows]
    for name, label, colour in CURVES:
        values = np.array([row[name] for row in rows], float)
        axes.plot(iterations, values, color=colour, alpha=0.25, linewidth=1)
        smooth = moving_average(values, 5)
        axes.plot(iterations, smooth, color=colour, linewidth=2)
        axes.annotate(label, (iterations[-1], smooth[-1]), color=colour, fontsize=9, va="center",
                      xytext=(5, 0), textcoords="offset points")  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_xlabel("iteration (64 episodes each)", color=SOFT, fontsize=9)
    axes.set_title(
        "A small model learns to search", loc="left", color=INK, fontsize=11, weight="bold"
    )
    axes.tick_params(colors=SOFT, labelsize=8)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def draw_transcripts(axes, episodes: tuple[dict, dict]) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    rows = [("title", line) for line in textwrap.wrap(episodes[0]["question"], WIDTH + 6)]
    for title, episode in zip(("Before RL", "After RL"), episodes):
        lines = [("line", line) for line in list_lines(episode)]
        rows += [("gap", ""), ("head", title), *lines]
    axes.set_ylim(len(rows), -0.5)
    for place, (kind, content) in enumerate(rows):
        if kind in ("title", "head"):
            size, colour = (11, INK) if kind == "title" else (9, SOFT)
            axes.text(0, place, content, color=colour, fontsize=size, weight="bold", va="center")
        elif kind == "line":
            text, colour, reward, reward_colour = content
            mono = dict(family="DejaVu Sans Mono", va="center")
            axes.text(0, place, text, color=colour, fontsize=8, **mono)
            axes.text(1, place, reward, color=reward_colour, fontsize=9, ha="right", weight="bold",
                      **mono)  # fmt: skip


def draw(workdir: pathlib.Path, picture: pathlib.Path) -> None:
    episodes = choose_question(read_json_lines(workdir / "transcripts.jsonl"))
    figure = Figure(figsize=(10, 4), dpi=160, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.45))
    draw_curves(left, workdir)
    draw_transcripts(right, episodes)
    figure.savefig(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("picture", type=pathlib.Path, help="file to write, .png or .svg")
    options = parser.parse_args()
    draw(options.workdir, options.picture)
