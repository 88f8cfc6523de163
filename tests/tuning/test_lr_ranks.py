"""find_lr in several processes: the curve of one process, and an answer that all of them share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kerastorch as kt
from kerastorch.backends import DDP
from tests.processes import torchrun
from tests.tuning import lr_ranks

SCRIPT = Path(lr_ranks.__file__)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "found.pt"
    ran = torchrun(SCRIPT, str(path))
    assert ran.returncode == 0, ran.stderr[-6000:]
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", lr_ranks.CASES)
def test_two_ranks_find_what_one_process_finds_and_agree(by_two, name):
    one = lr_ranks.find("cpu", **lr_ranks.CASES[name])
    assert one["is_same"] and one["lr"] is not None
    for first, second in (by_two[kind][name] for kind in by_two if name in by_two[kind]):
        assert first == second
        assert first["is_same"]
        assert first["lrs"] == one["lrs"]
        assert first["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-5)
        assert first["lr"] == first["rate"] == pytest.approx(one["lr"])
        assert first["tried"] == pytest.approx(one["tried"], rel=1e-5)
        assert first["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_ranks_that_fit_starts_find_the_rate_once():
    x, y = lr_ranks.X, lr_ranks.Y
    found = []
    for backend in ("cpu", DDP(2, timeout_s=60)):
        kt.set_seed(3)
        model = kt.Model(lr_ranks.mlp(), backend=backend)
        model.compile("adam", "cross_entropy", lr="auto", precision="64")
        losses = model.fit(x, y, batch_size=30, verbose=0).history["loss"]
        found.append([model.optimizer.param_groups[0]["lr"], *losses])
        losses = model.fit(x, y, batch_size=30, verbose=0).history["loss"]
        found[-1] += [model.optimizer.param_groups[0]["lr"], *losses]
    one, two = found
    assert one[0] == one[2] != 1e-3 and two[0] == two[2]
    assert two == pytest.approx(one, rel=1e-5)
