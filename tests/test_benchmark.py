"""The benchmark command, and the reward benchmark: both sides score the same texts and agree."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from loop_tfidf import loop_gain

from stepsearch_jax.benchmark import __main__ as benchmark
from stepsearch_jax.benchmark import padding, reward, rollout, update
from stepsearch_jax.rewards.scoring import passes_strict_gate
from stepsearch_jax.rewards.tfidf import fit_similarity

REPO = pathlib.Path(__file__).resolve().parents[1]
SMALL = reward.Size(episodes=3, turns=2, documents=2, gold=2, words=30)


def make_small(seed=0):
    texts = reward.Texts(seed)
    corpus, questions = texts.make_corpus(SMALL), texts.make_questions(SMALL)
    return corpus, [texts.make_episodes(questions, SMALL) for _ in range(2)]


def test_both_sides_compute_the_gain_of_the_same_episodes():
    pytest.importorskip("sklearn")
    corpus, (episodes, _) = make_small()
    ours = reward.score(episodes, fit_similarity(corpus, tfidf_fit="pair"), SMALL.turns).gain
    peer = reward.fit_and_gain(episodes, corpus, reward._import_vectorizer())
    loops = []
    for episode in episodes:
        found = [turn.doc_ids for turn in episode.search_turns]
        loops.append(loop_gain(corpus, episode.question.gold_ids, found, tfidf_fit="pair"))
    np.testing.assert_allclose(peer, loops, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours, loops, rtol=0, atol=1e-6)
    assert (ours > 0).any() and len(np.unique(ours)) > 3


def test_batches_are_of_the_size_that_is_claimed():
    """Whole documents of made-up words; every search finds documents of its own that are nobody's
    gold; a later batch has the same questions, other queries and other documents."""
    corpus, (episodes, later) = make_small()
    assert len(corpus) == 3 * (2 + 2 * 2) and {len(text.split()) for text in corpus} == {30}
    for batch in (episodes, later):
        gold = [i for episode in batch for i in episode.question.gold_ids]
        found = [i for episode in batch for i in episode.doc_ids]
        assert sorted(gold + found) == list(range(len(corpus)))
        for episode in batch:
            assert [len(turn.doc_ids) for turn in episode.search_turns] == [2, 2]
            assert len(episode.question.gold_ids) == 2 and passes_strict_gate(episode)
            assert all(len(sub.queries) == 3 for sub in episode.question.sub_questions)
    column = lambda batch, name: [getattr(episode, name) for episode in batch]
    assert column(episodes, "question") == column(later, "question")
    assert column(episodes, "doc_ids") != column(later, "doc_ids")
    asked, asked_later = (
        set(sum(map(list, column(batch, "queries")), [])) for batch in (episodes, later)
    )
    assert asked and not asked & asked_later
    assert make_small()[0] == corpus and make_small(seed=1)[0] != corpus


@pytest.mark.slow
def test_figures_hang_together():
    pytest.importorskip("sklearn")
    figures = reward.measure(repeats=3, seed=0, size=SMALL)
    pair = figures["pair"]
    assert figures["ratio"] == figures["peer_s"] / figures["ours_s"] == pair["ratio"]
    assert figures["largest_difference"] < 1e-6
    assert figures["ours_s"] == pair["batch_s"] == sorted(figures["runs_s"]["pair"])[1] > 0
    assert [len(runs) for runs in figures["runs_s"].values()] == [3, 3, 3]
    assert figures["corpus"]["first_ratio"] == figures["peer_s"] / figures["corpus"]["first_s"]
    table = reward.render(figures).splitlines()
    assert len(table) == 6 and "3 episodes x 2 turns x 2 documents of 30 words" in table[0]
    assert f"{figures['ratio']:.0f}x" == table[2].split()[-1] and "ms" in table[4]


@pytest.mark.slow
def test_sides_that_disagree_end_the_run(monkeypatch):
    pytest.importorskip("sklearn")
    peer = reward.fit_and_gain
    monkeypatch.setattr(reward, "fit_and_gain", lambda *arguments: peer(*arguments) + 2e-6)
    with pytest.raises(ValueError, match="scikit-learn's by 2.0e-06"):
        reward.measure(repeats=1, seed=0, size=SMALL)
    monkeypatch.setattr(reward, "fit_and_gain", lambda *arguments: peer(*arguments) * np.nan)
    with pytest.raises(ValueError, match="differ"):
        reward.measure(repeats=1, seed=0, size=SMALL)


def test_the_command_prints_a_table_and_writes_figures(monkeypatch, capsys, tmp_path):
    seen = {}

    def measure(**options):
        seen.update(options)
        return {"ours_s": 1.0}

    monkeypatch.setattr(reward, "measure", measure)
    monkeypatch.setattr(reward, "render", lambda figures: f"table of {figures}")
    benchmark.main(["reward", "--json", str(tmp_path / "f.json"), "--repeats", "2", "--seed", "5"])
    assert capsys.readouterr().out == "table of {'ours_s': 1.0}\n"
    assert seen == {"repeats": 2, "seed": 5}
    assert json.loads((tmp_path / "f.json").read_text()) == {"ours_s": 1.0}
    assert list(tmp_path.iterdir()) == [tmp_path / "f.json"]
    benchmark.main(["reward"])
    assert "table" in capsys.readouterr().out and seen == {"repeats": 7, "seed": 0}


def test_all_runs_every_subject_with_the_flags_that_it_knows(monkeypatch, capsys, tmp_path):
    seen = {}
    modules = dict(rollout=rollout, update=update, padding=padding, reward=reward)
    for name, module in modules.items():
        monkeypatch.setattr(
            module, "measure", lambda name=name, **options: seen.setdefault(name, options)
        )
        monkeypatch.setattr(module, "render", lambda figures, name=name: f"table of {name}")
    flags = "all --case long slots --episodes 32 --peer transformers --peer-python there --json"
    benchmark.main([*flags.split(), str(tmp_path / "f.json")])
    models = dict(seed=0, config=None, episodes=32, peer_python="there")
    assert seen == {
        "rollout": models | dict(repeats=3, case=["long", "slots"], peer="transformers"),
        "update": models | dict(repeats=5, peer="none"),  # which has no such peer
        "padding": dict(repeats=5, seed=0, config=None, episodes=32),
        "reward": dict(repeats=7, seed=0),
    }
    assert json.loads((tmp_path / "f.json").read_text()) == seen
    tables = [f"table of {name}" for name in modules]
    assert capsys.readouterr().out.splitlines() == tables


def test_a_config_is_read_with_its_overrides(monkeypatch):
    seen = {}
    monkeypatch.setattr(rollout, "measure", lambda **options: seen.update(options))
    monkeypatch.setattr(rollout, "render", lambda _: "")
    path = f"{REPO}/configs/musique_qwen2_5.py:1.5b"
    benchmark.main(["rollout", "--config", path, "--config.model.dtype=float32"])
    config = seen["config"]
    assert (config.model.embed_dim, config.model.dtype) == (1536, "float32")
    assert config.rollout.dtype == "bfloat16"


@pytest.mark.parametrize("error", [ImportError, ChildProcessError, ValueError])
def test_a_peer_that_does_not_work_ends_it_with_one_line(error, monkeypatch):
    def measure(**_):
        raise error("the peer is not well")

    monkeypatch.setattr(update, "measure", measure)
    with pytest.raises(SystemExit, match="^stepsearch_jax: the peer is not well$"):
        benchmark.main(["update", "--peer", "tunix"])


def test_ctrl_c_ends_it_with_one_line(monkeypatch, capsys):
    def measure(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reward, "measure", measure)
    with pytest.raises(SystemExit) as error:
        benchmark.main(["reward"])
    assert error.value.code == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "interrupted" in lines[0]


@pytest.mark.parametrize(
    "arguments,complaint",
    [
        (["reward", "--json", "no/such/folder/f.json"], "no/such/folder"),
        (["reward", "--repeats", "0"], "at least 1"),
        (["reward", "--seed", "-1"], "--seed"),
        (["reward", "--json", "."], "name a file"),
        (["rewards"], "invalid choice"),
        ([], "subject"),
        (["reward", "--turns", "3"], "--turns"),
        (["reward", "--peer", "tunix"], "--peer"),
        (["update", "--peer", "transformers"], "invalid choice"),
        (["reward", "--seed", str(2**31)], "more than"),
        (["reward", "--json", "/proc/f.json"], "--json=/proc/f.json"),
        (["rollout", "--case", "turns", "--figure", "turns"], "--figure=turns"),
        (["rollout", "--figure", "f.png"], "add it to --case"),
        (["rollout", "--episodes", "0"], "at least 1"),
        (["rollout", "--case", "slots", "--confg=x"], "--confg=x"),
        (["update", "--config.model.dtype=float32"], "--config.model.dtype"),
        (["update", "--config=configs/no_such.py"], "no_such.py"),
        (["rollout", "--config=configs/musique_qwen2_5.py:9b"], "sizes are 0.5b"),
        (["rollout", "--config=configs/musique_qwen2_5.py", "--config.x=1"], "config.x"),
        (["rollout", "--peer", "vllm"], "invalid choice"),
        (["rollout", "--case", "wide"], "invalid choice"),
    ],
)
def test_what_the_command_refuses(arguments, complaint, monkeypatch, capsys):
    for module in (reward, rollout, update):
        monkeypatch.setattr(module, "measure", lambda **_: pytest.fail("refuse before work starts"))
    with pytest.raises(SystemExit) as error:
        benchmark.main(arguments)
    assert complaint in f"{error.value} {capsys.readouterr().err}" and error.value.code != 0


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(SystemExit, match="requirements-bench.txt"):
        benchmark.main(["reward"])
    assert "scikit-learn" in (REPO / "requirements-bench.txt").read_text()


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--help"], ("reward", "scikit-learn", "rollout", "update", "all")),
        (["rollout", "--help"], ("--case", "--peer", "--peer-python", "prompt 512", "default: 3")),
        (["update", "--help"], ("--peer", "AdamW", "151936")),
        (["all", "--help"], ("one after another", "--case")),
        (
            ["reward", "--help"],
            ("--json FILE", "--repeats N", "--seed S", "scikit-learn", "first batch"),
        ),
    ],
)
def test_the_command_explains_itself(arguments, words, capsys):
    with pytest.raises(SystemExit) as done:
        benchmark.main(arguments)
    out = capsys.readouterr().out
    assert done.value.code == 0 and all(word in out for word in words), out


@pytest.mark.slow
def test_the_command_writes_its_figures(tmp_path):
    pytest.importorskip("sklearn")
    flags = ["--json", str(tmp_path / "f.json"), "--repeats", "1"]
    command = [sys.executable, "-m", "stepsearch_jax.benchmark", "reward", *flags]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and not done.stderr, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["size"] == {"episodes": 64, "turns": 4, "documents": 3, "gold": 3, "words": 100}
    assert figures["ours_s"] > 0
    assert figures["ratio"] == pytest.approx(figures["peer_s"] / figures["ours_s"])
