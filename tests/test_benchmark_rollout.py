"""The rollout benchmark: what it scripts, counts, compares and refuses, at tiny sizes."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from configs import musique_qwen2_5
from stepsearch_jax.benchmark import cases, figure, rollout, sample_model, scripted
from stepsearch_jax.benchmark.peers.process import Peer
from stepsearch_jax.records import TurnStatus

MODEL = dataclasses.replace(
    sample_model.MODEL,
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    attention_block=16,
)
SMALL = cases.Case(
    episodes=3, prompt=5, turns=3, turn_tokens=(4,), observation=6, slots=0, **cases.CONFIGURED
)
SPREAD = cases.Case(
    episodes=8,
    prompt=5,
    turns=1,
    turn_tokens=(2, 5, 9),
    observation=1,
    slots=2,
    flush_fraction=0.5,
    prefill_rows=1,
    prefill_tokens=16,
)


@pytest.mark.parametrize("turn_tokens", [(4,), (1,), (2, 5, 9), (1, 3)])
def test_the_automaton_counts_the_tokens_of_a_turn(turn_tokens):
    environment = scripted.make_environment(7, turn_tokens)
    rng = np.random.default_rng(0)
    for first in range(7):
        state, taken = int(environment.start), 0
        while environment.event[state] == TurnStatus.NONE:
            token = first if taken == 0 else rng.integers(7)
            state, taken = int(environment.next_state[state, token]), taken + 1
        assert environment.event[state] == TurnStatus.SEARCH
        assert taken == turn_tokens[first % len(turn_tokens)]


@pytest.fixture(scope="module")
def small():
    """A small case that has run: (inputs, trajectory as NumPy, counters, its clock)."""
    inputs = scripted.Inputs.draw(MODEL, SMALL, seed=0)
    run, clock = scripted.make_run(MODEL, SMALL, inputs, SMALL.episodes)
    trajectory, counters = run(slice(None))
    return inputs, jax.tree.map(np.asarray, trajectory), np.asarray(counters), clock


@pytest.mark.slow
def test_every_episode_has_the_asked_turns(small):
    """5 prompt tokens, then three times 4 sampled ones with 6 observed ones between: 29 tokens."""
    inputs, trajectory, counters, clock = small
    sampled = np.array([0] * 5 + [1] * 4 + [0] * 6 + [1] * 4 + [0] * 6 + [1] * 4, bool)
    tokens = trajectory.tokens
    assert tokens.shape == (3, 29) and trajectory.token_mask.all()
    assert (trajectory.action_mask == sampled).all()
    assert (tokens[:, :5] == inputs.prompts).all()
    assert (tokens[:, 9:15] == inputs.observation).all()
    assert (tokens[:, 19:25] == inputs.observation).all()
    assert (trajectory.search_end == [8, 18, -1]).all()
    assert len(np.unique(tokens[:, sampled], axis=0)) == 3, "rows sample their own tokens"
    # Read but not sampled: of the prompt 4 (a decode step reads the fifth), of each observation 6:
    # the last sampled token and 5 of its own.
    assert counters[:, 0].sum() == 12 and counters[:, 2].sum() == 3 * (4 + 6 + 6) == SMALL.prefilled
    scripted.check_episodes(SMALL, trajectory, counters)
    spent = clock.describe(10.0)
    (device,), (search,), (rest,) = spent["device_s"], spent["search_s"], spent["rest_s"]
    assert len(search) == len(device) >= 2 and min(device) > 0
    assert sum(device) + sum(search) + rest == pytest.approx(10)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["action_mask", "search_end", "length", "counters"])
def test_episodes_that_are_not_as_asked_are_refused(field, small):
    _, trajectory, counters, _ = small
    if field == "counters":
        counters = counters + 1
    else:
        changed = np.copy(getattr(trajectory, field))
        changed[1] = 0 if field != "search_end" else -1
        trajectory = trajectory.replace(**{field: changed})
    wrong = "^0 of 3 .*prefilled" if field == "counters" else "^1 of 3 episodes"
    with pytest.raises(ValueError, match=wrong):
        scripted.check_episodes(SMALL, trajectory, counters)


@pytest.mark.nightly
def test_slots_and_lock_step_sample_the_same_tokens(monkeypatch):
    """Eight episodes of 2, 5 or 9 tokens in two slots, against four pairs that wait for their
    longer one. Other noise in one of them is refused."""
    figures = rollout.measure_slots(MODEL, SPREAD, repeats=1, seed=0)
    inputs = scripted.Inputs.draw(MODEL, SPREAD, seed=0)
    run, _ = scripted.make_run(MODEL, dataclasses.replace(SPREAD, slots=0), inputs, 8)
    trajectory, _ = run(slice(None))
    lengths = np.array([2, 5, 9])[np.asarray(trajectory.tokens)[:, 5] % 3]
    assert (np.asarray(trajectory.action_mask).sum(1) == lengths).all()
    assert len(set(lengths.tolist())) > 1
    assert figures["sampled_tokens"] == lengths.sum()
    assert figures["peer_decode_steps"] == lengths.reshape(4, 2).max(1).sum()
    assert lengths.sum() / 2 <= figures["decode_steps"] <= lengths.sum()
    assert figures["ratio"] == pytest.approx(figures["peer_s"] / figures["ours_s"])
    make = scripted.make_run

    def with_other_noise(model, case, inputs, rows):
        return make(model, case, dataclasses.replace(inputs, key=jax.random.key(rows)), rows)

    monkeypatch.setattr(rollout, "make_run", with_other_noise)
    with pytest.raises(ValueError, match="different tokens"):
        rollout.measure_slots(MODEL, SPREAD, repeats=1, seed=0)


class FakePeer:
    """A peer that has the right logits and takes 2 seconds."""

    versions = {"fake": "1"}
    error = 0.0

    def __init__(self, name, python, job, arrays):
        assert (name, python) == ("transformers_rollout", "there")
        assert (job["turns"], job["turn_tokens"], job["length"]) == (3, 4, 29)
        inputs = scripted.Inputs.draw(MODEL, SMALL, seed=0)
        self.checks = {"logits": scripted.find_logits(MODEL, inputs) + self.error}
        assert (arrays["prompts"] == inputs.prompts).all()
        assert "params/trunk/layers/q/kernel" in arrays

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, what):
        return 2.0


@pytest.mark.slow
def test_the_figures(monkeypatch):
    monkeypatch.setattr(rollout, "Peer", FakePeer)
    found = rollout.measure(
        repeats=2,
        seed=0,
        case=["short"],
        peer="transformers",
        peer_python="there",
        cases={"short": (SMALL,)},
        model=MODEL,
    )
    case = found["cases"]["short"]
    assert found["ours_s"] == case["ours_s"] > 0 and found["peer_s"] == case["peer_s"] == 2.0
    assert found["ratio"] == pytest.approx(2 / found["ours_s"])
    assert case["floor_s"] > 0
    assert case["ours_to_floor"] == pytest.approx(case["ours_s"] / case["floor_s"])
    counts = case["sampled_tokens"], case["prefilled_tokens"], case["decode_steps"]
    assert counts == (36, 48, 12) and len(case["ours"]["runs_s"]) == 2
    assert case["largest_logit_difference"] == 0 and case["peer"]["fake"] == "1"
    assert found["model"]["embed_dim"] == 32
    assert case["sampled_tokens_s"] == pytest.approx(36 / found["ours_s"])
    least = case["roofline"]
    assert (least["prefill"]["pieces"], least["decode step"]["pieces"]) == (3, 12)
    floor = least["prefill"]["least_s"] + least["decode step"]["least_s"]
    assert case["floor_s"] == pytest.approx(floor)
    table = rollout.render(found)
    for text in ("transformers", "short", "2.00 s", "12 x decode step: "):
        assert text in table


def test_slots_are_compared_with_lock_step_whatever_the_peer(monkeypatch):
    """At the top is the first case that was compared with the named peer, and never another's
    ratio under its name."""
    figures = lambda theirs: {"ours_s": 1.0, "peer_s": theirs, "ratio": theirs}
    monkeypatch.setattr(rollout, "measure_slots", lambda *_: figures(2.0))
    monkeypatch.setattr(rollout, "measure_case", lambda *_: figures(5.0))
    options = dict(repeats=1, seed=0, peer_python="there", model=MODEL)
    both = rollout.measure(case=["slots", "long"], peer="tunix", **options)
    assert (both["case"], both["peer"], both["ratio"]) == ("long", "tunix", 5.0)
    alone = rollout.measure(case=["slots"], peer="none", **options)
    assert (alone["case"], alone["peer"], alone["ratio"]) == ("slots", "lock step", 2.0)
    with pytest.raises(ValueError, match="--peer=tunix: .* slots"):
        rollout.measure(case=["slots"], peer="tunix", **options)


def test_episodes_may_be_other_than_the_cases():
    assert [part.resize(7).episodes for part in cases.CASES["turns"]] == [7] * 4
    assert SMALL.resize(None) == SMALL
    assert SPREAD.resize(4).episodes == 4
    with pytest.raises(ValueError, match="--episodes=3: .*groups of 2"):
        SPREAD.resize(3)


def test_the_model_is_the_configs():
    config = musique_qwen2_5.get_config("0.5b")
    learner, sampler = sample_model.choose_models(config, "transformers")
    assert (learner.embed_dim, learner.vocab_size, learner.remat) == (896, 151936, "layers")
    assert sampler.dtype == np.dtype("bfloat16")
    assert dataclasses.replace(learner, dtype=sampler.dtype, remat=sampler.remat) == sampler
    learner = dataclasses.replace(sample_model.MODEL, remat="dots")
    assert sample_model.choose_models(None, "tunix") == (learner, sample_model.MODEL)


@pytest.mark.parametrize(
    "peer,changes,complaint",
    [
        ("none", {"model.vocab_size": 0}, "config.model.vocab_size"),
        ("none", {"model.dtype": "float64"}, "config.model.dtype"),
        ("tunix", {"rollout.dtype": "float32"}, "--config.model.dtype=float32"),
        ("transformers", {"model.qkv_bias": False}, "model.qkv_bias=True"),
        ("tunix", {"model.qk_norm": True}, "model.qk_norm=False"),
        ("transformers", {"model.rope_scaling.kind": "linear"}, "model.rope_scaling.kind=none"),
    ],
)
def test_configs_that_are_refused(peer, changes, complaint):
    config = musique_qwen2_5.get_config("0.5b")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=complaint):
        sample_model.choose_models(config, peer)


@pytest.mark.slow
@pytest.mark.parametrize("error", [2e-3, np.nan])
def test_a_peer_with_other_weights_is_refused(error, monkeypatch):
    monkeypatch.setattr(rollout, "Peer", FakePeer)
    monkeypatch.setattr(FakePeer, "error", error)
    never = lambda *_: pytest.fail("refuse before anything is timed")
    monkeypatch.setattr(rollout, "make_run", never)
    with pytest.raises(ValueError, match="logits of the peer transformers"):
        rollout.measure(
            repeats=1,
            seed=0,
            case=["short"],
            peer="transformers",
            peer_python="there",
            cases={"short": (SMALL,)},
            model=MODEL,
        )


def test_twice_the_turns_are_set_beside_each_other():
    parts = [
        {"ours_s": ours, "peer_s": theirs, "ratio": theirs / ours}
        for ours, theirs in ((1.0, 2.0), (2.0, 6.0), (3.0, 24.0))
    ]
    joined = rollout.join_turns(parts)
    assert joined["doubling"] == [2.0, 1.5] and joined["peer_doubling"] == [3.0, 4.0]
    assert joined["ratio"] == 8 and joined["parts"] == parts
    assert rollout.join_turns([part | {"peer_s": None} for part in parts])["peer_doubling"] == []


@pytest.mark.parametrize("theirs", [7.0, None])
def test_the_figure_of_turns(theirs, tmp_path):
    """Two episodes, prompt 5, turns of 4 with observations of 6: read again, that is 5, then 15,
    then 25 tokens each."""
    size = dataclasses.asdict(dataclasses.replace(SMALL, episodes=2, turns=3))
    assert figure.count_read_again(size) == 2 * (5 + 15 + 25)
    parts = []
    for turns in (1, 2):
        part = {"ours_s": 1.0 + turns, "peer_s": theirs, "prefilled_tokens": 10 * turns}
        parts.append(part | {"size": size | {"turns": turns}})
    drawn = figure.draw_turns({"peer": "transformers", "cases": {"turns": {"parts": parts}}})
    lines = [
        [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
        for axes in drawn.axes
    ]
    expected = [[("this package", [1, 2], [2.0, 3.0])], [("this package", [1, 2], [0.01, 0.02])]]
    if theirs:
        expected[0].append(("transformers", [1, 2], [7.0, 7.0]))
        expected[1].append(("transformers", [1, 2], [0.01, 0.04]))
    assert lines == expected
    figure.write_figure(drawn, tmp_path / "turns.png")
    assert [path.name for path in tmp_path.iterdir()] == ["turns.png"]
    assert (tmp_path / "turns.png").read_bytes()[1:4] == b"PNG"


def write_interpreter(path, program: str):
    """A stand-in for a peer's interpreter: runs `program` in place of the module that it should
    run; `module` is that module's name."""
    script = path.with_suffix(".py")
    script.write_text(f"import sys\nmodule = sys.argv.pop(2)\ndel sys.argv[1]\n{program}")
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers_rollout", "tunix_rollout", "tunix_update"])
def test_a_missing_peer_is_named_with_what_to_install(name, tmp_path):
    blocked = (
        "import runpy\nsys.modules['torch'] = sys.modules['tunix'] = None\n"
        "runpy.run_module(module, run_name='__main__', alter_sys=True)"
    )
    python = write_interpreter(tmp_path / "python", blocked)
    job = dict(seed=0, turns=1, turn_tokens=1, length=6, tokens=1)
    job["model"] = sample_model.describe(MODEL)
    arrays = {"prompts": np.zeros((1, 5), np.int32), "observation": np.zeros(1, np.int32)}
    with pytest.raises(ImportError, match="requirements-bench.txt.*--peer-python"):
        Peer(name, python, job, arrays)


