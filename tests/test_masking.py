"""Masked statistics: by hand, against NumPy, with empty masks and with NaN outside a mask."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsearch_jax.masking import (
    masked_mean,
    masked_sum,
    masked_var,
    standardize_in_groups,
    whiten,
)
from stepsearch_jax.rl import advantages, losses

X = jnp.array([[1.0, 100.0, 3.0], [jnp.nan, 8.0, jnp.inf]])
MASK = jnp.array([[True, False, True], [False, True, False]])


def test_by_hand():
    """Kept: 1, 3, 8. Sum 12, mean 4, variance ((-3)^2 + (-1)^2 + 4^2) / 3 = 26 / 3."""
    assert masked_sum(X, MASK) == 12 and masked_mean(X, MASK) == 4
    assert masked_var(X, MASK) == pytest.approx(26 / 3)
    np.testing.assert_allclose(masked_mean(X, MASK, axis=1), [2, 8])
    np.testing.assert_allclose(masked_var(X, MASK, axis=1), [1, 0])
    scale = (26 / 3) ** -0.5
    np.testing.assert_allclose(
        whiten(X, MASK), [[-3 * scale, 0, -1 * scale], [0, 4 * scale, 0]], rtol=1e-5
    )
    np.testing.assert_allclose(
        whiten(X, MASK, shift_mean=False),
        [[4 - 3 * scale, 0, 4 - scale], [0, 4 + 4 * scale, 0]],
        rtol=1e-5,
    )


def test_empty_and_single_masks_are_defined():
    none = jnp.zeros_like(MASK)
    assert masked_sum(X, none) == masked_mean(X, none) == masked_var(X, none) == 0
    np.testing.assert_array_equal(masked_mean(X, none, axis=1), [0, 0])
    np.testing.assert_array_equal(whiten(X, none), np.zeros((2, 3)))
    np.testing.assert_array_equal(whiten(X, none.at[1, 1].set(True)), np.zeros((2, 3)))


@pytest.mark.parametrize(
    "statistic", [masked_sum, masked_mean, masked_var, lambda x, m: (whiten(x, m) ** 3).sum()]
)
def test_what_lies_outside_touches_no_gradient(statistic):
    gradient = jax.grad(lambda x: statistic(x, MASK))(X)
    clean = jax.grad(lambda x: statistic(x, MASK))(jnp.where(MASK, X, 7.0))
    np.testing.assert_array_equal(gradient, clean)
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[~np.asarray(MASK)] == 0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-10, 10, width=32), st.booleans()), min_size=8, max_size=8))
def test_equals_numpy_on_the_kept_entries(pairs):
    x, mask = np.array([p[0] for p in pairs], np.float32), np.array([p[1] for p in pairs])
    kept = x[mask].astype(np.float64)
    np.testing.assert_allclose(masked_mean(x, mask), kept.mean() if len(kept) else 0, atol=1e-4)
    np.testing.assert_allclose(masked_var(x, mask), kept.var() if len(kept) else 0, atol=1e-3)
    whitened = np.asarray(whiten(x, mask))
    assert (whitened[~mask] == 0).all()
    if len(kept) and kept.var() > 1e-2:
        np.testing.assert_allclose([whitened[mask].mean(), whitened[mask].var()], [0, 1], atol=1e-3)


def test_groups_by_hand():
    """Rows 0 and 2 are a group with 1, 3 and 8: mean 4, variance 26 / 3.

    Row 1 is a group with the single 5; row 3 belongs to the first group and is empty.
    """
    x = jnp.array([[1.0, 3, jnp.nan], [jnp.inf, 5, 0], [jnp.nan, 8, 0], [jnp.nan, 0, 0]])
    mask = jnp.array([[True, True, False], [False, True, False], [False, True, False], [False] * 3])
    got = standardize_in_groups(x, mask, jnp.array([4, -1, 4, 4]), epsilon=0.5)
    expected = np.array([[-3, -1, 0], [0] * 3, [0, 4, 0], [0] * 3]) / ((26 / 3) ** 0.5 + 0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_groups_equal_numpy(seed, share):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(10, 1, (5, 3)).astype(np.float32), rng.random((5, 3)) < share
    ids = rng.integers(0, 3, 5)
    got = np.asarray(standardize_in_groups(x, mask, ids, epsilon=1e-6))
    assert (got[~mask] == 0).all()
    for group in set(ids):
        kept = x[ids == group][mask[ids == group]].astype(np.float64)
        if len(kept):
            expected = (kept - kept.mean()) / (kept.std() + 1e-6)
            np.testing.assert_allclose(got[ids == group][mask[ids == group]], expected, atol=1e-2)


def test_equal_entries_of_a_group_become_exactly_nothing():
    for value in (0.1 + 0.2, 1e6 / 3, -7e-3):
        arrays = jnp.full((7, 3), value), jnp.ones((7, 3), bool), jnp.zeros(7, int)
        np.testing.assert_array_equal(standardize_in_groups(*arrays, epsilon=1e-6), 0)


def call_with(function, **masks):
    """Calls a public loss or estimator; all arrays it takes are ones, [2, 3]."""
    arrays = {
        name: jnp.ones((2, 3))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind != parameter.KEYWORD_ONLY
    }
    return function(**arrays | masks)


MASKED = [  # function, and its masks
    (losses.aggregate, ["mask"]),
    (losses.loss_normalizer, ["mask"]),
    (losses.policy_loss, ["action_mask"]),
    (losses.value_loss, ["value_mask"]),
    (losses.entropy_bonus, ["action_mask"]),
    (losses.kl_loss, ["action_mask"]),
    (losses.stepwise_ppo_loss, ["token_mask", "action_mask"]),
    (advantages.gae, ["action_mask"]),
    (advantages.turn_gae, ["action_mask"]),
    (advantages.grpo, ["action_mask"]),
    (advantages.rloo, ["action_mask"]),
    (advantages.turn_return, ["action_mask"]),
    (advantages.estimate_advantages, ["action_mask", "credit_mask"]),
    (advantages.stepwise_advantages, ["token_mask", "action_mask"]),
]


@pytest.mark.parametrize("function,masks", MASKED, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_a_mask_of_numbers_is_named(function, masks, dtype):
    for wrong in masks:
        given = {name: jnp.ones((2, 3), bool if name != wrong else dtype) for name in masks}
        with pytest.raises(TypeError, match=f"{wrong} has dtype {dtype}.*{wrong} > 0"):
            call_with(function, **given)
