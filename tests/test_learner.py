"""The learner's update: equal on all meshes and micro-batches, and the gradient of the loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from stepsearch_jax import checkpoint, sharding
from stepsearch_jax.models.scoring import score_tokens, score_values
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl import learner, stepwise_advantages, stepwise_ppo_loss, uses_critic
from stepsearch_jax.rl.model_state import init_model_state, init_params, init_value_params
from stepsearch_jax.types import Batch, ModelState, TrainState

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=24, embed_dim=16, head_dim=4, ffn_dim=24)
POLICY, VALUE = Policy(CONFIG), Value(CONFIG)
RULES = tiny.ROLLOUT_RULES | {"embed": "fsdp"}
SETTINGS = learner.LearnerSettings(
    advantage="gae",
    gamma=1.0,
    gae_lambda=1.0,
    over_observations=False,
    whiten_advantages=True,
    clip_low=0.2,
    clip_high=0.3,
    old_logprobs="learner",
    max_ratio=1.35,
    aggregation="token_mean",
    value_clip=0.5,
    entropy_coef=0.01,
    kl_placement="reward",
    kl_estimator="k1",
    kl_target=0.0,
    kl_horizon=1000.0,
    minibatches=1,
    ppo_epochs=1,
    microbatch_size=0,
    width_buckets=1,
    placement="step",
    outcome_overwrites=False,
)
ROWS, LENGTH = 16, 12
ONE = (1, 1, 1)


def sgd(learning_rate=0.1, max_grad_norm=1.0):
    return learner.make_optimizer(
        "sgd",
        learning_rate,
        warmup=0.0,
        iterations=1,
        steps_per_iteration=1,
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
        max_grad_norm=max_grad_norm,
    )


def recording_sgd():
    """SGD whose state holds the gradient of its first step, beside the parameters after all steps.

    Later gradients depend on earlier steps: rounding that differs by 1e-7 there becomes 1e-5 of a
    gradient, on some CPUs more.
    """

    def keep(gradient, state, params=None):
        count, first = state
        first = jax.tree.map(functools.partial(jnp.where, count == 0), gradient, first)
        return gradient, (count + 1, first)

    return optax.chain(
        optax.GradientTransformation(
            lambda params: (jnp.int32(0), jax.tree.map(jnp.zeros_like, params)), keep
        ),
        sgd(),
    )


def models_of(state: TrainState) -> list[ModelState]:
    return [state.policy] if state.value is None else [state.policy, state.value]


def first_gradients(state: TrainState):
    return tuple(model.opt_state[0][1] for model in models_of(state))


def latest_params(state: TrainState):
    return tuple(model.params for model in models_of(state))


def make_model_state(model, optimizer, shape):
    specs, mesh = sharding.partition_specs(tiny.make_boxes(model), RULES), tiny.mesh_of(shape)
    params = jax.device_put(tiny.draw_params(model, 1), sharding.shardings(mesh, specs))
    return init_model_state(optimizer, mesh, params, specs)


def make_state(shape=ONE, critic=True) -> TrainState:
    numbers = dict(
        iteration=jnp.int32(0),
        position=jnp.int32(0),
        kl_coef=jnp.float32(0.1),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )
    policy, value = (
        make_model_state(model, recording_sgd(), shape) if model is POLICY or critic else None
        for model in (POLICY, VALUE)
    )
    return TrainState(
        policy, value, **jax.device_put(numbers, sharding.replicated(tiny.mesh_of(shape)))
    )


def make_batch() -> Batch:
    return tiny.make_batch(CONFIG, ROWS, LENGTH)


def split(batch: Batch, part: int) -> Batch:
    """Every second row."""
    return jax.tree.map(lambda x: x[part::2], batch)


def close_to_leaf_maximum(got, expected, share: float) -> None:
    def check(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=share * np.abs(b).max())

    jax.tree.map(check, got, expected)


def to_host(tree):
    return jax.tree.map(np.array, tree)


# make_update: on meshes, by micro-batches, against the loss function


LOSS_ONLY = ("aggregation", "old_logprobs", "max_ratio")  # keys that no advantage depends on
# An update without a value model, with all else that is not default.
CRITIC_FREE = dict(
    advantage="grpo", aggregation="sequence_mean", kl_placement="loss", kl_estimator="k3"
)


@functools.cache
def one_step(**change):
    """One optimiser step on all rows of a batch of 8."""
    critic = uses_critic(change.get("advantage", "gae"))
    return learner.make_update(
        CONFIG,
        dataclasses.replace(SETTINGS, **change),
        recording_sgd(),
        recording_sgd() if critic else None,
    )


@functools.cache
def four_steps(microbatch_size=0, critic=True):
    """Two epochs of two minibatches on a batch of 16, with the adaptive KL coefficient."""
    change = dict(
        minibatches=2,
        ppo_epochs=2,
        kl_target=0.02,
        kl_horizon=1000.0,
        microbatch_size=microbatch_size,
    ) | ({} if critic else CRITIC_FREE)
    return one_step(**change)


@functools.cache
def run_four_steps(shape, microbatch_size=0, critic=True):
    """-> (state, metrics) as NumPy."""
    batch = sharding.rows_to_mesh(tiny.mesh_of(shape), make_batch())
    update = four_steps(microbatch_size, critic)
    return to_host(update(make_state(shape, critic), batch, jnp.float32(0.02)))


@pytest.mark.parametrize(
    "shape,microbatch_size,critic",
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ((1, 4, 2), 0, True),
                ((2, 2, 2), 4, True),
                ((2, 2, 2), 4, False),
                (ONE, 2, True),
            ]
        ),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in [
                ((8, 1, 1), 0, True),
                ((2, 2, 2), 0, True),
                ((4, 1, 2), 0, True),
                ((8, 1, 1), 8, True),
                (ONE, 2, False),
            ]
        ),
    ],
    ids=str,
)
def test_every_mesh_and_micro_batch_makes_the_same_update(shape, microbatch_size, critic):
    """The gradients of the first of four steps, and the parameters after the last."""
    expected, expected_metrics = run_four_steps(ONE, critic=critic)
    got, metrics = run_four_steps(shape, microbatch_size, critic)
    close_to_leaf_maximum(first_gradients(got), first_gradients(expected), 1e-5)
    close_to_leaf_maximum(latest_params(got), latest_params(expected), 1e-5)
    close_to_leaf_maximum(metrics, expected_metrics, 1e-4)
    assert (got.iteration, got.skipped) == (1, 0)
    before = tuple(tiny.draw_params(model, 1) for model in (POLICY, VALUE))[: len(models_of(got))]
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max() > 1e-3 * np.abs(b).max(), latest_params(expected), before
    )
    assert all(jax.tree.leaves(moved))


# Micro-batches of rows of similar length, each as wide as its longest row needs


def ragged_batch() -> Batch:
    """Rows of 3 to 12 tokens in no order; what lies behind them must not matter."""
    batch = make_batch()
    lengths = np.random.default_rng(3).permutation(np.arange(ROWS) * 10 // (ROWS - 1) + 3)
    lengths = np.minimum(lengths, LENGTH)
    inside = np.arange(LENGTH) < lengths[:, None]
    return batch.replace(
        token_mask=inside,
        action_mask=batch.action_mask & inside,
        value_mask=batch.value_mask & inside,
    )


@pytest.mark.parametrize(
    "shape,microbatch_size,critic",
    [
        (ONE, 4, True),
        pytest.param(ONE, 0, True, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 4, True, marks=pytest.mark.slow),
        pytest.param(ONE, 2, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_widths_change_no_update(shape, microbatch_size, critic):
    """Gradients are those of whole rows, and less of what is computed is padding."""
    change = dict(minibatches=2) | ({} if critic else CRITIC_FREE)

    def run(shape, **widths):
        batch = sharding.rows_to_mesh(tiny.mesh_of(shape), ragged_batch())
        update = one_step(**change, **widths)
        return to_host(update(make_state(shape, critic), batch, jnp.float32(0.02)))

    expected, plain = run(ONE)
    got, metrics = run(shape, microbatch_size=microbatch_size, width_buckets=2)
    close_to_leaf_maximum(first_gradients(got), first_gradients(expected), 1e-5)
    close_to_leaf_maximum(latest_params(got), latest_params(expected), 1e-5)
    # The widths are 8 and 12.
    whole, cut = [], []
    for lengths in (ragged_batch().token_mask[part::2].sum(1) for part in range(2)):
        parts = np.sort(lengths).reshape(-1, microbatch_size or ROWS // 2)
        computed = sum((8 if part.max() <= 8 else 12) * len(part) for part in parts)
        whole.append(1 - lengths.sum() / (12 * len(lengths)))
        cut.append(1 - lengths.sum() / computed)
    np.testing.assert_allclose(plain["padding_fraction"], np.mean(whole), rtol=1e-5)
    np.testing.assert_allclose(metrics["padding_fraction"], np.mean(cut), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_every_mesh_starts_alike(shape):
    params, _ = init_params(POLICY, tiny.mesh_of(ONE), RULES, jax.random.key(5))
    placed, specs = init_params(POLICY, tiny.mesh_of(shape), RULES, jax.random.key(5))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), placed, params
    )
    jax.tree.map(
        lambda x, place: x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail(str(x.sharding)),
        placed,
        sharding.shardings(tiny.mesh_of(shape), specs),
    )
    assert np.std(np.asarray(params["params"]["trunk"]["layers"]["gate"]["kernel"])) > 0.1


def test_value_model_starts_from_the_policy():
    """With a head of zeros and a copy of the policy's trunk, because updates donate it."""
    policy_params = jax.tree.map(jnp.asarray, tiny.draw_params(POLICY, 1))
    mesh, key = tiny.mesh_of(ONE), jax.random.key(2)
    got, _ = init_value_params(VALUE, mesh, RULES, key, policy_params)
    assert jax.tree.structure(got) == jax.tree.structure(tiny.draw_params(VALUE, 2))
    np.testing.assert_array_equal(got["params"]["head"], np.zeros(CONFIG.embed_dim))
    jax.tree.map(
        np.testing.assert_array_equal, got["params"]["trunk"], policy_params["params"]["trunk"]
    )
    jax.tree.map(lambda x: x.delete(), got)
    assert np.isfinite(policy_params["params"]["trunk"]["embedding"]).all()


