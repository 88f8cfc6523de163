"""What is left of many steps and many calls, counted exactly; `benchmarks/long_runs.py` is the long form of it."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import threading
import weakref

import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import EMA, BackupAndRestore, CSVLogger, EarlyStopping, ModelCheckpoint

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def made(module=None, **options):
    net = module or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
    return kt.Model(net, backend="cpu").compile("adamw", "mse", metrics=["mae"], clip=1.0, **options)


def census():
    """Tensors, objects of this package, open files, threads and processes."""
    gc.collect()
    kinds = [type(one) for one in gc.get_objects()]
    process = psutil.Process()
    return {
        "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
        "ours": sum(str(kind.__module__).startswith("kerastorch") for kind in kinds),
        "files": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "threads": threading.active_count(),
        "processes": len(multiprocessing.active_children()),
    }


def grown(found):
    """What there is more of in a later count; fewer, for what other tests left may go at any time."""
    return [name for one, later in itertools.pairwise(found) for name in one if later[name] > one[name]]


def test_steps_leave_nothing():
    found = []

    class Count(kt.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            self.steps += 1
            if self.steps in (400, 800, 1200):  # each at the end of an epoch
                found.append(census())

    callbacks = [Count(), EMA(0.9)]
    made(schedule="cosine").fit(
        X,
        Y,
        batch_size=6,
        steps_per_epoch=40,
        epochs=30,
        validation_data=(X, Y),
        accumulate=2,
        callbacks=callbacks,
        verbose=0,
    )
    assert len(found) == 3 and not grown(found)


def test_calls_leave_nothing(tmp_path):
    model, found = made(), []
    for number in range(1, 21):
        callbacks = [
            EMA(0.9),
            CSVLogger(tmp_path / "log.csv"),
            ModelCheckpoint(tmp_path / "run.pt", background=True),
            BackupAndRestore(tmp_path / "backup"),
            EarlyStopping("loss", restore_best_weights=True),
        ]
        model.fit(X, Y, epochs=2, validation_split=0.25, callbacks=callbacks, verbose=0)
        model.evaluate(X, Y, verbose=0)
        model.predict(X, verbose=0)
        if number in (5, 10, 20):
            found.append(census())
    assert not grown(found)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_started_once_or_gone(persistent):
    """Those that persist do so as long as their loader, and no longer."""

    def fits(number):
        loader = DataLoader(Unseen(X, Y), 12, num_workers=2, persistent_workers=persistent)
        before = census()
        for _ in range(number):
            model.fit(loader, verbose=0)
        during = census()
        assert during["processes"] - before["processes"] == (2 if persistent else 0)
        return during

    model = made()
    fits(1)  # with the first worker of a process comes what all of them share
    before = census()
    found = [fits(1), fits(3)]
    assert [one["processes"] for one in found] == [before["processes"] + 2 * persistent] * 2
    assert found[0]["files"] == found[1]["files"] and found[0]["threads"] == found[1]["threads"]
    after = census()
    assert after["processes"] == before["processes"]
    # Threads of a loader that went with another test may close its pipes meanwhile.
    assert all(after[name] <= before[name] for name in ("files", "threads"))


class Unseen(TensorDataset):
    """Whose samples are asked for one by one."""

    def __getitem__(self, index):
        return super().__getitem__(index)


class Own(kt.Model):
    def train_step(self, batch):
        self.backward(nn.functional.mse_loss(self.module(batch[0]), batch[1]))
        self.optimizer_step()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"accumulate": 2},
        {"microbatch": 4},
        {"callbacks": "all"},
        {"debug_nan": True},
        {"own": True},
        {"fails": True},
    ],
    ids=lambda given: "-".join(given) or "plain",
)
def test_a_model_that_is_dropped_is_gone_with_all_that_it_held(given, tmp_path):
    def trained():
        net, options = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)), dict(given)
        own, fails = options.pop("own", False), options.pop("fails", False)
        model = Own(net, backend="cpu").compile("adam") if own else made(net, schedule="cosine")
        if options.get("callbacks") == "all":
            checkpoint = ModelCheckpoint(tmp_path / "run.pt", background=True)
            options["callbacks"] = [EMA(0.9), checkpoint, BackupAndRestore(tmp_path), EarlyStopping("loss")]
        with kt.debug_nan(options.pop("debug_nan", False) or fails):
            data = (X / 0 if fails else X), Y
            validated = {} if own else {"validation_data": (X, Y)}
            if fails:
                with pytest.raises(FloatingPointError):
                    model.fit(*data, verbose=0)
            else:
                model.fit(*data, epochs=2, verbose=0, **validated, **options)
        model.save(tmp_path / "all.pt")
        model.load(tmp_path / "all.pt").summary((2, 4), verbose=0)
        model.predict(X, verbose=0)
        return [
            weakref.ref(one) for one in (model, net, net[0].weight, model.optimizer, model.history) if one is not None
        ]

    trained()
    before = census()
    held = trained()
    assert census() == before and not [one() for one in held if one() is not None]
