"""Atlas as a TFDS builder: stores the synthetic worlds of atlas_world.py."""

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
        config = self.builder_config
        documents, splits = make_worlds(
            seed=config.seed,
            entities=config.entities,
            k1=config.k1,
            b=config.b,
            shapes=config.shapes,
            questions=config.questions,
        )
        passages = ((document.title, document.text) for document in documents)
        return Records(write_documents(passages, folder), splits, files={})
