"""What a compiled program does on one chip: arithmetic, memory traffic, collectives and time.

Everything is counted as often as its loop runs. Why the HLO and not the jaxpr: it is what one chip
does after partitioning, including work that is recomputed or repeated on several chips. Of the
arithmetic only dot products and convolutions count (TPUs have no other form of matrix product);
for a program without loops that agrees with `compiled.cost_analysis()`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from stepsearch_jax.preflight.hlo import Array, Instruction, Module, find_root, parameter_number

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These move nothing themselves; of fusions and calls the inside counts.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("while", "conditional", "call", "fusion", "async-start", "async-update"),
    *("after-all", "partition-id", "replica-id"),
}


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    count: float  # how often it runs
    bytes: float  # sent by one chip, over all runs


@dataclasses.dataclass(frozen=True)
class Costs:
    """One chip's share of a program.

    seconds: "compute", "HBM", "ICI" -> time in the loop bodies that this bounds (roofline model).
    """

    flops: float
    bytes: float
    collectives: dict[str, Collective]
    seconds: dict[str, float]


class Rates(NamedTuple):
    """Peak figures of a chip, each for one second."""

    flops: float
    hbm_bytes: float
    ici_bytes: float


Trips = Callable[[tuple[str, ...]], float]


def count_costs(module: Module, trips: Trips, rates: Rates) -> Costs:
    """Sums over the program.

    trips(functions) -> how often a loop runs if the text does not say; functions: the Python
    functions in which the loop was written, innermost first.
    """
    return _Counter(module, trips).costs(rates)


class _Counter:
    """Counts what the instructions of one module do."""

    def __init__(self, module: Module, trips: Trips):
        self._module = module
        self._computations = module.computations
        self._trips = trips

    def costs(self, rates: Rates) -> Costs:
        """Sums over the program.

        A loop body takes as long as the busiest of matrix units, memory and links: these three
        work at the same time, loop bodies one after another.
        """
        flops = bytes_moved = 0.0
        seconds = dict.fromkeys(("compute", "HBM", "ICI"), 0.0)
        count, sent = defaultdict(float), defaultdict(float)
        for name, runs in self._runs().items():
            own_flops, own_bytes, collectives = self._once[name]
            flops += runs * own_flops
            bytes_moved += runs * own_bytes
            for kind, size in collectives:
                count[kind] += runs
                sent[kind] += runs * size
            times = {
                "compute": own_flops / rates.flops,
                "HBM": own_bytes / rates.hbm_bytes,
                "ICI": sum(size for _, size in collectives) / rates.ici_bytes,
            }
            slowest = max(times, key=times.get)
            seconds[slowest] += runs * times[slowest]
        collectives = {kind: Collective(kind, count[kind], sent[kind]) for kind in sorted(count)}
        return Costs(flops, bytes_moved, collectives, seconds)

    def _runs(self) -> dict[str, float]:
        """Computation -> how often it runs; those inside fusions are left out."""
        runs: dict[str, float] = defaultdict(float)

        def visit(name: str, times: float) -> None:
            runs[name] += times
            computation = self._computations[name]
            for i in computation.values():
                if i.opcode == "while":
                    stated = self._module.trip_count(i, computation)
                    if stated is None:
                        stated = self._trips(self._module.functions(i))
                    visit(i.body, times * stated)
                elif i.opcode in ("call", "conditional", "async-start"):
                    for called in i.called:
                        visit(called, times)

        visit(self._module.entry, 1.0)
        return runs

    @cached_property
    def _once(self) -> dict[str, tuple[float, float, list[tuple[str, float]]]]:
        """Computation -> its costs in one run, without those of the loops in it.

        The costs: floating-point operations, bytes to and from memory, (kind, bytes sent) of each
        collective.
        """
        return {
            name: (
                sum(map(self._flops, self._inside(name))),
                sum(self._traffic(i, computation) for i in computation.values()),
                [found for i in self._inside(name) if (found := self._collective(i))],
            )
            for name, computation in self._computations.items()
        }

    def _inside(self, name: str) -> list[Instruction]:
        """The instructions of a computation and of the fusions in it, at any depth."""
        found = list(self._computations[name].values())
        fused = [called for i in found if i.opcode == "fusion" for called in i.called]
        return found + [inner for called in fused for inner in self._inside(called)]

    def _operand(self, i: Instruction, number: int) -> Array:
        return self._module.home[i.name][i.operands[number]].result[0]

    def _flops(self, i: Instruction) -> float:
        if i.opcode == "dot":
            lhs = self._operand(i, 0).dims
            contracted = (i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",")
            return 2 * math.prod(i.result[0].dims) * math.prod(lhs[int(d)] for d in contracted if d)
        if i.opcode == "convolution":
            return _convolution_flops(i, self._operand(i, 0).dims, self._operand(i, 1).dims)
        return 0

    def _collective(self, i: Instruction) -> tuple[str, float] | None:
        """-> (kind, bytes that one chip sends in a ring)."""
        kind = i.opcode.removesuffix("-start")
        fusion = self._fusion_of.get(i.name, "")
        if kind not in COLLECTIVES:
            return None
        # A collective that runs beside other work is part of every fusion that drives it. Only the
        # fusion that starts it counts.
        if "chain_id" in i.attributes and fusion:
            others = self._computations[fusion].values()
            if not any("AsyncCollectiveStart" in other.attributes for other in others):
                return None
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", i.attributes):
            size = int(found[1])
        elif found := re.search(r"replica_groups=\{\{([\d,]+)\}", i.attributes):
            size = len(found[1].split(","))
        else:
            size = self._module.partitions
        given = sum(self._module.home[i.name][name].result[0].bytes for name in i.operands)
        if kind == "collective-permute":
            return kind, given
        if kind == "all-gather":
            return kind, given * (size - 1)
        share = given * (size - 1) / size
        if kind == "all-reduce" and "all-reduce-scatter" not in fusion:
            return kind, 2 * share  # a reduce-scatter and an all-gather
        return "reduce-scatter" if kind == "all-reduce" else kind, share

    @cached_property
    def _fusion_of(self) -> dict[str, str]:
        """Instruction -> the name of the fused computation that it is part of.

        XLA for TPUs writes a reduce-scatter as a fusion of all-reduce and slice, and names it so.
        """
        everything = (
            i for computation in self._computations.values() for i in computation.values()
        )
        fused = {called for i in everything if i.opcode == "fusion" for called in i.called}
        return {name: called for called in fused for name in self._computations[called]}

    # ---- Memory traffic

    def _traffic(self, i: Instruction, computation: dict[str, Instruction]) -> float:
        """Bytes that one instruction reads from memory and writes to it.

        Slices and in-place writes touch the part that they name, not the whole array.
        """
        arrays = [computation[name].result for name in i.operands if name in computation]
        in_hbm = [len(a) == 1 and a[0].in_hbm for a in arrays]
        if i.opcode == "fusion":
            called = i.called[0]
            written = zip(self._written_bytes(called), i.result)
            reads = sum(
                self._read_bytes(called, number) for number, hbm in enumerate(in_hbm) if hbm
            )
            return reads + sum(size for size, out in written if out.in_hbm)
        if i.opcode in FREE or i.opcode.endswith("-done"):
            return 0
        sizes = [a[0].bytes if hbm else 0 for a, hbm in zip(arrays, in_hbm)]
        if i.opcode in ("dynamic-slice", "gather"):
            return i.result[0].bytes * ((in_hbm[0] if in_hbm else 0) + i.result[0].in_hbm)
        if i.opcode == "dynamic-update-slice":
            return 2 * arrays[1][0].bytes if i.result[0].in_hbm else 0
        if i.opcode == "scatter":
            return 2 * arrays[-1][0].bytes if i.result[0].in_hbm else 0
        if i.opcode == "copy-start":
            return sizes[0] + (i.result[0].bytes if i.result[0].in_hbm else 0)
        if i.opcode.endswith("-start"):  # its result names the operand as well
            return sum(sizes) + max((a.bytes for a in i.result if a.in_hbm), default=0)
        return sum(sizes) + sum(a.bytes for a in i.result if a.in_hbm)

    def _read_bytes(self, name: str, number: int) -> float:
        """Bytes that a fusion reads of its operand `number`."""
        computation = self._computations[name]
        parameters = (i for i in computation.values() if i.opcode == "parameter")
        parameter = next((i for i in parameters if parameter_number(i) == number), None)
        return self._read_of(computation, parameter) if parameter else 0

    def _read_of(self, computation: dict[str, Instruction], source: Instruction) -> float:
        """Bytes of `source` that the other instructions of its computation read."""
        total = 0.0
        for user in computation.values():
            for place, operand in enumerate(user.operands):
                if operand != source.name:
                    continue
                if user.opcode in ("dynamic-slice", "gather") and place == 0:
                    total += user.result[0].bytes
                elif user.opcode in ("dynamic-update-slice", "scatter") and place == 0:
                    continue  # written in place
                elif user.opcode == "bitcast":
                    total += self._read_of(computation, user)
                elif user.opcode == "fusion":
                    total += self._read_bytes(user.called[0], place)
                else:
                    total += source.result[0].bytes
        return min(total, source.result[0].bytes)

    def _written_bytes(self, name: str) -> list[float]:
        """Bytes that a fusion writes to each of its results."""
        computation = self._computations[name]

        def written(i: Instruction) -> list[float]:
            if i.opcode == "tuple":
                return [b for operand in i.operands for b in written(computation[operand])[:1]]
            if i.opcode == "bitcast":
                return written(computation[i.operands[0]])
            if i.opcode == "fusion":
                return self._written_bytes(i.called[0])
            if i.opcode == "dynamic-update-slice":
                return [computation[i.operands[1]].result[0].bytes]
            if i.opcode == "scatter":
                return [computation[i.operands[-1]].result[0].bytes]
            return [a.bytes for a in i.result]

        return written(find_root(computation))


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """2 x the multiplications of a convolution, without those with padding and with holes.

    Padding and holes between inputs (lhs_dilate) are how XLA writes batched matrix products.
    """
    labels = i.attribute(r"dim_labels=([\w>-]+)")
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", labels)
    out = i.result[0].dims
    size = lambda dims, names, label: dims[names.index(label)]
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", i.attribute(r"window=\{(.*?)\}") or ""))
    digits = sorted(label for label in lhs_labels if label.isdigit())
    pick = lambda key, n, default: int(
        (window[key].split("x")[n] if key in window else default).split("_")[0]
    )
    products = size(lhs, lhs_labels, "b") * size(out, out_labels, "f") * size(lhs, lhs_labels, "f")
    feature_groups = int(i.attribute(r"feature_group_count=(\d+)") or 1)
    batch_groups = int(i.attribute(r"batch_group_count=(\d+)") or 1)
    products /= feature_groups * batch_groups
    for n, digit in enumerate(digits):
        stride, padding = pick("stride", n, "1"), pick("pad", n, "0_0")
        holes, spread = pick("lhs_dilate", n, "1"), pick("rhs_dilate", n, "1")
        outputs = np.arange(size(out, out_labels, digit))
        offsets = np.arange(size(rhs, rhs_labels, digit))
        # Where each kernel element of each output reads; real inputs are `holes` apart.
        places = outputs[:, None] * stride + offsets * spread - padding
        last = (size(lhs, lhs_labels, digit) - 1) * holes
        products *= np.count_nonzero((places >= 0) & (places <= last) & (places % holes == 0))
    return 2 * float(products)
