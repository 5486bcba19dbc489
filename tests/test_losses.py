"""The losses by hand, the whole objective against a loop, and the laws of a policy gradient."""

import functools
import inspect
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but_for
from episodes import (
    CRITIC_FREE,
    B,
    K,
    T,
    draw_episodes,
    insert_observation,
    list_turns,
    pad_rows_and_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_loss import loop_loss

from configs import base
from stepsearch_jax import rl
from stepsearch_jax.rl import (
    aggregate,
    entropy_bonus,
    kl_loss,
    loss_normalizer,
    policy_loss,
    stepwise_ppo_loss,
    value_loss,
)

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs/losses.md"
KEYWORDS = dict(
    advantage="gae",
    gamma=0.97,
    gae_lambda=0.9,
    whiten_advantages=True,
    clip_low=0.2,
    clip_high=0.3,
    aggregation="token_mean",
    value_clip=0.5,
    value_coef=0.7,
    entropy_coef=0.01,
    kl_coef=0.05,
    kl_placement="reward",
    kl_estimator="k1",
    placement="step",
    outcome_overwrites=False,
    over_observations=False,
)
STATIC = (
    "advantage",
    "whiten_advantages",
    "aggregation",
    "kl_placement",
    "kl_estimator",
    "placement",
    "outcome_overwrites",
    "over_observations",
)
# Every word that a config may use is in some case.
CASES = {
    "gae": {},
    "truncated": dict(max_ratio=1.4),
    "not whitened": dict(whiten_advantages=False),
    "merged": dict(placement="merged", kl_estimator="k2"),
    "observations": dict(over_observations=True, outcome_overwrites=True, kl_estimator="k3"),
    "sequences": dict(aggregation="sequence_mean", kl_placement="loss", kl_estimator="k3"),
    "turn_gae": dict(advantage="turn_gae", aggregation="sequence_mean", kl_estimator="k2"),
    "grpo": dict(
        advantage="grpo", aggregation="sequence_mean", kl_placement="loss", kl_estimator="k3"
    ),
    "rloo": dict(advantage="rloo", kl_placement="loss", kl_estimator="k2"),
    "turn_return": dict(advantage="turn_return", kl_placement="loss", kl_estimator="k1"),
}
cases = pytest.mark.parametrize("change", CASES.values(), ids=CASES)
some_cases = pytest.mark.parametrize("change", slow_but_for(("gae", "grpo"), CASES))
batches = st.builds(draw_episodes, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.7, 1.0]))
TOKENS = dict(aggregation="token_mean")


@functools.partial(jax.jit, static_argnames=STATIC)
def differentiate(batch, **keywords):
    """-> ((loss, metrics), gradients by name of the array). One program for both."""
    floats = {name: array for name, array in batch.items() if array.dtype == np.float32}
    return jax.value_and_grad(
        lambda floats: stepwise_ppo_loss(**batch | floats, **keywords), has_aux=True
    )(floats)


def loss_of(batch, **change):
    """-> (loss, metrics)."""
    return differentiate(batch, **KEYWORDS | change)[0]


def gradients_of(batch, **change):
    """d loss / d (logprobs, values, entropy), each [B, T]."""
    gradients = differentiate(batch, **KEYWORDS | change)[1]
    return [np.asarray(gradients[name]) for name in ("logprobs", "values", "entropy")]


# The defaults


def paper_keywords() -> dict:
    """Every keyword of `stepwise_ppo_loss`, as configs/base.py has it for the paper.

    value_coef is no key, because the learner has an optimiser for each model. rl.max_ratio is for
    log-probabilities of the sampler; the paper takes the learner's, and truncates nothing.
    """
    config = base.get_config("paper")
    assert config.rl.old_logprobs == "learner"
    parameters = inspect.signature(stepwise_ppo_loss).parameters.values()
    keys = [key.name for key in parameters if key.kind is key.KEYWORD_ONLY]
    keywords = {key: config.rl[key] for key in keys if key in config.rl}
    keywords |= {key: config.reward[key] for key in keys if key in config.reward}
    keywords |= dict(value_coef=1.0, max_ratio=math.inf)
    assert keywords.keys() == set(keys)
    return keywords


@pytest.mark.parametrize("seed", range(3))
def test_stepwise_ppo_loss_of_its_arrays_alone_is_the_papers(seed):
    batch = draw_episodes(seed)
    spelled_out, alone = differentiate(batch, **paper_keywords()), differentiate(batch)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
    jax.tree.map(close, alone, spelled_out)


