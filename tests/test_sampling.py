"""Choosing tokens: the restriction to likely ones, the frequencies, noise that depends on nothing
but key, episode and index, and slices of a vocabulary.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from stepsearch_jax.rollout.sampling import as_float, as_ordered, count_blocks, restrict, sample

SAMPLE = jax.jit(sample, static_argnames=("top_k", "top_p"))


def keep(row: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens stay, one at a time from the likeliest: those among the k best, until they hold
    top_p of the mass of the k best; then all their ties.
    """
    order = np.argsort(-row, kind="stable")[: top_k or None]
    mass = np.exp(row[order] - row.max()) / np.exp(row[order] - row.max()).sum()
    kept, total = [], 0.0
    for token, share in zip(order, mass):
        if top_p < 1 and total >= top_p:
            break
        kept.append(token)
        total += share
    return row >= row[kept].min()


@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 12, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_restrict_against_oracle(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (40, 12)).astype(np.float32)
    got = np.asarray(restrict(jnp.asarray(logits), top_k=top_k, top_p=top_p))
    expected = np.stack([keep(row, top_k, top_p) for row in logits])
    np.testing.assert_array_equal(got > -np.inf, expected)
    np.testing.assert_array_equal(got[expected], logits[expected])
    assert expected[np.arange(40), logits.argmax(1)].all()


@pytest.mark.parametrize(
    "top_k,top_p,kept",
    [
        # probabilities 0.4, 0.2, 0.2, 0.1, 0.1 (in the order 2 3 0 1 4)
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [2]),
        (2, 1.0, [0, 2, 3]),  # 0 is tied with 3: both stay
        (4, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.39, [2]),
        (0, 0.5, [0, 2, 3]),  # 0.4 is not enough, 0.6 is; the tie stays
        (0, 0.85, [0, 1, 2, 3, 4]),
        (3, 0.45, [2]),  # among the best three the likeliest holds 0.5
        (3, 0.55, [0, 2, 3]),
    ],
)
def test_restrict_by_hand(top_k, top_p, kept):
    logits = jnp.log(jnp.array([[0.2, 0.1, 0.4, 0.2, 0.1]]))
    assert np.flatnonzero(restrict(logits, top_k=top_k, top_p=top_p)[0] > -jnp.inf).tolist() == kept


def test_order_of_floats_as_integers():
    numbers = np.array(
        [-np.inf, -3e38, -1.5, -1e-30, 0.0, 1e-30, 1e-3, 1.0, 3e38, np.inf], np.float32
    )
    order = np.asarray(as_ordered(jnp.asarray(numbers)))
    assert (np.diff(order.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(as_float(jnp.asarray(order)), numbers)
    assert as_ordered(jnp.float32(-0.0)) == as_ordered(jnp.float32(0.0))


def draw(logits, key, temperature, *, episodes=None, index=None, top_k=0, top_p=1.0):
    rows = len(logits)
    episodes = jnp.arange(rows) if episodes is None else episodes
    index = jnp.zeros(rows, jnp.int32) if index is None else index
    return SAMPLE(logits, key, episodes, index, jnp.float32(temperature), top_k=top_k, top_p=top_p)


def test_greedy_at_temperature_0():
    logits = jax.random.normal(jax.random.key(0), (200, 20))
    for settings in (dict(), dict(top_k=4, top_p=0.8)):
        first, logprobs = draw(logits, jax.random.key(1), 0.0, **settings)
        again, _ = draw(logits, jax.random.key(2), 0.0, **settings)
        np.testing.assert_array_equal(first, logits.argmax(1))
        np.testing.assert_array_equal(again, first)
        np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits).max(1), rtol=1e-5)
        assert first.dtype == jnp.int32