def test_an_interpreter_that_is_not_there_or_bare_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--peer-python=no/such/python"):
        Peer("transformers_rollout", "no/such/python", {}, {})
    bare = write_interpreter(tmp_path / "python", "import numpy_that_is_not_there")
    with pytest.raises(ImportError, match="numpy_that_is_not_there"):
        Peer("transformers_rollout", bare, {}, {})
    silent = write_interpreter(tmp_path / "python", "")
    with pytest.raises(ChildProcessError, match=f"--peer-python={silent} "):
        Peer("transformers_rollout", silent, {}, {})


def test_a_peer_answers_with_checks_and_seconds(tmp_path):
    """What it prints goes to its log; a run that fails says why; its folder is gone afterwards."""
    program = """
from stepsearch_jax.benchmark.peers.process import serve

def make(job, arrays):
    def good():
        print("noise")
    def bad():
        raise RuntimeError("no more room")
    print("more noise")
    return {"peer": "7"}, {"twice": arrays["x"] * job["factor"]}, {"good": good, "bad": bad}

serve(make)
"""
    python = write_interpreter(tmp_path / "python", program)
    with Peer("some", python, {"factor": 2}, {"x": np.arange(3)}) as peer:
        assert peer.versions == {"peer": "7"} and peer.checks["twice"].tolist() == [0, 2, 4]
        assert 0 <= peer.run("good") < 10 and 0 <= peer.run("good") < 10
        with pytest.raises(ChildProcessError, match="no more room"):
            peer.run("bad")
        folder = peer._log.parent
        assert "noise" in (folder / "log.txt").read_text()
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("peer,package", [("transformers", "torch"), ("tunix", "tunix")])
def test_a_peer_that_is_installed_computes_the_same(peer, package):
    pytest.importorskip(package)
    found = rollout.measure(
        repeats=1,
        seed=0,
        case=["short"],
        peer=peer,
        peer_python=sys.executable,
        cases={"short": (SMALL,)},
        model=MODEL,
    )
    assert found["peer_s"] > 0 and found["cases"]["short"]["largest_logit_difference"] < 1e-4