def test_every_default_is_the_papers():
    keywords = paper_keywords()
    for function in (getattr(rl, name) for name in rl.__all__):
        for key in inspect.signature(function).parameters.values():
            if key.name in keywords and key.default is not key.empty:
                assert key.default == keywords[key.name], (function, key)


def test_losses_without_a_normalizer_are_means_over_their_own_masks():
    batch = draw_episodes(2)
    mask, returns = batch["action_mask"], batch["entropy"]
    x, old = batch["logprobs"], batch["old_logprobs"]
    mean = lambda terms: terms[mask].astype(np.float64).mean()
    assert aggregate(x, mask) == pytest.approx(mean(x), rel=1e-5)
    assert loss_normalizer(mask) == mask.sum()
    bonus, _ = entropy_bonus(batch["entropy"], mask)
    assert bonus == pytest.approx(mean(batch["entropy"]), rel=1e-5)
    # KL k3.
    x, ref = batch["logprobs"], batch["ref_logprobs"]
    loss, _ = kl_loss(x, ref, mask)
    assert loss == pytest.approx(mean(np.exp(ref - x) - 1 + x - ref), rel=1e-4)
    # Both sides clipped at 0.2, nothing truncated.
    ratio, advantages = np.exp(x - old), batch["values"]
    surrogate = np.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages)
    loss, metrics = policy_loss(x, old, advantages, mask)
    assert loss == pytest.approx(-mean(surrogate), rel=1e-4)
    assert metrics["clip_fraction"] > 0 and metrics["truncated_fraction"] == 0
    # Values clipped at 0.5.
    values, old_values = batch["values"], batch["old_values"]
    clipped = old_values + (values - old_values).clip(-0.5, 0.5)
    errors = np.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    loss, metrics = value_loss(values, old_values, returns, mask)
    assert loss == pytest.approx(mean(errors) / 2, rel=1e-4)
    assert metrics["value_clip_fraction"] > 0


# The pieces, by hand


def test_policy_loss_by_hand():
    """Bounds .2 below and .3 above, four action tokens and one observation (advantage 99).

    ratio 1.5,  A  2: min(3, 1.3*2 = 2.6) = 2.6      clipped
    ratio 1.5,  A -2: min(-3, -2.6) = -3             not clipped
    ratio .5,   A -1: min(-.5, .8*-1 = -.8) = -.8    clipped
    ratio 1.25, A  1: 1.25                           not clipped
    Sum .05; loss = -.05 / 4 = -.0125; clip fraction 2/4. Gradient in logprobs: -ratio A / 4 if not
    clipped, else 0.
    """
    ratio, advantages = jnp.array([[1.5, 1.5, 0.5, 1.25, 7.0]]), jnp.array([[2.0, -2, -1, 1, 99]])
    mask = jnp.array([[True, True, True, True, False]])
    old = jnp.full((1, 5), -1.0)

    def run(logprobs):
        return policy_loss(
            logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.3, normalizer=4, **TOKENS
        )

    (loss, metrics), gradient = jax.value_and_grad(run, has_aux=True)(old + jnp.log(ratio))
    assert loss == pytest.approx(-0.0125, abs=1e-6) and metrics["clip_fraction"] == 0.5
    np.testing.assert_allclose(gradient, [[0, 1.5 * 2 / 4, 0, -1.25 / 4, 0]], rtol=1e-5)
    # k3 of KL(old || new): (r - 1 - log r) / 4 over the four tokens.
    assert metrics["approx_kl"] == pytest.approx(
        sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 1.25)) / 4, rel=1e-5
    )


