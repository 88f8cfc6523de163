"""Runs that DeepSpeed must do as one process does: each a function of a backend, called in this process and in ranks.

As a script, started by torchrun: `deepspeed_cases.py FILE STAGE NAME...` writes what rank 0 has of each into a file.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import kerastorch as kt
from tests.backends import fsdp_cases
from tests.backends.fsdp_cases import Killed, digits, mlp, shown, trained

TIMEOUT_S = 100


def everything_at_once(backend):
    return fsdp_cases.everything_at_once(backend)


def momentum_and_batchnorm(backend):
    return fsdp_cases.momentum_and_batchnorm(backend)


def losses_of_their_own_counts(backend):
    return fsdp_cases.losses_of_their_own_counts(backend)


def tied_weights(backend):
    return fsdp_cases.tied_weights(backend)


def frozen_and_thawed(backend):
    return fsdp_cases.frozen_and_thawed(backend)


def in_and_out(backend):
    return fsdp_cases.in_and_out(backend)


def groups(backend, make):
    """Two groups with a rate and a decay each, values of gradients bounded."""
    x, y = digits(301)
    kt.set_seed(3)
    module = mlp()

    def optimizer(parameters):
        last = {"params": [*module[2].parameters()], "lr": 0.03, "weight_decay": 0.1}
        return make([{"params": [*module[0].parameters()]}, last])

    model = kt.Model(module, backend=backend()).compile(optimizer, "cross_entropy", clip=("value", 0.01))
    first = trained(model, x, y)
    states = [model.optimizer.state[one] for one in model.module.parameters()]
    state = [{name: value.clone() for name, value in one.items()} for one in states]
    return {"first": first, "state": state, "second": trained(model, x, y)}


def groups_of_adagrad(backend):
    return groups(backend, lambda parameters: torch.optim.Adagrad(parameters, 0.01))


def groups_of_momentum(backend):
    return groups(backend, lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, dampening=0.1))


def groups_of_nadam(backend):
    return groups(backend, lambda parameters: torch.optim.NAdam(parameters, 0.01))


def thawed_within_a_run(backend):
    """Parameters of one group whose states have made other numbers of steps."""
    x, y = digits(301)
    kt.set_seed(3)
    module = mlp()
    model = kt.Model(module, backend=backend()).compile("adamw", "cross_entropy", lr=1e-2)

    class Thaw(kt.callbacks.Callback):
        adds_to_logs = ()

        def on_epoch_begin(self, epoch, logs=None):
            module[0].requires_grad_(epoch != 0)

    first = trained(model, x, y, epochs=3, accumulate=2, callbacks=[Thaw()])
    return {"first": first, "second": trained(model, x, y)}


def recomputed(backend):
    x, y = digits(301)
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend(checkpoint_activations=nn.Linear)).compile("adamw", "cross_entropy")
    return trained(model, x, y, accumulate=2)


def changed_by_hand(backend):
    """What a callback does to parameters, between two steps, is stepped on."""
    x, y = digits(101)
    kt.set_seed(3)
    module = mlp()

    class Shrinks(kt.callbacks.Callback):
        @torch.no_grad()
        def on_train_batch_end(self, batch, logs=None):
            module[0].weight.mul_(0.9)

    model = kt.Model(module, backend=backend()).compile("adamw", "cross_entropy")
    return trained(model, x, y, callbacks=[Shrinks()])


def batch_by_batch(backend):
    x, y = digits(60)
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend()).compile("adamw", "cross_entropy", clip=0.3)
    losses = [model.train_on_batch(x[start : start + 15], y[start : start + 15]) for start in (0, 15, 30)]
    return shown(model, losses=losses)


def in_bf16(backend):
    x, y = digits(301)
    kt.set_seed(3)
    model = kt.Model(mlp(), backend=backend()).compile("adamw", "cross_entropy", precision="bf16", clip=1.0)
    return trained(model, x, y, accumulate=2)


# Going on.


def going_on_model(backend):
    kt.set_seed(3)
    return kt.Model(mlp(), backend=backend()).compile(
        "adamw", "cross_entropy", metrics=["accuracy"], lr=1e-2, clip=0.5, schedule="cosine"
    )


def going_on_data():
    x, y = digits(301)
    y[::3] = -100
    return x, y


GOING_ON = {"epochs": 3, "batch_size": 20, "accumulate": 4, "verbose": 0}


def uninterrupted(backend):
    model = going_on_model(backend)
    return shown(model, model.fit(*going_on_data(), **GOING_ON))


def broken_off(backend):
    """Saved within a window of the second epoch."""
    model = going_on_model(backend)
    saver = kt.callbacks.ModelCheckpoint(os.environ["FOLDER"] + "/{epoch}-{batch}.pt", save_freq=22)
    model.fit(*going_on_data(), callbacks=[saver, Killed(23)], **GOING_ON)
    return {}


def gone_on(backend):
    model = going_on_model(backend)
    (file,) = Path(os.environ["FOLDER"]).glob("[0-9]-*.pt")
    return shown(model, model.fit(*going_on_data(), resume=str(file), **GOING_ON))


# What only ranks have.


def held(backend):
    """How many numbers this rank holds while it trains."""
    x, y = digits(101)
    seen = {}

    class Looks(kt.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            zero = self.model.backend._zero
            states = [value for state in zero._stand_in.state.values() for value in state.values() if value.ndim]
            seen["state"] = sum(one.numel() for one in states)
            seen["own"] = len(self.model.optimizer.state)

    model = kt.Model(mlp(), backend=backend()).compile("adamw", "cross_entropy")
    model.fit(x, y, verbose=0, callbacks=[Looks()])
    names = [name for part in (*model.module.modules(), *model.module.parameters()) for name in vars(part)]
    return seen | {
        "whole": sum(one.numel() for one in model.module.parameters()),
        "left behind": [name for name in names if "ds_" in name or "hp_" in name],
        "tables": {type(part._parameters).__name__ for part in model.module.modules()},
    }


class Halves(nn.Module):
    def forward(self, x):
        return x.chunk(2, dim=1)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 10), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


def refused(backend):
    """What is said within a run of what cannot be; and a run after all of them."""
    x, y = digits(101)

    def other_counts():
        module = nn.Sequential(nn.Linear(64, 20), Halves())
        targets = np.where(np.arange(101) % 3 == 0, -100, y), y
        model = kt.Model(module, backend=backend()).compile("adam", ["cross_entropy", "cross_entropy"])
        model.fit(x, targets, verbose=0)

    def others():
        module = mlp()
        optimizer = torch.optim.SGD(module[0].parameters(), 0.1)
        kt.Model(module, backend=backend()).compile(optimizer, "cross_entropy").fit(x, y, verbose=0)

    def fails_twice():
        class Fails(kt.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 1:
                    raise OSError("the disk is full")

        model = kt.Model(mlp(), backend=backend()).compile("adamw", "cross_entropy")
        try:
            model.fit(x, y, verbose=0, callbacks=[Fails()])
        except OSError:
            model.fit(x, y, verbose=0)

    def unused():
        kt.Model(Unused(), backend=backend()).compile("adamw", "cross_entropy").fit(x, y, verbose=0)

    said = {}
    for function in (other_counts, others, unused, fails_twice):
        try:
            function()
        except (RuntimeError, ValueError) as error:
            said[function.__name__] = str(error)
    return said | {"after": after_failure(backend)}


def after_failure(backend):
    return fsdp_cases.after_failure(backend)


CASES = {name: one for name, one in globals().items() if getattr(one, "__module__", None) == __name__}


class InRanks:
    """DeepSpeed, of all processes that torchrun has started; what other backends are given besides is left out."""

    common = staticmethod(fsdp_cases.InRanks.common)

    def __init__(self, stage):
        self.options = {"stage": abs(stage), "offload": stage < 0}  # below 0: with the states in the host's memory

    def __call__(self, checkpoint_activations=None, **others):
        options = self.options | {"checkpoint_activations": checkpoint_activations}
        return kt.backends.DeepSpeed(timeout_s=TIMEOUT_S, **options)


def main(path, stage, *names):
    torch.set_num_threads(1)
    os.environ["FOLDER"] = str(Path(path).parent)
    found = {}
    for name in names:
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found[name] = CASES[name](InRanks(int(stage)))
            found.setdefault("warnings", []).extend(str(one.message) for one in warned)
        except Exception:
            found[name] = traceback.format_exc()
            print(name, found[name][-900:], file=sys.stderr, flush=True)
    if os.environ["RANK"] == "0":
        torch.save(found, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
