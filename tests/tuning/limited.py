"""Searches within a real limit of memory, each in a process of its own: `limited.py CASE` prints what it found."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import kerastorch as kt
from kerastorch.tuning.budget import Peak

CPU = torch.device("cpu")


class Affine(nn.Module):
    """About 2 MB a sample, in tensors large enough to be given back to the system one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 65536), nn.Tanh(), nn.Linear(65536, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:, None].expand(-1, 4, -1)).mean((1, 2))[:, None]


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


class Rows(Dataset):
    def __len__(self) -> int:
        return 20_000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((16,), (index % 7 + 1) / 8), torch.zeros(1)


def model_of(kind: str) -> kt.Model:
    torch.manual_seed(0)
    return kt.Model(MODULES[kind](), backend="cpu").compile("sgd", "mse", lr=1e-6)


def data_of(samples: int) -> tuple[Tensor, Tensor]:
    return torch.rand(samples, 16), torch.zeros(samples, 1)


def peak_of(model: kt.Model, data: tuple[Tensor, Tensor], size: int) -> int:
    """What a fit of three steps takes and a validation."""
    with Peak(CPU) as taken:
        model.fit(
            *data, epochs=None, max_steps=3, batch_size=size, validation_data=data, validation_steps=1, verbose=0
        )
    return taken.bytes


def true_maximum(kind: str, budget: int, guess: int, samples: int) -> int:
    """The largest size whose peak is within the budget, to half a percent, by measuring alone."""
    model, data = model_of(kind), data_of(samples)
    peak_of(model, data, 2)  # what is loaded late
    low, high = int(guess * 0.8), min(int(guess * 1.25), samples + 1)
    if peak_of(model, data, low) > budget:
        return 0
    while high - low > max(guess // 200, 1):
        size = (low + high) // 2
        low, high = (size, high) if peak_of(model, data, size) <= budget else (low, size)
    return low


def budgeted(kind: str, budget: str, samples: str) -> dict:
    budget, samples = int(budget), int(samples)
    found = model_of(kind).find_batch_size(*data_of(samples), memory=budget)
    run = [one for one in found.trials if one.was_run]
    return {
        "found": int(found),
        "run": [[one.size, one.fits, one.peak_bytes] for one in run],
        "table": str(found),
        "budget": found.budget_bytes,
        "true": true_maximum(kind, budget, int(found), samples),
    }


def address_space(mode: str) -> dict:
    """With so much virtual memory as a limit, beyond what there is."""
    import resource

    import psutil

    model, data = model_of("affine"), data_of(4000)
    model.fit(*data, max_steps=2, batch_size=2, validation_data=data, validation_steps=1, verbose=0)
    limit = psutil.Process().memory_info().vms + 700_000_000
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
