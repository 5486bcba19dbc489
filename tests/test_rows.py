"""Rows of every kind of file come with their place; faults are refused by file and line."""

import csv
import gzip
import hashlib
import json

import pyarrow
import pyarrow.parquet
import pytest

from stepsearch_jax.data.rows import Row, find_files, hash_file, read_rows

ROWS = [
    {"id": "a", "text": 'one,\n "two"'},
    {"id": "b", "text": "ünï  ]"},
    {"id": "c", "text": "["},
]


DEEP, LONG = b"[" * 100_000, b"x" * 200_000


def write(path, kind):
    text = {
        "lines": "".join(json.dumps(row) + "\n\n" for row in ROWS),  # empty lines count as lines
        "array": " \n[" + ",\n\n".join(json.dumps(row, indent=1) for row in ROWS) + "]\n",
        "short array": json.dumps(ROWS, ensure_ascii=False),
    }.get(kind)
    if kind == "csv":
        with open(path, "w", newline="") as out:
            table = csv.DictWriter(out, ["id", "text"])
            table.writeheader()
            table.writerows(ROWS)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


@pytest.mark.parametrize(
    "name, kind, places",
    [
        ("rows.jsonl", "lines", ["line 1", "line 3", "line 5"]),
        ("rows.jsonl.gz", "lines", ["line 1", "line 3", "line 5"]),
        ("rows.json", "lines", ["line 1", "line 3", "line 5"]),
        # Each object takes four lines, and an empty line follows.
        ("rows.json", "array", ["line 2", "line 7", "line 12"]),
        ("rows.json.gz", "short array", ["line 1", "line 1", "line 1"]),
        # The first row's text has a line break.
        ("rows.csv", "csv", ["line 3", "line 4", "line 5"]),
        ("rows.parquet", "parquet", ["row 1", "row 2", "row 3"]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, kind, places):
    path = tmp_path / name
    write(path, kind)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}, {place}" for place in places]
    assert [row.number for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.jsonl", b'{"a": 1}\n\n{"a": }\n', "line 3: not JSON"),
        (
            "rows.jsonl",
            b'{"a": "\\ud83d\\ude00"}\n{"a": [{"b": "c \\ud83d d"}]}\n',
            "line 2: '.ud83d' .*surrogate",
        ),
        ("rows.json", b'[{"a": 1},\n {"a": "\\uDC00"}]', "line 2: '.udc00' .*surrogate"),
        ("rows.jsonl", b'{"a": 1}\n7\n', "line 2: .*not int"),
        ("rows.json", b'[{"a": 1},\n {"a": }]', "line 2: not JSON"),
        ("rows.json", b'[{"a": 1}\n {"a": 2}]', "line 1: not JSON .a comma"),
        ("rows.json", b'[{"a": 1}, [2]]', "line 1: .*not list"),
        ("rows.json", b'[{"a": 1},\n', "line 2: not JSON"),
        ("rows.json", b" ", "empty"),
        ("rows.json", b"[ ]", "empty"),
        ("rows.jsonl", b"", "empty"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], r"row \d .*fetch"),
        ("rows.jsonl.gz", b'{"a": 1}\n', "row 0 .*fetch"),
        ("rows.jsonl", b'{"a": "b"}\n' * 3 + b'{"a": "\xe9"}\n', "line 4: not UTF-8 .*0xe9"),
        ("rows.csv", b"a,b\n1,2\n\xe9,3\n", "line 3: not UTF-8 .*0xe9"),
        ("rows.json", b'[{"a": "b"},\n{"a": "\xe9"}]', "line 2: not UTF-8 .*0xe9"),
        ("rows.jsonl", '{"a": "b"}\n'.encode("utf-16"), "line 1: not UTF-8"),
        ("rows.parquet", b"no table", "row 0 .*Parquet"),
        ("rows.json", b'[{"a": 1}]\n\n[{"a": 2}]', "line 3: not JSON .text after the end"),
        ("rows.json", b'[{"a": 1},\n ]', "line 2: not JSON"),
        pytest.param("rows.jsonl", b'{"a": 1}\n' + DEEP, "line 2: .*too deep", id="deep line"),
        pytest.param("rows.json", b'[{"a": 1},\n' + DEEP, "line 2: .*too deep", id="deep array"),
        pytest.param(
            "rows.jsonl",
            b'{"a": 1}\n{"a": ' + b"7" * 5000 + b"}\n",
            "line 2: .*4300",
            id="long number",
        ),
        pytest.param(
            "rows.csv", b"a,b\n1,2\n" + LONG + b",3\n", "line 3: .*field limit", id="long field"
        ),
        pytest.param("rows.csv", b"\n" + LONG + b",b\n", "line 2: .*field limit", id="long name"),
        pytest.param(
            "rows.csv", b'a,b\n1,"2\n' + LONG + b"\n", "line 3: .*field limit", id="open quotes"
        ),
        ("rows.txt", b"{}", ".jsonl"),
    ],
)
def test_what_cannot_be_read_is_refused_by_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"rows\S*{name.removeprefix('rows')}.*{message}"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", '{"a": "é"}\r\n{"a": "b"}'),
        ("rows.json", '[{"a": "é"}, {"a": "b"}]'),
        ("rows.csv", "a\né\nb\n"),
        ("rows.csv.gz", "a\r\né\r\nb\r\n"),
    ],
)
def test_a_byte_order_mark_belongs_to_no_row(tmp_path, name, content):
    raw = content.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert [row.values for row in read_rows(tmp_path / name)] == [{"a": "é"}, {"a": "b"}]


