"""What `pip install` gives: every package, the configs with the shipped warm start, one command."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from stepsearch_jax import cli
from stepsearch_jax.run import config_file
from stepsearch_jax.run.warm_start import find_checkpoint

REPO = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def test_every_package_is_listed():
    folders = [path.parent for path in REPO.glob("stepsearch_jax/**/__init__.py")]
    names = {".".join(path.relative_to(REPO).parts) for path in folders}
    configs = [path.parent for path in REPO.glob("configs/**/__init__.py")]
    names |= {".".join(("stepsearch_jax", *path.relative_to(REPO).parts)) for path in configs}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names and len(names) > 15


def test_every_data_file_is_listed():
    """Files that are not Python but are read from within a package."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    listed = set()
    for package, patterns in data.items():
        folder = REPO / package.replace("stepsearch_jax.configs", "configs").replace(".", "/")
        listed |= {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    there = subprocess.run(
        ["git", "ls-files", "stepsearch_jax", "configs"], cwd=REPO, capture_output=True, text=True
    )
    if there.returncode:
        pytest.skip("not a git checkout")
    needed = {REPO / name for name in there.stdout.split() if not name.endswith(".py")}
    assert needed and needed <= listed


def test_the_console_command_is_that_of_python_m(capsys, monkeypatch):
    assert PROJECT["project"]["scripts"] == {"stepsearch": "stepsearch_jax.cli:main"}
    for arguments in (["--help"], ["benchmark", "--help"]):
        monkeypatch.setattr(sys, "argv", ["stepsearch", *arguments])
        with pytest.raises(SystemExit, match="^0$"):
            cli.main()
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", shown, re.MULTILINE) for name in cli.COMMANDS)
    assert "stepsearch_jax.benchmark" in shown and "retrieval" in shown
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(["trian"])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("installed", [False, True])
def test_shipped_configs_are_found_anywhere(installed, tmp_path, monkeypatch):
    """By their bare names, and by `from configs import base` in a config of the user's own."""
    if installed:  # where the wheel puts them
        package = tmp_path / "site-packages" / "stepsearch_jax"
        package.mkdir(parents=True)
        (package / "configs").symlink_to(REPO / "configs")
        monkeypatch.setattr(config_file, "PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    for name in [name for name in sys.modules if name.startswith("configs.")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "configs").mkdir()  # a folder of the user's own of that name
    own = "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.seed = 7\n"
    (tmp_path / "configs" / "mine.py").write_text(own + "    return c\n")
    assert config_file.load_config("configs/mine.py").seed == 7
    quickstart = config_file.load_config("atlas_quickstart:one_search")
    assert quickstart.rollout.max_turns == 1
    assert config_file.load_config("configs/atlas_quickstart.py").rollout.max_turns == 4
    assert (find_checkpoint(quickstart.sft.checkpoint) / "_METADATA").is_file()
    with pytest.raises(ValueError, match="atlas_quickstart"):
        config_file.load_config("atlas_quikstart")
