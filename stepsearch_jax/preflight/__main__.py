r"""Whether a run fits a slice of TPUs, and how long an iteration takes at best. No TPU is needed.

    python -m stepsearch_jax.preflight --config=configs/X.py[:arg] --topology=v5e:4x4 \
        [--lengths=FILE] [--json=FILE] [--config.key=value …]

It compiles the programs of `train.py` for the slice: the rollout with its search callback, the
scoring passes, the update, and the copy of the parameters for the rollout. It reads the config
alone: no data, no weights. It exits with status 0 if the run fits the chips' memory, with 1 if not
or if the config is wrong, which it says in one line. It needs libtpu, best in an environment of its
own: pip install -r requirements.txt -r requirements-tpu.txt. For --topology=h100:1 and other GPUs
it needs jax's CUDA plugin instead: pip install -r requirements.txt -r
requirements-cuda-preflight.txt
"""

from __future__ import annotations

from stepsearch_jax import cli, signals

if __name__ == "__main__":  # before the imports that take seconds
    parser = cli.make_parser("preflight", __doc__, "config", "json")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="SLICE",
        help="slice of TPUs: v5e:4x4, v5e:8x8, v5p:2x2x4, v6e:4x4, …; or GPUs of one host: "
        "h100:1, h100:8, a100:1, …",
    )
    parser.add_argument(
        "--lengths",
        type=cli.name_path,
        metavar="FILE",
        help="how long episodes are: transcripts.jsonl or metrics.jsonl of a run, or a JSON object "
        "with prompt, length, searches and observed, each a mean or a list of quantiles; default: "
        "all as long as the config allows",
    )
    options = cli.parse_flags(parser)

import dataclasses
import logging
import operator
import pathlib
import sys
from collections.abc import Sequence
from functools import partial

import jax
import ml_collections

from stepsearch_jax import sharding
from stepsearch_jax.files import check_output, write_json
from stepsearch_jax.preflight import lengths, programs, report, verdict
from stepsearch_jax.preflight.chips import GPU, Chip, describe_network, describe_slice
from stepsearch_jax.preflight.costs import Costs, add_costs, count_costs
from stepsearch_jax.preflight.hlo import Module
from stepsearch_jax.preflight.network import Network
from stepsearch_jax.preflight.programs import Compiled
from stepsearch_jax.preflight.recorded import read_lengths
from stepsearch_jax.rl.microbatches import choose_widths
from stepsearch_jax.run.settings import rollout_settings

logger = logging.getLogger("stepsearch_jax")
NOTHING_WRITTEN = "nothing was written"
DECODE = "decode_until_wait"  # the function with the loop of decode steps


def measure(
    config: ml_collections.ConfigDict,
    topology: str,
    chip: Chip | GPU,
    devices: list[jax.Device],
    given: Sequence[lengths.EpisodeLengths] = (),
) -> dict:
    """Compiles the programs of a run for these devices -> everything that the report shows.

    given: lengths of episodes; none: all are the longest that the config allows. Figures are bytes,
    operations and seconds of one chip.
    """
    # Memory: what stays on a chip, and what each program needs beside it.
    mesh = programs.make_mesh(config, devices)
    parts = programs.describe_parts(config, mesh)
    log = lambda what: logger.info("%s for %s …", what, topology)
    widths = choose_widths(config.rollout.context, config.rl.width_buckets if given else 1)
    compiled = programs.compile_programs(config, parts, log, len(widths))
    found = verdict.judge(parts.bytes_per_chip(), compiled, chip.hbm)

    # Time: the loops that data ends run as often as the episodes make them.
    rollout_config, shards = config.rollout, sharding.row_shards(mesh)
    episodes = rollout_config.prompts * rollout_config.group_size
    plan = lengths.plan_rollout(
        rollout_settings(config),
        rollout_config.attention_block,
        episodes // shards,
        (rollout_config.slots or episodes) // shards,
        given,
    )
    shares = _share_widths(config, given, widths)
    tokens = {
        phase: episodes * sum(map(operator.mul, widths, of_widths))
        for phase, of_widths in shares.items()
    }
    model_flops = programs.count_model_flops(config, parts, plan, tokens)
    network = describe_network(chip, mesh.devices.flatten().tolist())
    phases = {}
    for phase, program in compiled.items():
        figures = dict(
            refused=program.memory is None,
            compile_seconds=program.seconds,
            need=_with_total(found.needs[phase]),
        )
        if program.memory:
            count = partial(_count, program, plan, chip, network, shares.get(phase, ()))
            costs, rule = count(), model_flops[phase]
            figures |= dict(
                flops=costs.flops,
                bytes=costs.bytes,
                collectives={kind: dataclasses.asdict(c) for kind, c in costs.collectives.items()},
                seconds=sum(costs.seconds.values()),
                seconds_by=costs.seconds,
                bound=max(costs.seconds, key=costs.seconds.get),
                modelled_seconds=costs.modelled_seconds,
                launches=costs.launches,
                model_flops=rule / len(devices),
                model_ratio=costs.flops * len(devices) / rule if rule else None,
            )
            if phase == "rollout":
                figures["step"] = _describe_step(count(within=DECODE), plan)
        phases[phase] = figures

    # The verdict, and what would help. No total time without the time of each phase.
    levers = [] if found.fits else verdict.find_levers(config, parts, found)
    total = lambda kind: _sum_known([figures.get(kind) for figures in phases.values()])
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
        assumption=plan.assumption,
        lengths=dataclasses.asdict(plan),
        tokens=tokens,
        model=dict(parameters=programs.count_parameters(parts.policy), rule=model_flops["rule"]),
        iteration_seconds=total("seconds"),
        iteration_modelled_seconds=total("modelled_seconds"),
    )


