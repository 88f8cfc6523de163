"""Where a model runs. `get` turns `backend=` into an object with the verbs of `single.py`."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import torch

from .ddp import DDP as DDP
from .deepspeed import DeepSpeed as DeepSpeed
from .fsdp import FSDP as FSDP
from .pipeline import Pipeline as Pipeline
from .single import CPU as CPU
from .single import GPU as GPU
from .single import Single as Single
from .single import first_usable
from .tpu import TPU as TPU


def get(backend: Any) -> Any:
    """What `Model` was given as `backend` -> the backend.

    Args:
        backend: `"auto"`, `"cpu"`, `"gpu"` (CUDA, MPS or XPU, whichever is there), `"tpu"`, `"ddp"`, `"fsdp"`,
            `"deepspeed"`, a device as torch names it, or an instance. `"auto"` is DDP under `torchrun`, else the first
            that is really usable of TPU (with torch_xla and `PJRT_DEVICE=TPU`), CUDA, MPS, XPU and CPU.
    Raises:
        ImportError: `"tpu"` without torch_xla.
        ValueError: an unknown name, or a device that is not there.
        TypeError: something else than a name or a backend.
    """
    if isinstance(backend, Single):
        return backend
    if isinstance(backend, type) and issubclass(backend, Single):
        raise TypeError(f"backend={backend.__name__} is a class. Make one of it: backend={backend.__name__}().")
    if not isinstance(backend, (str, torch.device)):
        raise TypeError(
            f"backend is a {type(backend).__name__}, expected a name such as 'auto' or 'cuda:1', a torch.device, or an "
            f"instance from kerastorch.backends."
        )
    if backend == "ddp" or (backend == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        return DDP()
    if backend == "fsdp":
        return FSDP()
    if backend == "deepspeed":
        return DeepSpeed()
    has_tpu = os.environ.get("PJRT_DEVICE") == "TPU" and importlib.util.find_spec("torch_xla") is not None
    if backend in ("tpu", "xla", torch.device("xla")) or (backend == "auto" and has_tpu):
        return TPU()
    if backend == "auto":
        return Single(first_usable(["cuda", "mps", "xpu", "cpu"]))
    _warn_of_ranks_alone(backend)
    if backend == "gpu":
        return GPU()
    try:
        return Single(torch.device(backend))
    except RuntimeError as error:
        raise ValueError(
            f'backend={backend!r} is not known. Give "auto", "cpu", "gpu", "tpu", "ddp", "fsdp", "deepspeed", a device '
            f'such as "cuda:1", or an instance such as kerastorch.backends.Pipeline(2).'
        ) from error


def _warn_of_ranks_alone(backend: Any) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK") == "0":
        warnings.warn(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, and with backend={str(backend)!r} each "
            f'trains by itself, on all of the data. Give backend="auto" or "ddp" to have them train together.',
            stacklevel=4,
        )
