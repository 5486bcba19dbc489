"""The optimised program copies no layer's keys inside its decode loop: neither as an instruction of its own nor within a fusion."""

import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from stepsearch_jax import sharding
from stepsearch_jax.models import transformer
from stepsearch_jax.rollout.programs import make_rollout

# One layer's K cache, 16 blocks x 8 x 2 x 32 x 32, has more elements than any other array of the program: whatever is as large holds a layer's keys or values.
ROWS, CONTEXT = 8, 512
CONFIG = dataclasses.replace(tiny.CONFIG, head_dim=32, attention_block=32)
SETTINGS = dataclasses.replace(tiny.SETTINGS, context=CONTEXT)
CACHE = (
    "f32",
    (
        CONFIG.num_layers,
        CONTEXT // CONFIG.attention_block,
        ROWS,
        CONFIG.num_kv_heads,
        CONFIG.head_dim,
        CONFIG.attention_block,
    ),
)  # keys
ACTION_MASK = ("pred", (ROWS, CONTEXT))
LAYER = math.prod(CACHE[1][1:])
TPU_ENVIRONMENT = dict(
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
# What may have a result of that size: names for something that exists already, and writes into it in place. XLA makes each copy that an in-place write
# needs an instruction of its own, so those are seen.
IN_PLACE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "scatter",
    "dynamic-update-slice",
}


class Instruction(NamedTuple):
    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the result; several for a tuple
    opcode: str
    calls: tuple[str, ...]  # other computations that it runs
    is_root: bool

    def carries(self, *arrays: tuple[str, tuple[int, ...]]) -> bool:
        return set(self.shapes).issuperset(arrays)


def parse(text: str) -> dict[str, list[Instruction]]:
    """Optimised HLO -> computation -> instructions."""
    computations, current = {}, None
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = computations.setdefault(header[1], [])
        elif instruction := re.match(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(", line):
            root, name, result, opcode = instruction.groups()
            shapes = tuple(
                (kind, tuple(int(n) for n in sizes.split(",") if n))
                for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", result)
            )
            attributes = line[instruction.end() :].split("metadata=")[0]
            called = re.findall(
                r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.-]+)", attributes
            )
            called += [
                name.strip(" %")
                for group in re.findall(r"branch_computations=\{(.*?)\}", attributes)
                for name in group.split(",")
            ]
            current.append(Instruction(name, shapes, opcode, tuple(called), bool(root)))
    return computations


def reach(
    computations: dict[str, list[Instruction]], instruction: Instruction
) -> list[Instruction]:
    """Everything that runs within an instruction."""
    pending, seen = list(instruction.calls), set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += [called for inner in computations[name] for called in inner.calls]
    return [inner for name in seen for inner in computations[name]]


def find_innermost_loops(
    computations: dict[str, list[Instruction]], *carried: tuple[str, tuple[int, ...]]
) -> list[Instruction]:
    """The loops that carry all these arrays, and hold no other loop that does."""
    loops = [
        i
        for instructions in computations.values()
        for i in instructions
        if i.opcode == "while" and i.carries(*carried)
    ]
    return [
        loop for loop in loops if not any(inner in loops for inner in reach(computations, loop))
    ]


def find_copies(
    computations: dict[str, list[Instruction]], loop: Instruction, layer: int = LAYER
) -> list[Instruction]:
    """Instructions within the loop with a result as large as a layer's keys (elements) that is not written in place."""

    def in_place(i: Instruction) -> bool:
        if i.opcode in (
            "fusion",
            "call",
        ):  # what is inside is looked at as well: the result counts as its root does
            return all(
                in_place(inner) for name in i.calls for inner in computations[name] if inner.is_root
            )
        return i.opcode in IN_PLACE

    return [
        i
        for i in reach(computations, loop)
        if any(math.prod(shape) >= layer for _, shape in i.shapes) and not in_place(i)
    ]


def compile_rollout() -> tuple[dict[str, list[Instruction]], Instruction]:
    """-> (computations of the whole callback program, its decode loop): the innermost one that carries cache and action mask."""
    tiny.make_program.cache_clear()  # a fresh one: the tests below change what it calls
    computations = parse(
        tiny.compile_rollout(
            "callback", (1, 1, 1), tiny.make_prompts(ROWS), settings=SETTINGS, config=CONFIG
        ).as_text()
    )
    (loop,) = find_innermost_loops(computations, CACHE, ACTION_MASK)
    return computations, loop


def test_decode_loop_copies_no_layer():
    computations, loop = compile_rollout()
    inside = reach(computations, loop)
    # It is the right loop, and all of it: it holds the loop over layers, in it the loop over blocks of the cache, and the writes to the cache.
    assert sum(i.opcode == "while" and i.carries(CACHE) for i in inside) >= 2
    assert (
        sum(i.opcode in ("scatter", "dynamic-update-slice") and i.carries(CACHE) for i in inside)
        >= 2
    )
    assert not any(i.opcode == "custom-call" and "callback" in str(i) for i in inside)
    assert find_copies(computations, loop) == []

    # The loop around it, over turns, prefills the observations: no copy there either.
    (outer,) = (
        i
        for instructions in computations.values()
        for i in instructions
        if i.opcode == "while" and loop in reach(computations, i)
    )
    assert find_copies(computations, outer) == []


