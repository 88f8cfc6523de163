"""What is here to train on: versions, devices, which backends can be used and why not, how several nodes are launched.

Everything is asked, not guessed: a device is one if a tensor can be put there. What fails while it is asked is a reason
in the answer, never an error. Printed by `python -m kerastorch`.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import __version__
from .backends.single import real_device

Row = dict[str, Any]

# Those that the results, or where they are computed, depend on.
PACKAGES = (
    "torch", "torch_xla", "libtpu", "torch-tpu", "deepspeed", "torchmetrics", "numpy", "safetensors", "triton",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "transformers", "onnx", "onnxruntime",
)  # fmt: skip
GPUS = ("cuda", "mps", "xpu")
# Set by torchrun, SLURM and the users of torch's engines.
VARIABLES = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
    "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME",
    "OMP_NUM_THREADS", "PJRT_DEVICE", "CPU_NUM_DEVICES", "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES",
)  # fmt: skip
XLA_PROGRAM = "import torch_xla; from torch_xla._internal import tpu; print('chips', tpu.num_available_chips())"
XLA_TIMEOUT_S = 60
PORT = 29500  # torchrun's own


def report(environment: Mapping[str, str] = os.environ) -> dict[str, list[Row]]:
    """All of it, as tables: title -> rows, each of them name of a column -> value.

    Args:
        environment: Variables of this process. Default: those there are.
    Example:
        >>> tables = report()
        >>> list(tables)
        ['versions', 'devices', 'backends', 'backend="auto"', 'variables', 'to launch']
        >>> tables["backends"][0]["backend"], tables["backends"][0]["usable"]
        ('"cpu"', True)
    """
    found = backends(environment)
    return {
        "versions": versions(),
        "devices": devices(),
        "backends": found,
        'backend="auto"': [_automatic(found, environment)],
        "variables": [{"variable": name, "value": environment[name]} for name in VARIABLES if name in environment],
        "to launch": launches(),
    }


# Versions.


def versions() -> list[Row]:
    """Of Python, this package and what is installed of those it can use; none of them is imported."""
    installed = {"python": platform.python_version(), "kerastorch": __version__}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return [{"package": name, "version": version} for name, version in installed.items()]


# Devices.


def devices() -> list[Row]:
    """The CPU, as much of it as this process may use, and all GPUs."""
    total, free = memory()
    rows = [_device("cpu", platform.processor() or platform.machine(), free, total, f"{_number(cores(), 'core')}")]
    return rows + [row for kind in GPUS for row in _gpus(kind)]


def _device(name: str, model: str, free: int | None, total: int | None, note: str) -> Row:
    return {"device": name, "model": model, "free_bytes": free, "total_bytes": total, "note": note}


def _gpus(kind: str) -> Iterator[Row]:
    module = getattr(torch, kind)
    if not module.is_available():
        return
    for index in range(module.device_count()):
        try:
            yield _gpu(f"{kind}:{index}", module)
        except Exception as error:  # one that is broken, or another process's own, is no reason to hide the others
            yield _device(f"{kind}:{index}", "", None, None, _first_line(error))


def _gpu(name: str, module: Any) -> Row:
    if name.startswith("mps"):
        total = module.recommended_max_memory()
        return _device("mps", platform.machine(), total - module.driver_allocated_memory(), total, "")
    properties, (free, total) = module.get_device_properties(name), module.mem_get_info(name)
    capability = f"capability {properties.major}.{properties.minor}" if name.startswith("cuda") else ""
    return _device(name, properties.name, free, total, capability)


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use, at least 1: by affinity, and by the limit of its container.

    Args:
        root: Where the file system begins.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for folder in _control_groups(root, "cpu"):
        words = (_read(folder / "cpu.max") or _read(folder / "cpu.cfs_quota_us")).split()
        period = words[1] if len(words) == 2 else _read(folder / "cpu.cfs_period_us")
        if words and period and words[0].isdigit():  # without a limit it is "max", or -1
            quotas.append(int(words[0]) / int(period))
    return max(1, int(min([usable, *quotas])))


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Memory of this machine in bytes, total and free; if it is in a container with a limit, what that leaves.

    Args:
        root: Where the file system begins.
    """
    import psutil

    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for folder in _control_groups(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            # Files that were read are given back when memory is needed.
            cached = dict(line.split() for line in _read(folder / "memory.stat").splitlines()).get("inactive_file", 0)
            total, free = min(total, int(limit)), min(free, int(limit) - int(used) + int(cached))
    return total, max(0, free)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders, of cgroups v2 or v1, with limits for this process: its own and those around it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if number != "0" and controller not in names.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
        own = mount / path.strip("/")  # within a container it may be seen from outside, and not be there
        yield from (folder for folder in (own, *own.parents) if mount in (folder, *folder.parents))


def _read(path: Path) -> str:
    """The text of a file of the kernel, or nothing where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# Backends.


def backends(environment: Mapping[str, str] = os.environ) -> list[Row]:
    """Each backend: whether it can be used here, and why or why not.

    Args:
        environment: Variables of this process.
    """
    asked: dict[str, Callable[[], tuple[bool, str]]] = {
        '"cpu"': lambda: (True, f"{_number(cores(), 'core')} may be used."),
        '"gpu"': _gpu_backend,
        "DDP": _ranks,
        "FSDP": lambda: _ranks("torch.distributed.fsdp"),
        "Pipeline": lambda: _ranks("torch.distributed.pipelining"),
        "DeepSpeed": _deepspeed,
        "TPU": lambda: _tpu(environment),
    }
    rows = []
    for name, ask in asked.items():
        try:
            usable, why = ask()
        except Exception as error:  # whatever is broken here, it is what the reader wants to know
            usable, why = False, f"Asking failed: {_first_line(error)}"
        rows.append({"backend": name, "usable": usable, "why": why})
    return rows


def _gpu_backend() -> tuple[bool, str]:
    found = [kind for kind in GPUS if getattr(torch, kind).is_available() and real_device(torch.device(kind))]
    if found:
        count = getattr(torch, found[0]).device_count()
        return True, f"{_number(count, 'device')} of {found[0].upper()}; one is used, DDP uses all."
    return False, " ".join(f"{kind.upper()}: {_refusal(kind)}" for kind in GPUS)


def _refusal(kind: str) -> str:
    """What torch says when it is to put something there."""
    if kind == "mps" and not torch.backends.mps.is_built():
        return "Torch not compiled with MPS enabled."  # what it says of the others
    try:
        torch.ones(1, device=kind).add_(1).cpu()
    except Exception as error:
        return _first_line(error)
    return "A sum of ones came out wrong."


def _ranks(engine: str = "torch.distributed") -> tuple[bool, str]:
    """Whether several processes can meet, and through what; and whether a module of torch that they need is there."""
    if not dist.is_available():
        return False, "This torch is built without torch.distributed."
    if find_spec(engine) is None:  # not imported: that takes seconds
        return False, f"torch {torch.__version__} has no {engine}."
    built_in = {"NCCL": dist.is_nccl_available, "XCCL": getattr(dist, "is_xccl_available", bool),
                "Gloo": dist.is_gloo_available, "MPI": dist.is_mpi_available}  # fmt: skip
    engines = [name for name, is_there in built_in.items() if is_there()]
    if not engines:
        return False, "This torch is built without NCCL and Gloo, so that processes cannot meet."
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and "NCCL" in engines:
        where = f"{_number(count, 'GPU')} here, by NCCL"
    else:
        where = f"CPU ranks, by {'Gloo' if 'Gloo' in engines else engines[0]}, for debugging and for several machines"
    return True, f"{where}. Built in: {', '.join(engines)}."


def _deepspeed() -> tuple[bool, str]:
    version = _version("deepspeed")
    if version is None or find_spec("deepspeed") is None:  # not imported: that takes seconds
        return False, "not installed: pip install kerastorch[deepspeed]."
    usable, where = _ranks()
    return usable, f"deepspeed {version}, {where}" if usable else where


def _tpu(environment: Mapping[str, str]) -> tuple[bool, str]:
    version = _version("torch_xla")
    if version is None:
        return False, "torch_xla is not installed: pip install torch_xla[tpu], of the version of this torch."
    # In a process of its own: it takes seconds, says things, and one built for another torch can end the process.
    try:
        asked = subprocess.run(
            [sys.executable, "-c", XLA_PROGRAM], capture_output=True, text=True, timeout=XLA_TIMEOUT_S, check=False,
            env=dict(environment),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"import torch_xla ({version}) did not end within {XLA_TIMEOUT_S} s."
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"]
        return False, f"torch_xla {version} cannot be imported with torch {torch.__version__}: {said[-1]}"
    chips, client = int(asked.stdout.split()[-1]), environment.get("PJRT_DEVICE")
    if client not in (None, "TPU"):
        return True, f"torch_xla {version} on its {client} client (PJRT_DEVICE={client})."
    if chips:
        return True, f"torch_xla {version}, {_number(chips, 'chip')} on this host."
    return False, f"torch_xla {version} finds no TPU. Set PJRT_DEVICE=CPU to try its CPU client."


def _automatic(found: list[Row], environment: Mapping[str, str]) -> Row:
    """What `backend="auto"` is here, and why."""
    usable = {row["backend"]: row["usable"] for row in found}
    ranks = environment.get("WORLD_SIZE", "1")
    if ranks.isdigit() and int(ranks) > 1:
        return {"is": "DDP", "because": f"torchrun started {ranks} ranks (WORLD_SIZE)."}
    if usable["TPU"] and environment.get("PJRT_DEVICE", "TPU") == "TPU":
        return {"is": "TPU", "because": "There is one, and torch_xla."}
    kind = next((kind for kind in GPUS if usable['"gpu"'] and getattr(torch, kind).is_available()), None)
    if kind is not None:
        return {"is": f'"{kind}"', "because": "It is the first that works, of TPU, CUDA, MPS, XPU and CPU."}
    return {"is": '"cpu"', "because": "Neither a TPU nor a GPU is usable here, and torchrun started no ranks."}


# Launching.


def launches() -> list[Row]:
    """Commands that start a script on all devices of one machine, or of several."""
    ranks = "gpu" if torch.cuda.is_available() else "2"
    meet = f"--nproc-per-node={ranks} --rdzv-backend=c10d"
    first = f"$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):{PORT}"
    commands = {
        "this machine": f"torchrun --standalone --nproc-per-node={ranks} train.py",
        "2 machines, the same command on each": (
            f"torchrun --nnodes=2 {meet} --rdzv-id=1 --rdzv-endpoint={socket.gethostname()}:{PORT} train.py"
        ),
        "SLURM, in a script for sbatch --nodes=2 --ntasks-per-node=1": (
            f"srun torchrun --nnodes=$SLURM_JOB_NUM_NODES {meet} --rdzv-id=$SLURM_JOB_ID "
            f"--rdzv-endpoint={first} train.py"
        ),
        "a pod of TPUs, from anywhere": (
            "gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all "
            '--command="PJRT_DEVICE=TPU python3 train.py"'
        ),
    }  # fmt: skip
    return [{"where": where, "command": command} for where, command in commands.items()]


# Words.


def _version(package: str) -> str | None:
    return next((row["version"] for row in versions() if row["package"] == package), None)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _first_line(error: BaseException) -> str:
    """The first sentence of an error, in one line."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    return f"{text or type(error).__name__}."
