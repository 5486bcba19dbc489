"""Measures parts of this package beside what others use for the same job, both in one run.

    python -m stepsearch_jax.benchmark {rollout,update,padding,reward,retrieval,memory,import,all} \
        [--peer NAME] [--json FILE] [--repeats N] [--seed S]

Times depend on the machine and its load; ratios within one run hardly do. Extra packages:
requirements-bench.txt.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from stepsearch_jax import cli
from stepsearch_jax.benchmark.cases import CASES, PEERS
from stepsearch_jax.files import check_output, write_json


@dataclasses.dataclass(frozen=True)
class Subject:
    """One benchmark, in a module of this package that is loaded only to run it.

    The module has measure(repeats=, seed=, and its flags) -> figures, render(figures) -> text, and
    a docstring that --help shows.
    """

    name: str  # of the module
    repeats: int  # timed runs of each side, if --repeats does not say
    flags: tuple[str, ...]
    peers: tuple[str, ...]  # of --peer

    def load(self) -> ModuleType:
        return importlib.import_module(f"stepsearch_jax.benchmark.{self.name}")

    @property
    def text(self) -> str:
        """The docstring of its module."""
        return ast.get_docstring(
            ast.parse(
                (pathlib.Path(__file__).parent / f"{self.name}.py").read_text(encoding="utf-8")
            )
        )


SUBJECTS = {
    "rollout": Subject("rollout", 3, ("case", "config", "episodes", "peer", "peer_python"), PEERS),
    "update": Subject("update", 5, ("config", "episodes", "peer", "peer_python"), ("tunix",)),
    "padding": Subject("padding", 5, ("config", "episodes"), ()),
    "reward": Subject("reward", 7, (), ()),
    "retrieval": Subject("retrieval", 3, ("passages", "requests", "folder"), ()),
    "memory": Subject("memory", 1, ("passages", "folder", "config"), ()),
    "import": Subject("importing", 3, ("model",), ()),
}
MADE_UP = ("rollout", "update", "padding", "reward")  # what `all` runs: subjects that need no files
ALL = (
    "Every subject that needs no files, one after another.\n\n"
    "A subject that does not know the peer is timed without it."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one benchmark or all, prints the tables and, with --json, writes the figures.

    Errors that the user can fix end it with one line (SystemExit).
    """
    options = cli.parse_flags(_make_parser(), arguments)
    with cli.one_line_errors("no figures were written"):
        figure_path = getattr(options, "figure", None)
        check_output("json", options.json)
        check_output("figure", figure_path)
        if figure_path:
            from stepsearch_jax.benchmark import figure  # matplotlib takes a while to load

            figure.check_ending(figure_path)
            if "turns" not in options.case:
                raise ValueError("--figure draws the case turns: add it to --case")
        if options.subject == "all":
            figures = {name: _run(SUBJECTS[name], options) for name in MADE_UP}
        else:
            figures = _run(SUBJECTS[options.subject], options)
        if options.json:
            write_json(options.json, figures)
        if figure_path:
            figure.write_figure(figure.draw_turns(figures.get("rollout", figures)), figure_path)


def _run(subject: Subject, options: argparse.Namespace) -> dict:
    """Measures a subject with the flags that it knows, and prints its table."""
    flags = {name: getattr(options, name) for name in subject.flags}
    if "peer" in flags and flags["peer"] not in subject.peers:
        flags["peer"] = "none"
    module = subject.load()
    figures = module.measure(repeats=options.repeats or subject.repeats, seed=options.seed, **flags)
    print(module.render(figures), flush=True)
    return figures


def _make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("benchmark", __doc__.splitlines()[0])
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, subject in SUBJECTS.items():
        repeats = f"{subject.repeats}"
        _add_subject(subjects, name, subject.text, repeats, subject.flags, subject.peers)
    rollout = SUBJECTS["rollout"]
    _add_subject(subjects, "all", ALL, "each subject's own", rollout.flags, rollout.peers)
    return parser


def _add_subject(
    subjects, name: str, text: str, repeats: str, flags: Sequence[str], peers: Sequence[str]
) -> None:
    """Adds a subcommand with the flags that the subject knows."""
    # Flags of all subjects.
    options = subjects.add_parser(
        name,
        help=text.splitlines()[0],
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument(
        "--json", type=cli.name_path, metavar="FILE", help="also write the figures to FILE"
    )
    options.add_argument(
        "--repeats",
        type=_count(1),
        metavar="N",
        help=f"timed runs of each side, alternating (default: {repeats})",
    )
    options.add_argument(
        "--seed",
        type=_count(0, 2**31 - 1),
        metavar="S",
        default=0,
        help="made-up inputs follow from it (default: %(default)s)",
    )

    # What to run, and how much of it.
    if "case" in flags:
        options.add_argument(
            "--case",
            nargs="+",
            choices=tuple(CASES),
            default=["short"],
            help="rollouts to time (default: short)",
        )
        options.add_argument(
            "--figure",
            type=cli.name_path,
            metavar="FILE",
            help="draw seconds and prefilled tokens against turns (needs the case turns)",
        )
    if "config" in flags:
        options.add_argument(
            "--config",
            metavar="FILE",
            help="of rollout, update and padding: random weights of this config's model, such as "
            "configs/musique_qwen2_5.py:0.5b, instead of the sample model; of memory: the run; "
            "--config.KEY=VALUE changes a key",
        )
    if "episodes" in flags:
        options.add_argument(
            "--episodes",
            type=_count(1),
            metavar="N",
            help="episodes, or rows of the update, instead of the case's own",
        )
    if "folder" in flags:
        options.add_argument(
            "--folder",
            type=cli.name_path,
            metavar="FOLDER",
            required=True,
            help="for corpora and indexes, which stay there",
        )
        options.add_argument(
            "--passages",
            type=_count(1),
            metavar="N",
            nargs="+",
            default=[200_000],
            help="sizes of the corpora (default: 200000)",
        )
    if "requests" in flags:
        options.add_argument(
            "--requests",
            type=_count(0),
            metavar="N",
            default=10_000,
            help="requests to the server (default: %(default)s)",
        )
    if "model" in flags:
        options.add_argument(
            "--model",
            type=cli.name_path,
            required=True,
            metavar="PATH",
            help="Hugging Face folder or .gguf file",
        )

    # The other side.
    if "peer" in flags:
        options.add_argument(
            "--peer",
            choices=("none", *peers),
            default="none",
            help="what to compare with (default: none); see requirements-bench.txt",
        )
        options.add_argument(
            "--peer-python",
            metavar="PATH",
            default=sys.executable,
            help="interpreter that has the peer installed (default: this one)",
        )


def _count(least: int, most: float = float("inf")) -> Callable[[str], int]:
    """A whole number from `least` to `most`, as a type of argparse."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}")
        return int(text)

    return parse


if __name__ == "__main__":
    main()
