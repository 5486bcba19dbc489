"""The optimised program copies no layer's keys inside its decode loop.

Neither as an instruction of its own nor within a fusion.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from stepsearch_jax import sharding
from stepsearch_jax.models import transformer
from stepsearch_jax.preflight.hlo import Instruction, Module, find_root
from stepsearch_jax.rollout.programs import make_rollout

# One layer's K cache, 16 blocks x 8 x 2 x 32 x 32, has more elements than any other array of the
# program: any array as large holds a layer's keys or values.
ROWS, CONTEXT = 8, 512
CONFIG = dataclasses.replace(tiny.CONFIG, head_dim=32, attention_block=32)
SETTINGS = dataclasses.replace(tiny.SETTINGS, context=CONTEXT)
BLOCK = CONFIG.attention_block
BLOCKS = (CONFIG.num_layers, CONTEXT // BLOCK, ROWS)
CACHE = ("f32", (*BLOCKS, CONFIG.num_kv_heads, CONFIG.head_dim, BLOCK))  # keys
ACTION_MASK = ("pred", (ROWS, CONTEXT))
LAYER = math.prod(CACHE[1][1:])
TPU_ENVIRONMENT = dict(
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
# These may have a result of that size: names for something that exists already, and writes in
# place. XLA makes each copy that an in-place write needs an instruction of its own, which is seen.
WRITES = ("scatter", "dynamic-update-slice")
IN_PLACE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", *WRITES)


def carries(i: Instruction, *arrays: tuple[str, tuple[int, ...]]) -> bool:
    """Whether these arrays, (type, shape) each, are all among the instruction's results."""
    return {(array.dtype, array.dims) for array in i.result}.issuperset(arrays)


def reach(module: Module, instruction: Instruction) -> list[Instruction]:
    """Everything that runs within an instruction."""
    runs = lambda i: [name for name in (i.condition, i.body, *i.called) if name]
    pending, seen = runs(instruction), set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += [run for inner in module.computations[name].values() for run in runs(inner)]
    return [inner for name in seen for inner in module.computations[name].values()]


def find_loops(module: Module, *carried: tuple[str, tuple[int, ...]]) -> list[Instruction]:
    """The loops that carry all these arrays."""
    everything = (i for instructions in module.computations.values() for i in instructions.values())
    return [i for i in everything if i.opcode == "while" and carries(i, *carried)]


def find_innermost_loops(
    module: Module, *carried: tuple[str, tuple[int, ...]]
) -> list[Instruction]:
    """The loops that carry all these arrays, and hold no other loop that does."""
    loops = find_loops(module, *carried)
    return [loop for loop in loops if not any(inner in loops for inner in reach(module, loop))]


def find_copies(module: Module, loop: Instruction, layer: int = LAYER) -> list[Instruction]:
    """Instructions within the loop with a result as large as a layer's keys (elements) that is
    not written in place."""

    def in_place(i: Instruction) -> bool:
        if i.opcode in ("fusion", "call"):  # its result is that of the root inside
            return all(in_place(find_root(module.computations[name])) for name in i.called)
        return i.opcode in IN_PLACE

    return [
        i
        for i in reach(module, loop)
        if any(math.prod(array.dims) >= layer for array in i.result) and not in_place(i)
    ]


def compile_rollout() -> tuple[Module, Instruction]:
    """-> (the whole callback program, its decode loop): the innermost one that carries cache and
    action mask."""
    tiny.make_program.cache_clear()  # a fresh one: the tests below change what it calls
    compiled = tiny.compile_rollout(
        "callback", (1, 1, 1), tiny.make_prompts(ROWS), settings=SETTINGS, config=CONFIG
    )
    module = Module(compiled.as_text())
    (loop,) = find_innermost_loops(module, CACHE, ACTION_MASK)
    return module, loop


@pytest.mark.slow
def test_decode_loop_copies_no_layer():
    module, loop = compile_rollout()
    inside = reach(module, loop)
    # It is the right loop, and all of it: it holds the loop over layers, in it the loop over blocks
    # of the cache, and the writes to the cache.
    assert sum(i.opcode == "while" and carries(i, CACHE) for i in inside) >= 2
    assert sum(i.opcode in WRITES and carries(i, CACHE) for i in inside) >= 2
    assert not any(i.opcode == "custom-call" and "callback" in str(i) for i in inside)
    assert find_copies(module, loop) == []

    # The loop around it, over turns, prefills the observations: no copy there either.
    (outer,) = (around for around in find_loops(module) if loop in reach(module, around))
    assert find_copies(module, outer) == []
    assert any(i.opcode == "custom-call" and "callback" in str(i) for i in reach(module, outer))


