"""The command line of all commands: flags, logging, errors in one line, and Ctrl-C.

Loads without jax, so that --help and wrong flags are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import pathlib
import re
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import ml_collections
from absl import flags
from absl import logging as absl_logging
from etils import epath

from stepsearch_jax import __version__
from stepsearch_jax.files import check_buckets
from stepsearch_jax.run.config_file import CONFIG_FILE, define_config
from stepsearch_jax.search.watchdog import EXIT_CODE, call_off

logger = logging.getLogger("stepsearch_jax")

GRACE_S = 5.0  # from Ctrl-C to the end, at the latest
INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C
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
    leave_at_interrupt()
    if arguments is None and not sys.argv[1:]:
        parser.print_help()
        raise SystemExit(2)
    options = parser.parse_args(arguments)
    sys.argv[1:] = options.arguments
    runpy.run_module(f"stepsearch_jax.{options.command}", run_name="__main__", alter_sys=True)


class OneLineParser(argparse.ArgumentParser):
    """Ends with one line and status 2 for flags that are missing or no good."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"stepsearch_jax: {message}; --help lists the flags\n")


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
        leave_at_interrupt()
    options, rest = parser.parse_known_args(arguments)
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
    argv = [parser.prog, f"--config={file}", *overrides]
    values = flags.FlagValues()
    try:
        define_config(values, argv)
        values.set_gnu_getopt()  # a stray argument does not hide the flags behind it
        _, *stray = values(argv)
    except flags.Error as error:  # its last line is the config's own message
        raise SystemExit(f"stepsearch_jax: {str(error).strip().splitlines()[-1]}") from error
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
        raise SystemExit(
            f"stepsearch_jax: {unknown[0]}: the config has no such key; configs/base.py lists all "
            "of them"
        ) from error
    except (TypeError, ValueError) as error:  # of ml_collections: a key below a value, or no key
        given = " ".join(overrides)
        raise SystemExit(
            f"stepsearch_jax: one of {given} sets nothing ({error}); write --config.key=value"
        ) from error
    if stray:
        raise SystemExit(
            f"stepsearch_jax: unexpected argument {stray[0]}; write --config.key=value"
        )
    return values.config


def start_logging() -> None:
    """Logs to stderr: all messages of this package, errors of the libraries, and the stacks of the
    threads if native code crashes."""
    faulthandler.enable(file=2)
    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax warns of its own choices
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


@contextlib.contextmanager
def one_line_errors(after_interrupt: str) -> Iterator[None]:
    """Ends a command with one line (SystemExit): status 1 for user errors, 130 for Ctrl-C.

    after_interrupt: what the message says the user can do after Ctrl-C, or what is lost.
    """
    _raise_at_interrupt()
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"stepsearch_jax: {error}") from error
    except KeyboardInterrupt:
        print(f"stepsearch_jax: interrupted; {after_interrupt}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def run_guarded(
    command: Callable,
    config: ml_collections.ConfigDict,
    workdir: str | None,
    after_interrupt: str = "the same command starts over",
) -> None:
    """Sets up logging, devices and processes and calls command(config, workdir or None).

    User errors and Ctrl-C end it with one line. If one process of several fails, it ends at once,
    without waiting for the others; they lose their connection to it and end as well.
    """
    # From here on Ctrl-C ends the process, unless it is ignored, as in background jobs.
    start_logging()
    _raise_at_interrupt()
    interrupted = INTERRUPTED, f"interrupted; {after_interrupt}"
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        end_after_interrupt(*interrupted)

    # Imported here: jax takes seconds to load, and --help and wrong flags need not wait for it.
    import jax
    from etils import epath
    from jax.experimental import multihost_utils

    from stepsearch_jax.runtime import start_jax

    try:
        check_buckets(str(workdir), config.sft.checkpoint)
        start_jax(config)
        command(config, None if workdir is None else epath.Path(workdir))
        # No process leaves while the first one still writes the results.
        multihost_utils.sync_global_devices("done")
    except KeyboardInterrupt:
        leave(*interrupted)
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        if "KeyboardInterrupt" in str(error):  # in a callback from the device
            leave(*interrupted)
        if jax.process_count() > 1:
            message = (
                f"process {jax.process_index()} of {jax.process_count()} ends: {error} (when one "
                "fails, the others lose their connection: see the log of the first to fail)"
            )
            leave(EXIT_CODE, message)
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        leave(1, str(error))
    except Exception as error:  # a fault of the program
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        leave(EXIT_CODE, f"process {jax.process_index()} ends: {type(error).__name__}: {error}")


def leave_at_interrupt() -> None:
    """Has Ctrl-C end the process with one line while a command still loads its libraries.

    An exception would fill pages there, or be lost in a function that a library calls.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_before_work)


def _leave_before_work(*_) -> None:
    leave(INTERRUPTED, "interrupted; nothing was begun")


def _raise_at_interrupt() -> None:
    """Ends what `leave_at_interrupt` set: the work begins."""
    if signal.getsignal(signal.SIGINT) is _leave_before_work:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_after_interrupt(status: int, message: str) -> None:
    """Has this process `leave` GRACE_S seconds after Ctrl-C if nothing else has ended it by then.

    Python handles the signal only when a program on the device returns, and callbacks from jax lose
    its exception. The wake-up pipe receives the signal's number without Python.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while signal.SIGINT not in os.read(reader, 64):
            pass
        time.sleep(GRACE_S)
        leave(status, message)

    threading.Thread(target=wait, name="end after an interrupt", daemon=True).start()


def end_at_signals(message: str) -> None:
    """Has Ctrl-C and SIGTERM end this process at once with one line, also inside native code.

    For commands that have nothing to save. Signals that are ignored stay so. Call it again after
    loading a library with handlers of its own, such as libtpu's, which print their stack.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    statuses = {number: 128 + number for number in (signal.SIGINT, signal.SIGTERM)}
    for number in statuses:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while True:
            for number in os.read(reader, 64):
                if number in statuses:
                    leave(statuses[number], message)

    threading.Thread(target=wait, name="end at signals", daemon=True).start()


def leave(status: int, message: str) -> None:
    """Ends this process at once with one line, without waiting for the device or other threads.

    They would print pages of errors, or crash. A checkpoint that is being saved is lost; the one
    before it stays.
    """
    call_off()
    with contextlib.suppress(OSError):  # a pipe that nobody reads
        sys.stdout.flush()
    os.write(2, f"stepsearch_jax: {message}\n".encode())
    os._exit(status)
