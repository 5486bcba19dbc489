"""Checkpoints of the full training state, and of parameters alone (orbax). A checkpoint is there
whole or not at all: on a disk it gets its name when it is complete, in a bucket (gs://…) a last
file marks it as complete.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils


class Checkpoints:
    """The numbered checkpoints of one stage under `folder`: saved in the background, the newest
    `keep` stay.
    """

    def __init__(self, folder: os.PathLike, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._folder = _absolute(folder)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._saved_at, self._is_clean = time.monotonic(), False

    def latest(self) -> int | None:
        """Number of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, number: int, state) -> None:
        """Saves a pytree of arrays; returns as soon as it may be donated or changed. The one before
        must be complete first.
        """
        # what kills have left; orbax lets the other processes wait here
        if not self._is_clean and jax.process_index() == 0:
            # a bucket has no empty folders
            for path in self._folder.iterdir() if self._folder.is_dir() else ():
                if path.is_dir() and ocp.utils.is_tmp_checkpoint(path):
                    path.rmtree()
        self._is_clean = True
        self._manager.save(number, args=ocp.args.StandardSave(state))
        self._saved_at = time.monotonic()

    def keep_pace(self, number: int, state, *, every: int, minutes: float, last: bool) -> bool:
        """Saves the state if it is the last, if `every` divides its number, if `minutes` (0: never)
        have passed since the last time, or if the program is to end -> whether it is to end. Call
        it with every number in turn.

        A program of several processes is to end when one of them got a SIGTERM; all of them learn
        it after the same number. A program of one process ends at the signal itself, with what it
        has saved.
        """
        ending = self._manager.reached_preemption(number)
        if last or ending or number % every == 0 or self._is_late(minutes):
            self.save(number, state)
        return ending and not last

    def _is_late(self, minutes: float) -> bool:
        """The same on all processes: the first one's clock decides."""
        return bool(minutes) and bool(
            multihost_utils.broadcast_one_to_all(
                np.bool_(time.monotonic() - self._saved_at >= 60.0 * minutes)
            )
        )

    def restore(self, number: int, abstract_state):
        """The checkpoint, each leaf with shape, type and sharding of `abstract_state` (arrays or
        ShapeDtypeStructs). Raises ValueError as `load_params` does.
        """
        with _checked(
            self._folder / str(number) / "default",
            abstract_state,
            f"give the flags of the run, or remove {self._folder / str(number)}: the same command "
            "then goes on from the checkpoint before",
        ):
            state = self._manager.restore(
                number, args=ocp.args.StandardRestore(_abstract(abstract_state))
            )
        self._manager.reached_preemption(number)  # from where `keep_pace` counts on
        return state

    def close(self) -> None:
        """Waits for saves in the background."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(folder: os.PathLike, params) -> None:
    """Writes parameters alone; an earlier copy is replaced when the new one is complete."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(_absolute(folder), params, force=True)


def has_params(folder: os.PathLike) -> bool:
    """Whether `folder` holds parameters that `save_params` has written to the end."""
    path = _absolute(folder)
    return path.is_dir() and ocp.utils.is_checkpoint_finalized(path)


def load_params(folder: os.PathLike, abstract_state, remedy: str):
    """Parameters saved by `save_params`, with shape, type and sharding of `abstract_state`. Raises
    FileNotFoundError where there are none, and ValueError for those of another model and for
    damaged ones. remedy: what the user can do then, for the message.
    """
    if not has_params(folder):
        raise FileNotFoundError(f"there is no checkpoint at {folder}: {remedy}")
    with (
        _checked(_absolute(folder), abstract_state, remedy),
        ocp.StandardCheckpointer() as checkpointer,
    ):
        return checkpointer.restore(_absolute(folder), _abstract(abstract_state))


@contextlib.contextmanager
def _checked(folder: epath.Path, abstract_state, remedy: str) -> Iterator[None]:
    """Around reading `folder`: compares what it says to hold with `abstract_state` before, and
    tells of damage in one line (ValueError); orbax would fill pages.
    """
    try:
        there, here = (
            _shapes(tree)
            for tree in (ocp.StandardCheckpointHandler().metadata(folder).tree, abstract_state)
        )
        differing = [name for name in (*here, *there) if here.get(name) != there.get(name)]
        if not differing:
            yield
            return
    except (ValueError, LookupError, TypeError, EOFError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder} is damaged, or no checkpoint of this program ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): {remedy}"
        ) from error
    except OSError as error:  # of the disk or the network, at this moment
        raise OSError(
            f"{folder} could not be read ({' '.join(str(error).split())[:200]}): try again"
        ) from error
    name = differing[0]
    raise ValueError(
        f"{folder} holds another model ({name} is {there.get(name, 'missing')} there, "
        f"{here.get(name, 'missing')} here): {remedy}"
    )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Name of each leaf -> its shape; equal for a tree and for what orbax stores of it, whatever
    its nodes are.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _absolute(folder: os.PathLike) -> epath.Path:
    path = epath.Path(folder)
    return path if "://" in str(path) else path.resolve()


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
