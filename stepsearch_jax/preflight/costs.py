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
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from stepsearch_jax.preflight.hlo import Array, Instruction, Module
from stepsearch_jax.preflight.network import Network, read_groups
from stepsearch_jax.preflight.traffic import FREE, Traffic

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Rates(NamedTuple):
    """Peak figures of a chip, each for one second."""

    flops: float
    hbm_bytes: float
    link_bytes: float  # over one link to another chip, in one direction
    cycles: float = 0.0  # of its clock; 0: its compiler estimates no cycles


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    count: float  # how often it runs
    bytes: float  # sent by one chip, over all runs


@dataclasses.dataclass(frozen=True)
class Costs:
    """One chip's share of a program.

    seconds: "compute", "HBM", "links" -> time in the loop bodies that this bounds (roofline model).
    modelled_seconds: by the compiler's own cost model, None if it has none: the cycles that it
    estimates for its own operations, and for collectives and Pallas kernels, of which it estimates
    nothing, the bytes that they move. A loop body takes at least its time in the roofline model.
    launches: operations that the chip starts, one after another.
    """

    flops: float
    bytes: float
    collectives: dict[str, Collective]
    seconds: dict[str, float]
    modelled_seconds: float | None
    launches: float


Trips = Callable[[tuple[str, ...]], float]
SWITCH = "_switch"  # the function that chooses a width, in rl/microbatches.py
ANYWHERE = Network(None)


def count_costs(
    module: Module,
    trips: Trips,
    rates: Rates,
    network: Network = ANYWHERE,
    kernels: Mapping[str, float] | None = None,
    within: str = "",
    widths: Sequence[float] = (),
) -> Costs:
    """Sums over the program, or over its loops that were written in the function `within`.

    trips(functions) -> how often a loop runs if the text does not say; functions: the Python
    functions in which the loop was written, innermost first. network: of the program's partitions.
    kernels: name of a Pallas kernel -> bytes that it moves in one run. widths: how often each
    branch runs where a program chooses the width of a micro-batch; of other conditionals all
    branches count.
    """
    return _Counter(module, trips, network, kernels or {}, widths).costs(rates, within)


def add_costs(parts: Mapping[str, tuple[Costs, float]]) -> Costs:
    """The sum of several programs, each (its costs, how often it runs)."""
    total = lambda of: sum(times * of(costs) for costs, times in parts.values())
    kinds = sorted({kind for costs, _ in parts.values() for kind in costs.collectives})
    none = Collective("", 0, 0)
    bounds = {bound for costs, _ in parts.values() for bound in costs.seconds}
    modelled = [costs.modelled_seconds for costs, _ in parts.values()]
    return Costs(
        flops=total(lambda costs: costs.flops),
        bytes=total(lambda costs: costs.bytes),
        collectives={
            kind: Collective(
                kind,
                total(lambda costs, kind=kind: costs.collectives.get(kind, none).count),
                total(lambda costs, kind=kind: costs.collectives.get(kind, none).bytes),
            )
            for kind in kinds
        },
        seconds={bound: total(lambda costs, bound=bound: costs.seconds[bound]) for bound in bounds},
        modelled_seconds=None if None in modelled else total(lambda c: c.modelled_seconds),
        launches=total(lambda costs: costs.launches),
    )


@dataclasses.dataclass(frozen=True)
class _Once:
    """One run of a computation, without the loops in it.

    collectives: (kind, bytes sent, links that carry them) each. kernel_bytes: the part of `bytes`
    that Pallas kernels move.
    """

    flops: float
    bytes: float
    collectives: list[tuple[str, float, float]]
    cycles: float
    kernel_bytes: float
    launches: int


