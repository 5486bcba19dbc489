"""From a config to questions and documents; which questions an iteration takes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from google.protobuf import json_format

from stepsearch_jax import words
from stepsearch_jax.choices import check_choice
from stepsearch_jax.data import (
    atlas,
    atlas_facts,
    atlas_grammar,
    atlas_kinds,
    atlas_questions,
    atlas_world,
    bamboogle,
    builder,
    documents,
    hotpotqa,
    jsonl,
    musique,
    official,
    passages,
    phantomwiki,
    row,
    rows,
    schema,
    search_r1,
    stepsearch,
    two_wiki,
)
from stepsearch_jax.files import WriteError, naming_failures
from stepsearch_jax.records import Document, Question

logger = logging.getLogger("stepsearch_jax")
OFFICIAL = {  # data.kind -> the builder that reads its files
    "jsonl": jsonl.Jsonl,
    "musique": musique.Musique,
    "hotpotqa": hotpotqa.HotpotQA,
    "2wikimultihopqa": two_wiki.TwoWiki,
    "bamboogle": bamboogle.Bamboogle,
    "phantomwiki": phantomwiki.PhantomWiki,
    "stepsearch": stepsearch.StepSearch,
    "search_r1": search_r1.SearchR1,
}
# An unfinished data set without a change for this many seconds belongs to no living process.
LEFT_S = 24 * 3600.0
KINDS = ("atlas", *OFFICIAL)
# What the readers of stored files raise for damaged ones.
_DAMAGE = (
    FileNotFoundError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    json_format.Error,
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared data set. `documents[i].id == i`.

    `manifest`: kind; hash of inputs and code; documents; of every split questions, sub_questions,
    shapes, gold_documents in the corpus and missing_gold_documents and, if rows were left out,
    unreadable_rows (how many) and unreadable (the first faults); files with their path and sha256
    (none for atlas).
    """

    documents: Sequence[Document]
    splits: dict[str, Sequence[Question]]
    manifest: dict


class _Rows(Sequence):
    """The first `length` rows stored in `folder`, decoded at every access."""

    def __init__(self, stored, decode: Callable, length: int, folder: pathlib.Path):
        self._stored, self._decode, self._length, self._folder = stored, decode, length, folder

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        row = index + self._length if index < 0 else index
        if not 0 <= row < self._length:
            raise IndexError(f"row {index} of {self._length}")
        with _naming_damage(self._folder):
            return self._decode(self._stored[int(row)])

    def first(self, count: int) -> _Rows:
        """The first `count` of these rows."""
        return _Rows(self._stored, self._decode, count, self._folder)


