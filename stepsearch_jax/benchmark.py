"""Measures parts of this package beside what others use for the same job, both in one run.

    python -m stepsearch_jax.benchmark {rollout,update,reward,retrieval,holding,import,all} [--peer NAME] [--json FILE] [--repeats N] [--seed S]

Times depend on the machine and on what else runs on it; ratios within one run hardly do. Extra packages: requirements-bench.txt.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from stepsearch_jax.benchmarks import figure, holding, importing, retrieval, reward, rollout, update
from stepsearch_jax.metrics import check_output, write_json
from stepsearch_jax.startup import read_config


@dataclasses.dataclass(frozen=True)
class Subject:
    """One benchmark. module: offers measure(repeats=, seed=, and its flags) -> figures, render(figures) -> text, and a docstring that --help shows."""

    module: ModuleType
    repeats: int  # timed runs of each side, if --repeats does not say
    flags: tuple[str, ...]
    peers: tuple[str, ...]  # of --peer


SUBJECTS = {
    "rollout": Subject(rollout, 3, ("case", "config", "episodes", "peer", "peer_python"), rollout.PEERS),
    "update": Subject(update, 5, ("config", "episodes", "peer", "peer_python"), update.PEERS),
    "reward": Subject(reward, 7, (), ()),
    "retrieval": Subject(retrieval, 3, ("passages", "requests", "folder"), ()),
    "holding": Subject(holding, 1, ("passages", "folder", "config"), ()),
    "import": Subject(importing, 3, ("model",), ()),
}
MADE_UP = ("rollout", "update", "reward")  # what `all` runs: subjects that need no files
ALL = "Every subject that needs no files, one after another.\n\nA subject that does not know the peer is timed without it."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one benchmark or all, prints the tables and, with --json, writes the figures. What a user can mend ends it with one line (SystemExit)."""
    options = _parse(arguments)
    try:
        figure_path = getattr(options, "figure", None)
        check_output("json", options.json)
        check_output("figure", figure_path)
        if figure_path:
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
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"stepsearch_jax: {error}") from error
    except KeyboardInterrupt:
        print("stepsearch_jax: interrupted; no figures were written", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _run(subject: Subject, options: argparse.Namespace) -> dict:
    """Measures a subject with the flags that it knows, and prints its table."""
    flags = {name: getattr(options, name) for name in subject.flags}
    if "peer" in flags and flags["peer"] not in subject.peers:
        flags["peer"] = "none"
    figures = subject.module.measure(repeats=options.repeats or subject.repeats, seed=options.seed, **flags)
    print(subject.module.render(figures), flush=True)
    return figures


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m stepsearch_jax.benchmark", description=__doc__.splitlines()[0])
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, subject in SUBJECTS.items():
        _add_subject(subjects, name, subject.module.__doc__, f"{subject.repeats}", subject.flags, subject.peers)
    _add_subject(subjects, "all", ALL, "each subject's own", SUBJECTS["rollout"].flags, SUBJECTS["rollout"].peers)
    options, rest = parser.parse_known_args(arguments)
    if getattr(options, "config", None):
        options.config = read_config(parser, options.config, rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _add_subject(subjects, name: str, text: str, repeats: str, flags: Sequence[str], peers: Sequence[str]) -> None:
    options = subjects.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to FILE")
    options.add_argument("--repeats", type=_count(1), metavar="N", help=f"timed runs of each side, alternating (default: {repeats})")
    options.add_argument("--seed", type=_count(0, 2**31 - 1), metavar="S", default=0, help="made-up inputs follow from it (default: %(default)s)")
    if "case" in flags:
        options.add_argument("--case", nargs="+", choices=tuple(rollout.CASES), default=["short"], help="rollouts to time (default: short)")
        options.add_argument("--figure", type=pathlib.Path, metavar="FILE", help="draw seconds and prefilled tokens against turns (needs the case turns)")
    if "config" in flags:
        options.add_argument("--config", metavar="FILE", help="of rollout and update: random weights of this config's model, such as "
                             "configs/musique_qwen2_5.py:0.5b, instead of the sample model; of holding: the run; --config.KEY=VALUE changes a key")
    if "episodes" in flags:
        options.add_argument("--episodes", type=_count(1), metavar="N", help="episodes, or rows of the update, instead of the case's own")
    if "folder" in flags:
        options.add_argument("--folder", type=pathlib.Path, metavar="FOLDER", required=True, help="for corpora and indexes, which stay there")
        options.add_argument("--passages", type=_count(1), metavar="N", nargs="+", default=[200_000], help="sizes of the corpora (default: 200000)")
    if "requests" in flags:
        options.add_argument("--requests", type=_count(0), metavar="N", default=10_000, help="requests to the server (default: %(default)s)")
    if "model" in flags:
        options.add_argument("--model", type=pathlib.Path, required=True, metavar="PATH", help="Hugging Face folder or .gguf file")
    if "peer" in flags:
        options.add_argument("--peer", choices=("none", *peers), default="none", help="what to compare with (default: none); see requirements-bench.txt")
        options.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="interpreter that has the peer installed (default: this one)")


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
