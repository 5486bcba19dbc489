"""What is wrong with --config, or beside it on the command line, is said in one line."""

import argparse

import pytest

from stepsearch_jax.cli import read_config

FILES = {
    "plain.py": """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({'seed': 0, 'on': True})
""",
    "word.py": """
import ml_collections

def get_config(word):
    return ml_collections.ConfigDict({'word': word})
""",
    "sizes.py": """
from __future__ import annotations
import dataclasses
import ml_collections

@dataclasses.dataclass
class Sizes:
    layers: int = 2

def get_config():
    return ml_collections.ConfigDict({'layers': Sizes().layers})
""",
    "sweep.py": "def sweep(add):\n    pass\n",
    "broken.py": "def get_config(:\n",
    "raising.py": "def get_config():\n    return {}['seed']\n",
    "nothing.py": "def get_config():\n    pass\n",
    "notes.md": "# Notes\n",
}
REFUSED = {  # flags -> the message
    ("none.py",): r"flag --config=none\.py: there is no file none\.py",
    ("",): r"flag --config=: there is no file",
    ("plain.py:foo",): r"flag --config=plain\.py:foo: plain\.py takes no argument.* :foo",
    ("word.py",): r"flag --config=word\.py: word\.py takes an argument.* word\.py:ARGUMENT",
    ("sweep.py",): r"flag --config=sweep\.py: .*'get_config'.* get_config\(\).*launch/sweep\.py",
    ("broken.py",): r"flag --config=broken\.py: broken\.py: SyntaxError: ",
    ("raising.py",): r"flag --config=raising\.py: raising\.py, line 2: KeyError: 'seed'; ",
    ("nothing.py",): r"flag --config=nothing\.py: nothing\.py.*get_config\(\) returns NoneType",
    ("notes.md",): r"flag --config=notes\.md: notes\.md is no Python file",
    ("plain.py", "config.seed=1"): r"unexpected argument config\.seed=1; write --config\.key=value",
    ("plain.py", "word", "--config.seed=1"): r"unexpected argument word; ",
    ("plain.py", "--config.on", "false"): r"unexpected argument false; ",
    ("plain.py", "--config.sed=1"): r"--config\.sed=1: the config has no such key",
    ("plain.py", "--config.seed.x=1"): r"--config\.seed\.x=1",
    ("plain.py", "--config.=1"): r"one of --config\.=1 ",
    ("word.py:a", "--config.word.x=1"): r"one of --config\.word\.x=1 ",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)


def read(file, *overrides):
    return read_config(argparse.ArgumentParser("command"), file, overrides)


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused_with_one_line(folder, arguments):
    with pytest.raises(SystemExit, match=f"^stepsearch_jax: {REFUSED[arguments]}") as caught:
        read(*arguments)
    assert "\n" not in str(caught.value.code)


def test_read(folder):
    assert read("plain.py", "--config.seed=3", "--noconfig.on").to_dict() == {
        "seed": 3,
        "on": False,
    }
    assert read("word.py:a:b").word == "a:b"
    assert read("sizes.py").layers == 2
    with pytest.raises(AttributeError, match="locked"):
        read("plain.py").other = 1
