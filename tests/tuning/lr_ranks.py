"""Searches in ranks beside those of one process: a script for `torchrun`.

    torchrun ... tests/tuning/lr_ranks.py out.pt

Rank 0 writes, for each case, what each rank has found with each backend.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import kerastorch as kt
from kerastorch import backends

X, Y = load_digits(return_X_y=True)
X, Y = torch.tensor(X[:151] / 16, dtype=torch.float32), torch.tensor(Y[:151])  # one sample in the last batch
MASKED = torch.where(torch.arange(151) % 3 == 0, -100, Y)
CASES: dict[str, dict[str, Any]] = {
    "arrays": {},
    "stopped early": {"stop_factor": 1.3, "smoothing": 0.5},
    "masked windows": {"y": MASKED, "accumulate": 3, "max_lr": 30.0},
    "own step": {"is_own": True},
    "confirmed": {"confirm": 4, "steps": 40},
}


class OwnStep(kt.Model):
    def train_step(self, batch):
        x, y = batch
        self.backward(nn.functional.cross_entropy(self.module(x), y))
        self.optimizer_step()


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def find(backend: Any, y: Any = Y, is_own: bool = False, **options: Any) -> dict[str, Any]:
    kt.set_seed(3)
    model = (OwnStep if is_own else kt.Model)(mlp(), backend=backend)
    model.compile("adam", "cross_entropy", lr=0.05, precision="64")  # in which steps that diverge are alike, too
    before = [one.clone() for one in model.backend.whole(model.module.state_dict()).values()]
    found = model.find_lr(X, y, **{"batch_size": 30, "confirm": False, "min_lr": 1e-5, "steps": 60} | options)
    after = model.backend.whole(model.module.state_dict()).values()
    is_same = all(map(torch.equal, before, after))
    loss = model.fit(X, y, batch_size=30, verbose=0).history.get("loss", [0.0])[0]
    kept = {"rate": model.optimizer.param_groups[0]["lr"], "is_same": is_same, "loss": loss}
    return kept | {"lr": found.lr, "losses": found.losses, "lrs": found.lrs, "tried": found.tried}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, list]] = {}
    for kind in ("DDP", "FSDP"):
        found[kind] = {}
        for name in CASES if kind == "DDP" else ("arrays", "confirmed"):  # FSDP takes its time
            case = CASES[name]
            mine = find(getattr(backends, kind)(timeout_s=60), **case)
            found[kind][name] = [None] * dist.get_world_size()
            dist.all_gather_object(found[kind][name], mine)
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
