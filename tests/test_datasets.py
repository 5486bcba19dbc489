"""Stored records come back unchanged; MuSiQue rows, and bad ones refused with file and line."""

import copy
import gzip
import json
import pathlib
import subprocess
import sys
import tempfile

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsearch_jax.data import musique
from stepsearch_jax.data.atlas_world import make_worlds
from stepsearch_jax.data.loading import load_source
from stepsearch_jax.data.official import read_files
from stepsearch_jax.data.schema import COLUMNS, decode_question, encode_question
from stepsearch_jax.records import Document, Question, SubQuestion

REPO = pathlib.Path(__file__).resolve().parents[1]
texts = st.text(st.characters(codec="utf-8"), max_size=8)
tuples = st.lists(texts, max_size=3).map(tuple)
ids = st.lists(st.integers(0, 9), max_size=2).map(tuple)
passages = st.lists(st.tuples(texts, texts), max_size=2).map(tuple)
subs = st.lists(
    st.builds(
        SubQuestion,
        question=texts,
        answer=texts,
        aliases=tuples,
        gold_ids=ids,
        queries=tuples,
        missing_gold=passages,
    ),
    max_size=3,
).map(tuple)
questions = st.builds(
    Question,
    uid=texts,
    question=texts,
    answer=texts,
    aliases=tuples,
    sub_questions=subs,
    shape=texts,
    loose_gold_ids=ids,
    loose_missing_gold=passages,
    unordered=st.booleans(),
)


def read_records(form, folder, corpus=""):
    """Documents, as a list, questions and files of a data set."""
    with tempfile.TemporaryDirectory() as stored:
        records = read_files(form, folder, pathlib.Path(stored), corpus)
        return records._replace(documents=list(records.documents))


def read_musique(folder):
    return read_records(musique.FORMAT, folder)[:2]


@settings(max_examples=60, deadline=None)
@given(questions)
def test_rows_hold_everything(question):
    row = encode_question(question)
    assert tuple(row) == COLUMNS and all(isinstance(value, str) for value in row.values())
    assert decode_question(row) == question
    assert decode_question({name: value.encode() for name, value in row.items()}) == question


# Two rows that share a paragraph. Row 2 is a chain: #1 and #2 stand for earlier answers; #40 is
# part of the text.
PARAGRAPHS = [
    {"idx": 0, "title": "Harbour", "paragraph_text": "The harbour  was built by Ann.\n"},
    {"idx": 1, "title": "Ann", "paragraph_text": "Ann is from Rome."},
    {"idx": 2, "title": "Other", "paragraph_text": "Nothing."},
]
TWO_HOP = {
    "id": "2hop__1_2",
    "question": "Where is the builder of the harbour from?",
    "answer": "Rome",
    "answer_aliases": ["Roma"],
    "answerable": True,
    "paragraphs": PARAGRAPHS,
    "question_decomposition": [
        {
            "id": 1,
            "question": "Who built the harbour?",
            "answer": "Ann",
            "paragraph_support_idx": 0,
        },
        {"id": 2, "question": "Where is #1 from?", "answer": "Rome", "paragraph_support_idx": 1},
    ],
}
THREE_HOP = {
    "id": "3hop1__1_2_3",
    "question": "Who rules there?",
    "answer": "Leo",
    "answer_aliases": [],
    "answerable": True,
    "paragraphs": [
        *PARAGRAPHS[:2],
        {"idx": 7, "title": "Rome", "paragraph_text": "Leo rules Rome."},
    ],
    "question_decomposition": [
        *TWO_HOP["question_decomposition"],
        {
            "id": 3,
            "question": "Who rules #2, home of #1, since the #40 hit?",
            "answer": "Leo",
            "paragraph_support_idx": 7,
        },
    ],
}


