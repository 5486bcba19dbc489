"""Checkpoints of the full training state, and of parameters alone (orbax).

A checkpoint is complete or not there: on a disk it gets its name when it is complete; in a bucket
(gs://…) a last file marks it as complete. It holds a checksum of each array
(`checksums.checksum_leaves`), with which the array is compared after it was read back. An array
with a number that is not finite is neither written nor accepted.
"""

from __future__ import annotations

import enum
import gc
import logging
import os
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from stepsearch_jax import signals
from stepsearch_jax.checksums import checksum_leaves, leaf_names
from stepsearch_jax.files import naming_failures

logger = logging.getLogger("stepsearch_jax")


class Damaged(ValueError):
    """A checkpoint whose files are cut, missing or changed."""


# What orbax and TensorStore raise for files that are cut, missing or changed.
_OF_DAMAGE = (ValueError, LookupError, TypeError, EOFError, FileNotFoundError)


class _Fault(enum.IntEnum):
    """What reading a checkpoint met, the gravest last."""

    NONE, DAMAGED, OTHER = range(3)


class Checkpoints:
    """The numbered checkpoints of one stage in `folder`: saved in the background; `keep` stay."""

    def __init__(self, folder: os.PathLike, keep: int, *, read_only: bool = False):
        options = (
            ocp.CheckpointManagerOptions(read_only=True)
            if read_only
            else ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )
        self._folder = _absolute(folder)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._saved_at, self._is_clean = time.monotonic(), False

    def latest(self) -> int | None:
        """Number of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, number: int, state) -> None:
        """Saves a pytree of arrays; returns as soon as it may be donated or changed.

        Waits until the checkpoint before is complete; raises WriteError if that could not be
        written. Raises ValueError, and saves nothing, if a number is not finite.
        """
        # Once per process: remove what kills have left. orbax makes the other processes wait.
        if not self._is_clean and jax.process_index() == 0:
            # In a bucket a folder without files does not exist.
            for path in self._folder.iterdir() if self._folder.is_dir() else ():
                if path.is_dir() and ocp.utils.is_tmp_checkpoint(path):
                    path.rmtree()
        self._is_clean = True
        written = ocp.args.StandardSave(_with_checksums(state))
        with naming_failures(self._folder):
            self._manager.save(number, args=written)
        self._saved_at = time.monotonic()

    def keep_pace(self, number: int, state, *, every: int, minutes: float, last: bool) -> int:
        """Saves the state if a checkpoint is due -> the signal by which the program must end, or 0.

        One is due if the state is the last, if `every` divides its number, if `minutes` (0: never)
        have passed since the last one, or if the program must end. All processes must end when one
        of them got a signal (`signals.requested`); they learn it after the same number.
        """
        ending = _agree(signals.requested())
        if last or ending or number % every == 0 or self._is_late(minutes):
            self.save(number, state)
        return ending

    def _is_late(self, minutes: float) -> bool:
        """Whether `minutes` have passed, by the clock of process 0, so that all processes agree."""
        return bool(minutes) and bool(
            multihost_utils.broadcast_one_to_all(
                np.bool_(time.monotonic() - self._saved_at >= 60.0 * minutes)
            )
        )

    def restore_newest(self, abstract_state, *, set_aside: bool = False, partial: bool = False):
        """The newest whole checkpoint as (number, state); None if there is none at all.

        All processes find the same one. A warning names newer ones that are damaged. set_aside:
        rename these to damaged-NUMBER, which only the run that writes the checkpoints may do.
        abstract_state: shapes, dtypes and shardings (arrays or ShapeDtypeStructs). partial: it is a
        dict of only those parts that are restored, as {"policy": {"params": …}}. Raises ValueError
        for the checkpoint of another model, and `Damaged` if none is whole; then all keep their
        names.
        """
        numbers = sorted(self._manager.all_steps(), reverse=True)
        faults: dict[int, str] = {}
        for number in numbers:
            try:
                state = self.restore(number, abstract_state, partial=partial)
            except Damaged as error:
                faults[number] = str(error)
                continue
            for damaged, fault in faults.items():
                logger.warning("%s: continuing from checkpoint %d", fault, number)
                if set_aside:
                    self._set_aside(damaged)
            return number, state
        if not numbers:
            return None
        raise Damaged(
            f"no checkpoint in {self._folder} is whole ({faults[numbers[0]]}): put back a copy, or "
            f"remove {self._folder} to begin again"
        )

    def _set_aside(self, number: int) -> None:
        """Renames a damaged checkpoint, so that no later start meets it again."""
        folder, aside = self._folder / str(number), self._folder / f"damaged-{number}"
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            folder.rename(aside)
        multihost_utils.sync_global_devices(f"set aside {number}")
        self._manager.reload()
        logger.warning("it is %s now and may be deleted; what it held is computed again", aside)

    def restore(self, number: int, abstract_state, *, partial: bool = False):
        """One checkpoint, with shapes, dtypes and shardings of `abstract_state`, or a part of it.

        Arguments are those of `restore_newest`. Raises `Damaged`, ValueError and OSError in all
        processes if one of them meets a fault.
        """
        folder = self._folder / str(number)
        return _read(folder / "default", abstract_state, "give the flags of its run", partial)

    def close(self) -> None:
        """Waits for saves in the background. Raises WriteError if one could not be written."""
        with naming_failures(self._folder):
            self._manager.wait_until_finished()
        self._manager.close()


def save_params(folder: os.PathLike, params) -> None:
    """Writes parameters alone; an earlier copy is replaced when the new one is complete.

    Raises ValueError, and writes nothing, if a number is not finite.
    """
    with naming_failures(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(_absolute(folder), _with_checksums(params), force=True)


def has_params(folder: os.PathLike) -> bool:
    """Whether `folder` holds parameters that `save_params` wrote completely."""
    path = _absolute(folder)
    return path.is_dir() and ocp.utils.is_checkpoint_finalized(path)


def load_params(folder: os.PathLike, abstract_state, remedy: str):
    """Parameters saved by `save_params`, with shapes, dtypes and shardings of `abstract_state`.

    Raises FileNotFoundError if there are none, ValueError for those of another model, and `Damaged`
    for damaged ones. remedy: what the message says the user can do then.
    """
    if not has_params(folder):
        raise FileNotFoundError(f"there is no checkpoint at {folder}: {remedy}")
    try:
        return _read(_absolute(folder), abstract_state, remedy)
    except Damaged as error:
        raise Damaged(f"{error}: {remedy}") from error


def _with_checksums(tree):
    """What is written for a tree. Raises ValueError if a number is not finite."""
    sums, finite = checksum_leaves(tree)
    names = leaf_names(tree)
    if not finite.all():
        name = names[int(np.argmin(finite))]
        raise ValueError(
            f"{name} holds numbers that are not finite, so nothing is saved; earlier checkpoints "
            "stay. Start again in another --workdir, with lower learning rates"
        )
    by_name = sorted(range(len(names)), key=names.__getitem__)
    return {"tree": tree, "checksums": sums[by_name]}


def _read(folder: epath.Path, abstract_tree, remedy: str, partial: bool = False):
    """The tree that was written to `folder`, or a part of it; all processes succeed, or all raise.

    Raises ValueError for another model's, `Damaged` for a damaged one, and OSError if a disk or a
    network fails. remedy: ends the message about another model.
    """
    # Reading does not wait for the other processes, so that one may fail alone.
    there, names, error, fault = None, [], None, _Fault.NONE
    asyncio_logger = logging.getLogger("asyncio")
    asyncio_logger.disabled = True  # each array that cannot be read would log a page of its own
    try:
        handler = ocp.PyTreeCheckpointHandler()
        written = handler.metadata(folder).tree
        names = sorted(leaf_names(written["tree"]))
        if difference := _differ(written["tree"], abstract_tree, partial):
            fault, error = _Fault.OTHER, ValueError(f"{folder} {difference}: {remedy}")
        else:
            abstract = {
                "tree": jax.tree.map(_place, abstract_tree),
                "checksums": np.zeros((len(names), 2), np.uint32),
            }
            there = handler.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=True,
                ),
            )
            jax.block_until_ready(there)
    except Exception as outer:  # orbax wraps what TensorStore raises in bare Exceptions
        cause = outer
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):  # may pass
            fault, error = _Fault.OTHER, OSError(f"{folder} could not be read ({text}): try again")
        elif isinstance(cause, _OF_DAMAGE):
            fault, error = _Fault.DAMAGED, Damaged(f"{folder} is damaged ({text})")
        else:  # no memory, for example
            raise
    finally:
        if error is not None:
            gc.collect()  # now, while they are not heard; so the cause is not kept, either
        asyncio_logger.disabled = False

    gravest = _agree(fault)  # the gravest fault of any process is everyone's
    if error is not None and fault == gravest:
        raise error
    if gravest != _Fault.NONE:
        kind = Damaged if gravest == _Fault.DAMAGED else OSError
        raise kind(f"{folder} could not be read by another process: see its log")

    # Every process finds the same checksums, and compares them with the same ones.
    sums, finite = checksum_leaves(there["tree"])
    written_sums = dict(zip(names, np.asarray(there["checksums"])))
    for name, ours, is_finite in zip(leaf_names(abstract_tree), sums, finite):
        if (ours != written_sums[name]).any() or not is_finite:
            what = "has changed since it was written" if is_finite else "is not finite"
            raise Damaged(f"{folder} is damaged ({name} {what})")
    return there["tree"]


def _agree(number: int) -> int:
    """The largest of the numbers that the processes call this with."""
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def _differ(there, here, partial: bool) -> str:
    """What the leaves of two trees do not share; "" if nothing.

    there: orbax's metadata of the one that was written. partial: the other may lack leaves.
    """
    there_shapes, here_shapes = _shapes(there), _shapes(here)
    for name in (*here_shapes, *(() if partial else there_shapes)):
        shapes = [shapes.get(name, "missing") for shapes in (there_shapes, here_shapes)]
        if shapes[0] != shapes[1]:
            return f"holds another model ({name} is {shapes[0]} there, {shapes[1]} here)"
    return ""


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Name of each leaf -> its shape."""
    return {name: tuple(leaf.shape) for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree))}


def _absolute(folder: os.PathLike) -> epath.Path:
    path = epath.Path(folder)
    return path if "://" in str(path) else path.resolve()


def _place(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