@pytest.mark.parametrize(
    "change,critic",
    [
        (dict(advantage="gae"), True),
        pytest.param(CRITIC_FREE, False, marks=pytest.mark.slow),
        pytest.param(
            dict(
                advantage="gae", over_observations=True, outcome_overwrites=True, placement="merged"
            ),
            True,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(advantage="gae", old_logprobs="sampler"), True, marks=pytest.mark.nightly
        ),
        pytest.param(
            dict(
                advantage="turn_gae",
                aggregation="sequence_mean",
                kl_placement="loss",
                kl_estimator="k3",
            ),
            True,
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(advantage="rloo", kl_placement="loss"), False, marks=pytest.mark.slow),
        pytest.param(
            dict(advantage="turn_return", aggregation="sequence_mean"),
            False,
            marks=pytest.mark.nightly,
        ),
    ],
    ids=lambda x: (
        x["advantage"]
        + "_observations" * ("over_observations" in x)
        + "_sampler" * ("old_logprobs" in x)
        if isinstance(x, dict)
        else ""
    ),
)
def test_gradient_is_that_of_the_loss_function(change, critic):
    """An update's gradients against `stepwise_ppo_loss` differentiated through both models."""
    # Rewards, turns and groups on the tokens of a random batch.
    rng, batch = np.random.default_rng(4), split(make_batch(), 0)
    rows = len(batch.tokens)
    turn_ids = np.where(
        batch.token_mask & (np.arange(LENGTH) > 1), (np.arange(LENGTH) - 2) // 4, -1
    ).astype(np.int32)
    search_end = np.where(rng.random((rows, 2)) < 0.7, [[4, 7]], -1).astype(np.int32)
    rewards = [rng.normal(size=shape).astype(np.float32) for shape in ((rows, 2), rows)]
    group_ids = np.array([3, 1, 3, 3, 1, 1, 0, 3], np.int32)
    arrays = batch.token_mask, batch.action_mask, turn_ids, group_ids, search_end, *rewards
    fixed = dict(
        gamma=0.9,
        gae_lambda=0.8,
        over_observations=False,
        kl_coef=0.1,
        kl_placement="reward",
        kl_estimator="k2",
        placement="step",
        outcome_overwrites=False,
        whiten_advantages=True,
    ) | {key: x for key, x in change.items() if key not in LOSS_ONLY}
    loss_keys = {key: change.get(key, getattr(SETTINGS, key)) for key in LOSS_ONLY}

    # The loss function's gradients.
    @jax.jit
    def differentiate(*params):
        def loss(policy_params, value_params):
            logprobs, entropy = score_tokens(POLICY, policy_params, batch.tokens)
            values = score_values(VALUE, value_params, batch.tokens)
            return stepwise_ppo_loss(
                logprobs,
                batch.old_logprobs,
                batch.ref_logprobs,
                values,
                batch.old_values,
                entropy,
                *arrays,
                clip_low=0.2,
                clip_high=0.3,
                value_clip=0.5,
                value_coef=1.0,
                entropy_coef=0.01,
                **{key: x for key, x in loss_keys.items() if key != "old_logprobs"},
                **fixed,
            )

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(*params)

    expected, expected_metrics = differentiate(
        tiny.draw_params(POLICY, 1), tiny.draw_params(VALUE, 1)
    )
    advantages, returns, value_mask, _ = stepwise_advantages(
        batch.old_logprobs, batch.ref_logprobs, batch.old_values, *arrays, **fixed
    )
    # The update's gradients and metrics, against these.
    batch = batch.replace(advantages=advantages, returns=returns, value_mask=value_mask)
    step = one_step(
        **{key: fixed[key] for key in ("advantage", "kl_placement", "kl_estimator")}, **loss_keys
    )
    state, metrics = step(make_state(critic=critic), batch, jnp.float32(0))
    assert len(models_of(state)) == 1 + critic
    for found, wanted in zip(first_gradients(state), expected):
        close_to_leaf_maximum(found, wanted, 1e-5)
    reported_before = {"kl", "reward"}  # by make_build_batch
    if loss_keys["old_logprobs"] == "learner":
        reported_before |= {"entropy"}
    of_update = metrics.keys() - {"policy_grad_norm", "value_grad_norm", "padding_fraction"}
    assert of_update == expected_metrics.keys() - reported_before
    for name in metrics.keys() & expected_metrics.keys():
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, err_msg=name)
    for name in {"clip_fraction", "truncated_fraction", "value_clip_fraction"} & metrics.keys():
        assert 0.02 < metrics[name] < 0.98  # both sides of every bound are in it


