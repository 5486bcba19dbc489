"""The figures of preflight as text, and those of several slices as one Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepsearch_jax.preflight.chips import GIB

TITLES = {
    "policy": "policy parameters",
    "policy_optimizer": "policy optimiser state",
    "value": "value parameters",
    "value_optimizer": "value optimiser state",
    "reference": "reference parameters",
    "rollout_copy": "rollout copy of the policy",
    "environment": "environment (tag automaton)",
    "cache": "KV cache, of the rollout's temporaries",
}
PHASE_TITLES = {
    "copy": "copy for the rollout",
    "rollout": "rollout",
    "score": "three scoring passes",
    "update": "update",
}


def render(figures: dict) -> str:
    """The figures of `preflight.measure` as text."""
    model, hbm = figures["model"], f"{figures['hbm'] / GIB:.2f}"
    phases = figures["phases"]
    compiled = {name: phase for name, phase in phases.items() if not phase["refused"]}

    # Memory: what stays on a chip, then what each program adds.
    lines = [
        f"{model['parameters'] / 1e9:.2f}B parameters on {figures['chips']} chips of "
        f"{figures['topology']}, mesh data x fsdp x tensor = {_mesh(figures)}",
        "",
        "GiB on each chip",
    ]
    lines += [f"  {TITLES[name]:<42}{size / GIB:8.3f}" for name, size in figures["parts"].items()]
    lines += [
        "",
        f"  {'while it runs':<24}{'resident':>10}{'temporary':>11}{'results':>9}{'code':>7}"
        f"{'total':>8}   of {hbm}",
    ]
    for name, phase in phases.items():
        need = phase["need"]
        resident = need["kept"] + need["rows"]
        sizes = (resident, need["temporaries"], need["fresh"], need["code"], need["total"])
        cells = "".join(f"{size / GIB:{w}.3f}" for size, w in zip(sizes, (10, 11, 9, 7, 8)))
        refused = "   refused by the compiler" if phase["refused"] else ""
        lines.append(f"  {PHASE_TITLES[name]:<24}{cells}{refused}")

    # Time.
    lines += [
        "",
        f"One iteration: {figures['episodes']} episodes; {figures['assumption']}.",
        f"  Learner: rows of {figures['tokens']['update'] / figures['episodes']:,.0f} tokens on "
        "average, padding included. Seconds at the chip's peak rates, and by the compiler's own "
        "cost model; host time (search, rewards, data) is in neither.",
        f"  {'on each chip':<24}{'TFLOP':>10}{'of model':>10}{'TB of HBM':>11}{'GB sent':>9}"
        f"{'launches':>11}{'at peak':>9}{'cost model':>12}  bound by",
    ]
    for name, phase in compiled.items():
        ratio = f"{phase['model_ratio']:.2f}" if phase["model_ratio"] else "-"
        sent = sum(collective["bytes"] for collective in phase["collectives"].values())
        lines.append(
            f"  {PHASE_TITLES[name]:<24}{phase['flops'] / 1e12:10.1f}{ratio:>10}"
            f"{phase['bytes'] / 1e12:11.3f}{sent / 1e9:9.1f}{phase['launches']:11,.0f}"
            f"{phase['seconds']:9.2f}{_number(phase['modelled_seconds'], 12)}  {phase['bound']}"
        )
    if figures["iteration_seconds"] is not None:
        lines.append(
            f"  {'iteration':<75}{figures['iteration_seconds']:9.2f}"
            f"{_number(figures['iteration_modelled_seconds'], 12)}"
        )
    lines.append(
        f"  of model: matrix products counted in the program / {model['rule']}; attention, which "
        "that leaves out, makes it larger than 1"
    )
    if step := phases["rollout"].get("step"):
        lines.append(
            f"  a decode step: {1e3 * step['seconds']:.2f} ms at peak, "
            f"{_number(step['modelled_seconds'], 0, 1e3)} ms by the cost model, "
            f"{step['bytes'] / 1e9:.2f} GB of HBM, {step['launches']:,.0f} launches; "
            f"{figures['lengths']['steps']:,.0f} steps"
        )

    lines += ["", "Collectives of one chip (runs, GB sent)"]
    for name, phase in compiled.items():
        shown = ", ".join(
            f"{kind} {collective['count']:,.0f} ({collective['bytes'] / 1e9:.2f})"
            for kind, collective in phase["collectives"].items()
        )
        lines.append(f"  {PHASE_TITLES[name]:<24}{shown or 'none'}")

    # Verdict.
    worst = figures["worst"]
    lines += [
        "",
        f"{'fits' if figures['fits'] else 'does not fit'}: the {PHASE_TITLES[worst]} needs most, "
        f"{_gib(figures, worst)} of {hbm} GiB a chip",
    ]
    if (seconds := figures["iteration_seconds"]) is not None:
        modelled = figures["iteration_modelled_seconds"]
        by_model = "" if modelled is None else f", {modelled / 60:.2f} by the cost model"
        lines.append(f"an iteration takes {seconds / 60:.2f} minutes at peak{by_model}")
    if not figures["fits"]:
        lines.append("What would help, most first (estimated, not compiled; GiB saved a chip):")
        lines += [
            f"  {lever['saved'] / GIB:6.2f}  {lever['name']}: {lever['change']}"
            for lever in figures["levers"]
        ]
    return "\n".join(lines)


def render_table(rows: Mapping[str, Sequence[dict]]) -> str:
    """Model name -> its figures (`preflight.measure`), one of each slice: one Markdown table."""
    lines = [
        "| model | slice | mesh data x fsdp x tensor | fits | GiB a chip: copy, rollout, scoring, "
        "update | of | seconds at peak: rollout, scoring, update | cost model | launches a step | "
        "minutes an iteration: at peak, cost model |",
        "|" + "---|" * 10,
    ]
    for model, slices in rows.items():
        for figures in slices:
            cells = (model, figures["topology"], _mesh(figures), *_table_cells(figures))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _table_cells(figures: dict) -> tuple[str, ...]:
    """The columns from "fits" on; the largest need in bold."""
    phases, levers = figures["phases"], figures["levers"]
    fits = "yes"
    if not figures["fits"]:
        fits = "no" + (f": {levers[0]['change']}" if levers else "")
    needs = {name: _gib(figures, name) for name in PHASE_TITLES}
    needs[figures["worst"]] = f"**{needs[figures['worst']]}**"
    seconds, modelled, launches, minutes = "refused by the compiler", "-", "-", "-"
    if figures["iteration_seconds"] is not None:
        timed = [phases[name] for name in ("rollout", "score", "update")]
        seconds = ", ".join(f"{phase['seconds']:.1f} ({phase['bound']})" for phase in timed)
        modelled = ", ".join(_number(phase["modelled_seconds"], 0, digits=1) for phase in timed)
        launches = f"{phases['rollout']['step']['launches']:,.0f}"
        minutes = ", ".join(
            _number(figures[kind], 0, 1 / 60)
            for kind in ("iteration_seconds", "iteration_modelled_seconds")
        )
    memory = ", ".join(needs.values()), f"{figures['hbm'] / GIB:.2f}"
    return fits, *memory, seconds, modelled, launches, minutes


def _number(value: float | None, width: int, scale: float = 1.0, digits: int = 2) -> str:
    text = "-" if value is None else f"{scale * value:.{digits}f}"
    return f"{text:>{width}}" if width else text


def _mesh(figures: dict) -> str:
    return " x ".join(map(str, figures["mesh"]))


def _gib(figures: dict, phase: str) -> str:
    return f"{figures['phases'][phase]['need']['total'] / GIB:.2f}"
