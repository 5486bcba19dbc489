"""Atlas as a TFDS builder: the embedded synthetic worlds of atlas_world.py, stored."""

from __future__ import annotations

import dataclasses
import pathlib

import tensorflow_datasets as tfds

from stepsearch_jax.data.atlas_world import make_worlds
from stepsearch_jax.data.builder import Records, RecordsBuilder
from stepsearch_jax.data.documents import write_documents


@dataclasses.dataclass(kw_only=True)
class AtlasConfig(tfds.core.BuilderConfig):
    """The arguments of `make_worlds`. Two configs of different content need different names."""

    seed: int
    entities: int
    k1: float
    b: float
    shapes: tuple[str, ...]
    questions: dict[str, int]


class Atlas(RecordsBuilder):
    """Synthetic multi-hop worlds; splits train, validation and test."""

    VERSION = tfds.core.Version("1.0.0")

    def make_records(self, folder: pathlib.Path) -> Records:
        c = self.builder_config
        documents, splits = make_worlds(
            seed=c.seed,
            entities=c.entities,
            k1=c.k1,
            b=c.b,
            shapes=c.shapes,
            questions=c.questions,
        )
        return Records(
            write_documents(((document.title, document.text) for document in documents), folder),
            splits,
            {},
        )
