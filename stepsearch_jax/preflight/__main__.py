"""Whether a run fits a slice of TPUs, and how long an iteration takes at best: compiled for the slice, without one.

    python -m stepsearch_jax.preflight --config=configs/X.py[:arg] --topology=v5e:4x4 [--json=FILE] [--config.key=value …]

The programs are those of `train.py`: the rollout with its search callback, the scoring passes, the update, and the copy of the parameters for the rollout.
Nothing is read but the config: no data, no weights. It ends with status 0 if the run fits the chips' memory, 1 if not, or if something is wrong with the
config, which it says in one line. Needs libtpu, best in an environment of its own: pip install -r requirements.txt -r requirements-tpu.txt
"""

from __future__ import annotations

from stepsearch_jax import cli

if __name__ == "__main__":  # before the imports that take seconds
    parser = cli.make_parser("preflight", __doc__, "config", "json")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="SLICE",
        help="slice of TPUs: v5e:4x4, v5e:8x8, v5p:2x2x4, v6e:4x4, …",
    )
    options = cli.parse_flags(parser)

import dataclasses
import logging
import pathlib
import sys

import jax
import ml_collections

from stepsearch_jax import sharding
from stepsearch_jax.files import check_output, write_json
from stepsearch_jax.preflight import hlo, lengths, programs, report, verdict
from stepsearch_jax.preflight.chips import Chip, describe_slice
from stepsearch_jax.run.settings import rollout_settings

logger = logging.getLogger("stepsearch_jax")


def measure(
    config: ml_collections.ConfigDict, topology: str, chip: Chip, devices: list[jax.Device]
) -> dict:
    """Compiles the programs of a run for these devices -> everything that the report shows, in bytes, operations and seconds of one chip."""
    mesh = programs.make_mesh(config, devices)
    parts = programs.describe_parts(config, mesh)
    compiled = programs.compile_programs(
        config, parts, lambda what: logger.info("%s for %s …", what, topology)
    )
    found = verdict.judge(parts.bytes_per_chip(), compiled, chip.hbm)

    rollout_config, shards = config.rollout, sharding.row_shards(mesh)
    episodes = rollout_config.prompts * rollout_config.group_size
    plan = lengths.plan_rollout(
        rollout_settings(config),
        rollout_config.attention_block,
        episodes // shards,
        (rollout_config.slots or episodes) // shards,
    )
    model = programs.count_model_flops(config, parts, plan)
    phases = {}
    for phase, program in compiled.items():
        figures = dict(
            refused=program.memory is None,
            compile_seconds=program.seconds,
            need=_with_total(found.needs[phase]),
        )
        if program.memory:
            costs = hlo.Module(program.text, plan.trips).costs(chip.rates)
            figures |= dict(
                flops=costs.flops,
                bytes=costs.bytes,
                collectives={kind: dataclasses.asdict(c) for kind, c in costs.collectives.items()},
                seconds=sum(costs.seconds.values()),
                seconds_by=costs.seconds,
                bound=max(costs.seconds, key=costs.seconds.get),
                model_flops=model[phase] / len(devices),
                model_ratio=costs.flops * len(devices) / model[phase] if model[phase] else None,
            )
        phases[phase] = figures
    levers = [] if found.fits else verdict.find_levers(config, parts, found)
    complete = all("seconds" in figures for figures in phases.values())
    return dict(
        topology=topology,
        chips=len(devices),
        mesh=list(mesh.devices.shape),
        hbm=chip.hbm,
        rates=chip.rates._asdict(),
        parts=parts.bytes_per_chip(),
        phases=phases,
        worst=found.worst,
        fits=found.fits,
        levers=[dataclasses.asdict(lever) for lever in levers],
        episodes=episodes,
        assumption=plan.describe(),
        lengths=dataclasses.asdict(plan),
        model=dict(parameters=programs.count_parameters(parts.policy), rule=model["rule"]),
        iteration_seconds=sum(figures["seconds"] for figures in phases.values())
        if complete
        else None,
    )


def _with_total(need: verdict.Need) -> dict[str, float]:
    return dataclasses.asdict(need) | {"total": need.total}


def preflight(config: ml_collections.ConfigDict, topology: str, json: pathlib.Path | None) -> int:
    """Prints the report, writes it to `json` unless that is None -> exit status: 0 if the run fits. Raises ValueError or OSError for what a user can mend."""
    cli.start_logging()
    check_output("json", json)
    figures = measure(config, topology, *describe_slice(topology))
    print(report.render(figures), flush=True)
    if json:
        write_json(json, figures)
    return 0 if figures["fits"] else 1


if __name__ == "__main__":
    with cli.one_line_errors("nothing was written"):
        sys.exit(preflight(options.config, options.topology, options.json))
