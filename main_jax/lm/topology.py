"""Machines that are not there: their chips, and devices to compile for.

    prepare()                                    # before JAX is imported
    topology = open_topology("v5p:2x2x2")        # 8 devices on 2 hosts
    with target_platform(topology.chip.platform), jax.set_mesh(make_mesh(shape, topology.devices)):
        jax.jit(step).lower(...).compile().memory_analysis()

A TPU slice is `v5e:4x4`, with the shape that is rented; a GPU cluster `h100:8`, or `h100:4x8` for 4 hosts.
Compilers for TPUs come with the `tpu` extra, for GPUs with the `gpu` extra; neither needs a device.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple


class TopologyError(ValueError):
    """There is no such machine, or no compiler for it."""


@dataclass(frozen=True)
class Chip:
    """One device, as its makers publish it; `memory` as its compiler enforces it (GPUs: as JAX takes it).

    memory: bytes for programs and arrays. flops: of bfloat16 per second, dense. bandwidth: bytes per
    second of that memory. link: bytes per second to other devices of the slice or host, in and out.
    host: the slice that is one host (TPU). target: what XLA is told of it (GPU).
    """

    platform: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    host: str = ""
    target: str = ""


GIB = 2**30
GPU_MEMORY_SHARE = 0.92
"""Of a GPU's memory, for JAX (`runtime.initialize` asks for it); the rest is for cuDNN, NCCL and CUDA."""


def _gpu(name: str, capability: tuple[int, int], cores: int, fpus: int, clock_ghz: float, shared: int,
         l2: int, memory: int, bandwidth: float, flops: float, link: float) -> Chip:  # fmt: skip
    target = f"""gpu_device_info {{
      cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {shared}
      shared_memory_per_block_optin: {shared - 1024}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock_ghz}
      memory_bandwidth: {int(bandwidth)} l2_cache_size: {l2} device_memory_size: {memory}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} device_description_str: "{name}"
    """
    usable = GPU_MEMORY_SHARE * memory
    return Chip("gpu", usable, flops, bandwidth, link, target=target)


# Per device: a chip of tpu7x is two. Sources: Cloud TPU's system architecture pages; NVIDIA's data sheets.
CHIPS = {
    "v4": Chip("tpu", 30.75 * GIB, 275e12, 1.228e12, 300e9, "2x2x1"),
    "v5e": Chip("tpu", 15.75 * GIB, 197e12, 0.819e12, 200e9, "2x2"),
    "v5p": Chip("tpu", 95.74 * GIB, 459e12, 2.765e12, 600e9, "2x2x1"),
    "v6e": Chip("tpu", 31.25 * GIB, 918e12, 1.638e12, 448e9, "2x2"),
    "tpu7x": Chip("tpu", 94.75 * GIB, 1153e12, 3.69e12, 600e9, "2x2x1"),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 167936, 41943040,
                 85097971712, 2.039e12, 312e12, 600e9),
    "h100": _gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 233472, 52428800,
                 84929347584, 3.352e12, 989e12, 900e9),
    "h200": _gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 233472, 62914560,
                 150754820096, 4.8e12, 989e12, 900e9),
}  # fmt: skip


class Topology(NamedTuple):
    """Devices that programs are compiled for: all of them, and those of one process."""

    name: str
    chip: Chip
    devices: Sequence[Any]
    host_devices: Sequence[Any]

    @property
    def hosts(self) -> int:
        """How many processes there are, one a host."""
        return len(self.devices) // len(self.host_devices)


def prepare() -> None:
    """Set what the compilers read when they are loaded. Call before JAX is imported."""
    assert "jax" not in sys.modules
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator that is there stays free for others
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def split(name: str) -> tuple[str, tuple[int, ...]]:
    """`"v5p:2x2x2"` -> `("v5p", (2, 2, 2))`. Raises TopologyError."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        raise TopologyError(
            f"{name!r}: expected a chip and a shape, as v5p:2x2x2, v5e:4x4, h100:8, or h100:4x8 for 4 "
            f"hosts with 8 GPUs each; chips: {', '.join(CHIPS)}"
        )
    return match[1], tuple(int(n) for n in match[2].split("x"))


def open_topology(name: str, slices: int = 1) -> Topology:
    """The devices of a slice or cluster (see above); several TPU slices by `slices`.

    Raises TopologyError, one line, for a name that is none and where the extra with the compiler lacks.
    """
    family, sizes = split(name)
    chip = CHIPS[family]
    if chip.platform == "gpu":
        if len(sizes) > 2 or slices > 1:
            raise TopologyError(f"{name}: expected GPUs, or hosts x GPUs, in one slice")
        hosts, gpus = sizes if len(sizes) == 2 else (1, sizes[0])
        devices = _gpus(chip, hosts, gpus)
        return Topology(name, chip, devices, devices if hosts == 1 else _gpus(chip, 1, gpus))
    devices = _tpus(family, name, slices)
    if len({d.process_index for d in devices}) == 1:
        return Topology(name, chip, devices, devices)
    # Not some of `devices`: the compiler takes only whole slices.
    return Topology(name, chip, devices, _tpus(family, f"{family}:{chip.host}", 1))


def _tpus(family: str, name: str, slices: int) -> Sequence[Any]:
    if not find_spec("libtpu"):
        raise TopologyError(f"{name}: no compiler for TPUs here: pip install 'main-jax[tpu]'")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if family == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device
    return _describe(name, topology_name=name, platform="tpu", **options)


def _gpus(chip: Chip, hosts: int, gpus: int) -> Sequence[Any]:
    if not any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise TopologyError("no compiler for GPUs here: pip install 'main-jax[gpu]'")
    return _describe(
        f"{hosts}x{gpus} GPUs", topology_name="", platform="cuda", target_config=chip.target,
        topology=f"1x{hosts}x{gpus}",
    )  # fmt: skip


def _describe(label: str, **options: Any) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**options).devices
    except Exception as error:  # whatever a plugin may raise
        raise TopologyError(f"{label}: {' '.join(str(error).split())[:200]}") from None


def larger(name: str) -> str | None:
    """The next larger machine of its kind: twice as many devices; None beyond 1,024."""
    family, sizes = split(name)
    if CHIPS[family].platform == "gpu":
        hosts, gpus = sizes if len(sizes) == 2 else (1, sizes[0])
        sizes = (1, 2 * gpus) if hosts == 1 and gpus < 8 else (2 * hosts, gpus)
        sizes = sizes[1:] if sizes[0] == 1 else sizes
    else:
        at = len(sizes) - 1 - list(reversed(sizes)).index(min(sizes))  # the last of the smallest
        sizes = tuple(2 * n if i == at else n for i, n in enumerate(sizes))
    most = {"v5e": 256, "v6e": 256}.get(family, 1024)
    return f"{family}:{'x'.join(map(str, sizes))}" if math.prod(sizes) <= most else None
