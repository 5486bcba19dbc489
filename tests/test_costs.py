"""Arithmetic, memory traffic and collectives of compiled programs, against counts by hand.

Texts of TPU programs, which say less than those of CPU programs, are made up.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from stepsearch_jax.preflight.costs import Rates, add_costs, count_costs
from stepsearch_jax.preflight.hlo import Array, Module
from stepsearch_jax.preflight.kernels import count_kernel_bytes
from stepsearch_jax.preflight.network import Network

RATES = Rates(1e12, 1e12, 1e12)


def refuse(functions):
    raise AssertionError(f"asked for the loop of {functions}")


def count(function, *arguments, trips=refuse):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return count_costs(Module(text), trips, RATES)


def multiply(x, w):
    return x @ w


def test_products_in_nested_loops_are_counted_as_often_as_they_run():
    """5 x (one product + 3 x one product), [4, 6] @ [6, 6]: 20 x 2·4·6·6."""
    w = jnp.ones((6, 6))

    def inner(x, _):
        return jnp.sin(x @ w), None

    def outer(x, _):
        return jax.lax.scan(inner, jnp.cos(x @ w), length=3)[0], None

    found = count(lambda x: jax.lax.scan(outer, x, length=5)[0], jnp.ones((4, 6)))
    assert found.flops == 20 * 2 * 4 * 6 * 6


def test_without_loops_the_count_is_the_compilers():
    """Batched products and a convolution with stride, padding and holes, all large."""

    def work(x, y, image, kernel):
        convolved = jax.lax.conv_general_dilated(
            image, kernel, (2, 1), ((1, 2), (0, 3)), lhs_dilation=(1, 2), rhs_dilation=(2, 1)
        )
        return jnp.einsum("bij,bjk->bik", x, y).sum() + convolved.sum()

    arguments = (
        jnp.ones((4, 64, 64)),
        jnp.ones((4, 64, 64)),
        jnp.ones((2, 16, 20, 20)),
        jnp.ones((24, 16, 3, 5)),
    )
    compiled = jax.jit(work).lower(*arguments).compile()
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    found = count_costs(Module(compiled.as_text()), refuse, RATES)
    assert found.flops == pytest.approx(analysis["flops"], rel=0.05)


def test_a_loop_that_data_ends_is_counted_by_the_caller():
    asked = []

    def trips(functions):
        asked.append(functions)
        return 7.0

    def spin(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jnp.tanh(x @ x) + x, x)

    assert count(spin, jnp.ones((8, 8)), trips=trips).flops == 7 * 2 * 8**3
    assert asked and asked[0][0] == "spin"


def test_collectives_run_as_often_as_their_loop():
    """4 devices, 5 times: 32 bytes are summed up (2 x 3/4 of them sent), 16 gathered from each
    (3 x sent), 128 scattered (3/4), 8 passed on."""
    mesh = Mesh(np.array(jax.devices()[:4]), "x")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def work(x):
        def step(x, _):
            a = jax.lax.psum(jnp.sin(x[:8]), "x")
            b = jax.lax.all_gather(jnp.sin(x[:4] + a[:4]), "x", tiled=True)
            c = jax.lax.psum_scatter(jnp.sin(x[:32] + b[0]), "x", tiled=True)
            d = jax.lax.ppermute(jnp.sin(x[:2] + c[:2]), "x", [(i, (i + 1) % 4) for i in range(4)])
            return x + d[0], None

        return jax.lax.scan(step, x, length=5)[0]

    found = count(work, jnp.ones(32)).collectives
    assert {kind: (c.count, c.bytes) for kind, c in found.items()} == {
        "all-reduce": (5, 5 * 2 * 32 * 3 / 4),
        "all-gather": (5, 5 * 16 * 3),
        "reduce-scatter": (5, 5 * 128 * 3 / 4),
        "collective-permute": (5, 5 * 8),
    }


def test_a_loop_over_layers_reads_each_layer_once():
    """8 layers of [256, 256] float32, 2 MiB in all, one at a time and not 8 times 2 MiB: sliced
    out (read and written) and multiplied (read again)."""

    def run(x, layers):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    moved = count(run, jnp.ones((4, 256)), jnp.ones((8, 256, 256))).bytes
    assert 2 * 2**20 <= moved < 3.5 * 2 * 2**20


# As the compiler for TPUs writes: no trip counts, constants within conditions, counters copied,
# batched products as convolutions, scratchpad arrays S(1).
TPU_TEXT = """\
HloModule jit_f, is_scheduled=true, num_partitions=16

