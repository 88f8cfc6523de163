"""A run in ranks that dies and goes on, beside one that does not: a script for `torchrun`.

    torchrun ... tests/backends/going_on.py '{"backend": "DDP"}' folder

Rank 0 writes `folder/ends.pt`: name of a run -> what it ended with; and leaves `folder/cut.pt`, saved in the middle of
an epoch and of a window.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import kerastorch as kt
from kerastorch import callbacks
from tests.backends.cases import MASKED, Digits, X

DIES_AT = 10  # batches of the run: in the second epoch, in the middle of a window


class Died(Exception):
    pass


class Saves(callbacks.Callback):
    """Saves at a safe point, and dies behind it."""

    adds_to_logs = ()

    def __init__(self, path, batch):
        self.path, self.batch, self.seen = path, batch, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.batch:
            self.model.at_safe_point(self._save)

    def _save(self):
        self.model.save(self.path)
        raise Died


def model(backend, dropout):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 10))
    metrics = ["accuracy", "auc"] if not dropout else ["accuracy"]
    return kt.Model(net, backend=backend).compile("sgd", "cross_entropy", metrics=metrics, lr=0.1, clip=1.0)


def data(kind):
    if kind == "loader":
        return (DataLoader(Digits(), batch_size=15, shuffle=True, num_workers=2),)
    return X[:99], MASKED[:99]


def fit(backend, kind="arrays", dropout=0.0, **options):
    """Trains for three epochs of seven batches, in windows of four."""
    kt.set_seed(3)
    trained = model(backend, dropout)
    own = {} if kind == "loader" else {"batch_size": 15}
    history = trained.fit(*data(kind), epochs=3, accumulate=4, verbose=0, **own, **options)
    return trained, history


def end_of(trained, history):
    return {"module": {name: value.cpu() for name, value in trained.module.state_dict().items()}} | history.history


def main():
    options, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    kind = options.pop("backend")
    warnings.simplefilter("ignore")
    backend, ends = getattr(kt.backends, kind)(**options), {}
    for name, how in {"arrays": {}, "dropout": {"dropout": 0.5}, "loader": {"kind": "loader"}}.items():
        path = folder / ("cut.pt" if name == "arrays" else f"{name}.pt")
        ends[name] = end_of(*fit(backend, **how))
        try:
            fit(backend, **how, callbacks=[Saves(path, DIES_AT)])
        except Died:
            ends[f"{name}, gone on with"] = end_of(*fit(backend, **how, resume=path))
    if backend.rank == 0:
        torch.save(ends, folder / "ends.pt")


if __name__ == "__main__":
    main()