# make_update: steps, skips and the KL coefficient


def step_counts(state: TrainState) -> set[int]:
    return {
        int(x)
        for x in jax.tree.leaves((state.policy.opt_state, state.value.opt_state))
        if x.ndim == 0
    }


@pytest.mark.parametrize("field", ["advantages", "returns"])
def test_nothing_changes_when_a_gradient_is_not_finite(field):
    """NaN in the loss of one model: neither moves, and the next good batch trains as usual."""
    batch = split(make_batch(), 0)
    poisoned = getattr(batch, field).copy()
    poisoned[0, np.flatnonzero(batch.action_mask[0])[0]] = np.nan
    before = to_host(make_state())
    state, metrics = one_step()(make_state(), batch.replace(**{field: poisoned}), jnp.float32(0))
    after = to_host(state)
    jax.tree.map(
        np.testing.assert_array_equal, (after.policy, after.value), (before.policy, before.value)
    )
    assert (after.skipped, after.skipped_in_a_row, after.iteration) == (1, 1, 1)
    assert not np.isfinite(metrics["policy_grad_norm"] + metrics["value_grad_norm"])
    later, direct = (
        to_host(one_step()(start, batch, jnp.float32(0))[0]) for start in (state, make_state())
    )
    jax.tree.map(
        np.testing.assert_array_equal, (later.policy, later.value), (direct.policy, direct.value)
    )
    assert (later.skipped, direct.skipped) == (1, 0)
    assert (later.skipped_in_a_row, direct.skipped_in_a_row) == (0, 0)
    assert (step_counts(after), step_counts(direct)) == ({0}, {1})
    leaves = [jax.tree.leaves(latest_params(state)) for state in (direct, before)]
    assert all((a != b).any() for a, b in zip(*leaves))


