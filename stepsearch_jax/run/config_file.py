"""The flag --config, and the Python files that it names; errors in them take one line, with file
and line number.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeVar

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

flags.disclaim_key_flags()  # --config belongs to the command, which shows it in its --help

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
Result = TypeVar("Result")


def define_config(
    values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder:
    """Defines --config and --config.key. argv: the arguments that set keys; None: sys.argv."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "configs/X.py; append :ARGUMENT if it takes one; --config.key=value sets a key",
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
    """The folder of this package's configs: beside it in a clone, inside it if installed."""
    beside = PACKAGE.parent / "configs"
    return beside if (beside / "base.py").is_file() else PACKAGE / "configs"


def find_file(name: str) -> pathlib.Path:
    """A file or folder by its path; "configs/…" also names this package's own, in any folder."""
    path = pathlib.Path(name)
    if not path.exists() and path.parts[:1] == ("configs",):
        own = find_configs().joinpath(*path.parts[1:])
        return own if own.exists() else path
    return path


def load_config(name: str) -> ml_collections.ConfigDict:
    """What get_config() of a file returns. Raises ValueError for all that is wrong with the file.

    name: a file, or the bare name of one of this package's configs (atlas_quickstart); followed by
    a colon and an argument if its get_config takes one. Inside a config, `from configs import base`
    imports this package's own, in any working directory. A name that ends in .json is a file that a
    run wrote, its config.json.
    """
    if name.endswith(".json"):
        return _read_saved(epath.Path(name))
    # The file, or this package's own config of that name.
    file, colon, argument = name.partition(":")
    path = find_file(file)
    if not path.is_file() and file.isidentifier():
        own = find_configs() / f"{file}.py"
        path = own if own.is_file() else path
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in find_configs().glob("[!_]*.py")))
        raise ValueError(
            f"there is no file {file or '(the name is empty)'}: name a config file, or one of this "
            f"package's own ({known})"
        )
    file = str(path)

    # get_config takes as many arguments as stand after the name, and returns a ConfigDict.

    def get_config(module: ModuleType) -> ml_collections.ConfigDict:
        try:
            inspect.signature(module.get_config).bind(*[argument] * bool(colon))
        except TypeError:
            append = f"write {file}:ARGUMENT; the file says which arguments there are"
            remedy = f"leave :{argument} away" if colon else append
            raise ValueError(
                f"{file} takes {'no' if colon else 'an'} argument after a colon: {remedy}"
            ) from None
        config = module.get_config(*[argument] * bool(colon))
        if not isinstance(config, ml_collections.ConfigDict):
            raise TypeError(f"get_config() returns {type(config).__name__}")
        return config

    form = "a config defines get_config(), which returns a ConfigDict (launch/sweep.py takes sweep"
    return call_file(file, get_config, f"{form} files)")


def _read_saved(path: epath.Path) -> ml_collections.ConfigDict:
    """The config that a run wrote. Raises ValueError for a file of another kind or version."""
    config = load_config(str(find_configs() / "base.py"))
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        _fill(config, saved)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path} is no config of this version ({' '.join(str(error).split())}): give --config"
        ) from error
    return config


def _fill(config: ml_collections.ConfigDict, saved: dict) -> None:
    """Sets the keys of a config to those of config.json, which has lists for tuples."""
    for key, value in saved.items():
        if isinstance(config[key], ml_collections.ConfigDict):
            _fill(config[key], value)
        else:
            config[key] = _as_tuples(value)


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def call_file(file: str, call: Callable[[ModuleType], Result], form: str) -> Result:
    """call(module) for a Python file of the user's. form: what such a file defines, for messages.

    Raises ValueError, with file and line, for any error in the file or the call. A ValueError whose
    message begins with the file's name passes unchanged.
    """
    path = pathlib.Path(file)
    _make_configs_importable()
    spec = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
    if spec is None:
        raise ValueError(f"{file} is no Python file (*.py); {form}")
    try:
        # dataclasses look for their module here
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return call(module)
    except Exception as error:  # a user's file can raise anything
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
    """Lets config files say `from configs import base` in any working directory."""
    folder = find_configs()
    if "configs" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "configs", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["configs"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
