"""The official files of each data set: small rows by hand, malformed ones, and the real files."""

import copy
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from conftest import slow_but_for
from test_datasets import TWO_HOP, make_config, read_records, write_rows

from stepsearch_jax.data import loading
from stepsearch_jax.data.loading import OFFICIAL, load_source, open_source
from stepsearch_jax.data.official import find_inputs
from stepsearch_jax.data.rows import hash_file
from stepsearch_jax.data.two_wiki import match_titles
from stepsearch_jax.prepare.index import index_files
from stepsearch_jax.records import Question, SubQuestion
from stepsearch_jax.search.cache import hash_documents

CORPUS = [
    {"title": "Noise", "text": "Nothing."},
    {"title": "Film", "text": "Film is a film. It is by Ann."},
    {"title": "Ann (director)", "text": "Ann died in May."},
    {"title": "Rome", "text": "A city."},
]
CONTEXT = [
    ["Film", ["Film is a film.", " It is by Ann."]],
    ["Ann (director)", ["Ann died in May."]],
    ["Other", ["Other", "text."]],
]
HOTPOT = {
    "_id": "h1",
    "question": "When did the director of Film die?",
    "answer": "May",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Film", 1], ["Ann (director)", 0], ["Film", 0]],
    "context": CONTEXT,
}
TWO_WIKI = {
    **HOTPOT,
    "type": "compositional",
    "evidences": [
        ["Film", "director", "Ann"],
        ["Ann", "date of death", "May"],
        ["Film", "director", "Bob"],
    ],
}
BAMBOOGLE = {"id": "test_0", "question": "Who?", "golden_answers": ["Ann", "Anna"]}
PHANTOM = {
    "id": "p1",
    "question": "Who is the friend of the father of the person whose hobby is chess?",
    "answer": ["Cid", "Dan"],
    "difficulty": 3,
    "hops": [
        {"relation": "hobby", "gold_titles": ["Ann"], "values": ["chess"]},
        {"relation": "father", "gold_titles": ["Ann"], "values": ["Bob"]},
        {"relation": "friend", "gold_titles": ["Bob", "Eve"], "values": ["Cid", "Dan"]},
    ],
}
SUPPORT = [
    {"title": "Film", "paragraph_text": "Film is a film. It is by Ann."},
    {"title": "Ann", "paragraph_text": "Gone."},
]
STEPSEARCH = {
    "question": "When did the director of Film die?",
    "final_answer": "May",
    "answer_aliases": ["in May"],
    "sub_searchs": [["director Film", "Film by", "director Film"], ["Ann death"]],
    "sub_support_docs": SUPPORT,
}
SEARCH_R1 = {
    "data_source": "nq",
    "prompt": [{"role": "user", "content": "Answer. Question: who?\n"}],
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Ann", "Anna"]}},
    "extra_info": {"index": 0, "split": "train"},
}


def read(kind, folder, corpus=""):
    return read_records(OFFICIAL[kind].FORMAT, folder, corpus)


def test_hotpotqa_names_documents_but_no_sub_questions(tmp_path):
    # Under its official name.
    (tmp_path / "hotpot_train_v1.1.json").write_text(json.dumps([HOTPOT]))
    fullwiki = {**HOTPOT, "id": 7, "supporting_facts": [["Rome", 0], ["Film", 0]]}
    del fullwiki["_id"]
    write_rows(tmp_path / "validation.jsonl", [fullwiki])
    documents, splits, files, _ = read("hotpotqa", tmp_path)
    # Without a corpus: the contexts, each once.
    contexts = [
        ("Film", "Film is a film.  It is by Ann."),
        ("Ann (director)", "Ann died in May."),
        ("Other", "Other text."),
    ]
    assert [(d.title, d.text) for d in documents] == contexts
    assert splits["train"] == [
        Question("h1", HOTPOT["question"], "May", shape="bridge", loose_gold_ids=(0, 1))
    ]
    (other,) = splits["validation"]
    assert other.uid == "7" and other.gold_ids == (0,) and other.missing_gold == (("Rome", ""),)
    assert set(files) == {"train", "validation"}
    # With one: gold documents by title and text, or by title alone if the row has no text for them.
    write_rows(tmp_path / "corpus.jsonl", CORPUS)
    documents, splits, files, _ = read("hotpotqa", tmp_path)
    assert len(documents) == 4
    assert splits["train"][0].gold_ids == (1, 2) and splits["validation"][0].gold_ids == (3, 1)
    path = tmp_path / "corpus.jsonl"
    assert files["corpus"] == {"path": str(path), "sha256": hash_file(path)}


