"""Files are written whole or not at all; what kills left goes; a full disk is named."""

import os
import socket
import subprocess
import sys

import pytest

from stepsearch_jax import files

FULL = OSError(28, "No space left on device")


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_left_is_removed(tmp_path, dead):
    here, path = socket.gethostname(), tmp_path / "a.json"
    leftovers = [tmp_path / f".a.json.new.{here}.{dead}", tmp_path / f".a.json.made.{here}.{dead}"]
    leftovers[0].touch()
    leftovers[1].mkdir()
    (leftovers[1] / "part").touch()
    kept = [
        tmp_path / f".a.json.new.{here}.{os.getppid()}",  # at work
        tmp_path / f".a.json.new.another.host.{dead}",  # perhaps at work
        tmp_path / f".b.json.new.{here}.{dead}",  # of another file
        tmp_path / ".a.json.backup",  # the user's
    ]
    for file in kept:
        file.touch()
    files.write_text(path, "{}")
    assert not any(file.exists() for file in leftovers) and all(file.exists() for file in kept)
    os.utime(kept[1], (0, 0))  # nobody has touched it for years
    files.write_text(path, "{}")
    assert not kept[1].exists() and path.read_text() == "{}"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_text(path, "old")

    def refuse(self, raw):
        with open(self, "wb") as file:
            file.write(raw[:1])
        raise FULL

    monkeypatch.setattr(type(path), "write_bytes", refuse)
    with pytest.raises(files.WriteError, match=r"a\.json .*No space left on device"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        RuntimeError("RESOURCE_EXHAUSTED: write: [OS error 28: No space left on device]"),
        OSError("8192 requested and 0 written"),  # NumPy's tofile
        OSError("Not enough disk space. Needed: Unknown size"),  # TFDS
    ],
    ids=["system", "library", "numpy", "tfds"],
)
def test_every_form_of_a_full_disk_names_the_file_once(tmp_path, error):
    with pytest.raises(files.WriteError) as caught:
        with files.naming_failures(tmp_path / "outer"), files.naming_failures(tmp_path / "inner"):
            try:
                raise error
            except Exception as cause:
                raise ValueError("saving failed") from cause
    assert str(tmp_path / "inner") in str(caught.value) and "outer" not in str(caught.value)


def test_other_errors_pass():
    for error in (ValueError("wrong"), FileNotFoundError(2, "missing", "corpus.jsonl")):
        with pytest.raises(type(error)) as caught, files.naming_failures("x"):
            raise error
        assert caught.value is error
