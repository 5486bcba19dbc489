"""Runs a sweep: all methods of one or more sweep files under all seeds, then a table and a figure.

    python launch/sweep.py --sweep=configs/sweeps/baselines.py[,more files] \\
        --config=configs/atlas_sweep.py --workdir=runs/sweep [--jobs=2]

Paths are relative to the repository, or absolute. WORKDIR/points/ receives a run and its log for
every point, WORKDIR table.md, table.json, figure.png, figure.svg. Rerun the same command to
continue: finished points are skipped, unfinished ones resumed, and a failed point leaves the others
alone. On other machines that share WORKDIR, or copy its points there afterwards, --print-commands
prints one command per point, and --table-only makes the table.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from stepsearch_jax import cli, signals

if __name__ == "__main__":
    cli.begin_command()

from stepsearch_jax.sweeps.points import Sweep, list_points, load_sweeps
from stepsearch_jax.sweeps.results import (
    TABLE_FILES,
    format_duration,
    format_table,
    read_results,
    write_tables,
)
from stepsearch_jax.sweeps.running import POINTS, is_finished, make_command, run_points

TRAIN = ("-m", "stepsearch_jax.train")


def main(arguments: Sequence[str], train: Sequence[str] = (sys.executable, *TRAIN)) -> int:
    """The command -> exit status: 0, 1 if a point failed, 2 for bad input, 130 if interrupted.

    train: the training command, without flags.
    """
    options, common = parse_arguments(arguments)
    workdir = pathlib.Path(options.workdir)
    try:
        # What there is to run: the points without a finished run.
        sweeps = load_sweeps(options.sweep.split(","), options.config, common)
        points = list_points(sweeps)
        todo = [point for point in points if not is_finished(point, workdir)]
        if options.table_only and not workdir.is_dir():
            raise FileNotFoundError(f"{workdir} holds no sweep for --table-only")
        # Print the commands instead of running them.
        if options.print_commands:
            for point in todo:
                prefix = options.command_prefix.replace("{name}", point.name)
                command = make_command(("python", *TRAIN), options.config, point, workdir)
                print(f"{prefix} {shlex.join(command)}".lstrip())
            return 0
        # Run them, then compare all finished points.
        failed = {}
        if not options.table_only:
            print(
                f"{len(points)} points, {len(points) - len(todo)} of them finished; "
                f"runs and logs: {workdir / POINTS}",
                file=sys.stderr,
                flush=True,
            )
            failed = run_points(
                todo, workdir, train=train, config_file=options.config, jobs=options.jobs
            )
        write_comparison(sweeps, workdir, options.config)
    except (ValueError, OSError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "sweep: interrupted, and its runs ended; "
            f"rerun the same command to resume those in {workdir / POINTS}",
            file=sys.stderr,
        )
        return 130
    for name, reason in failed.items():
        print(f"failed: {name}: {reason} (log: {workdir / POINTS / name}.log)", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """-> (options, flags "--config.key=value" for all points)."""
    parser = argparse.ArgumentParser(
        prog="python launch/sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.key=value sets a key of the config for all points.",
    )
    # The sweep: its files, its config, its folder.
    parser.add_argument(
        "--sweep",
        required=True,
        metavar="FILE[,FILE…]",
        help="sweep files, each with def sweep(add): configs/sweeps/",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="the config that the points change",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="folder of the sweep; finished points in it are skipped, unfinished ones resumed",
    )
    # What to do: run, print commands, or make the table.
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, each on its share of the cores (default 1; use 1 on accelerators)",
    )
    parser.add_argument(
        "--print-commands",
        "--dry-run",
        action="store_true",
        help="print the commands of the points that are not finished, and run nothing",
    )
    parser.add_argument(
        "--command-prefix",
        default="",
        metavar="TEXT",
        help="with --print-commands: put this in front; {name} in it is the point's name",
    )
    parser.add_argument(
        "--table-only",
        action="store_true",
        help="make table and figure of what is finished, and run nothing",
    )
    # All other arguments must be keys of the config.
    options, common = parser.parse_known_args(arguments)
    for flag in common:
        if not (flag.startswith("--config.") and "=" in flag):
            parser.error(
                f"unknown argument {flag}; keys of the config are set by --config.key=value"
            )
    if options.jobs < 1:
        parser.error(f"--jobs={options.jobs}: at least one run at a time")
    return options, common


def write_comparison(sweeps: Sequence[Sweep], workdir: pathlib.Path, config_file: str) -> None:
    """Writes table and figure of the finished points, prints the table, and says where they are."""
    results = read_results(sweeps, workdir, config_file)
    write_tables(results, workdir)
    # matplotlib takes two seconds to load, and --help need not wait for it.
    from stepsearch_jax.sweeps.figure import FIGURE_FILES, draw_figure, write_figure

    figure, files = draw_figure(results, workdir), list(TABLE_FILES)
    if figure is not None:
        write_figure(figure, workdir)
        files += FIGURE_FILES
    print(format_table(results))
    written = ", ".join(str(workdir / name) for name in files)
    print(f"wrote {written}; wall time so far {format_duration(results['wall_s'])}", flush=True)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    signals.raise_at_each()  # each ends the runs, too
    sys.exit(main(sys.argv[1:]))
