"""Where randomness comes from: one seed for the libraries, and the order of an epoch as a function of it."""

from __future__ import annotations

import random

import numpy as np
import torch

_order_seed: int | None = None


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seeds Python, numpy, torch (every device) and the order in which `fit` visits the data.

    Args:
        seed: An int from 0 up to but not including 2**32 (numpy's range).
        deterministic: `True` makes torch use deterministic algorithms only, and raise where there is none;
            `False` leaves that setting as it is. Default: `False`.
    Raises:
        ValueError: `seed` is outside of the range.
    Example:
        >>> set_seed(0)
        >>> first = torch.rand(1)
        >>> set_seed(0)
        >>> bool(first == torch.rand(1))
        True
    """
    global _order_seed
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} is not a seed. Give an int from 0 to 4294967295, numpy's largest.")
    _order_seed = int(seed)
    random.seed(_order_seed)
    np.random.seed(_order_seed)
    torch.manual_seed(_order_seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def epoch_order(samples: int, epoch: int) -> torch.Tensor:
    """The order of one epoch: a permutation that depends on the seed and the number of the epoch alone.

    The generator is its own, so that shuffling changes no random number the model draws.

    Args:
        samples: Number of samples.
        epoch: How many epochs were trained before this one.
    Returns:
        Indices, shape (samples,), int64.
    """
    seed = torch.initial_seed() if _order_seed is None else _order_seed
    # SeedSequence mixes the two numbers well: plain sums would give seed 1, epoch 0 the order of seed 0, epoch 1.
    mixed = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> 1))
    return torch.randperm(samples, generator=generator)
