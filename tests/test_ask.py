"""Asking a policy: the episodes are evaluation's; questions from flags, terminals and pipes."""

import io
import json

import jax
import pytest
import running
import tiny_config

from stepsearch_jax import ask
from stepsearch_jax.evaluation.greedy import collect_greedily
from stepsearch_jax.records import Document, Episode, Question, Turn, TurnStatus
from stepsearch_jax.run.start import begin_run, load_newest_policy, make_sampler
from stepsearch_jax.run.system import build_system

EPISODE = Episode(
    Question("asked", "Where?", ""),
    "",
    (
        Turn(TurnStatus.SEARCH, "<search> here</search>", query="here", doc_ids=(1,)),
        Turn(TurnStatus.ANSWER, "<answer> There</answer>", answer="There"),
    ),
    finished=True,
    truncated=False,
)


class FakeAsker:
    """Answers every question but "long" with EPISODE."""

    def __init__(self, config, workdir, show):
        self.show = show

    def ask(self, text: str) -> Episode:
        if text == "long":
            raise ValueError("max_prompt_tokens")
        self.show("<search> here</search>", [Document(1, "Map", "There it is.")], True)
        return EPISODE

    def describe(self, episode: Episode) -> dict:
        return {"answer": episode.answer}


class Lines(io.StringIO):
    """Standard input, as a terminal or as a pipe."""

    def __init__(self, text: str, terminal: bool):
        super().__init__(text)
        self.isatty = lambda: terminal


def run(monkeypatch, stdin: str = "", terminal: bool = False, **options) -> None:
    monkeypatch.setattr(ask, "Asker", FakeAsker)
    monkeypatch.setattr("sys.stdin", Lines(stdin, terminal))
    ask.ask_all(None, None, **(dict(question=None, as_json=False) | options))


def test_the_transcript_of_a_question(monkeypatch, capsys):
    run(monkeypatch, question="Where?")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [
        "<search> here</search>",
        "1. Map: There it is.",
        "<answer> There</answer>",
        "answer: There",
    ]


def test_a_pipe_gives_questions_and_json_alone(monkeypatch, capsys):
    run(monkeypatch, "\ufeffone\ntwo\r\n\nthree", as_json=True)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"answer": "There"}] * 3


def test_every_question_of_a_pipe_is_read(monkeypatch):
    monkeypatch.setattr("sys.stdin", Lines("\ufeffone\r\n\n \ntwo\nthree", terminal=False))
    assert list(ask.read_questions(None)) == ["one", "two", "three"]
    monkeypatch.setattr("sys.stdin", Lines("one\n\ntwo\n", terminal=True))
    assert list(ask.read_questions(None)) == ["one"]
    monkeypatch.setattr("sys.stdin", None)  # closed
    assert list(ask.read_questions(None)) == []


def test_a_terminal_goes_on_after_a_question_that_is_too_long(monkeypatch, capsys):
    run(monkeypatch, "long\nshort\n\n", terminal=True)
    printed = capsys.readouterr()
    assert "max_prompt_tokens" in printed.err and "question: " in printed.err
    assert printed.out.count("answer: There") == 1
    for options in (dict(question="long"), dict(stdin="long\n")):
        with pytest.raises(ValueError, match="max_prompt_tokens"):
            run(monkeypatch, **options)


@pytest.mark.parametrize("truncated,reason", [(True, "context"), (False, "turns")])
def test_an_episode_without_an_answer(truncated, reason, capsys):
    turns = (Turn(TurnStatus.INVALID, "hm"),)
    ask.show_end(Episode(EPISODE.question, "", turns, finished=False, truncated=truncated))
    assert reason in capsys.readouterr().out


def test_a_config_without_a_policy_is_refused(tmp_path_factory):
    config = tiny_config.get_config(str(running.shared_cache(tmp_path_factory)))
    with pytest.raises(FileNotFoundError, match="--workdir"):
        load_newest_policy(build_system(running.here(config), []), None)


@pytest.mark.slow
def test_a_run_without_a_value_model_is_asked(tmp_path, tmp_path_factory, monkeypatch):
    """Only its policy is read; a failing search is shown, and a step reward is not called."""
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.sft.checkpoint = str(running.searching_start(tmp_path_factory))
    config.rl.advantage, config.rl.kl_coef, config.rollout.group_size = "rloo", 0.0, 2
    system = build_system(config, [])
    state, _, checkpoints, _ = begin_run(system, tmp_path / "run")
    checkpoints.save(1, state)
    checkpoints.close()
    running.write_run(tmp_path / "run", config)
    code = """
def fail(*_): raise RuntimeError("broken")
def search(documents, search_config): return fail
def reward(episode, documents): fail()
"""
    (tmp_path / "failing_parts.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    asked = config.copy_and_resolve_references()
    asked.search.kind, asked.reward.step_reward = "failing_parts:search", "failing_parts:reward"
    shown = []
    asker = ask.Asker(asked, tmp_path / "run", lambda *x: shown.append(x))
    episode = asker.ask("Who is the founder of the employer of Galine Farnby?")
    assert shown and not any(ok or documents for _, documents, ok in shown)
    assert [turn.search_ok for turn in episode.search_turns] == [False] * len(shown)
    with pytest.raises(ValueError, match="UTF-8"):
        asker.ask("caf\udce9?")


@pytest.mark.slow
def test_it_answers_as_in_evaluation(tmp_path_factory):
    """Turn by turn, for questions of the validation split; each search is shown as it happens."""
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.sft.checkpoint = str(running.searching_start(tmp_path_factory))
    config.evaluation.questions = 8
    system = build_system(config, ["validation"])
    sample, to_rollout_layout = make_sampler(system)
    params = to_rollout_layout(load_newest_policy(system, None))
    ((_, rollout),) = collect_greedily(system, sample, params, "validation", "all")
    shown = []
    asker = ask.Asker(config.copy_and_resolve_references(), None, lambda *x: shown.append(x))
    searches = 0
    for expected in rollout.episodes[:4]:
        shown.clear()
        episode = asker.ask(expected.question.question)
        assert episode.turns == expected.turns
        found = [(turn.action, turn.doc_ids) for turn in expected.search_turns]
        assert [(text, tuple(d.id for d in docs)) for text, docs, _ in shown] == found
        described = asker.describe(episode)
        assert described["answer"] == expected.answer
        assert [turn["query"] for turn in described["turns"]] == [t.query for t in episode.turns]
        searches += len(found)
    assert searches > 0 and len(jax.devices()) > 1
