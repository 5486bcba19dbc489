"""Writes the page about a run again: curves, before and after, transcripts, configuration.

    python -m stepsearch_jax.report WORKDIR

reads `metrics.jsonl` and, if they exist, `evaluation.json`, `transcripts.jsonl` and `config.json`
in a run's folder, and writes `report.html` there.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepsearch_jax import cli


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Errors that a user can fix end it with one line (SystemExit)."""
    parser = cli.make_parser("report", __doc__)
    parser.add_argument(
        "workdir", metavar="WORKDIR", help="folder of a run: the --workdir that it was trained with"
    )
    options = cli.parse_flags(parser, arguments)
    # Imported here: it loads matplotlib, which takes a while, and --help need not wait for that.
    from stepsearch_jax.report.page import write_report

    with cli.one_line_errors("no report was written"):
        print(write_report(options.workdir))


if __name__ == "__main__":
    main()
