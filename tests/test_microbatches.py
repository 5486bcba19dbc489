"""Micro-batches by length: which rows share one, its width, and what comes back in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax.rl.microbatches import (
    choose_widths,
    join_rows,
    map_rows,
    padding_fraction,
    split_rows,
    sum_rows,
)

LENGTHS = jnp.array([3, 20, 9, 1, 24, 8, 17, 10])
WIDTHS = (8, 16, 24)


def test_split_rows_by_stride():
    """Rows 0 and 3, 1 and 4, 2 and 5."""
    rows = {"x": np.arange(12).reshape(6, 2)}
    parts = split_rows(rows, 3)
    assert parts["x"][..., 0].tolist() == [[0, 6], [2, 8], [4, 10]]
    np.testing.assert_array_equal(join_rows(parts)["x"], rows["x"])


@pytest.mark.parametrize(
    "length,buckets,expected",
    [
        (4096, 4, (1024, 2048, 3072, 4096)),
        (416, 8, (56, 104, 160, 208, 264, 312, 368, 416)),
        (30, 4, (8, 16, 24, 30)),
        (12, 8, (8, 12)),
        (5, 3, (5,)),
        (100, 1, (100,)),
    ],
)
def test_widths(length, buckets, expected):
    assert choose_widths(length, buckets) == expected


def draw_rows() -> tuple[jax.Array, jax.Array]:
    """Tokens [8, 24], 0 behind each row's end, and the number of each row [8]."""
    tokens = jax.random.randint(jax.random.key(0), (8, 24), 1, 100)
    return jnp.where(jnp.arange(24) < LENGTHS[:, None], tokens, 0), jnp.arange(8)


def sums(rows, width):
    """What a row's tokens add up to, its number, and the width that it was computed at."""
    tokens, number = rows
    return tokens[:, :width].sum(1), number, jnp.full(len(number), width)


@pytest.mark.parametrize(
    "size,widths",
    [
        (0, [24] * 8),
        (4, [16, 24, 16, 16, 24, 16, 24, 24]),
        (2, [8, 24, 16, 8, 24, 16, 24, 24]),
        (1, [8, 24, 16, 8, 24, 8, 24, 16]),
    ],
)
def test_rows_come_back_in_order_and_at_their_widths(size, widths):
    """By length the rows are 3, 0, 5, 2, 7, 6, 1, 4."""
    rows = draw_rows()
    total, number, at = jax.jit(lambda: map_rows(sums, rows, LENGTHS, size, WIDTHS))()
    np.testing.assert_array_equal(total, rows[0].sum(1))
    np.testing.assert_array_equal(number, rows[1])
    assert at.tolist() == widths
    padding = padding_fraction(LENGTHS, size, WIDTHS)
    np.testing.assert_allclose(padding, 1 - LENGTHS.sum() / sum(widths), rtol=1e-6)


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("widths", [WIDTHS, (24,)], ids=str)
def test_sum(size, widths):
    rows = draw_rows()
    add_up = lambda rows, width: {"tokens": rows[0][:, :width].sum(), "rows": len(rows[0])}
    total = jax.jit(lambda: sum_rows(add_up, rows, LENGTHS, size, widths))()
    assert (total["tokens"], total["rows"]) == (rows[0].sum(), 8)


def test_one_width_keeps_rows_by_stride():
    """No sorting, which moves rows between shards: rows 0 and 4 share a micro-batch."""
    shares = lambda rows, width: jnp.broadcast_to(rows[1].sum(), (len(rows[1]),))
    found = map_rows(shares, draw_rows(), LENGTHS, 2, (24,))
    assert found.tolist() == [4, 6, 8, 10, 4, 6, 8, 10]