@pytest.mark.parametrize("critic", [True, False])
def test_nan_outside_the_actions_changes_nothing(critic):
    batch = split(make_batch(), 0)
    poison = lambda x: np.where(batch.action_mask, x, np.nan)
    dirty = batch.replace(
        **{
            name: poison(getattr(batch, name))
            for name in ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
        }
    )
    step = one_step() if critic else one_step(**CRITIC_FREE)
    clean, got = (
        to_host(step(make_state(critic=critic), x, jnp.float32(0))[0]) for x in (batch, dirty)
    )
    jax.tree.map(np.testing.assert_array_equal, got, clean)


def test_without_a_value_model_a_bad_step_is_skipped_all_the_same():
    batch = split(make_batch(), 0)
    before = to_host(make_state(critic=False))
    bad = batch.replace(advantages=np.where(batch.action_mask, np.inf, 0).astype(np.float32))
    state, metrics = one_step(**CRITIC_FREE)(make_state(critic=False), bad, jnp.float32(0))
    jax.tree.map(np.testing.assert_array_equal, to_host(state.policy), before.policy)
    assert (int(state.skipped), state.value) == (1, None)
    assert not any("value" in name for name in metrics)


@pytest.mark.slow
def test_a_state_without_a_value_model_is_saved_and_restored(tmp_path):
    state = make_state((2, 2, 2), critic=False)
    saved, checkpoints = to_host(state), checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, state)
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    restored = checkpoints.restore(3, jax.tree.map(jnp.zeros_like, state))
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state) and restored.value is None
    jax.tree.map(np.testing.assert_array_equal, to_host(restored), saved)


