"""Step rewards and search functions of the user's: docs/plugins.md's own examples, and bad ones."""

import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import running
import tiny_config

from stepsearch_jax.evaluation.greedy import evaluate_script
from stepsearch_jax.plugins import load_step_reward, score_steps
from stepsearch_jax.records import Document, Episode, Question, Turn, TurnStatus
from stepsearch_jax.rollout.scripted import PERFECT
from stepsearch_jax.run.collect import Collected
from stepsearch_jax.run.corpus import open_corpus
from stepsearch_jax.run.iteration import rollout_metrics
from stepsearch_jax.run.system import build_system

DOCUMENTS = [Document(0, "Ann Lee", "Ann Lee lives in Rome."), Document(1, "Rome", "A city.")]
EPISODE = Episode(
    Question("q", "Where does Ann Lee live?", "Rome"),
    "",
    (
        Turn(TurnStatus.SEARCH, "", query="rome", doc_ids=(1,)),
        Turn(TurnStatus.SEARCH, "", query="ann", doc_ids=(1, 0)),
        Turn(TurnStatus.INVALID, ""),
        Turn(TurnStatus.SEARCH, "", query="ann", search_ok=False),
        Turn(TurnStatus.ANSWER, "", answer="Rome"),
    ),
    finished=True,
    truncated=False,
)
SHORT = dataclasses.replace(EPISODE, turns=(*EPISODE.turns[:2], EPISODE.turns[-1]))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """The folder that a user starts from, with the files that docs/plugins.md shows."""
    page = (running.REPO / "docs/plugins.md").read_text()
    for name, code in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", page, re.DOTALL):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def config(tmp_path_factory):
    return running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))


def test_step_reward_of_the_docs(folder):
    function = load_step_reward("my_rewards:answer_found")
    assert function(EPISODE, DOCUMENTS) == [0, 1, 0, 0, 0]
    assert score_steps(function, "mine:f", [EPISODE], DOCUMENTS, 4).tolist() == [[0, 1, 0, 0]]


def test_numbers_count_on_successful_searches_only(folder):
    (folder / "mine.py").write_text("def ones(episode, documents): return [1] * len(episode.turns)")
    scores = score_steps(load_step_reward("mine:ones"), "mine:ones", [EPISODE], DOCUMENTS, 6)
    assert scores.tolist() == [[1, 1, 0, 0, 0, 0]]


def test_search_of_the_docs(config, folder):
    """It is the engine of the run, and named in the manifest with a hash of its file."""
    config.search.kind, config.search.k = "my_search:by_title", 3
    source, index = open_corpus(config)
    title = source.documents[7].title
    ids, scores = index.search([title, "no such words at all"], 3)
    assert ids[0, 0] == 7 and (ids[1] == -1).all()
    assert scores[0, 0] == 1 and (scores[1] == 0).all()
    about = index.describe(3)
    assert (about["retriever"], about["k"]) == ("my_search:by_title", 3)
    before = about["settings"]["code"]
    with (folder / "my_search.py").open("a") as file:
        file.write("\n# changed\n")
    assert open_corpus(config)[1].describe(3)["settings"]["code"] != before


def test_both_in_a_run(config, folder):
    """A scripted searcher's episodes: other documents, other rewards, and the metric's name."""
    config.reward.step_reward, config.search.kind = "my_rewards:answer_found", "my_search:by_title"
    system = build_system(config, ["validation"])
    assert system.describe_step_reward()["function"] == "my_rewards:answer_found"
    assert system.retrieval["retriever"] == "my_search:by_title"
    means = evaluate_script(system, "validation", PERFECT)
    assert means["gold_recall"] > 0.5  # Atlas's queries name titles
    scores = system.score([SHORT])
    assert scores.gain.shape == scores.step_rewards.shape == (1, system.settings.turns)


def test_metrics_and_report_use_the_name(config, folder):
    scores = build_system(config, ["validation"]).score([SHORT])
    rows = type(
        "Rows",
        (),
        {name: np.zeros(1) for name in ("finished", "truncated", "length", "prompt_length")},
    )
    searches = type("Counts", (), {"failed": 0, "seconds": 0.0})
    rollout = Collected(None, rows, [SHORT], scores, np.zeros((1, 3)), searches)
    assert "reward/answer_found" in rollout_metrics(rollout, "my_rewards:answer_found")
    assert rollout_metrics(rollout, "mine:f1")["f1"] == scores.measures.f1[0]  # hides no metric
    metrics = rollout_metrics(rollout, "gain")
    assert "gain" in metrics
    assert np.isnan(metrics["gold_recall"])  # not known: the question has no gold documents


