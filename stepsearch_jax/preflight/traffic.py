"""Bytes that the instructions of a compiled program move between a chip and its main memory."""

from __future__ import annotations

from collections.abc import Mapping

from stepsearch_jax.preflight.hlo import Instruction, Module, find_root, parameter_number

# These move nothing themselves; of fusions and calls the inside counts.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("while", "conditional", "call", "fusion", "async-start", "async-update", "async-done"),
    *("after-all", "partition-id", "replica-id"),
}
NAMES = ("bitcast", "get-tuple-element", "tuple", "opt-barrier")  # of what exists already
SLICES = ("dynamic-slice", "gather", "slice")
UPDATES = ("dynamic-update-slice", "scatter")


class Traffic:
    """Counts the bytes of one module's instructions.

    kernels: name of a Pallas kernel -> bytes that it moves in one run (`kernels.count_bytes`).
    """

    def __init__(self, module: Module, kernels: Mapping[str, float]):
        self._computations = module.computations
        self._kernels = kernels

    def count(self, i: Instruction, computation: dict[str, Instruction]) -> float:
        """Bytes that one instruction reads from memory and writes to it.

        Slices and in-place writes touch the part that they name, not the whole array.
        """
        if i.kernel in self._kernels:
            return self._kernels[i.kernel]
        arrays = [computation[name].result for name in i.operands if name in computation]
        in_hbm = [len(a) == 1 and a[0].in_hbm for a in arrays]
        if i.opcode == "fusion":
            called = i.called[0]
            written = zip(self._written(called), i.result)
            reads = sum(self._read(called, number) for number, hbm in enumerate(in_hbm) if hbm)
            return reads + sum(size for size, out in written if out.in_hbm)
        if i.opcode in FREE or i.opcode.endswith("-done"):
            return 0
        sizes = [a[0].bytes if hbm else 0 for a, hbm in zip(arrays, in_hbm)]
        if i.opcode in SLICES:
            return i.result[0].bytes * ((in_hbm[0] if in_hbm else 0) + i.result[0].in_hbm)
        if i.opcode in UPDATES:
            update = arrays[1 if i.opcode == "dynamic-update-slice" else -1][0]
            return 2 * update.bytes if i.result[0].in_hbm else 0
        if i.opcode == "copy-start":
            return sizes[0] + (i.result[0].bytes if i.result[0].in_hbm else 0)
        if i.opcode.endswith("-start"):  # its result names the operand as well
            return sum(sizes) + max((a.bytes for a in i.result if a.in_hbm), default=0)
        return sum(sizes) + sum(a.bytes for a in i.result if a.in_hbm)

    def _read(self, name: str, number: int) -> float:
        """Bytes that a fusion reads of its operand `number`."""
        return self._follow_parameter(name, number)[0]

    def _follow_parameter(self, name: str, number: int) -> tuple[float, bool]:
        computation = self._computations[name]
        parameters = (i for i in computation.values() if i.opcode == "parameter")
        parameter = next((i for i in parameters if parameter_number(i) == number), None)
        return self._follow(computation, parameter) if parameter else (0.0, False)

    def _follow(
        self, computation: dict[str, Instruction], source: Instruction
    ) -> tuple[float, bool]:
        """-> (bytes of `source` that its computation reads, whether it is among the results).

        `source` keeps its bytes under other names: behind bitcasts, and behind nested fusions that
        hold nothing else. What is read there is read of it.
        """
        total, returned = 0.0, source.is_root
        for user in computation.values():
            for place, operand in enumerate(user.operands):
                if operand != source.name:
                    continue
                renamed = user.opcode in NAMES
                if user.opcode in SLICES and place == 0:
                    total += user.result[0].bytes
                elif user.opcode in UPDATES and place == 0:
                    continue  # written in place
                elif user.opcode == "fusion":
                    read, renamed = self._follow_parameter(user.called[0], place)
                    total += read
                elif not renamed:
                    total += source.result[0].bytes
                if renamed:
                    read, passed = self._follow(computation, user)
                    total, returned = total + read, returned or passed
        return min(total, sum(array.bytes for array in source.result)), returned

    def _written(self, name: str) -> list[float]:
        """Bytes that a fusion writes to each of its results."""
        computation = self._computations[name]

        def written(i: Instruction) -> list[float]:
            if i.opcode == "tuple":
                return [b for operand in i.operands for b in written(computation[operand])[:1]]
            if i.opcode == "bitcast":
                return written(computation[i.operands[0]])
            if i.opcode == "fusion":
                return self._written(i.called[0])
            if i.opcode == "dynamic-update-slice":
                return [computation[i.operands[1]].result[0].bytes]
            if i.opcode == "scatter":
                return [computation[i.operands[-1]].result[0].bytes]
            return [a.bytes for a in i.result]

        return written(find_root(computation))
