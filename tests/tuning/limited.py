"""Searches within a real limit of memory, each in a process of its own: `limited.py CASE` prints what it found."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import kerastorch as kt
from kerastorch.tuning.budget import Peak

CPU = torch.device("cpu")


class Affine(nn.Module):
    """A few MB a sample, in tensors large enough to be given back to the system one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16 * 2**13))

    def forward(self, x: Tensor) -> Tensor:
        return (x.repeat(1, 2**13) * self.scale).tanh().mean(1, keepdim=True)


class Quadratic(nn.Module):
    """Attention over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.head = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.key(x) @ x.T).softmax(1) @ x)


class Constant(nn.Module):
    """Takes 64 MB or so, whatever the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.rand(2**22)), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.table.exp().mean()


class Untraceable(Quadratic):
    """Looks at values, which a trace has none of."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)


MODULES = {"affine": Affine, "quadratic": Quadratic, "constant": Constant, "untraceable": Untraceable}


def model_of(kind: str) -> kt.Model:
    torch.manual_seed(0)
    return kt.Model(MODULES[kind](), backend="cpu").compile("sgd", "mse", lr=1e-6)


def data_of(samples: int) -> tuple[Tensor, Tensor]:
    return torch.rand(samples, 16), torch.zeros(samples, 1)


def peak_of(model: kt.Model, data: tuple[Tensor, Tensor], size: int) -> int:
    """What a fit of three steps takes and a validation."""
    with Peak(CPU) as taken:
        model.fit(*data, epochs=None, max_steps=3, batch_size=size, validation_data=data, validation_steps=1, verbose=0)
    return taken.bytes


def above(kind: str, found: int, samples: int) -> int | None:
    """What a batch takes that is 6% larger, by measuring; `None` where there are no more samples."""
    size = int(found * 1.06) + 1
    if size > samples:
        return None
    model, data = model_of(kind), data_of(samples)
    peak_of(model, data, 2)  # what is loaded late
    return peak_of(model, data, size)


def budgeted(budget: str, samples: str, *kinds: str) -> dict:
    return {kind: searched(kind, int(budget), int(samples)) for kind in kinds}


def searched(kind: str, budget: int, samples: int) -> dict:
    found = model_of(kind).find_batch_size(*data_of(samples), memory=budget)
    run = [one for one in found.trials if one.was_run]
    return {
        "found": int(found),
        "run": [[one.size, one.fits, one.peak_bytes] for one in run],
        "table": str(found),
        "budget": found.budget_bytes,
        "above": above(kind, int(found), samples),
    }


def address_space(mode: str) -> dict:
    """With so much virtual memory as a limit, beyond what there is."""
    import resource

    import psutil

    model, data = model_of("affine"), data_of(4000)
    model.fit(*data, max_steps=2, batch_size=2, validation_data=data, validation_steps=1, verbose=0)
    limit = psutil.Process().memory_info().vms + 400_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    found = model.find_batch_size(*data, mode=mode)
    history = model.fit(*data, max_steps=2, verbose=0)
    return {
        "found": int(found),
        "run": [[one.size, one.fits, one.peak_bytes] for one in found.trials if one.was_run],
        "table": str(found),
        "budget": found.budget_bytes,
        "loss": history.history["loss"],
        "limit": resource.getrlimit(resource.RLIMIT_AS)[0] == limit,
    }


def container(group: str, kind: str, times: str) -> dict:
    """In a control group, then so many times the batch that was found: what takes more than the limit is killed."""
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    model, data = model_of(kind), data_of(20_000)
    found = model.find_batch_size(*data)
    peak = peak_of(model, data, int(found * float(times)))
    run = [[one.size, one.fits, one.peak_bytes] for one in found.trials if one.was_run]
    return {"found": int(found), "run": run, "table": str(found), "budget": found.budget_bytes, "peak": peak}


def over_allocation() -> dict:
    """What is taken beyond a budget is an error, and the limit is what it was."""
    import resource

    from kerastorch.tuning.budget import SLACK_BYTES, limited

    before = resource.getrlimit(resource.RLIMIT_DATA)
    errors = []
    for bytes_ in (50_000_000, 400_000_000 + SLACK_BYTES):
        try:
            with limited(CPU, 100_000_000):
                within = resource.getrlimit(resource.RLIMIT_DATA)
                torch.ones(bytes_, dtype=torch.uint8)
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    return {"errors": errors, "is_back": resource.getrlimit(resource.RLIMIT_DATA) == before, "was": within != before}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