# 6 blocks of one token, 2 blocks of five, one block
@pytest.mark.parametrize("vary", ["episode", "index"])
@pytest.mark.parametrize("temperature,top_k", [(1.0, 0), (0.7, 0), (1.0, 3)])
@pytest.mark.parametrize("vocabulary", [6, 10, pytest.param(7, marks=pytest.mark.slow)])
def test_frequencies(temperature, top_k, vary, vocabulary):
    """Over 20,000 episodes, or 20,000 tokens of one episode: Pearson's statistic with 9 degrees of
    freedom exceeds 38 once in 50,000 seeds.
    """
    count = 20_000
    logits = jnp.array([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 0.2, 1.5, -0.3, 0.1])[:vocabulary]
    varied = jnp.arange(count)
    episodes, index = (
        (varied, jnp.full(count, 3)) if vary == "episode" else (jnp.full(count, 3), varied)
    )
    tokens, _ = draw(
        jnp.tile(logits, (count, 1)),
        jax.random.key(11),
        temperature,
        episodes=episodes,
        index=index,
        top_k=top_k,
    )
    scores = np.exp(np.asarray(logits, np.float64) / temperature)
    if top_k:
        scores[np.argsort(-scores)[top_k:]] = 0
    expected = count * scores / scores.sum()
    observed = np.bincount(tokens, minlength=vocabulary)
    assert not observed[expected == 0].any()
    assert ((observed - expected)[expected > 0] ** 2 / expected[expected > 0]).sum() < 38


def test_neighbours_do_not_matter():
    """A row draws the same token alone, in another batch, in another place; and other tokens with
    another key, episode or index.
    """
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(200, 20)), jnp.float32)
    episodes, index = jnp.arange(200) + 7, jnp.asarray(rng.integers(0, 900, 200), jnp.int32)
    key = jax.random.key(3)
    tokens, logprobs = draw(logits, key, 1.0, episodes=episodes, index=index)
    order = rng.permutation(200)[:50]
    moved, moved_logprobs = draw(
        logits[order], key, 1.0, episodes=episodes[order], index=index[order]
    )
    np.testing.assert_array_equal(moved, tokens[order])
    np.testing.assert_allclose(moved_logprobs, logprobs[order], rtol=1e-6)
    alone, _ = draw(logits[:1], key, 1.0, episodes=episodes[:1], index=index[:1])
    assert alone[0] == tokens[0]
    for other in (
        draw(logits, jax.random.key(4), 1.0, episodes=episodes, index=index),
        draw(logits, key, 1.0, episodes=episodes + 1, index=index),
        draw(logits, key, 1.0, episodes=episodes, index=index + 1),
    ):
        assert (other[0] != tokens).mean() > 0.5


def test_logprobs_are_of_the_unrestricted_distribution():
    """At any temperature and restriction: what the learner will compute."""
    logits = jax.random.normal(jax.random.key(5), (200, 20)) * 3
    full = np.asarray(jax.nn.log_softmax(logits))
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.5, 0, 1.0), (1.3, 4, 0.8), (0.0, 4, 0.8)):
        tokens, logprobs = draw(logits, jax.random.key(6), temperature, top_k=top_k, top_p=top_p)
        np.testing.assert_allclose(logprobs, full[np.arange(200), tokens], rtol=1e-5, atol=1e-5)


def test_restriction_holds_when_drawing():
    logits = jax.random.normal(jax.random.key(5), (200, 20))
    tokens, _ = draw(logits, jax.random.key(6), 2.0, top_k=4, top_p=0.8)
    kept = np.stack([keep(row / 2, 4, 0.8) for row in np.asarray(logits)])
    assert kept[np.arange(200), tokens].all()
    # Not merely the best each time.
    assert (
        len(
            set(
                np.argsort(-np.asarray(logits), axis=1)
                .argsort(axis=1)[np.arange(200), tokens]
                .tolist()
            )
        )
        > 1
    )


