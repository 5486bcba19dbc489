"""Search engines that vote on queries: one interface for all of them, and the vote.

An engine is written as a word: bm25:K1:B, or dense, the encoder of config.search.
"""
from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from stepsearch_jax import dense
from stepsearch_jax.preparation.store import Store
from stepsearch_jax.records import Document
from stepsearch_jax.search import bm25, postings

FORMS = "bm25:K1:B (for example bm25:0.9:0.4) or dense"
QUERIES_AT_ONCE = 64  # searched, and kept, together


@dataclasses.dataclass(frozen=True)
class Engine:
    """A search engine. search(queries, k) -> corpus ids [q, k], best first, -1 where there are no more.

    fingerprint: changes with whatever changes what it finds, the corpus apart.
    """

    name: str
    fingerprint: str
    search: Callable[[Sequence[str], int], np.ndarray]


def check_engines(names: Sequence[str], search_config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for a name that is no engine's, for one that is there twice, and for a dense engine without an encoder."""
    for name in names:
        kind, *numbers = name.split(":")
        if kind == "bm25" and len(numbers) == 2:
            if _read_bm25(name) is not None:
                continue
        elif name == "dense":
            if search_config.encoder:
                continue
            raise ValueError("the engine dense needs config.search.encoder, the folder of an encoder (config.json, *.safetensors, tokenizer.json)")
        raise ValueError(f"{name!r} is not an engine; one is {FORMS}")
    settings = [_read_bm25(name) or name for name in names]
    if len(set(settings)) < len(settings):
        raise ValueError(f"--engines {' '.join(names)}: an engine stands there twice; each has one vote")


def _read_bm25(name: str) -> tuple[float, float] | None:
    """k1 and b of bm25:K1:B, None for anything else."""
    try:
        k1, b = map(float, name.removeprefix("bm25:").split(":"))
    except ValueError:
        return None
    return (k1, b) if k1 >= 0 and 0 <= b <= 1 else None


def build_engine(name: str, documents: Sequence[Document], folder: pathlib.Path, search_config: ml_collections.ConfigDict) -> Engine:
    """The engine of a name that `check_engines` has passed, its index kept in `folder`."""
    if name == "dense":
        s = search_config
        encoder = dense.load_text_encoder(s.encoder, s.encode_batch, jax.local_devices())
        index = dense.build_dense_index(documents, folder, encoder, query_prefix=s.query_prefix, passage_prefix=s.passage_prefix, dtype=s.embedding_dtype,
                                        devices=jax.local_devices())
        made = [encoder.fingerprint, s.query_prefix, s.passage_prefix, s.embedding_dtype, inspect.getsource(dense)]
    else:
        k1, b = _read_bm25(name)
        index = bm25.build_index(documents, folder / f"bm25-{k1}-{b}", k1, b)
        made = [k1, b, inspect.getsource(bm25), inspect.getsource(postings)]
    return Engine(name, hashlib.sha256(json.dumps(made).encode()).hexdigest(), lambda queries, k: index.search(queries, k)[0])


def search_all(engines: Sequence[Engine], queries: Sequence[str], k: int, corpus: str, store: Store) -> list[dict[str, list[int]]]:
    """For each engine: query -> the corpus ids of its first k. What `store` holds of the corpus of this hash is not searched again."""
    queries = list(dict.fromkeys(queries))
    found: list[dict[str, list[int]]] = []
    with tqdm(total=len(queries) * len(engines), desc="searching", unit=" queries", disable=None) as bar:
        for engine in engines:
            found.append({})
            for start in range(0, len(queries), QUERIES_AT_ONCE):
                batch = queries[start:start + QUERIES_AT_ONCE]
                keys = [hashlib.sha256(json.dumps([corpus, engine.fingerprint, k, query]).encode()).hexdigest() for query in batch]
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


def count_votes(found: Sequence[dict[str, list[int]]], query: str, gold: Sequence[int]) -> list[bool]:
    """For each engine: whether it returned a gold document for the query."""
    return [not set(gold).isdisjoint(of_engine[query]) for of_engine in found]


def is_kept(votes: Sequence[bool]) -> bool:
    """Whether at least ⌈M/2⌉ of M engines vote for a query (StepSearch, data pipeline)."""
    return 2 * sum(votes) >= len(votes)
