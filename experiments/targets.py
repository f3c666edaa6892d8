"""Machines that a program can be compiled for without having them: TPU topologies and GPUs, by
name.

v5e:4x4     16 TPU chips, compiled by libtpu (`pip install "ltsm-jax[tpu-aot]"`)
h200:8      a host of 8 GPUs, h200:2x8 two of them, compiled by the CUDA plugin
            (`pip install "ltsm-jax[cuda-aot]"`)
cpu:8       this machine's CPU as 8 devices, for trying things out
"""

import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Facts about a GPU that the compiler needs. memory: bytes. bandwidth: bytes/s. clock: GHz. l2:
    bytes.
    """

    name: str
    memory: int
    bandwidth: int
    clock: float
    cores: int = 132
    l2: int = 50 * 2**20
    capability: tuple[int, int] = (9, 0)
    shared_per_core: int = 228 * 1024
    shared_per_block: int = 227 * 1024
    registers: int = 65536


# Sizes as the driver reports them and as NVIDIA's data sheets and CUDA programming guide give them.
GPUS = {
    "a100": Gpu(
        name="NVIDIA A100 80GB",
        memory=85_100_068_864,
        bandwidth=2_039 * 10**9,
        clock=1.41,
        cores=108,
        l2=40 * 2**20,
        capability=(8, 0),
        shared_per_core=164 * 1024,
        shared_per_block=163 * 1024,
    ),
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3", memory=84_942_979_072, bandwidth=3_352 * 10**9, clock=1.98
    ),
    "h200": Gpu(
        name="NVIDIA H200 141GB HBM3e", memory=151_397_597_184, bandwidth=4_800 * 10**9, clock=1.98
    ),
}
GPU_SHARE = (
    0.75  # of a GPU's memory that JAX reserves unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
)


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as given. devices: but for those of a CPU they can't compute.
      capacity: bytes of memory that a program may take on one device; None where that is not known.
    """

    name: str
    devices: tuple[Any, ...]
    capacity: int | None


def parse(text: str) -> tuple[str, str, tuple[int, ...]]:
    """(platform, kind, sizes) of a target's name, without looking for a compiler.

    Raises: ValueError that says how it is written.
    """
    kind, _, shape = text.partition(":")
    known = (*TPUS, *GPUS, "cpu")
    if kind not in known:
        near = {
            "v5litepod": "v5e",
            "v5lite": "v5e",
            "v7x": "tpu7x",
            "v7": "tpu7x",
            "trillium": "v6e",
        }
        stem = kind.rsplit("-", 1)[0]
        guess = [near[stem]] if stem in near else difflib.get_close_matches(kind, known, 1)
        hint = f" (did you mean {guess[0]}:...?)" if guess else ""
        raise ValueError(
            f"topology {text!r}: no kind {kind!r}{hint}; known: {', '.join(known)}. {_FORMS}"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"topology {text!r}: {shape!r} is no shape. {_FORMS}")
    sizes = tuple(int(n) for n in shape.split("x"))
    platform = "tpu" if kind in TPUS else "cuda" if kind in GPUS else "cpu"
    if {"cuda": len(sizes) > 2, "cpu": len(sizes) > 1, "tpu": len(sizes) not in (2, 3)}[platform]:
        raise ValueError(f"topology {text!r}: {kind} does not come as {shape}. {_FORMS}")
    return platform, kind, sizes


_FORMS = (
    "Write a grid of TPU chips as v5e:4x4 or v4:2x2x2, GPUs as h200:8 (2 hosts: h200:2x8), CPU "
    "devices as cpu:8"
)


def find(text: str) -> Target:
    """The target called `text`. To be called before JAX has started, in a process that does nothing
    else: it has JAX compute on the CPU and sets environment variables of the compilers.

    Raises: ValueError for a name that is none, or that the compiler does not know;
      ModuleNotFoundError where the compiler is not installed.
    """
    platform, kind, sizes = parse(text)
    return {"tpu": _tpu, "cuda": _cuda, "cpu": _cpu}[platform](text, kind, sizes)


def _tpu(text: str, kind: str, sizes: tuple[int, ...]) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError('libtpu is not installed: pip install "ltsm-jax[tpu-aot]"')
    jax.config.update("jax_platforms", "cpu")
    # without them libtpu asks for the metadata of a cloud machine, and refuses a second process
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    more = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=text, **more)
    except jax.errors.JaxRuntimeError as err:
        raise ValueError(
            f"topology {text!r}: libtpu does not know it: {str(err).splitlines()[0]}"
        ) from err
    devices = tuple(topology.devices)
    return Target(name=text, devices=devices, capacity=_hbm(devices[0]))


