"""Search engines that vote on queries, behind one interface.

Names of engines: bm25:K1:B; dense, the encoder of config.search; or remote:URL, a server with
Search-R1's /retrieve that holds the same corpus. Loads without urllib3, which slows --help down.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np
from tqdm import tqdm

from stepsearch_jax import words
from stepsearch_jax.addresses import hide_login
from stepsearch_jax.prepare.store import Store
from stepsearch_jax.records import Document
from stepsearch_jax.search import bm25, postings
from stepsearch_jax.search.cache import hash_documents
from stepsearch_jax.search.callback import SomeFailedError

FORMS = (
    "bm25:K1:B (for example bm25:0.9:0.4), dense, or remote:URL (a search server, for example "
    "remote:http://localhost:8000)"
)
QUERIES_AT_ONCE = 64  # searched and stored together


@dataclasses.dataclass(frozen=True)
class Engine:
    """A search engine. search(queries, k) -> corpus ids [q, k], best first, padded with -1.

    fingerprint: changes with everything that changes what it finds, except the corpus.
    """

    name: str
    fingerprint: str
    search: Callable[[Sequence[str], int], np.ndarray]


def check_engines(names: Sequence[str], search_config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for an unknown or repeated engine, and for `dense` without an encoder."""
    read = [_read_engine(name) for name in names]
    if "dense" in names and not search_config.encoder:
        raise ValueError(
            "the engine dense needs config.search.encoder, the folder of an encoder (config.json, "
            "*.safetensors, tokenizer.json)"
        )
    if len(set(read)) < len(read):
        raise ValueError(
            f"--engines {hide_login(' '.join(names))}: an engine is named twice; each has one vote"
        )


def _read_engine(name: str) -> tuple:
    """Kind and settings: ("bm25", k1, b), ("dense",) or ("remote", address).

    Raises ValueError for an unknown engine.
    """
    kind, _, rest = name.partition(":")
    if kind == "remote":
        from stepsearch_jax.search.remote import read_address  # loads urllib3

        return kind, read_address(rest)
    if name == "dense":
        return (kind,)
    try:
        k1, b = map(float, rest.split(":"))
        if kind == "bm25" and 0 <= k1 < math.inf and 0 <= b <= 1:
            return kind, k1, b
    except ValueError:
        pass
    raise ValueError(f"{hide_login(name)!r} is not an engine; one is {FORMS}")


def build_engine(
    name: str,
    documents: Sequence[Document],
    folder: pathlib.Path,
    search_config: ml_collections.ConfigDict,
) -> Engine:
    """The engine of a name that `check_engines` has passed. `folder` keeps its index.

    Raises ValueError for a server that does not answer or holds another corpus.
    """
    kind, *settings = _read_engine(name)
    name = hide_login(name)
    if kind == "remote":
        return _open_remote(name, settings[0], documents, search_config)
    if kind == "dense":
        import jax  # only this engine needs it

        from stepsearch_jax.dense import index as dense

        encoder = dense.load_text_encoder(
            search_config.encoder, search_config.encode_batch, jax.local_devices()
        )
        index = dense.build_dense_index(
            documents,
            folder,
            encoder,
            query_prefix=search_config.query_prefix,
            passage_prefix=search_config.passage_prefix,
            dtype=search_config.embedding_dtype,
            devices=jax.local_devices(),
        )
        identity = [
            encoder.fingerprint,
            search_config.query_prefix,
            search_config.passage_prefix,
            search_config.embedding_dtype,
            inspect.getsource(dense),
        ]
    else:
        k1, b = settings
        index = bm25.build_index(documents, folder / f"bm25-{k1}-{b}", k1, b)
        identity = [k1, b, *map(inspect.getsource, (bm25, postings, words))]
    return Engine(name, _hash_json(identity), lambda queries, k: index.search(queries, k)[0])


def _open_remote(
    name: str, url: str, documents: Sequence[Document], search_config: ml_collections.ConfigDict
) -> Engine:
    """A server as an engine, identified by its address and the settings that it reports.

    A search raises OSError when all attempts have failed.
    """
    import urllib3  # loads slowly

    from stepsearch_jax.search.remote import open_remote  # loads urllib3

    index = open_remote(
        url,
        documents,
        hash_documents(documents),
        search_config.attempt_s,
        search_config.attempts,
        search_config.backoff_s,
        search_config.batch,
    )

    def search(queries: Sequence[str], k: int) -> np.ndarray:
        try:
            return index.search(queries, k)[0]
        except SomeFailedError as refused:  # refused queries find nothing
            return refused.found
        except urllib3.exceptions.HTTPError as error:
            raise OSError(
                f"the engine {name} failed {search_config.attempts} times for one request, at last "
                f"with {type(error).__name__}: {error}. Run again to continue with what is kept"
            ) from error

    return Engine(name, _hash_json(index.describe(search_config.k)["settings"]), search)


def _hash_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def search_all(
    engines: Sequence[Engine], queries: Sequence[str], k: int, corpus: str, store: Store
) -> list[dict[str, list[int]]]:
    """For each engine: query -> the corpus ids of its first k.

    Results that `store` holds for the corpus with this hash are not searched again.
    """
    queries = list(dict.fromkeys(queries))
    found: list[dict[str, list[int]]] = []
    with tqdm(
        total=len(queries) * len(engines), desc="searching", unit=" queries", disable=None
    ) as bar:
        for engine in engines:
            found.append({})
            for start in range(0, len(queries), QUERIES_AT_ONCE):
                batch = queries[start : start + QUERIES_AT_ONCE]
                keys = [_hash_json([corpus, engine.fingerprint, k, query]) for query in batch]
                known = store.get(keys)
                lacking = [i for i, value in enumerate(known) if value is None]
                if lacking:
                    ids = engine.search([batch[i] for i in lacking], k).tolist()
                    fresh = {keys[i]: json.dumps(row) for i, row in zip(lacking, ids, strict=True)}
                    store.put(fresh)
                    known = [value or fresh[key] for key, value in zip(keys, known)]
                found[-1].update(zip(batch, map(json.loads, known)))
                bar.update(len(batch))
    return found
