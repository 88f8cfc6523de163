"""Runs that FSDP must do as one process does: each a function of a backend, called in this process and in ranks.

As a script, started by torchrun: `fsdp_cases.py FILE SHARD NAME...` writes what rank 0 has of each case into a file.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import kerastorch as kt
from kerastorch.backends import FSDP

TIMEOUT_S = 60


def digits(samples):
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype("float32")[:samples], y[:samples].astype("int64")


def mlp(*extra):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 33), *extra, nn.Tanh(), nn.Linear(33, 10))


def shown(model, history=None, **more):
    """What is compared: plain numbers and whole tensors."""
    weights = model.backend.whole(model.module.state_dict())
    return {"weights": {name: one.detach().clone() for name, one in weights.items()}} | (
        {} if history is None else {"history": history.history}
    ) | more  # fmt: skip


def trained(model, x, y, **options):
    options = {"epochs": 2, "batch_size": 20, "verbose": 0} | options
    history = model.fit(x, y, **options)
    evaluated = model.evaluate(x, y, batch_size=32, return_dict=True, verbose=0)
    return shown(model, history, evaluated=evaluated, predicted=model.predict(x, batch_size=50, verbose=0))


# 301 samples: the last batch of an epoch has one, of which a rank gets none.


def everything_at_once(backend):
    x, y = digits(301)
    y[::7] = -100
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend(wrap=nn.Linear))
    model.compile("adamw", "cross_entropy", metrics=["accuracy"], lr=1e-2, clip=0.5, schedule="cosine")
    return trained(model, x, y, accumulate=3, epochs=3, validation_split=0.1)


def momentum_and_batchnorm(backend):
    x, y = digits(301)
    kt.set_seed(3)
    model = kt.Model(mlp(nn.BatchNorm1d(33)), backend=backend(wrap=None))
    model.compile(lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), "cross_entropy", metrics=["accuracy"])
    return trained(model, x[:299], y[:299])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.digit, self.parity = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))  # which torch cannot shard

    def forward(self, x):
        hidden = torch.tanh(self.body(x)) * self.scale
        return self.digit(hidden), self.parity(hidden)


def losses_of_their_own_counts(backend):
    x, y = digits(301)
    digit, parity = y.copy(), y % 2
    digit[::3], parity[::5] = -100, -100
    kt.set_seed(3)
    model = kt.Model(TwoHeads(), backend=backend(wrap=["digit"]))
    model.compile("adam", ["cross_entropy", ("cross_entropy", 0.5)], lr=1e-2, clip=1.0)
    history = model.fit(x, (digit, parity), epochs=2, batch_size=20, accumulate=3, verbose=0)
    return shown(model, history, norm=float(model.gradient_norm))


class Twins(kt.Model):
    def train_step(self, batch):
        x, y = batch
        for name in ("left", "right"):
            loss = nn.functional.cross_entropy(self.module[name](x), y)
            self.backward(loss)
            self.optimizer_step(name)
            self.log(f"{name}_loss", loss)


def several_optimizers(backend):
    x, y = digits(301)
    kt.set_seed(3)
    torch.manual_seed(1)
    module = nn.ModuleDict({"left": mlp(), "right": nn.Linear(64, 10)})
    model = Twins(module, backend=backend()).compile({"left": "adamw", "right": "sgd"}, "cross_entropy", lr=1e-2)
    history = model.fit(x, y, epochs=2, batch_size=20, accumulate=2, verbose=0)
    return shown(model, history)


class Halves(kt.Model):
    def compute_loss(self, batch):
        x, y = batch
        hidden = self.module[0](x)
        return nn.functional.cross_entropy(self.module[2](torch.tanh(hidden)), y)


def parts_called_by_themselves(backend):
    x, y = digits(301)
    kt.set_seed(3)
    model = Halves(mlp(), backend=backend(wrap=["0", "2"])).compile("adamw", "cross_entropy", lr=1e-2)
    return trained(model, x, y, validation_split=0.2)


def frozen_and_thawed(backend):
    x, y = digits(301)
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend(wrap=nn.Linear)).compile("adamw", "cross_entropy", lr=1e-2)
    model.freeze("0")
    model.fit(x, y, epochs=1, verbose=0)
    model.unfreeze("0.bias")
    return trained(model, x, y, epochs=2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(17, 8)
        layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)  # noqa: E731
        self.blocks = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).transpose(1, 2)


def tied_weights(backend):
    x, _ = digits(100)
    tokens = (x * 16).astype("int64")
    kt.set_seed(3)
    model = kt.Model(Tied(), backend=backend(wrap=(nn.TransformerEncoderLayer, nn.Embedding)))
    model.compile("sgd", "cross_entropy", lr=0.1, clip=1.0)
    return trained(model, tokens[:, :12], tokens[:, 1:13], batch_size=9)


def in_pieces(backend):
    x, y = digits(301)
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend(wrap=5)).compile("rmsprop", "cross_entropy", lr=1e-3, clip=("value", 0.1))
    norms = [kt.callbacks.GradNorm(per_layer=True)]
    # 3 pieces in one rank, 2 in the other.
    return trained(model, x, y, microbatch=4, accumulate=2, batch_size=17, callbacks=norms)


def scaled_losses(backend):
    x, y = digits(301)
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend(wrap=nn.Linear))
    model.compile("adamw", "cross_entropy", lr=1e-2, precision="16", clip=1.0)
    return trained(model, x, y) | {"skipped": model.skipped_steps}


def in_double(backend):
    x, y = digits(301)
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend(wrap=nn.Linear))
    model.compile("sgd", "cross_entropy", precision="16-true")
    model.compile("sgd", "cross_entropy")
    model.compile("adamw", "cross_entropy", precision="64")
    return trained(model, x, y)


def averaged(backend):
    x, y = digits(301)
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend(wrap=nn.Linear)).compile("adamw", "cross_entropy", lr=1e-2)
    callbacks = [kt.callbacks.EMA(0.9), kt.callbacks.EarlyStopping("loss", restore_best_weights=True)]
    return trained(model, x, y, callbacks=callbacks)


def in_and_out(backend):
    """Files and arrays of weights; a model that goes on from what was saved."""
    x, y = digits(301)
    kt.set_seed(3)
    with tempfile.TemporaryDirectory() as folder:
        folder = backend.common(folder)
        model = kt.Model(mlp(), backend=backend(wrap=nn.Linear)).compile("adamw", "cross_entropy", lr=1e-2)
        saver = kt.callbacks.ModelCheckpoint(f"{folder}/best.safetensors", save_weights_only=True)
        model.fit(x, y, epochs=1, callbacks=[saver], verbose=0)
        model.save(f"{folder}/all.pt")
        arrays = model.get_weights()
        model.fit(x, y, epochs=1, verbose=0)
        other = kt.Model(mlp(), backend=model.backend).compile("adamw", "cross_entropy", lr=1e-2)
        other.load(f"{folder}/all.pt")
        files = {"saved": other.get_weights(), "arrays": arrays}
        other.load_weights(f"{folder}/best.safetensors")
        files["weights"] = other.get_weights()
        other.set_weights([array * 2 for array in arrays])
        files["doubled"] = other.get_weights()
        other.load(f"{folder}/all.pt")
        other.fit(x, y, epochs=1, verbose=0)
        return shown(other, files=files, expected=model.get_weights())


class Killed(kt.callbacks.Callback):
    """Ends a run within an epoch, as a signal does, after so many batches."""

    def __init__(self, batches):
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        self.model.stop_training = self.left == 0 or self.model.stop_training


def going_on_model(backend):
    kt.set_seed(3)
    model = kt.Model(TwoHeads(), backend=backend(wrap=["digit"]))
    losses = ["cross_entropy", ("cross_entropy", 0.5)]
    return model.compile("adamw", losses, metrics=[["accuracy"], ["accuracy"]], lr=1e-2, clip=0.5, schedule="cosine")


def going_on_data():
    x, y = digits(301)
    digit, parity = y.copy(), y % 2
    digit[::3], parity[::5] = -100, -100
    return x, (digit, parity)


GOING_ON = {"epochs": 3, "batch_size": 20, "accumulate": 4, "verbose": 0}


def uninterrupted(backend):
    model = going_on_model(backend)
    return shown(model, model.fit(*going_on_data(), callbacks=[kt.callbacks.EMA(0.9)], **GOING_ON))


def broken_off(backend):
    """Saved within a window of the second epoch."""
    model = going_on_model(backend)
    saver = kt.callbacks.ModelCheckpoint(os.environ["FOLDER"] + "/{epoch}-{batch}.pt", save_freq=22)
    model.fit(*going_on_data(), callbacks=[kt.callbacks.EMA(0.9), saver, Killed(23)], **GOING_ON)
    return {}


class SavedApart(kt.callbacks.Callback):
    """Writes a folder, in the same place."""

    def on_train_batch_end(self, batch, logs=None):
        if self.model.history.epoch == [0] and batch == 5:
            self.model.at_safe_point(lambda: self.model.save(os.environ["FOLDER"] + "/run.dcp"))


def saved_apart(backend):
    model = going_on_model(backend)
    model.fit(*going_on_data(), callbacks=[kt.callbacks.EMA(0.9), SavedApart(), Killed(23)], **GOING_ON)
    return {}


def gone_on_from_folder(backend):
    return gone_on(backend, "*.dcp")


def gone_on(backend, pattern="[0-9]-*.pt"):
    model = going_on_model(backend)
    (file,) = list(Path(os.environ["FOLDER"]).glob(pattern))
    history = model.fit(*going_on_data(), callbacks=[kt.callbacks.EMA(0.9)], resume=str(file), **GOING_ON)
    return shown(model, history)


def held(backend):
    """How many numbers a rank holds."""
    x, y = digits(101)
    model = kt.Model(mlp(), backend=backend(wrap=nn.Linear)).compile("adamw", "cross_entropy")
    model.fit(x, y, verbose=0)
    local = lambda one: one.to_local() if hasattr(one, "to_local") else one  # noqa: E731
    states = [value for state in model.optimizer.state.values() for value in state.values() if value.ndim]
    return {
        "whole": sum(one.numel() for one in model.module.parameters()),
        "parameters": sum(local(one).numel() for one in model.module.parameters()),
        "state": sum(local(one).numel() for one in states),
    }


def after_failure(backend):
    x, y = digits(101)
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend(wrap=None)).compile("adamw", "cross_entropy")
    return model.fit(x, y, verbose=0).history["loss"]


def refused(backend):
    """What is said of each thing that cannot be; and a run after all of them."""
    x, y = digits(101)

    def recast():
        model = kt.Model(mlp(), backend=backend()).compile("sgd", "cross_entropy")
        model.fit(x, y, verbose=0)
        model.compile("sgd", "cross_entropy", precision="64").fit(x, y, verbose=0)

    tried = {
        "lazy": lambda: kt.Model(nn.LazyLinear(3), backend=backend()),
        "lbfgs": lambda: kt.Model(mlp(), backend=backend()).compile("lbfgs", "cross_entropy"),
        "adafactor": lambda: kt.Model(mlp(), backend=backend()).compile("adafactor", "cross_entropy"),
        "bypassed": lambda: Halves(mlp(), backend=backend()).compile("sgd", "cross_entropy").fit(x, y, verbose=0),
        "recast": recast,
        "checkpoint": lambda: kt.callbacks.ModelCheckpoint("run.dcp"),
    }
    said = {}
    for name, function in tried.items():
        try:
            function()
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
    return said | {"after": after_failure(backend)}


CASES = {name: one for name, one in globals().items() if callable(one) and getattr(one, "__code__", None)}


class Here:
    """Backends of one process."""

    def __call__(self, **options):
        return "cpu"

    @staticmethod
    def common(folder):
        return folder


class InRanks:
    """FSDP, of all processes that torchrun has started."""

    def __init__(self, shard, **options):
        self.shard, self.options = shard, options

    def __call__(self, **options):
        options = options if self.shard == "parameters" else {}
        return FSDP(shard=self.shard, timeout_s=TIMEOUT_S, **options, **self.options)

    @staticmethod
    def common(folder):
        return torch.distributed.is_initialized() and os.environ["FOLDER"] or folder


def main(path, shard, *names):
    torch.set_num_threads(1)
    os.environ["FOLDER"] = str(Path(path).parent)
    found = {}
    for name in names:
        try:
            found[name] = CASES[name](InRanks(shard))
        except Exception:
            found[name] = traceback.format_exc()
            print(name, found[name][-900:], file=sys.stderr, flush=True)
    if os.environ["RANK"] == "0":
        torch.save(found, path)


def differences(first, second, path=""):
    """The largest difference at each place of two results."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), (path, first.keys(), second.keys())
        return {k: v for name in first for k, v in differences(first[name], second[name], f"{path}/{name}").items()}
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        both = [differences(*pair, path) for pair in zip(first, second, strict=True)]
        return {path: max(value for one in both for value in one.values())} if both else {}
    return {path: float(np.abs(np.asarray(first, "float64") - np.asarray(second, "float64")).max())}


if __name__ == "__main__":
    main(*sys.argv[1:])