def test_truncated_ratios_by_hand():
    """Truncated at 2; four action tokens and an observation.

    ratio 4,   A -1: at most 2, so -2; gradient that of a weight of 2
    ratio 4,   A  1: min(2, 1.3) = 1.3, clipped: no gradient
    ratio 1.5, A -1: -1.5, as without truncation
    ratio .5,  A  1: .5, the same
    Sum -1.7; loss = 1.7 / 4. Two of the four ratios were truncated.
    """
    ratio, advantages = jnp.array([[4.0, 4, 1.5, 0.5, 9]]), jnp.array([[-1.0, 1, -1, 1, -1]])
    old, mask = jnp.full((1, 5), -3.0), jnp.array([[True] * 4 + [False]])
    run = lambda x, **limit: policy_loss(
        x, old, advantages, mask, clip_low=0.2, clip_high=0.3, normalizer=4, **TOKENS, **limit
    )
    (loss, metrics), gradient = jax.value_and_grad(run, has_aux=True)(
        old + jnp.log(ratio), max_ratio=2.0
    )
    assert loss == pytest.approx(1.7 / 4, rel=1e-5)
    assert metrics["truncated_fraction"] == 0.5 and metrics["clip_fraction"] == 0.25
    np.testing.assert_allclose(gradient, [[2 / 4, 0, 1.5 / 4, -0.5 / 4, 0]], rtol=1e-5)
    whole, metrics = run(old + jnp.log(ratio))
    assert whole == pytest.approx(3.7 / 4, rel=1e-5) and metrics["truncated_fraction"] == 0


def test_value_loss_by_hand():
    """value_clip .5, three action tokens and one observation.

    old 0, new  1, return 1: (1-1)^2 = 0,    clipped (.5-1)^2 = .25   -> .25, clipped: no gradient
    old 0, new .4, return 1: (.4-1)^2 = .36, the same                 -> .36, gradient (.4 - 1) / 3
    old 0, new -2, return 1: (-2-1)^2 = 9,   clipped (-.5-1)^2 = 2.25 -> 9,   gradient (-2 - 1) / 3
    loss = (.25 + .36 + 9) / 2 / 3 = 1.601667
    """
    old, returns = jnp.zeros((1, 4)), jnp.ones((1, 4))
    mask = jnp.array([[True, True, True, False]])

    def run(values):
        return value_loss(values, old, returns, mask, value_clip=0.5, normalizer=3, **TOKENS)

    (loss, metrics), gradient = jax.value_and_grad(run, has_aux=True)(
        jnp.array([[1.0, 0.4, -2.0, 50.0]])
    )
    assert loss == pytest.approx(1.601667, rel=1e-5)
    np.testing.assert_allclose(gradient, [[0, -0.2, -1, 0]], atol=1e-6)
    assert metrics["value_clip_fraction"] == pytest.approx(1 / 3)
    assert metrics["value_error"] == pytest.approx(9.36 / 3, rel=1e-5)


def test_rounding_is_no_clipping():
    """Values that moved by less than value_clip are not counted.

    A compiled old + (new - old) is not new to the last bit.
    """
    old, step, returns = jax.random.normal(jax.random.key(0), (3, 1, 1000))
    mask, over = jnp.ones((1, 1000), bool), dict(normalizer=1000, **TOKENS)
    loss = jax.jit(lambda values: value_loss(values, old, returns, mask, value_clip=0.5, **over))
    _, metrics = loss(old + 0.3 * jnp.tanh(step))
    assert metrics["value_clip_fraction"] == 0


def test_entropy_bonus_by_hand():
    """(1 + 2) / 4: this is half of a minibatch of four action tokens."""
    bonus, metrics = entropy_bonus(
        jnp.array([[1.0, 2.0, 50.0]]), jnp.array([[True, True, False]]), normalizer=4, **TOKENS
    )
    assert bonus == metrics["entropy"] == pytest.approx(0.75)


def test_aggregation_by_hand():
    """Rows (1, 2, 3), none, (8), outside 99s.

    Over tokens 14 / 4 = 3.5; over sequences (2 + 8) / 2 = 5.
    """
    x = jnp.array([[1.0, 2, 3], [99, 99, 99], [99, 8, 99]])
    mask = jnp.array([[True] * 3, [False] * 3, [False, True, False]])
    for aggregation, count, mean in (("token_mean", 4, 3.5), ("sequence_mean", 2, 5)):
        assert loss_normalizer(mask, aggregation=aggregation) == count
        assert aggregate(x, mask, aggregation=aggregation, normalizer=count) == pytest.approx(mean)
    for call in (
        lambda: loss_normalizer(mask, aggregation="max"),
        lambda: aggregate(x, mask, aggregation="max", normalizer=1),
    ):
        with pytest.raises(ValueError, match="rl.aggregation is 'max'"):
            call()


