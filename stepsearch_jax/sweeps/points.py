"""From sweep files to points: the training runs of a comparison, each with its config.

A sweep file defines `sweep(add)` and calls `add(method, overrides, seeds)` for every row of its
table: the row's name, the config keys that it changes, and the seeds of its runs.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from stepsearch_jax.addresses import hide_logins
from stepsearch_jax.run.config_file import call_file, define_config
from stepsearch_jax.run.folder import describe_difference, flatten, to_json


@dataclasses.dataclass(frozen=True)
class Point:
    """One training run.

    `name`: its folder's; `flags`: those after --config and --workdir; `config`: the contents of its
    config.json.
    """

    name: str
    flags: tuple[str, ...]
    config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of a table. `points`: seed -> run; methods with equal settings share their runs."""

    name: str
    overrides: Mapping[str, Any]
    points: Mapping[int, Point]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One table: the methods of a sweep file, in its order. `name`: the file's, without suffix."""

    name: str
    methods: tuple[Method, ...]


def load_sweeps(files: Sequence[str], config_file: str, common: Sequence[str]) -> list[Sweep]:
    """The sweeps of `files` over the config `config_file`.

    config_file: a path, with an argument after a colon if the file takes one. common: flags
    "--config.key=value" for all points. Methods with equal configs, in one file or in two, share
    one point, under its first name. Raises FileNotFoundError or ValueError, with file and method,
    for an unreadable file, a key that the config does not have or that is set twice, a value of the
    wrong type, and two different settings under one name.
    """
    by_name: dict[str, Point] = {}
    by_config: dict[str, Point] = {}
    # The keys that points may change; those of the command line cannot be swept.
    keys = _list_keys(_parse_config(config_file, ()))
    common_keys = [flag.removeprefix("--config.").partition("=")[0] for flag in common]
    _check_keys(common_keys, keys, "the command line", config_file)

    # One run of a method. An equal config is the same point; a name stands for one config.
    def make_point(method: str, overrides: Mapping[str, Any], seed: int, where: str) -> Point:
        name = f"{re.sub('[^a-z0-9]+', '-', method.lower()).strip('-')}-{seed}"
        point_flags = (
            *common,
            *(f"--config.{key}={value}" for key, value in overrides.items()),
            f"--config.seed={seed}",
        )
        try:
            config = to_json(_parse_config(config_file, point_flags))
        except flags.Error as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
        content = json.dumps(config, sort_keys=True)
        point = by_config.setdefault(content, Point(name, point_flags, config))
        if by_name.setdefault(name, point) is not point:
            difference = describe_difference(by_name[name].config, config)
            raise ValueError(
                f"{where}: another point is called {name} and has another config "
                f"({difference}): rename one"
            )
        return point

    # One file: checks every call of its add(), and makes the points.
    def load(file: str) -> Sweep:
        methods: list[Method] = []

        def add(method: str, overrides: Mapping[str, Any], seeds: Iterable[int]) -> None:
            where = f"{file}, {method!r}"
            if not _is_name(method):
                raise ValueError(
                    f"{where}: a method's name is one line of text, with letters or digits and "
                    "without |"
                )
            seeds = list(seeds)
            whole = all(type(seed) is int for seed in seeds)
            if not seeds or not whole or len(set(seeds)) < len(seeds):
                raise ValueError(
                    f"{where}: seeds are different whole numbers, at least one, not {seeds}"
                )
            if method in [known.name for known in methods]:
                raise ValueError(f"{where}: added twice; name all its seeds at once")
            _check_keys(overrides, keys, where, config_file)
            if twice := {*common_keys, "seed"} & set(overrides) | {"seed"} & set(common_keys):
                raise ValueError(
                    f"{where}: {sorted(twice)[0]} is set twice: seeds are an argument of add(), "
                    "and a key of the command line cannot be swept"
                )
            points = {seed: make_point(method, overrides, seed, where) for seed in seeds}
            methods.append(Method(method, hide_logins(overrides), points))

        _call_sweep(file, add)
        if not methods:
            raise ValueError(f"{file}: its sweep(add) adds nothing")
        return Sweep(pathlib.Path(file).stem, tuple(methods))

    sweeps = [load(file) for file in files]
    if len({sweep.name for sweep in sweeps}) < len(sweeps):
        raise ValueError(
            f"two sweep files have one name ({', '.join(files)}): rename one, or name it once"
        )
    return sweeps


def list_points(sweeps: Sequence[Sweep]) -> list[Point]:
    """Every different point, once, seed by seed, and within a seed in the order of the files.

    An interrupted sweep has runs of every method.
    """
    found: dict[str, tuple[int, Point]] = {}
    for sweep in sweeps:
        for method in sweep.methods:
            for n, point in enumerate(method.points.values()):
                found.setdefault(point.name, (n, point))
    return [point for _, point in sorted(found.values(), key=lambda pair: pair[0])]


def _is_name(method: object) -> bool:
    """Whether a method's name can be a cell of the table and part of a folder's name."""
    if not isinstance(method, str):
        return False
    return bool(re.search("[a-zA-Z0-9]", method)) and not re.search(r"[|\n]", method)


def _call_sweep(file: str, add) -> None:
    if not pathlib.Path(file).is_file():
        raise FileNotFoundError(f"there is no sweep file {file}")
    call_file(
        file,
        lambda module: module.sweep(add),
        "a sweep file defines sweep(add) and calls add(method, overrides, seeds)",
    )


def _parse_config(config_file: str, point_flags: Sequence[str]) -> ConfigDict:
    """The config that the training command makes from these flags.

    Raises flags.Error for a value of the wrong type.
    """
    arguments = ["sweep", f"--config={config_file}", *point_flags]
    values = flags.FlagValues()
    define_config(values, arguments)
    try:
        values(arguments)
    except flags.Error as error:
        if point_flags:
            raise
        raise ValueError(str(error).strip().splitlines()[-1]) from error
    return values.config


def _check_keys(wanted: Iterable[str], keys: set[str], where: str, config_file: str) -> None:
    for key in wanted:
        if key not in keys:
            raise ValueError(
                f"{where}: the config {config_file} has no key {key!r}; "
                "configs/base.py lists all of them"
            )


def _list_keys(config: ConfigDict) -> set[str]:
    return set(flatten(config.to_dict()))
