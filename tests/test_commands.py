"""The commands that README, docs and the configs' docstrings show: what they run exists, and their flags, configs and keys are accepted."""
import argparse
import pathlib
import re
import shlex

import jax
import pytest

from configs import base
from stepsearch_jax import sharding
from stepsearch_jax.data.atlas_world import make_worlds
from stepsearch_jax.settings import check_config
from stepsearch_jax.startup import read_config

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGES = {str(path.relative_to(REPO)): path.read_text() for pattern in ("README.md", "docs/*.md", "configs/*.py") for path in sorted(REPO.glob(pattern))}


def list_commands(text: str) -> list[str]:
    """Lines that run a part of this repository, those that a backslash continues in one piece."""
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if re.match(r"\s*(\w+=\S* )*(python -m stepsearch_jax\.|(python|bash) launch/)", line)]


COMMANDS = [pytest.param(command, id=f"{page}: {command[:70]}") for page, text in PAGES.items() for command in list_commands(text)]


def load(words: list[str]):
    """The config that a command runs with; None where it takes none, or names a placeholder."""
    file = next((word.removeprefix("--config=") for word in words if word.startswith("--config=")), None)
    if "launch/quickstart.sh" in words:
        variant = next((word for word in words[2:] if not word.startswith("-")), "")
        file = "configs/atlas_quickstart.py" + (f":{variant}" if variant else "")
    if file in (None, "…"):
        return None
    return read_config(argparse.ArgumentParser(), str(REPO / file), [word for word in words if word.startswith("--config.")])


def test_commands_are_found():
    text = "```bash\nA=b python -m stepsearch_jax.train \\\n    --x=1  # why\npip install a\n"
    assert list_commands(text) == ["A=b python -m stepsearch_jax.train --x=1 # why"]
    assert len(COMMANDS) > 40


def read_definitions(file: str) -> list[str]:
    """The code that may define the flags of a command: its own file, without the docstring, and what that one leaves it to."""
    elsewhere = {"train": ["startup.py"], "evaluate": ["startup.py"], "export": ["startup.py"], "prepare": ["preparation/*.py"], "benchmark": [],
                 "serve": [], "preflight": []}
    paths = [REPO / file, *(path for pattern in elsewhere.get(pathlib.Path(file).stem, []) for path in sorted((REPO / "stepsearch_jax").glob(pattern)))]
    if "sweep" in file:
        paths.append(REPO / "launch/sweep.py")
    return [re.sub(r'\A(#!.*\n)?""".*?"""', "", path.read_text(), flags=re.S) for path in paths]


def test_a_flag_of_another_command_is_not_known():
    definitions = "\n".join(read_definitions("stepsearch_jax/train.py"))
    assert '"workdir"' in definitions and not any(f'"{name}"' in definitions or f"--{name}" in definitions for name in ("topology", "jobs", "writer"))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_it_runs_and_its_flags_exist(command):
    words = shlex.split(command, comments=True)
    module = re.search(r"python -m (\S+)", command)
    file = module[1].replace(".", "/") + ".py" if module else next(word for word in words if word.startswith("launch/"))
    assert (REPO / file).is_file() and (not module or '__name__ == "__main__"' in (REPO / file).read_text())
    for name in re.findall(r" --([\w-]+)", " ".join(words)):
        assert name == "config" or re.search(rf'["(]-*{name}["]|--{name}[=)]', "\n".join(read_definitions(file))), name


@pytest.mark.parametrize("command", COMMANDS)
def test_its_config_is_accepted(command):
    """The config loads, has the keys that the command sets, and fits together; an atlas of the command's own can be made."""
    config = load(shlex.split(command, comments=True))
    if config is None:
        return
    check_config(config, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    a = config.data.atlas
    if "--config.data.atlas." in command:
        make_worlds(seed=a.seed, entities=a.entities, extra_facts=a.extra_facts, k1=config.search.bm25_k1, b=config.search.bm25_b, shapes=tuple(a.shapes),
                    questions=dict(train=a.train_questions, validation=a.validation_questions, test=a.test_questions))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_key_that_a_page_names_exists(page):
    for path in re.findall(r"(?:configs|launch)/[\w/]+\.(?:py|sh)", PAGES[page]):
        assert (REPO / path).is_file(), path
    config = base.get_config()
    keys = re.findall(r"--config\.([a-z][\w.]*)=", PAGES[page])
    keys += [key for key in re.findall(r"`([a-z]\w*\.[a-z]\w*)`", PAGES[page]) if key.split(".")[0] in config and not key.endswith((".json", ".py"))]
    for key in keys:
        section = config
        for name in key.split("."):
            assert name in section, key
            section = section[name]
