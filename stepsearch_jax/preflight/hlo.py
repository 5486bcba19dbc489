"""What a compiled program does on one chip, read from its optimised HLO with loop trip counts applied: arithmetic, memory traffic, collectives, time.

`compiled.cost_analysis()` counts the body of a loop once, and XLA for TPUs does not write trip counts into the text. Here the count of a loop comes from the
text (`known_trip_count`), else from the constant that its condition compares with; loops that end when the data says so are counted by the caller, who knows
them by the functions in which they were written.

Why the HLO and not the jaxpr: it is what one chip does after partitioning, with everything that is computed again or on several chips alike. Of the arithmetic
only dot products and convolutions count (TPUs have no other form of matrix product); for a program without loops that agrees with `cost_analysis`.
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

BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "fusion",
    "after-all",
    "partition-id",
    "replica-id",
    "async-start",
    "async-update",
    "opt-barrier",
}  # move nothing themselves; of fusions and calls the inside counts


class Array(NamedTuple):
    """One array of an instruction's result. in_hbm: it lives in the chip's main memory, not in a scratchpad."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * BYTES.get(self.dtype, 0)


class Instruction(NamedTuple):
    name: str
    opcode: str
    result: tuple[Array, ...]  # several for a tuple
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> list[str]:
        """Computations that run once when this instruction does. Of a conditional all branches: an upper bound."""
        names = re.findall(
            r"(?:calls|to_apply|called_computation|true_computation|false_computation)=%?([\w.-]+)",
            self.attributes,
        )
        for group in re.findall(
            r"(?:branch_computations|called_computations)=\{(.*?)\}", self.attributes
        ):
            names += [name.strip(" %") for name in group.split(",")]
        return names


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    count: float  # how often it runs
    bytes: float  # sent by one chip, over all runs


@dataclasses.dataclass(frozen=True)
class Costs:
    """One chip's share of a program. seconds: by what bounds each loop body, `roofline`."""

    flops: float
    bytes: float
    collectives: dict[str, Collective]
    seconds: dict[str, float]  # "compute", "HBM", "ICI": time spent in loop bodies that this bounds


class Rates(NamedTuple):
    """What a chip does at best a second."""

    flops: float
    hbm_bytes: float
    ici_bytes: float


_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


