"""fit(dry_run=...): everything is touched once, and nothing is left of it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import EMA, BackupAndRestore, CSVLogger, EarlyStopping, ModelCheckpoint, Unfreeze
from kerastorch.callbacks.base import HOOKS
from tests import reference

X = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def compiled(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    return kt.Model(net, backend="cpu").compile("adam", "mse", **{"schedule": "cosine", "metrics": ["mae"]} | options)


def fit(model, callbacks=(), **options):
    options = {"batch_size": 4, "epochs": 3, "validation_data": (X, Y), "verbose": 0} | options
    return model.fit(X, Y, callbacks=callbacks, **options)


def recorder():
    calls = []
    kind = type("Recorder", (kt.Callback,), {name: lambda self, *_, name=name: calls.append(name) for name in HOOKS})
    return kind(), calls


@pytest.mark.parametrize(("dry_run", "batches"), [(True, 1), (1, 1), (3, 3), (99, 10)])
def test_so_many_batches_are_trained_and_validated_in_one_epoch(dry_run, batches):
    callback, calls = recorder()
    history = fit(compiled(), callback, dry_run=dry_run, validation_batch_size=4, validation_freq=2)
    assert calls.count("on_train_batch_begin") == calls.count("on_test_batch_begin") == batches
    assert type(history.params["steps"]) is int and history.params["steps"] == batches
    assert history.epoch == [0] and {"loss", "mae", "val_loss", "val_mae", "lr"} == set(history.history)
    expected = {name for name in HOOKS if not name.startswith(("on_predict", "on_batch", "on_train_pause"))}
    assert set(calls) == expected - {"on_exception", "on_interval_end"}


@pytest.mark.parametrize("dry_run", [False, 0])
def test_no_dry_run_is_a_run(dry_run):
    assert fit(compiled(), dry_run=dry_run).epoch == [0, 1, 2]


def test_nothing_is_left_of_it_in_the_model():
    model = compiled()
    fit(model, epochs=1)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    momenta = [state["exp_avg"].clone() for state in model.optimizer.state.values()]
    rate, history, trained = model.optimizer.param_groups[0]["lr"], model.history, model.epochs_trained
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    fit(model, EMA(0.9), dry_run=2)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert all(map(torch.equal, momenta, (state["exp_avg"] for state in model.optimizer.state.values())))
    assert model.optimizer.param_groups[0]["lr"] == rate
    assert model.history is history and model.epochs_trained == trained
    assert drawn[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(drawn[2], torch.get_rng_state())
    assert not model.is_dry_run


def test_the_run_after_it_is_the_run_without_it():
    plain, tried = compiled(), compiled()
    callbacks = [EMA(0.9), EarlyStopping("val_loss", patience=9, restore_best_weights=True)]
    torch.manual_seed(1)
    expected = fit(plain, [EMA(0.9), EarlyStopping("val_loss", patience=9, restore_best_weights=True)]).history
    torch.manual_seed(1)
    fit(tried, callbacks, dry_run=True)
    assert fit(tried, callbacks).history == expected
    assert reference.same_weights(plain.module, tried.module)


def test_nothing_is_left_of_it_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = []

    class Note(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert self.model.is_dry_run
            path = self.model.path_for(tmp_path / "notes" / "own.txt")
            path.parent.mkdir(parents=True)
            path.write_text("mine")
            written.extend([path, self.model.path_for("relative.txt"), Path("model.pt")])

    callbacks = [
        ModelCheckpoint("models/{epoch}.pt", save_last=True),
        ModelCheckpoint(tmp_path / "best.safetensors", save_best_only=True, save_weights_only=True),
        BackupAndRestore("backup", save_freq=1, delete_checkpoint=False),
        Note(),
    ]
    fit(compiled(), callbacks, dry_run=2)
    assert os.listdir(tmp_path) == []
    assert not written[0].is_relative_to(tmp_path) and written[1].is_absolute() and not written[0].exists()
    fit(compiled(), callbacks[:-1], epochs=1)
    assert sorted(os.listdir(tmp_path)) == ["backup", "best.safetensors", "models"]


def test_an_error_in_it_leaves_the_model_as_it_was_too():
    class Boom(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise ArithmeticError("pow")

    model = compiled()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with pytest.raises(ArithmeticError, match=r"pow \(raised in Boom.on_epoch_end\)"):
        fit(model, Boom(), dry_run=True)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert model.history is None and model.epochs_trained == 0 and not model.is_dry_run
    assert not model.optimizer.state


def test_state_that_cannot_be_saved_is_found_in_it():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return lambda: None

        def set_extra_state(self, state):
            pass

    torch.manual_seed(0)
    model = kt.Model(Odd(3, 1), backend="cpu").compile("sgd", "mse")
    with pytest.raises(TypeError, match="function"):
        fit(model, dry_run=True)


def test_a_callback_that_would_break_in_the_third_epoch_of_a_run_is_not_found():
    """What a dry run cannot know, it does not claim: it is one epoch."""

    class Late(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert epoch < 2

    assert fit(compiled(), Late(), dry_run=True).epoch == [0]
    with pytest.raises(AssertionError):
        fit(compiled(), Late())


def test_several_optimizers_and_lazy_modules_are_tried():
    class Two(kt.Model):
        def train_step(self, batch):
            x, y = batch
            for name in ("a", "b"):
                self.backward(nn.functional.mse_loss(self.module[name](x), y))
                self.optimizer_step(name)

        def compute_loss(self, batch):
            return nn.functional.mse_loss(self.module["a"](batch[0]), batch[1])

    model = Two(nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})).compile({"a": "sgd", "b": "adam"})
    before = model.module["b"].weight.clone()
    fit(model, dry_run=2)
    assert model.module["b"].weight.equal(before) and not model.optimizer["b"].state
    lazy = kt.Model(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1)), backend="cpu").compile("adam", "mse")
    fit(lazy, dry_run=True)
    assert len(fit(lazy).epoch) == 3


def test_what_callbacks_unfreeze_and_split_is_undone():
    model = compiled(schedule=None).freeze("0")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    for callback in (Unfreeze(0, "0", lr=0.01), Unfreeze(0, "0")):
        fit(model, callback, dry_run=2)
        assert not model.module[0].weight.requires_grad and model.module[3].weight.requires_grad
        assert [len(group["params"]) for group in model.optimizer.param_groups] == [6]
        assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
        assert not model.is_dry_run


def test_what_stands_beside_the_state_of_files_is_undone_too():
    model = compiled()
    model.module.register_buffer("calls", torch.zeros(1), persistent=False)
    model.module.register_forward_pre_hook(lambda module, inputs: module.calls.add_(1) and None)
    fit(model, EMA(0.9), epochs=1)
    steps, calls, stopping = model.steps_taken, model.module.calls.clone(), model.stop_training
    fit(model, EarlyStopping("loss", stopping_threshold=9.0), dry_run=1)
    assert (model.steps_taken, model.stop_training) == (steps, stopping) and model.module.calls.equal(calls)
    assert [type(one).__name__ for one in model._callbacks] == ["EMA"]


def test_paths_that_lead_upwards_do_not_lead_out_of_it(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log.csv").write_text("precious")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    callbacks = [CSVLogger("../runs/log.csv"), ModelCheckpoint("../leak/{epoch}.pt")]
    fit(compiled(), callbacks, dry_run=True)
    assert (tmp_path / "runs" / "log.csv").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["runs", "work"]


@pytest.mark.parametrize("options", [{"validation_freq": "banana"}, {"validation_freq": [0]}, {"steps_per_epoch": 2.5}])
def test_it_refuses_what_the_run_would_refuse(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fit(compiled(), dry_run=True, **options)


def drawn_by(loaded, **options):
    """Where the generator of a shuffling loader is after a `fit`."""
    drawn = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True, generator=drawn)
    data = (loader,) if loaded == "training" else (X, Y)
    compiled().fit(*data, validation_data=loader if loaded == "validation" else (X, Y), verbose=0, **options)
    return drawn.get_state()


def test_generators_of_loaders_are_put_back():
    assert torch.equal(drawn_by("training", dry_run=True), torch.Generator().manual_seed(3).get_state())
    assert torch.equal(drawn_by("validation", sanity_steps=2), drawn_by("validation"))
