"""The commands that the pages of documentation and the configs' docstrings show: what they run
exists, and their flags, configs and keys are accepted.
"""

import argparse
import functools
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest

from configs import base
from stepsearch_jax import cli, sharding
from stepsearch_jax.cli import read_config
from stepsearch_jax.data.atlas_world import make_worlds
from stepsearch_jax.run.checks import check_config

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(REPO)): path.read_text()
    for pattern in ("*.md", "docs/*.md", "configs/*.py", "configs/sweeps/*.py")
    for path in sorted(REPO.glob(pattern))
}


RUNS = r"python -m stepsearch_jax\.[a-z]|(?:python|bash) launch/|stepsearch [a-z]"


def list_commands(text: str) -> list[str]:
    """What a page runs of this repository: whole lines, those that a backslash continues in one
    piece, and code spans. `stepsearch NAME` counts as `python -m stepsearch_jax.NAME`.
    """
    lines = re.findall(
        rf"^\s*((?:\w+=\S* )*(?:{RUNS}).*)$", text.replace("\\\n", " "), re.MULTILINE
    )
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(rf"(?<!`)`((?:{RUNS})[^`]+)`", prose)
    found = [" ".join(command.split()) for command in (*lines, *spans)]
    return [re.sub(r"^stepsearch ", "python -m stepsearch_jax.", command) for command in found]


COMMANDS = [
    pytest.param(command, id=f"{page}: {command[:70]}")
    for page, text in PAGES.items()
    for command in list_commands(text)
]


def load(words: list[str]):
    """The config that a command runs with; None where it takes none, or names a placeholder."""
    file = next(
        (word.removeprefix("--config=") for word in words if word.startswith("--config=")), None
    )
    if "launch/quickstart.sh" in words:
        variant = next((word for word in words[2:] if not word.startswith("-")), "")
        file = "configs/atlas_quickstart.py" + (f":{variant}" if variant else "")
    if file in (None, "…"):
        return None
    return read_config(
        argparse.ArgumentParser(),
        str(REPO / file) if "/" in file else file,
        [word for word in words if word.startswith("--config.")],
    )


def test_commands_are_found():
    text = "```bash\nA=b python -m stepsearch_jax.train \\\n    --x=1  # why\npip install a\n```\n"
    text += "by `stepsearch evaluate\n--y=2` or `stepsearch COMMAND`; `bash -n`\n"
    assert list_commands(text) == [
        "A=b python -m stepsearch_jax.train --x=1 # why",
        "python -m stepsearch_jax.evaluate --y=2",
    ]
    assert len(COMMANDS) > 60


@functools.cache
def read_help(module: str, subcommand: str = "") -> str:
    """What --help prints. It loads no jax, so that it is there at once."""
    program = (
        f"import runpy, sys\nsys.argv = ['x', *{[subcommand] if subcommand else []}, '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: sys.exit(end.code or ('jax' in sys.modules and 'it loads jax'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def list_subcommands(name: str) -> list[str]:
    """Those that --help of a command names, as argparse does or in lines `… NAME SUBCOMMAND`."""
    shown = read_help(f"stepsearch_jax.{name}")
    if listed := re.search(r"^positional arguments:\n  \{([\w,]+)\}", shown, re.MULTILINE):
        return listed[1].split(",")
    return re.findall(rf"stepsearch_jax\.{name} ([a-z]+)", shown)


def test_subcommands_are_found():
    assert list_subcommands("train") == []
    assert list_subcommands("prepare") == ["audit", "keys", "index"]
    assert {"rollout", "padding", "all"} <= set(list_subcommands("benchmark"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_every_flag_and_loads_no_jax(name):
    assert f"stepsearch_jax.{name}" in read_help(f"stepsearch_jax.{name}")
    for subcommand in list_subcommands(name):
        assert "--json" in read_help(f"stepsearch_jax.{name}", subcommand)


SHOW_HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
print(*sorted({"jax", "matplotlib", "scipy"} & set(sys.modules)))
"""


@pytest.mark.parametrize("script", sorted(path.name for path in (REPO / "launch").glob("*.py")))
def test_help_of_a_script_loads_nothing_slow(script):
    command = [sys.executable, "-c", SHOW_HELP, f"launch/{script}"]
    shown = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert "usage" in shown and shown.splitlines()[-1] == ""


def test_a_flag_of_another_command_is_not_known():
    shown = read_help("stepsearch_jax.train")
    assert "--workdir" in shown and not any(
        f"--{name}" in shown for name in ("topology", "jobs", "writer")
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_what_it_runs_and_its_flags_exist(command):
    words = shlex.split(command, comments=True)
    given = re.findall(r" --([\w-]+)", " ".join(words))
    if module := re.search(r"python -m ((?:\w+\.)+(\w+))", command):
        after = words[words.index(module[1]) + 1 :]
        shown = read_help(
            module[1],
            after[0] if after and after[0] in list_subcommands(module[2]) else "",
        )
    else:
        file = next(word for word in words if word.startswith("launch/"))
        shown = (REPO / file).read_text() + (
            (REPO / "launch/sweep.py").read_text() if "sweep" in file else ""
        )
    for name in given if "{" not in command else ():
        assert re.search(rf"--{name}\b", shown), name


@pytest.mark.parametrize("command", COMMANDS)
def test_its_config_is_accepted(command):
    """The config loads, has the keys that the command sets, and fits together; an atlas of the
    command's own can be made.
    """
    config = load(shlex.split(command, comments=True))
    if config is None:
        return
    if config.model.num_layers == 0:  # the sizes come from the checkpoint: any will do here
        config.model.num_layers = 24
    check_config(config, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    a = config.data.atlas
    if "--config.data.atlas." in command:
        make_worlds(
            seed=a.seed,
            entities=a.entities,
            k1=config.search.bm25_k1,
            b=config.search.bm25_b,
            shapes=tuple(a.shapes),
            questions=dict(
                train=a.train_questions, validation=a.validation_questions, test=a.test_questions
            ),
        )


FOLDERS = ("configs", "docs", "examples", "launch", "stepsearch_jax", "tests")
FILES = [f"/{path.relative_to(REPO)}" for name in FOLDERS for path in (REPO / name).rglob("*.*")]


def find_missing(text: str) -> list[str]:
    """Files that a page names and that are not there. A name in a code span may be the end of a
    path, such as `rl/losses.py`."""
    named = re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w/.-]*\.(?:py|sh|md|png)\b", text)
    named += re.findall(r"`([\w/]+\.(?:py|sh))`", text)
    named = [name for name in named if "NAME" not in name]
    return [name for name in named if not any(file.endswith(f"/{name}") for file in FILES)]


def test_missing_files_are_found():
    there = "docs/data.md, `losses.py`, `rl/losses.py`, launch/pod/create.sh: `data/NAME.py`"
    assert find_missing(f"{there} docs/no.md `rl/no.py` runs/docs/other.md tests/no.py)") == [
        "docs/no.md",
        "tests/no.py",
        "rl/no.py",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_key_that_a_page_names_exists(page):
    assert find_missing(PAGES[page]) == []
    config = base.get_config()
    keys = re.findall(r"--config\.([a-z][\w.]*)=", PAGES[page])
    keys += [
        key
        for key in re.findall(r"`([a-z]\w*\.[a-z]\w*)`", PAGES[page])
        if key.split(".")[0] in config
        and not key.endswith((".json", ".jsonl", ".py", ".txt", ".safetensors"))
    ]
    for key in keys:
        section = config
        for name in key.split("."):
            assert name in section, key
            section = section[name]
