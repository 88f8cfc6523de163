"""Where randomness comes from: one seed for the libraries, and the order of an epoch as a function of it."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_order_seed: int | None = None


def set_seed(seed: int, deterministic: bool | str | None = None, *, benchmark: bool | None = None) -> None:
    """Seeds Python, numpy, torch (every device), data workers, and the order in which `fit` visits the data.

    A `DataLoader` seeds its workers from torch: with one seed each worker draws the same random numbers in every run,
    of Python, numpy and torch, and others in each epoch.

    Args:
        seed: An int from 0 up to but not including 2**32 (numpy's range).
        deterministic: `True` makes torch use deterministic algorithms only, and raise where there is none; `"warn"`
            warns there; `False` allows all. `None` = as it is. Default: `None`.
        benchmark: `True` has cuDNN time its algorithms for each new shape and take the fastest: faster where shapes
            stay, but the choice, and with it the rounding, may differ between runs. `None` = as it is, and off where
            `deterministic` is on. Default: `None`.
    Raises:
        ValueError: `seed` is outside of the range, or the fastest algorithms are wanted deterministic.
    Example:
        >>> set_seed(0)
        >>> first = torch.rand(1)
        >>> set_seed(0)
        >>> bool(first == torch.rand(1))
        True

    Source: torch's notes on reproducibility.
    """
    global _order_seed
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} is not a seed. Give an int from 0 to 4294967295, numpy's largest.")
    _choose_algorithms(deterministic, benchmark)
    _order_seed = int(seed)
    random.seed(_order_seed)
    np.random.seed(_order_seed)
    torch.manual_seed(_order_seed)
    if (xla := _xla_in_use()) is not None:
        xla.set_rng_state(_order_seed)


def _choose_algorithms(deterministic: bool | str | None, benchmark: bool | None) -> None:
    if not any(deterministic is known for known in (None, True, False)) and deterministic != "warn":
        raise ValueError(f'deterministic={deterministic!r} is not known. Give True, False, "warn" or None.')
    if not any(benchmark is known for known in (None, True, False)):
        raise ValueError(f"benchmark={benchmark!r} is not known. Give True, False or None.")
    if deterministic and benchmark:
        raise ValueError(
            f"deterministic={deterministic!r} and benchmark=True contradict each other: cuDNN takes what was fastest "
            f"this time. Give one of them."
        )
    if deterministic is not None:
        # Read by cuBLAS when its first handle is made; without it torch refuses matrix products on the GPU.
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
        torch.backends.cudnn.deterministic = bool(deterministic)
    if benchmark is not None or deterministic:
        torch.backends.cudnn.benchmark = bool(benchmark)


Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def random_state(generators: Iterable[Generator] = ()) -> dict[str, Any]:
    """Where the generators of Python, numpy and torch, on every device in use, are: tensors and plain data.

    Args:
        generators: These, too. Default: none.
    """
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return {
        "order": _order_seed,
        "python": _state_of_python(random.getstate()),
        "numpy": _state_of_numpy(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in cuda],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "xla": None if (xla := _xla_in_use()) is None else xla.get_rng_state(),
        "generators": [_state_of(one) for one in generators],
    }


def set_random_state(state: Mapping[str, Any], generators: Iterable[Generator] = ()) -> None:
    """Puts all generators where `random_state` found them."""
    global _order_seed
    _order_seed = state.get("order", _order_seed)
    random.setstate(_python_from(state["python"]))
    np.random.set_state(_numpy_from(state["numpy"]))
    torch.set_rng_state(state["torch"])
    for device, of_device in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(of_device, device)
    if state.get("mps") is not None:
        torch.mps.set_rng_state(state["mps"])
    if state.get("xla") is not None and (xla := _xla_in_use()) is not None:
        xla.set_rng_state(state["xla"])
    for one, its_state in zip(generators, state.get("generators", ()), strict=False):
        _put_back(one, its_state)


def _xla_in_use() -> Any:
    """torch_xla's generator; `None` where nothing is on its devices: to ask would choose them for the whole process."""
    model = sys.modules.get("torch_xla.core.xla_model")
    return model if model is not None and model.torch_xla._XLAC._xla_get_spmd_config_is_locked() else None


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _state_of_python(generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return _state_of_numpy(generator.get_state(legacy=False))
    return _state_of_numpy(generator.bit_generator.state)


def _put_back(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(_python_from(state))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_numpy_from(state))
    else:
        generator.bit_generator.state = _numpy_from(state)


def _state_of_python(state: tuple) -> list[Any]:
    version, numbers, gauss = state
    return [version, list(numbers), gauss]


def _python_from(state: list[Any]) -> tuple:
    version, numbers, gauss = state
    return version, tuple(numbers), gauss


def _state_of_numpy(state: Any) -> Any:
    """numpy's nested dict, its arrays as tensors: of a dtype that torch has, and numpy's in words."""
    if isinstance(state, dict):
        return {name: _state_of_numpy(part) for name, part in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": str(state.dtype), "values": torch.from_numpy(state.view(np.uint8).copy())}
    return state


def _numpy_from(state: Any) -> Any:
    if isinstance(state, list):  # of version 1 of the format
        kind, keys, *rest = state
        return (kind, keys.numpy().astype(np.uint32), *rest)
    if isinstance(state, dict) and set(state) == {"dtype", "values"}:
        return state["values"].numpy().view(state["dtype"]).copy()
    return {name: _numpy_from(part) for name, part in state.items()} if isinstance(state, dict) else state


@contextmanager
def random_state_kept(generators: Iterable[Generator] = ()) -> Iterator[None]:
    """The random numbers of Python, numpy and torch, on every device, are afterwards what they were before.

    Args:
        generators: Of these, too. Default: none.
    """
    generators = tuple(generators)
    before = random_state(generators)
    try:
        yield
    finally:
        set_random_state(before, generators)


def seed_of_order() -> int | None:
    """What `set_seed` was given; `None` = it was not called, and torch's own seed decides."""
    return _order_seed


def epoch_order(samples: int, epoch: int) -> torch.Tensor:
    """The order of one epoch: a permutation that depends on the seed and the number of the epoch alone.

    The generator is its own, so that shuffling changes no random number the model draws.

    Args:
        samples: Number of samples.
        epoch: How many epochs were trained before this one.
    Returns:
        Indices, shape (samples,), int64.
    """
    # SeedSequence mixes the two numbers well: plain sums would give seed 1, epoch 0 the order of seed 0, epoch 1.
    mixed = np.random.SeedSequence([_seed(), epoch]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> 1))
    return torch.randperm(samples, generator=generator)


def sample_seeds(epoch: int, batch: int, samples: int) -> list[int]:
    """Seeds for what is random in the samples of a batch: they depend on the seed and on where they are alone.

    Args:
        epoch: Number of the epoch.
        batch: Number of the batch in it.
        samples: How many it has.
    """
    seeds = np.random.SeedSequence([_seed(), epoch, batch]).generate_state(samples, np.uint64)
    return (seeds >> np.uint64(1)).tolist()


def _seed() -> int:
    return (torch.initial_seed() if _order_seed is None else _order_seed) % 2**64
