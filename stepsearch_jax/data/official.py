"""What the TFDS builders of data sets with official files share.

Each data set says how to read one row; see musique.py, hotpotqa.py, …
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator

import tensorflow_datasets as tfds

from stepsearch_jax.data.builder import Records, RecordsBuilder
from stepsearch_jax.data.documents import write_documents
from stepsearch_jax.data.passages import Seen, locate_gold, read_corpus
from stepsearch_jax.data.rows import Row, find_file, hash_file, read_rows
from stepsearch_jax.records import Question

CORPUS_STEMS = ("corpus",)


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
    """`path`: the folder with the official files; `corpus`: as in `find_inputs`.

    Two configs of different content need different names.
    """

    path: str
    corpus: str


class OfficialBuilder(RecordsBuilder, skip_registration=True):
    """Base of the builders: the splits that have a file, and the corpus."""

    FORMAT: Format

    def make_records(self, written_to: pathlib.Path) -> Records:
        config = self.builder_config
        return read_files(self.FORMAT, pathlib.Path(config.path), written_to, config.corpus)


def find_inputs(
    form: Format, folder: pathlib.Path, corpus: str = ""
) -> tuple[dict[str, pathlib.Path], list[pathlib.Path]]:
    """-> (the file of each split that has one, the files of the corpus).

    corpus: comma-separated files; "": the one beside the splits, or none if the rows bring their
    own passages. Raises FileNotFoundError when there is no split or no corpus, ValueError when a
    file exists twice.
    """
    splits = {
        split: path for split, stems in form.stems.items() if (path := find_file(folder, stems))
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
        else [path for path in [find_file(folder, form.corpus_stems)] if path]
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
    form: Format, folder: pathlib.Path, written_to: pathlib.Path, corpus: str = ""
) -> Records:
    """Documents (id = row of the corpus) and the questions of each split that has a file.

    Without a corpus the documents are the rows' own passages, each once. The documents are written
    into the folder `written_to`. Raises FileNotFoundError as `find_inputs` does, and ValueError
    with file and line for a malformed row or an empty file.
    """
    splits, corpora = find_inputs(form, folder, corpus)
    questions = {}
    for split, path in splits.items():
        with contextlib.closing(read_rows(path)) as rows:
            questions[split] = [form.read_question(row, split) for row in rows]
    found = read_corpus(corpora) if corpora else _read_own_passages(form, splits.values())
    documents = write_documents(found, written_to)
    named = {**splits, **{f"corpus {n}" if n else "corpus": path for n, path in enumerate(corpora)}}
    return Records(
        documents,
        locate_gold(questions, documents),
        {name: {"path": str(path), "sha256": hash_file(path)} for name, path in named.items()},
    )


def _read_own_passages(form: Format, paths: Iterable[pathlib.Path]) -> Iterator[tuple[str, str]]:
    seen = Seen()
    for path in paths:
        with contextlib.closing(read_rows(path)) as rows:
            yield from (
                passage for row in rows for passage in form.read_passages(row) if seen.add(passage)
            )
