"""The audit by hand, against plain loops, as a command, and on the real files."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_datasets import REPO, read_records, write_rows

from stepsearch_jax.data.loading import OFFICIAL
from stepsearch_jax.prepare import __main__ as prepare
from stepsearch_jax.prepare import audit as audit_module
from stepsearch_jax.prepare.audit import find_gold, measure_overlap, measure_recall, render
from stepsearch_jax.records import Document, Question, SubQuestion

LACKING = ("Lost", "A lost text.")
FIRST = Question(
    "q1",
    "Both?",
    "x",
    sub_questions=(
        SubQuestion("one?", "a", gold_ids=(0,), queries=("one?", "key one")),
        SubQuestion("two?", "x", gold_ids=(1,), missing_gold=(LACKING,)),
    ),
)
SECOND = Question("q2", "Loose?", "y", loose_gold_ids=(1, 2))
THIRD = Question("q3", "No gold?", "z")
RANKING = {
    "Both?": [2, 1, 0],
    "one?": [3, 2, 1],
    "two?": [1, -1, -1],
    "key one": [3, 0, -1],
    "Loose?": [1, 3, 2],
    "No gold?": [-1, -1, -1],
}


def search(queries, k):
    return np.array([RANKING[query][:k] for query in queries], np.int32)


def test_gold_of_a_split_by_hand():
    assert find_gold([FIRST, SECOND, THIRD]) == {
        "questions": 3,
        "with_gold": 2,
        "complete": 1,
        "gold_documents": 4,
        "missing": 1,
        "lacking": [{"title": "Lost", "text": "A lost text.", "questions": ["q1"]}],
    }


def test_recall_by_hand():
    figures = measure_recall([FIRST, SECOND, THIRD], search, [1, 3])
    # The question finds, with k = 1 and 3: of q1's documents 0, 1 and the lost one, none and two;
    # of q2's documents 1 and 2, one and both.
    assert figures["the question"]["1"] == {
        "questions": 2,
        "sub_questions": 0,
        "recall": pytest.approx((0 + 1 / 2) / 2),
        "complete": 0,
        "hop_recall": None,
    }
    assert figures["the question"]["3"] == {
        "questions": 2,
        "sub_questions": 0,
        "recall": pytest.approx((2 / 3 + 1) / 2),
        "complete": 1 / 2,
        "hop_recall": None,
    }
    # Sub-questions, of q1 alone: "one?" never brings 0, "two?" brings 1.
    assert figures["its sub-questions"]["3"] == {
        "questions": 1,
        "sub_questions": 2,
        "recall": pytest.approx(1 / 3),
        "complete": 0,
        "hop_recall": pytest.approx((0 + 1 / 2) / 2),
    }
    # The accepted query brings 0, as its second document.
    accepted = figures["sub-questions and accepted queries"]
    assert accepted["1"]["recall"] == pytest.approx(1 / 3)
    assert accepted["3"]["recall"] == pytest.approx(2 / 3)
    assert accepted["3"]["hop_recall"] == pytest.approx((1 + 1 / 2) / 2)
    without = measure_recall([SECOND, THIRD], search, [2])
    assert set(without) == {"the question", "its sub-questions"}
    assert without["its sub-questions"]["2"]["recall"] is None


texts = st.sampled_from("abcdefgh")
ids = st.lists(st.integers(0, 5), max_size=3, unique=True).map(tuple)
lacking = st.lists(st.tuples(texts, texts), max_size=1).map(tuple)
subs = st.lists(
    st.builds(
        SubQuestion,
        question=texts,
        answer=texts,
        gold_ids=ids,
        queries=st.lists(texts, max_size=2).map(tuple),
        missing_gold=lacking,
    ),
    max_size=3,
).map(tuple)
questions = st.lists(
    st.builds(
        Question,
        uid=texts,
        question=texts,
        answer=texts,
        sub_questions=subs,
        loose_gold_ids=ids,
        loose_missing_gold=lacking,
    ),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(
    questions,
    st.dictionaries(texts, st.permutations(range(6)), min_size=8, max_size=8),
    st.integers(1, 6),
)
def test_recall_equals_plain_loops(rows, ranking, k):
    figures = measure_recall(
        rows, lambda queries, count: np.array([ranking[query][:count] for query in queries]), [k]
    )
    name = list(figures)[-1]
    recalls, hops = [], []
    for row in rows:
        needed, reached = set(), set()
        for sub in row.sub_questions:
            own = set()
            for text in {sub.question, *sub.queries}:
                own |= set(ranking[text][:k])
            if sub.gold_ids or sub.missing_gold:
                gold = len(sub.gold_ids) + len(sub.missing_gold)
                hops.append(sum(i in own for i in sub.gold_ids) / gold)
            needed |= {*sub.gold_ids, *sub.missing_gold}
            reached |= own
        needed |= {*row.loose_gold_ids, *row.loose_missing_gold}
        if needed and row.sub_questions:
            recalls.append(len(needed & reached) / len(needed))
    found = figures[name][str(k)]
    assert found["recall"] == (pytest.approx(np.mean(recalls)) if recalls else None)
    assert found["questions"] == len(recalls)
    assert found["hop_recall"] == (pytest.approx(np.mean(hops)) if hops else None)


def test_overlap_by_hand():
    documents = [Document(0, "A", "The text."), Document(1, "B", "b"), Document(2, "a", "text")]
    known = (
        SubQuestion("One?", "a", gold_ids=(0,)),
        SubQuestion("Two?", "b", missing_gold=(LACKING,)),
    )
    train = [Question("t", "Who is the  man?", "x", sub_questions=known)]
    first = (SubQuestion("one", "c"), SubQuestion("Three?", "d"))
    third = (SubQuestion("the one?", "c"),)
    rows = [
        Question("e1", "who is man", "x", sub_questions=first),
        Question("e2", "Other?", "x", loose_gold_ids=(1, 2)),
        Question("e3", "Another?", "x", sub_questions=third, loose_missing_gold=(LACKING,)),
    ]
    assert measure_overlap(train, rows, documents) == {
        "questions": {"training": 1, "evaluation": 3, "rows": 1, "shared": ["who is man"]},
        "sub-questions": {"training": 2, "evaluation": 2, "rows": 2, "shared": ["the one?"]},
        "gold passages": {"training": 2, "evaluation": 3, "rows": 2, "shared": ["a", "Lost"]},
    }


CONTEXT = [["Film", ["The film is by Ann."]], ["Ann", ["Ann died in May."]]]
HOTPOT = {
    "id": "h1",
    "question": "When has the director of Film died?",
    "answer": "May",
    "type": "bridge",
    "supporting_facts": [["Film", 0], ["Ann", 0]],
    "context": CONTEXT,
}


def test_command(tmp_path, capsys, monkeypatch):
    # it would silence this package's logger for later tests
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    other = {**HOTPOT, "id": "h2", "question": "When did Ann die?"}
    film, ann, noise = (
        {"title": title, "text": text}
        for title, text in (
            ("Film", "The film is by Ann."),
            ("Ann", "Ann died in May."),
            ("Noise", "May."),
        )
    )
    write_rows(tmp_path / "train.jsonl", [HOTPOT])
    write_rows(tmp_path / "validation.jsonl", [other])
    write_rows(tmp_path / "corpus.jsonl", [film, noise])
    write_rows(tmp_path / "more.jsonl.gz", [ann, noise])
    arguments = [
        "audit",
        f"--config={REPO / 'configs/base.py'}",
        "--config.data.kind=hotpotqa",
        f"--config.data.path={tmp_path}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        f"--json={tmp_path / 'audit.json'}",
        "--k",
        "1",
        "3",
    ]
    prepare.main(arguments)
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "audit.json").read_text())
    assert render(figures) in printed
    assert "hotpotqa: 2 passages\n" in printed and "| train | 1 | 1 | 0 | 2 | 1 |" in printed
    assert "- 'Ann', which train question h1 needs" in printed
    assert figures["splits"]["train"]["gold"]["lacking"] == [
        {"title": "Ann", "text": "Ann died in May.", "questions": ["h1"]}
    ]
    assert figures["splits"]["train"]["recall"]["the question"]["3"]["recall"] == 0.5
    assert "| validation: gold passages | 2 | 2 | 2 | 1 |" in printed
    assert "| validation: questions | 1 | 1 | 0 | 0 |" in printed
    assert len(figures["data"]["files"]["train"]["sha256"]) == 64
    # With another corpus added: the missing passage is found, and a passage of both counts once.
    corpora = [str(tmp_path / name) for name in ("more.jsonl.gz", "corpus.jsonl")]
    prepare.main([*arguments, "--corpus", *corpora])
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "audit.json").read_text())
    assert "hotpotqa: 3 passages, 1 of them from the 2 files added" in printed
    assert "| train | 1 | 1 | 1 | 2 | 0 |" in printed
    assert figures["splits"]["train"]["recall"]["the question"]["3"]["recall"] == 1.0


def render_split(questions: list[Question]) -> str:
    """The page about a split of these, which shares nothing with training."""
    split = dict(gold=find_gold(questions), recall=measure_recall(questions, search, [1]))
    return render(
        dict(
            data={"kind": "jsonl"},
            passages=4,
            corpora=[],
            retriever=dict(k1=0.9, b=0.4),
            ks=[1],
            splits={"train": split},
            overlap={},
        )
    )


def test_missing_documents_are_named_up_to_ten():
    lost = [(f"Lost {i}", "Text.") for i in range(audit_module.SHOWN_MISSING + 2)]
    page = render_split([Question("q", "Both?", "x", loose_missing_gold=tuple(lost))])
    assert page.count("train question q needs") == audit_module.SHOWN_MISSING
    assert "2 more" in page and "recall@1" in page


def test_without_gold_documents_there_is_no_table_of_recall():
    page = render_split([THIRD])
    assert "reward.step_reward=answer_logprob" in page and "recall@1" not in page


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--k", "3", "1"], "--k 3 1"),
        (["--json=nowhere/x.json"], "--json=nowhere/x.json"),
        (["--config.data.path=nowhere"], "nowhere.*data.path.*https://"),
        (["--config.data.pth=x"], "--config.data.pth=x"),
        (["--config.search.bm25_k1=inf"], "inf.*config.search.bm25_k1"),
        (["--config.search.bm25_b=1.5"], "1.5.*bm25_b"),
        (["--corpora=x"], "'corpora'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    flags = [f"--config={REPO / 'configs/base.py'}", f"--config.data.cache_dir={tmp_path}"]
    with pytest.raises(SystemExit, match=message) as caught:
        prepare.main(["audit", *flags, *arguments])
    assert len(str(caught.value).splitlines()) == 1


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(audit_module, "audit", interrupt)
    monkeypatch.setattr("stepsearch_jax.cli.start_logging", lambda: None)
    with pytest.raises(SystemExit, match="130"):
        prepare.main(["audit", "--config=atlas_quickstart"])
    told = capsys.readouterr().err
    assert told.startswith("stepsearch_jax: interrupted") and told.count("\n") == 1


def test_help_and_unknown_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        prepare.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"stepsearch_jax.prepare {name}" in shown for name in prepare.COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        prepare.main(["adit"])
    assert "usage: python -m stepsearch_jax.prepare {audit" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        prepare.main(["audit", "--help"])
    assert "--corpus FILE" in capsys.readouterr().out


@pytest.mark.slow
def test_real_splits_have_in_common_what_is_known_of_them(shared_data):
    read = {
        kind: read_records(OFFICIAL[kind].FORMAT, shared_data / kind)
        for kind in ("musique", "2wikimultihopqa")
    }
    rows = {}
    for kind, (documents, splits, *_) in read.items():
        overlap = measure_overlap(splits["train"], splits["validation"], documents)
        rows[kind] = {name: figures["rows"] for name, figures in overlap.items()}
    assert rows == {
        "musique": {"questions": 0, "sub-questions": 0, "gold passages": 0},
        "2wikimultihopqa": {"questions": 0, "sub-questions": 8, "gold passages": 30},
    }


@pytest.mark.slow
def test_real_musique_as_a_process(shared_data, tmp_path):
    """Nothing is missing, nothing is shared, and recall is as measured before."""
    command = [
        sys.executable,
        "-m",
        "stepsearch_jax.prepare",
        "audit",
        "--config=configs/base.py",
        f"--config.data.path={shared_data / 'musique'}",
        f"--config.data.cache_dir={tmp_path}",
        f"--json={tmp_path / 'audit.json'}",
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "audit.json").read_text())
    assert figures["passages"] == 13_196
    assert all(split["gold"]["missing"] == 0 for split in figures["splits"].values())
    assert all(
        kind["rows"] == 0 and kind["training"] > 1000
        for kind in figures["overlap"]["validation"].values()
    )
    recall = figures["splits"]["validation"]["recall"]
    assert recall["its sub-questions"]["3"]["recall"] == pytest.approx(0.842, abs=0.02)
    assert recall["the question"]["3"]["recall"] < 0.5
