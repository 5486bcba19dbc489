"""BM25 over a corpus of any size: an index in bm25s' own files, memory-mapped and searched by bm25s
without randomness.

`bm25s` is imported inside functions only: importing it initialises the JAX backend, after which a
run on several processes can no longer be set up. It scores; selecting the best documents is done
here, so that ties are broken by document id. It cannot build an index that does not fit into
memory: `postings.py` does, and the files are those that bm25s would have written.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from stepsearch_jax.data.documents import CORPUS, OFFSETS, StoredDocuments
from stepsearch_jax.files import naming_failures
from stepsearch_jax.records import Document
from stepsearch_jax.search.cache import (
    describe_search,
    hash_documents,
    link_file,
    one_at_a_time,
    prepare_folder,
    read_manifest,
    write_manifest,
)
from stepsearch_jax.search.postings import collect_shards, merge_shards
from stepsearch_jax.words import RECIPE, split_words

if TYPE_CHECKING:
    import bm25s

KIND = "bm25-lucene"


class Bm25Index:
    """A loaded index over N documents; made by `build_index` or `load_index`. May be searched from
    several threads at once, and uses several itself.

    documents: the corpus itself, memory-mapped.
    """

    def __init__(self, scorer: bm25s.BM25, documents: StoredDocuments, manifest: dict):
        self._scorer, self._manifest = scorer, manifest
        self._vocabulary: dict[str, int] = scorer.vocab_dict
        self._threads = ThreadPoolExecutor(os.cpu_count(), "bm25")
        self.documents = documents

    def __len__(self) -> int:
        return self._scorer.scores["num_docs"]

    @property
    def vocabulary_size(self) -> int:
        """How many different words there are."""
        return len(self._vocabulary)

    def describe(self, k: int) -> dict:
        """The manifest of results for k documents (`cache.describe_search`)."""
        settings = {name: self._manifest[name] for name in ("k1", "b", "words")}
        return describe_search(self._manifest["corpus"], len(self), KIND, k, settings)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents for each of q queries, several at a time.

        Returns (ids [q, k] int32, best first, -1 where there are no more; scores [q, k] float32, 0
        there). Documents with equal scores stand in the order of their ids; a document that shares
        no word with the query is never returned.
        """
        ids = np.full((len(queries), k), -1, np.int32)
        scores = np.zeros((len(queries), k), np.float32)

        def search_row(row: int) -> None:
            words = [
                self._vocabulary[word]
                for word in split_words(queries[row])
                if word in self._vocabulary
            ]
            if words:
                of_all = self._scorer.get_scores_from_ids(words)
                best = select_best(of_all, k)
                ids[row, : len(best)] = best
                scores[row, : len(best)] = of_all[best]

        each = self._threads.map if len(queries) > 1 else map
        list(each(search_row, range(len(queries))))
        return ids, scores


