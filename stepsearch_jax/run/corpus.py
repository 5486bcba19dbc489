"""The corpus of a run: its search index, and its texts as rewards and measures read them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import jax
import ml_collections

from stepsearch_jax.choices import check_choice, is_plugin
from stepsearch_jax.data.documents import Mapped
from stepsearch_jax.data.loading import Source, open_source
from stepsearch_jax.dense.index import DenseIndex, build_dense_index, load_text_encoder
from stepsearch_jax.plugins import PluginIndex
from stepsearch_jax.records import Document
from stepsearch_jax.rewards.text_metrics import normalize
from stepsearch_jax.search.bm25 import Bm25Index, build_index, check_settings
from stepsearch_jax.search.cache import hash_documents, locate_corpus, lock_cache
from stepsearch_jax.search.remote import RemoteIndex, open_remote


def build_search_index(
    config: ml_collections.ConfigDict,
    documents: Sequence[Document],
    folder: pathlib.Path,
    devices: Sequence[jax.Device],
    ended: Callable[[], None] = lambda: None,
) -> Bm25Index | DenseIndex | RemoteIndex | PluginIndex:
    """The index that config.search asks for, kept in `folder`.

    devices: of this process, for a dense index. ended: called whenever a request to a remote
    index's server is answered or given up.
    """
    search_config = config.search
    if search_config.kind == "remote":
        return open_remote(
            search_config.url,
            documents,
            hash_documents(documents),
            search_config.attempt_s,
            search_config.attempts,
            search_config.backoff_s,
            search_config.batch,
            ended,
        )
    if search_config.kind == "bm25":
        return build_index(
            documents,
            folder / f"bm25-{search_config.bm25_k1}-{search_config.bm25_b}",
            search_config.bm25_k1,
            search_config.bm25_b,
        )
    if is_plugin(search_config.kind):
        return PluginIndex(search_config.kind, documents, hash_documents(documents), search_config)
    encoder = load_text_encoder(search_config.encoder, search_config.encode_batch, devices)
    return build_dense_index(
        documents,
        folder,
        encoder,
        query_prefix=search_config.query_prefix,
        passage_prefix=search_config.passage_prefix,
        dtype=search_config.embedding_dtype,
        devices=devices,
    )


def open_corpus(
    config: ml_collections.ConfigDict,
) -> tuple[Source, Bm25Index | DenseIndex | RemoteIndex | PluginIndex]:
    """The data set and the index of a config, without model and mesh.

    A dense index uses all devices of this process, other indexes none.
    """
    search_config = config.search
    check_choice("search.kind", search_config.kind)
    check_settings(search_config.bm25_k1, search_config.bm25_b)
    with lock_cache(config.data.cache_dir):
        source = open_source(config.data, search_config.bm25_k1, search_config.bm25_b)
        devices = jax.local_devices() if search_config.kind == "dense" else ()
        return source, build_search_index(
            config,
            source.documents,
            locate_corpus(config.data.cache_dir, source.manifest["hash"]),
            devices,
        )


def read_texts(documents: Sequence[Document]) -> Sequence[str]:
    """Title and text of each document, as the rewards and measures read them."""
    return Mapped(lambda document: f"{document.title} {document.text}", documents)


def normalize_texts(documents: Sequence[Document]) -> Sequence[str]:
    """The texts that tf-idf compares with tfidf_fit "pair".

    Reference: the released code leaves titles out and normalises texts as it does answers: lower
    case, without punctuation and articles.
    """
    return Mapped(lambda document: normalize(document.text), documents)