@pytest.mark.slow
def test_minibatches_and_epochs_are_steps_one_after_the_other():
    state, norms = make_state(), []
    for part in (0, 1, 0, 1):
        state, metrics = one_step()(state, split(make_batch(), part), jnp.float32(0))
        norms.append(float(metrics["policy_grad_norm"]))
    got, metrics = run_four_steps(ONE)
    close_to_leaf_maximum(latest_params(got), latest_params(state), 1e-5)
    assert step_counts(got) == {4}
    assert (got.iteration, state.iteration) == (1, 4)
    np.testing.assert_allclose(metrics["policy_grad_norm"], np.mean(norms), rtol=1e-4)


@pytest.mark.slow
def test_only_the_poisoned_minibatch_is_skipped():
    batch = make_batch()
    advantages = batch.advantages.copy()
    advantages[1, np.flatnonzero(batch.action_mask[1])[0]] = np.inf  # row 1 is in part 1
    state = make_state()
    for _ in range(2):
        state, _ = one_step()(state, split(batch, 0), jnp.float32(0))
    poisoned = sharding.rows_to_mesh(tiny.mesh_of(ONE), batch.replace(advantages=advantages))
    got, _ = four_steps()(make_state(), poisoned, jnp.float32(0.02))
    assert int(got.skipped) == 2 and step_counts(got) == {2}
    assert int(got.skipped_in_a_row) == 1  # the two are apart
    close_to_leaf_maximum(latest_params(got), latest_params(state), 1e-5)


@pytest.mark.parametrize(
    "mean_kl,error",
    [(0.02, 0.0), (0.022, 0.1), (0.2, 0.2), (0.0, -0.2), (-1.0, -0.2), (np.nan, 0.0)],
)
def test_adaptive_kl(mean_kl, error):
    """The error, at most 0.2 either way, times 16 episodes over a horizon of 1,000."""
    batch = sharding.rows_to_mesh(tiny.mesh_of(ONE), make_batch())
    got, _ = four_steps()(make_state(), batch, jnp.float32(mean_kl))
    np.testing.assert_allclose(got.kl_coef, 0.1 * (1 + error * 16 / 1000), rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "warmup,rates",
    [
        (0.5, [1 / 2, 1, 1, 1]),
        (1.0, [1 / 4, 2 / 4, 3 / 4, 1]),
        (0.0, [1, 1, 1, 1]),
        (0.1, [1, 1, 1, 1]),
    ],
)
def test_schedule_counts_iterations(name, warmup, rates):
    """4 iterations of 3 steps each; the steps of one iteration have one rate.

    A constant gradient makes Adam's step the rate itself.
    """
    optimizer = learner.make_optimizer(
        name,
        0.1,
        warmup=warmup,
        iterations=4,
        steps_per_iteration=3,
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
        max_grad_norm=9.0,
    )
    params = {"x": jnp.ones(2)}
    state, steps = optimizer.init(params), []
    for _ in range(12):
        update, state = optimizer.update({"x": jnp.array([1.0, 1.0])}, state, params)
        steps.append(-float(update["x"][0]))
    np.testing.assert_allclose(steps, np.repeat(rates, 3) * 0.1, rtol=1e-3)


def test_gradients_are_clipped_by_their_global_norm():
    update, _ = sgd(1.0, max_grad_norm=1.0).update(
        {"x": jnp.array([3.0]), "y": jnp.array([4.0])},
        sgd().init({"x": jnp.ones(1), "y": jnp.ones(1)}),
    )
    np.testing.assert_allclose([update["x"][0], update["y"][0]], [-0.6, -0.8], rtol=1e-5)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="policy.optimizer"):
        learner.make_optimizer(
            "adam",
            0.1,
            warmup=0,
            iterations=1,
            steps_per_iteration=1,
            b1=0.9,
            b2=0.999,
            weight_decay=0.0,
            max_grad_norm=1.0,
        )
