"""One's own questions and corpus, in the form of `data.kind=jsonl`."""

import json

import pytest
from test_datasets import make_config, read_records

from stepsearch_jax.data import jsonl
from stepsearch_jax.data.loading import open_source
from stepsearch_jax.records import Question, SubQuestion

CORPUS = [
    {"title": "Harbour", "text": "The harbour was built by Ann."},
    {"title": "Ann", "text": "Ann is from Rome."},
    {"title": "Ann", "text": "Ann is a river."},
    {"title": "Rome", "text": "A city."},
]
FULL = {
    "id": 7,
    "question": "Where is the builder of the harbour from?",
    "answers": ["Rome", "Roma"],
    "shape": "bridge",
    "gold": ["Rome"],
    "sub_questions": [
        {"queries": ["who built the harbour", "harbour builder"], "gold": ["Harbour"]},
        {
            "question": "Where is Ann from?",
            "answer": "Rome",
            "queries": ["Ann's origin"],
            "gold": ["Ann is  from Rome.", {"title": "Ann", "text": "Ann is a river."}],
        },
    ],
}
PLAIN = {"question": "Who built the harbour?", "answer": "Ann"}


def write(folder, corpus=CORPUS, **splits):
    """Writes a folder of one's own data; a row may also be a line of text."""
    folder.mkdir(exist_ok=True)
    for name, rows in {"corpus": corpus, **splits}.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_every_field_arrives(tmp_path):
    records = read_records(jsonl.FORMAT, write(tmp_path / "mine", train=[FULL], test=[PLAIN]))
    assert [(d.id, d.title) for d in records.documents] == [
        (0, "Harbour"),
        (1, "Ann"),
        (2, "Ann"),
        (3, "Rome"),
    ]
    assert records.splits["train"] == [
        Question(
            uid="7",
            question="Where is the builder of the harbour from?",
            answer="Rome",
            aliases=("Roma",),
            shape="bridge",
            sub_questions=(
                SubQuestion(
                    question="who built the harbour",
                    answer="",
                    gold_ids=(0,),
                    queries=("who built the harbour", "harbour builder"),
                ),
                SubQuestion(
                    question="Where is Ann from?",
                    answer="Rome",
                    gold_ids=(1, 2),
                    queries=("Ann's origin",),
                ),
            ),
            loose_gold_ids=(3,),
        )
    ]
    assert records.splits["test"] == [
        Question(uid="test_0", question="Who built the harbour?", answer="Ann")
    ]


@pytest.mark.parametrize(
    "row", [PLAIN, PLAIN | {"answers": "Ann"}, {"question": PLAIN["question"], "answers": ["Ann"]}]
)
def test_an_answer_may_stand_alone(row, tmp_path):
    (question,) = read_records(jsonl.FORMAT, write(tmp_path / "mine", train=[row])).splits["train"]
    assert question.answers == ("Ann",) and question.gold_ids == question.sub_questions == ()


def test_a_gold_passage_that_is_no_single_one_is_missing(tmp_path):
    """Two documents are called "Ann"; nothing is called "Oslo" or says so."""
    row = PLAIN | {"gold": ["Ann", "Oslo", "Harbour"]}
    (question,) = read_records(jsonl.FORMAT, write(tmp_path / "mine", train=[row])).splits["train"]
    assert question.gold_ids == (0,) and question.missing_gold == (("", "Ann"), ("", "Oslo"))


def test_a_title_goes_before_a_text(tmp_path):
    corpus = [{"title": "A", "text": "Rome"}, {"title": "Rome", "text": "A city."}, CORPUS[0]]
    corpus += [{"title": "B", "text": corpus[2]["text"]}]
    row = PLAIN | {"gold": ["Rome", CORPUS[0]["text"]]}
    folder = write(tmp_path / "mine", corpus, train=[row])
    (question,) = read_records(jsonl.FORMAT, folder).splits["train"]
    assert question.gold_ids == (1, 2)  # of two documents with one text, the first


@pytest.mark.parametrize(
    "row,place",
    [
        ({"question": "Who?"}, "'answers' is missing"),
        ({"answer": "Ann"}, "'question' is missing"),
        (PLAIN | {"answers": []}, "'answers' should hold at least one"),
        (PLAIN | {"answers": ["Ann", " "]}, "'answers' should hold no empty"),
        (PLAIN | {"answers": [1]}, "'answers' should hold strings"),
        (PLAIN | {"gold": [3]}, r"gold\[0\]"),
        (PLAIN | {"gold": [{"title": "Ann"}]}, r"gold\[0\].*'text'"),
        *((PLAIN | {"gold": gold}, r"gold\[0\]") for gold in (0, False, {}, "")),
        *((PLAIN | {"sub_questions": steps}, "sub_questions") for steps in (0, False, {}, "")),
        (PLAIN | {"id": True}, "True in 'id'"),
        (PLAIN | {"sub_questions": ["Who?"]}, r"sub_questions\[0\] should be an object"),
        (PLAIN | {"sub_questions": [{"gold": ["Ann"]}]}, r"sub_questions\[0\].*'queries'"),
        (PLAIN | {"sub_questions": [{"queries": [""]}]}, r"sub_questions\[0\].*'queries'"),
        (PLAIN | {"sub_questions": [{"queries": "who"}]}, r"sub_questions\[0\].*should be list"),
        ('{"question": "Who?"', "not JSON"),
    ],
    ids=str,
)
def test_a_wrong_row_is_named(row, place, tmp_path):
    folder = write(tmp_path / "mine", train=[PLAIN, row])
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 2.*{place}"):
        read_records(jsonl.FORMAT, folder)


def test_what_is_missing_is_named(tmp_path):
    folder = write(tmp_path / "mine", train=[PLAIN])
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl.*title and text"):
        read_records(jsonl.FORMAT, folder)
    write(folder, corpus=[{"title": "Ann"}])
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 1.*'text'"):
        read_records(jsonl.FORMAT, folder)
    (folder / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no train, validation or test file"):
        read_records(jsonl.FORMAT, folder)


def test_it_is_a_data_kind(tmp_path):
    folder = write(tmp_path / "mine", train=[FULL, PLAIN], validation=[PLAIN])
    config = make_config(tmp_path, kind="jsonl", path=str(folder))
    source = open_source(config, 0.9, 0.4)
    assert source.splits["train"][0].gold_ids == (0, 1, 2, 3)
    assert source.manifest["splits"]["train"]["gold_documents"] == 4