def select_best(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the at most k largest positive entries of scores [N], largest first, equal ones in
    the order of their indices."""
    count = min(k, len(scores))
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero((scores >= threshold) & (scores > 0))
    return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]


def check_settings(k1: float, b: float) -> None:
    """Raises ValueError for k1 or b out of range."""
    if not 0 <= k1 < math.inf or not 0 <= b <= 1:
        raise ValueError(
            f"BM25's k1 is {k1:g}, and must be finite and not negative; its b is {b:g}, and must "
            "lie in [0, 1]: change config.search.bm25_k1 and bm25_b, or --k1 and --b"
        )


def build_index(
    documents: Sequence[Document], folder: str | pathlib.Path, k1: float, b: float
) -> Bm25Index:
    """Indexes title and text of each document into `folder` and loads the index; a folder that
    already holds this very index is only loaded.

    k1, b: term saturation and length normalisation, in Lucene's form of BM25
    (idf = ln(1 + (N - n + 0.5) / (n + 0.5))). Raises ValueError if there are no documents, if their
    ids are not their rows, or if they hold no words.
    """

    def read() -> Iterator[tuple[str, str]]:
        for row, document in enumerate(documents):
            if document.id != row:
                raise ValueError(
                    f"the document in row {row} of the corpus has the id {document.id}; "
                    "ids must be rows"
                )
            yield document.title, document.text

    return stream_index(read, {"texts": hash_documents(documents)}, folder, k1, b)


def stream_index(
    read: Callable[[], Iterable[tuple[str, str]]],
    made_from: dict,
    folder: str | pathlib.Path,
    k1: float,
    b: float,
) -> Bm25Index:
    """As `build_index`, from read() -> (title, text) of every document. Memory does not grow with
    their number.

    made_from: identifies the documents without reading them, as JSON. Unfinished work stands beside
    the folder, in FOLDER.unfinished, and is resumed, to the same result. A second process that
    wants the same index waits.
    """
    folder = pathlib.Path(folder)
    wanted = {"kind": KIND, "made_from": made_from, "k1": k1, "b": b, "words": RECIPE}
    is_made = lambda: wanted.items() <= (read_manifest(folder) or {}).items()
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if not is_made():
        with one_at_a_time(unfinished):
            if not is_made():  # while this process waited
                begun = unfinished / "begun"
                if read_manifest(begun) != wanted:
                    shutil.rmtree(begun, ignore_errors=True)
                    begun.mkdir(parents=True)
                    write_manifest(begun, wanted)
                try:
                    with naming_failures(folder):
                        _build(read(), begun, folder, wanted)
                except ValueError:  # wrong documents: there is nothing to resume
                    shutil.rmtree(unfinished, ignore_errors=True)
                    raise
            shutil.rmtree(unfinished, ignore_errors=True)
    return load_index(folder)


def _build(
    documents: Iterable[tuple[str, str]], begun: pathlib.Path, folder: pathlib.Path, wanted: dict
) -> None:
    import bm25s

    collected = collect_shards(documents, begun)
    with (
        open(begun / "scores", "wb") as scores_file,
        open(begun / "documents", "wb") as documents_file,
    ):

        def write(found: np.ndarray, scores: np.ndarray) -> None:
            found.tofile(documents_file)
            scores.tofile(scores_file)

        begins = merge_shards(collected, begun, write, wanted["k1"], wanted["b"])

    def finish(made: pathlib.Path) -> None:
        """bm25s writes everything but the two long arrays, which replace empty ones."""
        scorer = bm25s.BM25(
            k1=wanted["k1"], b=wanted["b"], method="lucene", backend="numpy", csc_backend="numpy"
        )
        scorer.vocab_dict, scorer.nonoccurrence_array = collected.vocabulary, None
        scorer.scores = {
            "data": np.zeros(0, np.float32),
            "indices": np.zeros(0, np.int32),
            "indptr": begins,
            "num_docs": collected.documents,
        }
        scorer.save(made, show_progress=False)
        parts = (("data", "scores", np.float32), ("indices", "documents", np.int32))
        for name, part, dtype in parts:
            path = made / f"{name}.csc.index.npy"
            _save_raw(path, begun / part, np.dtype(dtype), int(begins[-1]))
        for name in (CORPUS, OFFSETS):
            # The shards need these files too, until the index is whole.
            link_file(begun / name, made / name)

    manifest = {**wanted, "corpus": collected.corpus, "documents": collected.documents}
    prepare_folder(folder, manifest, finish, begun.parent)


def _save_raw(path: pathlib.Path, raw: pathlib.Path, dtype: np.dtype, count: int) -> None:
    """Writes `count` numbers that lie in the file `raw` as np.save would."""
    with open(path, "wb") as out, open(raw, "rb") as numbers:
        descr = np.lib.format.dtype_to_descr(dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(out, header)
        shutil.copyfileobj(numbers, out, 1 << 20)
    raw.unlink()


def holds_index(folder: pathlib.Path) -> bool:
    """Whether it is the complete folder of an index that `stream_index` made, and not of something
    else that has a manifest."""
    return (read_manifest(folder) or {}).get("kind") == KIND and (folder / OFFSETS).is_file()


def load_index(folder: str | pathlib.Path) -> Bm25Index:
    """Opens a saved index, its postings and documents memory-mapped. Raises FileNotFoundError if
    `folder` holds none, ValueError for a damaged one and for one of other words."""
    folder = pathlib.Path(folder)
    manifest = read_manifest(folder)
    if manifest is None or not holds_index(folder):
        raise FileNotFoundError(
            f"{folder} holds no search index; python -m stepsearch_jax.prepare index makes one"
        )
    if manifest.get("words") != RECIPE:
        raise ValueError(
            f"the index {folder} splits texts into words by the rule {manifest.get('words')!r}, "
            f"queries by {RECIPE!r}: make it again (python -m stepsearch_jax.prepare index)"
        )
    import bm25s

    try:
        scorer = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        return Bm25Index(scorer, StoredDocuments(folder), manifest)
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"the index {folder} is damaged ({type(error).__name__}: {error}): "
            "remove this folder, and make it again"
        ) from error
