"""Sets up JAX before the first use of a device: XLA flags, memory, and joining processes."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def start_jax(config) -> None:
    """Sets up JAX before the first use of a device, and joins the processes of config.distributed.

    Raises ValueError if the processes cannot be joined.
    """
    if _has_only_cpus():
        # LLVM would unroll loops of up to 64 steps before it vectorises them, and then copy rows of
        # that length, such as a head's, number by number.
        add_xla_flag("--xla_backend_extra_options=-unroll-full-max-count=8")
        keep_freed_memory()
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # callbacks could deadlock
    distributed_config = config.distributed
    if distributed_config.processes != 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # It would take the SIGTERM that `signals` hears.
        jax.config.update("jax_enable_preemption_service", False)
        named = (
            dict(
                coordinator_address=distributed_config.coordinator,
                num_processes=distributed_config.processes,
                process_id=distributed_config.process_id,
            )
            if distributed_config.coordinator
            else {}
        )
        try:
            jax.distributed.initialize(
                **named,
                heartbeat_timeout_seconds=distributed_config.heartbeat_s,
                shutdown_timeout_seconds=distributed_config.heartbeat_s,
            )
        except ValueError as error:
            raise ValueError(
                f"config.distributed.processes={distributed_config.processes} cannot be joined "
                f"({error}): set config.distributed.coordinator to HOST:PORT of process 0 and "
                "config.distributed.process_id to each process's number, or processes to 1"
            ) from error
    elif "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # The CPU runtime takes this for the number of cores and makes as many threads. Fake devices
        # of one process share a pool with one thread for each, and a device can wait in several
        # collectives at once, with a thread in each. If all threads of the pool wait, it deadlocks,
        # and the runtime ends the process after 40 seconds.
        os.environ["NPROC"] = "64"


def keep_freed_memory() -> None:
    """Has malloc keep freed memory for reuse, on glibc (mallopt(3)); elsewhere does nothing.

    Each call of a program allocates its temporary arrays. Large ones would go back to the system
    afterwards, and every page of the next ones would be a page fault: a tenth of an update's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def add_xla_flag(flag: str) -> None:
    """Puts a flag before the user's own in XLA_FLAGS, so that the user's values win.

    Raises ValueError if XLA_FLAGS names a file of flags instead.
    """
    own = os.environ.get("XLA_FLAGS", "").strip()
    if own and not own.startswith("-"):
        raise ValueError(
            f"XLA_FLAGS={own} names a file, to which no flag can be added: write the file's flags "
            "into XLA_FLAGS itself"
        )
    os.environ["XLA_FLAGS"] = f"{flag} {own}".strip()


def _has_only_cpus() -> bool:
    """Whether JAX will run on CPU, found out without starting it.

    It does if jax_platforms says so or no other platform is installed.
    """
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and not any(
        map(importlib.util.find_spec, ("libtpu", "jax_plugins"))
    )
