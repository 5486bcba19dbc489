"""Groups of partitions in all forms of XLA's text, and the links that a group can use at once."""

import itertools

import numpy as np
import pytest

from stepsearch_jax.preflight.network import Network, read_groups


@pytest.mark.parametrize(
    "text,groups",
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3]]),
        ("mesh['data'=1,'fsdp'=2,'tensor'=2] {'fsdp'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {}", [[0], [1], [2], [3]]),
        # Half of an axis: its first or its last factor of 2.
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        # The mesh's devices in another order, listed or reshaped and transposed.
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}", [[3, 1], [0, 2]]),
        ("@mesh<a=2,b=2>([2,2]T(1,0)) {b}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_are_read_in_every_form(text, groups):
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true, to_apply=%add"
    found = read_groups(attributes, partitions=4)
    assert found.tolist() == groups


def test_no_groups_are_read_where_there_are_none():
    assert read_groups(", source_target_pairs={{0,1},{1,0}}", partitions=2) is None


def grid(*sizes: int) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, sizes)))


def test_a_group_uses_the_axes_that_it_spans():
    network = Network(grid(4, 4), rings=(False, False))
    assert network.links(np.arange(16)[None]) == 2  # both axes
    assert network.links(np.arange(16).reshape(4, 4)) == 1  # the rows
    assert network.links(np.arange(16).reshape(4, 4).T) == 1  # the columns
    assert network.links(np.arange(16).reshape(8, 2)) == 1  # pairs of neighbours


def test_groups_across_each_other_share_links():
    """Every second chip of each row: two groups want the same links of the rows, but have columns
    of their own."""
    network = Network(grid(4, 4), rings=(False, False))
    assert network.links(np.arange(16).reshape(8, 2).T) == 1 + 1 / 2


def test_a_ring_is_used_both_ways():
    """16 chips that close to a ring, in rows of 4 that do not."""
    network = Network(grid(16, 4), rings=(True, False))
    columns = np.arange(64).reshape(16, 4).T
    assert network.links(columns) == 2
    assert network.links(np.arange(64)[None]) == 2 + 1
    # Every second chip of the ring goes around it; half of it does not.
    assert network.links(columns.reshape(4, 8, 2).swapaxes(1, 2).reshape(8, 8)) == 2 / 2
    assert network.links(columns.reshape(8, 8)) == 1


def test_a_switch_links_all():
    assert Network(None).links(np.arange(8).reshape(2, 4)) == 1
