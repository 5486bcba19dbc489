"""The figure of the case "turns": what another turn costs, ours and the peer's."""

from __future__ import annotations

import pathlib

from matplotlib.figure import Figure

from stepsearch_jax.files import replacing

OURS, PEER, SOFT = "#0072B2", "#D55E00", "#666666"


def draw_turns(figures: dict) -> Figure:
    """Seconds and prefilled tokens against the number of turns. figures: --json with case "turns".

    Prefilled: run through the model without being sampled. A loop that calls a sampler once a turn
    reads everything so far again; its tokens are counted from the sizes of the case.
    """
    parts = figures["cases"]["turns"]["parts"]
    turns = [part["size"]["turns"] for part in parts]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    seconds, tokens = figure.subplots(1, 2)
    column = lambda name: [part[name] for part in parts]
    lines = {"this package": (OURS, "o", column("ours_s"), column("prefilled_tokens"))}
    if parts[0]["peer_s"] is not None:
        read = [count_read_again(part["size"]) for part in parts]
        lines[figures["peer"]] = (PEER, "s", column("peer_s"), read)
    for label, (color, marker, spent, read) in lines.items():
        seconds.plot(turns, spent, color=color, marker=marker, label=label)
        thousands = [count / 1000 for count in read]
        tokens.plot(turns, thousands, color=color, marker=marker, label=label)
    for axes, title in ((seconds, "seconds"), (tokens, "thousand tokens prefilled")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("turns", color=SOFT)
        axes.set_xticks(turns)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    seconds.legend(frameon=False)
    return figure


def count_read_again(size: dict) -> int:
    """Tokens that a sampler called once a turn reads, of all episodes.

    Before turn n: the prompt, and n turns with their observations.
    """
    turn = size["turn_tokens"][0] + size["observation"]
    return size["episodes"] * sum(size["prompt"] + number * turn for number in range(size["turns"]))


def check_ending(path: pathlib.Path) -> None:
    """Raises ValueError if a figure cannot be written in the form that the name's ending says."""
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--figure={path}: its ending must be one of {', '.join(sorted(known))}")


def write_figure(figure: Figure, path: pathlib.Path) -> None:
    """Writes it whole or not at all, in the form that the name's ending says."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix.removeprefix(".").lower())
