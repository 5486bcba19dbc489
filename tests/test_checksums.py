"""Checksums of arrays: the same on every mesh, and changed by any bit and any exchange."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from stepsearch_jax import sharding
from stepsearch_jax.checksums import checksum_leaves, leaf_names

DTYPES = (np.float32, np.int32, np.uint8, np.bool_, np.float16, jnp.bfloat16)


def checksum(array) -> tuple:
    return tuple(checksum_leaves([array])[0][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_meshes_find_the_same(dtype):
    array = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(dtype)
    found = {checksum(jnp.asarray(array))}
    for shape, spec in (
        ((8, 1, 1), PartitionSpec("data")),
        ((2, 2, 2), PartitionSpec("fsdp", "tensor")),
        ((1, 4, 2), PartitionSpec(None, "fsdp", "tensor")),
        ((2, 2, 2), PartitionSpec()),
    ):
        place = NamedSharding(sharding.make_mesh(*shape), spec)
        found.add(checksum(jax.device_put(array, place)))
    assert len(found) == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_bit_changes_it(data):
    dtype = data.draw(st.sampled_from(DTYPES[:3] + DTYPES[4:]))
    array = np.random.default_rng(1).normal(size=(5, 7)).astype(dtype)
    changed = bytearray(array.tobytes())
    bit = data.draw(st.integers(0, 8 * len(changed) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    other = np.frombuffer(changed, array.dtype).reshape(array.shape)
    assert checksum(jnp.asarray(array)) != checksum(jnp.asarray(other))


def test_places_count():
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    variants = rows, rows[::-1], rows[:, ::-1], rows.T.reshape(3, 4), np.zeros((3, 4), np.float32)
    assert len({checksum(jnp.asarray(array.copy())) for array in variants}) == len(variants)
    scalars = {checksum(jnp.int32(number)) for number in range(100)}
    assert len(scalars) == 100


def test_names_and_finite_numbers():
    tree = {"b": jnp.float32([1, np.inf]), "a": {"c": jnp.int32(3)}, "d": jnp.bfloat16(np.nan)}
    names, (_, finite) = leaf_names(tree), checksum_leaves(tree)
    assert dict(zip(names, finite)) == {"a/c": True, "b": False, "d": False}
