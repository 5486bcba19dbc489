"""Loading: a changed input is a new data set, limits, mistakes, and the order of questions."""

import os
import pathlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core import shuffle
from test_datasets import THREE_HOP, TWO_HOP, make_config, write_rows

from stepsearch_jax.data import loading
from stepsearch_jax.data.loading import load_source, question_rows


def load(config):
    return load_source(config, k1=0.9, b=0.4)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 5),
    st.integers(0, 200),
    st.integers(0, 90),
    st.integers(0, 90),
)
def test_question_rows_laws(num_questions, seed, position, count, more):
    rows = question_rows(position, count + more, num_questions, seed)
    assert rows.shape == (count + more,) and rows.dtype == np.int64
    # Cut anywhere, taken from anywhere: the same rows.
    parts = [
        question_rows(position, count, num_questions, seed),
        question_rows(position + count, more, num_questions, seed),
    ]
    np.testing.assert_array_equal(rows, np.concatenate(parts))
    # Row by row, from the definition: position p is entry p mod n of the permutation of epoch p //
    # n.
    for offset in range(0, count + more, 7):
        epoch, entry = divmod(position + offset, num_questions)
        order = np.random.default_rng([seed, epoch]).permutation(num_questions)
        assert rows[offset] == order[entry]
    epoch = question_rows(3 * num_questions, num_questions, num_questions, seed)
    assert sorted(epoch.tolist()) == list(range(num_questions))


def test_epochs_and_seeds_differ():
    first, second = question_rows(0, 100, 100, 0), question_rows(100, 100, 100, 0)
    other = question_rows(0, 100, 100, 1)
    assert (first != second).any() and (first != other).any()


@pytest.mark.parametrize("arguments", [(-1, 1, 5, 0), (0, -1, 5, 0), (0, 1, 0, 0)])
def test_question_rows_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match="question_rows"):
        question_rows(*arguments)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("musique-train.array_record-00000-of-00001", lambda raw: raw[: len(raw) // 2]),
        ("corpus.jsonl", lambda raw: raw[:20] + bytes(len(raw) - 20)),
        ("corpus.jsonl", lambda raw: raw[:-1]),
        ("corpus.jsonl", None),
        ("corpus.offsets.npy", lambda raw: raw[:-1]),
        ("musique-train.array_record-00000-of-00001", None),
        ("dataset_info.json", lambda raw: raw[:9]),
        ("metadata.json", None),
    ],
)
def test_a_damaged_data_set_is_named_with_what_to_do(tmp_path, name, damage):
    config = make_config(tmp_path, kind="musique", path=str(tmp_path))
    write_rows(tmp_path / "train.jsonl", [TWO_HOP, THREE_HOP])
    load(config)
    (file,) = pathlib.Path(config.cache_dir).rglob(name)
    raw = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(raw))
    with pytest.raises(ValueError, match=rf"{config.cache_dir}\S+ .*remove this folder"):
        source = load(config)
        print(source.splits["train"][0], source.documents[0])


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path):
    config = make_config(tmp_path, kind="musique", path=str(tmp_path))
    write_rows(tmp_path / "train.jsonl", [TWO_HOP])
    load(config)
    (metadata,) = pathlib.Path(config.cache_dir).rglob("metadata.json")
    folder = metadata.parent.parent
    for name, age in (("incomplete.OLD_1.0.0", 2 * loading.LEFT_S), ("incomplete.NEW_1.0.0", 60)):
        (folder / name).mkdir()
        for path in (folder / name / "part", folder / name):
            path.exists() or path.write_text("x")
            os.utime(path, (time.time() - age,) * 2)
    load(config)
    assert sorted(path.name for path in folder.iterdir()) == ["1.0.0", "incomplete.NEW_1.0.0"]


def test_a_corpus_may_be_larger_than_what_tfds_holds(tmp_path, monkeypatch):
    """Beyond this size, usually 1 GB, TFDS needs TensorFlow to write a split."""
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 6000)
    config = make_config(tmp_path, kind="musique", path=str(tmp_path))
    write_rows(tmp_path / "train.jsonl", [TWO_HOP, THREE_HOP])
    rows = [{"title": f"T{i}", "text": "é" * 300} for i in range(20)]
    write_rows(tmp_path / "corpus.jsonl", rows)
    source = load(config)
    assert [(document.id, document.title, document.text) for document in source.documents] == [
        (i, row["title"], row["text"]) for i, row in enumerate(rows)
    ]
    assert len(source.splits["train"]) == 2


def test_changed_input_is_read_again(tmp_path):
    config = make_config(tmp_path, kind="musique", path=str(tmp_path))
    write_rows(tmp_path / "train.jsonl", [TWO_HOP])
    first = load(config)
    assert len(first.splits["train"]) == 1 and load(config).manifest == first.manifest
    write_rows(tmp_path / "train.jsonl", [TWO_HOP, THREE_HOP])
    second = load(config)
    assert len(second.splits["train"]) == 2 and second.manifest["hash"] != first.manifest["hash"]
    # The same size at another time: still a new data set.
    text = (tmp_path / "train.jsonl").read_text().replace("Leo", "Ian")
    (tmp_path / "train.jsonl").write_text(text)
    os.utime(tmp_path / "train.jsonl", ns=(1, 1))
    assert load(config).splits["train"][1].answer == "Ian"


def test_atlas_arguments_name_the_data_set(tmp_path):
    config = make_config(tmp_path)
    hashes = {load(config).manifest["hash"], load_source(config, k1=1.2, b=0.4).manifest["hash"]}
    config.atlas.seed = 2
    hashes.add(load(config).manifest["hash"])
    assert len(hashes) == 3


def test_train_questions_takes_the_first(tmp_path):
    everything, few = load(make_config(tmp_path)), load(make_config(tmp_path, train_questions=5))
    assert list(few.splits["train"]) == everything.splits["train"][:5]
    assert len(few.splits["test"]) == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_questions": 13}, r"data\.train_questions is 13, .* 12 "),
        ({"train_split": "dev"}, r"data\.train_split is 'dev', .*\['test', 'train'\]"),
        ({"kind": "squad"}, r"data\.kind is 'squad'; .*atlas"),
    ],
)
def test_mistakes_in_the_config(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(make_config(tmp_path, **changes))


def test_bad_rows_leave_nothing_behind(tmp_path):
    config = make_config(tmp_path, kind="musique", path=str(tmp_path))
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: .*'paragraphs'"):
        load(config)
    assert not [path for path in pathlib.Path(config.cache_dir).rglob("*") if path.is_file()]
    write_rows(tmp_path / "train.jsonl", [TWO_HOP])
    assert len(load(config).splits["train"]) == 1


def test_making_a_data_set_logs_one_line(tmp_path, capfd, caplog):
    caplog.set_level("INFO", "stepsearch_jax")
    config = make_config(tmp_path)
    for _ in range(2):  # built, then read: the second load logs nothing
        load(config)
    (record,) = caplog.records
    assert config.cache_dir in record.getMessage()
    assert capfd.readouterr() == ("", "")


def test_a_data_set_that_another_process_finished_first_is_used(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    expected = load(make_config(tmp_path / "elsewhere"))
    build = loading.atlas.Atlas.make_records

    def build_while_another_finishes(self, stored):
        monkeypatch.setattr(loading.atlas.Atlas, "make_records", build)
        load(config)  # the other process, in the middle of ours
        return build(self, stored)

    monkeypatch.setattr(loading.atlas.Atlas, "make_records", build_while_another_finishes)
    late = load(config)
    assert list(late.documents) == list(expected.documents) and late.manifest == expected.manifest
