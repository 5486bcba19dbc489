"""TPU chips and slices: devices to compile for, described by libtpu without a TPU; peaks."""

from __future__ import annotations

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from stepsearch_jax.preflight.costs import Rates

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip."""

    hbm: float  # bytes that programs and their arrays can use
    rates: Rates  # peak figures
    accelerator: str  # libtpu's name of its slices, which the number of cores follows
    cores: int  # of one chip
    axes: int  # sizes in the name of a slice


# Usable memory: what the compiler names when a program needs more ("Used 17.9G of 15.75G hbm"), of
# nominally 16 and 32 GB; v5p: its nominal 95. Rates: pages v5e, v5p and v6e of
# cloud.google.com/tpu/docs: bfloat16, HBM, and ICI in one direction over all links of a chip (1600,
# 4800 and 3200 Gb/s).
CHIPS = {
    "v5e": Chip(15.75 * GIB, Rates(197e12, 819e9, 200e9), "v5litepod", 1, 2),
    "v5p": Chip(95.0 * GIB, Rates(459e12, 2765e9, 600e9), "v5p", 2, 3),
    "v6e": Chip(31.25 * GIB, Rates(918e12, 1640e9, 400e9), "v6e", 1, 2),
}


def describe_slice(name: str) -> tuple[Chip, list[jax.Device]]:
    """-> (its kind of chip, devices to compile for) of a slice such as v5e:4x4.

    A process can describe slices of one kind only: libtpu reads the kind once.
    Raises ValueError for an unknown name, or if libtpu is missing.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch("x".join([r"\d+"] * CHIPS[kind].axes), shape):
        raise ValueError(
            f"--topology={name} is not known: name a kind ({', '.join(CHIPS)}) and a shape, "
            "such as v5e:4x4, v5p:2x2x4 or v6e:4x4"
        )
    chip = CHIPS[kind]
    chips = math.prod(int(size) for size in shape.split("x"))
    # Set before libtpu is loaded: it then looks for no TPU and no metadata server, and several
    # processes may compile at once.
    os.environ.update(
        TPU_ACCELERATOR_TYPE=f"{chip.accelerator}-{chips * chip.cores}",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    jax.config.update("jax_platforms", "cpu")
    try:
        return chip, list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:  # what libtpu refuses, or a missing one
        message = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--topology={name} cannot be described: {message} (compiling for TPUs needs libtpu, "
            "best in an environment of its own: pip install -r requirements.txt -r "
            "requirements-tpu.txt)"
        ) from error