BAD = {
    "no module": ("reward.step_reward", "nowhere:f", None, "nowhere"),
    "broken module": ("reward.step_reward", "mine:f", "import nothing_of_this_name", "mine"),
    "no function": ("reward.step_reward", "mine:f", "g = 1", " f"),
    "no callable": ("reward.step_reward", "mine:f", "f = 1", " f"),
    "arguments": ("reward.step_reward", "mine:f", "def f(episode): pass", "documents"),
    "no name": ("reward.step_reward", "mine:", "f = 1", "mine"),
    "no search": ("search.kind", "mine:f", "def f(documents, c): pass", "NoneType"),
    "search's arguments": ("search.kind", "mine:f", "def f(documents): pass", "search_config"),
}


@pytest.mark.parametrize("key,name,code,named", BAD.values(), ids=BAD)
def test_bad_functions_are_refused_before_work(key, name, code, named, config, folder):
    if code:
        (folder / "mine.py").write_text(code)
    config.update_from_flattened_dict({key: name})
    with pytest.raises(ValueError, match=f"{key}.*{name}.*{named}"):
        build_system(config, ["validation"])


@pytest.mark.parametrize(
    "returned",
    [
        "[1]",
        "[float('nan')] * 5",
        "None",
        "[[1]] * 5",
        "{}",
        "(1 for _ in episode.turns)",
        "['a'] * 5",
        "[[1], [1, 2]]",
        "1 / len(episode.question.gold_ids[:0])",  # raises
    ],
)
def test_bad_step_rewards(returned, folder):
    (folder / "mine.py").write_text(f"def f(episode, documents): return {returned}")
    with pytest.raises(ValueError, match="mine:f.*question q"):
        score_steps(load_step_reward("mine:f"), "mine:f", [EPISODE], DOCUMENTS, 3)


def test_a_callable_object_is_a_function_too(folder, config):
    code = """
import functools
def scale(factor, episode, documents): return [factor] * len(episode.turns)
twice = functools.partial(scale, 2.0)
class Nothing:
    def __call__(self, documents, search_config): return lambda queries, k: [[] for _ in queries]
nothing = Nothing()
"""
    (folder / "mine.py").write_text(code)
    config.reward.step_reward, config.search.kind = "mine:twice", "mine:nothing"
    system = build_system(config, ["validation"])
    assert system.score([SHORT]).gain.max() == 2.0
    assert len(system.describe_step_reward()["code"]) == 16


def test_a_reward_that_is_switched_off_is_refused(folder, config):
    config.reward.step_reward, config.reward.use_gain = "my_rewards:answer_found", False
    with pytest.raises(ValueError, match="reward.use_gain.*my_rewards:answer_found"):
        build_system(config, ["validation"])


def test_an_unknown_engine_is_no_encoder(config):
    config.search.kind = "bm52"
    with pytest.raises(ValueError, match="search.kind.*bm52"):
        open_corpus(config)


def test_padding_of_search_answers(config, folder):
    code = "import numpy\ndef f(documents, c): return lambda queries, k: numpy.array([[3, -1, -1]])"
    (folder / "mine.py").write_text(code)
    config.search.kind = "mine:f"
    assert open_corpus(config)[1].search(["a"], 3)[0].tolist() == [[3, -1, -1]]


@pytest.mark.parametrize(
    "found", ["[[0, 0]]", "[[-2]]", "[[10**6]]", "[[0, 1, 2, 3]]", "[]", "[[1.5]]", "['12']", "[3]"]
)
def test_bad_search_answers(found, config, folder):
    (folder / "mine.py").write_text(f"def f(documents, c): return lambda queries, k: {found}")
    config.search.kind = "mine:f"
    index = open_corpus(config)[1]
    with pytest.raises(ValueError, match=r"search\.kind.*mine:f"):
        index.search(["a"], 3)


@pytest.mark.slow
def test_a_whole_run(folder, tmp_path_factory):
    """By the command: metrics name the reward, and results say which functions were at work."""
    log = running.run_command(
        "train",
        running.shared_cache(tmp_path_factory),
        folder / "run",
        f"--config.sft.checkpoint={running.searching_start(tmp_path_factory)}",
        "--config.reward.step_reward=tests.test_plugins:per_search",
        "--config.iterations=1",
    )
    assert "per_search" in (folder / "run/metrics.jsonl").read_text(), log
    result = json.loads((folder / "run/evaluation.json").read_text())
    assert result["step_reward"]["function"] == "tests.test_plugins:per_search"
    assert "per_search 1.00 − redundancy" in (folder / "run/report.html").read_text()


def per_search(episode, documents):
    return [1.0] * len(episode.turns)