FunctionNames
1 "outer.<locals>.spin"
2 "<module>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=78 end_line=78 column=16 end_column=16}
2 {file_name_id=1 function_name_id=2 line=57 end_line=57 column=11 end_column=11}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%fused (param_0.1: bf16[9,64,32], param_1.1: s32[], param_2.1: bf16[3,16,32]) -> f32[3,16,32] {
  %param_0.1 = bf16[9,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %param_2.1 = bf16[3,16,32]{2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[3,64,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %param_1.1, %zero, %zero), dynamic_slice_sizes={3,64,32}
  ROOT %products = f32[3,16,64]{2,1,0:T(8,128)} convolution(%param_2.1, %slice), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0oi->0bf
}

%all-reduce-scatter.1 (param_0.2: f32[64]) -> f32[16] {
  %param_0.2 = f32[64]{0:T(128)} parameter(0)
  %sum = f32[64]{0:T(128)} all-reduce(%param_0.2), channel_id=1, replica_groups=[4,4]<=[16], use_global_device_ids=true, to_apply=%add
  ROOT %part = f32[16]{0:T(128)} dynamic-slice(%sum), dynamic_slice_sizes={16}
}

%start_gathering (param_0.3: bf16[16,8]) -> (bf16[16,64], u32[]) {
  %param_0.3 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gather.1 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%param_0.3), channel_id=9, replica_groups=[2,8]<=[8,2]T(1,0), dimensions={1}, frontend_attributes={chain_id="5"}
  ROOT %begun = (bf16[16,64]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%end_gathering (param_0.4: bf16[16,8]) -> bf16[16,64] {
  %param_0.4 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gather.2 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%param_0.4), channel_id=9, replica_groups=[2,8]<=[8,2]T(1,0), dimensions={1}, frontend_attributes={chain_id="5"}
  ROOT %ended = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (carry: (s32[], bf16[9,64,32], bf16[3,16,32], f32[64])) -> (s32[], bf16[9,64,32], bf16[3,16,32], f32[64]) {
  %carry = (s32[]{:T(128)}, bf16[9,64,32]{2,1,0:T(8,128)(2,1)}, bf16[3,16,32]{2,1,0:T(8,128)(2,1)S(1)}, f32[64]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %w = bf16[9,64,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %x = bf16[3,16,32]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=2
  %g = f32[64]{0:T(128)} get-tuple-element(%carry), index=3
  %fusion.1 = f32[3,16,64]{2,1,0:T(8,128)S(1)} fusion(%w, %i, %x), kind=kOutput, calls=%fused
  %fusion.2 = f32[16]{0:T(128)S(1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %shard = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} bitcast(%x)
  %fusion.3 = (bf16[16,64]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%shard), kind=kCustom, calls=%start_gathering
  %fusion.4 = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} fusion(%shard), kind=kCustom, calls=%end_gathering
  %stride = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %stride)
  ROOT %out = (s32[]{:T(128)}, bf16[9,64,32]{2,1,0:T(8,128)(2,1)}, bf16[3,16,32]{2,1,0:T(8,128)(2,1)S(1)}, f32[64]{0:T(128)}) tuple(%next, %w, %x, %g)
}

%condition (carry.1: (s32[], bf16[9,64,32], bf16[3,16,32], f32[64])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[9,64,32]{2,1,0:T(8,128)(2,1)}, bf16[3,16,32]{2,1,0:T(8,128)(2,1)S(1)}, f32[64]{0:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (w.1: bf16[9,64,32], x.1: bf16[3,16,32], g.1: f32[64]) -> s32[] {
  %w.1 = bf16[9,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x.1 = bf16[3,16,32]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %g.1 = f32[64]{0:T(128)} parameter(2)
  %two = s32[]{:T(128)} constant(2)
  %begin = s32[]{:T(128)} copy(%two)
  %start = (s32[]{:T(128)}, bf16[9,64,32]{2,1,0:T(8,128)(2,1)}, bf16[3,16,32]{2,1,0:T(8,128)(2,1)S(1)}, f32[64]{0:T(128)}) tuple(%begin, %w.1, %x.1, %g.1)
  %loop = (s32[]{:T(128)}, bf16[9,64,32]{2,1,0:T(8,128)(2,1)}, bf16[3,16,32]{2,1,0:T(8,128)(2,1)S(1)}, f32[64]{0:T(128)}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(f)/while" stack_frame_id=2}
  ROOT %done = s32[]{:T(128)} get-tuple-element(%loop), index=0
}
"""  # noqa: E501


def test_texts_of_tpu_programs():
    """5 runs (from 2 to 12 by 2): three products [16, 32] @ [32, 64]; a third of the weights read
    from memory, their input and result elsewhere; a fused reduce-scatter of 256 bytes over groups
    of 4; an all-gather of 256 bytes from each of 8 that is part of two fusions. The memory takes
    longest."""
    found = count_costs(Module(TPU_TEXT), refuse, Rates(1e9, 1.0, 1e9))
    assert found.flops == 5 * 3 * 2 * 16 * 32 * 64
    # Weights, what is scattered, and the counter: read twice, and written beside its stride.
    each = 3 * 64 * 32 * 2 + 256 + 4 * 4
    assert found.bytes == 5 * each + 8  # and copied once
    assert {kind: (c.count, c.bytes) for kind, c in found.collectives.items()} == {
        "all-gather": (5, 5 * 256 * 7),
        "reduce-scatter": (5, 5 * 192),
    }
    assert found.seconds == {"compute": 0, "HBM": 5 * each + 8, "links": 0}
    slow_links = count_costs(Module(TPU_TEXT), refuse, Rates(1e9, 1e9, 1.0))
    assert slow_links.seconds["links"] == 5 * (256 * 7 + 192)


# A table of 64 x 32 numbers (4096 bytes) behind two nested fusions that only rename it, of which a
# convolution reads all and a slice reads a row; another table of which only the slice is read.
NESTED_TEXT = """\
HloModule jit_g, is_scheduled=true

%rename (param_0.1: bf16[64,32]) -> bf16[32,64] {
  %param_0.1 = bf16[64,32]{1,0} parameter(0)
  ROOT %renamed = bf16[32,64]{0,1} bitcast(%param_0.1)
}

%rename_again (param_0.2: bf16[64,32]) -> bf16[32,64] {
  %param_0.2 = bf16[64,32]{1,0} parameter(0)
  ROOT %inner = bf16[32,64]{0,1} fusion(%param_0.2), kind=kLoop, calls=%rename
}

%multiply (param_0.3: bf16[64,32], param_1.3: bf16[16,32]) -> bf16[16,64] {
  %param_0.3 = bf16[64,32]{1,0} parameter(0)
  %param_1.3 = bf16[16,32]{1,0:S(1)} parameter(1)
  %table = bf16[32,64]{0,1} fusion(%param_0.3), kind=kLoop, calls=%rename_again
  ROOT %products = bf16[16,64]{1,0} convolution(%param_1.3, %table), dim_labels=bf_io->bf
}

%pick (param_0.4: bf16[64,32], param_1.4: s32[]) -> bf16[32,1] {
  %param_0.4 = bf16[64,32]{1,0} parameter(0)
  %param_1.4 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %columns = bf16[32,64]{0,1} fusion(%param_0.4), kind=kLoop, calls=%rename_again
  ROOT %row = bf16[32,1]{0,1} dynamic-slice(%columns, %zero, %param_1.4), dynamic_slice_sizes={32,1}
}

ENTRY %main (table.1: bf16[64,32], x.1: bf16[16,32], n.1: s32[]) -> bf16[16,64] {
  %table.1 = bf16[64,32]{1,0} parameter(0)
  %x.1 = bf16[16,32]{1,0:S(1)} parameter(1)
  %n.1 = s32[]{:S(2)} parameter(2)
  %row.1 = bf16[32,1]{0,1:S(1)} fusion(%table.1, %n.1), kind=kLoop, calls=%pick, backend_config={"estimated_cycles":"40"}
  %kernel.7 = bf16[16,32]{1,0:S(1)} custom-call(%x.1, %table.1), custom_call_target="tpu_custom_call"
  ROOT %out = bf16[16,64]{1,0:S(1)} fusion(%table.1, %x.1), kind=kOutput, calls=%multiply, backend_config={"flags":[],"window_config":{"estimated_cycles":"60"}}
}
"""  # noqa: E501


def test_operands_behind_nested_fusions_are_read():
    """The whole table by the product, one row of 32 by the slice, and nothing written to memory;
    the kernel's two blocks of 512 bytes are known from its call."""
    module, kernels = Module(NESTED_TEXT), {"kernel": 1024.0}
    found = count_costs(module, refuse, Rates(1e9, 1.0, 1e9), kernels=kernels)
    assert found.bytes == 64 * 32 * 2 + 32 * 2 + 1024
    assert found.launches == 3
    assert found.modelled_seconds is None  # without a clock
    # Of a kernel that is not known all operands are read.
    unknown = count_costs(module, refuse, Rates(1e9, 1.0, 1e9))
    assert unknown.bytes == found.bytes - 1024 + 64 * 32 * 2


def test_the_cost_model_adds_cycles_and_what_has_none():
    """100 cycles, and the kernel's 1024 bytes; but never less than the roofline's time."""
    module, kernels = Module(NESTED_TEXT), {"kernel": 1024.0}
    count = lambda rates: count_costs(module, refuse, rates, kernels=kernels)
    assert count(Rates(1e9, 1e9, 1e9, 10.0)).modelled_seconds == pytest.approx(10 + 1024e-9)
    slow = count(Rates(1e9, 1.0, 1e9, 1e9))
    assert slow.modelled_seconds == slow.seconds["HBM"] == slow.bytes


def test_collectives_take_the_links_that_they_can_use():
    """16 chips in a line: two groups of 8, of every second chip each, share its links, and groups
    of 4 neighbours have their own. Closed to a ring it carries twice as much for the large ones."""
    seconds = lambda **links: count_costs(
        Module(TPU_TEXT), refuse, Rates(1e9, 1e9, 1.0), **links
    ).seconds["links"]
    places = [(place,) for place in range(16)]
    assert seconds(network=Network(places, (False,))) == 5 * (256 * 7 / (1 / 2) + 192)
    assert seconds(network=Network(places, (True,))) == 5 * (256 * 7 / (2 / 2) + 192)
    assert seconds() == 5 * (256 * 7 + 192)  # behind a switch


def test_a_kernels_blocks_are_counted_as_often_as_they_change():
    """A grid of 8 x 2: 8 blocks of x that stay for two steps, 16 blocks of y and of the result; a
    vmap doubles all."""

    def multiply_blocks(x, y, out):
        out[...] = x[...] @ y[...]

    def run(x, y):
        call = pl.pallas_call(
            multiply_blocks,
            grid=(8, 2),
            in_specs=[
                pl.BlockSpec((32, 256), lambda i, j: (i, 0)),
                pl.BlockSpec((256, 128), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((32, 128), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32),
            name="blocks",
        )
        return jax.lax.scan(lambda x, _: (call(x, y), None), x, length=3)[0]

    x = jnp.ones((256, 256))
    each = 4 * (8 * 32 * 256 + 16 * 256 * 128 + 16 * 32 * 128)
    assert count_kernel_bytes(jax.make_jaxpr(jax.jit(run))(x, x).jaxpr) == {"blocks": each}
    several = jax.make_jaxpr(jax.vmap(run))(x[None] * jnp.ones((2, 1, 1)), jnp.ones((2, 256, 256)))
    assert count_kernel_bytes(several.jaxpr) == {"blocks": 2 * each}


def test_the_functions_of_a_loop_are_named_innermost_first():
    text = TPU_TEXT.replace("constant(12)", "iota()")  # the bound is no constant any more
    trips = lambda functions: 3.0 if functions == ("spin", "<module>") else refuse(functions)
    assert count_costs(Module(text), trips, RATES).flops == 3 * 3 * 2 * 16 * 32 * 64


def test_the_loops_of_one_function_are_counted_alone():
    """And programs that follow each other add up, each as often as it runs."""
    text = TPU_TEXT.replace("constant(12)", "iota()")
    count = lambda within: count_costs(
        Module(text), lambda functions: 3.0, Rates(1e9, 1.0, 1e9), within=within
    )
    whole, loop, nothing = count(""), count("spin"), count("walk")
    assert whole.bytes == loop.bytes + 8 and loop.flops == whole.flops
    assert nothing.flops == nothing.bytes == nothing.launches == 0
    both = add_costs({"once": (loop, 1), "often": (whole, 10)})
    assert both.bytes == loop.bytes + 10 * whole.bytes
    assert both.collectives["all-gather"].count == 11 * 3
    assert both.seconds["HBM"] == loop.seconds["HBM"] + 10 * whole.seconds["HBM"]


def test_sizes_of_arrays():
    size = lambda dtype, *dims: Array(dtype, dims, True).bytes
    assert [size("bf16", 3, 5), size("pred"), size("token")] == [30, 1, 0]
