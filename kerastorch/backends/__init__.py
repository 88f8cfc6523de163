"""Where a model runs. `get` turns `backend=` into an object with the verbs of `single.py`."""

from __future__ import annotations

import os
from typing import Any

import torch

from .single import Single as Single
from .single import real_device
from .tpu import TPU as TPU


def get(backend: Any) -> Any:
    """What `Model` was given as `backend` -> the backend.

    Args:
        backend: `"auto"`, `"cpu"`, `"gpu"` (CUDA, MPS or XPU, whichever is there), `"tpu"`, also known as `"xla"`, a
            device as torch names it, or an instance. `"auto"` is the first that is really usable of CUDA, MPS, XPU and
            CPU.
    Raises:
        ValueError: an unknown name, or a device that is not there.
        ImportError: `"tpu"` without torch_xla.
        NotImplementedError: `"auto"` under `torchrun` with several processes.
    """
    if not isinstance(backend, (str, torch.device)):
        return backend
    if backend == "auto":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise NotImplementedError(
                "several processes (torchrun) need the DDP backend, which is not in this version. "
                'Start one process, or give backend="cpu" to train a model of its own in each.'
            )
        return Single(_first_usable(["cuda", "mps", "xpu", "cpu"]))
    if backend in ("tpu", "xla") or backend == torch.device("xla"):
        return TPU()
    if backend == "gpu":
        found = _first_usable(["cuda", "mps", "xpu"])
        if found is None:
            raise ValueError('backend="gpu" found no GPU that torch can use. Give backend="cpu".')
        return Single(found)
    try:
        return Single(torch.device(backend))
    except RuntimeError as error:
        raise ValueError(
            f'backend={backend!r} is not known. Give "auto", "cpu", "gpu", "tpu", or a device such as "cuda:1".'
        ) from error


def _first_usable(names: list[str]) -> str | None:
    return next((name for name in names if real_device(torch.device(name)) is not None), None)
