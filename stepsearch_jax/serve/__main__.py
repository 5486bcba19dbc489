"""Serves a search index over HTTP, with the request and the answer of Search-R1's /retrieve.

    python -m stepsearch_jax.serve --index FOLDER [--port 8000]
        an index that `python -m stepsearch_jax.prepare index` made
    python -m stepsearch_jax.serve --config=configs/X.py [--config.key=value …]
        the corpus of a config, by its search.kind: bm25 or dense

POST /retrieve  {"queries": ["…"], "topk": 3, "return_scores": true}
             -> {"result": [[{"document": {"id", "title", "text", "contents"}, "score": 9.1}, …],
                 …], "manifest": …}, one list for each query; without scores, plain documents.
                An id is a row of the corpus. Without topk, or with 0: --topk.
GET /health     the manifest: corpus (its hash), documents, retriever, k, settings
GET /metrics    counts and times, for Prometheus

A bad request gets status 400, 408 (too slow) or 413 (too large) with {"error": …}; 503 means: busy,
try again; 500: the index failed. A long answer is made and sent in pieces; if the index fails in
the middle, the connection is cut. Clients that send or read too slowly are cut off.

SIGTERM and Ctrl-C end the server after it has answered what it accepted; a second one, at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import uvicorn

from stepsearch_jax import cli
from stepsearch_jax.search.bm25 import load_index
from stepsearch_jax.serve.app import Engine, make_app
from stepsearch_jax.serve.limits import FLAGS, Limits
from stepsearch_jax.serve.server import Server, listen, make_protocol


def open_engine(options: argparse.Namespace) -> Engine:
    """The index that --index or --config names."""
    if options.index:
        index = load_index(options.index)
        return Engine(index.search, index.documents, index.describe)
    from stepsearch_jax.run.corpus import open_corpus  # it brings jax, which an index does not need

    source, index = open_corpus(options.config)
    return Engine(index.search, source.documents, index.describe)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = cli.make_parser("serve", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--index",
        type=cli.name_path,
        metavar="FOLDER",
        help="made by python -m stepsearch_jax.prepare index",
    )
    what.add_argument(
        "--config", metavar="FILE", help="configs/X.py; --config.KEY=VALUE changes a key"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 = all (default: %(default)s; there is no password)",
    )
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--topk",
        type=int,
        default=3,
        help="documents a query if a request does not say (default: %(default)s)",
    )
    for name, (default, text) in FLAGS.items():
        parser.add_argument(
            f"--max-{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until it is stopped. An error that a user can correct ends it with one line."""
    options = cli.parse_flags(make_parser(), arguments)
    limits = Limits(**{name: getattr(options, f"max_{name}") for name in FLAGS})
    # Bad flags, a missing index and a taken address are reported before anything is served.
    with cli.one_line_errors("run the same command again; what is already prepared is kept"):
        limits.check()
        if not 1 <= options.topk <= limits.topk:
            raise ValueError(f"--topk={options.topk} must lie in 1 to --max-topk={limits.topk}")
        if not 1 <= options.port < 1 << 16:
            raise ValueError(f"--port={options.port} must lie in 1 to 65535")
        engine = open_engine(options)
        listener = listen(options.host, options.port)
    # The server, until a signal ends it.
    count = len(engine.documents)
    print(
        f"serving {count} document{'s' * (count > 1)} at http://{options.host}:{options.port}",
        flush=True,
    )
    settings = uvicorn.Config(
        make_app(engine, options.topk, limits),
        log_level="warning",
        access_log=False,
        http=make_protocol(limits.transfer_seconds),
    )
    server = Server(settings)
    server.run([listener])
    if server.ended_by:
        raise SystemExit(128 + server.ended_by)


if __name__ == "__main__":
    main()
