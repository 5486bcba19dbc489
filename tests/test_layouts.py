"""The layouts in which data sets circulate: columns, JSON in strings, shards, rows for verl; and
rows that cannot be read.
"""

import copy
import dataclasses
import json

import pyarrow
import pyarrow.parquet
import pytest
from test_datasets import THREE_HOP, TWO_HOP, make_config, write_rows
from test_official import CORPUS, FILES, HOTPOT, SEARCH_R1, STEPSEARCH, TWO_WIKI, read

from stepsearch_jax.data import loading
from stepsearch_jax.data.loading import OFFICIAL, open_source
from stepsearch_jax.data.rows import find_files

STEMS = [
    (kind, stem)
    for kind, builder in OFFICIAL.items()
    if kind != "jsonl"
    for stems in builder.FORMAT.stems.values()
    for stem in stems
]


def columns(entries, *names):
    """A list of objects, or of lists whose entries have these names, as an object of lists."""
    if names:
        return {name: [entry[i] for entry in entries] for i, name in enumerate(names)}
    return {name: [entry[name] for entry in entries] for name in entries[0]}


HUB = {  # kind -> the fields that the Hugging Face Hub has as columns
    "hotpotqa": {
        "context": columns(HOTPOT["context"], "title", "sentences"),
        "supporting_facts": columns(HOTPOT["supporting_facts"], "title", "sent_id"),
    },
    "2wikimultihopqa": {
        "context": columns(HOTPOT["context"], "title", "content"),
        "supporting_facts": columns(HOTPOT["supporting_facts"], "title", "sent_id"),
        "evidences": columns(TWO_WIKI["evidences"], "fact", "relation", "entity"),
    },
    "musique": {name: columns(TWO_HOP[name]) for name in ("paragraphs", "question_decomposition")},
    "stepsearch": {"sub_support_docs": columns(STEPSEARCH["sub_support_docs"])},
    "search_r1": {"prompt": columns(SEARCH_R1["prompt"])},
    "phantomwiki": {"hops": columns(FILES["phantomwiki"][1]["hops"])},
}


