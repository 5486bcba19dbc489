"""Prepares and checks data before training.

    python -m stepsearch_jax.prepare audit --config=configs/X.py …
        which gold documents a corpus lacks, the best recall, rows that splits share
    python -m stepsearch_jax.prepare keys --config=configs/X.py …
        search queries for every sub-question, kept if engines find the gold document
    python -m stepsearch_jax.prepare index --corpus FILE … --out FOLDER
        a search index of a corpus of any size

`python -m stepsearch_jax.prepare COMMAND --help` describes each command.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from stepsearch_jax import cli

COMMANDS = ("audit", "index", "keys")


def main(arguments: Sequence[str]) -> None:
    """Runs a command. arguments: its name and its flags."""
    if list(arguments) in (["-h"], ["--help"]):
        print(__doc__.strip())
        raise SystemExit(0)
    if not arguments or arguments[0] not in COMMANDS:
        usage = f"usage: python -m stepsearch_jax.prepare {{{','.join(COMMANDS)}}} …"
        print(usage, file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module(f"stepsearch_jax.prepare.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    cli.begin_command()
    main(sys.argv[1:])
