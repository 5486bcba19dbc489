"""What the commands of `prepare` that take a config share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import ml_collections

from stepsearch_jax import cli
from stepsearch_jax.files import check_output, write_json

# what Ctrl-C prints
AFTER_INTERRUPT = "run the same command again to continue with what is kept"


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    command: Callable[[ml_collections.ConfigDict, argparse.Namespace], dict],
    render: Callable[[dict], str],
) -> None:
    """Calls command(config, options) -> figures, prints them with `render`, writes them to --json.

    Errors that a user can fix end it with one line.
    """
    options = cli.parse_flags(parser, arguments)
    cli.start_logging()
    with cli.one_line_errors(AFTER_INTERRUPT):
        check_output("json", options.json)
        figures = command(options.config, options)
        print(render(figures), flush=True)
        if options.json:
            write_json(options.json, figures)
