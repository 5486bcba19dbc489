"""Bytes that the Pallas kernels of a program move, from the block specs of their calls.

The compiler's text says nothing of what such a kernel does inside.
"""

from __future__ import annotations

import math

import jax
import jax.extend
import numpy as np

MOST_STEPS = 1 << 20  # of a grid that is walked through; a larger one fetches each block anew


def count_kernel_bytes(jaxpr) -> dict[str, float]:
    """Name of each kernel in a jaxpr, or in one within it -> bytes that it moves in one run.

    Of several calls with the same name, the one that moves most.
    """
    found: dict[str, float] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            name = equation.params["name"] or equation.params["name_and_src_info"].name
            moved = _count_call(equation.params["grid_mapping"])
            found[name] = max(moved, found.get(name, 0.0))
            continue
        is_body = lambda value: _find_jaxpr(value) is not None
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_body):
            if (body := _find_jaxpr(inner)) is not None:
                for name, moved in count_kernel_bytes(body).items():
                    found[name] = max(moved, found.get(name, 0.0))
    return found


def _find_jaxpr(value):
    """The jaxpr that a parameter of an equation is or closes over, None for other values."""
    inner = getattr(value, "jaxpr", value)
    return inner if hasattr(inner, "eqns") else None


def _count_call(grid_mapping) -> float:
    """Bytes that the blocks of one call move to and from the chip's scratchpad.

    A block is moved when it is another than in the step of the grid before.
    """
    return sum(_count_blocks(mapping, grid_mapping) for mapping in grid_mapping.block_mappings)


def _count_blocks(mapping, grid_mapping) -> float:
    array, block = mapping.array_aval, mapping.transformed_block_aval
    itemsize = np.dtype(array.dtype).itemsize
    whole = math.prod(array.shape) * itemsize
    known = all(isinstance(size, int) for size in grid_mapping.grid)
    # Without blocks the kernel copies for itself what it needs, at most the array.
    if not known or "any" in str(block.memory_space).lower():
        return whole
    steps = math.prod(grid_mapping.grid)
    each = math.prod(block.shape) * itemsize
    # What is prefetched chooses the block when the kernel runs: supposed to be another each time.
    if grid_mapping.num_index_operands or steps > MOST_STEPS:
        return steps * each
    places = np.indices(grid_mapping.grid, dtype=np.int32).reshape(len(grid_mapping.grid), steps)
    choose = jax.vmap(jax.extend.core.jaxpr_as_fun(mapping.index_map_jaxpr), axis_size=steps)
    chosen = np.stack([np.broadcast_to(index, steps) for index in choose(*places)], axis=1)
    return each * (1 + int((chosen[1:] != chosen[:-1]).any(axis=1).sum()))
