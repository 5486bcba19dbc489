"""One table of what fits which slice of TPUs, for every size of configs/musique_qwen2_5.py.

    python launch/preflight_table.py --folder=runs/preflight \
        [--sizes=3b,7b] [--slices=v5e:4x4,v5e:8x8]

Runs `python -m stepsearch_jax.preflight` for each pair of size and slice without a file
FOLDER/SIZE-SLICE.json (minutes each, see requirements-tpu.txt) and prints the table of all pairs in
Markdown. It names each pair that preflight refuses and leaves it out. DRY_RUN=1 prints the commands
instead.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

from configs.musique_qwen2_5 import PLACES, SIZES, SLICES
from stepsearch_jax.files import read_json
from stepsearch_jax.metrics import progress


def main(arguments: Sequence[str]) -> int:
    """The command -> exit status: 0 if every pair has figures, whether it fits or not."""
    # Flags.
    parser = argparse.ArgumentParser(
        prog="python launch/preflight_table.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder", type=pathlib.Path, required=True, help="where the figures are kept"
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help="default: %(default)s")
    parser.add_argument("--slices", default=",".join(SLICES), help="default: %(default)s")
    options = parser.parse_args(arguments)
    sizes, slices = options.sizes.split(","), options.slices.split(",")
    for name, given, known in (("sizes", sizes, SIZES), ("slices", slices, PLACES)):
        if unknown := [word for word in given if word not in known]:
            parser.error(f"--{name}: {unknown[0]} is not known, only {', '.join(known)}")

    # The figures: one file for each pair, made if it is not there.
    files = {
        (size, place): options.folder / f"{size}-{place.replace(':', '-')}.json"
        for size in sizes
        for place in slices
    }
    missing = [pair for pair, file in files.items() if not file.is_file()]
    if os.environ.get("DRY_RUN") == "1":
        print("\n".join(shlex.join(make_command(*pair, files[pair])) for pair in missing))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for pair in progress(missing, "compiling"):
        with open(files[pair].with_suffix(".log"), "w", encoding="utf-8") as log:
            subprocess.run(make_command(*pair, files[pair]), cwd=REPOSITORY, stdout=log, stderr=log)
        if not files[pair].is_file():
            see = files[pair].with_suffix(".log")
            print(f"no figures for {pair[0]} on {pair[1]}: see {see}", file=sys.stderr)

    # The table of all that there are. jax takes a second to load, and --help need not wait for it.
    from stepsearch_jax.preflight.report import render_table

    found = {pair: figures for pair, file in files.items() if (figures := read_json(file))}
    rows = {
        size: [found[pair] for pair in files if pair[0] == size and pair in found] for size in sizes
    }
    print(render_table(rows))
    return 0 if len(found) == len(files) else 1


def make_command(size: str, place: str, file: pathlib.Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "stepsearch_jax.preflight",
        f"--config=configs/musique_qwen2_5.py:{size},{place}",
        f"--topology={place}",
        f"--json={file.resolve()}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
