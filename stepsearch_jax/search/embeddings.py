"""One vector for each document of a corpus, in a memory-mapped file that grows shard by shard.

After a kill, the next run resumes from the last whole shard.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable, Sequence

import ml_dtypes  # noqa: F401  (gives NumPy the type bfloat16)
import numpy as np
import tqdm

from stepsearch_jax.files import naming_failures
from stepsearch_jax.search.cache import (
    hash_texts,
    link_file,
    prepare_folder,
    read_manifest,
    write_manifest,
)

EMBEDDINGS = "embeddings.bin"


def embed_corpus(
    texts: Sequence[str],
    folder: str | pathlib.Path,
    embed: Callable[[list[str]], np.ndarray],
    width: int,
    dtype: str,
    shard_rows: int,
    fingerprint: str,
) -> np.ndarray:
    """Embeds each text into `folder` and opens the result: a read-only memory map [N, width] of
    `dtype`.

    embed: texts -> float32 vectors [n, width], called with `shard_rows` texts at a time.
    fingerprint: identifies the encoder and its settings. A folder made from the same texts and
    encoder is only opened. Unfinished work stands beside it, in FOLDER.unfinished, and is resumed.
    Raises ValueError if there are no texts, or for vectors of another shape or that are not finite.
    """
    folder = pathlib.Path(folder)
    if not texts:
        raise ValueError("the corpus is empty: there is nothing to embed")
    manifest = {
        "kind": "embeddings",
        "texts": hash_texts(texts),
        "count": len(texts),
        "width": width,
        "dtype": dtype,
        "encoder": fingerprint,
    }
    if read_manifest(folder) != manifest:
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        if read_manifest(unfinished) != manifest:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            write_manifest(unfinished, manifest)
        file = unfinished / EMBEDDINGS
        with naming_failures(file):
            _write_shards(texts, file, embed, width, np.dtype(dtype), shard_rows)
        prepare_folder(
            folder,
            manifest,
            lambda made: link_file(unfinished / EMBEDDINGS, made / EMBEDDINGS),
            unfinished,
        )
        shutil.rmtree(unfinished, ignore_errors=True)
    return np.memmap(folder / EMBEDDINGS, np.dtype(dtype), mode="r", shape=(len(texts), width))


def _write_shards(
    texts: Sequence[str],
    file: pathlib.Path,
    embed: Callable,
    width: int,
    dtype: np.dtype,
    shard_rows: int,
) -> None:
    """Appends what the file lacks. An incomplete last shard is written again."""
    row_bytes = width * dtype.itemsize
    with (
        open(file, "ab") as out,
        tqdm.tqdm(total=len(texts), desc="embedding the corpus", unit="doc", disable=None) as bar,
    ):
        done = out.tell() // row_bytes
        done = done if done == len(texts) else done // shard_rows * shard_rows
        out.truncate(done * row_bytes)
        bar.update(done)
        for start in range(done, len(texts), shard_rows):
            shard = list(texts[start : start + shard_rows])
            vectors = embed(shard)
            if vectors.shape != (len(shard), width) or not np.isfinite(vectors).all():
                raise ValueError(
                    f"the encoder gave vectors of shape {vectors.shape} for documents {start} to "
                    f"{start + len(shard) - 1}; expected finite ones of shape {(len(shard), width)}"
                )
            out.write(np.ascontiguousarray(vectors, dtype).tobytes())
            out.flush()
            os.fsync(out.fileno())
            bar.update(len(shard))
