"""The training and test rows of Search-R1 (arXiv 2503.09516), Parquet files for verl.

A TFDS builder; StepSearch's processed rows have this form, too. A row: `question`, or
`extra_info.question`, or a `prompt[{role, content}]` that ends with an instruction, "Question:" and
the question; `golden_answers[…]`, or `reward_model.ground_truth`, or its `target`, each one answer
or several, texts or numbers. Optionally, `data_source` is its shape,
`reward_model.ground_truth.search_keys[[query, …], …]` are accepted queries, and gold documents are
`extra_info.support_docs[{title, paragraph_text}, …]` (data/stepsearch.py) or the supporting facts
in FlashRAG's `metadata`, as HotpotQA has them (data/hotpotqa.py). The corpus is Search-R1's own, or
another.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from stepsearch_jax.data import hotpotqa
from stepsearch_jax.data.official import Format, OfficialBuilder
from stepsearch_jax.data.rows import Row
from stepsearch_jax.data.stepsearch import make_sub_questions, read_documents, read_queries
from stepsearch_jax.records import Question

_MARK = "Question:"


def read_question(row: Row, split: str) -> Question:
    """The question of a row."""
    model = row.object("reward_model") if row.has("reward_model") else None
    # Without a `target`, the ground truth is the answer itself.
    truth = model.object("ground_truth") if model and _holds_object(model, "ground_truth") else None
    if row.has("golden_answers"):
        answers = row.texts_or_numbers("golden_answers")
    elif truth:
        answers = truth.texts_or_numbers("target")
    elif model:
        answers = model.texts_or_numbers("ground_truth")
    else:
        raise row.fault("field 'golden_answers' is missing, and so is 'reward_model'")
    queries = read_queries(truth, "search_keys") if truth and truth.has("search_keys") else []
    extra = row.object("extra_info") if row.has("extra_info") else None
    documents = read_documents(extra, "support_docs") if extra and extra.has("support_docs") else []
    parts = make_sub_questions(queries, documents)
    if not documents:
        parts["loose_missing_gold"] = _read_facts(row)
    return Question(
        uid=row.identifier("id", otherwise=split),
        question=_read_text(row, extra),
        answer=answers[0],
        aliases=answers[1:],
        shape=row.text("data_source") if row.has("data_source") else "",
        **parts,
    )


def _holds_object(row: Row, name: str) -> bool:
    return isinstance(row.values.get(name), dict) or row.holds_json(name)


def _read_facts(row: Row) -> tuple[tuple[str, str], ...]:
    """Title and text of the gold documents in FlashRAG's metadata; other metadata have none."""
    if not _holds_object(row, "metadata"):
        return ()
    facts = row.object("metadata")
    if not facts.has("supporting_facts") or not facts.get("supporting_facts", list):
        return ()
    return tuple(hotpotqa.read_gold(facts).items())


def _read_text(row: Row, extra: Row | None) -> str:
    if row.has("question"):
        return row.text("question").strip()
    if extra and extra.has("question"):
        return extra.text("question").strip()
    content = row.objects("prompt")[-1].text("content")
    # The instruction of Search-R1 holds no mark, but the question may.
    _, mark, question = content.partition(_MARK)
    if not mark or not question.strip():
        raise row.fault(
            f"there is no 'question', and no question behind {_MARK!r} in the prompt: add one"
        )
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