def draw_everywhere(logits, axis, temperature, top_k, top_p):
    """-> [b, 2]: token and log-probability, as one slice knows them."""
    rows = jnp.arange(len(logits))
    drawn = sample(
        logits,
        jax.random.key(9),
        rows,
        0 * rows,
        jnp.float32(temperature),
        top_k=top_k,
        top_p=top_p,
        axis=axis,
    )
    return jnp.stack(drawn, axis=1)


def in_slices(function, slices: int):
    """The function on logits cut into slices, one on each of so many devices -> what each device
    returns, side by side.
    """
    mesh = Mesh(np.array(jax.devices()[:slices]), "tensor")
    cut = PartitionSpec(None, "tensor")
    return jax.jit(
        jax.shard_map(
            partial(function, axis="tensor"),
            mesh=mesh,
            in_specs=cut,
            out_specs=cut,
            check_vma=False,
        )
    )


@pytest.mark.parametrize("slices", [pytest.param(2, marks=pytest.mark.nightly), 4])
@pytest.mark.parametrize(
    "top_k,top_p",
    [
        pytest.param(0, 1.0, marks=pytest.mark.slow),
        (200, 0.7),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(5, 1.0), (0, 0.9), (0, 1e-6)]),
    ],
)
def test_slices_of_the_vocabulary_change_nothing(slices, top_k, top_p):
    """768 tokens, 384 blocks of two: the same tokens are kept, and every slice knows the token that
    a single device draws, greedily too.
    """
    logits = jax.random.normal(jax.random.key(8), (30, 768)) * 2
    kept = in_slices(partial(restrict, top_k=top_k, top_p=top_p), slices)(logits)
    expected = restrict(logits, top_k=top_k, top_p=top_p)
    np.testing.assert_array_equal(kept, expected)
    for temperature in (0.0, 0.8):
        tokens, logprobs = draw(logits, jax.random.key(9), temperature, top_k=top_k, top_p=top_p)
        got = np.asarray(
            in_slices(
                partial(draw_everywhere, temperature=temperature, top_k=top_k, top_p=top_p), slices
            )(logits)
        ).reshape(30, slices, 2)
        np.testing.assert_array_equal(
            got[..., 0], np.repeat(np.asarray(tokens)[:, None], slices, axis=1)
        )
        np.testing.assert_allclose(
            got[..., 1],
            np.repeat(np.asarray(logprobs)[:, None], slices, axis=1),
            rtol=1e-5,
            atol=1e-5,
        )


def test_ties_between_slices_go_to_the_lowest_token():
    logits = jnp.zeros((3, 768)).at[:, jnp.array([300, 500, 767])].set(4.0)
    everywhere = partial(draw_everywhere, temperature=0.0, top_k=0, top_p=1.0)
    assert (np.asarray(in_slices(everywhere, 4)(logits))[:, ::2] == 300).all()


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (8, 0.9), (0, 0.9)])
def test_slices_exchange_no_logits(top_k, top_p):
    """What crosses devices, in the optimised program: per row at most a number a block, never one a
    token.
    """
    vocab, rows = 8192, 3
    everywhere = partial(draw_everywhere, temperature=1.0, top_k=top_k, top_p=top_p)
    text = in_slices(everywhere, 4).lower(jnp.zeros((rows, vocab))).compile().as_text()
    crossing = [
        line
        for line in text.splitlines()
        if re.search(r" (all-gather|all-reduce|collective-permute|all-to-all)(-start)?\(", line)
    ]
    sizes = [
        int(n)
        for line in crossing
        for n in re.findall(rf"\[{rows},(\d+)", line.split(" = ")[1].split("(")[0])
    ]
    assert crossing and max(sizes) == count_blocks(vocab) == 128


def test_slices_that_cut_a_block_are_refused():
    everywhere = partial(draw_everywhere, temperature=1.0, top_k=0, top_p=1.0)
    with pytest.raises(
        ValueError,
        match="28 has 4 blocks .* 7 slices .*config.mesh.tensor",
    ):
        in_slices(everywhere, 7)(jnp.zeros((3, 28)))
