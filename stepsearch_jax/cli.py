"""The command line of all commands: flags, logging, and errors in one line.

Loads no library, so that signals are heard from the first moment (`signals.listen`), and without
jax, so that --help and wrong flags are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import logging
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from stepsearch_jax import __version__, signals
from stepsearch_jax.addresses import hide_login
from stepsearch_jax.files import (
    CONFIG_FILE,
    WriteError,
    check_buckets,
    describe_disk_fault,
    find_disk_fault,
)
from stepsearch_jax.search.watchdog import EXIT_CODE

if TYPE_CHECKING:
    import ml_collections

logger = logging.getLogger("stepsearch_jax")

# Commands of `stepsearch` -> what --help says; each is the module or package stepsearch_jax.NAME.
COMMANDS = {
    "train": "train a policy to search, or resume a run",
    "evaluate": "evaluate a run or a pretrained model on one split or on several data sets",
    "ask": "ask a policy a question and watch it search",
    "export": "write a run's policy as a Hugging Face folder",
    "report": "write a run's report.html again",
    "serve": "serve a search index over HTTP, in the form of Search-R1's /retrieve",
    "prepare": "audit a data set, write search keys, build a search index",
    "preflight": "compute, without a TPU, whether a run fits a TPU slice and its best speed",
    "benchmark": "time parts of this package beside others",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command: `stepsearch COMMAND …` is `python -m stepsearch_jax.COMMAND …`."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = OneLineParser(
        "stepsearch",
        description="Trains language models to search, with a reward at every search step.",
        allow_abbrev=False,
        epilog=f"commands:\n{lines}\n\n`stepsearch COMMAND --help` shows its flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stepsearch {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    parser.add_argument("arguments", metavar="…", nargs=argparse.REMAINDER, help="its arguments")
    if arguments is None:
        begin_command()
        if not sys.argv[1:]:
            parser.print_help()
            raise SystemExit(2)
    options = parser.parse_args(arguments)
    sys.argv[1:] = options.arguments
    runpy.run_module(f"stepsearch_jax.{options.command}", run_name="__main__", alter_sys=True)


def begin_command() -> None:
    """The first thing that a command does: it hears signals, and can print any text anywhere."""
    signals.listen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a C locale it would refuse all but ASCII
            stream.reconfigure(errors="backslashreplace")


class OneLineParser(argparse.ArgumentParser):
    """Ends with one line and status 2 for flags that are missing or no good."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"stepsearch_jax: {hide_login(message)}; --help lists the flags\n")