@pytest.mark.slow
@pytest.mark.parametrize(
    "data,tensor,head_dim",
    [
        pytest.param(4, 1, 32, marks=pytest.mark.nightly),
        (2, 2, 64),
        pytest.param(4, 1, 128, marks=pytest.mark.nightly),
    ],
)
def test_no_loop_copies_a_layer_on_tpus(monkeypatch, data, tensor, head_dim):
    """The same program compiled for four chips of a TPU v5e, in bfloat16, without a TPU: heads
    that fill less than their lanes, just as much, and more."""
    pytest.importorskip(
        "libtpu", reason="compiling for TPUs needs libtpu: pip install -r requirements-ci.txt"
    )
    for name, value in TPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    config = dataclasses.replace(CONFIG, head_dim=head_dim, dtype=jnp.bfloat16)
    shape = (data, 1, tensor)
    here, shardings, _ = tiny.make_program("callback", shape, settings=SETTINGS, config=config)
    prompts, params = tiny.make_prompts(ROWS * data), tiny.make_params(config)
    key = jax.random.key(0)
    arguments = tiny.rollout_arguments(prompts, key, 1.0, here, shardings, params)
    there = sharding.make_mesh(*shape, devices=chips)
    specs = jax.tree.map(lambda place: place.spec, shardings)
    rollout = make_rollout(config, SETTINGS, there, specs, tiny.fake_search, "callback")

    def describe(x):
        spec = getattr(x.sharding, "spec", PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(there, spec))

    module = Module(rollout.lower(*jax.tree.map(describe, arguments)).compile().as_text())
    lanes = max(128, CONFIG.num_kv_heads // tensor * head_dim)
    cache = ("bf16", (*BLOCKS, BLOCK, lanes))
    (loop,) = find_innermost_loops(module, cache, ACTION_MASK)
    # Over layers, and in it over blocks of the cache.
    inside = reach(module, loop)
    assert sum(i.opcode == "while" and carries(i, cache) for i in inside) >= 2
    loops = find_loops(module, cache)
    assert len(loops) > 4  # those of decoding and of both prefills, and the one around them
    copies = {i.name: find_copies(module, i, math.prod(cache[1][1:])) for i in loops}
    assert not any(copies.values()), copies


def attend_whole_layer(q, cache, layer, rows, positions):
    """Attention that reads all of the layer's cache at once."""
    b, S, N, H = q.shape
    # [B, G, J, t, H]
    by_position = cache.k[layer].transpose(1, 2, 0, 4, 3), cache.v[layer].transpose(1, 2, 0, 3, 4)
    whole = (array.reshape(cache.rows, -1, cache.positions, H) for array in by_position)
    k, v = (array if rows is None else array[rows] for array in whole)
    scores = jnp.einsum("bsgnh,bgth->bgnst", q.reshape(b, S, k.shape[1], -1, H), k)
    seen = jnp.arange(k.shape[2]) <= positions[:, None, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
    return jnp.einsum("bgnst,bgth->bsgnh", weights, v).reshape(b, S, N, H)


def write_by_mask(cache, k, v, layer, rows, positions):
    """A write that builds the whole cache again."""
    L, J, B, _, t, _ = cache.v.shape
    at_position = jnp.arange(J * t)[:, None, None, None] == positions[..., None]
    here = (jnp.arange(B) == rows[..., None]) & at_position  # [J t, b, S, B]
    here = here.reshape(J, t, *here.shape[1:])
    in_layer = (jnp.arange(L) == layer)[:, None, None, None, None, None]
    mask = in_layer & here.any((2, 3)).transpose(0, 2, 1)[None, :, :, None, :, None]
    build = lambda array, new: jnp.where(
        mask, jnp.einsum("jtbsB,bsgh->jBgth", here.astype(array.dtype), new)[None], array
    )
    return cache.replace(k=build(cache.k.swapaxes(-1, -2), k).swapaxes(-1, -2), v=build(cache.v, v))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,fault", [("attend_cached", attend_whole_layer), ("write_cache", write_by_mask)]
)
def test_detector_sees_copies_in_the_program(monkeypatch, name, fault):
    monkeypatch.setattr(transformer, name, fault)
    module, loop = compile_rollout()
    assert find_copies(module, loop)


def test_detector_sees_copies_of_a_cond():
    """Decoding and prefill under one `cond`: what the two nested loops avoid."""
    zeros = jnp.zeros(CACHE[1])

    def decode(state):
        k, v, n = state
        k = k.at[n % 2, :, :, n].set(jnp.sin(k[:, :, :, 3].sum(0)))
        return k, v.at[n % 2, :, :, n].set(k[0, :, :, 5]), n + 1

    def read(state):
        k, v, n = state
        return v.at[:, 0, :, n].set(1.0), k.at[:, 1, :, n].set(n * 1.0), n + 1

    @jax.jit
    def run(k, v):
        return jax.lax.while_loop(
            lambda s: s[2] < 100,
            lambda s: jax.lax.cond(s[2] % 7 == 0, read, decode, s),
            (k, v, jnp.int32(0)),
        )

    module = Module(run.lower(zeros, zeros).compile().as_text())
    (loop,) = find_innermost_loops(module, CACHE)
    assert find_copies(module, loop)