@pytest.mark.slow
@pytest.mark.parametrize("data,tensor,head_dim", [(4, 1, 32), (2, 2, 64), (4, 1, 128)])
def test_no_loop_copies_a_layer_on_tpus(monkeypatch, data, tensor, head_dim):
    """The same program compiled for four chips of a TPU v5e, in bfloat16, without a TPU: heads that fill less than their lanes, just as much, and more."""
    pytest.importorskip(
        "libtpu", reason="compiling for TPUs needs libtpu: pip install -r requirements-ci.txt"
    )
    for name, value in TPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    config = dataclasses.replace(CONFIG, head_dim=head_dim, dtype=jnp.bfloat16)
    here, shardings, _ = tiny.make_program(
        "callback", (data, 1, tensor), settings=SETTINGS, config=config
    )
    arguments = tiny.rollout_arguments(
        tiny.make_prompts(ROWS * data),
        jax.random.key(0),
        1.0,
        here,
        shardings,
        tiny.make_params(config),
    )
    there = sharding.make_mesh(data, 1, tensor, devices=chips)
    rollout = make_rollout(
        config,
        SETTINGS,
        there,
        jax.tree.map(lambda s: s.spec, shardings),
        tiny.fake_search,
        "callback",
    )

    def describe(x):
        spec = getattr(x.sharding, "spec", PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(there, spec))

    computations = parse(rollout.lower(*jax.tree.map(describe, arguments)).compile().as_text())
    lanes = max(128, CONFIG.num_kv_heads // tensor * head_dim)
    cache = ("bf16", (*CACHE[1][:3], CONFIG.attention_block, lanes))
    (loop,) = find_innermost_loops(computations, cache, ACTION_MASK)
    assert (
        sum(i.opcode == "while" and i.carries(cache) for i in reach(computations, loop)) >= 2
    )  # over layers, and in it over blocks of the cache
    loops = [
        i
        for instructions in computations.values()
        for i in instructions
        if i.opcode == "while" and i.carries(cache)
    ]
    assert len(loops) > 4  # those of decoding and of both prefills, and the one around them
    assert {
        i.name: copies
        for i in loops
        if (copies := find_copies(computations, i, math.prod(cache[1][1:])))
    } == {}


def attend_whole_layer(q, cache, layer, rows, positions):
    """Attention that reads all of the layer's cache at once."""
    b, S, N, H = q.shape
    by_position = (
        cache.k[layer].transpose(1, 2, 0, 4, 3),
        cache.v[layer].transpose(1, 2, 0, 3, 4),
    )  # [B, G, J, t, H]
    whole = (array.reshape(cache.rows, -1, cache.positions, H) for array in by_position)
    k, v = (array if rows is None else array[rows] for array in whole)
    scores = jnp.einsum("bsgnh,bgth->bgnst", q.reshape(b, S, k.shape[1], -1, H), k)
    weights = jax.nn.softmax(
        jnp.where(jnp.arange(k.shape[2]) <= positions[:, None, None, :, None], scores, -1e30)
    )
    return jnp.einsum("bgnst,bgth->bsgnh", weights, v).reshape(b, S, N, H)


def write_by_mask(cache, k, v, layer, rows, positions):
    """A write that builds the whole cache anew."""
    L, J, B, _, t, _ = cache.v.shape
    here = (jnp.arange(B) == rows[..., None]) & (
        jnp.arange(J * t)[:, None, None, None] == positions[..., None]
    )  # [J t, b, S, B]
    here = here.reshape(J, t, *here.shape[1:])
    mask = (jnp.arange(L) == layer)[:, None, None, None, None, None] & here.any((2, 3)).transpose(
        0, 2, 1
    )[None, :, :, None, :, None]
    build = lambda array, new: jnp.where(
        mask, jnp.einsum("jtbsB,bsgh->jBgth", here.astype(array.dtype), new)[None], array
    )
    return cache.replace(k=build(cache.k.swapaxes(-1, -2), k).swapaxes(-1, -2), v=build(cache.v, v))


@pytest.mark.parametrize(
    "name,fault", [("attend_cached", attend_whole_layer), ("write_cache", write_by_mask)]
)
def test_detector_sees_copies_in_the_program(monkeypatch, name, fault):
    monkeypatch.setattr(transformer, name, fault)
    computations, loop = compile_rollout()
    assert find_copies(computations, loop)


def test_detector_sees_copies_of_a_cond():
    """Decoding and reading in under one `cond`: what the two nested loops avoid."""
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

    computations = parse(run.lower(zeros, zeros).compile().as_text())
    (loop,) = find_innermost_loops(computations, CACHE)
    assert find_copies(computations, loop)
