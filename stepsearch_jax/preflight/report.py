"""The budget as a table for people and as JSON for programs."""

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
    f = figures
    lines = [
        f"{f['model']['parameters'] / 1e9:.2f}B parameters on {f['chips']} chips of {f['topology']}, mesh data x fsdp x tensor = "
        f"{' x '.join(str(n) for n in f['mesh'])}",
        "",
        "GiB on each chip",
    ]
    lines += [f"  {TITLES[name]:<42}{size / GIB:8.3f}" for name, size in f["parts"].items()]
    lines += [
        "",
        f"  {'while it runs':<24}{'resident':>10}{'temporary':>11}{'results':>9}{'code':>7}{'total':>8}   of {f['hbm'] / GIB:.2f}",
    ]
    for name, p in f["phases"].items():
        n = p["need"]
        sizes = "".join(
            f"{size / GIB:{width}.3f}"
            for size, width in zip(
                (n["kept"] + n["rows"], n["temporaries"], n["fresh"], n["code"], n["total"]),
                (10, 11, 9, 7, 8),
            )
        )
        lines.append(
            f"  {PHASE_TITLES[name]:<24}{sizes}"
            + ("   refused by the compiler" if p["refused"] else "")
        )
    lines += [
        "",
        f"One iteration: {f['episodes']} episodes; {f['assumption']}.",
        "  Learner: all rows at the full context. Seconds at the chip's peak rates, host time (search, rewards, data) not in them.",
        f"  {'on each chip':<24}{'TFLOP':>10}{'of model':>10}{'TB of HBM':>11}{'GB sent':>9}{'seconds':>9}  bound by",
    ]
    for name, p in f["phases"].items():
        if p["refused"]:
            continue
        ratio = f"{p['model_ratio']:.2f}" if p["model_ratio"] else "-"
        sent = sum(c["bytes"] for c in p["collectives"].values())
        lines.append(
            f"  {PHASE_TITLES[name]:<24}{p['flops'] / 1e12:10.1f}{ratio:>10}{p['bytes'] / 1e12:11.3f}{sent / 1e9:9.1f}{p['seconds']:9.2f}"
            f"  {p['bound']}"
        )
    if f["iteration_seconds"] is not None:
        lines.append(
            f"  {'iteration':<24}{'':>10}{'':>10}{'':>11}{'':>9}{f['iteration_seconds']:9.2f}  = {f['iteration_seconds'] / 60:.2f} minutes"
        )
    lines.append(
        f"  of model: matrix products counted in the program / {f['model']['rule']}; attention, which that leaves out, makes it larger than 1"
    )
    lines += ["", "Collectives of one chip (runs, GB sent)"]
    for name, p in f["phases"].items():
        if p["refused"]:
            continue
        shown = ", ".join(
            f"{kind} {c['count']:,.0f} ({c['bytes'] / 1e9:.2f})"
            for kind, c in p["collectives"].items()
        )
        lines.append(f"  {PHASE_TITLES[name]:<24}{shown or 'none'}")
    worst = PHASE_TITLES[f["worst"]]
    need = f["phases"][f["worst"]]["need"]["total"] / GIB
    lines += [
        "",
        f"{'fits' if f['fits'] else 'does not fit'}: the {worst} needs most, {need:.2f} of {f['hbm'] / GIB:.2f} GiB a chip",
    ]
    if not f["fits"]:
        lines.append("What would help, most first (estimated, not compiled; GiB saved a chip):")
        lines += [
            f"  {lever['saved'] / GIB:6.2f}  {lever['name']}: {lever['change']}"
            for lever in f["levers"]
        ]
    return "\n".join(lines)


def render_table(rows: Mapping[str, Sequence[dict]]) -> str:
    """Name of a model -> its figures (`preflight.measure`), one of each slice: all of them as one Markdown table, a row a slice."""
    phases = ("rollout", "score", "update")
    lines = [
        "| model | slice | mesh data x fsdp x tensor | fits | GiB a chip: copy, rollout, scoring, update | of | seconds: rollout, scoring, update | "
        "minutes an iteration |",
        "|" + "---|" * 8,
    ]
    for model, figures in rows.items():
        for f in figures:
            needs = ", ".join(
                f"**{_gib(f, name)}**" if name == f["worst"] else _gib(f, name)
                for name in PHASE_TITLES
            )
            if f["iteration_seconds"] is not None:
                seconds = ", ".join(
                    f"{f['phases'][name]['seconds']:.1f} ({f['phases'][name]['bound']})"
                    for name in phases
                )
                minutes = f"{f['iteration_seconds'] / 60:.2f}"
            else:
                seconds, minutes = "refused by the compiler", "-"
            fits = (
                "yes"
                if f["fits"]
                else "no" + (f": {f['levers'][0]['change']}" if f["levers"] else "")
            )
            lines.append(
                f"| {model} | {f['topology']} | {' x '.join(map(str, f['mesh']))} | {fits} | {needs} | {f['hbm'] / GIB:.2f} | {seconds} | {minutes} |"
            )
    return "\n".join(lines)


def _gib(figures: dict, phase: str) -> str:
    return f"{figures['phases'][phase]['need']['total'] / GIB:.2f}"