def _hbm(device: Any) -> int | None:
    """Bytes of HBM for programs, which the compiler says when it is asked for more than any chip
    has.
    """
    place = jax.sharding.SingleDeviceSharding(device)
    column = jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=place)
    try:
        jax.jit(lambda x: ((square := x[:, None] * x[None]) @ square)[0]).lower(column).compile()
    except jax.errors.JaxRuntimeError as err:
        found = shortage(str(err))
        return found and found.capacity
    return None


@dataclasses.dataclass(frozen=True)
class Shortage:
    """A compiler's report that memory does not suffice, in bytes. whole: `needed` has the arguments
    in it.
    """

    needed: int
    capacity: int
    whole: bool


def shortage(message: str) -> Shortage | None:
    """Parse a compiler's message about too little memory; None where it is about something else."""
    number = r"([\d.]+)([KMGT])"
    temporaries = rf"HLO temporaries \({number}\) exceeds available HBM \({number}\)"
    for whole, pattern in ((False, temporaries), (True, rf"Used {number} of {number} hbm")):
        if match := re.search(pattern, message):
            needed, unit, capacity, unit_there = match.groups()
            return Shortage(_bytes(needed, unit), _bytes(capacity, unit_there), whole)
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** (1 + "KMGT".index(unit.upper())))


def _cuda(text: str, kind: str, sizes: tuple[int, ...]) -> Target:
    found = {name: module_folder(name) for name in ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")}
    if missing := [name for name, folder in found.items() if folder is None]:
        raise ModuleNotFoundError(
            f'{" and ".join(missing)} not installed: pip install "ltsm-jax[cuda-aot]"'
        )
    jax.config.update("jax_platforms", "cpu")
    # choosing among kernels by measuring needs the GPU, and Triton's products can't be compiled
    # without that choice
    flags = (
        f"--xla_gpu_cuda_data_dir={found['nvidia.cuda_nvcc']}",
        "--xla_gpu_autotune_level=0",
        "--xla_gpu_enable_triton_gemm=false",
    )
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()
    hosts, each = sizes if len(sizes) == 2 else (1, sizes[0])
    gpu = GPUS[kind]
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=kind,
        target_config=target_config(gpu),
        topology=f"1x{hosts}x{each}",
    )
    return Target(
        name=text,
        devices=tuple(topology.devices),
        capacity=int(gpu.memory * GPU_SHARE),
    )


def module_folder(module: str) -> Path | None:
    """Locate an installed module without importing it; None where it is not installed."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return Path(places[0]) if places else None


def target_config(gpu: Gpu) -> str:
    """A GPU as XLA's `GpuTargetConfigProto` in text form."""
    (major, minor), info = gpu.capability, functools.partial("{}: {}".format)
    device = (
        info("threads_per_block_limit", 1024),
        info("threads_per_warp", 32),
        info("shared_memory_per_block", 48 * 1024),
        info("shared_memory_per_block_optin", gpu.shared_per_block),
        info("shared_memory_per_core", gpu.shared_per_core),
        info("threads_per_core_limit", 2048),
        info("core_count", gpu.cores),
        info("fpus_per_core", 128 if major == 9 else 64),
        info("block_dim_limit_x", 2**31 - 1),
        info("block_dim_limit_y", 65535),
        info("block_dim_limit_z", 65535),
        info("memory_bandwidth", gpu.bandwidth),
        info("l2_cache_size", gpu.l2),
        info("clock_rate_ghz", gpu.clock),
        info("device_memory_size", gpu.memory),
        f"cuda_compute_capability {{ major: {major} minor: {minor} }}",
        info("registers_per_core_limit", gpu.registers),
        info("registers_per_block_limit", gpu.registers),
    )
    return (
        f'gpu_device_info {{ {" ".join(device)} }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{gpu.name}"'
    )


def _cpu(text: str, kind: str, sizes: tuple[int, ...]) -> Target:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", sizes[0])
    devices = jax.devices("cpu")
    if len(devices) != sizes[0]:
        raise ValueError(
            f"topology {text!r}: JAX has started with {len(devices)} CPU devices already"
        )
    return Target(name=text, devices=tuple(devices), capacity=None)
