"""Makes a search index of a corpus of any size, for `python -m stepsearch_jax.serve` and for bm25s itself.

    python -m stepsearch_jax.prepare index --corpus FILE … --out FOLDER [--k1 0.9] [--b 0.4] [--json FILE]

Rows hold `title` and `text`, or `contents` in Search-R1's form (.jsonl, .csv, each also gzipped, .parquet). Documents and their numbers, which
are their ids, are those of config.data.corpus with the same files: of the second and later ones only what is not in those before. Memory grows with the number
of different words, not with that of documents, but for a hash of each in all files but the last. Interrupted, the same command goes on where it was.
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
from stepsearch_jax.prepare.options import GOES_ON
from stepsearch_jax.search.bm25 import Bm25Index, check_settings, holds_index, stream_index


def index_files(
    files: Sequence[pathlib.Path], folder: pathlib.Path, k1: float, b: float
) -> Bm25Index:
    """Indexes the files into `folder` and opens the index; one that was made of the same files, by place, size and time, is only opened.

    Raises FileNotFoundError or ValueError for files that are not there or cannot be read, and for a folder that holds something else.
    """
    check_settings(k1, b)
    folder = folder.resolve()
    made_from = {
        "files": describe_files(files),
        "passages": "of later files what is new",
    }  # the rule: once it was every row
    if (
        folder.exists()
        and not holds_index(folder)
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise ValueError(
            f"--out={folder} is there and holds no index: choose another place, or remove it"
        )
    return stream_index(lambda: read_corpus(files), made_from, folder, k1, b)


def main(arguments: Sequence[str]) -> None:
    """The command, with the arguments that follow its name. What a user can mend ends it with one line."""
    parser = cli.make_parser("prepare index", __doc__, "json")
    parser.add_argument(
        "--corpus",
        type=pathlib.Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="passages, file after file",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        metavar="FOLDER",
        help="the index; one of other files or settings is replaced",
    )
    parser.add_argument(
        "--k1", type=float, default=0.9, help="term saturation of BM25 (default: %(default)s)"
    )
    parser.add_argument(
        "--b", type=float, default=0.4, help="length normalisation of BM25 (default: %(default)s)"
    )
    options = cli.parse_flags(parser, arguments)
    start = time.monotonic()
    with cli.one_line_errors(GOES_ON):
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
        print(
            "| | |\n|---|---|\n"
            + "\n".join(f"| {name} | {value} |" for name, value in figures.items()),
            flush=True,
        )
        if options.json:
            write_json(options.json, figures)


def measure_peak() -> int:
    """The most memory that this process has held so far, in bytes."""
    status = pathlib.Path("/proc/self/status")
    if (
        status.is_file()
    ):  # of this program alone: getrusage also counts what the process held that started it
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
