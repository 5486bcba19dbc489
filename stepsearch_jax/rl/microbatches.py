"""Micro-batches: rows of similar length share one, which is cut to one of a few static widths.

Episodes differ in length several times over. If all rows had the width of the longest, most of the
learner's work would be on padding. Rows are therefore sorted by length, and each micro-batch runs
at the smallest width that holds its longest row. The widths are branches of one compiled program,
so no rollout makes a run compile anew.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from stepsearch_jax.sharding import spread_rows

# Widths are multiples of this (but for the greatest), the rows of a TPU's vector registers.
WIDTH_MULTIPLE = 8


def choose_widths(length: int, buckets: int) -> tuple[int, ...]:
    """At most `buckets` widths up to `length`, about evenly spaced, in ascending order."""
    steps = (-(-length * n // buckets) for n in range(1, buckets + 1))
    rounded = {min(length, -(-step // WIDTH_MULTIPLE) * WIDTH_MULTIPLE) for step in steps}
    return tuple(sorted(rounded))


def split_rows(tree, parts: int):
    """[B, ...] -> [parts, B / parts, ...], row r in part r mod parts."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree
    )


def join_rows(tree):
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def map_rows(function: Callable, rows, lengths: jax.Array, size: int, widths: tuple[int, ...]):
    """function(rows, width) for one micro-batch after the other -> its results, rows in order.

    rows: a tree of [B, ...]; lengths [B]: tokens of each row; size: rows of a micro-batch, 0 = B.
    function gets rows [size, ...], none of them longer than `width`, and returns a tree of
    [size, ...] whose shapes do not depend on `width`.
    """
    parts = _count_parts(lengths, size)
    if len(widths) == 1:
        results = jax.lax.map(lambda part: function(part, widths[0]), split_rows(rows, parts))
        return join_rows(results)
    order, sorted_parts, buckets = _sort_rows(rows, lengths, parts, widths)
    run = lambda part: _switch(function, widths, *part)
    results = jax.lax.map(run, (sorted_parts, buckets))
    back = jnp.argsort(order)
    return jax.tree.map(lambda x: spread_rows(x.reshape(-1, *x.shape[2:])[back]), results)


def sum_rows(function: Callable, rows, lengths: jax.Array, size: int, widths: tuple[int, ...]):
    """The sum of function(rows, width) over micro-batches: a tree of any shapes.

    The arguments are those of `map_rows`. A sum over one micro-batch needs no second tree.
    """
    parts = _count_parts(lengths, size)
    if len(widths) == 1:
        split, buckets = split_rows(rows, parts), jnp.zeros(parts, jnp.int32)
    else:
        _, split, buckets = _sort_rows(rows, lengths, parts, widths)
    run = lambda part, bucket: _switch(function, widths, part, bucket)
    first = jax.tree.map(lambda x: x[0], (split, buckets))
    if parts == 1:
        return run(*first)
    add = lambda total, part: (jax.tree.map(jnp.add, total, run(*part)), None)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, *first))
    return jax.lax.scan(add, zeros, (split, buckets))[0]


def padding_fraction(lengths: jax.Array, size: int, widths: tuple[int, ...]) -> jax.Array:
    """Fraction of the tokens computed by `map_rows` and `sum_rows` that is padding: []."""
    parts = _count_parts(lengths, size)
    if len(widths) == 1:
        computed = jnp.float32(len(lengths) * widths[0])
    else:
        *_, buckets = _sort_rows((), lengths, parts, widths)
        computed = jnp.array(widths, jnp.float32)[buckets].sum() * (len(lengths) // parts)
    return 1 - lengths.sum() / computed


def _count_parts(lengths: jax.Array, size: int) -> int:
    return max(1, len(lengths) // size) if size else 1


def _sort_rows(rows, lengths: jax.Array, parts: int, widths: tuple[int, ...]):
    """-> (order [B], rows in this order [parts, B / parts, ...], buckets [parts]).

    The order is that of the lengths. widths[buckets[i]] holds the longest row of part i.
    """
    order = jnp.argsort(lengths)
    longest = lengths[order].reshape(parts, -1)[:, -1]
    take = lambda x: x[order].reshape(parts, -1, *x.shape[1:])
    return order, jax.tree.map(take, rows), jnp.searchsorted(jnp.array(widths), longest)


def _switch(function: Callable, widths: tuple[int, ...], part, bucket: jax.Array):
    """function(part, widths[bucket]), the rows of `part` spread over the mesh."""
    if len(widths) == 1:
        return function(part, widths[0])
    branches = [lambda part, width=width: function(part, width) for width in widths]
    return jax.lax.switch(bucket, branches, jax.tree.map(spread_rows, part))