def test_empty_lines_before_a_table_are_skipped_and_counted(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeff\r\n\na,b\n\n1,2\n".encode())
    (row,) = read_rows(path)
    assert row.values == {"a": "1", "b": "2"} and row.where == f"{path}, line 5"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=r"rows\.csv: .*empty"):
        list(read_rows(path))


def test_damaged_pages_of_a_table_are_named_by_row(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"a": f"text {i} " * 9} for i in range(4000)])
    pyarrow.parquet.write_table(table, path, row_group_size=1024, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 3 // 8 : len(raw) * 3 // 8 + 200] = bytes(200)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"rows\.parquet: .*row 1024 .*Parquet"):
        list(read_rows(path))


def test_a_file_that_is_not_there_and_one_that_is_there_twice(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        list(read_rows(tmp_path / "nothing.jsonl"))
    assert find_files(tmp_path, ("dev",)) == []
    (tmp_path / "dev.json").write_text("[]")
    assert find_files(tmp_path, ("validation", "dev")) == [tmp_path / "dev.json"]
    (tmp_path / "validation.parquet").write_text("")
    with pytest.raises(ValueError, match=r"validation\.parquet and .*dev\.json"):
        find_files(tmp_path, ("validation", "dev"))


def test_hash_is_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"\x00abc")
    assert hash_file(tmp_path / "file") == hashlib.sha256(b"\x00abc").hexdigest()


ROW = Row(
    {
        "none": None,
        "text": " a ",
        "blank": "\n",
        "number": 3,
        "flag": True,
        "texts": ["a", ""],
        "mixed": ["a", 1],
        "empty": [],
        "lists": [[1], 2],
        "objects": [{"a": 1}, {}],
        "object": {"a": "x"},
    },
    "f, line 2",
    4,
)


@pytest.mark.parametrize(
    "read, message",
    [
        (lambda row: row.text("nothing"), ": .*'nothing' is missing"),
        (lambda row: row.text("nothing", "none"), ": .*'nothing' is missing"),
        (lambda row: row.text("none"), ": .*'none' .*str, not NoneType"),
        (lambda row: row.text("blank"), ": .*'blank' is empty"),
        (lambda row: row.get("flag", int), ": .*'flag' .*int, not bool"),
        (lambda row: row.texts("mixed"), ": .*'mixed' .*strings"),
        (lambda row: row.answers("texts"), ": .*'texts' .*empty"),
        (lambda row: row.aliases("texts"), ": .*'texts' .*empty"),
        (lambda row: row.answers("empty"), ": .*'empty' .*at least one"),
        (lambda row: row.lists("lists"), r": .*lists\[1\] .*list, not int"),
        (lambda row: row.objects("empty"), ": .*'empty' is empty"),
        (lambda row: row.objects("lists"), r": .*lists\[0\] .*object, not list"),
        (lambda row: row.objects("objects")[1].text("a"), r", objects\[1\]: .*'a' is missing"),
        (lambda row: row.object("object").get("a", int), ", object: .*'a' .*int"),
        (lambda row: row.identifier("texts", otherwise="x"), ": .*'texts' .*number"),
    ],
)
def test_faults_name_place_and_field(read, message):
    with pytest.raises(ValueError, match=f"^f, line 2{message}"):
        read(ROW)


def test_fields_as_asked_for():
    assert ROW.text("nothing", "text") == " a "
    assert ROW.get("number", int) == 3 and ROW.get("flag", bool) is True
    assert ROW.texts("texts") == ("a", "") and ROW.texts("empty") == ()
    assert ROW.has("flag") and not ROW.has("none") and not ROW.has("nothing")
    assert ROW.identifier("nothing", "number", otherwise="x") == "3"
    assert ROW.identifier("none", otherwise="train") == "train_3"
