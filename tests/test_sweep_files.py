"""Sweep files: what is refused before anything runs, and the ones that are shipped."""

import re
import runpy

import pytest
from sweeping import REPO, Bench, define

from configs import atlas_sweep
from stepsearch_jax.sweeps.points import list_points, load_sweeps

SHIPPED = {
    name: f"configs/sweeps/{name}.py" for name in ("baselines", "ablations", "seeds", "tuning")
}


@pytest.fixture
def bench(tmp_path, capsys) -> Bench:
    return Bench(tmp_path, capsys)


# --- what is refused


# What is wrong -> (the sweep file, what the message says). Every message begins with the file.
REFUSED = {
    "unknown key": (
        define('add("Full", {}, [0])', 'add("odd", {"reward.gama_key": 0.0}, [0])'),
        r", 'odd': the config .*config\.py has no key 'reward\.gama_key'",
    ),
    "unknown section": (
        define('add("odd", {"rewards.gamma_key": 0.0}, [0])'),
        "has no key 'rewards.gamma_key'",
    ),
    "a section": (define('add("odd", {"reward": 0.0}, [0])'), "has no key 'reward'"),
    "a number's part": (define('add("odd", {"seed.x": 0.0}, [0])'), r"has no key 'seed\.x'"),
    "wrong type": (
        define('add("odd", {"reward.gamma_key": "much"}, [0])'),
        r", 'odd': .*--config\.reward\.gamma_key=much: could not convert",
    ),
    "the seed": (define('add("odd", {"seed": 3}, [0])'), "seed is set twice"),
    "no seeds": (
        define('add("odd", {}, [])'),
        r"seeds are different whole numbers, at least one, not \[\]",
    ),
    "one seed twice": (define('add("odd", {}, [1, 1])'), "seeds are different whole numbers"),
    "seeds of another type": (define('add("odd", {}, [0.5])'), "seeds are different whole numbers"),
    "one number for the seeds": (
        define('add("odd", {}, 5)'),
        r", line 2: TypeError: 'int' object is not iterable; a sweep file defines",
    ),
    "no overrides": (define('add("odd", [0])'), r", line 2: TypeError: .*missing.*seeds"),
    "overrides of another type": (define('add("odd", None, [0])'), r", line 2: TypeError"),
    "no name": (define('add(" - ", {}, [0])'), "a method's name is one line of text"),
    "a name that breaks the table": (
        define('add("a | b", {}, [0])'),
        "a method's name is one line of text",
    ),
    "one method twice": (
        define('add("odd", {}, [0])', 'add("odd", {}, [1])'),
        "'odd': added twice",
    ),
    "two settings under one name": (
        define('add("a, b", {}, [0])', 'add("a b", {"iterations": 7}, [0])'),
        "'a b': another point is called a-b-0 .*iterations: 6, now 7",
    ),
    "nothing": (define("pass"), r"its sweep\(add\) adds nothing"),
    "no sweep": (
        "METHODS = {}\n",
        "AttributeError: .*has no attribute 'sweep'; a sweep file defines sweep",
    ),
    "a mistake": (
        define("pass", 'add("odd", {}, range(seeds))'),
        r", line 3: NameError: name 'seeds' is not defined; a sweep file",
    ),
    "no Python": ("def sweep(add) add\n", r"SyntaxError: .*line 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_runs(bench, name):
    text, message = REFUSED[name]
    bench.set_sweep(text)
    status, out, err = bench.run()
    assert (status, out) == (2, "") and bench.take_starts() == [] and not bench.workdir.exists()
    assert (
        err.startswith(f"sweep: {bench.sweep}") and err.count("\n") == 1 and re.search(message, err)
    ), err


def test_one_method_may_not_have_two_settings_in_two_files(bench):
    other = bench.write("other.py", define('add("Full", {"iterations": 5}, [2, 9])'))
    bench.sweep += f",{other}"
    status, _, err = bench.run()
    assert status == 2
    assert re.search(r"other\.py, 'Full': .* full-2 .*iterations: 6, now 5", err)
    other.write_text(define('add("Full", {"iterations": 6}, [2, 9])'))
    bench.change_plan()
    assert len(bench.run("--print-commands")[1].splitlines()) == 7  # seed 2 is in both
    bench.sweep = f"{bench.folder / 'small.py'},{bench.folder / 'small.py'}"
    assert "two sweep files have one name" in bench.run()[2]


@pytest.mark.parametrize(
    "more,message",
    [
        (
            ["--config.rollout.qestions=3"],
            "the command line: the config .* has no key 'rollout.qestions'",
        ),
        (["--config.seed=3"], "seed is set twice"),
        (["--config.reward.gamma_key=1.0"], "'without key': reward.gamma_key is set twice"),
        (["--config.iterations=many"], "--config.iterations=many: invalid literal"),
        (["--config=nothing.py"], "--config=nothing.py: there is no file nothing.py"),
        (["--sweep=nothing.py"], "there is no sweep file nothing.py"),
        (["--jbos=2"], "unknown argument --jbos=2"),
        (["more.py"], "unknown argument more.py"),
        (["--jobs=0"], "--jobs=0: at least one"),
    ],
)
def test_bad_arguments_are_refused(bench, more, message):
    status, out, err = bench.run(*more)
    assert (
        (status, out) == (2, "")
        and re.search(message, err)
        and bench.take_starts() == []
        and "Traceback" not in err
    )


def test_a_config_that_refuses_its_argument(bench):
    bench.config = "configs/atlas_quickstart.py:typo"
    assert "configs/atlas_quickstart.py:typo is not known" in bench.run()[2]


# --- the sweeps that are shipped


def collect(name: str) -> dict[str, tuple[dict, list[int]]]:
    """method -> (overrides, seeds) of a shipped sweep."""
    found = {}
    runpy.run_path(str(REPO / SHIPPED[name]))["sweep"](
        lambda method, overrides, seeds: found.update({method: (overrides, list(seeds))})
    )
    return found


def test_shipped_sweeps_fit_their_config(monkeypatch):
    monkeypatch.chdir(REPO)
    points = {
        name: list_points(load_sweeps([path], "configs/atlas_sweep.py", ()))
        for name, path in SHIPPED.items()
    }
    assert {name: len(found) for name, found in points.items()} == {
        "baselines": 16,
        "ablations": 8,
        "seeds": 10,
        "tuning": 12,
    }
    # beside the baselines' 16: six ablations, and five seeds of StePPO
    together = list_points(
        load_sweeps(
            [SHIPPED["baselines"], SHIPPED["ablations"], SHIPPED["seeds"]],
            "configs/atlas_sweep.py",
            (),
        )
    )
    assert len(together) == 16 + 6 + 5


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps_give_all_methods_one_budget(name):
    """The same episodes and optimiser steps in a run, before the same evaluation."""
    config, budgets = atlas_sweep.get_config(), set()
    keys = (
        "iterations",
        "rl.minibatches",
        "rl.ppo_epochs",
        "evaluation.split",
        "evaluation.questions",
        "sft.checkpoint",
        "rollout.max_turns",
    )
    for overrides, _ in collect(name).values():
        questions, group = (
            overrides.get(f"rollout.{key}", config.rollout[key])
            for key in ("prompts", "group_size")
        )
        budgets.add((questions * group, *(overrides.get(key, read(config, key)) for key in keys)))
    assert len(budgets) == 1 and next(iter(budgets))[0] == 64


def read(config, key: str):
    for name in key.split("."):
        config = config[name]
    return config


def test_baselines_have_their_seeds_and_their_one_difference():
    found = collect("baselines")
    assert {method: len(seeds) for method, (_, seeds) in found.items()} == {
        "StePPO": 5,
        "PPO, F1 only (Search-R1)": 5,
        "GRPO, F1 only": 3,
        "StePPO, rewards merged": 3,
    }
    changed = {
        method: {key for key in overrides if not key.endswith("learning_rate")}
        for method, (overrides, _) in found.items()
    }
    f1_only = {"reward.gamma_key", "reward.use_gain", "reward.use_redundancy"}
    assert (
        changed["StePPO"] == set()
        and changed["StePPO, rewards merged"] == {"reward.placement"}
        and changed["PPO, F1 only (Search-R1)"] == f1_only
    )
    assert changed["GRPO, F1 only"] == f1_only | {
        "rl.advantage",
        "rl.kl_placement",
        "rl.kl_estimator",
        "rollout.prompts",
        "rollout.group_size",
    }


def test_ablations_take_away_what_they_say():
    """What is left of key reward, penalty and gain in each of the paper's eight."""

    def left(overrides):
        return (
            overrides.get("reward.gamma_key", 0.618) > 0,
            overrides.get("reward.use_redundancy", True),
            overrides.get("reward.use_gain", True),
        )

    found = {method: left(overrides) for method, (overrides, _) in collect("ablations").items()}
    assert found == {
        "StePPO": (True, True, True),
        "without key reward": (False, True, True),
        "without penalty": (True, False, True),
        "without information gain": (True, True, False),
        "without step rewards": (True, False, False),
        "key only": (True, False, False),
        "penalty only": (False, True, False),
        "gain only": (False, False, True),
        "step only": (False, True, True),
        "PPO, F1 only (Search-R1)": (False, False, False),
    }


def test_tuning_is_alike_for_all_and_apart_from_what_is_reported():
    tuning, baselines = collect("tuning"), collect("baselines")
    for method in baselines:
        rates = [
            overrides["policy.learning_rate"]
            for name, (overrides, _) in tuning.items()
            if name.rpartition(", ")[0] == method
        ]
        assert len(rates) == 3 and baselines[method][0]["policy.learning_rate"] in rates
    assert all(
        overrides["policy.learning_rate"] == overrides["value.learning_rate"]
        for overrides, _ in tuning.values()
    )
    reported = {seed for _, seeds in baselines.values() for seed in seeds}
    assert all(
        overrides["evaluation.split"] == "validation" and not reported & set(seeds)
        for overrides, seeds in tuning.values()
    )
    assert atlas_sweep.get_config().evaluation.split == "test"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps_open_with_command_hardware_and_duration(name):
    text = (REPO / SHIPPED[name]).read_text().split('"""')[1]
    text = " ".join(text.replace("\\\n", " ").split())
    command = f"python launch/sweep.py --sweep={SHIPPED[name]} "
    assert command + "--config=configs/atlas_sweep.py --workdir=runs/" in text
    config = str(REPO / "configs/atlas_sweep.py")
    runs = len(list_points(load_sweeps([str(REPO / SHIPPED[name])], config, ())))
    assert re.search(rf"\b{runs} (different )?runs", text)
    assert re.search(r"\d minutes on two (busy )?cores", text)