def write_table(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def read_row(folder, kind, row, corpus=None):
    """The question of the only row of a data set in `folder`."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / f"{FILES[kind][0]}.jsonl", [row])
    write_rows(folder / f"{OFFICIAL[kind].FORMAT.corpus_stems[0]}.jsonl", corpus or CORPUS)
    ((question,),) = read(kind, folder).splits.values()
    return question


def as_strings(row):
    return {
        name: json.dumps(value) if isinstance(value, list | dict) else value
        for name, value in row.items()
    }


@pytest.mark.parametrize("kind", HUB)
@pytest.mark.parametrize("strings", [False, True])
def test_columns_are_as_the_official_row(tmp_path, kind, strings):
    stem, row = FILES[kind]
    expected = read_row(tmp_path / "official", kind, row)
    hub = {**row, **HUB[kind]}
    assert read_row(tmp_path / "hub", kind, as_strings(hub) if strings else hub) == expected
    (tmp_path / "hub" / f"{stem}.jsonl").unlink()
    write_table(tmp_path / "hub" / f"{stem}.parquet", [hub])
    assert list(read(kind, tmp_path / "hub").splits.values()) == [[expected]]


@pytest.mark.parametrize("kind", FILES)
def test_json_in_strings_is_as_the_official_row(tmp_path, kind):
    row = FILES[kind][1]
    expected = read_row(tmp_path / "official", kind, row)
    assert read_row(tmp_path / "strings", kind, as_strings(row)) == expected


def test_ones_own_rows_in_columns_and_strings(tmp_path):
    gold = [{"title": row["title"], "text": row["text"]} for row in CORPUS[1:3]]
    steps = [{"queries": ["film"], "gold": gold}, {"queries": ["rome"], "gold": [CORPUS[3]]}]
    row = {"question": "Who?", "answers": ["Ann", "Anna"], "gold": gold, "sub_questions": steps}
    steps = [{**step, "gold": columns(step["gold"])} for step in steps]
    hub = {**row, "gold": columns(gold), "sub_questions": columns(steps)}
    write_rows(tmp_path / "train.jsonl", [row, hub, as_strings(row), as_strings(hub)])
    write_rows(tmp_path / "corpus.jsonl", CORPUS)
    first, *others = read("jsonl", tmp_path).splits["train"]
    assert first.answers == ("Ann", "Anna") and first.loose_gold_ids == (1, 2)
    assert [sub.gold_ids for sub in first.sub_questions] == [(1, 2), (3,)]
    for n, other in enumerate(others, start=1):
        assert other == dataclasses.replace(first, uid=f"train_{n}")


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("hotpotqa", {"context": {"title": ["A", "B"], "sentences": [["a"]]}}, "'context'.* 2.* 1"),
        (
            "hotpotqa",
            {"supporting_facts": {"title": ["Film"]}},
            r"supporting_facts\[0\].*'sent_id'",
        ),
        ("hotpotqa", {"supporting_facts": {"title": "Film"}}, "'supporting_facts'.*list, not dict"),
        ("hotpotqa", {"supporting_facts": [["Film", "first"]]}, r"supporting_facts\[0\]"),
        ("hotpotqa", {"context": '[["Film", ["a"]]'}, "'context' is a string that is not JSON"),
        ("hotpotqa", {"context": '[["Film", ["\\ud800"]]]'}, "'context'.*surrogate"),
        ("hotpotqa", {"context": "Film"}, "'context'.*list, not str"),
        (
            "musique",
            {"paragraphs": {"idx": [0], "title": [], "paragraph_text": []}},
            "'paragraphs'.*idx 1, title 0",
        ),
        ("2wikimultihopqa", {"evidences": {"fact": ["a"], "entity": ["b"]}}, "'relation'"),
        ("search_r1", {"golden_answers": [True]}, "'golden_answers'.*True"),
        ("search_r1", {"golden_answers": [float("nan")]}, "'golden_answers'.*nan"),
        ("search_r1", {"golden_answers": ["a", " "]}, "'golden_answers'.*empty"),
        ("search_r1", {"golden_answers": []}, "'golden_answers'.*at least one"),
        ("search_r1", {"reward_model": {"ground_truth": None, "style": "rule"}}, "'ground_truth'"),
    ],
)
def test_a_fault_names_file_line_and_field(tmp_path, kind, changes, message):
    with pytest.raises(ValueError, match=rf"{FILES[kind][0]}\.jsonl, line 1.*{message}"):
        read_row(tmp_path, kind, {**FILES[kind][1], **changes})


@pytest.mark.parametrize("kind, stem", STEMS)
def test_shards_of_every_data_set(tmp_path, kind, stem):
    row = {**FILES[kind][1], **HUB.get(kind, {})}
    row = {name: value for name, value in row.items() if name not in ("id", "_id")}
    if kind == "musique":
        row["id"] = "2hop__1"
    rows = [{**row, "question": f"Who is {n}?"} for n in range(5)]
    write_table(tmp_path / f"{stem}-00000-of-00003.parquet", rows[:2])
    write_table(tmp_path / f"{stem}-00001-of-00003.parquet", rows[2:4])
    for n in range(2):
        part = f"{OFFICIAL[kind].FORMAT.corpus_stems[0]}-0000{n}-of-00002.jsonl"
        write_rows(tmp_path / part, CORPUS[2 * n : 2 * n + 2])
    with pytest.raises(FileNotFoundError, match=rf"{stem}-00002-of-00003\.parquet is missing"):
        read(kind, tmp_path)
    write_table(tmp_path / f"{stem}-00002-of-00003.parquet", rows[4:])
    documents, splits, files, _ = read(kind, tmp_path)
    ((split, questions),) = splits.items()
    assert [question.question for question in questions] == [row["question"] for row in rows]
    if kind != "musique":
        assert [question.uid for question in questions] == [f"{split}_{n}" for n in range(5)]
    assert [document.title for document in documents] == [row["title"] for row in CORPUS]
    assert set(files) == {split, f"{split} 1", f"{split} 2", "corpus", "corpus 1"}


def test_shards_that_do_not_belong_together(tmp_path):
    names = ["train-00001-of-00002-0123456789abcdef.parquet", "train-00000-of-00002.parquet"]
    for name in (*names, "train-00000-of-00002.txt", "training-00000-of-00002.parquet"):
        (tmp_path / name).write_text("")
    assert find_files(tmp_path, ("train",)) == [tmp_path / name for name in reversed(names)]
    for other, message in [
        ("train.jsonl", "train.jsonl and .*twice"),
        ("train-00000-of-00003.parquet", "-of-00002.parquet and .*-of-00003.*twice"),
        ("train-00000-of-00002-0123456789abcdef.parquet", "same shard"),
        ("train-00002-of-00002.parquet", "-00002-of-00002.parquet is not one of 2"),
    ]:
        (tmp_path / other).write_text("")
        with pytest.raises(ValueError, match=message):
            find_files(tmp_path, ("train",))
        (tmp_path / other).unlink()


def test_changed_shards_are_a_new_data_set(tmp_path):
    config = make_config(tmp_path, kind="hotpotqa", path=str(tmp_path))
    for n in range(2):
        write_rows(tmp_path / f"train-0000{n}-of-00002.jsonl", [{**HOTPOT, "_id": f"h{n}"}])
    source = open_source(config, 0.9, 0.4)
    assert [question.uid for question in source.splits["train"]] == ["h0", "h1"]
    write_rows(tmp_path / "train-00001-of-00002.jsonl", [HOTPOT, HOTPOT])
    assert len(open_source(config, 0.9, 0.4).splits["train"]) == 3


def test_hotpotqa_without_contexts_needs_a_corpus(tmp_path):
    write_rows(tmp_path / "dev.jsonl", [{**HOTPOT, "context": None}])
    with pytest.raises(ValueError, match=r"dev\.jsonl, line 1: .*'context'.*data\.corpus"):
        read("hotpotqa", tmp_path)
    write_rows(tmp_path / "wiki.jsonl", CORPUS)
    records = read("hotpotqa", tmp_path, str(tmp_path / "wiki.jsonl"))
    assert records.splits["validation"][0].gold_ids == (1, 2)


INSTRUCTION = "Answer the given question. For example, <answer> Beijing </answer>. Question: "


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"reward_model": {"ground_truth": "Kell hills"}}, ("Kell hills",)),
        ({"reward_model": {"ground_truth": 1204}}, ("1204",)),
        ({"reward_model": {"ground_truth": ["Kell", 1204.0, 0.5]}}, ("Kell", "1204", "0.5")),
        ({"reward_model": {"ground_truth": '{"target": ["Kell"]}'}}, ("Kell",)),
        ({"reward_model": {"ground_truth": {"target": 1204}}}, ("1204",)),
        ({"reward_model": {"ground_truth": {"target": [1204, "AD"]}}}, ("1204", "AD")),
        ({"golden_answers": "Kell", "reward_model": {"ground_truth": "other"}}, ("Kell",)),
        ({"golden_answers": ["[1]", 7], "reward_model": None}, ("[1]", "7")),
        ({"golden_answers": '["Kell", "hills"]'}, ("Kell", "hills")),
    ],
)
def test_answers_for_verl(tmp_path, changes, expected):
    assert read_row(tmp_path, "search_r1", {**SEARCH_R1, **changes}).answers == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "What follows Question: here?"),
        ({"extra_info": {"question": "Where?"}}, "Where?"),
        ({"extra_info": {"question": "Where?"}, "question": "Who?"}, "Who?"),
    ],
)
def test_questions_for_verl(tmp_path, changes, expected):
    content = INSTRUCTION + "What follows Question: here?\n"
    row = {**SEARCH_R1, "prompt": [{"role": "user", "content": content}], **changes}
    del row["data_source"]
    question = read_row(tmp_path, "search_r1", row)
    assert question.question == expected and question.shape == ""


@pytest.mark.parametrize("sentences", ["sentences", "content"])
def test_gold_documents_in_flashrags_metadata(tmp_path, sentences):
    facts = {
        "supporting_facts": columns(HOTPOT["supporting_facts"], "title", "sent_id"),
        "context": columns(HOTPOT["context"], "title", sentences),
    }
    row = {**SEARCH_R1, "metadata": facts}
    assert read_row(tmp_path, "search_r1", row).loose_gold_ids == (1, 2)
    assert read_row(tmp_path, "search_r1", as_strings(row)).gold_ids == (1, 2)
    # By title, without a context.
    row["metadata"] = {"supporting_facts": facts["supporting_facts"]}
    assert read_row(tmp_path, "search_r1", row).gold_ids == (1, 2)
    # They are no hops, however many search keys there are; support_docs go before them.
    keyed = copy.deepcopy(row)
    keyed["reward_model"]["ground_truth"]["search_keys"] = STEPSEARCH["sub_searchs"]
    question = read_row(tmp_path, "search_r1", keyed)
    assert len(question.sub_questions) == 2 and question.loose_gold_ids == (1, 2)
    keyed["extra_info"] = {"support_docs": [{"title": "Rome"}, {"title": "Noise"}]}
    question = read_row(tmp_path, "search_r1", keyed)
    assert question.gold_ids == (3, 0) and question.loose_gold_ids == ()
    nothing = {"supporting_facts": {"title": None, "sent_id": None}}
    for other in (None, {}, "note", nothing, {"supporting_facts": {"title": [], "sent_id": []}}):
        assert read_row(tmp_path, "search_r1", {**row, "metadata": other}).gold_ids == ()


@pytest.mark.parametrize(
    "hops, expected",
    [
        (
            ["Who is the #1 ranked rower?", "Who beat #1?"],
            ["Who is the #1 ranked rower?", "Who beat A?"],
        ),
        (["Who?", "How many #1 hits did #1 have?"], ["Who?", "How many #1 hits did A have?"]),
        (["Who?", "Did #1 have a #1 single?"], ["Who?", "Did A have a #1 single?"]),
        (["Who?", "When did #1 sing the #1 debut?"], ["Who?", "When did A sing the #1 debut?"]),
        (["Who?", "Was the #1 hit in the #1 season?"], ["Who?", "Was the #1 hit in the A season?"]),
        (["Who?", "What is #1 to the mother of #1?"], ["Who?", "What is A to the mother of A?"]),
        (["Who?", "When was the #1 season?"], ["Who?", "When was the A season?"]),
        (["Who?", "Who sang the #1 hit?"], ["Who?", "Who sang the A hit?"]),
        (["Who?", "Is #2 above #3?"], ["Who?", "Is #2 above #3?"]),
        (
            ["Who?", "Where is #1?", "Who had the #1 hit of #2?"],
            ["Who?", "Where is A?", "Who had the #1 hit of B?"],
        ),
        (
            ["Who?", "Where is #1?", "When did #1 hit #2 , the #1 season?"],
            ["Who?", "Where is A?", "When did A hit B , the #1 season?"],
        ),
        (
            ["Who?", "Where?", "When did the #1 season of #2 end?"],
            ["Who?", "Where?", "When did the A season of B end?"],
        ),
    ],
)
def test_a_rank_is_no_reference(tmp_path, hops, expected):
    parts = [
        {"question": hop, "answer": "ABC"[n], "paragraph_support_idx": n % 2}
        for n, hop in enumerate(hops)
    ]
    question = read_row(tmp_path, "musique", {**TWO_HOP, "question_decomposition": parts})
    assert [sub.question for sub in question.sub_questions] == expected


OWN = [*TWO_HOP["paragraphs"], {"idx": 9, "title": "Of a bad row", "paragraph_text": "Text."}]
BAD = [{**THREE_HOP, "answer": ""}, {**TWO_HOP, "question": None, "paragraphs": OWN}]


def write_lines(path, *lines):
    """A file of these rows and, as bytes, of whatever else."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")


