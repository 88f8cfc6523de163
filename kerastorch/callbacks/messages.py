"""What callbacks say on the screen, beside whatever else is there, and whether they are to."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def is_verbose(verbose: Any) -> bool:
    """Whether a callback's `verbose` asks for messages.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    if isinstance(verbose, int) and verbose in (0, 1):
        return bool(verbose)
    raise ValueError(f"verbose={verbose!r} is not known, expected 0 or 1. Give 0 for silence, 1 for messages.")


def say(message: str) -> None:
    """Prints a line of its own, above the live line of a progress bar where one is up.

    Example:
        >>> say("Epoch 5: early stopping.")
        Epoch 5: early stopping.
    """
    from tqdm import tqdm

    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:  # of several processes one speaks
        tqdm.write(message)
