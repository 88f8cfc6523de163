"""Running out of memory: how an error says so, on any device, and how to give back what nobody needs."""

from __future__ import annotations

import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's allocator and some libraries of CUDA raise plain RuntimeErrors.
    known = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in known)


def free_memory(device: torch.device) -> None:
    """Gives back what nobody refers to any more."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
