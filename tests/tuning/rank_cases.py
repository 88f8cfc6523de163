"""Searches in ranks, started by torchrun: `rank_cases.py FILE` writes what each rank has found into FILE.RANK."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import kerastorch as kt
from kerastorch.backends import DDP, FSDP

RANK = int(os.environ.get("RANK", 0))
X = torch.rand(300, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Full(nn.Module):
    """On rank 1 there is less memory, or something else is wrong."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(4, 1), error

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, torch._subclasses.FakeTensor) and RANK == 1 and len(x) > 40:
            raise self.error
        return self.layer(x)


class Wide(nn.Module):
    """Takes 320 MB a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x).expand(len(x), 40_000_000) * 2.0).mean(1, keepdim=True)


def model_of(backend, make: Callable[[], nn.Module]) -> kt.Model:
    kt.set_seed(0)
    return kt.Model(make(), backend=backend).compile("adam", "mse", lr=0.1)


def weights(model: kt.Model) -> list:
    state = model.backend.whole(model.module.state_dict())
    return [value.tolist() for value in state.values()]


def less_memory() -> dict:
    model = model_of(DDP(timeout_s=30), lambda: Full(torch.OutOfMemoryError("out of memory")))
    before = weights(model)
    found = model.find_batch_size(X, Y, mode="binsearch", margin=0)
    same = before == weights(model)
    steps = model.fit(X, Y, epochs=2, verbose=0).params["steps"]
    alone = model_of(DDP(timeout_s=30), lambda: Full(torch.OutOfMemoryError("out of memory")))
    alone.fit(X, Y, epochs=2, batch_size=int(found), verbose=0)
    return {
        "found": int(found),
        "per_rank": found.per_rank,
        "trials": [[one.size, one.fits, one.reason] for one in found.trials],
        "same": same,
        "steps": steps,
        "trained": weights(model) == weights(alone),
        "speeds": [one.samples_per_s for one in found.trials],
    }


def fails_alone() -> dict:
    model = model_of(DDP(timeout_s=30), lambda: Full(ValueError("rank 1 is not well")))
    before, began = weights(model), time.monotonic()
    try:
        model.find_batch_size(X, Y, mode="power")
        said = ""
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "seconds": time.monotonic() - began, "same": before == weights(model)}


def other_budgets() -> dict:
    wide = nn.Sequential(nn.Linear(4, 5000), nn.Tanh(), nn.Linear(5000, 1))
    found = {}
    for mode in ("predict", "binsearch"):
        model = model_of(DDP(timeout_s=30), lambda: wide)
        memory = (200_000_000, 5_000_000)[RANK]
        result = model.find_batch_size(X, Y, mode=mode, memory=memory, apply=False)
        found[mode] = [int(result), result.budget_bytes, [[one.size, one.fits] for one in result.trials]]
    return found


def sharded() -> dict:
    wide = nn.Sequential(nn.Linear(4, 5000), nn.Tanh(), nn.Linear(5000, 1))
    model = model_of(FSDP(wrap=nn.Linear, timeout_s=30), lambda: wide)
    before = weights(model)
    found = model.find_batch_size(X, Y, memory="10MB")
    same = before == weights(model)
    return {
        "found": int(found),
        "run": [one.size for one in found.trials if one.was_run],
        "trials": str(found),
        "same": same,
        "steps": model.fit(X, Y, verbose=0).params["steps"],
    }


def normalized() -> dict:
    """A batch of one sample in a process is refused by a normalization."""
    make = partial(nn.Sequential, nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    found = {
        mode: int(model_of(DDP(timeout_s=30), make).find_batch_size(X, Y, mode=mode)) for mode in ("power", "predict")
    }
    model = model_of(DDP(timeout_s=30), make)
    try:
        model.find_batch_size(X, Y, memory=1)
        said = ""
    except torch.OutOfMemoryError as error:
        said = str(error)
    return {"found": found, "said": said}


def sharded_without_room() -> dict:
    """So much a sample that one process has no room for any."""
    model, began = model_of(FSDP(wrap=nn.Linear, timeout_s=60), Wide), time.monotonic()
    try:
        model.find_batch_size(X, Y, memory=(2_000_000_000, 10_000_000)[RANK])
        said = ""
    except torch.OutOfMemoryError as error:
        said = str(error)
    return {"said": said, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    cases = ["less_memory", "fails_alone", "other_budgets", "sharded", "normalized", "sharded_without_room"]
    names = sys.argv[2:] or cases
    results = {}
    for name in names:
        results[name] = globals()[name]()
        with open(f"{sys.argv[1]}.{RANK}", "w") as file:
            json.dump(results, file)
