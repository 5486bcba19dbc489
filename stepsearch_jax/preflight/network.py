"""The links between chips, and which of them a collective can use at once.

A chip sends over the links along those axes of the slice that its group spans. Along an axis that
closes to a ring it sends both ways at once; along one that does not, the chips at the ends have one
link only, and the others wait for them. Groups that lie across each other share their links.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np


class Network:
    """The chips of a slice in a grid, or behind a switch, in the order of a program's partitions.

    coords: place of each chip in the grid [chips, axes], None behind a switch. rings: per axis,
    whether its last chip is also linked to the first.
    """

    def __init__(self, coords: Sequence[Sequence[int]] | None, rings: Sequence[bool] = ()):
        self._coords = None if coords is None else np.array(coords)
        self._rings = rings
        self._known: dict[tuple, float] = {}

    def links(self, groups: np.ndarray) -> float:
        """How many links one chip can send over while these groups all exchange, above 0.

        groups: partitions, [groups, members]. Behind a switch it is 1.
        """
        if self._coords is None or groups.shape[1] == 1:
            return 1.0
        key = groups.shape, groups.tobytes()
        if key not in self._known:
            self._known[key] = self._count_links(groups)
        return self._known[key]

    def _count_links(self, groups: np.ndarray) -> float:
        return sum(self._links_along(axis, groups) for axis in range(self._coords.shape[1])) or 1.0

    def _links_along(self, axis: int, groups: np.ndarray) -> float:
        """The links of one chip along an axis, divided among the groups that use the same ones."""
        size = self._coords[:, axis].max() + 1
        users: dict[tuple, np.ndarray] = {}  # line of chips -> groups at each of its links
        links = math.inf
        for places in self._coords[groups]:  # [members, axes]
            lines: dict[tuple, list[int]] = {}
            for place in places:
                lines.setdefault(tuple(np.delete(place, axis)), []).append(place[axis])
            for line, members in lines.items():
                members = sorted(members)
                first, last = members[0], members[-1]
                if first == last:
                    continue
                # Around the ring, if its open end is no wider than the steps between members.
                closes = (
                    self._rings[axis] and size > 2 and size - last + first <= max(np.diff(members))
                )
                links = min(links, 2 if closes else 1)
                used = users.setdefault(line, np.zeros(size, int))
                used[slice(None) if closes else slice(first, last)] += 1
        return float(links / max(used.max() for used in users.values())) if users else 0.0


def read_groups(attributes: str, partitions: int) -> np.ndarray | None:
    """The groups of partitions within which a collective works, [groups, members].

    None if its attributes name no groups, as those of a collective-permute. All forms of XLA's text
    are read: {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), and meshes such as mesh['a'=2,'b'=4] {'a'} with the
    axes along which a group lies, parts of axes in the form 'b':(1)2.
    """
    if "replica_groups=" not in attributes:
        return None
    text = attributes.split("replica_groups=", 1)[1]
    if found := re.match(r"\[([\d,]+)\]<=", text):
        shape = _numbers(found[1])
        return _read_order(text[found.end() :], partitions).reshape(shape)
    if found := re.match(r"\{(\{[\d,{}]*\})\}", text):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
        return np.array(groups)
    if re.match(r"@?mesh", text):
        return _read_mesh(text, partitions)
    return np.arange(partitions)[None]  # {}: all of them


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _read_order(text: str, partitions: int) -> np.ndarray:
    """The partitions in the order of [4,2]T(1,0): counted up, reshaped and transposed."""
    found = re.match(r"\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not found:
        return np.arange(partitions)
    grid = np.arange(math.prod(_numbers(found[1]))).reshape(_numbers(found[1]))
    return (grid.transpose(_numbers(found[2])) if found[2] else grid).reshape(-1)


def _read_mesh(text: str, partitions: int) -> np.ndarray:
    """mesh['a'=2,'b'=4] {'a'}; the order of its devices may stand behind it, in brackets."""
    found = re.match(r"@?mesh[\[<](.*?)[\]>]\s*(?:,\s*device_ids=)?(\(.*?\)\)|\([\d,]+\))?", text)
    axes = re.findall(r"['\"]?([\w.-]+)['\"]?=(\d+)", found[1])
    listed = re.match(r"\s*,?\s*\{(.*?)\}", text[found.end() :])
    order = found[2] or ""
    devices = np.array(_numbers(order)) if re.match(r"\(\d", order) else None
    if devices is None:
        devices = _read_order(order, partitions)

    # Each axis in three parts: before the part along which a group lies, that part, and after it.
    parts = {}
    for name, first, size in re.findall(
        r"['\"]?([\w.-]+)['\"]?(?::\((\d+)\)(\d+))?", listed[1] if listed else ""
    ):
        parts[name] = (int(first), int(size)) if size else (1, dict(axes)[name])
    shape, inner = [], []
    for name, size in axes:
        first, own = parts.get(name, (1, 1))
        shape += [first, int(own), int(size) // first // int(own)]
        inner.append(len(shape) - 2)
    outer = [axis for axis in range(len(shape)) if axis not in inner]
    members = math.prod(shape[axis] for axis in inner)
    return devices.reshape(shape).transpose(outer + inner).reshape(-1, members)