def test_kl_loss_by_hand():
    """x = .5 and -1 and an observation: k2 = .125 and .5, loss .625 / 2, gradient x / 2."""
    reference, mask = jnp.array([[-1.5, -1.0, 9]]), jnp.array([[True, True, False]])
    run = lambda logprobs: kl_loss(
        logprobs, reference, mask, estimator="k2", normalizer=2, **TOKENS
    )
    (loss, metrics), gradient = jax.value_and_grad(run, has_aux=True)(jnp.array([[-1.0, -2.0, -9]]))
    assert loss == metrics["kl_loss"] == pytest.approx(0.3125)
    np.testing.assert_allclose(gradient, [[0.25, -0.5, 0]], rtol=1e-6)


def test_which_divergence_a_kl_loss_lowers():
    """p = (1/2, 1/4, 1/4): the mean over the tokens 0, 0, 1, 2 is the expectation under p.

    Gradients are in the logits of p, with the samples fixed.
    """
    logits, q = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.array([0.2, 0.3, 0.5])
    tokens, mask = jnp.array([[0, 0, 1, 2]]), jnp.ones((1, 4), bool)

    slope = lambda loss: jax.jit(jax.grad(loss))(logits)

    def gradient(estimator):
        over = dict(estimator=estimator, normalizer=4, **TOKENS)
        return slope(
            lambda x: kl_loss(jax.nn.log_softmax(x)[tokens], jnp.log(q)[tokens], mask, **over)[0]
        )

    forward = slope(lambda x: (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - jnp.log(q))).sum())
    backward = slope(lambda x: (q * (jnp.log(q) - jax.nn.log_softmax(x))).sum())
    assert np.abs(forward - backward).max() > 0.01
    np.testing.assert_allclose(gradient("k1"), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(gradient("k2"), forward, atol=1e-6)
    np.testing.assert_allclose(gradient("k3"), backward, atol=1e-6)


def test_extreme_log_ratios_stay_finite():
    ones, old = jnp.ones((1, 2)), jnp.full((1, 2), -1e-3)
    policy = lambda x: policy_loss(
        x, old, -ones, ones > 0, clip_low=0.2, clip_high=0.2, normalizer=2, **TOKENS
    )[0]
    kl = lambda x: kl_loss(x, old, ones > 0, estimator="k3", normalizer=2, **TOKENS)[0]
    for extreme in (500.0, -500.0, -np.inf):
        for loss in (policy, kl):
            value, gradient = jax.value_and_grad(loss)(jnp.array([[extreme, -1e-3]]))
            assert np.isfinite(value) and np.isfinite(gradient).all()


# The whole objective


def test_stepwise_ppo_loss_by_hand():
    """Two action tokens around an observation; gamma = lambda = 1; no KL, no whitening.

    The ratio is 1, and values are as they were. Step reward .5 on token 0 (search_end), outcome 1
    on token 2. V = (.25, .5). Returns: 1.5, 1. A = 1.25, .5.
    policy = -(1.25 + .5) / 2 = -.875; value = (1.25^2 + .5^2) / 2 / 2 = .453125;
    entropy (.2 + .4) / 2 = .3.
    loss = -.875 + 2 * .453125 - .1 * .3 = .00125.
    """
    same = jnp.array([[-1.0, 9, -2]])
    values, entropy = jnp.array([[0.25, 9, 0.5]]), jnp.array([[0.2, 9, 0.4]])
    loss, metrics = stepwise_ppo_loss(
        same,
        same,
        same,
        values,
        values,
        entropy,
        jnp.ones((1, 3), bool),
        jnp.array([[True, False, True]]),
        jnp.array([[0, 0, 1]]),
        jnp.array([0]),
        jnp.array([[0, -1]]),
        jnp.array([[0.5, 9]]),
        jnp.array([1.0]),
        **KEYWORDS
        | dict(
            gamma=1.0,
            gae_lambda=1.0,
            value_coef=2.0,
            entropy_coef=0.1,
            kl_coef=0.3,
            whiten_advantages=False,
        ),
    )
    assert loss == pytest.approx(0.00125, abs=1e-6)
    assert metrics["policy_loss"] == pytest.approx(-0.875)
    assert metrics["value_loss"] == pytest.approx(0.453125)
    assert metrics["entropy"] == pytest.approx(0.3) and metrics["reward"] == pytest.approx(1.5)
    for name in ("kl", "clip_fraction", "value_clip_fraction", "approx_kl"):
        assert metrics[name] == 0


@cases
@settings(max_examples=20, deadline=None)
@given(batches)
def test_equals_a_plain_loop(change, batch):
    np.testing.assert_allclose(
        loss_of(batch, **change)[0], loop_loss(batch, **KEYWORDS | change), rtol=1e-4, atol=2e-4
    )


@settings(max_examples=30, deadline=None)
@given(batches)
def test_zero_step_rewards_reduce_to_outcome_only_ppo(batch):
    batch = batch | dict(step_rewards=np.zeros((B, K), np.float32))
    expected = loop_loss(batch | dict(step_rewards=None), **KEYWORDS)
    for placement in ("step", "merged"):
        np.testing.assert_allclose(
            loss_of(batch, placement=placement)[0], expected, rtol=1e-4, atol=1e-4
        )


@settings(max_examples=30, deadline=None)
@given(batches)
def test_ratio_one_gives_the_unclipped_gradient(batch):
    """At the sampling policy the gradient is -A / N under any clip, and nothing is clipped."""
    batch = batch | dict(logprobs=batch["old_logprobs"])
    plain = gradients_of(batch, clip_low=1e6, clip_high=1e6)[0]
    for clips in (dict(clip_low=0.0001, clip_high=0.2), dict(clip_low=0.2, clip_high=0.0001)):
        np.testing.assert_allclose(gradients_of(batch, **clips)[0], plain, atol=1e-6)
        loss, metrics = loss_of(batch, **clips)
        assert metrics["clip_fraction"] == metrics["approx_kl"] == 0
    # Whitened advantages sum to 0 over the batch, so the gradient does too, without being 0 itself.
    assert abs(plain.sum()) < 1e-5
    if batch["action_mask"].sum() > 2:
        assert np.abs(plain).max() > 1e-3


@cases
@settings(max_examples=10, deadline=None)
@given(batches)
def test_observation_and_padding_tokens_have_exactly_no_gradient_and_no_influence(change, batch):
    """Values of observation tokens matter only with over_observations, padding and prompt never."""
    names = ("logprobs", "old_logprobs", "ref_logprobs", "values", "old_values", "entropy")
    outside = ~batch["action_mask"]
    outside_values = batch["turn_ids"] < 0 if change.get("over_observations") else outside
    gradients = gradients_of(batch, **change)
    for gradient, where in zip(gradients, (outside, outside_values, outside)):
        assert np.isfinite(gradient).all() and (gradient[where] == 0).all()
    for rubbish in (np.nan, -np.inf, 1e30):
        other = batch | {
            name: np.where(
                outside_values if "values" in name else outside, np.float32(rubbish), batch[name]
            )
            for name in names
        }
        np.testing.assert_array_equal(loss_of(other, **change)[0], loss_of(batch, **change)[0])
        for a, b in zip(gradients_of(other, **change), gradients):
            np.testing.assert_array_equal(a, b)


def test_only_asked_for_values_are_learned():
    """Gradients of the values are on the tokens that the estimator reads, and nowhere else."""
    batch = draw_episodes(4)
    mask, starts = batch["action_mask"], np.zeros((B, T), bool)
    for b in range(B):
        starts[b, [tokens[0] for tokens in list_turns(mask, batch["turn_ids"], b)]] = True
    expected = {"gae": mask, "observations": batch["turn_ids"] >= 0, "turn_gae": starts}
    expected |= dict.fromkeys(CRITIC_FREE, np.zeros((B, T), bool))
    for name, where in expected.items():
        gradient = gradients_of(batch, **CASES[name] | dict(value_clip=1e6))[1]
        np.testing.assert_array_equal(gradient != 0, where, err_msg=name)


@pytest.mark.parametrize("name", ["gae", "grpo"])
def test_rewards_advantages_and_returns_carry_no_gradient(name):
    batch = draw_episodes(4)
    moved = ("logprobs", "entropy") if name in CRITIC_FREE else ("logprobs", "values", "entropy")
    for array, gradient in differentiate(batch, **KEYWORDS | CASES[name])[1].items():
        assert (np.abs(gradient).max() > 0) == (array in moved), array
    # The pieces themselves hold their targets fixed, also when called alone.
    mask, old = batch["action_mask"], jnp.asarray(batch["old_logprobs"])
    logprobs, values = batch["logprobs"], batch["values"]
    for loss in (
        lambda x: policy_loss(logprobs, old, x, mask)[0],
        lambda x: value_loss(values, x, x, mask)[0],
        lambda x: kl_loss(logprobs, x, mask, estimator="k2")[0],
    ):
        assert (np.asarray(jax.grad(loss)(old)) == 0).all()


@some_cases
@settings(max_examples=10, deadline=None)
@given(batches, st.permutations(range(B)))
def test_padding_and_order_of_episodes_change_nothing(change, batch, order):
    order = np.array(order)
    loss, gradients = loss_of(batch, **change)[0], gradients_of(batch, **change)
    permuted = {name: array[order] for name, array in batch.items()}
    padded = pad_rows_and_tokens(batch, 1, 5)
    for other in (permuted, padded):
        np.testing.assert_allclose(loss_of(other, **change)[0], loss, rtol=1e-4, atol=1e-5)
    for whole, one, other in zip(
        gradients, gradients_of(permuted, **change), gradients_of(padded, **change)
    ):
        np.testing.assert_allclose(one, whole[order], atol=1e-4)
        np.testing.assert_allclose(other[:B, :T], whole, atol=1e-4)
        assert (other[B:] == 0).all() and (other[:, T:] == 0).all()


@pytest.mark.parametrize("name", slow_but_for("gae", ["gae", "turn_gae", "turn_return"]))
@settings(max_examples=8, deadline=None)
@given(batches)
def test_a_long_observation_changes_nothing(name, batch):
    """400 observation tokens in the middle of every episode, at gamma and lambda below 1."""
    longer = insert_observation(batch, 6, 400)
    np.testing.assert_allclose(
        loss_of(longer, **CASES[name])[0], loss_of(batch, **CASES[name])[0], rtol=1e-4, atol=1e-5
    )
    for a, b in zip(gradients_of(longer, **CASES[name]), gradients_of(batch, **CASES[name])):
        np.testing.assert_allclose(np.delete(a, np.s_[6:406], axis=1), b, atol=1e-5)


@functools.partial(jax.jit, static_argnames="aggregation")
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def evaluate_rows(logprobs, values, data, counts, rows, aggregation):
    part = {name: array[rows] for name, array in data.items()}
    logprobs, values, mask = logprobs[rows], values[rows], part["action_mask"]
    over_actions = dict(aggregation=aggregation, normalizer=counts[0])
    policy, one = policy_loss(
        logprobs,
        part["old_logprobs"],
        part["advantages"],
        mask,
        clip_low=0.2,
        clip_high=0.3,
        **over_actions,
    )
    value, two = value_loss(
        values,
        part["old_values"],
        part["returns"],
        part["value_mask"],
        value_clip=0.5,
        aggregation=aggregation,
        normalizer=counts[1],
    )
    bonus, three = entropy_bonus(part["entropy"], mask, **over_actions)
    kl, four = kl_loss(logprobs, part["ref_logprobs"], mask, estimator="k3", **over_actions)
    return policy + value - bonus + kl, one | two | three | four


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@settings(max_examples=20, deadline=None)
@given(batch=batches)
def test_a_micro_batch_split_changes_nothing(aggregation, batch):
    """Rows one at a time, each divided by the whole count, add up to the whole.

    So do losses, metrics and gradients. Rows hold unequal numbers of tokens.
    """
    rng = np.random.default_rng(0)
    advantages, returns = (rng.normal(size=(B, T)).astype(np.float32) for _ in range(2))
    data = batch | dict(advantages=advantages, returns=returns, value_mask=batch["turn_ids"] >= 0)
    masks = data["action_mask"], data["value_mask"]
    counts = tuple(loss_normalizer(mask, aggregation=aggregation) for mask in masks)
    evaluate = lambda rows: evaluate_rows(
        data["logprobs"], data["values"], data, counts, rows, aggregation
    )
    whole, parts = evaluate(np.arange(B)), [evaluate(np.array([row])) for row in range(B)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), total, whole)


@cases
def test_batches_without_any_action_or_search_are_defined(change):
    for share in (0.0, 0.7):
        batch = draw_episodes(1, share) | dict(search_end=np.full((B, K), -1, np.int32))
        loss, metrics = loss_of(batch, **change)
        assert np.isfinite(loss) and all(np.isfinite(value) for value in metrics.values())
        assert all(np.isfinite(gradient).all() for gradient in gradients_of(batch, **change))
        if not share and not change.get("over_observations"):
            assert loss == 0


def test_the_examples_of_the_page_run():
    """Every Python block of docs/losses.md, one after the other; they assert what it says."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks and any("stepwise_ppo_loss(" in block for block in blocks)
    exec("\n".join(blocks), {})