class Module:
    """A parsed program. trips(functions) -> how often a loop runs whose count the text does not tell; functions: the names of the Python functions in which it
    was written, innermost first."""

    def __init__(self, text: str, trips: Callable[[tuple[str, ...]], float]):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._trips = trips
        self._partitions = int((re.search(r"num_partitions=(\d+)", text) or "x1")[1])
        self._tables: dict[str, dict[int, str]] = {
            "FunctionNames": {},
            "FileLocations": {},
            "StackFrames": {},
        }
        table, current = None, {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                table = None
                if header[1]:
                    self.entry = header[2]
            elif found := _INSTRUCTION.match(line):
                instruction = _read(line, found)
                current[instruction.name] = instruction
            elif line in self._tables:
                table = self._tables[line]
            elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
                table[int(row[1])] = row[2]

    # ---- Loops

    def functions(self, instruction: Instruction) -> tuple[str, ...]:
        """The Python functions in which an instruction was written, innermost first, without the names of what encloses their definitions."""
        frame, names = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0), []
        while frame in self._tables["StackFrames"]:
            row = dict(re.findall(r"(\w+)=(\d+)", self._tables["StackFrames"][frame]))
            location = dict(
                re.findall(
                    r"(\w+)=(\d+)", self._tables["FileLocations"][int(row["file_location_id"])]
                )
            )
            names.append(
                self._tables["FunctionNames"][int(location["function_name_id"])]
                .strip('"')
                .split(".")[-1]
            )
            frame = int(row["parent_frame_id"]) - 1
        return tuple(names)

    def trip_count(self, loop: Instruction, computation: dict[str, Instruction]) -> float:
        if stated := loop.attribute(r"known_trip_count\D+(\d+)"):
            return int(stated)
        condition = self.computations[loop.attribute(r"condition=%?([\w.-]+)")]
        test = next(i for i in condition.values() if i.is_root)
        if test.opcode == "fusion":  # the comparison alone; its operands are the condition's
            inner = self.computations[test.called[0]]
            names = [
                i.name
                for i in sorted(
                    (i for i in inner.values() if i.opcode == "parameter"), key=_parameter_number
                )
            ]
            root = next(i for i in inner.values() if i.is_root)
            outside = dict(zip(names, test.operands))
            test = (
                root._replace(operands=tuple(outside.get(name, name) for name in root.operands))
                if root.opcode == "compare"
                else test
            )
        if test.opcode == "compare" and test.attribute(r"direction=(\w+)") == "LT":
            counter, bound = (condition.get(name) for name in test.operands)
            if (
                counter
                and bound
                and counter.opcode == "get-tuple-element"
                and bound.opcode == "constant"
            ):
                place = int(counter.attribute(r"index=(\d+)"))
                body = self.computations[loop.attribute(r"body=%?([\w.-]+)")]
                root = next(i for i in body.values() if i.is_root)
                step = body.get(root.operands[place]) if root.opcode == "tuple" else None
                steps = (
                    [_constant(body, name) for name in step.operands]
                    if step is not None and step.opcode == "add"
                    else []
                )
                start = computation.get(loop.operands[0])
                first = (
                    _constant(computation, start.operands[place])
                    if start is not None and start.opcode == "tuple"
                    else None
                )
                return math.ceil(
                    (int(bound.operands[0]) - (first or 0)) / next((n for n in steps if n), 1)
                )
        return self._trips(self.functions(loop))

    # ---- Costs

    def costs(self, rates: Rates) -> Costs:
        """Sums over the program. A loop body takes as long as the busiest of matrix units, memory and links: they work at the same time, bodies do not."""
        flops = bytes_moved = 0.0
        seconds = dict.fromkeys(("compute", "HBM", "ICI"), 0.0)
        count, sent = defaultdict(float), defaultdict(float)
        for name, runs in self._runs().items():
            f, b, ici = self._once[name]
            flops, bytes_moved = flops + runs * f, bytes_moved + runs * b
            for kind, n in ici:
                count[kind] += runs
                sent[kind] += runs * n
            times = {
                "compute": f / rates.flops,
                "HBM": b / rates.hbm_bytes,
                "ICI": sum(n for _, n in ici) / rates.ici_bytes,
            }
            slowest = max(times, key=times.get)
            seconds[slowest] += runs * times[slowest]
        return Costs(
            flops,
            bytes_moved,
            {kind: Collective(kind, count[kind], sent[kind]) for kind in sorted(count)},
            seconds,
        )

    def _runs(self) -> dict[str, float]:
        """How often each computation runs that is not part of a fusion."""
        runs: dict[str, float] = defaultdict(float)

        def visit(name: str, times: float) -> None:
            runs[name] += times
            computation = self.computations[name]
            for i in computation.values():
                if i.opcode == "while":
                    visit(i.attribute(r"body=%?([\w.-]+)"), times * self.trip_count(i, computation))
                elif i.opcode in ("call", "conditional", "async-start"):
                    for called in i.called:
                        visit(called, times)

        visit(self.entry, 1.0)
        return runs

    @cached_property
    def _once(self) -> dict[str, tuple[float, float, list[tuple[str, float]]]]:
        """Computation -> floating-point operations, bytes to and from memory, and (kind, bytes sent) of collectives, of one run without its inner loops."""
        return {
            name: (
                sum(map(self._flops, self._inside(name))),
                sum(self._traffic(i, computation) for i in computation.values()),
                [found for i in self._inside(name) if (found := self._collective(i))],
            )
            for name, computation in self.computations.items()
        }

    def _inside(self, name: str) -> list[Instruction]:
        """The instructions of a computation and of the fusions in it, at any depth."""
        found = list(self.computations[name].values())
        return found + [
            inner
            for i in found
            if i.opcode == "fusion"
            for called in i.called
            for inner in self._inside(called)
        ]

    def _operand(self, i: Instruction, number: int) -> Array:
        return self._home[i.name][i.operands[number]].result[0]

    @cached_property
    def _home(self) -> dict[str, dict[str, Instruction]]:
        """Instruction -> its computation. Names are unique within a module."""
        return {
            name: computation for computation in self.computations.values() for name in computation
        }

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
        # A collective that runs beside other work stands in every fusion that drives it; in one of them it starts.
        if (
            "chain_id" in i.attributes
            and fusion
            and not any(
                "AsyncCollectiveStart" in other.attributes
                for other in self.computations[fusion].values()
            )
        ):
            return None
        groups = i.attributes
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", groups):
            size = int(found[1])
        elif found := re.search(r"replica_groups=\{\{([\d,]+)\}", groups):
            size = len(found[1].split(","))
        else:
            size = self._partitions
        given = sum(self._home[i.name][name].result[0].bytes for name in i.operands)
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
        """Instruction -> the name of the fused computation that it stands in. XLA for TPUs calls a reduce-scatter a fusion of all-reduce and slice."""
        fused = {
            called
            for computation in self.computations.values()
            for i in computation.values()
            if i.opcode == "fusion"
            for called in i.called
        }
        return {name: called for called in fused for name in self.computations[called]}

    # ---- Memory traffic

    def _traffic(self, i: Instruction, computation: dict[str, Instruction]) -> float:
        """Bytes that one instruction reads from memory and writes to it. Slices and in-place writes touch what they name, not the whole array."""
        arrays = [computation[name].result for name in i.operands if name in computation]
        in_hbm = [len(a) == 1 and a[0].in_hbm for a in arrays]
        if i.opcode == "fusion":
            called = i.called[0]
            reads = sum(
                self._read_bytes(called, number) for number, hbm in enumerate(in_hbm) if hbm
            )
            return reads + sum(
                b for b, out in zip(self._written_bytes(called), i.result) if out.in_hbm
            )
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
        computation = self.computations[name]
        parameter = next(
            (
                i
                for i in computation.values()
                if i.opcode == "parameter" and _parameter_number(i) == number
            ),
            None,
        )
        return self._read_of(computation, parameter) if parameter else 0

    def _read_of(self, computation: dict[str, Instruction], source: Instruction) -> float:
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
        computation = self.computations[name]

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

        return written(next(i for i in computation.values() if i.is_root))


