"""JAX as this program needs it: flags of XLA, memory, and processes joined, all before the first
use of a device.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def start_jax(config) -> None:
    """What must happen before the first use of a device, on CPU above all; and processes joined.

    Asynchronous dispatch is off: callbacks could deadlock. Several fake devices of one process
    share a pool with a thread for each of them, and a device can wait in several collectives at
    once, a thread in each; a pool that all wait in never moves again, and the runtime ends the
    process after 40 seconds. LLVM would unroll loops of 64 steps or fewer before it looks at them
    as vectors, and then copy rows of that length, such as a head's, number by number.
    """
    if _has_only_cpus():
        add_xla_flag("--xla_backend_extra_options=-unroll-full-max-count=8")
        keep_freed_memory()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    distributed_config = config.distributed
    if distributed_config.processes != 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
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
                f"({error}): set config.distributed.coordinator to HOST:PORT of the first and "
                "process_id to its number in each, or processes to 1"
            ) from error
    elif "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # so many threads: what the CPU runtime takes for the number of cores
        os.environ["NPROC"] = "64"


def keep_freed_memory() -> None:
    """Lets this process reuse the memory that it frees, where malloc is glibc's (mallopt(3));
    elsewhere nothing changes.

    Each call of a program allocates its temporary arrays. Large ones would go back to the system
    afterwards, and every page of the next ones would be a page fault: a tenth of an update's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def add_xla_flag(flag: str) -> None:
    """Puts a flag before those of the user, whose own values therefore count. Raises ValueError
    where XLA_FLAGS names a file of flags instead.
    """
    own = os.environ.get("XLA_FLAGS", "").strip()
    if own and not own.startswith("-"):
        raise ValueError(
            f"XLA_FLAGS={own} names a file, beside which no flag can stand: put what it holds into "
            "XLA_FLAGS itself"
        )
    os.environ["XLA_FLAGS"] = f"{flag} {own}".strip()


def _has_only_cpus() -> bool:
    """Whether JAX will run on CPU, found without starting it: it is told to, or no other platform
    is installed.
    """
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and not any(
        map(importlib.util.find_spec, ("libtpu", "jax_plugins"))
    )
