"""Passages are found by title and text, white space ignored; several files become one corpus."""

import json

import pytest

from stepsearch_jax.data import passages as module
from stepsearch_jax.data.passages import Seen, locate_gold, read_corpus, read_passage
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Document, Question, SubQuestion


def locate(passages, *gold):
    """-> ids of the gold passages that are there, and the others."""
    question = Question("q", "?", "a", loose_missing_gold=gold)
    documents = [Document(i, title, text) for i, (title, text) in enumerate(passages)]
    (found,) = locate_gold({"s": [question]}, documents)["s"]
    return found.loose_gold_ids, found.loose_missing_gold


def test_gold_is_found_by_title_and_text():
    passages = [
        ("Ann", "Ann is  from\nRome."),
        ("Bob", "One."),
        ("Bob", "Two."),
        ("Ann", "Ann is from Rome."),
        ("Cid", "x"),
    ]
    # Row 0: the first of equal ones.
    rows = {("Ann ", "Ann is from Rome."): 0, ("Bob", "Two ."): 2, ("Cid", ""): 4}
    for gold, row in rows.items():
        assert locate(passages, gold) == ((row,), ())
    # "": by title alone, and only if no other document has it. White space is ignored, but is a
    # text.
    for gold in (
        ("Bob", "Three."),
        ("Bo", "bTwo."),
        ("bob", "Two."),
        ("Bob", ""),
        ("Ann", ""),
        ("Dan", ""),
        ("Cid", " "),
    ):
        assert locate(passages, gold) == ((), (gold,))
    several = (("Cid", ""), ("Dan", "y"), ("Cid", "x"), ("Bob", "One."), ("Dan", "y"))
    assert locate(passages, *several) == ((4, 1), (("Dan", "y"),))


def test_missing_gold_is_found_beside_what_was_found_before():
    question = Question(
        "q",
        "?",
        "a",
        sub_questions=(
            SubQuestion("s", "a", gold_ids=(0,), missing_gold=(("B", "b"), ("C", "c"))),
        ),
        loose_gold_ids=(0,),
        loose_missing_gold=(("D", ""),),
    )
    documents = [Document(i, title, title.lower()) for i, title in enumerate("ADC")]
    (found,), nothing = locate_gold({"a": [question], "b": []}, documents).values()
    assert found.sub_questions[0].gold_ids == (0, 2)
    assert found.sub_questions[0].missing_gold == (("B", "b"),)
    assert found.loose_gold_ids == (0, 1) and found.loose_missing_gold == () and nothing == []
    assert found.gold_ids == (0, 2, 1) and found.missing_gold == (("B", "b"),)


def test_passages_are_seen_once(monkeypatch):
    """White space is ignored, also for digests in the sorted array.

    A digest that ends in a zero counts like any other.
    """
    monkeypatch.setattr(module, "_UNSORTED", 7)
    real, seen = module._digest, Seen()
    special = {("0", "x"): b"a" * 15, ("1", "x"): b"a" * 14 + b"\0b"}
    monkeypatch.setattr(module, "_digest", lambda passage: special.get(passage) or real(passage))
    for n in range(2):
        assert [seen.add((str(i), "x")) for i in range(40)] == [n == 0] * 40
    assert ("3 ", " x") in seen and ("3", "x ") in seen
    assert ("3x", "") not in seen and ("40", "x") not in seen


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"title": "A", "text": "a", "contents": '"B"\nb'}, ("A", "a")),
        ({"title": "A", "article": "# a"}, ("A", "# a")),
        ({"contents": '"A "b" c"\ntext\nmore'}, ('A "b" c', "text\nmore")),
        ({"id": 0, "contents": "A\ntext"}, ("A", "text")),
        ({"contents": '"Heroes" (album)\ntext'}, ('"Heroes" (album)', "text")),
        ({"contents": 'Toys "R" "Us"\ntext'}, ('Toys "R" "Us"', "text")),
        ({"contents": '""Heroes" (album)"\nx'}, ('"Heroes" (album)', "x")),
        ({"contents": '""Heroes" and "Low""\ntext'}, ('"Heroes" and "Low"', "text")),
    ],
)
def test_forms_of_a_corpus_row(row, expected):
    assert read_passage(Row(row, "f, line 1", 1)) == expected


@pytest.mark.parametrize(
    "row, message",
    [
        ({"title": "A"}, "'text'"),
        ({"text": "a"}, "'title'"),
        ({"contents": "no title"}, "'contents'"),
        ({"contents": '""\ntext'}, "'contents'"),
        ({"contents": "A\n "}, "'contents'"),
        ({"contents": "\t\ntext"}, "'contents'"),
    ],
)
def test_malformed_corpus_rows(row, message):
    with pytest.raises(ValueError, match=f"f, line 1: .*{message}"):
        read_passage(Row(row, "f, line 1", 1))


def test_several_files_become_one_corpus(tmp_path):
    files = {"a": ["A", "B", "A"], "b": ["C", "A ", "C"], "c": ["C", "D"]}
    paths = []
    for name, titles in files.items():
        paths.append(tmp_path / f"{name}.jsonl")
        lines = [json.dumps({"title": title, "text": "x"}) + "\n" for title in titles]
        paths[-1].write_text("".join(lines))
    # The first file as it is; of the others what no file before them holds.
    assert [title for title, _ in read_corpus(paths)] == ["A", "B", "A", "C", "C", "D"]
