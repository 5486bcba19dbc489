"""From a rollout to a batch: log-probabilities, values and advantages of the learner."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_learner import ONE, SETTINGS, to_host

from stepsearch_jax.models.scoring import score_tokens
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl import learner, stepwise_advantages, uses_critic
from stepsearch_jax.types import ModelState, TrainState, Trajectory


@functools.cache
def sampled() -> Trajectory:
    prompts = jax.tree.map(lambda x: x[:16], tiny.make_prompts(64))
    return tiny.run_rollout("callback", ONE, prompts, jax.random.key(7), 1.0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        dict(kl_estimator="k3"),
        dict(advantage="turn_return", kl_placement="loss"),
        dict(old_logprobs="sampler"),
        dict(over_observations=True),
    ],
    ids=lambda change: next(iter(change)),
)
def test_batch_of_a_rollout(change):
    """Scored in parts of 4 rows; advantages and returns are those of `stepwise_advantages`.

    Log-probabilities of the sampler are the learner's; a fresh value model gives 0.
    """
    trajectory = sampled().replace(group_ids=np.arange(16, dtype=np.int32) % 3)
    rng = np.random.default_rng(6)
    # A state with a fresh value model, if the estimator reads one, and random rewards.
    policy_params, reference_params = tiny.make_params(), tiny.make_params(seed=1)
    value_params = tiny.draw_params(Value(tiny.CONFIG), 1)
    head = np.zeros(tiny.CONFIG.embed_dim, np.float32)
    value_params = {"params": value_params["params"] | {"head": head}}
    numbers = dict(
        iteration=jnp.int32(0),
        position=jnp.int32(0),
        kl_coef=jnp.float32(0.1),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )
    critic = uses_critic(change.get("advantage", "gae"))
    value_state = ModelState(value_params, ()) if critic else None
    state = TrainState(ModelState(policy_params, ()), value_state, **numbers)
    step_rewards = rng.normal(size=trajectory.search_end.shape).astype(np.float32)
    rewards = step_rewards, rng.normal(size=16).astype(np.float32)
    settings = dataclasses.replace(SETTINGS, gamma=0.9, gae_lambda=0.8, microbatch_size=4, **change)
    build_batch = learner.make_build_batch(tiny.CONFIG, settings)
    batch, metrics = to_host(build_batch(state, reference_params, trajectory, *rewards))

    # Log-probabilities: the learner's own, or the sampler's to the bit.
    mask = trajectory.action_mask
    assert mask.sum() > 200
    np.testing.assert_allclose(
        batch.old_logprobs[mask], trajectory.sampler_logprobs[mask], atol=1e-4
    )
    by_learner = settings.old_logprobs == "learner"
    assert by_learner != np.array_equal(batch.old_logprobs, trajectory.sampler_logprobs)
    assert metrics.get("sampler_mismatch", 0) < 1e-4
    assert ("sampler_mismatch" in metrics) == by_learner
    np.testing.assert_array_equal(batch.old_values, 0)
    for name in ("tokens", "token_mask", "action_mask"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(trajectory, name))
    score = jax.jit(functools.partial(score_tokens, Policy(tiny.CONFIG)))
    (old_logprobs, entropy), (ref_logprobs, _) = (
        score(params, trajectory.tokens) for params in (policy_params, reference_params)
    )
    np.testing.assert_allclose(
        np.where(mask, batch.old_logprobs, 0), np.where(mask, old_logprobs, 0), atol=1e-4
    )
    np.testing.assert_allclose(batch.ref_logprobs, ref_logprobs, atol=1e-4)
    # Advantages, returns and metrics.
    advantages, returns, value_mask, expected = stepwise_advantages(
        batch.old_logprobs,
        ref_logprobs,
        batch.old_values,
        trajectory.token_mask,
        mask,
        trajectory.turn_ids,
        trajectory.group_ids,
        trajectory.search_end,
        *rewards,
        kl_coef=0.1,
        **{
            key: getattr(settings, key)
            for key in (
                "advantage",
                "gamma",
                "gae_lambda",
                "over_observations",
                "whiten_advantages",
                "kl_placement",
                "kl_estimator",
                "placement",
                "outcome_overwrites",
            )
        },
    )
    np.testing.assert_allclose(batch.advantages, advantages, atol=1e-4)
    np.testing.assert_allclose(batch.returns, returns, atol=1e-4)
    np.testing.assert_array_equal(batch.value_mask, value_mask)
    np.testing.assert_allclose(metrics["kl"], expected["kl"], rtol=1e-4)
    np.testing.assert_allclose(metrics["reward"], expected["reward"], rtol=1e-4)
    if by_learner:
        np.testing.assert_allclose(metrics["entropy"], np.asarray(entropy)[mask].mean(), rtol=1e-4)
    assert np.abs(metrics["kl"]) > 0.01 and metrics["action_tokens"] == mask.sum()
    assert ("value_explained" in metrics) == critic == value_mask.any()
    if critic:  # values of 0 explain nothing: 1 - mean(R^2) / var(R)
        learned = batch.returns[value_mask]
        explained = 1 - np.square(learned).mean() / learned.var()
        np.testing.assert_allclose(metrics["value_explained"], explained, rtol=1e-3)


def test_explained_variance_by_hand():
    """Returns 1, 3: variance 1. Values 1, 2: mean squared error 1/2. Equal or no returns: NaN."""
    mask = jnp.array([[True, True, False]])
    explained = lambda values, returns: float(
        learner.explained_variance(jnp.array([[*values, 9.0]]), jnp.array([[*returns, -9.0]]), mask)
    )
    assert explained((1.0, 2.0), (1.0, 3.0)) == pytest.approx(0.5)
    assert np.isnan(explained((0.5, 0.5), (1.0, 1.0)))
    assert np.isnan(learner.explained_variance(jnp.ones((1, 3)), jnp.ones((1, 3)), mask & False))
