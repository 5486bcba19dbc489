"""Evaluation counts every question once, records what happened in each, and writes the files that
the report reads.
"""

import json
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
import running
import tiny_config

from configs import base
from stepsearch_jax import evaluate
from stepsearch_jax.evaluation import greedy
from stepsearch_jax.metrics import MetricsWriter
from stepsearch_jax.report.page import write_report
from stepsearch_jax.rollout.scripted import PERFECT, run_script
from stepsearch_jax.run import collect
from stepsearch_jax.run.folder import FORMAT, write_beginning, write_config
from stepsearch_jax.run.system import System, build_system
from stepsearch_jax.sharding import rows_from_mesh, rows_to_mesh

CONFIG = base.get_config().to_dict()

POOR = {"good": 0.5, "repeat": 0.25, "early": 0.25}


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> System:
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.rollout.max_turns = 3
    return build_system(config, ["validation"])


class Scripted:
    """Replaces the episode program: the script runs the prompts. Keeps what it was asked."""

    def __init__(self, system: System, shares: dict[str, float]):
        self.system, self.shares, self.asked = system, shares, []

    def __call__(self, params, prompts, group_ids, question_ids, key, temperature):
        prompts, group_ids, question_ids = rows_from_mesh((prompts, group_ids, question_ids))
        self.asked.append((prompts.active, question_ids, group_ids, float(temperature)))
        system = self.system
        questions = [system.splits["validation"].questions[max(0, row)] for row in question_ids]
        trajectory = run_script(
            questions,
            prompts.tokens,
            prompts.length,
            system.source.documents,
            system.search,
            system.tokenizer,
            system.settings,
            system.environment.last_turn_warning,
            self.shares,
            known_fraction=0.0,
            seed=len(self.asked),
        )
        trajectory = trajectory.replace(question_ids=question_ids, group_ids=group_ids)
        counters = np.ones((4, 3), np.int32)
        return rows_to_mesh(system.mesh, trajectory), rows_to_mesh(system.mesh, counters)


def test_every_question_counts_once(system):
    """Twenty questions in batches of eight: the last batch has four rows that fill it up, and they
    count nowhere.
    """
    rollout = Scripted(system, POOR)
    means, dumps = greedy.evaluate_policy(system, rollout, None, "validation", "scripted")
    assert [dump["uid"] for dump in dumps] == [f"validation-{n}" for n in range(20)]
    assert [active.sum() for active, *_ in rollout.asked] == [8, 8, 4] and rollout.asked[2][
        1
    ].tolist() == [16, 17, 18, 19, -1, -1, -1, -1]
    assert {temperature for *_, temperature in rollout.asked} == {0.0}
    for name in ("em", "f1"):
        assert 0 < means[name] < 1 and means[name] == pytest.approx(
            np.mean([dump[name] for dump in dumps])
        )
    searches = [[turn for turn in dump["turns"] if turn["status"] == "search"] for dump in dumps]
    assert means["searches"] == pytest.approx(np.mean([len(turns) for turns in searches]))
    gold = [set(question.gold_ids) for question in system.splits["validation"].questions]
    found = [
        {document["id"] for turn in turns for document in turn["documents"]} for turns in searches
    ]
    assert means["gold_recall"] == pytest.approx(
        np.mean([len(g & f) / len(g) for g, f in zip(gold, found)])
    )
    assert means["invalid"] == means["truncated"] == 0


def test_only_the_first_questions(system):
    with system.config.unlocked():
        system.config.evaluation.questions = 9
    try:
        means, dumps = greedy.evaluate_policy(
            system, Scripted(system, PERFECT), None, "validation", "scripted"
        )
        assert len(dumps) == 9 and means == greedy.evaluate_script(system, "validation", PERFECT)
    finally:
        system.config.evaluation.questions = 0


def test_a_wrong_count_is_an_error(system, monkeypatch):
    """Were a row lost on its way, the means would be over fewer questions: here one of each of the
    three batches.
    """
    whole = greedy._sum_measures
    monkeypatch.setattr(
        greedy,
        "_sum_measures",
        lambda episodes, scores, valid: whole(episodes, scores, valid & (np.arange(8) != 2)),
    )
    with pytest.raises(RuntimeError, match="evaluation counted 17 questions instead of 20"):
        greedy.evaluate_policy(system, Scripted(system, PERFECT), None, "validation", "scripted")


def test_groups_are_episodes_of_one_question(system):
    sample = Scripted(system, PERFECT)
    rollout = collect.collect(
        system,
        sample,
        None,
        system.splits["validation"],
        np.array([7, 2, 9, 4]),
        jnp.uint32(0),
        1.0,
        group_size=2,
    )
    assert sample.asked[0][1].tolist() == [7, 7, 2, 2, 9, 9, 4, 4] and sample.asked[0][
        2
    ].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [episode.question.uid for episode in rollout.episodes[::2]] == [
        f"validation-{n}" for n in (7, 2, 9, 4)
    ]
    assert rollout.searches.failed == 0 and rollout.scores.step_rewards.shape == (8, 4)