def make_parser(command: str, text: str, *common: str) -> argparse.ArgumentParser:
    """The parser of `python -m stepsearch_jax.COMMAND`.

    text: what --help shows. common: which of the flags config, workdir and json the command has;
    run: workdir, and a config that is by default the run's own; policy: the same, where a config
    that names a policy needs no workdir.
    """
    parser = OneLineParser(
        f"python -m stepsearch_jax.{command}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    of_run = "run" in common or "policy" in common
    if of_run or "config" in common:
        default = f" (default: DIR/{CONFIG_FILE}, the config of the run)" if of_run else ""
        parser.add_argument(
            "--config",
            required=not of_run,
            metavar="FILE",
            help="configs/X.py, or the name of one of this package's configs, such as "
            "atlas_quickstart; append :ARGUMENT if it takes one; --config.KEY=VALUE sets a key"
            + default,
        )
    if of_run or "workdir" in common:
        parser.add_argument(
            "--workdir",
            required="policy" not in common,
            type=_name_folder,
            metavar="DIR",
            help="folder of the run, also gs://…"
            + ("; a run that it holds is resumed" if command == "train" else ""),
        )
    if "json" in common:
        parser.add_argument(
            "--json", type=name_path, metavar="FILE", help="also write the figures to this file"
        )
    return parser


def _name_folder(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it names no folder")
    return text


def name_path(text: str) -> pathlib.Path:
    """A file or folder, as a type of argparse; an empty name would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a file or folder")
    return pathlib.Path(text)


def parse_flags(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The flags; `config`, if the command has it, is the config with all --config.KEY=VALUE set.

    Raises SystemExit for wrong flags.
    """
    if arguments is None:
        begin_command()
    options, rest = parser.parse_known_args(arguments)
    from etils import epath

    if {"config", "workdir"} <= vars(options).keys() and options.config is None:
        if options.workdir is None:
            parser.error("give the --workdir of a run, or a --config that names a policy")
        try:
            check_buckets(options.workdir)
        except ValueError as error:
            parser.error(str(error))
        options.config = str(epath.Path(options.workdir) / CONFIG_FILE)
        if not epath.Path(options.config).exists():
            parser.error(f"there is no {options.config}: give --config")
    if getattr(options, "config", None) is not None:
        options.config = read_config(parser, options.config, rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def read_config(
    parser: argparse.ArgumentParser, file: str, overrides: Sequence[str]
) -> ml_collections.ConfigDict:
    """The config of --config=FILE with all --config.key=value in `overrides` set.

    Raises SystemExit, with one line, for a config that cannot be read or refuses its argument, for
    keys that it does not have, and for any other argument.
    """
    from absl import flags

    from stepsearch_jax.run.config_file import define_config

    argv = [parser.prog, f"--config={file}", *overrides]
    values = flags.FlagValues()
    try:
        define_config(values, argv)
        values.set_gnu_getopt()  # a stray argument does not hide the flags behind it
        _, *stray = values(argv)
    except flags.Error as error:  # its last line is the config's own message
        raise _end(str(error).strip().splitlines()[-1]) from error
    except (AttributeError, KeyError) as error:
        # ml_collections names only the missing part of the key: find the flag that it is from.
        missing = set(re.findall(r"\w+", str(error)))
        unknown = [
            argument
            for argument in argv
            if argument.lstrip("-").startswith("config.")
            and missing & set(argument.split("=")[0].split("."))
        ]
        if not unknown:
            raise
        raise _end(
            f"{unknown[0]}: the config has no such key; configs/base.py lists all of them"
        ) from error
    except (TypeError, ValueError) as error:  # of ml_collections: a key below a value, or no key
        given = " ".join(overrides)
        raise _end(f"one of {given} sets nothing ({error}); write --config.key=value") from error
    if stray:
        raise _end(f"unexpected argument {stray[0]}; write --config.key=value")
    return values.config


def _end(message: str) -> SystemExit:
    """Ends a command with one line, which shows no password."""
    return SystemExit(f"stepsearch_jax: {hide_login(message)}")


def start_logging() -> None:
    """Logs to stderr: all messages of this package, errors of the libraries, and the stacks of the
    threads if native code crashes."""
    from absl import logging as absl_logging

    faulthandler.enable(file=2)
    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax warns of its own choices
    # Errors of orbax's threads and tasks come to the caller as well; here each would fill a page.
    logging.getLogger("absl").addFilter(_shorten)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


def _shorten(record: logging.LogRecord) -> bool:
    """A filter that leaves one line of a message, and no traceback."""
    record.msg, record.args = " ".join(record.getMessage().split())[:300], ()
    record.exc_info = record.exc_text = None
    return True


@contextlib.contextmanager
def one_line_errors(after_interrupt: str, *, tidies_up: bool = True) -> Iterator[None]:
    """Ends a command with one line (SystemExit): status 1 for user errors, 130 for Ctrl-C.

    after_interrupt, tidies_up: as in `signals.begin_work`.
    """
    signals.begin_work(after_interrupt, tidies_up=tidies_up)
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise _end(_describe(error)) from error
    except KeyboardInterrupt:
        print(f"stepsearch_jax: interrupted; {after_interrupt}", file=sys.stderr)
        raise SystemExit(signals.INTERRUPTED) from None


def run_guarded(
    command: Callable,
    config: ml_collections.ConfigDict,
    workdir: str | None,
    after_interrupt: str = "the same command starts over",
) -> None:
    """Sets up logging, devices and processes and calls command(config, workdir or None).

    User errors and signals end it with one line. If one process of several fails, it ends at once,
    without waiting for the others; they lose their connection to it and end as well.
    """
    start_logging()
    signals.listen()
    signals.begin_work(after_interrupt, tidies_up=False)

    # Imported here: jax takes seconds to load, and --help and wrong flags need not wait for it.
    import jax
    from etils import epath
    from jax.experimental import multihost_utils

    from stepsearch_jax.runtime import start_jax

    try:
        check_buckets(str(workdir), config.sft.checkpoint)
        start_jax(config)
        jax.devices()  # loads the device's own library
        signals.take_back()
        command(config, None if workdir is None else epath.Path(workdir))
        # No process leaves while the first one still writes the results.
        multihost_utils.sync_global_devices("done")
    except SystemExit as error:  # all processes end together, with a line
        if jax.process_count() > 1 or not isinstance(error.code, str):
            raise
        # At once: orbax may be saving in the background, which would fail with a page.
        signals.leave(1, hide_login(error.code.removeprefix("stepsearch_jax: ")))
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() > 1:
            message = (
                f"process {jax.process_index()} of {jax.process_count()} ends: {_describe(error)} "
                "(when one fails, the others lose their connection: see the log of the first to "
                "fail)"
            )
            signals.leave(EXIT_CODE, message)
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        signals.leave(1, _describe(error))
    except Exception as error:  # a fault of the program
        if find_disk_fault(error):  # of a library that raises errors of its own
            signals.leave(1, _describe(error))
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        message = f"process {jax.process_index()} ends: {type(error).__name__}: {error}"
        signals.leave(EXIT_CODE, message)


def _describe(error: Exception) -> str:
    """The line about a user's error. Of a disk's fault it names the file, if the error does."""
    cause = find_disk_fault(error)
    if cause is None or isinstance(error, WriteError):
        return hide_login(str(error))
    return describe_disk_fault(getattr(error, "filename", None) or "a file", cause)
