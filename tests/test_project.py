"""CITATION.cff and the pre-commit hooks."""

import pathlib
import shlex
import subprocess
import sys
import tomllib

import yaml

import stepsearch_jax

REPO = pathlib.Path(__file__).resolve().parents[1]
HOOKS = ".pre-commit-config.yaml"


def test_the_citation_is_that_of_this_version():
    """The keys that CFF 1.2.0 requires, and what the package says of itself."""
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"] == project["name"] == stepsearch_jax.__name__
    assert citation["version"] == stepsearch_jax.__version__
    assert citation["license"] == project["license"]
    assert citation["message"] and all(citation["authors"])
    method, *others = citation["references"]
    assert method["url"].endswith("2505.15107") and others
    assert all(paper[key] for paper in (method, *others) for key in ("type", "title", "authors"))


def test_hooks_are_local_and_run(tmp_path):
    """Each finds nothing in this file and something in a bad one."""
    repositories = yaml.safe_load((REPO / HOOKS).read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert len(hooks) == 2 and len({hook["id"] for hook in hooks}) == 2
    bad = tmp_path / "bad.py"
    bad.write_text("import os\nx  = 1\n")
    for hook in hooks:
        assert hook["language"] == "system" and hook["name"]
        python, *words = shlex.split(hook["entry"])
        assert python == "python"
        status = [
            subprocess.run([sys.executable, *words, file], cwd=REPO, capture_output=True).returncode
            for file in (__file__, bad)
        ]
        assert status == [0, 1], hook["id"]
