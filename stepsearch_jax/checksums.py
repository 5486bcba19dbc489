"""Checksums of arrays, computed where they lie: on the devices, before they are written and after
they are read back.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio: spreads neighbouring positions over all 32 bits


def checksum_leaves(tree) -> tuple[np.ndarray, np.ndarray]:
    """-> (sums [n, 2] uint32, finite [n] bool) of the n leaves, in the order of `jax.tree.leaves`.

    A sum depends on every bit of a leaf and on its place: it adds up, modulo 2^32, a hash of each
    number and its position, by two hashes. Such sums do not depend on their order, so all meshes
    find the same ones. finite: no number of the leaf is NaN or infinite.
    """
    # One after the other: on CPUs, collectives of several programs at a time may meet in different
    # orders in different processes, and wait for each other.
    leaves = jax.tree.leaves(tree)
    sums, finite = zip(*(jax.device_get(_checksum(leaf, _replicated(leaf))) for leaf in leaves))
    return np.stack(sums), np.stack(finite)


def leaf_names(tree) -> list[str]:
    """The path of each leaf, such as "policy/params/embed", in the order of `checksum_leaves`."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _replicated(leaf) -> NamedSharding | None:
    """Where the sums of a leaf go: to every device that has a part of it."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return None


@partial(jax.jit, static_argnums=1)
def _checksum(leaf: jax.Array, where: NamedSharding | None) -> tuple[jax.Array, jax.Array]:
    """-> (sums [2] uint32, finite [] bool)."""
    bits = _bits(jnp.atleast_1d(leaf))
    # The row-major position of each number, modulo 2^32.
    position, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    sums = [
        _mix(bits ^ _mix(position * jnp.uint32(_GOLDEN) + jnp.uint32(seed))).sum(dtype=jnp.uint32)
        for seed in (1, 2)
    ]
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    result = jnp.stack(sums), jnp.isfinite(leaf).all() if floats else jnp.bool_(True)
    return result if where is None else jax.lax.with_sharding_constraint(result, where)


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of each number as uint32; a last axis of two for numbers of eight bytes."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A hash of 32 bits, one to one, so that any change changes it.

    Source: the finaliser of MurmurHash3, A. Appleby.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
