"""The README's picture is drawn from a run's files."""

import subprocess
import sys

import pytest
from running import REPO
from test_report import ANSWER, SEARCH, episode, make_run

WRONG = dict(when="before", f1=0.0, em=0.0)


def draw(folder, *names) -> subprocess.CompletedProcess:
    command = [sys.executable, REPO / "docs/draw_quickstart.py", *names]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(REPO)}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_picture_shows_a_question_before_and_after(tmp_path):
    searches = (SEARCH, SEARCH, SEARCH, ANSWER)
    episodes = [
        *(episode(uid=uid, **WRONG) for uid in ("q1", "q2")),
        episode(uid="q1"),  # one search only
        episode(uid="q2", turns=searches),
    ]
    names = ("f1", "gold_recall")
    make_run(tmp_path / "run", episodes=episodes, names=names, iterations=8)
    done = draw(tmp_path, "run", "picture.svg")
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    make_run(tmp_path / "poor", episodes=episodes[:3], names=names)
    done = draw(tmp_path, "poor", "none.svg")
    assert done.returncode == 1 and not (tmp_path / "none.svg").exists()