def write_rows(path, rows):
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")
    with opened as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def test_musique_by_hand_without_a_corpus(tmp_path):
    write_rows(tmp_path / "train.jsonl", [TWO_HOP])
    write_rows(tmp_path / "validation.jsonl.gz", [THREE_HOP])
    documents, splits = read_musique(tmp_path)
    # All paragraphs once, in the order of train, validation: Harbour, Ann, Other, Rome.
    titles = ["Harbour", "Ann", "Other", "Rome"]
    assert [(document.id, document.title) for document in documents] == [*enumerate(titles)]
    assert documents[0].text == "The harbour  was built by Ann.\n"
    (question,), (chain,) = splits["train"], splits["validation"]
    assert question == Question(
        "2hop__1_2",
        "Where is the builder of the harbour from?",
        "Rome",
        ("Roma",),
        (
            SubQuestion("Who built the harbour?", "Ann", (), (0,), ("Who built the harbour?",)),
            SubQuestion("Where is Ann from?", "Rome", ("Roma",), (1,), ("Where is Ann from?",)),
        ),
        "2hop",
    )
    assert chain.shape == "3hop1" and chain.gold_ids == (0, 1, 3)
    assert chain.sub_questions[2].queries == ("Who rules Rome, home of Ann, since the #40 hit?",)


def test_musique_gold_is_found_in_the_corpus_up_to_whitespace(tmp_path):
    write_rows(tmp_path / "validation.jsonl", [TWO_HOP])
    corpus = [
        {"id": "x", "title": "Noise", "text": "Noise."},
        {"id": "y", "title": " Ann", "text": "Ann  is from\tRome."},
        {"id": "y2", "title": "Ann", "text": "Ann is from Rome."},
        {"id": "z", "title": "Harbour", "text": "The harbour was built by Ann."},
        {"id": "w", "title": "Harbour", "text": "Another harbour."},
    ]
    write_rows(tmp_path / "corpus.jsonl.gz", corpus)
    documents, splits = read_musique(tmp_path)
    expected = [Document(i, row["title"], row["text"]) for i, row in enumerate(corpus)]
    assert documents == expected
    assert splits["validation"][0].gold_ids == (3, 1)  # by title and text; of equal rows the first


def test_a_gold_paragraph_that_the_corpus_lacks_is_kept_as_missing(tmp_path):
    write_rows(tmp_path / "train.jsonl", [TWO_HOP])
    corpus = [
        {"title": "Harbour", "text": "The harbour was built by Ann."},
        {"title": "Ann", "text": "Another Ann."},
    ]
    write_rows(tmp_path / "corpus.jsonl", corpus)
    (question,) = read_musique(tmp_path)[1]["train"]
    assert [sub.gold_ids for sub in question.sub_questions] == [(0,), ()]
    assert question.gold_ids == (0,)
    lacking = (("Ann", "Ann is from Rome."),)
    assert question.sub_questions[1].missing_gold == question.missing_gold == lacking


HOPS, SUPPORT = "question_decomposition", "paragraph_support_idx"


def change(path, value):
    """TWO_HOP with the value at `path` replaced, or removed if `value` is KeyError."""
    row = inner = copy.deepcopy(TWO_HOP)
    for name in path[:-1]:
        inner = inner[name]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(row)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "2hop', "not JSON"),
        ('["a"]', "not list"),
        (change(["question"], KeyError), "'question' is missing"),
        (change(["question"], " "), "'question' is empty"),
        (change(["answer"], 7), "'answer' .*str, not int"),
        (change(["answer_aliases"], "Roma"), "'answer_aliases' .*list, not str"),
        (change(["answer_aliases"], [1]), "'answer_aliases' .*strings"),
        (change(["answer_aliases"], [""]), "'answer_aliases' .*empty"),
        (change(["paragraphs"], []), "'paragraphs' is empty"),
        (change(["paragraphs", 2, "idx"], 1), r"paragraphs\[2\]: idx 1 "),
        (change(["paragraphs", 1], "Ann"), r"paragraphs\[1\] .*object, not str"),
        (change(["paragraphs", 1, "title"], KeyError), r"paragraphs\[1\]: .*'title' is missing"),
        (change([HOPS], []), f"'{HOPS}' is empty"),
        (change([HOPS, 1, SUPPORT], None), rf"{HOPS}\[1\]: .*'{SUPPORT}' .*int, not NoneType"),
        (change([HOPS, 1, SUPPORT], True), rf"{HOPS}\[1\]: .*'{SUPPORT}' .*int, not bool"),
        (change([HOPS, 1, SUPPORT], 5), rf"{HOPS}\[1\]: {SUPPORT} 5 "),
        (change(["answerable"], False), "not answerable"),
    ],
)
def test_a_malformed_row_names_file_line_and_fault(tmp_path, line, message):
    # The empty line counts as a line.
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(TWO_HOP)}\n\n{line}\n")
    corpus = [{"title": row["title"], "text": row["paragraph_text"]} for row in PARAGRAPHS]
    write_rows(tmp_path / "corpus.jsonl", corpus)
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 3.*{message}"):
        read_musique(tmp_path)