def test_dumps_of_all_processes_come_in_the_order_of_the_questions(monkeypatch):
    """Two threads stand in for processes; what they pass on must have one shape."""
    found = [
        {0: {"uid": "a"}, 3: {"uid": "d", "text": "é" * 50}},
        {1: {"uid": "b", "f1": 1 / 3}, 2: {"uid": "c"}},
    ]
    barrier, passed = threading.Barrier(2), {}

    def gather(array):
        passed[threading.get_ident()] = array
        barrier.wait(10)
        stacked = np.stack([passed[thread] for thread in sorted(passed)])
        barrier.wait(10)
        return stacked

    monkeypatch.setattr(greedy.multihost_utils, "process_allgather", gather)
    with ThreadPoolExecutor(2) as threads:
        gathered = list(threads.map(greedy.gather_dumps, found))
    assert gathered == [[found[0][0], found[1][1], found[1][2], found[0][3]]] * 2


def test_controls_that_fail_are_left_out(system, tmp_path, monkeypatch):
    """What a script cannot do costs no more than its own figures."""

    def fail(*_):
        raise ValueError("a scripted episode does not fit")

    monkeypatch.setattr(greedy, "evaluate_controls", fail)
    monkeypatch.setitem(system.config.evaluation, "controls", True)
    means = dict.fromkeys(greedy.MEANS, 0.5)
    greedy.write_results(system, tmp_path, means, means, {"before": [], "after": []})
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert (
        written["after"] == means
        and "controls" not in written
        and (tmp_path / "report.html").exists()
        and (tmp_path / "transcripts.jsonl").exists()
    )


def test_evaluate_leaves_what_training_wrote(system, tmp_path, monkeypatch):
    """A sweep reads a run's evaluation.json, to know that it is finished and for its table."""
    policy = types.SimpleNamespace(policy=types.SimpleNamespace(params=None))
    monkeypatch.setattr(evaluate, "build_system", lambda *_: system)
    monkeypatch.setattr(evaluate, "begin_run", lambda *_: (policy, None, None, None))
    monkeypatch.setattr(
        evaluate, "make_sampler", lambda _: (Scripted(system, PERFECT), lambda params: params)
    )
    write_config(tmp_path, system.config)
    write_beginning(tmp_path, {"format": FORMAT, "data": {}})
    (tmp_path / "start").mkdir()
    evaluate.evaluate_command(system.config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "run.json",
        "start",
        "evaluation",
    }
    folder = tmp_path / "evaluation/validation"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "evaluation.json",
        "transcripts.jsonl",
        "report.html",
    }
    assert (
        json.loads((folder / "evaluation.json").read_text())["questions"] == 20
        and "After RL" in (folder / "report.html").read_text()
    )


def test_transcripts_say_what_happened_and_make_a_report(system, tmp_path):
    _, dumps = greedy.evaluate_policy(
        system, Scripted(system, POOR), None, "validation", "scripted"
    )
    questions, seen_again = (
        {question.uid: question for question in system.splits["validation"].questions},
        0,
    )
    for dump in dumps:
        question, seen = questions[dump["uid"]], set()
        assert (
            dump["question"] == question.question
            and dump["answers"] == list(question.answers)
            and dump["finished"]
            and not dump["truncated"]
        )
        assert (
            dump["turns"][-1]["status"] == "answer"
            and f"<answer> {dump['prediction']}</answer>" in dump["turns"][-1]["action"]
        )
        for turn in dump["turns"]:
            for document in turn["documents"]:
                assert (
                    document["text"] == system.source.documents[document["id"]].text
                    and document["text"][:20] in turn["observation"]
                )
                assert document["gold"] == (document["id"] in question.gold_ids) and document[
                    "seen"
                ] == (document["id"] in seen)
                seen_again += document["seen"]
            seen |= {document["id"] for document in turn["documents"]}
            assert turn["step_reward"] == pytest.approx(turn["gain"] - turn["redundancy"])
            assert turn["redundancy"] == (
                1.0 if turn["documents"] and turn["documents"][0]["seen"] else 0.0
            )
    assert seen_again > 0

    with MetricsWriter(tmp_path, 0, CONFIG) as writer:
        writer.write("rl", 0, {"f1": 0.5})
    means = dict.fromkeys(greedy.MEANS, 0.5)
    result = greedy.write_results(
        system, tmp_path, means, means, {"before": dumps[:3], "after": dumps}
    )
    assert (
        result["questions"] == 20
        and json.loads((tmp_path / "evaluation.json").read_text()) == result
    )
    lines = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    assert [line["when"] for line in lines] == ["before"] * 3 + ["after"] * 20 and [
        line["uid"] for line in lines[3:]
    ] == [dump["uid"] for dump in dumps]
    page = write_report(tmp_path).read_text()
    assert all(
        dump["turns"][0]["documents"][0]["title"] in page
        for dump in dumps
        if dump["turns"][0]["documents"]
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "evaluation.json",
        "transcripts.jsonl",
        "metrics.jsonl",
        "tensorboard",
        "report.html",
    }
