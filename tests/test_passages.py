"""Passages are found by title and text whatever their white space; the corpora of several files become one."""
import json

import pytest

from stepsearch_jax.data.passages import Passages, read_corpus, read_passage
from stepsearch_jax.data.rows import Row
from stepsearch_jax.records import Document, Question, SubQuestion


def make_passages(*pairs):
    return Passages(Document(i, title, text) for i, (title, text) in enumerate(pairs))


def test_found_by_title_and_text():
    passages = make_passages(("Ann", "Ann is  from\nRome."), ("Bob", "One."), ("Bob", "Two."), ("Ann", "Ann is from Rome."))
    assert passages.find("Ann ", "Ann is from Rome.") == 0  # the first of equal ones
    assert passages.find("Bob", "Two .") == 2 and passages.find("Bob", "Three.") is None and passages.find("Bo", "bTwo.") is None
    assert passages.find("bob", "Two.") is None
    # By title alone only where no other document has it.
    assert passages.find("Bob", "") is None and passages.add("Cid", "x") == 4 and passages.find("Cid", "") == 4
    assert [document.id for document in passages.documents] == [0, 1, 2, 3, 4]
    assert passages.sort_gold([("Cid", ""), ("Dan", "y"), ("Cid", "x"), ("Bob", "One."), ("Dan", "y")]) == ((4, 1), (("Dan", "y"),))


def test_missing_gold_is_found_in_a_larger_corpus():
    question = Question("q", "?", "a", sub_questions=(SubQuestion("s", "a", gold_ids=(0,), missing_gold=(("B", "b"), ("C", "c"))),),
                        loose_gold_ids=(0,), loose_missing_gold=(("D", ""),))
    found = make_passages(("A", "a"), ("D", "d"), ("C", "c")).find_missing(question)
    assert found.sub_questions[0].gold_ids == (0, 2) and found.sub_questions[0].missing_gold == (("B", "b"),)
    assert found.loose_gold_ids == (0, 1) and found.loose_missing_gold == ()
    assert found.gold_ids == (0, 2, 1) and found.missing_gold == (("B", "b"),)


@pytest.mark.parametrize("row, expected", [
    ({"title": "A", "text": "a", "contents": '"B"\nb'}, ("A", "a")),
    ({"title": "A", "article": "# a"}, ("A", "# a")),
    ({"contents": '"A "b" c"\ntext\nmore'}, ('A "b" c', "text\nmore")),
    ({"id": 0, "contents": "A\ntext"}, ("A", "text")),
    ({"contents": '"Heroes" (album)\ntext'}, ('"Heroes" (album)', "text")), ({"contents": 'Toys "R" "Us"\ntext'}, ('Toys "R" "Us"', "text")),
    ({"contents": '""Heroes" (album)"\nx'}, ('"Heroes" (album)', "x")), ({"contents": '""Heroes" and "Low""\ntext'}, ('"Heroes" and "Low"', "text")),
])
def test_forms_of_a_corpus_row(row, expected):
    assert read_passage(Row(row, "f, line 1", 1)) == expected


@pytest.mark.parametrize("row, message", [
    ({"title": "A"}, "field 'text' is missing"), ({"text": "a"}, "field 'title' is missing"), ({"contents": "no title"}, "'contents' should be a title"),
    ({"contents": '""\ntext'}, "'contents' should be"), ({"contents": "A\n "}, "'contents' should be"),
    ({"contents": "\t\ntext"}, "'contents' should be"),
])
def test_malformed_corpus_rows(row, message):
    with pytest.raises(ValueError, match=f"f, line 1: {message}"):
        read_passage(Row(row, "f, line 1", 1))


def test_several_files_become_one_corpus(tmp_path):
    files = {"a": ["A", "B", "A"], "b": ["C", "A ", "C"], "c": ["C", "D"]}
    paths = []
    for name, titles in files.items():
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"title": title, "text": "x"}) + "\n" for title in titles))
    # The first file as it is; of the others what no file before them holds.
    assert [title for title, _ in read_corpus(paths)] == ["A", "B", "A", "C", "C", "D"]
