"""HotpotQA (Yang et al., 2018) from its official rows, as a TFDS builder.

A row: `_id` (or `id`), `question, answer, type, supporting_facts[[title, sentence]],
context[[title, [sentences]]]`; or, as on the Hugging Face Hub, `supporting_facts{title[…],
sent_id[…]}, context{title[…], sentences[[…]]}`. Without `context` a corpus must hold the articles.
Rows name no sub-questions: the gold documents are those of the question as a whole.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Question
from stepsearch_jax.words import compose


def read_contexts(row: Row) -> dict[str, str]:
    """Title -> text of the passages of a row."""
    contexts = {}
    # "content": as in the metadata of FlashRAG's rows.
    for i, pair in enumerate(row.lists("context", ("title",), ("sentences", "content"))):
        match pair:
            case [str(title), [*sentences]] if all(
                isinstance(sentence, str) for sentence in sentences
            ):
                contexts[title] = " ".join(sentences)
            case _:
                raise row.fault(f"context[{i}] should be a title and a list of sentences")
    return contexts


def read_passages(row: Row) -> list[tuple[str, str]]:
    """The passages of a row that have a title and a text."""
    if not row.has("context"):
        raise row.fault(
            "field 'context' is missing: the row brings no passages; set data.corpus to files "
            "that hold the articles"
        )
    return [
        (title, text)
        for title, text in read_contexts(row).items()
        if title.strip() and text.strip()
    ]


def read_gold(row: Row) -> dict[str, str]:
    """Title -> text of the gold documents, in the order of the facts.

    The text is "" if no context has this title.
    """
    contexts, gold = read_contexts(row) if row.has("context") else {}, {}
    texts = {compose(title): text for title, text in contexts.items()}
    for i, fact in enumerate(row.lists("supporting_facts", ("title",), ("sent_id",))):
        match fact:
            case [str(title), int() | str() as number] if str(number).isdecimal():
                gold[title] = texts.get(compose(title), "")
            case _:
                raise row.fault(f"supporting_facts[{i}] should be a title and a number")
    if not gold:
        raise row.fault("'supporting_facts' is empty")
    return gold


def read_question(row: Row, split: str) -> Question:
    """The question of a row."""
    gold = tuple(read_gold(row).items())
    return Question(
        uid=row.identifier("_id", "id", otherwise=split),
        question=row.text("question"),
        answer=row.text("answer"),
        shape=row.text("type"),
        loose_missing_gold=gold,
    )


FORMAT = Format(
    name="HotpotQA",
    stems={
        "train": ("train", "hotpot_train_v1.1"),
        "validation": ("validation", "dev", "hotpot_dev_distractor_v1"),
    },
    read_question=read_question,
    read_passages=read_passages,
    address="http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_train_v1.1.json, "
    "and hotpot_dev_distractor_v1.json beside it (CC BY-SA 4.0)",
)


class HotpotQA(OfficialBuilder):
    """HotpotQA, distractor setting."""

    VERSION = tfds.core.Version("1.0.0")
    FORMAT = FORMAT
