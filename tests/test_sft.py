"""Fine-tuning on demonstrations: it learns from action tokens at the rates of its phases."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_learner import CONFIG, ONE, POLICY, make_model_state, sgd

from stepsearch_jax import sharding
from stepsearch_jax.models import scoring
from stepsearch_jax.models.transformer import Policy
from stepsearch_jax.rl.sft import make_sft, make_sft_optimizer


def copy_task(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Four tokens, then, after a separator, the same four, which are the action."""
    first = np.random.default_rng(0).integers(1, 6, (count, 4))
    tokens = np.concatenate([first, np.zeros((count, 1), int), first], axis=1).astype(np.int32)
    return tokens, np.tile(np.arange(9) > 4, (count, 1))


def sft_optimizer(name: str, phases, max_grad_norm=1.0):
    return make_sft_optimizer(
        name,
        phases,
        warmup_steps=5,
        final_fraction=0.1,
        b2=0.98,
        weight_decay=0.01,
        max_grad_norm=max_grad_norm,
    )


@pytest.mark.parametrize(
    "name,rate,shape,steps",
    [
        pytest.param("muon", 0.05, (2, 2, 2), 16, marks=pytest.mark.slow),
        ("adamw", 2e-2, ONE, 40),
        pytest.param("adamw", 2e-2, (2, 2, 2), 40, marks=pytest.mark.slow),
    ],
)
def test_sft_learns(name, rate, shape, steps):
    mesh, optimizer = tiny.mesh_of(shape), sft_optimizer(name, [(steps, rate)])
    fine_tune, _ = make_sft(CONFIG, optimizer)
    state = make_model_state(POLICY, optimizer, shape)
    tokens, action_mask = copy_task(64)
    losses = []
    for step in range(steps):
        rows = np.random.default_rng(step).permutation(64)[:32]
        state, loss = fine_tune(
            state, *sharding.rows_to_mesh(mesh, (tokens[rows], action_mask[rows]))
        )
        losses.append(float(loss))
    assert losses[0] > 1.5 and np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.parametrize(
    "rows,chunk,shape", [(6, 3 * CONFIG.vocab_size, ONE), (4, 1 << 20, (2, 2, 2))]
)
def test_sft_counts_action_tokens_alone(rows, chunk, shape, monkeypatch):
    """Against all logits at once, in NumPy: 2 rows and one position, or 4 whole rows, at a time."""
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", chunk)
    tokens, action_mask = copy_task(8)
    action_mask[2] = False
    action_mask[0, 6] = False
    _, held_out_loss = make_sft(CONFIG, sgd())
    params = tiny.draw_params(POLICY, 1)
    all_logits = jax.jit(functools.partial(POLICY.apply, method=Policy.init_all))
    logits = np.asarray(all_logits(params, tokens), np.float64)
    best = logits.argmax(-1)
    tokens[1, 5] = best[1, 4]  # given the five before it
    action_mask[1, 6:] = False
    logits = np.asarray(all_logits(params, tokens), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    terms = [logprobs[b, t - 1, tokens[b, t]] for b, t in np.argwhere(action_mask)]
    placed = make_model_state(POLICY, sgd(), shape).params
    loss, exact = held_out_loss(
        placed, *sharding.rows_to_mesh(tiny.mesh_of(shape), (tokens, action_mask)), rows=rows
    )
    np.testing.assert_allclose(loss, -np.mean(terms), rtol=1e-5)
    expected = [
        all(logits[b, t - 1].argmax() == tokens[b, t] for t in np.flatnonzero(action_mask[b]))
        for b in range(8)
    ]
    assert exact.tolist() == expected and expected[1] and expected[2] and not all(expected)


def test_held_out_logits_are_never_all_there(monkeypatch):
    """8 rows of 40 tokens in parts of 4 rows, 5 positions at a time.

    No array over the vocabulary is larger than the logits of these.
    """
    config = dataclasses.replace(CONFIG, vocab_size=211)  # like no other size of the program
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 5 * 4 * 211)
    _, held_out_loss = make_sft(config, sgd())
    params = tiny.draw_params(Policy(config), 1)
    arrays = np.zeros((8, 40), np.int32), np.ones((8, 40), bool)
    text = held_out_loss.lower(params, *arrays, rows=4).compile().as_text()
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"\w\[([\d,]+)\]", text)]
    assert max(math.prod(shape) for shape in shapes if 211 in shape) == 5 * 4 * 211


def test_sft_rates_by_phase():
    """Two phases of 10 and 8 steps at rates 1 and 0.5.

    Each warms up over 5 steps and falls linearly to a tenth. Adam's first steps are the rate.
    """
    params = {"x": jnp.ones(2)}
    optimizer = make_sft_optimizer(
        "adamw",
        [(10, 1.0), (8, 0.5)],
        warmup_steps=5,
        final_fraction=0.1,
        b2=0.999,
        weight_decay=0.0,
        max_grad_norm=9.0,
    )
    state, rates = optimizer.init(params), []
    for _ in range(18):
        update, state = optimizer.update({"x": jnp.ones(2)}, state, params)
        rates.append(-float(update["x"][0]))
    one = [0, 0.2, 0.4, 0.6, 0.8, 1, 0.82, 0.64, 0.46, 0.28]
    two = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.35, 0.2]
    np.testing.assert_allclose(rates, one + two, atol=1e-3)


def test_muon_orthogonalises_matrices_alone():
    """Updates of a layer's matrix, inputs by outputs, have nearly equal singular values.

    Adam moves the rest; its first step is a sign times 0.3 of the rate (times 1.47, by Nesterov's
    look-ahead).
    """
    optimizer = make_sft_optimizer(
        "muon",
        [(10, 1.0)],
        warmup_steps=0,
        final_fraction=1.0,
        b2=0.98,
        weight_decay=0.0,
        max_grad_norm=1e9,
    )
    params = tiny.draw_params(POLICY, 1)
    gradient = tiny.draw_params(POLICY, 2)
    update = jax.jit(lambda: optimizer.update(gradient, optimizer.init(params), params)[0])()[
        "params"
    ]
    layers, inputs = update["trunk"]["layers"], dict(q=1, k=1, v=1, o=2, gate=1, up=1, down=1)
    for name, count in inputs.items():
        for matrix in np.asarray(layers[name]["kernel"]):
            values = np.linalg.svd(
                matrix.reshape(np.prod(matrix.shape[:count]), -1), compute_uv=False
            )
            assert values.max() < 2 * values.min(), name
    others = update["lm_head"], update["trunk"]["embedding"]
    for array in (*others, layers["q"]["bias"], layers["ffn_norm"]["scale"]):
        size = np.abs(array)
        assert 0.3 < size.mean() < 0.6 and size.std() < 1e-3


def test_unknown_sft_optimizer():
    with pytest.raises(ValueError, match="sft.optimizer"):
        sft_optimizer("sgd", [(1, 1.0)])
