"""BackupAndRestore: a run that died and was started again is the run that did not die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import (
    EMA,
    BackupAndRestore,
    EarlyStopping,
    LearningRateScheduler,
    ReduceLROnPlateau,
    Unfreeze,
)
from tests import reference

X = torch.rand(44, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
BATCH, EPOCHS = 4, 4  # 11 batches in an epoch


class Killed(Exception):
    pass


class Die(kt.Callback):
    """Ends the run with an error after so many batches of it."""

    def __init__(self, after):
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise Killed


def run(*callbacks, data="arrays", schedule="cosine", **options):
    """Everything that has a state: dropout, AdamW, a schedule, accumulation, EMA, a callback that counts."""
    kt.set_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    model = kt.Model(net, backend="cpu").compile("adamw", "mse", lr=0.01, schedule=schedule, metrics=["mae"])
    sources = {
        "arrays": ((X, Y), {"batch_size": BATCH}),
        "dataset": ((TensorDataset(X, Y),), {"batch_size": BATCH}),
        "loader": ((DataLoader(TensorDataset(X, Y), BATCH, shuffle=True),), {}),
    }
    given, extra = ((data(),), {}) if callable(data) else sources[data]
    stopping = EarlyStopping("val_loss", patience=50, restore_best_weights=True)
    options = {"epochs": EPOCHS, "accumulate": 2, "validation_data": (X, Y), "verbose": 0} | extra | options
    model.fit(*given, callbacks=[EMA(0.9), *callbacks, stopping], **options)
    return model, stopping


def died_and_started_again(folder, after, *, save_freq="epoch", others=lambda: (), **options):
    with pytest.raises(Killed):
        run(*others(), BackupAndRestore(folder, save_freq), Die(after), **options)
    return run(*others(), BackupAndRestore(folder, save_freq), **options)


@pytest.mark.parametrize("data", ["arrays", "dataset", "loader"])
@pytest.mark.parametrize("after", [1, 12, 23, 40])
def test_a_run_that_died_ends_as_the_one_that_did_not_bit_for_bit(tmp_path, data, after):
    whole, stopping = run(data=data)
    model, again = died_and_started_again(tmp_path, after, data=data)
    assert reference.same_weights(model.module, whole.module)
    assert model.history.history == whole.history.history and model.history.epoch == [0, 1, 2, 3]
    assert (again.best, again.best_epoch, again.wait) == (stopping.best, stopping.best_epoch, stopping.wait)
    assert model.epochs_trained == whole.epochs_trained and model.steps_taken == whole.steps_taken
    assert os.listdir(tmp_path) == [], "a run that came to its end removes its backup"


@pytest.mark.parametrize("data", ["arrays", "dataset", "loader"])
@pytest.mark.parametrize("after", [2, 5, 12, 13, 40])
def test_a_backup_between_batches_loses_none_and_trains_none_twice(tmp_path, data, after):
    whole, _ = run(data=data)
    model, _ = died_and_started_again(tmp_path, after, save_freq=3, data=data)
    assert reference.same_weights(model.module, whole.module)
    assert model.steps_taken == whole.steps_taken == 24
    assert model.history.history["val_loss"] == whole.history.history["val_loss"]


@pytest.mark.parametrize("save_freq", ["epoch", 3])
def test_steps_per_epoch_go_on_where_they_were(tmp_path, save_freq):
    whole, _ = run(steps_per_epoch=7)
    model, _ = died_and_started_again(tmp_path, 16, save_freq=save_freq, steps_per_epoch=7)
    assert reference.same_weights(model.module, whole.module)


class Rows(Dataset):
    """Of no type that is seen through: its loader draws when an iterator of it is made."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index], Y[index]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("save_freq", ["epoch", 3])
def test_any_loader_that_shuffles_goes_on_in_its_order(tmp_path, save_freq, workers):
    def loader():
        return DataLoader(Rows(), BATCH, shuffle=True, num_workers=workers)

    whole, _ = run(data=loader)
    model, _ = died_and_started_again(tmp_path, 26, save_freq=save_freq, data=loader)
    assert reference.same_weights(model.module, whole.module)