def test_malformed_corpus_empty_corpus_empty_split_and_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train, validation or test .*data\.path"):
        read_musique(tmp_path)
    write_rows(tmp_path / "train.jsonl", [TWO_HOP])
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"corpus\.jsonl: .*empty"):
        read_musique(tmp_path)
    write_rows(tmp_path / "corpus.jsonl", [{"title": "Ann"}])
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 1: .*'text'"):
        read_musique(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    (tmp_path / "validation.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"validation\.jsonl: .*empty"):
        read_musique(tmp_path)
    write_rows(tmp_path / "train.jsonl.gz", [TWO_HOP])
    with pytest.raises(ValueError, match=r"train\.jsonl and .*train\.jsonl\.gz"):
        read_musique(tmp_path)


def make_config(tmp_path, **changes):
    atlas = dict(
        seed=1,
        entities=80,
        shapes=("2hop", "3hop_join"),
        train_questions=12,
        validation_questions=0,
        test_questions=6,
    )
    config = dict(
        kind="atlas",
        path="",
        corpus="",
        on_bad_row="refuse",
        cache_dir=str(tmp_path / "cache"),
        train_split="train",
        train_questions=0,
        atlas=atlas,
    )
    return ml_collections.ConfigDict({**config, **changes})


def test_atlas_comes_back_from_disk_as_it_was_made(tmp_path):
    wanted = {"train": 12, "test": 6}
    shapes = ("2hop", "3hop_join")
    documents, splits = make_worlds(
        seed=1, entities=80, k1=0.9, b=0.4, shapes=shapes, questions=wanted
    )
    gold = {
        "gold_documents": len({i for question in splits["test"] for i in question.gold_ids}),
        "missing_gold_documents": 0,
    }
    for _ in range(2):  # built, then read
        source = load_source(make_config(tmp_path), k1=0.9, b=0.4)
        assert list(source.documents) == documents and set(source.splits) == {"train", "test"}
        assert {name: list(rows) for name, rows in source.splits.items()} == splits
        assert source.manifest["documents"] == len(documents)
        assert source.manifest["splits"]["test"] == {
            "questions": 6,
            "sub_questions": 15,
            "shapes": {"2hop": 3, "3hop_join": 3},
            **gold,
        }
    # Random access, from the end and by slice.
    assert source.documents[-1] == documents[-1]
    assert source.splits["train"][3:5] == splits["train"][3:5]
    with pytest.raises(IndexError):
        source.documents[len(documents)]


@pytest.mark.slow
def test_real_musique_every_gold_paragraph_is_found(shared_data):
    documents, splits = read_musique(shared_data / "musique")
    assert len(documents) == 13_196
    counts = {name: len(rows) for name, rows in splits.items()}
    assert counts == {"train": 1055, "validation": 200}
    subs = [sub for rows in splits.values() for question in rows for sub in question.sub_questions]
    assert len(subs) == 2774 + 475
    assert all(len(sub.gold_ids) == 1 and "#1" not in sub.question for sub in subs)
    # Nearly every gold paragraph holds its sub-question's answer: gold ids point at the right rows.
    gold = [documents[sub.gold_ids[0]] for sub in subs]
    held = sum(
        sub.answer.lower() in f"{document.title} {document.text}".lower()
        for sub, document in zip(subs, gold)
    )
    assert held / len(subs) > 0.8


def test_reading_needs_neither_tensorflow_nor_jax(tmp_path):
    """From a file to records, through the builder, in a process of its own."""
    write_rows(tmp_path / "train.jsonl", [TWO_HOP])
    config = make_config(tmp_path, kind="musique", path=str(tmp_path)).to_dict()
    code = (
        "import sys, ml_collections; from stepsearch_jax.data.loading import load_source\n"
        f"source = load_source(ml_collections.ConfigDict({config!r}), k1=0.9, b=0.4)\n"
        "print(source.splits['train'][0].answer, len(source.documents),\n"
        "      sorted({'jax', 'tensorflow'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": str(REPO), "HOME": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert out.stdout.strip().endswith("Rome 3 []"), out.stdout + out.stderr
