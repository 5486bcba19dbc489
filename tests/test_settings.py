"""Settings that mean nothing, or that would silently ruin a run, are refused before it starts;
similar good ones are not.
"""

import math

import jax
import pytest
import tiny_config

from configs import base
from stepsearch_jax import sharding, train
from stepsearch_jax.run.checks import CHOICES, RANGES, check_config, check_sampling
from stepsearch_jax.run.folder import flatten

KEYS = flatten(base.get_config().to_dict())
INFINITE = {
    "rl.clip_low",
    "rl.clip_high",
    "rl.value_clip",
    "rl.max_ratio",
    "policy.max_grad_norm",
    "value.max_grad_norm",
}
PHASE = (10, 8, False, 0.0, 0.02)
SAMPLER = {"rl.old_logprobs": "sampler"}


def change(changes):
    config = tiny_config.get_config("cache")
    config.update_from_flattened_dict(changes)
    return config


def check(changes) -> None:
    check_config(change(changes), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def test_every_checked_key_exists_and_is_checked_once():
    listed = [key for keys in RANGES.values() for key in keys]
    assert len(listed) == len(set(listed)) and {*listed, *CHOICES} <= KEYS.keys()


@pytest.mark.parametrize("key", [key for key, value in KEYS.items() if isinstance(value, float)])
def test_no_number_is_nan_and_few_are_infinite(key):
    for value in (math.nan, math.inf):
        if value == math.inf and key in INFINITE:
            check({key: value})
        else:
            with pytest.raises(
                ValueError, match=rf"\b{key.rpartition('.')[2].removeprefix('bm25_')} is {value}"
            ):
                check({key: value})


OUTSIDE = {  # key -> values that are refused
    "seed": (-1,),
    "data.atlas.seed": (-1,),
    "search.max_failure_fraction": (-0.1, 1.5),
    "search.timeout_s": (0.0, -1.0),
    "search.max_observation_tokens": (0,),
    "prompt.max_prompt_tokens": (0,),
    "model.rope_theta": (0.0, -1e4),
    "model.norm_eps": (-1e-6,),
    "model.previous_token_peak": (-1.0,),
    "model.rope_scaling.factor": (0.0, -2.0),
    "rollout.temperature": (-1.0,),
    "rollout.prefill_rows": (0,),
    "rollout.flush_fraction": (0.0, 1.5),
    "rollout.top_p": (0.0, 1.5),
    "rollout.top_k": (-1,),
    "reward.gamma_key": (-0.618,),
    "reward.step_scale": (-1.0,),
    "reward.search_cost": (-0.1,),
    "reward.retrieved_answer_credit": (-0.1,),
    "rl.gamma": (-0.1, 1.1),
    "rl.gae_lambda": (-0.1, 1.1),
    "rl.entropy_coef": (-1e-3,),
    "rl.kl_coef": (-1e-3,),
    "rl.minibatches": (0,),
    "rl.ppo_epochs": (0,),
    "rl.max_ratio": (-1.0,),
    "sft.known_fraction": (-0.1, 1.1),
    "sft.decision_weights.good": (-0.1,),
    "sft.decision_weights.early": (-0.1,),
    "checkpoint.every": (0,),
    **{
        f"{name}.{key}": values
        for name in ("policy", "value")
        for key, values in {
            "learning_rate": (-1e-4,),
            "warmup": (-0.1, 1.1),
            "b1": (-0.1, 1.0),
            "b2": (-0.1, 1.0),
            "weight_decay": (-0.01,),
            "max_grad_norm": (0.0, -1.0),
        }.items()
    },
}


@pytest.mark.parametrize(
    "key,value", [(key, value) for key, values in OUTSIDE.items() for value in values]
)
def test_numbers_lie_in_their_ranges(key, value):
    with pytest.raises(
        ValueError, match=rf"^config\.{key} is {value}; it must lie in [\[(][01], (1|inf)[\])]$"
    ):
        check({key: value})


def test_bounds_that_are_allowed():
    check(
        {
            "rl.gamma": 0.0,
            "rl.gae_lambda": 1.0,
            "policy.b1": 0.0,
            "value.warmup": 1.0,
            "rollout.top_p": 1.0,
            "search.max_failure_fraction": 1.0,
            "iterations": 0,
            "sft.known_fraction": 1.0,
            "model.norm_eps": 0.0,
            "reward.gamma_key": 0.0,
        }
    )


# Keys that do not fit together -> (their values, what the message names, the remedy).
TOGETHER = {
    "heads": (
        {"model.num_kv_heads": 3},
        "model.num_kv_heads=3",
        {"model.num_heads": 6},
    ),
    "odd heads": ({"model.head_dim": 7}, "model.head_dim=7", {"model.head_dim": 6}),
    "KL that stays 0": (
        {"rl.kl_target": 0.01, "rl.kl_coef": 0.0},
        "rl.kl_target=0.01 .*rl.kl_coef",
        {"rl.kl_coef": 1e-3},
    ),
    "KL without gradient": (
        {"rl.kl_placement": "loss"},
        "rl.kl_estimator=k1 .*k2 or k3",
        {"rl.kl_estimator": "k2"},
    ),
    "no KL at all": ({"rl.kl_placement": "loss"}, "rl.kl_estimator=k1", {"rl.kl_coef": 0.0}),
    "one frequency": (
        {"model.rope_scaling.kind": "llama3", "model.rope_scaling.slow": 32.0},
        "slow=32.0 and fast=32.0",
        {"model.rope_scaling.slow": 1.0},
    ),
    "no context": (
        {"model.rope_scaling.kind": "yarn", "model.rope_scaling.original_context": 0},
        "original_context=0",
        {"model.rope_scaling.kind": "linear"},
    ),
    "heads without biases": (
        {"model.previous_token_peak": 12.0, "model.qkv_bias": False},
        "previous_token_peak=12.0 .*model.qkv_bias",
        {"model.qkv_bias": True},
    ),
    "few demonstrations": (
        {"sft.phases": (PHASE,), "sft.demonstrations": 5},
        "demonstrations=5 .*6 groups",
        {"sft.demonstrations": 6},
    ),
    "few but unused": (
        {"sft.phases": (PHASE,), "sft.demonstrations": 5},
        "demonstrations=5",
        {"sft.phases": ()},
    ),
    "renamed pieces": (
        {"sft.phases": (PHASE,), "prompt.tokenizer": "folder"},
        "sft.rename=True .*prompt.tokenizer.* folder",
        {"sft.rename": False},
    ),
    "no decision": (
        {
            f"sft.decision_weights.{kind}": 0.0
            for kind in ("good", "vague", "repeat", "wrong", "early")
        },
        "sft.decision_weights",
        {"sft.decision_weights.wrong": 0.1},
    ),
    "short phase": (
        {"sft.phases": (PHASE[:4],)},
        "sft.phases",
        {"sft.phases": (PHASE,)},
    ),
    "infinite rate": (
        {"sft.phases": ((*PHASE[:4], math.inf),)},
        "sft.phases",
        {"sft.phases": (PHASE,)},
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_settings_that_do_not_fit_together(name):
    wrong, message, remedy = TOGETHER[name]
    with pytest.raises(ValueError, match=message):
        check(wrong)
    check(wrong | remedy)


@pytest.mark.parametrize(
    "wrong,message",
    [
        (
            {"rollout.temperature": 0.0},
            "config.rollout.temperature is 0",
        ),
        (
            SAMPLER | {"rollout.temperature": 0.8},
            "rollout.temperature=0.8, top_k=0, top_p=1.0 must be 1, 0 and 1",
        ),
        (SAMPLER | {"rollout.top_k": 50}, "top_k=50"),
        (SAMPLER | {"rollout.top_p": 0.95}, "top_p=0.95"),
    ],
)
def test_sampling_that_the_learner_does_not_know(wrong, message, tmp_path):
    """Training refuses it if there are iterations to run; evaluation, always greedy, does not."""
    with pytest.raises(ValueError, match=message):
        train.train(change(wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check(wrong)
    check_sampling(change(wrong | {"iterations": 0}))


def test_sampling_that_it_knows():
    for right in (SAMPLER, {"rollout.temperature": 0.8, "rollout.top_p": 0.95}):
        check_sampling(change(right))
