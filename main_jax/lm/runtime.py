"""Start of a program: several processes as one, quiet logs, the compile cache, and the precision policy.

    initialize(distributed=Distributed("10.0.0.1:8476", num_processes=4, process_id=2))

Every process of a run calls it once, before its first JAX computation; from then on `jax.devices()` are
those of all of them. Without `distributed` the process is alone.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from main_jax.lm import progress
from main_jax.lm.rendezvous import StartError, meet, split
from main_jax.lm.topology import GPU_MEMORY_SHARE

SHUTDOWN_TIMEOUT_S = 3600
"""A process that is done waits for the others to be done, however long they write: a lost one shows by
its heartbeat."""


MOST_CPU_DEVICES = 8
"""Rows of a batch are a multiple of the devices; further cores help each device by its threads."""


@dataclass(frozen=True)
class Distributed:
    """How this process finds the others: by a coordinator, or (`auto`) from the cluster's manager.

    Of `coordinator` ("host:port" of process 0), `num_processes` and `process_id` all are given, or none.
    Seconds: `initialization_timeout` until all have come together, `heartbeat_timeout` until one that is
    silent is taken for dead, which ends the others.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 300
    heartbeat_timeout: int = 100
    auto: bool = False


def with_huge_pages(tunables: str) -> str:
    """`GLIBC_TUNABLES` by which glibc asks for memory in huge pages; what `tunables` say of it wins."""
    setting = "glibc.malloc.hugetlb"
    return tunables if setting in tunables else f"{tunables}:{setting}=1".lstrip(":")


def start_with_huge_pages() -> None:
    """Starts this program anew, once, `with_huge_pages`: glibc reads its settings when a process starts.

    On a CPU a step's temporaries are fresh memory each time: to map and clear them in pages of 4 KiB takes up
    to a sixth of the time (docs/performance.md). What the user has set wins; the processes that this one
    starts inherit it; other C libraries do not look at it.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and (wanted := with_huge_pages(given)) != given:
        os.environ["GLIBC_TUNABLES"] = wanted
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def initialize(
    compile_cache: bool = True,
    *,
    cpu_devices: int | None = None,
    distributed: Distributed | None = None,
) -> None:
    """Call once, before the first JAX computation.

    compile_cache: keep compiled programs in `$XDG_CACHE_HOME/main_jax/xla` (default `~/.cache`); a
    `JAX_COMPILATION_CACHE_DIR` that the user has set wins.
    cpu_devices: compute on so many CPU devices of this process. By default what computes is JAX's choice, and
    a CPU is one device per core, up to `MOST_CPU_DEVICES`: with the rows of a batch cut up two devices take
    half the time of one, two threads of one device more. JAX's own settings win, and one of several
    processes has one device.

    Raises StartError, one line, when the processes do not come together; then end soon and without the
    interpreter's own shutdown (`os._exit`): JAX may still be waiting.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Of a GPU's memory JAX takes 75 % by itself; what is left is for cuDNN, NCCL and CUDA.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
    if distributed is not None and distributed.coordinator is not None:
        # JAX ends a process that cannot join with an abort and a C++ trace. So: before JAX, by ourselves.
        assert distributed.num_processes is not None and distributed.process_id is not None
        progress.set_process(distributed.process_id, distributed.num_processes)
        meet(
            distributed.coordinator, distributed.num_processes, distributed.process_id,
            distributed.initialization_timeout,
        )  # fmt: skip
        _no_proxy(distributed.coordinator)
    import jax

    if cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
        if not os.environ.get("JAX_PLATFORMS"):
            jax.config.update("jax_platforms", "cpu")
    elif distributed is None and not _cpu_devices_are_set():
        with suppress(RuntimeError):  # JAX has been used before, in this very process
            jax.config.update("jax_num_cpu_devices", min(cores(), MOST_CPU_DEVICES))
    if compile_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "main_jax" / "xla"))
    logging.getLogger("absl").setLevel(logging.ERROR)
    if distributed is not None:
        _join(distributed)


def cores() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_devices_are_set() -> bool:
    import jax

    settings: Any = jax.config
    flag = "xla_force_host_platform_device_count"
    return settings.jax_num_cpu_devices > 0 or flag in os.environ.get("XLA_FLAGS", "")


def detect(environment: Mapping[str, str]) -> str | None:
    """Which manager has started several processes of this program, as far as variables tell; or None.

    Narrower than JAX's own detection, so that nobody joins by accident: a shell inside an allocation is
    one process. (Cloud TPU virtual machines tell only over the network: they need `auto` in words.)
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and _several(environment.get("SLURM_NTASKS")):
        return "SLURM"
    if "OMPI_MCA_orte_hnp_uri" in environment and _several(environment.get("OMPI_COMM_WORLD_SIZE")):
        return "Open MPI"
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    return "a TPU pod" if "," in workers and "TPU_WORKER_ID" in environment else None


def _several(count: str | None) -> bool:
    return count is not None and count.isdigit() and int(count) > 1


def joined() -> bool:
    """Whether this process is one of several, or about to be; without importing JAX."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _join(how: Distributed) -> None:
    """`jax.distributed.initialize` with a limit that ends in an exception.

    JAX's own limit ends in an abort; it is set later than ours. The call waits in C++ without the
    interpreter's lock, so a thread can be left behind in it.
    """
    import jax

    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator_address=how.coordinator,
                num_processes=how.num_processes,
                process_id=how.process_id,
                # Under SLURM or Open MPI detection would hide all local devices but one.
                cluster_detection_method="deactivate" if how.coordinator else None,
                initialization_timeout=how.initialization_timeout + 60,
                heartbeat_timeout_seconds=how.heartbeat_timeout,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True, name="jax.distributed.initialize")
    thread.start()
    thread.join(how.initialization_timeout)
    where = f"the coordinator {how.coordinator}" if how.coordinator else "--distributed auto"
    if thread.is_alive():
        raise StartError(
            f"{where}: the processes did not come together within {how.initialization_timeout} s "
            "(--initialization-timeout)"
        )
    if failures:
        reason = " ".join(str(failures[0]).split())
        if how.auto and "be defined" in reason:
            raise StartError(
                "--distributed auto: no TPU pod, SLURM or Open MPI found around this process; leave it "
                "out, or say --coordinator, --num-processes and --process-id"
            )
        raise StartError(f"{where}: the processes could not start together ({reason})")
    # Of the devices, not of the request: on TPU pods the two numberings may differ.
    progress.set_process(jax.process_index(), jax.process_count())


def _no_proxy(coordinator: str) -> None:
    """XLA's gRPC would ask a web proxy for the coordinator, also for this very machine."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return
    known = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")  # noqa: SIM112
    host, _ = split(coordinator)
    os.environ["no_grpc_proxy"] = f"{known},{host}" if known else host  # noqa: SIM112
    import jax

    with suppress(AttributeError):  # a warning of what is dealt with
        jax.config.update("jax_check_proxy_envs", False)


def compute_dtype(setting: str = "auto") -> str:
    """The precision policy: float32 parameters and optimiser everywhere; this for the computation.

    `auto` is bfloat16 on accelerators and float32 on CPU, where bfloat16 gains nothing. Log-softmax
    and reductions are float32 in either case.
    """
    import jax

    if setting != "auto":
        return setting
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def forget_peak_memory() -> None:
    """From here on `peak_memory_bytes` counts anew, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """The most host memory that this process has held (resident set, with shared libraries)."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
