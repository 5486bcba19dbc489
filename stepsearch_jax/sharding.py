"""Where arrays live: the device mesh, its logical axes, and moving rows to and from the mesh.

The mesh has axes `data` (copies of the model), `fsdp` (copies that share out parameters and
optimiser state) and `tensor` (pieces of heads, ffn and vocabulary). Rows of a batch are spread over
data and fsdp together. A tensor group lies within one host, so that every row belongs to one
process. Each TPU slice holds whole copies of the model.
"""

from __future__ import annotations

import itertools
import math
import operator

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))
SHAPES_NAMED = 6  # in an error message
# Logical axes of the rollout's copy of the parameters -> mesh axes. Only tensor cuts them, because
# every sampled token reads every parameter.
ROLLOUT_RULES = {
    "vocab": "tensor",
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "norm": None,
    "layers": None,
}


def make_mesh(
    data: int, fsdp: int, tensor: int, slices: int = 1, kv_heads: int = 0, devices=None
) -> Mesh:
    """A mesh with axes data, fsdp, tensor. One size may be -1: all remaining devices.

    slices: TPU slices, joined by the data-centre network; only the data axis crosses it.
    kv_heads: of the model to be cut, 0 without one. devices: None for all; the devices of a
    topology work too, to compile for it.
    Raises ValueError, naming shapes that work, if the sizes do not multiply to the number of
    devices, or if tensor would split a kv head or let its groups span hosts: the devices of a group
    exchange activations in every layer, and one of them searches for all.
    """
    devices = jax.devices() if devices is None else devices
    found = len({_slice_of(device) for device in devices})
    if found != slices:
        raise ValueError(
            f"config.mesh.slices is {slices}, but the {len(devices)} devices here belong to "
            f"{found} slices: set it to {found}"
        )
    asked = sizes = (data, fsdp, tensor)
    if asked.count(-1) == 1:
        left = len(devices) // max(1, -math.prod(asked))
        sizes = tuple(left if size == -1 else size for size in asked)
    if fault := _find_fault(sizes, slices, kv_heads, devices):
        fitting = [
            shape
            for shape in _factor(len(devices), len(AXES))
            if not _find_fault(shape, slices, kv_heads, devices)
        ]
        # The shapes most like the requested one come first.
        fitting.sort(key=lambda shape: -sum(map(operator.eq, shape, asked)))
        possible = ", ".join(map(_name, fitting[:SHAPES_NAMED]))
        possible += f" and {len(fitting) - SHAPES_NAMED} more" * (len(fitting) > SHAPES_NAMED)
        raise ValueError(
            f"mesh data x fsdp x tensor = {_name(asked)} {fault}: set config.mesh to one that "
            f"works here: {possible}"
        )
    return Mesh(_lay_out(sizes, slices, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _find_fault(sizes: tuple[int, ...], slices: int, kv_heads: int, devices) -> str:
    """Why a mesh of these sizes does not work, "" if it does."""
    data, _, tensor = sizes
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        return f"does not use the {len(devices)} devices here"
    if data % slices:
        return f"does not cut data among the {slices} slices of config.mesh.slices"
    if kv_heads % tensor:
        return f"would split a kv head, as tensor does not divide model.num_kv_heads={kv_heads}"
    if any(len(chips) % tensor for chips in _hosts(devices)):
        return "would let a tensor group span hosts"
    return ""


def _lay_out(sizes: tuple[int, ...], slices: int, devices) -> np.ndarray:
    """The devices as an array [data, fsdp, tensor]: neighbours along fsdp and tensor are near each
    other, and slices lie one after the other along data.
    """
    data, fsdp, tensor = sizes
    if tensor > 1:
        # Host by host: the library would lay a tensor group along a line of chips through several
        # hosts, although it fits into one host's block. Sorted by place within each host, the same
        # way in all: if groups lie differently in each, libtpu finds no routes on v5e:8x8 and
        # aborts.
        by_place = lambda device: (getattr(device, "coords", []), device.id)
        ordered = [chip for chips in _hosts(devices) for chip in sorted(chips, key=by_place)]
        return np.array(ordered).reshape(sizes)
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp, 1), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _hosts(devices) -> list[list]:
    """The devices of each host, slice by slice."""
    place = lambda device: (_slice_of(device), device.process_index)
    return [list(chips) for _, chips in itertools.groupby(sorted(devices, key=place), place)]


def _slice_of(device) -> int:
    """TPU slice of a device; all other devices count as one slice."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def _factor(number: int, parts: int) -> list[tuple[int, ...]]:
    """All ordered products of `parts` positive numbers that make `number`."""
    if parts == 1:
        return [(number,)]
    return [
        (first, *rest)
        for first in range(number, 0, -1)
        if number % first == 0
        for rest in _factor(number // first, parts - 1)
    ]


def _name(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def row_shards(mesh: Mesh) -> int:
    """Number of shards into which the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spread_rows(x: jax.Array) -> jax.Array:
    """x [B, ...] unchanged, its rows spread over the program's mesh if that cuts them evenly.

    Parameters are cut over fsdp along the width, rows along B. By itself the partitioner cuts
    hidden states along the width as well, and every chip computes all rows. This constraint makes
    it gather the parameters of one layer at a time instead (fully sharded data parallelism).
    """
    mesh = jax.typeof(x).sharding.mesh
    if (
        mesh.empty
        or any(kind != AxisType.Auto for kind in mesh.axis_types)
        or x.shape[0] % row_shards(mesh)
    ):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ROWS))


def partition_specs(boxed, rules: dict[str, str | None]):
    """Specs for parameters whose boxes name their logical axes.

    rules: logical axis -> mesh axis or None, a config table.
    """
    return spmd.logical_to_mesh(nn.get_partition_spec(boxed), tuple(rules.items()))


def shardings(mesh: Mesh, specs):
    """A tree of NamedShardings from a tree of PartitionSpecs."""
    is_spec = lambda x: isinstance(x, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def rows_to_mesh(mesh: Mesh, rows):
    """A tree of this process's rows (NumPy, leading axis) -> global arrays spread over the mesh."""
    sharding = NamedSharding(mesh, ROWS)
    put = lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x))
    return jax.tree.map(put, rows)


def rows_from_mesh(tree):
    """Global arrays with rows spread over the mesh -> this process's rows as NumPy, in order.

    Replicas count once.
    """

    def fetch(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable:
            return np.asarray(array)
        parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(fetch, tree)
