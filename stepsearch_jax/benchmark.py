"""Measures parts of this package beside what others use for the same job, both in one run.

    python -m stepsearch_jax.benchmark reward [--json FILE] [--repeats N] [--seed S]

Times depend on the machine and on what else runs on it; ratios within one run hardly do. Extra packages: requirements-bench.txt.
"""
from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence

from stepsearch_jax.benchmarks import reward
from stepsearch_jax.metrics import write_json

SUBJECTS = {"reward": reward}  # each offers measure(repeats=, seed=) -> figures, render(figures) -> text, and a docstring that --help shows


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one benchmark, prints its table and, with --json, writes its figures. What a user can mend ends it with one line (SystemExit)."""
    parser = argparse.ArgumentParser("python -m stepsearch_jax.benchmark", description=__doc__.splitlines()[0])
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, subject in SUBJECTS.items():
        options = subjects.add_parser(name, help=subject.__doc__.splitlines()[0], description=subject.__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        options.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to FILE")
        options.add_argument("--repeats", type=_count(1), metavar="N", default=7, help="timed runs of each side, alternating (default: %(default)s)")
        options.add_argument("--seed", type=_count(0), metavar="S", default=0, help="made-up inputs follow from it (default: %(default)s)")
    options = parser.parse_args(arguments)
    subject = SUBJECTS[options.subject]
    try:
        if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
            raise FileNotFoundError(f"--json={options.json}: name a file in a folder that is there")
        figures = subject.measure(repeats=options.repeats, seed=options.seed)
        print(subject.render(figures))
        if options.json:
            write_json(options.json, figures)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"stepsearch_jax: {error}") from error


def _count(least: int) -> Callable[[str], int]:
    """A whole number of at least `least`, as a type of argparse."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return parse


if __name__ == "__main__":
    main()
