"""What the data set builders share: questions are TFDS splits, the documents lie beside them.

The splits are array_record files, written and read without TensorFlow. The documents are no split:
TFDS holds a split in memory until it is complete, and cannot write more than 1 GB without
TensorFlow.
"""

from __future__ import annotations

import abc
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds

from stepsearch_jax.data.schema import COLUMNS, encode_question
from stepsearch_jax.records import Document, Question


class Records(NamedTuple):
    """Documents (id = row), the questions of each split, and the source files.

    `files`: name -> path and sha256. `unreadable`: split -> the number of rows that were left out,
    and the first faults.
    """

    documents: Sequence[Document]
    splits: dict[str, list[Question]]
    files: dict[str, dict[str, str]]
    unreadable: dict[str, tuple[int, list[str]]] = {}


class RecordsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the builders: a subclass makes the records, this class stores them.

    Counts are in `info.metadata`.
    """

    @abc.abstractmethod
    def make_records(self, folder: pathlib.Path) -> Records:
        """The whole data set; writes the documents into `folder` (data/documents.py)."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in COLUMNS}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # rows keep the order in which they were made
        )

    def _split_generators(self, dl_manager):
        documents, questions, files, unreadable = self.make_records(pathlib.Path(self.data_path))
        self.info.metadata["files"] = files
        self.info.metadata["documents"] = len(documents)
        self.info.metadata["splits"] = {
            split: {
                "questions": len(rows),
                "sub_questions": sum(len(row.sub_questions) for row in rows),
                "gold_documents": len({i for row in rows for i in row.gold_ids}),
                "missing_gold_documents": len(
                    {passage for row in rows for passage in row.missing_gold}
                ),
                "shapes": dict(sorted(Counter(row.shape for row in rows).items())),
                **_describe_unreadable(*unreadable.get(split, (0, []))),
            }
            for split, rows in questions.items()
        }
        return {split: enumerate(map(encode_question, rows)) for split, rows in questions.items()}

    def _generate_examples(self):
        raise NotImplementedError("_split_generators returns the examples")


def _describe_unreadable(count: int, faults: list[str]) -> dict:
    return {"unreadable_rows": count, "unreadable": faults} if count else {}
