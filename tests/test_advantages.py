"""KL penalties, the adaptive controller and the estimators: by hand, by loops and by laws."""

import episodes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from episodes import (
    CRITIC_FREE,
    ESTIMATORS,
    B,
    T,
    draw_episodes,
    insert_observation,
    loop_estimate,
    pad_rows_and_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsearch_jax.rl import (
    adapt_kl_coef,
    estimate_advantages,
    gae,
    grpo,
    kl_penalty,
    rloo,
    stepwise_advantages,
    turn_gae,
    turn_return,
)


def loop_gae(rewards, values, mask, gamma, gae_lambda):
    """The definition, row by row, over the list of action tokens alone."""
    advantages = np.zeros(mask.shape)
    for b in range(len(mask)):
        advantages[b, mask[b]] = episodes.loop_gae(
            rewards[b, mask[b]].tolist(), values[b, mask[b]].tolist(), gamma, gae_lambda
        )
    return advantages, np.where(mask, advantages + values, 0)


@st.composite
def batches(draw, b=3, t=10):
    """rewards, values, mask [B, T], with holes, empty rows, and rubbish outside the mask."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random((b, t)) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    rewards, values = (rng.normal(size=(b, t)).astype(np.float32) for _ in range(2))
    return rewards, values, mask


factors = st.sampled_from([0.0, 0.5, 0.9, 1.0])


# KL


def test_kl_estimators_by_hand():
    """x = log p - log q = 0.5 and -1.

    k1 = x; k2 = .125, .5; k3 = e^-.5 - 1 + .5 = .106531, e - 1 - 1 = .718282.
    """
    logprobs, reference = jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0])
    expected = {"k1": [0.5, -1], "k2": [0.125, 0.5], "k3": [0.1065307, 0.7182818]}
    for estimator, values in expected.items():
        found = kl_penalty(logprobs, reference, estimator=estimator)
        np.testing.assert_allclose(found, values, rtol=1e-5, err_msg=estimator)
    with pytest.raises(ValueError, match="rl.kl_estimator is 'k4'"):
        kl_penalty(logprobs, reference, estimator="k4")


def test_kl_estimates_the_divergence():
    """Expectation under p = (.5, .3, .2) against q = (.2, .3, .5).

    k1 and k3 give KL(p || q) exactly, and k3 is never negative.
    """
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    kl = (p * np.log(p / q)).sum()
    k1, k3 = (np.asarray(kl_penalty(np.log(p), np.log(q), estimator=x)) for x in ("k1", "k3"))
    for penalties in (k1, k3):
        assert (p * penalties).sum() == pytest.approx(kl, rel=1e-5)
    assert (k3 >= 0).all()


def test_k3_stays_finite():
    gradient = jax.grad(lambda x: kl_penalty(x, jnp.zeros(2), estimator="k3").sum())(
        jnp.array([-500.0, 500.0])
    )
    assert np.isfinite(gradient).all()
    assert np.isfinite(kl_penalty(jnp.array([-500.0]), jnp.zeros(1), estimator="k3")).all()


def test_adaptive_controller_by_hand():
    """target .1, horizon 1000, 100 episodes.

    KL .11: e = .1, beta' = beta (1 + .1 * .1). KL .3: e clipped to .2: 1.02. KL 0: .98.
    """
    adapt = lambda kl, n=100: float(
        adapt_kl_coef(0.5, kl, target=0.1, horizon=1000.0, num_episodes=n)
    )
    assert adapt(0.1) == pytest.approx(0.5)
    assert adapt(0.11) == pytest.approx(0.5 * 1.01, rel=1e-5)
    assert adapt(0.3) == pytest.approx(0.5 * 1.02, rel=1e-5)
    assert adapt(0.0) == pytest.approx(0.5 * 0.98, rel=1e-5)
    assert adapt(float("nan")) == 0.5
    # Many horizons in one iteration count as one: never negative.
    assert adapt(0.0, n=10_000_000) == pytest.approx(0.5 * 0.8)


# GAE


def test_gae_by_hand():
    """gamma .5, lambda .5; action tokens 1, 3, 4; an observation at 2; padding at 0 and 5.

    The 100s outside the actions must not show. V = 1, 2, 3; r = 0, 1, 4.
    delta_4 = 4 - 3 = 1;   delta_3 = 1 + .5*3 - 2 = .5;   delta_1 = 0 + .5*2 - 1 = 0
    A_4 = 1;   A_3 = .5 + .25*1 = .75;   A_1 = 0 + .25*.75 = .1875.   Returns: 4, 2.75, 1.1875.
    """
    rewards = jnp.array([[100.0, 0, 100, 1, 4, 100]])
    values = jnp.array([[100.0, 1, 100, 2, 3, 100]])
    mask = jnp.array([[False, True, False, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    np.testing.assert_allclose(advantages, [[0, 0.1875, 0, 0.75, 1, 0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0, 1.1875, 0, 2.75, 4, 0]], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(batches(), factors, factors)
def test_gae_equals_a_plain_loop(batch, gamma, gae_lambda):
    rewards, values, mask = batch
    expected = loop_gae(rewards, values, mask, gamma, gae_lambda)
    for outside in (1e6, np.nan):
        results = gae(
            np.where(mask, rewards, outside),
            np.where(mask, values, outside),
            mask,
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
        for result, wanted in zip(results, expected):
            np.testing.assert_allclose(result, wanted, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(batches())
def test_undiscounted_advantage_is_return_minus_value(batch):
    rewards, values, mask = batch
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    to_go = np.where(mask, np.cumsum(np.where(mask, rewards, 0)[:, ::-1], 1)[:, ::-1], 0)
    np.testing.assert_allclose(returns, to_go, atol=1e-4)
    np.testing.assert_allclose(advantages, np.where(mask, to_go - values, 0), atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(batches(), factors)
def test_lambda_zero_is_the_one_step_error(batch, gamma):
    rewards, values, mask = batch
    advantages, _ = gae(rewards, values, mask, gamma=gamma, gae_lambda=0.0)
    for b in range(len(mask)):
        kept = np.flatnonzero(mask[b])
        following = np.append(values[b, kept[1:]], 0)[: len(kept)]
        np.testing.assert_allclose(
            np.asarray(advantages)[b, kept],
            rewards[b, kept] + gamma * following - values[b, kept],
            atol=1e-5,
        )


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.99, 0.9)])
def test_a_long_observation_takes_no_credit_away(gamma, gae_lambda):
    """Three actions, 400 observation tokens, three actions: advantages as without them."""
    rng = np.random.default_rng(0)
    rewards, values = (rng.normal(size=(1, 406)).astype(np.float32) for _ in range(2))
    mask = np.ones((1, 406), bool)
    mask[:, 3:403] = False
    advantages = lambda *arrays: np.asarray(gae(*arrays, gamma=gamma, gae_lambda=gae_lambda)[0])
    long = advantages(rewards, values, mask)[:, mask[0]]
    short = advantages(rewards[:, mask[0]], values[:, mask[0]], np.ones((1, 6), bool))
    np.testing.assert_allclose(long, short, rtol=1e-6)
    # Walking through the observation does differ: this test can fail.
    kept = [np.where(mask, x, 0) for x in (rewards, values)]
    walked = advantages(*kept, np.ones_like(mask))
    assert np.abs(walked[:, :3] - long[:, :3]).max() > 0.1


@settings(max_examples=20, deadline=None)
@given(batches(), st.permutations(range(3)))
def test_padding_and_order_of_episodes_change_nothing(batch, order):
    rewards, values, mask = batch
    whole = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.9)
    pad = lambda x: np.pad(x, ((0, 0), (2, 4)))
    padded = gae(pad(rewards), pad(values), pad(mask), gamma=0.9, gae_lambda=0.9)
    permuted = gae(rewards[order], values[order], mask[order], gamma=0.9, gae_lambda=0.9)
    for a, b, c in zip(whole, padded, permuted):
        np.testing.assert_allclose(np.asarray(b)[:, 2:12], a, atol=1e-6)
        assert (np.asarray(b)[:, :2] == 0).all() and (np.asarray(b)[:, 12:] == 0).all()
        np.testing.assert_allclose(c, np.asarray(a)[order], atol=1e-6)


# Every estimator, in one function


def estimate(batch, *, over_observations=False, **keywords):
    """-> ((advantages, returns, value_mask) as NumPy, the arrays and keywords behind them).

    The log-probabilities serve as rewards.
    """
    mask, rewards = batch["action_mask"], batch["logprobs"]
    credit_mask = mask
    if over_observations:
        credit_mask = batch["token_mask"] & (batch["turn_ids"] >= 0)
        rewards = np.where(mask, rewards, 0)
    keywords = dict(estimator="gae", gamma=0.9, gae_lambda=0.8, whiten_advantages=False) | keywords
    arrays = rewards, batch["values"], mask, credit_mask, batch["turn_ids"], batch["group_ids"]
    return [np.asarray(x) for x in estimate_advantages(*arrays, **keywords)], arrays, keywords


drawn = st.builds(draw_episodes, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.7, 1.0]))
estimators = pytest.mark.parametrize("estimator", ESTIMATORS)


@estimators
@settings(max_examples=25, deadline=None)
@given(drawn, factors, factors, st.booleans())
def test_every_estimator_equals_a_plain_loop(estimator, batch, gamma, gae_lambda, whiten):
    got, arrays, keywords = estimate(
        batch, estimator=estimator, gamma=gamma, gae_lambda=gae_lambda, whiten_advantages=whiten
    )
    # Standardising magnifies rounding.
    atol = 2e-3 if estimator in ("grpo", "turn_return") else 1e-4
    for a, b in zip(got, loop_estimate(*arrays, **keywords)):
        np.testing.assert_allclose(a, b, atol=atol)
    assert (got[0][~batch["action_mask"]] == 0).all() and (got[1][~got[2]] == 0).all()
    if estimator in CRITIC_FREE:
        assert not got[2].any()


@settings(max_examples=40, deadline=None)
@given(drawn, factors, factors, st.booleans())
def test_over_observations_equals_a_plain_loop(batch, gamma, gae_lambda, whiten):
    got, arrays, keywords = estimate(
        batch, over_observations=True, gamma=gamma, gae_lambda=gae_lambda, whiten_advantages=whiten
    )
    for a, b in zip(got, loop_estimate(*arrays, **keywords)):
        np.testing.assert_allclose(a, b, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(drawn)
def test_over_observations_changes_no_undiscounted_advantage_of_an_action(batch):
    """At gamma = lambda = 1 the values in between cancel; below, they do not."""
    mask, after_prompt = batch["action_mask"], batch["turn_ids"] >= 0
    wide, narrow = (
        estimate(batch, over_observations=over, gamma=1.0, gae_lambda=1.0)[0]
        for over in (True, False)
    )
    np.testing.assert_allclose(wide[0][mask], narrow[0][mask], atol=1e-4)
    np.testing.assert_array_equal(wide[2], after_prompt)
    wide, narrow = (
        estimate(batch, over_observations=over, gamma=0.9, gae_lambda=0.8)[0]
        for over in (True, False)
    )
    # Rows with an observation after an action.
    follows = lambda b, t: ~mask[b, t] and mask[b, :t].any()
    followed = np.array(
        [any(follows(b, t) for t in np.flatnonzero(after_prompt[b])) for b in range(B)]
    )
    assert (np.abs(wide[0] - narrow[0]).max(1, where=mask, initial=0)[followed] > 1e-5).all()


def test_turn_gae_by_hand():
    """gamma .5, lambda .5. Turn 0: actions 1, 2, observation 3; turn 1: action 4, 5.

    Values at the turns' first tokens: 1 and 2 (the 50s are not read).
    Turn rewards: .5 + 1 = 1.5 and 0 + 3 = 3.
    delta_1 = 3 - 2 = 1;   delta_0 = 1.5 + .5*2 - 1 = 1.5.
    A_1 = 1;   A_0 = 1.5 + .25*1 = 1.75.   Returns, at tokens 1 and 4: 2.75 and 3.
    Whitened over the four action tokens (1.75, 1.75, 1, 1): mean 1.375, deviation .375, so
    1, 1, -1, -1.
    """
    mask = jnp.array([[False, True, True, False, True, True]])
    turns = jnp.array([[-1, 0, 0, 0, 1, 1]])
    rewards, values = jnp.array([[9, 0.5, 1, 9, 0, 3]]), jnp.array([[50.0, 1, 50, 50, 2, 50]])
    advantages, returns, starts = turn_gae(rewards, values, mask, turns, gamma=0.5, gae_lambda=0.5)
    np.testing.assert_allclose(advantages, [[0, 1.75, 1.75, 0, 1, 1]])
    np.testing.assert_allclose(returns, [[0, 2.75, 0, 0, 3, 0]])
    np.testing.assert_array_equal(starts, [[0, 1, 0, 0, 1, 0]])
    keywords = dict(estimator="turn_gae", gamma=0.5, gae_lambda=0.5, whiten_advantages=True)
    whitened = estimate_advantages(
        rewards, values, mask, mask, turns, jnp.zeros(1, int), **keywords
    )[0]
    np.testing.assert_allclose(whitened, [[0, 1, 1, 0, -1, -1]], rtol=1e-5)


def group_case():
    """Five episodes: rows 0, 2 and 4 are a group with returns 1, 3 and 8.

    Row 1 is alone; row 3 has the group's id but never acted.
    """
    mask = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]], bool)
    rewards = np.array(
        [[0.25, 0.75, 99], [5, 99, 99], [99, 0, 3], [99, 99, 99], [1, 3, 4]], np.float32
    )
    return rewards, mask, np.array([9, 2, 9, 9, 9], np.int32)


def test_grpo_by_hand():
    """Returns 1, 3, 8: mean 4, variance (9 + 1 + 16) / 3 = 26 / 3.

    Advantages -3, -1, 4 over its root; the lone episode gets 0.
    """
    deviation = (26 / 3) ** 0.5
    expected = np.array([-3, 0, -1, 0, 4])[:, None] / deviation * group_case()[1]
    np.testing.assert_allclose(grpo(*group_case()), expected, rtol=1e-5)


def test_rloo_by_hand():
    """1 - (3 + 8) / 2 = -4.5;  3 - (1 + 8) / 2 = -1.5;  8 - (1 + 3) / 2 = 6; alone: 0."""
    np.testing.assert_allclose(
        rloo(*group_case()), np.array([-4.5, 0, -1.5, 0, 6])[:, None] * group_case()[1], rtol=1e-6
    )


def test_turn_return_by_hand():
    """gamma .5. Three episodes of a group: turn rewards (0, .5, 1), (1, 3) and (2).

    Returns from each turn on: (.5, 1, 1), (2.5, 3) and (2).
    Turn 0: .5, 2.5, 2: mean 5/3, deviation d0 = sqrt(13/18).
    Turn 1: 1, 3, and 2 of the episode that has ended: mean 2, deviation d1 = sqrt(2/3).
    Turn 2: 1, and 3 and 2 of those that have ended: the same.
    """
    mask = np.array([[1, 0, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 0, 0, 0]], bool)
    turns = np.array([[0, 0, 1, 1, 2], [0, 0, 0, 1, -1], [0, 0, -1, -1, -1]], np.int32)
    rewards = np.array(
        [[0, 9, 0.25, 0.25, 1], [0.5, 0.5, 9, 3, 9], [1.5, 0.5, 9, 9, 9]], np.float32
    )
    d0, d1 = (13 / 18) ** 0.5, (2 / 3) ** 0.5
    first = (np.array([0.5, 2.5, 2]) - 5 / 3) / d0
    got = turn_return(rewards, mask, turns, np.zeros(3, np.int32), gamma=0.5)
    expected = [
        [first[0], 0, -1 / d1, -1 / d1, -1 / d1],
        [first[1], first[1], 0, 1 / d1, 0],
        [first[2], first[2], 0, 0, 0],
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_one_more_search_costs_what_it_costs(data):
    """Two episodes that part at their last common turn: one answers, one searches once more.

    A charge c on every search lowers the searching one's advantage there by c against the other's,
    before the division by the deviation, which is taken out here.
    """
    common = data.draw(st.integers(0, 3))
    charge = data.draw(st.floats(0.05, 0.5))
    numbers = st.floats(-1, 1, width=32)
    steps, outcomes = data.draw(st.lists(numbers, min_size=5, max_size=5)), (0.3, 0.75)
    turns = np.arange(common + 2)[None].repeat(2, 0).astype(np.int32)
    mask = np.array([[True] * (common + 1) + [False], [True] * (common + 2)])

    def gap(cost):
        rewards = np.array([[step - cost for step in steps[: common + 2]]] * 2, np.float32)
        rewards[0, common], rewards[1, common + 1] = outcomes  # answers cost nothing
        got = turn_return(rewards, mask, turns, np.zeros(2, np.int32))
        returns = [rewards[0, common], rewards[1, common:].sum()]
        return np.diff(np.asarray(got)[:, common])[0] * (np.std(returns) + 1e-6)

    np.testing.assert_allclose(gap(0.0) - gap(charge), charge, rtol=1e-3, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(drawn)
def test_turn_gae_agrees_with_token_gae_where_both_say_the_same(batch):
    """A turn's advantage is token GAE's at its first token, undiscounted.

    With one action token per turn it is so at any gamma and lambda.
    """
    (tokens, _, _), (turns, _, starts) = (
        estimate(batch, estimator=name, gamma=1.0, gae_lambda=1.0)[0]
        for name in ("gae", "turn_gae")
    )
    np.testing.assert_allclose(turns[starts], tokens[starts], atol=1e-4)
    single = batch | dict(action_mask=starts)
    for a, b in zip(*(estimate(single, estimator=name)[0] for name in ("gae", "turn_gae"))):
        np.testing.assert_allclose(a, b, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(drawn)
def test_groups_are_compared_with_themselves(batch):
    """grpo and rloo differ by one factor per group; with one turn, turn_return is grpo."""
    mask, ids = batch["action_mask"], batch["group_ids"]
    first = mask & (np.cumsum(mask, 1) == 1)  # one token an episode is enough to see its advantage
    of_grpo, of_rloo = (estimate(batch, estimator=name)[0][0][first] for name in ("grpo", "rloo"))
    returns = np.where(mask, batch["logprobs"], 0).sum(1)[mask.any(1)]
    for group in set(ids[mask.any(1)]):
        rows = ids[mask.any(1)] == group
        n = rows.sum()
        assert abs(of_grpo[rows].sum()) < 1e-2 and abs(of_rloo[rows].sum()) < 1e-3
        np.testing.assert_allclose(
            of_rloo[rows], n / max(n - 1, 1) * (returns[rows] - returns[rows].mean()), atol=1e-4
        )
        if n > 1:
            np.testing.assert_allclose(of_grpo[rows].std(), 1, atol=1e-3)
    one_turn = batch | dict(turn_ids=np.minimum(batch["turn_ids"], 0))
    np.testing.assert_allclose(
        estimate(one_turn, estimator="turn_return")[0][0],
        estimate(batch, estimator="grpo")[0][0],
        atol=1e-3,
    )


def test_equal_episodes_of_a_group_teach_exactly_nothing():
    """0.1 + 0.2 three times: the small epsilon must not magnify the rounding of the mean."""
    mask, turns = np.ones((3, 2), bool), np.array([[0, 1]] * 3, np.int32)
    rewards, ids = np.array([[0.1, 0.2]] * 3, np.float32), np.zeros(3, np.int32)
    for got in (
        grpo(rewards, mask, ids),
        rloo(rewards, mask, ids),
        turn_return(rewards, mask, turns, ids, gamma=0.9),
    ):
        np.testing.assert_array_equal(got, 0)


@estimators
@settings(max_examples=15, deadline=None)
@given(drawn, st.permutations(range(B)))
def test_order_padding_and_other_groups_change_nothing(estimator, batch, order):
    """Without whitening, also with the episodes of other questions in the same batch."""
    run, order = lambda batch: estimate(batch, estimator=estimator)[0], np.array(order)
    whole = run(batch)
    permuted = run({name: array[order] for name, array in batch.items()})
    padded = run(pad_rows_and_tokens(batch, 1, 5))
    other = draw_episodes(3) | dict(group_ids=np.full(B, 1000, np.int32))
    joined = run({name: np.concatenate([other[name], array]) for name, array in batch.items()})
    for a, one, two, three in zip(whole, permuted, padded, joined):
        np.testing.assert_allclose(one, a[order], atol=1e-3)
        np.testing.assert_allclose(two[:B, :T], a, atol=1e-3)
        np.testing.assert_allclose(three[B:], a, atol=1e-3)
        assert (two[B:] == 0).all() and (two[:, T:] == 0).all()


@estimators
@settings(max_examples=15, deadline=None)
@given(drawn)
def test_what_lies_outside_the_actions_is_never_read(estimator, batch):
    run = lambda batch: estimate(batch, estimator=estimator, whiten_advantages=True)[0]
    whole = run(batch)
    for rubbish in (np.nan, np.inf):
        outside = {
            name: np.where(batch["action_mask"], batch[name], np.float32(rubbish))
            for name in ("logprobs", "values")
        }
        for a, b in zip(run(batch | outside), whole):
            np.testing.assert_array_equal(a, b)


@estimators
@settings(max_examples=15, deadline=None)
@given(drawn)
def test_a_long_observation_changes_no_advantage(estimator, batch):
    """400 observation tokens in every episode, at gamma and lambda below 1: as without them."""
    for a, b in zip(
        estimate(batch, estimator=estimator)[0],
        estimate(insert_observation(batch, 6, 400), estimator=estimator)[0],
    ):
        np.testing.assert_allclose(np.delete(b, np.s_[6:406], axis=1), a, atol=1e-5)


def test_unknown_estimator():
    with pytest.raises(ValueError, match="rl.advantage is 'ppo'"):
        estimate(draw_episodes(0), estimator="ppo")


# All of it together

KEYWORDS = dict(
    advantage="gae",
    gamma=1.0,
    gae_lambda=1.0,
    kl_coef=0.5,
    kl_placement="reward",
    kl_estimator="k1",
    placement="step",
    outcome_overwrites=False,
    over_observations=False,
    whiten_advantages=False,
)


def by_hand_case():
    """One episode: prompt, two actions (the second ends the search), observation, one action."""
    return dict(
        old_logprobs=np.array([[9.0, -1, -2, 9, -3]], np.float32),
        ref_logprobs=np.array([[5.0, -1.2, -1.6, -7, -3]], np.float32),
        old_values=np.array([[7.0, 0.5, 1.0, 7, 2.0]], np.float32),
        token_mask=np.ones((1, 5), bool),
        action_mask=np.array([[False, True, True, False, True]]),
        turn_ids=np.array([[-1, 0, 0, 0, 1]], np.int32),
        group_ids=np.zeros(1, np.int32),
        search_end=np.array([[2, -1]], np.int32),
        step_rewards=np.array([[0.25, 0.0]], np.float32),
        outcome_rewards=np.array([1.0], np.float32),
    )


def advantages_by_hand(arrays=None, **keywords):
    return stepwise_advantages(**by_hand_case() | (arrays or {}), **KEYWORDS | keywords)


def test_stepwise_advantages_by_hand():
    """KL k1 on actions: .2, -.4, 0; times .5: r = -.1, .25 + .2, 1.

    Undiscounted returns: 1.35, 1.45, 1. Minus values: A = .85, .45, -1.
    """
    advantages, returns, value_mask, metrics = advantages_by_hand()
    np.testing.assert_allclose(returns, [[0, 1.35, 1.45, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(advantages, [[0, 0.85, 0.45, 0, -1]], atol=1e-6)
    np.testing.assert_array_equal(value_mask, by_hand_case()["action_mask"])
    assert metrics["kl"] == pytest.approx(-0.2 / 3, abs=1e-6)
    assert metrics["reward"] == pytest.approx(1.25)


def test_every_keyword_reaches_the_result():
    """Whitened: mean .1, variance (.75^2 + .35^2 + 1.1^2) / 3 = .631667; the returns stay.

    Merged: the .25 moves to the last token, so only the return there rises.
    Overwritten: a .25 on the last token is lost to all.
    KL in the loss: r = 0, .25, 1, and the KL is measured as before.
    Two turns, rewards .35 and 1: V = .5 and 2, so A = .85 and -1.
    Over observations at gamma .5, lambda 0 (r -.1, .45, 0, 1; V .5, 1, 7, 2):
    A = -.1 + .5 - .5, .45 + 3.5 - 1, 1 - 7, 1 - 2; without, .45 + 1 - 1.
    """
    advantages, returns, _, _ = advantages_by_hand(whiten_advantages=True)
    whitened = np.array([[0, 0.75, 0.35, 0, -1.1]]) / 0.631667**0.5
    np.testing.assert_allclose(advantages, whitened, rtol=1e-4)
    np.testing.assert_allclose(returns, [[0, 1.35, 1.45, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(
        advantages_by_hand(placement="merged")[1], [[0, 1.35, 1.45, 0, 1.25]], atol=1e-6
    )
    at_last = dict(search_end=np.array([[4, -1]], np.int32))
    kept, lost = (
        np.asarray(advantages_by_hand(at_last, outcome_overwrites=overwrites)[1])
        for overwrites in (False, True)
    )
    np.testing.assert_allclose(kept - lost, [[0, 0.25, 0.25, 0, 0.25]], atol=1e-6)
    _, returns, _, metrics = advantages_by_hand(kl_placement="loss")
    np.testing.assert_allclose(returns, [[0, 1.25, 1.25, 0, 1]], atol=1e-6)
    assert metrics["kl"] == pytest.approx(-0.2 / 3, abs=1e-6)
    np.testing.assert_allclose(
        advantages_by_hand(advantage="turn_gae")[0], [[0, 0.85, 0.85, 0, -1]], atol=1e-6
    )
    np.testing.assert_allclose(advantages_by_hand(advantage="rloo")[0], np.zeros((1, 5)))
    discounted = dict(gamma=0.5, gae_lambda=0.0)
    for over, expected in ((True, [[0, -0.1, 2.95, -6, -1]]), (False, [[0, -0.1, 0.45, 0, -1]])):
        advantages = advantages_by_hand(over_observations=over, **discounted)[0]
        np.testing.assert_allclose(advantages, expected, atol=1e-6)


def test_unknown_kl_placement():
    with pytest.raises(ValueError, match="rl.kl_placement is 'both'"):
        advantages_by_hand(kl_placement="both")


def test_kl_outside_the_actions_costs_nothing():
    case = by_hand_case()
    wild = dict(ref_logprobs=np.where(case["action_mask"], case["ref_logprobs"], -np.inf))
    for over in (False, True):
        plain = advantages_by_hand(over_observations=over)[:3]
        for a, b in zip(plain, advantages_by_hand(wild, over_observations=over)[:3]):
            np.testing.assert_array_equal(a, b)


def test_values_may_be_missing_where_nobody_reads_them():
    for name in CRITIC_FREE:
        without = dict(old_values=None)
        advantages, returns, value_mask, _ = advantages_by_hand(without, advantage=name)
        assert np.isfinite(advantages).all() and not returns.any() and not value_mask.any()
