"""Rewards at their tokens: by hand, against a loop over Python lists, and the totals."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsearch_jax.rewards.placement import place_rewards

# Row 0: prompt (0, 1), action (2, 3), observation (4), action (5, 6), padding (7). Row 1: no action
# token. Row 2: one turn that ends with its search.
MASK = np.array([[0, 0, 1, 1, 0, 1, 1, 0], [0] * 8, [0, 1, 1, 0, 0, 0, 0, 0]], bool)
END = np.array([[3, -1, -1], [-1, -1, -1], [2, -1, -1]], np.int32)
STEP = np.array([[0.5, 9.0, 9.0], [9.0, 9.0, 9.0], [0.25, 0.0, 0.0]], np.float32)
OUTCOME = np.array([2.0, 3.0, 4.0], np.float32)


def place(placement, outcome_overwrites=False):
    keywords = dict(placement=placement, outcome_overwrites=outcome_overwrites)
    return np.asarray(place_rewards(STEP, OUTCOME, END, MASK, **keywords))


def test_step_by_hand():
    """Row 0: .5 on token 3 (its search_end), 2 on token 6 (the last action token).

    The 9s are on turns without a search. Row 2: search and outcome meet on token 2: .25 + 4.
    """
    np.testing.assert_array_equal(
        place(placement="step"), [[0, 0, 0, 0.5, 0, 0, 2, 0], [0] * 8, [0, 0, 4.25, 0, 0, 0, 0, 0]]
    )


def test_merged_by_hand():
    np.testing.assert_array_equal(
        place(placement="merged"),
        [[0, 0, 0, 0, 0, 0, 2.5, 0], [0] * 8, [0, 0, 4.25, 0, 0, 0, 0, 0]],
    )


def test_outcome_overwrites_by_hand():
    """Row 2 loses the .25 on its last action token; row 0 keeps its step reward elsewhere."""
    step = [[0, 0, 0, 0.5, 0, 0, 2, 0], [0] * 8, [0, 0, 4, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(place(placement="step", outcome_overwrites=True), step)
    np.testing.assert_array_equal(
        place(placement="merged", outcome_overwrites=True).sum(1), np.sum(step, 1)
    )


def test_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="reward.placement is 'first'"):
        place(placement="first")


def test_nan_on_turns_that_never_happened_does_no_harm():
    step = np.where(END < 0, np.nan, STEP)
    outcome = np.where(MASK.any(1), OUTCOME, np.nan)
    for placement in ("step", "merged"):
        np.testing.assert_array_equal(
            place_rewards(step, outcome, END, MASK, placement=placement, outcome_overwrites=False),
            place(placement=placement),
        )


@st.composite
def batches(draw):
    """step [B, K], outcome [B], end [B, K], mask [B, T].

    Masks have holes; ends are action tokens, perhaps several at one, or -1.
    """
    b, t, k = 3, draw(st.sampled_from([1, 9])), 3
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random((b, t)) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    end = np.full((b, k), -1, np.int32)
    for row in range(b):
        actions = np.flatnonzero(mask[row])
        if len(actions):
            end[row] = np.where(rng.random(k) < 0.6, rng.choice(actions, k), -1)
    step, outcome = (rng.normal(size=shape).astype(np.float32) for shape in ((b, k), b))
    return step, outcome, end, mask


@settings(max_examples=40, deadline=None)
@given(batches(), st.booleans())
def test_equals_a_plain_loop(batch, overwrites):
    step, outcome, end, mask = batch
    expected = np.zeros(mask.shape)
    for b in range(len(mask)):
        for k in range(end.shape[1]):
            if end[b, k] >= 0:
                expected[b, end[b, k]] += step[b, k]
        actions = [t for t in range(mask.shape[1]) if mask[b, t]]
        if actions:
            expected[b, actions[-1]] = outcome[b] + (0 if overwrites else expected[b, actions[-1]])
    placed = np.asarray(
        place_rewards(step, outcome, end, mask, placement="step", outcome_overwrites=overwrites)
    )
    np.testing.assert_allclose(placed, expected, atol=1e-6)
    merged = np.asarray(
        place_rewards(step, outcome, end, mask, placement="merged", outcome_overwrites=overwrites)
    )
    np.testing.assert_allclose(merged.sum(1), placed.sum(1), atol=1e-5)  # the same total, elsewhere
    assert ((merged != 0).sum(1) <= 1).all()
    assert (placed[~mask] == 0).all() and (merged[~mask] == 0).all()


def test_padding_changes_nothing():
    wider = jnp.pad(jnp.asarray(MASK), ((0, 0), (0, 5)))
    for placement in ("step", "merged"):
        padded = np.asarray(
            place_rewards(STEP, OUTCOME, END, wider, placement=placement, outcome_overwrites=False)
        )
        np.testing.assert_array_equal(padded[:, :8], place(placement=placement))
        assert (padded[:, 8:] == 0).all()