@pytest.mark.parametrize("save_freq", ["epoch", 1])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_rate_is_not_changed_twice_by_a_scheduler_that_looks_at_it(tmp_path, save_freq, is_first):
    def run_once(*callbacks):
        kt.set_seed(0)
        halving = LearningRateScheduler(lambda epoch, lr: lr / 2)
        backup = BackupAndRestore(tmp_path, save_freq)
        pair = [halving, backup] if is_first else [backup, halving]
        model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse", lr=0.8)
        return model.fit(X, Y, batch_size=BATCH, epochs=4, callbacks=[*pair, *callbacks], verbose=0)

    with pytest.raises(Killed):
        run_once(Die(25))
    assert run_once().history["lr"] == pytest.approx([0.4, 0.2, 0.1, 0.05])


@pytest.mark.parametrize("freq", ["7 steps", 0.4])
@pytest.mark.parametrize("save_freq", ["epoch", 1])
def test_validations_within_epochs_come_when_they_would_have(tmp_path, save_freq, freq):
    whole, _ = run(validation_freq=freq)
    model, _ = died_and_started_again(tmp_path, 31, save_freq=save_freq, validation_freq=freq, accumulate=1)
    at = [[(one["epoch"], one["batch"]) for one in history.intervals] for history in (whole.history, model.history)]
    assert at[0] == at[1]
    assert len(model.history.history["val_loss"]) == len(whole.history.history["val_loss"])


def test_the_same_process_can_go_on_with_data_that_goes_on(tmp_path):
    whole, _ = run(steps_per_epoch=7)
    kt.set_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    options = {"lr": 0.01, "schedule": "cosine", "metrics": ["mae"]}
    model = kt.Model(net, backend="cpu").compile("adamw", "mse", **options)
    options = {"batch_size": BATCH, "epochs": EPOCHS, "accumulate": 2, "validation_data": (X, Y), "verbose": 0}
    stopping = {"patience": 50, "restore_best_weights": True}
    for die in ([Die(16)], []):
        callbacks = [EMA(0.9), BackupAndRestore(tmp_path), *die, EarlyStopping("val_loss", **stopping)]
        with pytest.raises(Killed) if die else contextlib.nullcontext():
            model.fit(X, Y, callbacks=callbacks, steps_per_epoch=7, **options)
    assert reference.same_weights(model.module, whole.module)


def test_keras_s_history_beside_it_is_no_trouble(tmp_path):
    class Theirs:
        def set_model(self, model):
            self.model = model

        def on_train_begin(self, logs=None):
            self.model.history = self

    model, _ = run(Theirs(), BackupAndRestore(tmp_path))
    assert model.history.epoch == [0, 1, 2, 3] and os.listdir(tmp_path) == []


def test_a_run_whose_time_is_over_keeps_its_backup(tmp_path):
    slow = kt.Callback()
    slow.on_train_batch_end = lambda batch, logs=None: time.sleep(0.02)
    run(BackupAndRestore(tmp_path, 2), slow, max_time=0.1)
    assert os.listdir(tmp_path) == ["backup.pt"]


def test_a_run_can_die_again_and_again(tmp_path):
    whole, _ = run()
    for after in (3, 14, 9, 12, 13):
        with pytest.raises(Killed):
            run(BackupAndRestore(tmp_path, 4), Die(after))
    model, _ = run(BackupAndRestore(tmp_path, 4))
    assert reference.same_weights(model.module, whole.module)


def test_groups_that_a_callback_makes_and_rates_that_one_sets_are_restored(tmp_path):
    def others():
        return Unfreeze(1, "0", lr=0.003), ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=10.0)

    whole, _ = run(*others(), schedule=None)
    model, _ = died_and_started_again(tmp_path, 30, others=others, schedule=None)
    assert model.history.history == whole.history.history
    assert reference.same_weights(model.module, whole.module)


def test_intervals_are_restored_too(tmp_path):
    whole, _ = run(validation_freq=0.5)
    model, _ = died_and_started_again(tmp_path, 30, validation_freq=0.5)
    assert model.history.intervals == whole.history.intervals


def test_max_steps_count_those_before_the_backup(tmp_path):
    whole, _ = run(max_steps=15)
    model, _ = died_and_started_again(tmp_path, 20, max_steps=15)
    assert model.steps_taken == 15 and reference.same_weights(model.module, whole.module)


