"""Mesh, also over hosts and slices that are not here, partition rules, rows to and from the mesh,
and checkpoints that move between meshes.
"""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_hlo
import tiny
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from stepsearch_jax import checkpoint, sharding
from stepsearch_jax.models.transformer import Policy, Value
from stepsearch_jax.rl import learner
from stepsearch_jax.rl.model_state import init_model_state
from stepsearch_jax.types import TrainState

TRAIN_RULES = tiny.ROLLOUT_RULES | {"embed": "fsdp"}


@pytest.mark.parametrize(
    "sizes,expected",
    [
        ((8, 1, 1), (8, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 2, 2), (2, 2, 2)),
        ((1, -1, 2), (1, 4, 2)),
        ((1, 1, -1), (1, 1, 8)),
    ],
)
def test_make_mesh(sizes, expected):
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == expected
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert sharding.row_shards(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 1, 1),
        (8, 2, 1),
        (-1, 3, 1),
        (-1, 16, 1),
        (1, 1, 1),
        (0, -1, 1),
        (-1, -1, 8),
        (-2, -4, 1),
    ],
)
def test_make_mesh_names_what_to_change(sizes):
    with pytest.raises(
        ValueError, match=rf"{sizes[0]} x {sizes[1]} x {sizes[2]} .*8 devices.*config\.mesh"
    ) as refusal:
        sharding.make_mesh(*sizes)
    check_named_shapes(refusal, devices=jax.devices())


def check_named_shapes(refusal, devices, **options) -> list[tuple[int, ...]]:
    """The shapes that a refusal names are made -> those shapes."""
    named = [
        tuple(map(int, shape))
        for shape in re.findall(
            r"(\d+) x (\d+) x (\d+)", str(refusal.value).split("one that works here:")[1]
        )
    ]
    assert named and all(
        tuple(sharding.make_mesh(*shape, devices=devices, **options).shape.values()) == shape
        for shape in named
    )
    return named