def test_2wikimultihopqa_evidences_are_sub_questions(tmp_path):
    pairs = [
        {"question": "Who made Film?", "answer": "Ann made Film."},
        {"question": "When did Ann die?", "answer": "May."},
    ]
    paired = {**TWO_WIKI, "evidences": TWO_WIKI["evidences"][:2], "qa_pairs": pairs}
    write_rows(tmp_path / "train.jsonl", [TWO_WIKI, paired])
    write_rows(tmp_path / "corpus.jsonl", CORPUS[:2])
    plain, written = read("2wikimultihopqa", tmp_path).splits["train"]
    asked = "What is the director of Film?", "What is the date of death of Ann?"
    # The article of Ann, apart from the bracket.
    lacking = (("Ann (director)", "Ann died in May."),)
    assert plain.sub_questions == (
        SubQuestion(asked[0], "Ann", ("Bob",), (1,), (asked[0],)),
        SubQuestion(asked[1], "May", (), (), (asked[1],), lacking),
    )
    assert plain.shape == "compositional"
    assert plain.gold_ids == (1,) and plain.missing_gold == lacking
    assert [(sub.question, sub.answer) for sub in written.sub_questions] == [
        ("Who made Film?", "Ann"),
        ("When did Ann die?", "May"),
    ]


@pytest.mark.parametrize(
    "subjects, titles, expected",
    [
        (["A", "B"], ["B", "A"], {"A": "A", "B": "B"}),
        (["a (film)", "B"], ["A", "B"], {"a (film)": "A", "B": "B"}),
        # The only ones left.
        (["A", "King B"], ["A (film)", "B of C"], {"A": "A (film)", "King B": "B of C"}),
        (["King A", "King B"], ["A of C", "B of C"], {}),
        (["A"], ["A (film)", "A (song)"], {}),  # it could be either
        (["A (film)", "A"], ["A"], {"A": "A"}),
    ],
)
def test_articles_of_subjects(subjects, titles, expected):
    assert match_titles(subjects, titles) == expected


def test_two_wiki_keeps_the_documents_that_belong_to_no_sub_question_with_certainty(tmp_path):
    evidences = [["The film", "director", "Ann"], ["Anna", "date of death", "May"]]
    write_rows(tmp_path / "dev.jsonl", [{**TWO_WIKI, "evidences": evidences}])
    (question,) = read("2wikimultihopqa", tmp_path).splits["validation"]
    assert [sub.gold_ids for sub in question.sub_questions] == [(), ()]
    assert question.loose_gold_ids == question.gold_ids == (0, 1)


def test_bamboogle_in_both_forms(tmp_path):
    write_rows(tmp_path / "corpus.jsonl", CORPUS)
    write_rows(tmp_path / "test.jsonl", [BAMBOOGLE])
    assert read("bamboogle", tmp_path).splits == {
        "test": [Question("test_0", "Who?", "Ann", ("Anna",))]
    }
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "bamboogle.csv").write_text('Question,Answer\nWho?,Ann\n"When, then?",May\n')
    assert read("bamboogle", tmp_path).splits == {
        "test": [Question("test_0", "Who?", "Ann"), Question("test_1", "When, then?", "May")]
    }


def test_phantomwiki_hops(tmp_path):
    known = {"id": "p2", "question": "How many?", "answer": ["2"], "difficulty": 1}
    direct = {
        **PHANTOM,
        "id": "p3",
        "question": "What is the hobby of Ann?",
        "hops": PHANTOM["hops"][:1],
    }
    again = {
        **PHANTOM,
        "id": "p4",
        "question": "What is the hobby of the person whose hobby is chess?",
        "hops": [PHANTOM["hops"][0]] * 2,
    }
    write_rows(tmp_path / "questions.jsonl", [PHANTOM, known, direct, again])
    articles = [{"title": name, "article": f"# {name}"} for name in ("Ann", "Bob", "Cid")]
    write_rows(tmp_path / "articles.jsonl", articles)
    first, second, third, fourth = read("phantomwiki", tmp_path).splits["test"]
    assert second == Question("p2", "How many?", "2", shape="difficulty 1")
    assert first.answer == "Cid, Dan" and first.aliases == () and first.unordered
    assert not second.unordered
    whose = "Who is the person whose hobby is chess?"
    assert first.sub_questions == (
        SubQuestion(whose, "Ann", (), (0,), (whose,)),
        SubQuestion("Who is the father of Ann?", "Bob", (), (0,), ("Who is the father of Ann?",)),
        SubQuestion(
            "Who is the friend of Bob, Eve?",
            "Cid, Dan",
            (),
            (1,),
            ("Who is the friend of Bob?", "Who is the friend of Eve?"),
            (("Eve", ""),),
        ),
    )
    assert [(sub.question, sub.answer) for sub in third.sub_questions] == [
        ("What is the hobby of Ann?", "chess")
    ]
    assert [(sub.question, sub.answer) for sub in fourth.sub_questions] == [
        (whose, "Ann"),
        ("What is the hobby of Ann?", "chess"),
    ]