def test_without_a_backup_a_run_begins_and_its_instance_serves_again(tmp_path):
    whole, _ = run()
    backup = BackupAndRestore(tmp_path)
    for _ in range(2):
        model, _ = run(backup)
        assert reference.same_weights(model.module, whole.module)


def test_the_backup_stays_where_asked_for(tmp_path):
    run(BackupAndRestore(tmp_path, delete_checkpoint=False))
    assert os.listdir(tmp_path) == ["backup.pt"]


def test_ctrl_c_keeps_the_backup_to_go_on_from(tmp_path):
    class Interrupt(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.history.epoch == [0, 1] and batch == 2:
                os.kill(os.getpid(), signal.SIGINT)

    whole, _ = run()
    interrupted, _ = run(BackupAndRestore(tmp_path), Interrupt())
    assert interrupted.history.epoch == [0, 1, 2] and os.listdir(tmp_path) == ["backup.pt"]
    model, _ = run(BackupAndRestore(tmp_path))
    assert reference.same_weights(model.module, whole.module) and model.history.history == whole.history.history


def test_the_one_before_serves_where_the_newest_is_damaged(tmp_path):
    whole, _ = run()
    with pytest.raises(Killed):
        run(BackupAndRestore(tmp_path, double_checkpoint=True), Die(40))
    assert sorted(os.listdir(tmp_path)) == ["backup.pt", "previous.pt"]
    (tmp_path / "backup.pt").write_bytes((tmp_path / "backup.pt").read_bytes()[:1000])
    with pytest.warns(UserWarning, match="goes on from the one before"):
        model, _ = run(BackupAndRestore(tmp_path, double_checkpoint=True))
    assert reference.same_weights(model.module, whole.module)
    assert os.listdir(tmp_path) == []


def test_a_damaged_backup_without_another_is_an_error_and_nothing_begins(tmp_path):
    (tmp_path / "backup.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"backup\.pt"):
        run(BackupAndRestore(tmp_path))


def test_a_backup_of_another_module_is_refused_and_the_model_is_as_it_was(tmp_path):
    with pytest.raises(Killed):
        run(BackupAndRestore(tmp_path), Die(15))
    model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("adamw", "mse")
    before = model.module.weight.clone()
    with pytest.raises(ValueError, match="backup.pt' does not fit the module"):
        model.fit(X, Y, callbacks=[BackupAndRestore(tmp_path)], verbose=0)
    assert model.module.weight.equal(before) and model.history is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("",), "backup_dir is empty"),
        (("x", 0), "save_freq=0 is not known"),
        (("x", True), "save_freq=True is not known"),
        (("x", "hour"), "save_freq='hour' is not known"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        BackupAndRestore(*arguments)


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
    before = model.module.weight.clone()
    with pytest.raises(OSError, match="BackupAndRestore cannot write to"):
        model.fit(X, Y, callbacks=[BackupAndRestore(tmp_path / "file" / "backup")], verbose=0)
    assert model.module.weight.equal(before)


SCRIPT = """
import sys, time, torch, kerastorch as kt
from torch import nn
kt.set_seed(3)
class Slow(kt.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print(batch, flush=True)
        time.sleep(0.01)
x = torch.rand(40, 3); y = x.sum(1, keepdim=True)
net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
model = kt.Model(net, backend="cpu").compile("adam", "mse", schedule="cosine")
backup = kt.callbacks.BackupAndRestore(sys.argv[1], save_freq=2)
model.fit(x, y, batch_size=4, epochs=4, callbacks=[backup, Slow()], verbose=0)
model.save_weights(sys.argv[2])
"""


def test_a_process_that_was_killed_goes_on_when_it_is_started_again(tmp_path, monkeypatch, capsys):
    def start(folder):
        command = [sys.executable, "-c", SCRIPT, str(folder), str(folder / "end.safetensors")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setattr(sys, "argv", ["", str(whole), str(whole / "end.safetensors")])
    exec(SCRIPT, {})
    assert len(capsys.readouterr().out.splitlines()) == 40
    with start(killed) as process:
        for _ in range(13):
            process.stdout.readline()
        process.kill()
    with start(killed) as process:
        batches = len(process.communicate(timeout=300)[0].splitlines())
    assert 27 <= batches <= 30, "at most the batches since a backup are trained again"
    ends = [(folder / "end.safetensors").read_bytes() for folder in (whole, killed)]
    assert ends[0] == ends[1]
