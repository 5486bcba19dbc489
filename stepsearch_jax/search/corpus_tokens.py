"""The corpus as token ids, made once and memory-mapped, so that a search only copies integers."""

from __future__ import annotations

import array
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import tqdm

from stepsearch_jax.search.cache import hash_texts, prepare_folder

# Texts encoded at a time: enough to keep all cores busy, little enough to show progress.
_CHUNK = 2048


class DocumentTokens:
    """Token ids of N documents: `tokens[i]` is a read-only int32 view of those of document i."""

    def __init__(self, folder: pathlib.Path):
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self._flat = np.memmap(
            folder / "tokens.bin", np.int32, mode="r", shape=(int(self._offsets[-1]),)
        )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return np.asarray(self._flat[self._offsets[i] : self._offsets[i + 1]])


def tokenize_corpus(
    texts: Sequence[str],
    folder: str | pathlib.Path,
    encode_batch: Callable[[list[str]], list[list[int]]],
    fingerprint: str,
) -> DocumentTokens:
    """Encodes the rendered text of each document into `folder` and opens the result; a folder made
    from the same texts and tokenizer is only opened.

    texts: one for each document, as it stands in an observation. encode_batch: texts -> ids.
    fingerprint: identifies the tokenizer. Raises ValueError if there are no texts or one has no
    tokens.
    """
    folder = pathlib.Path(folder)
    if not texts:
        raise ValueError("the corpus is empty: there is nothing to encode")
    manifest = {
        "kind": "document-tokens",
        "texts": hash_texts(texts),
        "count": len(texts),
        "tokenizer": fingerprint,
    }

    def write(path: pathlib.Path) -> None:
        lengths = array.array("i")
        with (
            open(path / "tokens.bin", "wb") as file,
            tqdm.tqdm(
                total=len(texts), desc="encoding the corpus", unit="doc", disable=None
            ) as bar,
        ):
            for start in range(0, len(texts), _CHUNK):
                chunk = list(texts[start : start + _CHUNK])
                for ids in encode_batch(chunk):
                    if not ids:
                        document = len(lengths)
                        raise ValueError(
                            f"document {document} has no tokens: its text is {texts[document]!r}"
                        )
                    np.array(ids, np.int32).tofile(file)
                    lengths.append(len(ids))
                bar.update(len(chunk))
        np.save(path / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    prepare_folder(folder, manifest, write)
    return DocumentTokens(folder)
