r"""Whether a run fits a slice of TPUs, and how long an iteration takes at best. No TPU is needed.

    python -m stepsearch_jax.preflight --config=configs/X.py[:arg] --topology=v5e:4x4 \
        [--json=FILE] [--config.key=value …]

It compiles the programs of `train.py` for the slice: the rollout with its search callback, the
scoring passes, the update, and the copy of the parameters for the rollout. It reads the config
alone: no data, no weights. It exits with status 0 if the run fits the chips' memory, with 1 if not
or if the config is wrong, which it says in one line. It needs libtpu, best in an environment of its
own: pip install -r requirements.txt -r requirements-tpu.txt
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
from stepsearch_jax.preflight import lengths, programs, report, verdict
from stepsearch_jax.preflight.chips import Chip, describe_slice
from stepsearch_jax.preflight.costs import count_costs
from stepsearch_jax.preflight.hlo import Module
from stepsearch_jax.run.settings import rollout_settings

logger = logging.getLogger("stepsearch_jax")


def measure(
    config: ml_collections.ConfigDict, topology: str, chip: Chip, devices: list[jax.Device]
) -> dict:
    """Compiles the programs of a run for these devices -> everything that the report shows.

    Figures are bytes, operations and seconds of one chip.
    """
    # Memory: what stays on a chip, and what each program needs beside it.
    mesh = programs.make_mesh(config, devices)
    parts = programs.describe_parts(config, mesh)
    log = lambda what: logger.info("%s for %s …", what, topology)
    compiled = programs.compile_programs(config, parts, log)
    found = verdict.judge(parts.bytes_per_chip(), compiled, chip.hbm)

    # Time: the loops that data ends run as often as the longest episodes make them.
    rollout_config, shards = config.rollout, sharding.row_shards(mesh)
    episodes = rollout_config.prompts * rollout_config.group_size
    plan = lengths.plan_rollout(
        rollout_settings(config),
        rollout_config.attention_block,
        episodes // shards,
        (rollout_config.slots or episodes) // shards,
    )
    model_flops = programs.count_model_flops(config, parts, plan)
    phases = {}
    for phase, program in compiled.items():
        figures = dict(
            refused=program.memory is None,
            compile_seconds=program.seconds,
            need=_with_total(found.needs[phase]),
        )
        if program.memory:
            costs = count_costs(Module(program.text), plan.trips, chip.rates)
            rule = model_flops[phase]
            figures |= dict(
                flops=costs.flops,
                bytes=costs.bytes,
                collectives={kind: dataclasses.asdict(c) for kind, c in costs.collectives.items()},
                seconds=sum(costs.seconds.values()),
                seconds_by=costs.seconds,
                bound=max(costs.seconds, key=costs.seconds.get),
                model_flops=rule / len(devices),
                model_ratio=costs.flops * len(devices) / rule if rule else None,
            )
        phases[phase] = figures

    # The verdict, and what would help. No total time without the time of each phase.
    levers = [] if found.fits else verdict.find_levers(config, parts, found)
    seconds = [figures.get("seconds") for figures in phases.values()]
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
        model=dict(parameters=programs.count_parameters(parts.policy), rule=model_flops["rule"]),
        iteration_seconds=None if None in seconds else sum(seconds),
    )


def _with_total(need: verdict.Need) -> dict[str, float]:
    return dataclasses.asdict(need) | {"total": need.total}


def preflight(config: ml_collections.ConfigDict, topology: str, json: pathlib.Path | None) -> int:
    """Prints the report and, unless `json` is None, writes its figures there -> exit status.

    0 if the run fits, 1 if not. Raises ValueError or OSError for errors that the user can fix.
    """
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