def test_unreadable_rows_are_left_out_if_told_to(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(loading.logger, "propagate", True)
    broken = (b'{"id": "2hop', b'["a"]', b'{"id": "\xff"}', b'{"id": "\\ud800"}')
    write_lines(tmp_path / "train.jsonl", BAD[0], TWO_HOP, *broken, THREE_HOP)
    write_lines(tmp_path / "validation.jsonl", TWO_HOP, BAD[1])
    (tmp_path / "test.json").write_text(json.dumps([TWO_HOP]))
    config = make_config(tmp_path, kind="musique", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: .*'answer' is empty.*skip"):
        open_source(config, 0.9, 0.4)
    config.on_bad_row = "skip"
    for _ in range(2):  # made, then opened
        caplog.clear()
        source = open_source(config, 0.9, 0.4)
        (warning,) = caplog.messages[-1:]
        assert "5 of train, 1 of validation" in warning and "of test" not in warning
        places = [warning.find(f"train.jsonl, line {n}") for n in (1, 3, 4, 5)]
        assert 0 < places[0] < places[1] < places[2] and places[3] == -1
        assert sum("left out" in message for message in caplog.messages) == 1
    uids = {split: [question.uid for question in rows] for split, rows in source.splits.items()}
    whole = [TWO_HOP["id"], THREE_HOP["id"]]
    assert uids == {"train": whole, "validation": whole[:1], "test": whole[:1]}
    # Passages of readable rows only.
    assert [document.title for document in source.documents] == ["Harbour", "Ann", "Other", "Rome"]
    counts = source.manifest["splits"]
    assert counts["train"]["unreadable_rows"] == 5 and counts["validation"]["unreadable_rows"] == 1
    assert "unreadable_rows" not in counts["test"]
    assert len(counts["train"]["unreadable"]) == 3


def test_the_choice_is_part_of_the_data_sets_name(tmp_path):
    write_lines(tmp_path / "train.jsonl", TWO_HOP)
    config = make_config(tmp_path, kind="musique", path=str(tmp_path))
    hashes = {open_source(config, 0.9, 0.4).manifest["hash"]}
    config.on_bad_row = "skip"
    hashes.add(open_source(config, 0.9, 0.4).manifest["hash"])
    write_lines(tmp_path / "train.jsonl", TWO_HOP, BAD[0])
    open_source(config, 0.9, 0.4)
    config.on_bad_row = "refuse"
    with pytest.raises(ValueError, match="line 2"):
        open_source(config, 0.9, 0.4)
    assert len(hashes) == 2
    config.on_bad_row = "ignore"
    with pytest.raises(ValueError, match=r"data\.on_bad_row is 'ignore'"):
        open_source(config, 0.9, 0.4)


def test_a_split_without_a_readable_row_is_an_error(tmp_path):
    write_lines(tmp_path / "train.jsonl", TWO_HOP)
    write_lines(tmp_path / "validation.jsonl", *BAD, b"{")
    config = make_config(tmp_path, kind="musique", path=str(tmp_path), on_bad_row="skip")
    message = r"none of the 3 rows of split validation .*validation\.jsonl, line 1: .*'answer'"
    with pytest.raises(ValueError, match=message):
        open_source(config, 0.9, 0.4)


def test_damaged_files_and_corpora_are_refused_all_the_same(tmp_path):
    config = make_config(tmp_path, kind="musique", path=str(tmp_path), on_bad_row="skip")
    (tmp_path / "train.json").write_text(f"[{json.dumps(TWO_HOP)},\n{{]")
    with pytest.raises(ValueError, match=r"train\.json, line 2: not JSON"):
        open_source(config, 0.9, 0.4)
    (tmp_path / "train.json").write_text(json.dumps([TWO_HOP]))
    write_lines(tmp_path / "corpus.jsonl", CORPUS[0], {"title": "Ann"})
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 2: .*'text'"):
        open_source(config, 0.9, 0.4)
