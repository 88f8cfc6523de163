"""Running out of memory: how an error says so, on any device, and how to give back what nobody needs."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache

import torch

# The CPU's allocators and some libraries of CUDA and others raise plain RuntimeErrors.
KNOWN = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "bad allocation",
    "could not allocate",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "RESOURCE_EXHAUSTED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text.lower() in str(error).lower() for text in KNOWN)


def free_memory(device: torch.device) -> None:
    """Gives back what nobody refers to any more."""
    gc.collect()
    if device.type == "cpu":
        _trim()
    elif device.type != "xla":  # whose memory nobody but its compiler hands out
        torch.get_device_module(device).empty_cache()


def _trim() -> None:
    """Has the C library give freed memory back to the system, which it else keeps for the next request."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> object | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
