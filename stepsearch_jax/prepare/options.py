"""What the commands of `prepare` that take a config share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import ml_collections

from stepsearch_jax import cli
from stepsearch_jax.files import check_output, write_json

GOES_ON = "the same command goes on from what is kept"  # after Ctrl-C


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    command: Callable[[ml_collections.ConfigDict, argparse.Namespace], dict],
    render: Callable[[dict], str],
) -> None:
    """Calls command(config, options) -> figures, prints them with `render` and writes them to --json. What a user can mend ends it with one line."""
    options = cli.parse_flags(parser, arguments)
    cli.start_logging()
    with cli.one_line_errors(GOES_ON):
        check_output("json", options.json)
        figures = command(options.config, options)
        print(render(figures), flush=True)
        if options.json:
            write_json(options.json, figures)
