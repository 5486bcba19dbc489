"""Checkpoints of the full training state, and of parameters alone (orbax).

A checkpoint is complete or not there: on a disk it gets its name when it is complete; in a bucket
(gs://…) a last file marks it as complete.
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
    """The numbered checkpoints of one stage in `folder`: saved in the background; `keep` stay."""

    def __init__(self, folder: os.PathLike, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._folder = _absolute(folder)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._saved_at, self._is_clean = time.monotonic(), False

    def latest(self) -> int | None:
        """Number of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, number: int, state) -> None:
        """Saves a pytree of arrays; returns as soon as it may be donated or changed.

        Waits until the checkpoint before is complete.
        """
        # Once per process: remove what kills have left. orbax makes the other processes wait.
        if not self._is_clean and jax.process_index() == 0:
            # In a bucket a folder without files does not exist.
            for path in self._folder.iterdir() if self._folder.is_dir() else ():
                if path.is_dir() and ocp.utils.is_tmp_checkpoint(path):
                    path.rmtree()
        self._is_clean = True
        self._manager.save(number, args=ocp.args.StandardSave(state))
        self._saved_at = time.monotonic()

    def keep_pace(self, number: int, state, *, every: int, minutes: float, last: bool) -> bool:
        """Saves the state if a checkpoint is due -> whether the program must end.

        One is due if the state is the last, if `every` divides its number, if `minutes` (0: never)
        have passed since the last one, or if the program must end. Call it with every number in
        turn. Several processes must end when one of them got a SIGTERM; all of them learn it after
        the same number. A single process ends at the signal itself, with what it has saved.
        """
        ending = self._manager.reached_preemption(number)
        if last or ending or number % every == 0 or self._is_late(minutes):
            self.save(number, state)
        return ending and not last

    def _is_late(self, minutes: float) -> bool:
        """Whether `minutes` have passed, by the clock of process 0, so that all processes agree."""
        return bool(minutes) and bool(
            multihost_utils.broadcast_one_to_all(
                np.bool_(time.monotonic() - self._saved_at >= 60.0 * minutes)
            )
        )

    def restore(self, number: int, abstract_state):
        """The checkpoint, with shapes, dtypes and shardings of `abstract_state` (of arrays or
        ShapeDtypeStructs). Raises ValueError as `load_params` does.
        """
        folder = self._folder / str(number)
        remedy = (
            f"give the flags of the run, or remove {folder}: the same command then resumes from "
            "the checkpoint before"
        )
        with _checked(folder / "default", abstract_state, remedy):
            state = self._manager.restore(
                number, args=ocp.args.StandardRestore(_abstract(abstract_state))
            )
        self._manager.reached_preemption(number)  # the number that `keep_pace` continues from
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
    """Whether `folder` holds parameters that `save_params` wrote completely."""
    path = _absolute(folder)
    return path.is_dir() and ocp.utils.is_checkpoint_finalized(path)


def load_params(folder: os.PathLike, abstract_state, remedy: str):
    """Parameters saved by `save_params`, with shapes, dtypes and shardings of `abstract_state`.

    Raises FileNotFoundError if there are none, and ValueError for those of another model and for
    damaged ones. remedy: what the message says the user can do then.
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
    """Around reading `folder`: compares its metadata with `abstract_state` first, and reports
    damage in one line (ValueError); orbax would print pages.
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
    except OSError as error:  # a fault of disk or network, which may pass
        raise OSError(
            f"{folder} could not be read ({' '.join(str(error).split())[:200]}): try again"
        ) from error
    name = differing[0]
    raise ValueError(
        f"{folder} holds another model ({name} is {there.get(name, 'missing')} there, "
        f"{here.get(name, 'missing')} here): {remedy}"
    )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Name of each leaf -> its shape; the same for a tree and for orbax's metadata of it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _absolute(folder: os.PathLike) -> epath.Path:
    path = epath.Path(folder)
    return path if "://" in str(path) else path.resolve()


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