# ---- Hosts and slices that are not here ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a TPU device says of itself."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def make_pod(width: int, height: int, slices: int = 1) -> list[Chip]:
    """Slices of width x height chips, four to a host in squares; hosts are numbered through all
    slices, chips listed line by line.
    """
    hosts = width * height // 4
    places = [(s, x, y) for s in range(slices) for y in range(height) for x in range(width)]
    return [
        Chip(n, s * hosts + y // 2 * (width // 2) + x // 2, s, (x, y, 0))
        for n, (s, x, y) in enumerate(places)
    ]


@pytest.mark.parametrize("size", [(4, 2), (2, 4), (4, 4), (8, 8), (8, 16)], ids=str)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_tensor_groups_stay_within_their_hosts(size, tensor):
    """A line of four chips would reach through two hosts; a host's square does not. Every row shard
    then belongs to one process.
    """
    chips = make_pod(*size)
    for fsdp in (1, 2, len(chips) // tensor):
        mesh = sharding.make_mesh(-1, fsdp, tensor, devices=chips)
        assert set(mesh.devices.flat) == set(chips) and mesh.shape["fsdp"] == fsdp
        for group in mesh.devices.reshape(-1, tensor):
            assert len({chip.process_index for chip in group}) == 1
            xs, ys = zip(*(chip.coords[:2] for chip in group))
            assert (max(xs) - min(xs) + 1) * (max(ys) - min(ys) + 1) == tensor  # neighbours


def test_tensor_groups_over_hosts_are_refused():
    chips = make_pod(4, 4)
    with pytest.raises(
        ValueError, match="2 x 1 x 8 would let a tensor group span hosts: set config.mesh to"
    ) as refusal:
        sharding.make_mesh(2, 1, 8, devices=chips)
    assert max(shape[2] for shape in check_named_shapes(refusal, chips)) == 4
    processes = [
        dataclasses.replace(chip, platform="cpu", device_kind="cpu", process_index=chip.id // 2)
        for chip in make_pod(4, 2)
    ]
    with pytest.raises(ValueError, match="span hosts") as refusal:  # two devices a process
        sharding.make_mesh(-1, 1, 4, devices=processes)
    assert max(shape[2] for shape in check_named_shapes(refusal, processes)) == 2


@pytest.mark.parametrize(
    "sizes", [(2, 16, 1), (4, 8, 1), (8, 1, 4), (2, 4, 4), (32, 1, 1)], ids=str
)
def test_only_data_crosses_slices(sizes):
    chips = make_pod(4, 4, slices=2)
    mesh = sharding.make_mesh(*sizes, slices=2, devices=chips)
    assert tuple(mesh.shape.values()) == sizes and set(mesh.devices.flat) == set(chips)
    slices = [{chip.slice_index for chip in copy.flat} for copy in mesh.devices]
    assert slices == [{0}] * (sizes[0] // 2) + [{1}] * (sizes[0] // 2)


def test_slices_are_those_of_the_devices():
    chips = make_pod(4, 4, slices=2)
    with pytest.raises(
        ValueError,
        match="config.mesh.slices is 1.* 2 slices: set it to 2",
    ):
        sharding.make_mesh(-1, 1, 1, devices=chips)
    with pytest.raises(
        ValueError,
        match="config.mesh.slices is 2.* 1 slices: set it to 1",
    ):
        sharding.make_mesh(-1, 1, 1, slices=2)
    with pytest.raises(
        ValueError, match="1 x 32 x 1 does not cut data among the 2 slices"
    ) as refusal:
        sharding.make_mesh(1, 32, 1, slices=2, devices=chips)
    assert all(shape[0] % 2 == 0 for shape in check_named_shapes(refusal, chips, slices=2))


@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, -1, 8)])
def test_split_kv_heads_are_refused(sizes):
    with pytest.raises(
        ValueError,
        match="kv head.*model.num_kv_heads=2.*config.mesh",
    ) as refusal:
        sharding.make_mesh(*sizes, kv_heads=2)
    assert {shape[2] for shape in check_named_shapes(refusal, jax.devices(), kv_heads=2)} == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,slices,chips",
    [
        ("v5e:4x4", 1, 16),
        ("v5e:8x8", 1, 64),
        ("v5e:4x4", 2, 32),
        ("v5p:2x2x4", 1, 16),
        ("v6e:4x4", 1, 16),
    ],
)
def test_meshes_of_real_topologies(monkeypatch, name, slices, chips):
    """What the TPU compiler says of hosts and slices is what the refusals read."""
    pytest.importorskip(
        "libtpu", reason="topologies of TPUs need libtpu: pip install -r requirements-ci.txt"
    )
    for key, value in test_hlo.TPU_ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=slices
    ).devices
    assert len(devices) == chips
    # The chips of a single slice do not say.
    slice_of = lambda chip: getattr(chip, "slice_index", 0)
    mesh = sharding.make_mesh(-1, 2, 4, slices, 4, devices)
    assert all(
        len({(slice_of(chip), chip.process_index) for chip in group}) == 1
        for group in mesh.devices.reshape(-1, 4)
    )
    for copy, here in zip(mesh.devices, np.repeat(range(slices), mesh.shape["data"] // slices)):
        assert {slice_of(chip) for chip in copy.flat} == {here}
    with pytest.raises(ValueError, match="span hosts") as refusal:
        sharding.make_mesh(-1, 1, 16, slices, 16, devices)
    check_named_shapes(refusal, devices, slices=slices)


# ---- Partition rules -----------------------------------------------------------------------------


def test_partition_specs_follow_the_rules():
    boxed = tiny.make_boxes(Policy(tiny.CONFIG))
    specs = sharding.partition_specs(boxed, TRAIN_RULES)["params"]
    P = PartitionSpec
    assert specs["trunk"]["embedding"] == P("tensor", "fsdp") and specs["lm_head"] == P(
        "fsdp", "tensor"
    )
    layers = specs["trunk"]["layers"]
    # [L, D, heads, H]
    assert layers["q"]["kernel"] == layers["k"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert layers["q"]["bias"] == P(None, "tensor", None)
    assert layers["o"]["kernel"] == P(None, "tensor", None, "fsdp")  # [L, N, H, D]
    assert layers["gate"]["kernel"] == P(None, "fsdp", "tensor")
    assert layers["down"]["kernel"] == P(None, "tensor", "fsdp")
    assert layers["ffn_norm"]["scale"] == P(None, None)
    replaced = sharding.partition_specs(boxed, tiny.ROLLOUT_RULES)["params"]
    assert replaced["trunk"]["layers"]["q"]["kernel"] == P(None, None, "tensor", None)


@pytest.mark.parametrize(
    "model", [Policy(tiny.CONFIG), Value(tiny.CONFIG)], ids=["policy", "value"]
)
def test_every_parameter_has_a_spec_of_its_rank(model):
    boxed = tiny.make_boxes(model)
    ranks = jax.tree.map(
        lambda leaf, spec: (leaf.ndim, len(spec)),
        nn.unbox(boxed),
        sharding.partition_specs(boxed, TRAIN_RULES),
    )
    assert all(a == b for a, b in jax.tree.leaves(ranks, is_leaf=lambda x: isinstance(x, tuple)))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_rows_come_back_in_order(shape):
    mesh = sharding.make_mesh(*shape)
    rows = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "ok": np.arange(8) % 3 == 0}
    placed = sharding.rows_to_mesh(mesh, rows)
    assert placed["tokens"].sharding == NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    per_device = 8 // sharding.row_shards(mesh)
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(per_device, 3)}
    back = sharding.rows_from_mesh(placed)
    for name, array in rows.items():
        assert isinstance(back[name], np.ndarray) and back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_rows_of_another_process_are_joined_in_order():
    """An array of which this process sees only some shards, each on two devices, listed out of
    order.
    """

    class Shard:
        def __init__(self, start, stop):
            self.index, self.data = (slice(start, stop), slice(None)), np.arange(start or 0, stop)

    class Array:
        is_fully_addressable = False
        addressable_shards = [Shard(4, 6), Shard(None, 2), Shard(4, 6), Shard(None, 2)]

    np.testing.assert_array_equal(sharding.rows_from_mesh(Array()), [0, 1, 4, 5])


def make_state(mesh, seed: int) -> TrainState:
    """A full training state on the mesh, every leaf of which holds something else."""
    rng = np.random.default_rng(seed)
    draw = lambda x: (
        rng.integers(0, 99, x.shape).astype(x.dtype)
        if jnp.issubdtype(x.dtype, jnp.integer)
        else rng.normal(size=x.shape).astype(x.dtype)
    )
    optimizer = learner.make_optimizer(
        "adamw",
        1e-3,
        warmup=0.1,
        iterations=10,
        steps_per_iteration=2,
        b1=0.9,
        b2=0.999,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )
    states = []
    for model in (Policy(tiny.CONFIG), Value(tiny.CONFIG)):
        specs = sharding.partition_specs(tiny.make_boxes(model), TRAIN_RULES)
        params = jax.device_put(tiny.draw_params(model, seed), sharding.shardings(mesh, specs))
        states.append(init_model_state(optimizer, mesh, params, specs))
    numbers = dict(
        iteration=jnp.int32(0),
        position=jnp.int32(0),
        kl_coef=jnp.float32(0),
        skipped=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )
    state = TrainState(*states, **jax.device_put(numbers, sharding.replicated(mesh)))
    return jax.tree.map(lambda x: jax.device_put(draw(x), x.sharding), state)


def test_optimiser_state_is_cut_like_its_parameters():
    state = make_state(sharding.make_mesh(2, 2, 2), 1)
    cut = [x.sharding.spec for x in jax.tree.leaves(state.policy.params)]
    moments = [x.sharding.spec for x in jax.tree.leaves(state.policy.opt_state) if x.ndim]
    assert moments == cut + cut  # AdamW's two moments; its count is the one leaf without axes
    assert any(spec != PartitionSpec() for spec in cut)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2),
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 4, 2), marks=pytest.mark.slow),
    ],
)
def test_checkpoint_restores_every_bit_on_any_mesh(tmp_path, shape):
    state = make_state(sharding.make_mesh(2, 2, 2), 3)
    saved = jax.tree.map(np.asarray, state)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.latest() is None
    checkpoints.save(4, state)
    # As an update that receives the state by donation would.
    jax.tree.map(lambda x: x.delete(), state)
    checkpoints.close()

    abstract_params = make_state(sharding.make_mesh(*shape), 5)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.latest() == 4
    restored = checkpoints.restore(4, abstract_params)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(abstract_params)
    for got, expected, place in zip(*map(jax.tree.leaves, (restored, saved, abstract_params))):
        assert got.dtype == expected.dtype and got.sharding == place.sharding
        assert np.asarray(got).tobytes() == expected.tobytes()


def test_newest_checkpoints_stay(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    for number in (1, 2, 5):
        checkpoints.save(number, {"x": jnp.full(3, number)})
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() == 5
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "5"]
    np.testing.assert_array_equal(
        checkpoints.restore(2, {"x": jnp.zeros(3, jnp.int32)})["x"], [2, 2, 2]
    )
    checkpoints.close()


def test_params_alone(tmp_path):
    params, folder = {"a": jnp.arange(4.0), "b": jnp.ones((2, 2))}, tmp_path / "start"
    with pytest.raises(FileNotFoundError, match="start"):
        checkpoint.load_params(folder, params, "none")
    checkpoint.save_params(folder, jax.tree.map(jnp.zeros_like, params))
    checkpoint.save_params(folder, params)  # replaces the earlier copy
    jax.tree.map(
        np.testing.assert_array_equal, checkpoint.load_params(folder, params, "none"), params
    )


def test_params_of_another_shape_are_refused(tmp_path):
    checkpoint.save_params(tmp_path / "start", {"a": jnp.arange(4.0)})
    with pytest.raises(ValueError):
        checkpoint.load_params(tmp_path / "start", {"a": jnp.zeros(5)}, "none")