@contextlib.contextmanager
def _naming_damage(folder: pathlib.Path) -> Iterator[None]:
    """Turns the errors that readers raise for damaged files into a ValueError with the remedy."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(
            f"the stored data set {folder} is damaged ({type(error).__name__}: {error}): "
            "remove this folder, and it is made again"
        ) from error


def load_source(data_config, k1: float, b: float) -> Source:
    """The data set of `config.data` for training: `open_source`, limited to data.train_questions.

    The limit applies to the training split. Raises ValueError also when this split does not exist
    or has too few questions; data.train_split "" needs none.
    """
    source = open_source(data_config, k1, b)
    train, wanted = data_config.train_split, data_config.train_questions
    if not train:
        return source
    if train not in source.splits:
        raise ValueError(
            f"data.train_split is {train!r}, but the data set has {sorted(source.splits)}"
        )
    if not 0 <= wanted <= len(source.splits[train]):
        raise ValueError(
            f"data.train_questions is {wanted}, but split {train!r} has "
            f"{len(source.splits[train])} questions (0 = all)"
        )
    if not wanted:
        return source
    splits = {**source.splits, train: source.splits[train].first(wanted)}
    return dataclasses.replace(source, splits=splits)


def open_source(data_config, k1: float, b: float) -> Source:
    """The whole data set that data_config names by kind, path, corpus and atlas.

    Builds it under data_config.cache_dir if it is not there yet. The folder's name is a hash of
    inputs and code (Atlas: arguments and generator; others: path, size and time of their files, and
    on_bad_row), so a changed input is a new data set. k1, b: of the BM25 that checks Atlas's search
    queries. Raises ValueError or FileNotFoundError for bad input and for damaged stored files.
    """
    dataset, digest = _make_builder(data_config, k1, b)
    dataset = _prepare(dataset, lambda: _make_builder(data_config, k1, b)[0])
    folder = pathlib.Path(dataset.data_path)
    read = lambda split, decode, length: _Rows(
        dataset.as_data_source(split), decode, length, folder
    )
    with _naming_damage(folder):
        counts = dict(dataset.info.metadata)
        splits = {
            split: read(split, schema.decode_question, count["questions"])
            for split, count in counts["splits"].items()
        }
        stored = _Rows(
            documents.StoredDocuments(folder),
            lambda document: document,
            counts["documents"],
            folder,
        )
    for split, count in counts["splits"].items():
        if count["missing_gold_documents"]:
            logger.warning(
                "%s: the corpus lacks %d of the %d gold documents of split %s; "
                "`python -m stepsearch_jax.prepare audit` names them",
                data_config.kind,
                count["missing_gold_documents"],
                count["missing_gold_documents"] + count["gold_documents"],
                split,
            )
    _warn_of_unreadable(data_config.kind, counts["splits"])
    return Source(stored, splits, {"kind": data_config.kind, "hash": digest, **counts})


def _warn_of_unreadable(kind: str, splits: dict[str, dict]) -> None:
    """One warning about all rows that data.on_bad_row=skip has left out."""
    left_out = {split: count for split, count in splits.items() if count.get("unreadable_rows")}
    if left_out:
        faults = [fault for count in left_out.values() for fault in count["unreadable"]]
        logger.warning(
            "%s: rows that cannot be read are left out: %s; the first: %s",
            kind,
            ", ".join(
                f"{count['unreadable_rows']} of {split}" for split, count in left_out.items()
            ),
            "; ".join(faults[: official.SHOWN_FAULTS]),
        )


def question_rows(position: int, count: int, num_questions: int, seed: int) -> np.ndarray:
    """Rows of the questions at global positions [position, position + count): int64 [count].

    Epoch e = positions [e * num_questions, (e + 1) * num_questions) is a permutation of all rows
    that depends on (seed, e) alone, so any process, and any restart, computes its own part.
    """
    if num_questions < 1 or position < 0 or count < 0:
        raise ValueError(
            f"question_rows: position {position} and count {count} must not be negative, "
            f"and num_questions {num_questions} not below 1"
        )
    parts = []
    while count > 0:
        epoch, start = divmod(position, num_questions)
        order = np.random.default_rng([seed, epoch]).permutation(num_questions)
        taken = order[start : start + count]
        parts.append(taken)
        position, count = position + len(taken), count - len(taken)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _make_builder(config, k1: float, b: float) -> tuple[builder.RecordsBuilder, str]:
    """-> (the builder of the data set, the hash that names its folder)."""
    # Atlas: the hash is of the generator's arguments and code.
    if config.kind == "atlas":
        atlas_config = config.atlas
        questions = {
            "train": atlas_config.train_questions,
            "validation": atlas_config.validation_questions,
            "test": atlas_config.test_questions,
        }
        made = dict(
            seed=atlas_config.seed,
            entities=atlas_config.entities,
            k1=k1,
            b=b,
            shapes=tuple(atlas_config.shapes),
            # A split of no questions is left out.
            questions={split: count for split, count in questions.items() if count},
        )
        digest = _digest(
            made, atlas_kinds, atlas_grammar, atlas_facts, atlas_questions, atlas_world
        )
        builder_class, builder_config = atlas.Atlas, atlas.AtlasConfig(name=digest, **made)
    # Official files: the hash is of their paths, sizes and times, and of the code that reads them.
    elif config.kind in OFFICIAL:
        builder_class, folder = OFFICIAL[config.kind], pathlib.Path(config.path)
        if not config.path:
            raise FileNotFoundError(
                f"data.path is empty: set it to the folder of {builder_class.FORMAT.name}, "
                f"from {builder_class.FORMAT.address}"
            )
        check_choice("data.on_bad_row", config.on_bad_row)
        splits, corpora = official.find_inputs(builder_class.FORMAT, folder, config.corpus)
        files = rows.describe_files((*itertools.chain(*splits.values()), *corpora))
        digest = _digest(
            [files, len(corpora), config.on_bad_row],
            official,
            passages,
            row,
            rows,
            hotpotqa,
            stepsearch,
            inspect.getmodule(builder_class),
        )
        corpus = ",".join(str(path.resolve()) for path in corpora) if config.corpus else ""
        builder_config = official.OfficialConfig(
            name=digest,
            path=str(folder.resolve()),
            corpus=corpus,
            skip=config.on_bad_row == "skip",
        )
    else:
        raise ValueError(f"data.kind is {config.kind!r}; known are {', '.join(KINDS)}")
    verbosity = absl_logging.get_verbosity()
    # TFDS warns of every config that is made at run time, as all of these are.
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with _naming_damage(pathlib.Path(config.cache_dir) / builder_class.name / digest):
            dataset = builder_class(
                config=builder_config, data_dir=config.cache_dir, file_format="array_record"
            )
            return dataset, digest
    finally:
        absl_logging.set_verbosity(verbosity)


def _digest(made, *modules) -> str:
    """Name of a data set: a hash of its inputs and of the code that reads or makes it.

    A change of either makes a new data set instead of using a stale copy.
    """
    code = [inspect.getsource(module) for module in (builder, documents, schema, words, *modules)]
    return hashlib.sha256(json.dumps([made, code]).encode()).hexdigest()[:16]


def _prepare(dataset: tfds.core.DatasetBuilder, remake: Callable) -> tfds.core.DatasetBuilder:
    """The data set, stored.

    It is written to a temporary folder and renamed; if another process was faster, its copy is
    used. What killed processes left is removed once nobody has written to it for a day.
    """
    for leftover in pathlib.Path(dataset.data_path).parent.glob("incomplete.*"):
        with contextlib.suppress(OSError):  # another process has just finished it, or removed it
            changed = max(path.stat().st_mtime for path in (leftover, *leftover.rglob("*")))
            if time.time() - changed > LEFT_S:
                shutil.rmtree(leftover)
    if not pathlib.Path(dataset.data_path).is_dir():
        logger.info("making the data set %s", dataset.data_path)
    tfds.disable_progress_bar()
    try:
        # TFDS prints about downloads; there are none.
        with contextlib.redirect_stdout(io.StringIO()), naming_failures(dataset.data_path):
            dataset.download_and_prepare()
    except WriteError:
        raise
    except OSError:
        dataset = remake()
        if not dataset.is_prepared():
            raise
    return dataset