class _Counter:
    """Counts what the instructions of one module do."""

    def __init__(
        self,
        module: Module,
        trips: Trips,
        network: Network,
        kernels: Mapping[str, float],
        widths: Sequence[float],
    ):
        self._module = module
        self._computations = module.computations
        self._trips = trips
        self._network = network
        self._kernels = kernels
        self._widths = widths
        self._traffic = Traffic(module, kernels)

    def costs(self, rates: Rates, within: str) -> Costs:
        """Sums over the program or the loops of a function.

        A loop body takes as long as the busiest of matrix units, memory and links: these three
        work at the same time, loop bodies one after another. Collectives of one body follow each
        other.
        """
        flops = bytes_moved = launches = modelled = 0.0
        seconds = dict.fromkeys(("compute", "HBM", "links"), 0.0)
        count, sent = defaultdict(float), defaultdict(float)
        for name, runs in self._runs(within).items():
            own = self._once[name]
            flops += runs * own.flops
            bytes_moved += runs * own.bytes
            launches += runs * own.launches
            for kind, size, _ in own.collectives:
                count[kind] += runs
                sent[kind] += runs * size
            times = {
                "compute": own.flops / rates.flops,
                "HBM": own.bytes / rates.hbm_bytes,
                "links": sum(size / links for _, size, links in own.collectives) / rates.link_bytes,
            }
            slowest = max(times, key=times.get)
            seconds[slowest] += runs * times[slowest]
            if rates.cycles:
                kernels = own.kernel_bytes / rates.hbm_bytes
                estimated = own.cycles / rates.cycles + kernels + times["links"]
                modelled += runs * max(estimated, times[slowest])
        collectives = {kind: Collective(kind, count[kind], sent[kind]) for kind in sorted(count)}
        return Costs(
            flops, bytes_moved, collectives, seconds, modelled if rates.cycles else None, launches
        )

    def _runs(self, within: str) -> dict[str, float]:
        """Computation -> how often it runs; those inside fusions are left out.

        within: the function whose loops count, with all that runs in them; "" for the program.
        """
        runs: dict[str, float] = defaultdict(float)

        def visit(name: str, times: float, counts: bool) -> None:
            if counts:
                runs[name] += times
            computation = self._computations[name]
            for i in computation.values():
                if i.opcode == "while":
                    stated = self._module.trip_count(i, computation)
                    functions = self._module.functions(i)
                    if stated is None:
                        stated = self._trips(functions)
                    visit(i.body, times * stated, counts or functions[:1] == (within,))
                elif i.opcode in ("call", "conditional", "async-start"):
                    for called, share in zip(i.called, self._shares(i)):
                        visit(called, times * share, counts)

        visit(self._module.entry, 1.0, not within)
        return runs

    def _shares(self, i: Instruction) -> Sequence[float]:
        """How often each computation runs that an instruction calls."""
        if i.opcode == "conditional" and len(i.called) == len(self._widths):
            if SWITCH in self._module.functions(i):
                return self._widths
        return [1.0] * len(i.called)

    @cached_property
    def _once(self) -> dict[str, _Once]:
        """Computation -> its costs in one run, without those of the loops in it."""
        return {name: self._count(name) for name in self._computations}

    def _count(self, name: str) -> _Once:
        computation = self._computations[name]
        own, inside = list(computation.values()), self._inside(name)
        kernels = [i for i in own if i.kernel in self._kernels]
        return _Once(
            flops=sum(map(self._flops, inside)),
            bytes=sum(self._traffic.count(i, computation) for i in own),
            collectives=[found for i in inside if (found := self._collective(i))],
            cycles=sum(i.estimated_cycles for i in own),
            kernel_bytes=sum(self._kernels[i.kernel] for i in kernels),
            launches=sum(map(_is_launched, own)),
        )

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

    def _collective(self, i: Instruction) -> tuple[str, float, float] | None:
        """-> (kind, bytes that one chip sends in a ring, links that carry them)."""
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
        groups = read_groups(i.attributes, self._module.partitions)
        size = self._module.partitions if groups is None else groups.shape[1]
        links = 1.0 if groups is None else self._network.links(groups)
        given = sum(self._module.home[i.name][name].result[0].bytes for name in i.operands)
        if kind == "collective-permute":
            return kind, given, links
        if kind == "all-gather":
            return kind, given * (size - 1), links
        share = given * (size - 1) / size
        if kind == "all-reduce" and "all-reduce-scatter" not in fusion:
            return kind, 2 * share, links  # a reduce-scatter and an all-gather
        return "reduce-scatter" if kind == "all-reduce" else kind, share, links

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


def _is_launched(i: Instruction) -> bool:
    return i.opcode == "fusion" or not (i.opcode in FREE or i.opcode.endswith("-done"))


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