def test_stepsearch_rows(tmp_path):
    full = {
        **STEPSEARCH,
        "id": 5,
        "sub_questions": ["Who made Film?", "When did Ann die?"],
        "sub_answers": ["Ann", "May"],
        "sub_support_docs": [[SUPPORT[0]], SUPPORT],
    }
    unpaired = {**STEPSEARCH, "sub_support_docs": SUPPORT[:1]}
    write_rows(tmp_path / "musi_answerable_train.jsonl", [STEPSEARCH, full, unpaired])
    documents, splits, *_ = read("stepsearch", tmp_path)
    assert [d.title for d in documents] == ["Film", "Ann"]
    plain, other, loose = splits["train"]
    assert plain == Question(
        "train_0",
        STEPSEARCH["question"],
        "May",
        ("in May",),
        (
            SubQuestion("director Film", "", (), (0,), ("director Film", "Film by")),
            SubQuestion("Ann death", "", (), (1,), ("Ann death",)),
        ),
        "2hop",
    )
    assert [(sub.question, sub.answer, sub.gold_ids) for sub in other.sub_questions] == [
        ("Who made Film?", "Ann", (0,)),
        ("When did Ann die?", "May", (0, 1)),
    ]
    assert other.uid == "5"
    assert [sub.gold_ids for sub in loose.sub_questions] == [(), ()]
    assert loose.gold_ids == loose.loose_gold_ids == (0,)


def test_search_r1_parquet(tmp_path):
    contents = [f'"{row["title"]}"\n{row["text"]}' for row in CORPUS]
    write_rows(tmp_path / "wiki-18.jsonl", [{"id": "0", "contents": text} for text in contents])
    named = {**SEARCH_R1, "id": "train_9", "question": "where?", "golden_answers": ["Rome"]}
    plain = {**SEARCH_R1, "id": None, "question": None, "golden_answers": None}
    table = pyarrow.Table.from_pylist([named, plain])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    keyed = copy.deepcopy(SEARCH_R1)
    truth = {"target": "Ann", "search_keys": STEPSEARCH["sub_searchs"]}
    keyed["reward_model"]["ground_truth"] |= truth
    keyed["extra_info"]["support_docs"] = SUPPORT
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([keyed]), tmp_path / "test.parquet")
    documents, splits, *_ = read("search_r1", tmp_path)
    assert [(d.title, d.text) for d in documents] == [(row["title"], row["text"]) for row in CORPUS]
    assert splits["train"] == [
        Question("train_9", "where?", "Rome", shape="nq"),
        Question("train_1", "who?", "Ann", ("Anna",), shape="nq"),
    ]
    (question,) = splits["test"]
    assert [(sub.queries, sub.gold_ids) for sub in question.sub_questions] == [
        (("director Film", "Film by"), (1,)),
        (("Ann death",), ()),
    ]
    assert question.missing_gold == (("Ann", "Gone."),)


