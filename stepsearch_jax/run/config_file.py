"""The flag --config, and the user's Python files behind it: what is wrong with one is said in one
line, with its place.
"""

from __future__ import annotations

import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

flags.disclaim_key_flags()  # --config is the command's own, and stands in its --help

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
Result = TypeVar("Result")


def define_config(
    values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder:
    """Defines --config and --config.key. argv: where the keys that are set stand, if not in
    sys.argv.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "configs/X.py, with an argument after a colon where the file takes one; --config.key=value "
        "changes a key",
        flag_values=values,
        sys_argv=None if argv is None else list(argv),
    )
    values["config"].parser = _ConfigFile()
    return holder


class _ConfigFile(flags.ArgumentParser):
    def parse(self, argument: str) -> ml_collections.ConfigDict:
        return load_config(argument).lock()

    def flag_type(self) -> str:
        return "config file"


def find_configs() -> pathlib.Path:
    """The folder of this package's own configs: beside the package in a clone, within it where it
    is installed.
    """
    beside = PACKAGE.parent / "configs"
    return beside if (beside / "base.py").is_file() else PACKAGE / "configs"


def find_file(name: str) -> pathlib.Path:
    """A file or folder by its path; "configs/…" also names what this package brings along, wherever
    the command is run.
    """
    path = pathlib.Path(name)
    if (
        not path.exists()
        and path.parts[:1] == ("configs",)
        and (own := find_configs().joinpath(*path.parts[1:])).exists()
    ):
        return own
    return path


def load_config(name: str) -> ml_collections.ConfigDict:
    """What get_config() of a file returns. Raises ValueError.

    name: a file, or the bare name of one of this package's own configs (atlas_quickstart); with an
    argument after a colon where its get_config takes one. Within a config, `from configs import
    base` imports the package's own, wherever the command is run.
    """
    file, colon, argument = name.partition(":")
    path = find_file(file)
    if (
        not path.is_file()
        and file.isidentifier()
        and (own := find_configs() / f"{file}.py").is_file()
    ):
        path = own
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in find_configs().glob("[!_]*.py")))
        raise ValueError(
            f"there is no file {file or '(the name is empty)'}: name a config file, or one of this "
            f"package's own ({known})"
        )
    file = str(path)

    def get_config(module: ModuleType) -> ml_collections.ConfigDict:
        try:
            inspect.signature(module.get_config).bind(*[argument] * bool(colon))
        except TypeError:
            remedy = (
                f"leave :{argument} away"
                if colon
                else f"write {file}:ARGUMENT, and see the file for what it may be"
            )
            raise ValueError(
                f"{file} takes {'no' if colon else 'an'} argument after a colon: {remedy}"
            ) from None
        config = module.get_config(*[argument] * bool(colon))
        if not isinstance(config, ml_collections.ConfigDict):
            raise TypeError(f"get_config() returns {type(config).__name__}")
        return config

    return call_file(
        file,
        get_config,
        "a config defines get_config(), which returns a ConfigDict (launch/sweep.py takes sweep "
        "files)",
    )


def call_file(file: str, call: Callable[[ModuleType], Result], form: str) -> Result:
    """call(module) for a Python file of the user's. form: what such a file defines, for messages.

    Raises ValueError, with file and line, for whatever the file or the call raises; a ValueError
    that begins with the file's name goes through as it is.
    """
    path = pathlib.Path(file)
    _make_configs_importable()
    spec = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
    if spec is None:
        raise ValueError(f"{file} is no Python file (*.py); {form}")
    try:
        # where dataclasses look for their module
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return call(module)
    except Exception as error:  # whatever a file of the user's raises
        if isinstance(error, ValueError) and str(error).startswith(file):
            raise
        lines = [
            f", line {frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
            if pathlib.Path(frame.filename).resolve() == path.resolve()
        ]
        raise ValueError(
            f"{file}{lines[-1] if lines else ''}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}; {form}"
        ) from error


def _make_configs_importable() -> None:
    """Lets config files say `from configs import base`, whatever lies in the working directory."""
    folder = find_configs()
    if "configs" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "configs", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["configs"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
