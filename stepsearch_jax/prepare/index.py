"""Makes a search index of a corpus of any size, for `python -m stepsearch_jax.serve` and for bm25s.

    python -m stepsearch_jax.prepare index --corpus FILE … --out FOLDER
        [--k1 0.9] [--b 0.4] [--json FILE]

Files: .jsonl, .csv (both also gzipped) or .parquet. Rows hold `title` and `text`, or `contents` in
Search-R1's form. Documents and their ids are those of config.data.corpus with the same files: a
passage that an earlier file holds is left out. Memory grows with the number of different words, not
of documents, except for a hash of each document in all files but the last. Run an interrupted
command again to continue it.
"""

from __future__ import annotations

import pathlib
import re
import resource
import time
from collections.abc import Sequence

from stepsearch_jax import cli
from stepsearch_jax.data.passages import read_corpus
from stepsearch_jax.data.rows import describe_files
from stepsearch_jax.files import check_output, write_json
from stepsearch_jax.prepare.options import AFTER_INTERRUPT
from stepsearch_jax.search.bm25 import Bm25Index, check_settings, holds_index, stream_index


def index_files(
    files: Sequence[pathlib.Path], folder: pathlib.Path, k1: float, b: float
) -> Bm25Index:
    """Indexes the files into `folder` and opens the index.

    An index of the same files (same path, size and time) is only opened. Raises FileNotFoundError
    or ValueError for files that are missing or unreadable, and if `folder` holds something else.
    """
    check_settings(k1, b)
    folder = folder.resolve()
    # "passages" names the rule, which used to be "every row"
    made_from = {"files": describe_files(files), "passages": "of later files what is new"}
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not holds_index(folder) and not is_empty:
        raise ValueError(
            f"--out={folder} is there and holds no index: choose another folder, or remove it"
        )
    return stream_index(lambda: read_corpus(files), made_from, folder, k1, b)


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Errors that a user can fix end it with one line."""
    parser = cli.make_parser("prepare index", __doc__, "json")
    parser.add_argument(
        "--corpus",
        type=cli.name_path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="passages, file after file",
    )
    parser.add_argument(
        "--out",
        type=cli.name_path,
        required=True,
        metavar="FOLDER",
        help="the index; replaces one of other files or settings",
    )
    parser.add_argument(
        "--k1", type=float, default=0.9, help="term saturation of BM25 (default: %(default)s)"
    )
    parser.add_argument(
        "--b", type=float, default=0.4, help="length normalisation of BM25 (default: %(default)s)"
    )
    options = cli.parse_flags(parser, arguments)
    # index, then print what was made and what it cost
    start = time.monotonic()
    with cli.one_line_errors(AFTER_INTERRUPT):
        check_output("json", options.json)
        index = index_files(options.corpus, options.out, options.k1, options.b)
        figures = {
            **index.describe(0),
            "vocabulary": index.vocabulary_size,
            "minutes": (time.monotonic() - start) / 60,
            "bytes": sum(path.stat().st_size for path in options.out.iterdir()),
            "peak_bytes": measure_peak(),
        }
        del figures["k"]
        shown = figures | {
            "minutes": f"{figures['minutes']:.1f}",
            "bytes": f"{figures['bytes']:,}",
            "peak_bytes": f"{figures['peak_bytes']:,}",
        }
        rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
        print(f"| | |\n|---|---|\n{rows}", flush=True)
        if options.json:
            write_json(options.json, figures)


def measure_peak() -> int:
    """Peak memory of this process so far, in bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what the parent process held
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