FILES = {
    "musique": ("train", TWO_HOP),
    "hotpotqa": ("train", HOTPOT),
    "2wikimultihopqa": ("train", TWO_WIKI),
    "bamboogle": ("test", BAMBOOGLE),
    "phantomwiki": ("questions", PHANTOM),
    "stepsearch": ("train", STEPSEARCH),
    "search_r1": ("train", SEARCH_R1),
}


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("hotpotqa", {"context": [["Film", "text"]]}, r"context\[0\]"),
        ("hotpotqa", {"context": [["Film", ["a", 1]]]}, r"context\[0\]"),
        ("hotpotqa", {"supporting_facts": [["Film", 0], ["Ann"]]}, r"supporting_facts\[1\]"),
        ("hotpotqa", {"supporting_facts": []}, "'supporting_facts' is empty"),
        ("hotpotqa", {"answer": KeyError}, "'answer' is missing"),
        ("2wikimultihopqa", {"evidences": KeyError}, "'evidences' is missing"),
        ("2wikimultihopqa", {"evidences": [["Film", "director"]]}, r"evidences\[0\]"),
        ("2wikimultihopqa", {"qa_pairs": [{"question": "Who?"}]}, "'qa_pairs' .*1 .* 3 evidences"),
        ("bamboogle", {"golden_answers": []}, "'golden_answers' .*at least one"),
        ("bamboogle", {"question": ""}, "'question' is empty"),
        ("phantomwiki", {"answer": "Cid"}, "'answer' .*list, not str"),
        (
            "phantomwiki",
            {"hops": [{"relation": "father", "gold_titles": [], "values": ["a"]}]},
            r"hops\[0\]: 'gold_titles' .*at least one",
        ),
        ("phantomwiki", {"difficulty": "3"}, "'difficulty' .*int"),
        ("stepsearch", {"sub_searchs": ["director"]}, r"sub_searchs\[0\] .*list, not str"),
        ("stepsearch", {"sub_searchs": [[], ["a"]]}, r"sub_searchs\[0\] .*at least one"),
        ("stepsearch", {"sub_support_docs": ["text"]}, r"sub_support_docs\[0\] .*paragraph_text"),
        (
            "stepsearch",
            {"sub_support_docs": [{"paragraph_text": "Film is a film."}]},
            r"sub_support_docs\[0\]: .*'title' is missing",
        ),
        ("stepsearch", {"sub_questions": ["one"]}, "'sub_questions' .*1 .*'sub_searchs' .*2"),
        ("search_r1", {"reward_model": KeyError}, "'golden_answers' .*'reward_model'"),
        (
            "search_r1",
            {"reward_model": {"ground_truth": {}}},
            "reward_model, ground_truth: .*'target' is missing",
        ),
        ("search_r1", {"prompt": [{"role": "user", "content": "Who?"}]}, "'Question:'"),
    ],
)
def test_a_malformed_row_names_file_and_line(tmp_path, kind, changes, message):
    stem, row = FILES[kind]
    bad = {name: value for name, value in {**row, **changes}.items() if value is not KeyError}
    write_rows(tmp_path / f"{stem}.jsonl", [row, bad])
    write_rows(tmp_path / f"{OFFICIAL[kind].FORMAT.corpus_stems[0]}.jsonl", CORPUS)
    with pytest.raises(ValueError, match=rf"{stem}\.jsonl, line 2.*{message}"):
        read(kind, tmp_path)


@pytest.mark.parametrize("kind", FILES)
def test_builders_store_and_missing_files_say_where_to_get_them(tmp_path, kind):
    stem, row = FILES[kind]
    config = make_config(tmp_path, kind=kind, path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"data\.path .*https?://"):
        open_source(config, 0.9, 0.4)
    write_rows(tmp_path / f"{stem}.jsonl", [row])
    if OFFICIAL[kind].FORMAT.read_passages is None:
        with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl.*data\.corpus"):
            open_source(config, 0.9, 0.4)
    write_rows(tmp_path / "corpus.jsonl", CORPUS)
    source = open_source(config, 0.9, 0.4)
    expected = read(kind, tmp_path)
    assert list(source.documents) == expected.documents
    assert {name: list(rows) for name, rows in source.splits.items()} == expected.splits
    assert source.manifest["files"] == expected.files and source.manifest["kind"] == kind
    assert open_source(config, 0.9, 0.4).manifest == source.manifest
    (split,) = expected.splits
    counts, question = source.manifest["splits"][split], expected.splits[split][0]
    assert counts["gold_documents"] == len(question.gold_ids)
    assert counts["missing_gold_documents"] == len(question.missing_gold)
    if split == "test":  # a data set for testing only can be opened, but not trained on
        with pytest.raises(ValueError, match=r"data\.train_split is 'train'"):
            load_source(config, 0.9, 0.4)


