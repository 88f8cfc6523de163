"""What all tests share: one thread, a seed, and small problems with real data."""

from __future__ import annotations

import gc
import signal

import pytest
import torch
import torch._dynamo  # as a first step does
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

from kerastorch import seeding

torch.set_num_threads(1)  # many tiny operations: a second thread only waits
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """What is there before the tests of a module is not looked through each time that one of them frees memory."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "_order_seed", None)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """150 handwritten digits, shape (150, 64), and their classes."""
    data = load_digits()
    return torch.tensor(data.data[:150] / 16.0, dtype=torch.float32), torch.tensor(data.target[:150])


@pytest.fixture(scope="session")
def diabetes() -> tuple[Tensor, Tensor]:
    """150 patients, shape (150, 10), and the progress of their disease, standardized, shape (150, 1)."""
    data = load_diabetes()
    target = torch.tensor(data.target[:150, None], dtype=torch.float32)
    return torch.tensor(data.data[:150] * 20, dtype=torch.float32), (target - target.mean()) / target.std()


@pytest.fixture
def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture
def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))
