"""The postings of BM25 from a stream of documents: restartable, in memory that does not grow with
their number.

First pass: documents are read into *shards*, whose postings (document, count) stand word by word; a
complete shard is never made again. Second pass: a range of words at a time, the shards' postings
are put one behind the other, with their scores. Shards follow one another as documents do, so the
documents of a word stay in order. Only the vocabulary is held whole, as it is for searching.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable

import numpy as np
import tqdm

from stepsearch_jax.data.documents import CORPUS, encode_passage, write_offsets
from stepsearch_jax.search.cache import add_text, write_manifest
from stepsearch_jax.words import split_words

# A shard ends with the document that reaches so many words: about half a GiB while it is sorted.
SHARD_WORDS = 1 << 23
MERGE_POSTINGS = 1 << 23  # postings put together at a time; at least those of one word


@dataclasses.dataclass(frozen=True)
class Collected:
    """What the first pass leaves. corpus: the hash of all texts. vocabulary: word -> its number.
    ends: for each shard, how many documents stand before its end. words: of all documents."""

    corpus: str
    vocabulary: dict[str, int]
    ends: list[int]
    words: int

    @property
    def documents(self) -> int:
        """The number of documents."""
        return self.ends[-1]


def collect_shards(documents: Iterable[tuple[str, str]], folder: pathlib.Path) -> Collected:
    """Reads (title, text) of every document into shards in `folder`, behind those that are there
    already from the same documents.

    Words are numbered as they first appear. Also writes the documents themselves
    (data/documents.py). Shards whose documents are missing are made again. Raises ValueError if
    there are no documents, or no words.
    """
    # Shards that an interrupted build left; useless if the documents that belong to them are gone.
    shards = [
        json.loads((folder / f"{n}.json").read_text(encoding="utf-8"))
        for n in range(len(list(folder.glob("[0-9]*.json"))))
    ]
    (folder / CORPUS).touch()
    if shards and (folder / CORPUS).stat().st_size < shards[-1]["bytes"]:
        for n in reversed(range(len(shards))):
            (folder / f"{n}.json").unlink()
        shards = []
    # Their words, in the order of their numbers.
    vocabulary: dict[str, int] = {}
    for n in range(len(shards)):
        for word in (folder / f"{n}.words").read_text(encoding="utf-8").splitlines():
            vocabulary[word] = len(vocabulary)
    done, total = (
        (shards[-1]["documents"], sum(shard["words"] for shard in shards)) if shards else (0, 0)
    )
    digest, row = hashlib.sha256(), 0
    words, lengths, sizes = array.array("i"), array.array("i"), array.array("i")
    with open(folder / CORPUS, "ab") as corpus:
        corpus.truncate(shards[-1]["bytes"] if shards else 0)

        # A shard counts once its manifest is written, last.
        def close_shard() -> None:
            nonlocal done, total
            corpus.flush()
            number = len(shards)
            _write_shard(
                folder / str(number),
                *(np.array(values, np.int32) for values in (words, lengths, sizes)),
            )
            known = sum(shard["new"] for shard in shards)
            new = list(vocabulary)[known:]
            (folder / f"{number}.words").write_text(
                "".join(f"{word}\n" for word in new), encoding="utf-8"
            )
            done, total = done + len(lengths), total + len(words)
            shards.append(
                {"documents": done, "words": len(words), "bytes": corpus.tell(), "new": len(new)}
            )
            write_manifest(folder, shards[-1], f"{number}.json")
            for values in (words, lengths, sizes):
                del values[:]

        # Every document enters the hash; those of complete shards are not split into words again.
        for title, text in tqdm.tqdm(documents, desc="indexing", unit=" documents", disable=None):
            whole = f"{title}\n{text}"
            add_text(digest, whole)
            row += 1
            if row <= done:
                continue
            numbers = [vocabulary.setdefault(word, len(vocabulary)) for word in split_words(whole)]
            words.extend(numbers)
            lengths.append(len(numbers))
            sizes.append(corpus.write(encode_passage(title, text)))
            if len(words) + len(lengths) >= SHARD_WORDS:
                close_shard()
        if lengths:
            close_shard()
    if not row:
        raise ValueError("the corpus is empty: there is nothing to search")
    if not vocabulary:
        raise ValueError("no document of the corpus holds a word")
    # The offsets of all documents, from the sizes that each shard keeps.
    of_shards = [np.fromfile(folder / f"{n}.sizes", np.int32) for n in range(len(shards))]
    write_offsets(np.concatenate(of_shards), folder)
    ends = [shard["documents"] for shard in shards]
    return Collected(digest.hexdigest(), vocabulary, ends, total)


def _write_shard(
    stem: pathlib.Path, words: np.ndarray, lengths: np.ndarray, sizes: np.ndarray
) -> None:
    """STEM.numbers: its words, in order; .ends: where each one's postings end; .documents, .counts:
    the postings; .lengths, .sizes: words and bytes of each document."""
    key = words.astype(np.int64)  # word, then document
    key *= len(lengths)
    key += np.repeat(np.arange(len(lengths)), lengths)
    key.sort()
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    counts = np.diff(first, append=len(key)).astype(np.int32)
    word, document = np.divmod(key[first], len(lengths))
    begin = np.flatnonzero(np.concatenate([[True], word[1:] != word[:-1]])[: len(word)])
    arrays = {
        "numbers": word[begin].astype(np.int32),
        "ends": np.append(begin[1:], len(word))[: len(begin)].astype(np.int64),
        "documents": document.astype(np.int32),
        "counts": counts,
        "lengths": lengths,
        "sizes": sizes,
    }
    for name, values in arrays.items():
        values.tofile(f"{stem}.{name}")


def merge_shards(
    collected: Collected,
    folder: pathlib.Path,
    write: Callable[[np.ndarray, np.ndarray], None],
    k1: float,
    b: float,
) -> np.ndarray:
    """Calls write(documents [n] int32, scores [n] float32) with the postings of one range of words
    after the other -> where each word's begin, [V + 1] int64.

    A score is idf * n / (n + k1 * (1 - b + b * length / mean length)) with
    idf = ln(1 + (N - df + 0.5) / (df + 0.5)), in float64 but for the idf, which is rounded to
    float32 first, like the score itself: BM25S's arithmetic, to the bit.
    """
    # All shards memory-mapped, and where each word's postings begin in the whole.
    shards, total = range(len(collected.ends)), collected.documents
    parts = {
        name: [_map_array(folder / f"{n}.{name}", dtype) for n in shards]
        for name, dtype in (("numbers", np.int32), ("ends", np.int64), ("lengths", np.int32))
    }
    mean_length = collected.words / total
    begins = np.zeros(len(collected.vocabulary) + 1, np.int64)
    for numbers, ends in zip(parts["numbers"], parts["ends"], strict=True):
        begins[1:][numbers] += np.diff(ends, prepend=0)
    np.cumsum(begins, out=begins)
    start = 0  # the first word of the range
    with tqdm.tqdm(
        total=int(begins[-1]), desc="merging", unit=" postings", unit_scale=True, disable=None
    ) as bar:
        while start < len(begins) - 1:
            # The next range of words: as many as MERGE_POSTINGS allow, at least one.
            fitting = np.searchsorted(begins, begins[start] + MERGE_POSTINGS, side="right")
            stop = max(start + 1, int(fitting) - 1)
            local = begins[start : stop + 1] - begins[start]
            idf = np.array(
                [math.log(1 + (total - df + 0.5) / (df + 0.5)) for df in np.diff(local).tolist()],
                np.float32,
            )
            documents, scores = np.empty(local[-1], np.int32), np.empty(local[-1], np.float32)
            free = local[:-1].copy()  # the place of each word's next posting
            # Each shard's postings of these words go behind those of the shards before it.
            for shard, base in zip(shards, [0, *collected.ends], strict=False):
                numbers, ends = parts["numbers"][shard], parts["ends"][shard]
                low, high = np.searchsorted(numbers, (start, stop)).tolist()
                if low == high:
                    continue
                bounds = np.concatenate([[int(ends[low - 1]) if low else 0], ends[low:high]])
                counts, words = np.diff(bounds), numbers[low:high] - start
                first, rows = int(bounds[0]), int(bounds[-1] - bounds[0])
                places = np.repeat(free[words] - (bounds[:-1] - first), counts) + np.arange(rows)
                free[words] += counts
                document, n = (
                    np.fromfile(folder / f"{shard}.{name}", np.int32, rows, offset=4 * first)
                    for name in ("documents", "counts")
                )
                n = n.astype(np.float32)
                saturation = k1 * ((1 - b) + b * parts["lengths"][shard][document] / mean_length)
                documents[places] = document + np.int32(base)
                scores[places] = np.repeat(idf[words], counts) * (n / (saturation + n))
            write(documents, scores)
            bar.update(len(documents))
            start = stop
    return begins


def _map_array(path: pathlib.Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
