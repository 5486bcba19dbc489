"""The optimised HLO text of a compiled program: computations, instructions, loop trip counts.

`compiled.cost_analysis()` counts the body of a loop once, and XLA for TPUs does not write trip
counts into the text. Here the count of a loop comes from the text (`known_trip_count`), else from
the constant that its condition compares with. Loops that end when the data says so have no count;
the caller knows them by the Python functions in which they were written.
"""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import NamedTuple

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


class Array(NamedTuple):
    """One array of an instruction's result. in_hbm: in main memory, not in a scratchpad."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * BYTES.get(self.dtype, 0)


class Instruction(NamedTuple):
    """One line of a computation."""

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
        """Computations that run once when this instruction does.

        Of a conditional all branches: an upper bound.
        """
        names = re.findall(
            r"(?:calls|to_apply|called_computation|true_computation|false_computation)=%?([\w.-]+)",
            self.attributes,
        )
        for group in re.findall(
            r"(?:branch_computations|called_computations)=\{(.*?)\}", self.attributes
        ):
            names += [name.strip(" %") for name in group.split(",")]
        return names

    @property
    def kernel(self) -> str:
        """The name of the Pallas kernel that this instruction runs, "" if it runs none."""
        if self.opcode != "custom-call" or "tpu_custom_call" not in self.attributes:
            return ""
        return re.sub(r"\.\d+$", "", self.name)

    @property
    def estimated_cycles(self) -> float:
        """What the compiler's cost model says of one run, 0 if it says nothing."""
        return float(self.attribute(r'"estimated_cycles":"?(\d+)') or 0)

    @property
    def condition(self) -> str | None:
        """The computation that a loop evaluates before each of its runs."""
        return self.attribute(r"condition=%?([\w.-]+)")

    @property
    def body(self) -> str | None:
        """The computation that a loop repeats."""
        return self.attribute(r"body=%?([\w.-]+)")


_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


class Module:
    """A parsed program. computations: name -> its instructions by name; entry: the first to run."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.partitions = int((re.search(r"num_partitions=(\d+)", text) or "x1")[1])
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
        """The Python functions in which an instruction was written, innermost first.

        A nested function has its own name only, without those of the functions around it.
        """
        numbers = lambda table, row: dict(re.findall(r"(\w+)=(\d+)", self._tables[table][row]))
        frame, names = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0), []
        while frame in self._tables["StackFrames"]:
            row = numbers("StackFrames", frame)
            location = numbers("FileLocations", int(row["file_location_id"]))
            name = self._tables["FunctionNames"][int(location["function_name_id"])]
            names.append(name.strip('"').split(".")[-1])
            frame = int(row["parent_frame_id"]) - 1
        return tuple(names)

    def trip_count(self, loop: Instruction, computation: dict[str, Instruction]) -> int | None:
        """How often a loop of this computation runs; None if the text does not say."""
        if stated := loop.attribute(r"known_trip_count\D+(\d+)"):
            return int(stated)
        condition = self.computations[loop.condition]
        test = self._comparison(condition)
        if test.opcode != "compare" or test.attribute(r"direction=(\w+)") != "LT":
            return None
        counter, bound = (condition.get(name) for name in test.operands)
        if not counter or counter.opcode != "get-tuple-element":
            return None
        if not bound or bound.opcode != "constant":
            return None

        # The body adds a constant to the counter, which starts at another one.
        place = int(counter.attribute(r"index=(\d+)"))
        body = self.computations[loop.body]
        root, steps, first = find_root(body), [], None
        step = body.get(root.operands[place]) if root.opcode == "tuple" else None
        if step is not None and step.opcode == "add":
            steps = [_constant(body, name) for name in step.operands]
        start = computation.get(loop.operands[0])
        if start is not None and start.opcode == "tuple":
            first = _constant(computation, start.operands[place])
        return math.ceil((int(bound.operands[0]) - (first or 0)) / next((n for n in steps if n), 1))

    def _comparison(self, condition: dict[str, Instruction]) -> Instruction:
        """The last instruction of a loop's condition.

        A fusion of a comparison alone counts as that comparison, with the condition's operands.
        """
        test = find_root(condition)
        if test.opcode != "fusion":
            return test
        inner = self.computations[test.called[0]]
        root = find_root(inner)
        if root.opcode != "compare":
            return test
        parameters = [i for i in inner.values() if i.opcode == "parameter"]
        names = [i.name for i in sorted(parameters, key=parameter_number)]
        outside = dict(zip(names, test.operands))
        return root._replace(operands=tuple(outside.get(name, name) for name in root.operands))

    @cached_property
    def home(self) -> dict[str, dict[str, Instruction]]:
        """Instruction -> its computation. Names are unique within a module."""
        return {
            name: computation for computation in self.computations.values() for name in computation
        }


def _read(line: str, found: re.Match) -> Instruction:
    root, name, result, opcode = found.groups()
    depth, end = 1, found.end()
    while depth and end < len(line):  # the operands end where their bracket closes
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    inside = line[found.end() : end - 1]
    if opcode in ("constant", "parameter"):  # its value or number
        operands = (inside,)
    else:
        operands = tuple(re.findall(r"%([\w.-]+)", inside))
    arrays = []
    for dtype, sizes, layout in _ARRAY.findall(result):
        dims = tuple(int(n) for n in sizes.split(",") if n)
        arrays.append(Array(dtype, dims, not re.search(r"S\(\d+\)", layout)))
    return Instruction(name, opcode, tuple(arrays), operands, line[end:], bool(root))


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    """The number behind a name, through copies of it; None where it is no constant."""
    value = computation.get(name)
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = computation.get(value.operands[0])
    return int(value.operands[0]) if value is not None and value.opcode == "constant" else None


def find_root(computation: dict[str, Instruction]) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(i for i in computation.values() if i.is_root)


def parameter_number(i: Instruction) -> int:
    return int(i.operands[0])