def test_another_corpus_stands_in_for_the_one_beside(tmp_path, caplog, monkeypatch):
    write_rows(tmp_path / "test.jsonl", [BAMBOOGLE])
    write_rows(tmp_path / "corpus.jsonl", CORPUS)
    write_rows(tmp_path / "more.jsonl", [CORPUS[0], {"title": "More", "text": "More."}])
    config = make_config(tmp_path, kind="bamboogle", path=str(tmp_path))
    beside = open_source(config, 0.9, 0.4)
    config.corpus = f"{tmp_path / 'more.jsonl'},{tmp_path / 'corpus.jsonl'}"
    source = open_source(config, 0.9, 0.4)
    titles = ["Noise", "More", "Film", "Ann (director)", "Rome"]
    assert [document.title for document in source.documents] == titles
    assert source.manifest["hash"] != beside.manifest["hash"]
    assert set(source.manifest["files"]) == {"test", "corpus", "corpus 1"}
    # An index that can serve a run with this corpus.
    corpora = [tmp_path / "more.jsonl", tmp_path / "corpus.jsonl"]
    index = index_files(corpora, tmp_path / "index", 0.9, 0.4)
    assert index.describe(1)["corpus"] == hash_documents(source.documents) and len(index) == 5
    config.corpus = str(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl .*data\.corpus"):
        open_source(config, 0.9, 0.4)
    # A warning counts the gold documents that another corpus lacks.
    folder = tmp_path / "musique"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [TWO_HOP])
    monkeypatch.setattr(loading.logger, "propagate", True)
    corpus = str(tmp_path / "more.jsonl")
    config = make_config(tmp_path, kind="musique", path=str(folder), corpus=corpus)
    open_source(config, 0.9, 0.4)
    assert "musique: the corpus lacks 2 of the 2 gold documents of split train" in caplog.text


def test_a_changed_reader_is_a_new_data_set(tmp_path, monkeypatch):
    write_rows(tmp_path / "train.jsonl", [HOTPOT])
    config = make_config(tmp_path, kind="hotpotqa", path=str(tmp_path))
    hashes = {open_source(config, 0.9, 0.4).manifest["hash"]}
    source_of = loading.inspect.getsource
    for module in ("row", "rows", "passages", "official", "hotpotqa", "schema"):
        mark = lambda read, name=module: "#" if read.__name__.endswith(f".{name}") else ""
        monkeypatch.setattr(
            loading.inspect, "getsource", lambda read, mark=mark: source_of(read) + mark(read)
        )
        hashes.add(open_source(config, 0.9, 0.4).manifest["hash"])
    assert len(hashes) == 7


# kind -> of each split: questions, sub-questions, gold documents found and missing in the corpus
# beside it; counted from the files.
REAL = {
    "hotpotqa": {"train": (100, 0, 200, 0), "validation": (150, 0, 254, 46)},
    "2wikimultihopqa": {"train": (1498, 3562, 3336, 0), "validation": (150, 394, 387, 0)},
    "phantomwiki": {"test": (3120, 6360, 506, 0)},
    "bamboogle": {"test": (125, 0, 0, 0)},
}


@pytest.mark.parametrize("kind", slow_but_for(["hotpotqa", "bamboogle"], list(REAL)))
def test_real_files(shared_data, kind):
    corpus = str(shared_data / "wiki18_sample" / "corpus.jsonl.gz") if kind == "bamboogle" else ""
    documents, splits, files, _ = read(kind, shared_data / kind, corpus)
    found = {}
    for split, questions in splits.items():
        held = {i for question in questions for i in question.gold_ids}
        lacking = {passage for question in questions for passage in question.missing_gold}
        hops = sum(len(question.sub_questions) for question in questions)
        found[split] = (len(questions), hops, len(held), len(lacking))
        assert len({question.uid for question in questions}) == len(questions)
    assert found == REAL[kind]
    assert all(re.fullmatch("[0-9a-f]{64}", file["sha256"]) for file in files.values())
    assert "corpus" in files
    # The gold documents of nearly every sub-question hold its answer (all words of a date): gold
    # ids point at the right rows.
    subs = [
        sub
        for questions in splits.values()
        for question in questions
        for sub in question.sub_questions
        if sub.gold_ids
    ]
    texts = [
        " ".join(f"{documents[i].title} {documents[i].text}" for i in sub.gold_ids).lower()
        for sub in subs
    ]
    words = [set(re.findall(r"\w+", sub.answer.lower())) for sub in subs]
    hits = sum(answer <= set(re.findall(r"\w+", text)) for answer, text in zip(words, texts))
    assert not subs or hits / len(subs) > 0.8


def test_files_of_a_folder_and_of_its_corpus(tmp_path):
    form = OFFICIAL["phantomwiki"].FORMAT
    write_rows(tmp_path / "questions.jsonl.gz", [PHANTOM])
    write_rows(tmp_path / "articles.jsonl", CORPUS)
    assert find_inputs(form, tmp_path) == (
        {"test": [tmp_path / "questions.jsonl.gz"]},
        [tmp_path / "articles.jsonl"],
    )
    write_rows(tmp_path / "articles.jsonl.gz", CORPUS)
    with pytest.raises(ValueError, match=r"articles\.jsonl and .*articles\.jsonl\.gz"):
        find_inputs(form, tmp_path)
