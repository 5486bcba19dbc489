"""Presets of configs/base.py, what choices of rl and reward require, runs without a value model."""

import math

import jax
import ml_collections
import numpy as np
import pytest
import running
import tiny_config

from configs import base
from stepsearch_jax import checkpoint, sharding, train
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.rl.model_state import init_params
from stepsearch_jax.run import start
from stepsearch_jax.run.checks import check_config
from stepsearch_jax.run.settings import learner_settings, make_optimizers
from stepsearch_jax.run.system import build_system

# All keys in which the released code differs from the paper, with the released script's numbers.
REFERENCE = {
    "reward.format_gate": "ends_with_answer",
    "reward.format_failure": "minus_one",
    "reward.key_match": "overwrite",
    "reward.redundancy_scope": "rendered",
    "reward.tfidf_fit": "pair",
    "reward.step_scale": 1.6,
    "reward.outcome_overwrites": True,
    "rl.over_observations": True,
    "rl.entropy_coef": 1e-3,
    "rollout.top_p": 0.95,
    "iterations": 1120,
    "rollout.prompts": 128,
    "policy.learning_rate": 5e-7,
    "value.learning_rate": 5e-7,
    "value.warmup": 0.05,
}
GROUPS = {"rollout.prompts": 4, "rollout.group_size": 2}


def flatten(config, prefix: str = "") -> dict:
    """Dotted key -> value, of the leaves."""
    keys = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            keys |= flatten(value, f"{prefix}{name}.")
        else:
            keys[prefix + name] = value
    return keys


def test_reference_is_the_closed_list():
    paper, reference = flatten(base.get_config("paper")), flatten(base.get_config("reference"))
    assert {key: value for key, value in reference.items() if paper[key] != value} == REFERENCE
    assert paper == flatten(base.get_config()) and paper.keys() == reference.keys()


def test_unknown_preset():
    with pytest.raises(ValueError, match="base.py:code.*paper, reference"):
        base.get_config("code")


def make_config(tmp_path_factory, **change):
    config = running.here(tiny_config.get_config(str(running.shared_cache(tmp_path_factory))))
    config.update_from_flattened_dict(change)
    return config


def check(tmp_path_factory, **change) -> None:
    config = make_config(tmp_path_factory, **change)
    check_config(config, sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor))


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "turn_return"])
def test_groups_need_more_than_one_episode(tmp_path_factory, advantage):
    with pytest.raises(ValueError, match=f"rl.advantage={advantage} .*rollout.group_size is 1"):
        check(tmp_path_factory, **{"rl.advantage": advantage})
    kl = {"rl.kl_placement": "loss", "rl.kl_estimator": "k3"}
    check(tmp_path_factory, **{"rl.advantage": advantage}, **kl, **GROUPS)


@pytest.mark.parametrize("advantage", ["grpo", "turn_return"])
def test_what_divides_by_the_deviation_has_the_kl_in_the_loss(tmp_path_factory, advantage):
    change = {"rl.advantage": advantage, **GROUPS}
    with pytest.raises(ValueError, match=f"rl.advantage={advantage} .*rl.kl_placement"):
        check(tmp_path_factory, **change)
    check(tmp_path_factory, **change, **{"rl.kl_coef": 0.0})


def test_only_token_gae_runs_over_observations(tmp_path_factory):
    with pytest.raises(ValueError, match="rl.over_observations=True.*rl.advantage is turn_gae"):
        check(tmp_path_factory, **{"rl.advantage": "turn_gae", "rl.over_observations": True})
    check(tmp_path_factory, **{"rl.over_observations": True})


def test_ratios_to_the_sampler_are_truncated_above_the_clip(tmp_path_factory):
    with pytest.raises(ValueError, match="rl.max_ratio=1.1 .*rl.clip_high=1.2"):
        check(tmp_path_factory, **{"rl.old_logprobs": "sampler", "rl.max_ratio": 1.1})
    check(tmp_path_factory, **{"rl.max_ratio": 1.1})
    learner_only, sampler = (
        learner_settings(make_config(tmp_path_factory, **{"rl.old_logprobs": word}))
        for word in ("learner", "sampler")
    )
    assert (learner_only.max_ratio, sampler.max_ratio) == (math.inf, 2.0)


@pytest.mark.slow
def test_without_a_critic_there_is_no_value_model(tmp_path, tmp_path_factory):
    """No parameters, no optimiser; policy and frozen reference are those of a run with a critic."""
    states = []
    for change in ({}, {"rl.advantage": "rloo", **GROUPS}):
        config = make_config(tmp_path_factory, **change)
        optimizers = make_optimizers(config, config.iterations)
        system, workdir = build_system(config, ["train"]), tmp_path / str(len(states))
        state, reference, checkpoints, _ = start.begin_run(system, workdir)
        checkpoints.close()
        assert (state.value is None) == (optimizers[1] is None) == bool(change)
        states.append((state.policy, reference))
    for with_critic, without in zip(*(jax.tree.leaves(state) for state in states)):
        np.testing.assert_array_equal(with_critic, without)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "change",
    [
        {
            "rl.advantage": "grpo",
            "rl.aggregation": "sequence_mean",
            "rl.kl_placement": "loss",
            "rl.kl_estimator": "k3",
            **GROUPS,
        },
        {"rl.advantage": "turn_gae", "rl.gamma": 0.9, "rl.old_logprobs": "sampler"},
        {"reward.outcome_overwrites": True, "rl.over_observations": True},
    ],
    ids=lambda change: change.get("rl.advantage", "gae over observations"),
)
def test_a_run_and_its_continuation(tmp_path, tmp_path_factory, change):
    """Two iterations at once, or resumed in between: the same parameters, which have moved."""
    start = str(running.searching_start(tmp_path_factory))
    finals = []
    change = change | {"sft.checkpoint": start, "policy.warmup": 0.0, "value.warmup": 0.0}
    change["policy.learning_rate"] = 1e-3
    for name, parts in (("whole", (2,)), ("halves", (1, 2))):
        for iterations in parts:
            config = make_config(tmp_path_factory, **change, iterations=iterations)
            train.train(config, tmp_path / name)
        finals.append(running.final_state(tmp_path / name, 2))
    assert finals[0].keys() == finals[1].keys()
    has_critic = change.get("rl.advantage", "gae") in ("gae", "turn_gae")
    assert any("value" in name for name in finals[0]) == has_critic
    for name, leaf in finals[0].items():
        np.testing.assert_array_equal(finals[1][name], leaf, err_msg=name)
    system = build_system(config, ["train"])
    params, _ = init_params(
        Policy(system.learner_model), system.mesh, dict(config.mesh.train_rules), jax.random.key(0)
    )
    before = checkpoint.load_params(tmp_path / "whole" / "start", params, "none")
    for path, leaf in jax.tree_util.tree_leaves_with_path(before):
        after = finals[0]["['policy']['params']" + jax.tree_util.keystr(path)]
        assert (after != np.asarray(leaf)).any()
