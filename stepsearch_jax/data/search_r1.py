"""The training and test rows of Search-R1 (arXiv 2503.09516), Parquet files for verl.

A TFDS builder; StepSearch's processed rows have this form, too. A row: `question`, or a
`prompt[{role, content}]` that ends with "Question:" and the question; `golden_answers[…]`, or
`reward_model.ground_truth.target[…]`; `data_source`, its shape. Optionally,
`reward_model.ground_truth.search_keys[[query, …], …]` are accepted queries and
`extra_info.support_docs[{title, paragraph_text}, …]` gold documents (data/stepsearch.py). The
corpus is Search-R1's own, or another.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.data.stepsearch import make_sub_questions, read_documents, read_queries
from stepsearch_jax.records import Question

_MARK = "Question:"


def read_question(row: Row, split: str) -> Question:
    """The question of a row."""
    truth = row.object("reward_model").object("ground_truth") if row.has("reward_model") else None
    if row.has("golden_answers"):
        answers = row.answers("golden_answers")
    elif truth is None:
        raise row.fault("field 'golden_answers' is missing, and so is 'reward_model'")
    elif isinstance(truth.values.get("target"), str):
        answers = (truth.text("target"),)
    else:
        answers = truth.answers("target")
    queries = read_queries(truth, "search_keys") if truth and truth.has("search_keys") else []
    extra = row.object("extra_info") if row.has("extra_info") else None
    documents = read_documents(extra, "support_docs") if extra and extra.has("support_docs") else []
    return Question(
        uid=row.identifier("id", otherwise=split),
        question=_read_text(row),
        answer=answers[0],
        aliases=answers[1:],
        shape=row.text("data_source"),
        **make_sub_questions(queries, documents),
    )


def _read_text(row: Row) -> str:
    if row.has("question"):
        return row.text("question").strip()
    content = row.objects("prompt")[-1].text("content")
    _, mark, question = content.rpartition(_MARK)
    if not mark or not question.strip():
        raise row.fault(f"there is no 'question', and no question behind {_MARK!r} in the prompt")
    return question.strip()


FORMAT = Format(
    name="Search-R1",
    stems={split: (split,) for split in ("train", "validation", "test")},
    read_question=read_question,
    corpus_stems=("corpus", "wiki-18"),
    address="https://huggingface.co/datasets/PeterJinGo/nq_hotpotqa_train, "
    "and its corpus from https://huggingface.co/datasets/PeterJinGo/wiki-18-corpus",
)


class SearchR1(OfficialBuilder):
    """Search-R1's questions."""

    VERSION = tfds.core.Version("1.0.0")
    FORMAT = FORMAT