def _read(line: str, found: re.Match) -> Instruction:
    root, name, result, opcode = found.groups()
    depth, end = 1, found.end()
    while depth and end < len(line):  # the operands end where their bracket closes
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    inside = line[found.end() : end - 1]
    operands = (
        (inside,)
        if opcode in ("constant", "parameter")
        else tuple(re.findall(r"%([\w.-]+)", inside))
    )
    arrays = tuple(
        Array(
            kind, tuple(int(n) for n in sizes.split(",") if n), not re.search(r"S\(\d+\)", layout)
        )
        for kind, sizes, layout in _ARRAY.findall(result)
    )
    return Instruction(name, opcode, arrays, operands, line[end:], bool(root))


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    """The number behind a name, through copies of it; None where it is no constant."""
    value = computation.get(name)
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = computation.get(value.operands[0])
    return int(value.operands[0]) if value is not None and value.opcode == "constant" else None


def _parameter_number(i: Instruction) -> int:
    return int(i.operands[0])


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """2 x the multiplications of a convolution, those with padding and with holes between inputs left out: with these XLA spells batched matrix products."""
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
    products /= int(i.attribute(r"feature_group_count=(\d+)") or 1) * int(
        i.attribute(r"batch_group_count=(\d+)") or 1
    )
    for n, digit in enumerate(digits):
        stride, holes, spread, before = (
            pick("stride", n, "1"),
            pick("lhs_dilate", n, "1"),
            pick("rhs_dilate", n, "1"),
            pick("pad", n, "0_0"),
        )
        places = (
            np.arange(size(out, out_labels, digit))[:, None] * stride
            + np.arange(size(rhs, rhs_labels, digit)) * spread
            - before
        )
        products *= np.count_nonzero(
            (places >= 0)
            & (places <= (size(lhs, lhs_labels, digit) - 1) * holes)
            & (places % holes == 0)
        )
    return 2 * float(products)
