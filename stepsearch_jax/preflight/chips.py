"""TPU slices and hosts with GPUs: devices to compile for, described without having them; peaks."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from stepsearch_jax.preflight.costs import Rates
from stepsearch_jax.preflight.network import Network

GIB = 2**30
MOST_GPUS = 8  # of one host, whose switch links all of them


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip."""

    hbm: float  # bytes that programs and their arrays can use
    rates: Rates  # peak figures
    accelerator: str  # libtpu's name of its slices, which the number of cores follows
    cores: int  # of one chip
    axes: int  # sizes in the name of a slice
    ring: int  # an axis of a multiple of so many chips closes; of three axes all or none


@dataclasses.dataclass(frozen=True)
class GPU:
    """One kind of GPU. description: its properties as XLA's GpuTargetConfigProto, in text form."""

    memory: float  # bytes
    rates: Rates
    description: str

    @property
    def hbm(self) -> float:
        """Bytes that programs and their arrays can use: what jax takes when it starts."""
        return self.memory * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))


# Usable memory: what the compiler names when a program needs more ("Used 17.9G of 15.75G hbm"), of
# nominally 16 and 32 GB; v5p: its nominal 95. Rates: pages v5e, v5p and v6e of
# cloud.google.com/tpu/docs: bfloat16, HBM, and ICI in one direction (1600, 4800 and 3200 Gb/s over
# the 4, 6 and 4 links of a chip). The clock follows from the bfloat16 rate: 4 arrays of 128 x 128
# multipliers, twice that, and 4 of 256 x 256.
CHIPS = {
    "v5e": Chip(15.75 * GIB, Rates(197e12, 819e9, 50e9, 1.5e9), "v5litepod", 1, 2, 16),
    "v5p": Chip(95.0 * GIB, Rates(459e12, 2765e9, 100e9, 1.75e9), "v5p", 2, 3, 4),
    "v6e": Chip(31.25 * GIB, Rates(918e12, 1640e9, 100e9, 1.75e9), "v6e", 1, 2, 16),
}


def _make_gpu(
    name: str,
    memory: float,  # bytes
    rates: Rates,
    *,
    ghz: float,
    cores: int,
    fpus: int,  # of one core
    shared: int,  # bytes of a core that its blocks share
    cache: int,  # bytes, L2
    capability: int,
) -> GPU:
    """A GPU with this compute capability."""
    description = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {rates.hbm_bytes:.0f}
  l2_cache_size: {cache}
  clock_rate_ghz: {ghz}
  device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: {shared - 1024}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
    return GPU(memory, rates, description)


# The SXM boards with 80 GB. Rates: NVIDIA's data sheets: bfloat16 without sparsity, HBM, and
# NVLink in one direction, half of the 900 and 600 GB/s. Sizes: the CUDA C++ programming guide's
# table of compute capabilities.
GPUS = {
    "h100": _make_gpu(
        "NVIDIA H100 80GB HBM3",
        85e9,
        Rates(989e12, 3352e9, 450e9),
        ghz=1.98,
        cores=132,
        fpus=128,
        shared=228 << 10,
        cache=50 << 20,
        capability=9,
    ),
    "a100": _make_gpu(
        "NVIDIA A100-SXM4-80GB",
        85e9,
        Rates(312e12, 2039e9, 300e9),
        ghz=1.41,
        cores=108,
        fpus=64,
        shared=164 << 10,
        cache=40 << 20,
        capability=8,
    ),
}


def describe_slice(name: str) -> tuple[Chip | GPU, list[jax.Device]]:
    """-> (its kind of chip, devices to compile for) of a slice such as v5e:4x4, or of h100:8.

    A process can describe slices of one kind only: libtpu reads the kind once.
    Raises ValueError for an unknown name, or if libtpu or jax's CUDA plugin is missing.
    """
    kind, _, shape = name.partition(":")
    if kind in GPUS and re.fullmatch(r"\d+", shape) and 1 <= int(shape) <= MOST_GPUS:
        return GPUS[kind], _list_gpus(name, GPUS[kind], int(shape))
    if kind not in CHIPS or not re.fullmatch("x".join([r"\d+"] * CHIPS[kind].axes), shape):
        raise ValueError(
            f"--topology={name} is not known: name a kind ({', '.join(CHIPS)}) and a shape, "
            f"such as v5e:4x4, v5p:2x2x4 or v6e:4x4, or a GPU ({', '.join(GPUS)}) and their "
            f"number, up to {MOST_GPUS}, such as h100:8"
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
    return chip, _list_devices(name, "libtpu", "tpu", platform="tpu", topology_name=name)


def _list_gpus(name: str, gpu: GPU, number: int) -> list[jax.Device]:
    return _list_devices(
        name,
        "jax's CUDA plugin",
        "cuda-preflight",
        platform="cuda",
        topology_name=name,
        target_config=gpu.description,
        topology=f"1x1x{number}",
    )


def _list_devices(name: str, needed: str, requirements: str, **description) -> list[jax.Device]:
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(**description).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # refused, or missing
        message = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--topology={name} cannot be described: {message} (compiling for it needs {needed}, "
            "best in an environment of its own: pip install -r requirements.txt -r "
            f"requirements-{requirements}.txt)"
        ) from error


def describe_network(chip: Chip | GPU, devices: Sequence[jax.Device]) -> Network:
    """The links between devices, in the order in which a mesh numbers them."""
    if not isinstance(chip, Chip) or not all(hasattr(device, "coords") for device in devices):
        return Network(None)
    coords = [tuple(device.coords)[: chip.axes] for device in devices]
    closed = [(max(places) + 1) % chip.ring == 0 for places in zip(*coords)]
    return Network(coords, closed if chip.axes == 2 else [all(closed)] * chip.axes)
