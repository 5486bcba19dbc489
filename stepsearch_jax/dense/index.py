"""Dense retrieval: texts to vectors by an encoder on the device, and the exact k nearest documents
by matrix products over this process's devices.

It runs device programs, so it may only be called where none is running that waits for it: between
the two halves of `config.rollout.search="host"`, outside of episodes, or in a server.
"""

from __future__ import annotations

import hashlib
import pathlib
import threading
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stepsearch_jax.data.documents import Mapped
from stepsearch_jax.dense.encoder import Encoder, load_encoder, read_encoder_config
from stepsearch_jax.records import Document
from stepsearch_jax.search.cache import describe_search, hash_documents
from stepsearch_jax.search.embeddings import embed_corpus

AXIS = "documents"  # over which the corpus, or a batch of texts, is cut
PAD_TO_MULTIPLE_OF = 16  # texts are padded to multiples of it, so that few programs are compiled
SHARD_BATCHES = 8  # batches that are embedded, sorted by length, between two writes to disk
QUERY_ROWS = 64  # queries whose scores are computed at a time
BLOCK_ROWS = 1 << 16  # documents of a device whose scores are held at once


class TextEncoder:
    """Texts -> vectors. Made by `load_text_encoder`.

    width: of a vector. fingerprint: changes with whatever changes vectors. shard_rows: texts that
    are worth embedding at a time.
    """

    def __init__(self, folder: pathlib.Path, batch: int, devices: Sequence[jax.Device]):
        self.config = read_encoder_config(folder)
        self.width = self.config.embed_dim
        self._tokenizer = _load_tokenizer(folder, self.config.max_tokens)
        mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
        self._rows = NamedSharding(mesh, PartitionSpec(AXIS))
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._params = jax.device_put(load_encoder(folder, self.config), self._whole)
        self._encode = jax.jit(Encoder(self.config).apply, out_shardings=self._whole)
        self._devices, self._batch = len(devices), batch * len(devices)
        self.shard_rows = SHARD_BATCHES * self._batch
        self.fingerprint = _hash_files(folder)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[n, width] float32. Texts of about equal length share a batch; a batch that is not full
        is padded to a power of two.
        """
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        order = np.argsort([len(row) for row in ids], kind="stable")
        vectors = np.zeros((len(ids), self.width), np.float32)
        for start in range(0, len(order), self._batch):
            rows = order[start : start + self._batch]
            vectors[rows] = self._embed_batch([ids[row] for row in rows])
        return vectors

    def _embed_batch(self, ids: list[list[int]]) -> np.ndarray:
        count, longest = self._devices, max(map(len, ids))
        while count < len(ids):
            count *= 2
        tokens = np.zeros(
            (
                min(count, self._batch),
                min(-(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF, self.config.positions),
            ),
            np.int32,
        )
        length = np.ones(len(tokens), np.int32)
        for row, of_row in enumerate(ids):
            tokens[row, : len(of_row)], length[row] = of_row, len(of_row)
        return np.asarray(
            self._encode(self._params, *jax.device_put((tokens, length), self._rows))
        )[: len(ids)]


def load_text_encoder(
    folder: str | pathlib.Path, batch: int, devices: Sequence[jax.Device]
) -> TextEncoder:
    """The encoder in a Hugging Face folder (config.json, *.safetensors, tokenizer.json;
    sentence-transformers' modules.json is followed).

    batch: texts embedded at a time on each of `devices`. Raises FileNotFoundError or ValueError,
    naming file and key, for one that cannot be read or used.
    """
    return TextEncoder(pathlib.Path(folder), batch, devices)


class DenseIndex:
    """N documents on the devices, their vectors shared out among them. Made by `build_dense_index`.
    May be searched from several threads at once.

    corpus: the hash of the documents; settings: of the retriever, for results. vectors [N, E]:
    their type, float32 or bfloat16, is that of the products, which are summed in float32.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        encoder: TextEncoder,
        query_prefix: str,
        devices: Sequence[jax.Device],
        corpus: str,
        settings: dict,
    ):
        self._count, self._encoder, self._prefix = len(vectors), encoder, query_prefix
        self._about = corpus, settings
        mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
        # Each device holds whole blocks of rows; those behind the last document are zeros that are
        # never returned.
        self._block = min(BLOCK_ROWS, -(-self._count // len(devices)))
        rows = -(-self._count // (len(devices) * self._block)) * self._block
        total = rows * len(devices)
        self._corpus = jax.make_array_from_callback(
            (total, vectors.shape[1]),
            NamedSharding(mesh, PartitionSpec(AXIS)),
            lambda index: _cut_rows(vectors, *index[0].indices(total)[:2]),
        )
        self._find = jax.jit(partial(_find_best, mesh, self._count, self._block), static_argnums=2)
        self._lock = (
            threading.Lock()
        )  # two programs with collectives at a time could each hold devices that the other needs

    def __len__(self) -> int:
        return self._count

    def describe(self, k: int) -> dict:
        """The manifest of results for k documents (`prepared.describe_search`)."""
        corpus, settings = self._about
        return describe_search(corpus, len(self), "dense", k, settings)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents for each of q queries, exactly.

        Returns (ids [q, k] int32, best first, -1 where there are no more; scores [q, k] float32, 0
        there). Documents with equal scores stand in the order of their ids.
        """
        ids, scores = (
            np.full((len(queries), k), -1, np.int32),
            np.zeros((len(queries), k), np.float32),
        )
        with self._lock:
            vectors = self._encoder.embed([self._prefix + query for query in queries])
            for start in range(0, len(queries), QUERY_ROWS):
                part = vectors[start : start + QUERY_ROWS]
                padded = np.zeros(
                    (1 << (len(part) - 1).bit_length(), part.shape[1]), np.float32
                )  # powers of two: few programs
                padded[: len(part)] = part
                found, values = (
                    np.asarray(x)[: len(part)]
                    for x in self._find(padded, self._corpus, min(k, self._count))
                )
                ids[start : start + len(part), : found.shape[1]] = found
                scores[start : start + len(part), : found.shape[1]] = values
        return ids, scores


def _cut_rows(vectors: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the corpus, zeros behind its end."""
    part = np.asarray(vectors[start:stop])
    return (
        np.concatenate(
            [part, np.zeros((stop - start - len(part), vectors.shape[1]), vectors.dtype)]
        )
        if len(part) < stop - start
        else part
    )


def _find_best(mesh: Mesh, count: int, block: int, queries: jax.Array, corpus: jax.Array, k: int):
    """queries [q, E] float32, corpus [rows, E] cut over the mesh -> (ids [q, k] int32, scores [q,
    k] float32) of the first `count` rows.

    Blocks and devices follow each other in the order of their rows, and `top_k` takes the first of
    equal scores: ties go to the smaller id.
    """
    queries = queries.astype(corpus.dtype)

    def search_shard(queries, part):
        first = jax.lax.axis_index(AXIS) * part.shape[0]

        def search_block(best, number):
            documents = jax.lax.dynamic_slice_in_dim(part, number * block, block)
            scores = jnp.einsum(
                "qe,de->qd",
                queries,
                documents,
                preferred_element_type=jnp.float32,
                precision=jax.lax.Precision.HIGHEST,
            )
            ids = first + number * block + jnp.arange(block, dtype=jnp.int32)
            return merge(
                best,
                (jnp.where(ids < count, scores, -jnp.inf), jnp.broadcast_to(ids, scores.shape)),
            ), None

        nothing = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32)
        best, _ = jax.lax.scan(search_block, nothing, jnp.arange(part.shape[0] // block))
        return merge(*[tuple(jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in best)])

    def merge(*parts):
        """Scores and ids, several [q, n] -> the k best [q, k], earlier ones first among equals."""
        scores, ids = (jnp.concatenate(arrays, axis=1) for arrays in zip(*parts))
        best, places = jax.lax.top_k(scores, k)
        return best, jnp.take_along_axis(ids, places, axis=1)

    specs = PartitionSpec(), PartitionSpec(AXIS)
    scores, ids = jax.shard_map(
        search_shard, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )(queries, corpus)
    return ids, scores


def build_dense_index(
    documents: Sequence[Document],
    folder: str | pathlib.Path,
    encoder: TextEncoder,
    *,
    query_prefix: str,
    passage_prefix: str,
    dtype: str,
    devices: Sequence[jax.Device],
) -> DenseIndex:
    """Embeds prefix, title and text of each document, where that is not done yet, and puts the
    vectors onto the devices.

    folder: holds a folder for each encoder, prefix and type; one that was interrupted goes on from
    its last shard. dtype: of the stored vectors, float32 or bfloat16. Raises ValueError for an
    empty corpus.
    """
    made = hashlib.sha256(f"{encoder.fingerprint} {dtype} {passage_prefix}".encode()).hexdigest()
    texts = Mapped(lambda document: f"{passage_prefix}{document.title}\n{document.text}", documents)
    vectors = embed_corpus(
        texts,
        pathlib.Path(folder) / f"dense-{made[:16]}",
        encoder.embed,
        encoder.width,
        dtype,
        encoder.shard_rows,
        encoder.fingerprint,
    )
    settings = {
        "encoder": encoder.fingerprint,
        "query_prefix": query_prefix,
        "passage_prefix": passage_prefix,
        "dtype": dtype,
    }
    return DenseIndex(vectors, encoder, query_prefix, devices, hash_documents(documents), settings)


def _load_tokenizer(folder: pathlib.Path, max_tokens: int) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.json: save the encoder's fast tokenizer there"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _hash_files(folder: pathlib.Path) -> str:
    """Of everything in the folder that a vector depends on."""
    digest = hashlib.sha256()
    for file in sorted(
        [*folder.glob("*.json"), *folder.glob("*/config.json"), *folder.glob("*.safetensors")]
    ):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
