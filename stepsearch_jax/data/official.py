"""What the TFDS builders of data sets with official files share.

Each data set says how to read one row; see musique.py, hotpotqa.py, …
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from stepsearch_jax.data.builder import Records, RecordsBuilder
from stepsearch_jax.data.documents import write_documents
from stepsearch_jax.data.passages import Seen, locate_gold, read_corpus
from stepsearch_jax.data.rows import Row, find_files, hash_file, read_rows
from stepsearch_jax.records import Question

CORPUS_STEMS = ("corpus",)
SHOWN_FAULTS = 3  # of the rows that are left out, whose faults are kept


@dataclasses.dataclass(frozen=True)
class Format:
    """The official files of a data set.

    stems: for each split, the names that its file may have, without ending.
    read_question(row, split): the question of a row; all its gold documents count as missing,
    because no corpus has been searched yet.
    read_passages(row): title and text of the passages that a row brings; None: rows bring none.
    address: where to get the files, and their licence.
    """

    name: str
    stems: dict[str, tuple[str, ...]]
    read_question: Callable[[Row, str], Question]
    address: str
    read_passages: Callable[[Row], Iterable[tuple[str, str]]] | None = None
    corpus_stems: tuple[str, ...] = CORPUS_STEMS


@dataclasses.dataclass(kw_only=True)
class OfficialConfig(tfds.core.BuilderConfig):
    """`path`: the folder with the official files; `corpus`, `skip`: as in `read_files`.

    Two configs of different content need different names.
    """

    path: str
    corpus: str
    skip: bool = False


class OfficialBuilder(RecordsBuilder, skip_registration=True):
    """Base of the builders: the splits that have a file, and the corpus."""

    FORMAT: Format

    def make_records(self, written_to: pathlib.Path) -> Records:
        config = self.builder_config
        folder = pathlib.Path(config.path)
        return read_files(self.FORMAT, folder, written_to, config.corpus, config.skip)


def find_inputs(
    form: Format, folder: pathlib.Path, corpus: str = ""
) -> tuple[dict[str, list[pathlib.Path]], list[pathlib.Path]]:
    """-> (the file of each split that has one, or its shards; the files of the corpus).

    corpus: comma-separated files; "": the one beside the splits, or its shards, or none if the
    rows bring their own passages. Raises FileNotFoundError when there is no split or no corpus or a
    shard is missing, ValueError when a file exists twice.
    """
    splits = {
        split: paths for split, stems in form.stems.items() if (paths := find_files(folder, stems))
    }
    if not splits:
        *others, last = form.stems
        names = f"{', '.join(others)} or {last}" if others else last
        raise FileNotFoundError(
            f"no {names} file (.jsonl or .jsonl.gz, for example) in {folder}: "
            f"set data.path to the folder of {form.name}, from {form.address}"
        )
    paths = (
        [pathlib.Path(path) for path in corpus.split(",")]
        if corpus
        else find_files(folder, form.corpus_stems)
    )
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"the corpus {path} is not there: change data.corpus")
    if not paths and form.read_passages is None:
        raise FileNotFoundError(
            f"{form.name} brings no passages to search: put a corpus (corpus.jsonl, each row with "
            f"title and text) into {folder}, or set data.corpus to one"
        )
    return splits, paths


def read_files(
    form: Format,
    folder: pathlib.Path,
    written_to: pathlib.Path,
    corpus: str = "",
    skip: bool = False,
) -> Records:
    """Documents (id = row of the corpus) and the questions of each split that has a file.

    Without a corpus the documents are the rows' own passages, each once. The documents are written
    into the folder `written_to`. skip: leave out rows of questions that cannot be read. Raises
    FileNotFoundError as `find_inputs` does, and ValueError with file and line for a malformed row
    (with `skip`, if no row of a split can be read) or an empty file.
    """
    splits, corpora = find_inputs(form, folder, corpus)
    questions: dict[str, list[Question]] = {split: [] for split in splits}
    faults: dict[str, list[str]] = {split: [] for split in splits}
    own = _read_splits(form, splits, questions, faults, not corpora, skip)
    if corpora:
        for _ in own:  # no passages: the questions are read as it goes on
            pass
    documents = write_documents(read_corpus(corpora) if corpora else own, written_to)
    named = {
        f"{name} {n}" if n else name: path
        for name, paths in {**splits, "corpus": corpora}.items()
        for n, path in enumerate(paths)
    }
    return Records(
        documents,
        locate_gold(questions, documents),
        {name: {"path": str(path), "sha256": hash_file(path)} for name, path in named.items()},
        {split: (len(found), found[:SHOWN_FAULTS]) for split, found in faults.items()},
    )


def _read_splits(
    form: Format,
    splits: Mapping[str, Sequence[pathlib.Path]],
    questions: dict[str, list[Question]],
    faults: dict[str, list[str]],
    own: bool,
    skip: bool,
) -> Iterator[tuple[str, str]]:
    """The passages that the rows bring, each once, or none if not `own`.

    Adds to `questions`, and with `skip` to `faults` instead of raising the error.
    """
    seen = Seen()
    for split, paths in splits.items():
        note = lambda fault, found=faults[split]: found.append(str(fault))
        with contextlib.closing(_read_shards(paths, note if skip else None)) as rows:
            for row in rows:
                try:
                    question = form.read_question(row, split)
                    passages = list(form.read_passages(row)) if own and form.read_passages else []
                except ValueError as fault:
                    if not skip:
                        raise ValueError(
                            f"{fault} (data.on_bad_row=skip leaves out rows that cannot be read)"
                        ) from None
                    note(fault)
                    continue
                questions[split].append(question)
                yield from filter(seen.add, passages)
        if not questions[split]:
            raise ValueError(
                f"none of the {len(faults[split])} rows of split {split} can be read; "
                f"the first fault: {faults[split][0]}"
            )


def _read_shards(
    paths: Iterable[pathlib.Path], on_fault: Callable[[ValueError], None] | None
) -> Iterator[Row]:
    """The rows of a split, numbered through all its files."""
    before = 0
    for path in paths:
        last = 0
        with contextlib.closing(read_rows(path, on_fault)) as rows:
            for row in rows:
                last = row.number
                row.number += before
                yield row
        before += last
