"""The command lines of `prepare`: flags of the command's own, and a config with its overrides."""
from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence

import ml_collections

from stepsearch_jax.metrics import check_output, write_json
from stepsearch_jax.startup import read_config, start_logging


def make_parser(name: str, text: str) -> argparse.ArgumentParser:
    """The parser of `python -m stepsearch_jax.prepare NAME`, with --config and --json; `text` is what --help shows."""
    parser = argparse.ArgumentParser(f"python -m stepsearch_jax.prepare {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="configs/X.py, with an argument after a colon where the file takes one; "
                                                                        "--config.KEY=VALUE changes a key")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to this file")
    return parser


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str], command: Callable[[ml_collections.ConfigDict, argparse.Namespace], dict],
                render: Callable[[dict], str]) -> None:
    """Calls command(config, options) -> figures, prints them with `render` and writes them to --json. What a user can mend ends it with one line."""
    options, rest = parser.parse_known_args(arguments)
    config = read_config(parser, options.config, rest)
    start_logging()
    try:
        check_output("json", options.json)
        figures = command(config, options)
        print(render(figures), flush=True)
        if options.json:
            write_json(options.json, figures)
    except (ValueError, OSError) as error:
        raise SystemExit(f"stepsearch_jax: {error}") from error