def _sum_known(numbers: Sequence[float | None]) -> float | None:
    """The sum, None if one of the numbers is."""
    return None if None in numbers else sum(numbers)


def _share_widths(
    config: ml_collections.ConfigDict,
    given: Sequence[lengths.EpisodeLengths],
    widths: Sequence[int],
) -> dict[str, list[float]]:
    """Phase of the learner -> the fraction of its micro-batches that run at each width."""
    rl_config, rollout_config = config.rl, config.rollout
    episodes = rollout_config.prompts * rollout_config.group_size
    totals = [episode.total for episode in lengths.draw_episodes(given, episodes)] if given else []
    share = lambda minibatches: lengths.width_fractions(
        totals or [widths[-1]] * episodes, minibatches, rl_config.microbatch_size, widths
    )
    return {"score": share(1), "update": share(rl_config.minibatches)}


def _count(
    program: Compiled,
    plan: lengths.Rollout,
    chip: Chip | GPU,
    network: Network,
    widths: Sequence[float],
    within: str = "",
) -> Costs:
    """The costs of a phase, or of the loops in it that were written in the function `within`.

    widths: fractions of the micro-batches at each width.
    """
    costs = {
        name: count_costs(
            Module(text), plan.trips, chip.rates, network, program.kernels, within, widths
        )
        for name, text in program.texts.items()
    }
    return add_costs({name: (found, plan.runs(name)) for name, found in costs.items()})


def _describe_step(costs: Costs, plan: lengths.Rollout) -> dict[str, float | None]:
    """Of one decode step, from the costs of all of them."""
    modelled = costs.modelled_seconds
    return dict(
        seconds=sum(costs.seconds.values()) / plan.steps,
        modelled_seconds=None if modelled is None else modelled / plan.steps,
        bytes=costs.bytes / plan.steps,
        launches=costs.launches / plan.steps,
    )


def _with_total(need: verdict.Need) -> dict[str, float]:
    return dataclasses.asdict(need) | {"total": need.total}


def preflight(
    config: ml_collections.ConfigDict,
    topology: str,
    json: pathlib.Path | None,
    lengths_file: pathlib.Path | None = None,
) -> int:
    """Prints the report and, unless `json` is None, writes its figures there -> exit status.

    0 if the run fits, 1 if not. Raises ValueError or OSError for errors that the user can fix.
    """
    cli.start_logging()
    check_output("json", json)
    given = read_lengths(lengths_file, config) if lengths_file else ()
    figures = measure(config, topology, *describe_slice(topology), given)
    print(report.render(figures), flush=True)
    if json:
        write_json(json, figures)
    return 0 if figures["fits"] else 1


if __name__ == "__main__":
    with cli.one_line_errors(NOTHING_WRITTEN, tidies_up=False):
        describe_slice(options.topology)  # loads the compiler's library
        signals.take_back()
        sys.exit(preflight(options.config, options.topology, options.json, options.lengths))
