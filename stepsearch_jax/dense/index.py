"""Dense retrieval: an encoder on the device, and the exact k nearest documents by matrix products.

The products run on this process's devices. No running device program may wait for such a search,
so it is only called between the two halves of `config.rollout.search="host"`, outside of episodes,
or in a server.
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
from stepsearch_jax.hub import find_model
from stepsearch_jax.records import Document
from stepsearch_jax.search.cache import describe_search, hash_documents
from stepsearch_jax.search.embeddings import embed_corpus

AXIS = "documents"  # over which the corpus, or a batch of texts, is cut
PAD_TO_MULTIPLE_OF = 16  # tokens of a padded text, so that few programs are compiled
SHARD_BATCHES = 8  # batches that are embedded, sorted by length, between two writes to disk
QUERY_ROWS = 64  # queries whose scores are computed at a time
BLOCK_ROWS = 1 << 16  # documents of a device whose scores are held at once


class TextEncoder:
    """Texts -> vectors. Made by `load_text_encoder`.

    width: of a vector. fingerprint: hash of all files that vectors depend on. shard_rows: texts to
    embed between two writes to disk.
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
        """n texts -> [n, width] float32.

        Texts of about equal length share a batch; a batch that is not full is padded to a power of
        two.
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
        width = -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        shape = (min(count, self._batch), min(width, self.config.positions))
        tokens, length = np.zeros(shape, np.int32), np.ones(shape[0], np.int32)
        for row, of_row in enumerate(ids):
            tokens[row, : len(of_row)], length[row] = of_row, len(of_row)
        arguments = jax.device_put((tokens, length), self._rows)
        return np.asarray(self._encode(self._params, *arguments))[: len(ids)]


def load_text_encoder(
    folder: str | pathlib.Path, batch: int, devices: Sequence[jax.Device]
) -> TextEncoder:
    """The encoder in a Hugging Face folder, or on the Hub (`hub.find_model`).

    It consists of config.json, *.safetensors and tokenizer.json.

    It follows the modules.json of sentence-transformers. batch: texts embedded at a time on each of
    `devices`. Raises FileNotFoundError or ValueError, naming file and key, for an encoder that
    cannot be read or used.
    """
    return TextEncoder(find_model(str(folder), "encoder", "search.encoder"), batch, devices)


class DenseIndex:
    """N documents, whose vectors are spread over the devices. Made by `build_dense_index`.

    Several threads may search it at once. corpus: the hash of the documents; settings: of the
    retriever, for results. vectors: [N, E]; their type, float32 or bfloat16, is that of the
    products, which are summed in float32.
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
        # Each device holds whole blocks of rows. Rows behind the last document are zeros and are
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
        # Two programs with collectives at a time could each hold devices that the other needs.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def describe(self, k: int) -> dict:
        """The manifest of results for k documents (`search.cache.describe_search`)."""
        corpus, settings = self._about
        return describe_search(corpus, len(self), "dense", k, settings)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents for each of q queries, exactly.

        Returns (ids [q, k] int32, best first, -1 if there are no more; scores [q, k] float32, 0 for
        these). Documents with equal scores are in the order of their ids.
        """
        shape = (len(queries), k)
        ids, scores = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        with self._lock:
            vectors = self._encoder.embed([self._prefix + query for query in queries])
            for start in range(0, len(queries), QUERY_ROWS):
                part = vectors[start : start + QUERY_ROWS]
                # Padded to a power of two: few programs are compiled.
                padding = (1 << (len(part) - 1).bit_length()) - len(part)
                padded = np.pad(part, ((0, padding), (0, 0)))
                best = self._find(padded, self._corpus, min(k, self._count))
                found, values = (np.asarray(x)[: len(part)] for x in best)
                ids[start : start + len(part), : found.shape[1]] = found
                scores[start : start + len(part), : found.shape[1]] = values
        return ids, scores


def _cut_rows(vectors: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the corpus, zeros behind its end."""
    part = np.asarray(vectors[start:stop])
    missing = stop - start - len(part)
    if not missing:
        return part
    return np.concatenate([part, np.zeros((missing, vectors.shape[1]), vectors.dtype)])


def _find_best(mesh: Mesh, count: int, block: int, queries: jax.Array, corpus: jax.Array, k: int):
    """The k best of the first `count` rows -> (ids [q, k] int32, scores [q, k] float32).

    queries: [q, E] float32; corpus: [rows, E], cut over the mesh. Blocks and devices are merged in
    the order of their rows, and `top_k` takes the first of equal scores: ties go to the smaller id.
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
            # Rows behind the last document are never among the best.
            ids = first + number * block + jnp.arange(block, dtype=jnp.int32)
            scores = jnp.where(ids < count, scores, -jnp.inf)  # [q, block]
            return merge(best, (scores, jnp.broadcast_to(ids, scores.shape))), None

        # The best of this device's blocks, then the best of all devices.
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
    """Embeds prefix, title and text of each document and puts the vectors onto the devices.

    folder: has a subfolder of vectors for each encoder, prefix and type. Vectors that exist are
    used; an interrupted embedding continues after its last shard. dtype: of the vectors on disk and
    on the devices, float32 or bfloat16. Raises ValueError for an empty corpus.
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
    """A hash of all files in the folder on which vectors depend."""
    digest = hashlib.sha256()
    for file in sorted(
        [*folder.glob("*.json"), *folder.glob("*/config.json"), *folder.glob("*.safetensors")]
    ):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
