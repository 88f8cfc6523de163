"""Runs that must be the same wherever they run; as a script, each in one process and then in the ranks it runs in.

    torchrun --standalone --nproc-per-node=2 tests/backends/cases.py '{"backend": "DDP"}' out.json [case ...]

Rank 0 writes `{case: {"weights": largest difference, "history": ..., "evaluate": ..., "predict": ...}}`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import kerastorch as kt
from kerastorch import callbacks

X, Y = load_digits(return_X_y=True)
X, Y = (X / 16).astype("float32")[:101], Y.astype("int64")[:101]  # a prime number: nothing divides it
MASKED = np.where(np.arange(101) % 3 == 0, -100, Y)


class Digits(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index], Y[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def mlp(seed=1, norm=False):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32) if norm else nn.Identity(), nn.Tanh(), nn.Linear(32, 10))


def with_frozen_layer():
    net = mlp()
    net[0].requires_grad_(False)
    return net


class Heads(nn.Module):
    """Two outputs, and a layer that nothing uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.digit, self.value = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        x = self.body(x).tanh()
        return {"digit": self.digit(x), "value": self.value(x)[:, 0]}


class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(64, 10)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Convnet(nn.Module):
    """BatchNorm over images, and a reshape that no batch of 0 samples would get through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 10)

    def forward(self, x):
        x = self.norm(self.conv(x.view(-1, 1, 8, 8))).relu()
        return self.head(x.view(x.size(0), -1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.cell, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, state=None):
        output, state = self.cell(x, state)
        return self.head(output), state


class Penalized(kt.Model):
    def compute_loss(self, batch):
        penalty = sum(parameter.square().sum() for parameter in self.module.parameters())
        self.log("penalty", penalty)
        return super().compute_loss(batch) + 1e-3 * penalty


class Twins(kt.Model):
    def train_step(self, batch):
        x, y = batch
        for name in ("left", "right"):
            loss = nn.functional.cross_entropy(self.module[name](x), y)
            self.backward(loss)
            self.optimizer_step(name)
            self.log(f"{name}_loss", loss)


class OwnStep(kt.Model):
    def train_step(self, batch):
        return super().train_step(batch)


def twins():
    return nn.ModuleDict({"left": mlp(1), "right": mlp(2)})


class StopsAt(callbacks.Callback):
    """Only one of the ranks wants the end."""

    adds_to_logs = ()

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2 and self.model.backend.rank == self.model.backend.world - 1:
            self.model.stop_training = True


ADAM = {"optimizer": "adamw", "loss": "cross_entropy", "metrics": ["accuracy"], "lr": 1e-2}
SGD = ADAM | {"optimizer": "sgd", "lr": 0.1}
F1 = torchmetrics.classification.MulticlassF1Score
BOTH = {"optimizer": {"left": "adam", "right": "sgd"}, "lr": {"left": 0.01, "right": 0.1}}
TIME = X.reshape(-1, 8, 8), (np.arange(8)[None] + Y[:, None]) % 3
OUTPUTS = {"digit": "cross_entropy", "value": ("mse", 0.3)}


def loader(data, **options):
    return lambda: (DataLoader(data, batch_size=13, **options),)


def batches():
    return [(torch.from_numpy(X[i : i + 20]), torch.from_numpy(Y[i : i + 20])) for i in range(0, 101, 20)]


TENSORS = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
CASES = {
    "arrays": {},
    "everything at once": {
        "compile": ADAM | {"clip": 0.3, "schedule": "cosine"},
        "data": (X, MASKED),
        "fit": {"batch_size": 15, "accumulate": 2, "validation_split": 0.1},
    },
    "a rank without samples": {"data": (X[:33], Y[:33]), "fit": {"batch_size": 32}},
    "a rank without samples, normalized": {
        "net": lambda: mlp(norm=True), "compile": SGD, "data": (X[:98], Y[:98]), "fit": {"batch_size": 32},
    },
    "a window of such": {"data": (X[:65], Y[:65]), "fit": {"batch_size": 16, "accumulate": 3}},
    "sample_weight": {"fit": {"sample_weight": np.linspace(0, 2, 101).astype("float32")}},
    "class_weight": {"fit": {"class_weight": {digit: digit / 5 for digit in range(10)}}},
    "dataset": {"data": lambda: (Digits(),)},
    "loader": {"data": loader(Digits(), shuffle=True)},
    "loader of tensors": {"data": loader(TENSORS, shuffle=True)},
    "loader with workers": {"data": loader(Digits(), shuffle=True, num_workers=2)},
    "iterable dataset": {"data": lambda: (Stream(),), "fit": {"batch_size": 13}},
    "loader of an iterable": {"data": loader(Stream())},
    "list of batches": {"data": lambda: (batches(),)},
    "callable": {"data": lambda: (lambda: iter(batches()),)},
    "validation by a loader": {"fit": {"validation_data": DataLoader(Digits(), batch_size=7, shuffle=True)}},
    "batchnorm": {"net": lambda: mlp(norm=True), "compile": SGD, "fit": {"batch_size": 21}},
    "batchnorm of images": {"net": Convnet, "compile": SGD, "fit": {"batch_size": 21}},
    "outputs": {
        "net": Heads, "compile": {"optimizer": "sgd", "loss": OUTPUTS, "lr": 0.1, "metrics": {"digit": ["accuracy"]}},
        "data": (X, {"digit": MASKED, "value": Y.astype("float32")}), "fit": {"accumulate": 2},
    },
    "a loss of the module's": {"net": OwnLoss, "compile": {"optimizer": "adam", "loss": None, "lr": 0.01}},
    "compute_loss": {"model": Penalized, "fit": {"accumulate": 2}},
    "several optimizers": {"net": twins, "model": Twins, "compile": BOTH},
    "several optimizers in windows": {
        "net": twins, "model": Twins, "compile": BOTH, "fit": {"accumulate": 3, "batch_size": 12},
    },
    "train_step": {"model": OwnStep, "compile": SGD, "data": (X, MASKED)},
    "train_step in windows": {"model": OwnStep, "data": (X, MASKED), "fit": {"accumulate": 2}},
    "microbatch": {"compile": SGD, "data": (X, MASKED), "fit": {"microbatch": 3}},
    "LBFGS": {
        "compile": {"optimizer": "lbfgs", "loss": "cross_entropy", "lr": 0.02, "precision": "64"},
        "data": (X[:91], Y[:91]), "fit": {"batch_size": 50},
    },
    "tbptt_steps": {
        "net": Recurrent, "compile": {"optimizer": "sgd", "loss": "cross_entropy", "lr": 0.1, "tbptt_steps": 3},
        "data": TIME, "fit": {"batch_size": 20},
    },
    "frozen": {"net": with_frozen_layer},
    "unfrozen later": {
        "net": with_frozen_layer, "compile": SGD,
        "fit": {"epochs": 4, "callbacks": lambda: [callbacks.Unfreeze(2, "0", 0.05)]},
    },
    "torchmetrics": {
        "compile": SGD | {"metrics": ["accuracy", "auc", "top3_accuracy", F1(10, average="macro")]},
        "fit": {"validation_split": 0.2},
    },
    "torchmetrics of a rank without samples": {
        "compile": SGD | {"metrics": ["auc", F1(10)]}, "fit": {"validation_data": (X[:1], Y[:1])},
    },
    "validation within epochs": {"compile": SGD, "fit": {"validation_split": 0.2, "validation_freq": 0.5}},
    "steps_per_epoch": {"fit": {"steps_per_epoch": 2, "epochs": 5}},
    "max_steps": {"fit": {"epochs": 5, "max_steps": 7, "batch_size": 20}},
    "EMA": {"compile": SGD, "fit": {"validation_split": 0.2, "callbacks": lambda: [callbacks.EMA(0.9)]}},
    "SWA": {
        "net": lambda: mlp(norm=True), "compile": SGD, "data": (X[:100], Y[:100]),
        "fit": {"epochs": 4, "callbacks": lambda: [callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2)]},
    },
    "EarlyStopping": {
        "fit": {
            "epochs": 20, "validation_split": 0.3,
            "callbacks": lambda: [callbacks.EarlyStopping("val_loss", patience=1, min_delta=0.2)],
        },
    },
    "a stop that one rank asks for": {"fit": {"epochs": 3, "callbacks": lambda: [StopsAt()], "batch_size": 20}},
    "fp16": {"compile": SGD | {"precision": "16"}, "fit": {"accumulate": 2}},
    "double": {"compile": ADAM | {"precision": "64"}, "data": (X, MASKED), "fit": {"accumulate": 2}},
    "sanity_steps": {"compile": SGD, "fit": {"validation_split": 0.2, "sanity_steps": 2}},
    "overfit_batches": {"fit": {"overfit_batches": 2}},
    "dry_run": {"fit": {"dry_run": True}},
}  # fmt: skip


def run(case, backend):
    """A model that was trained on a case, its history, and what it says of the data."""
    kt.set_seed(3)
    model = case.get("model", kt.Model)(case.get("net", mlp)(), backend=backend).compile(**case.get("compile", ADAM))
    data = case.get("data", (X, Y))
    made = {name: value() if callable(value) else value for name, value in case.get("fit", {}).items()}
    history = model.fit(*(data() if callable(data) else data), **{"epochs": 2, "verbose": 0} | made)
    if not isinstance(data, tuple) or model._overrides("train_step") or case.get("net") in (Heads, OwnLoss, Recurrent):
        return model, history, [], np.zeros(0)
    scores = model.evaluate(*data, batch_size=32, verbose=0)
    return model, history, scores if isinstance(scores, list) else [scores], model.predict(data[0], verbose=0)


def differences(case, backend):
    """Between a run in one process and one elsewhere."""
    one, other = run(case, "cpu"), run(case, backend)
    states = [model.module.state_dict() for model, *_ in (one, other)]
    histories = [history.history for _, history, *_ in (one, other)]
    lengths = [{name: len(values) for name, values in history.items()} for history in histories]
    pairs = [
        (a, b) for name in histories[0] for a, b in zip(histories[0][name], histories[1].get(name, []), strict=False)
    ]
    return {
        "weights": max((states[0][name] - states[1][name].cpu()).abs().max().item() for name in states[0]),
        "history": max((abs(a - b) for a, b in pairs), default=0.0) if lengths[0] == lengths[1] else "other lengths",
        "evaluate": max((abs(a - b) for a, b in zip(one[2], other[2], strict=True)), default=0.0),
        "predict": float(np.abs(one[3] - other[3]).max(initial=0.0)) if one[3].shape == other[3].shape else "shape",
        "stopped_by": [one[1].stopped_by, other[1].stopped_by],
    }


def main():
    options, out, *names = sys.argv[1:]
    options = json.loads(options)
    kind, found = options.pop("backend"), {}
    warnings.simplefilter("ignore")
    for name in names or CASES:
        try:
            found[name] = differences(CASES[name], getattr(kt.backends, kind)(**options))
        except Exception as error:
            traceback.print_exception(error)
            os._exit(1)  # the others may wait anywhere
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
