"""Files that are written while training goes on: what is in them, how many at once, and when an error is seen."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch import checkpoint
from kerastorch.callbacks import ModelCheckpoint
from kerastorch.callbacks import checkpoint as saving_file

STEPS = 5  # of 150 samples


@pytest.fixture
def model():
    return kt.Model(nn.Linear(64, 10), backend="cpu").compile("adam", "cross_entropy", lr=0.1)


class Weights(kt.Callback):
    """The weights after each batch."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, batch, logs=None):
        self.after.append(self.model.module.weight.detach().clone())


class Slow:
    """Stands before what writes files: it waits for `go`, and counts how many wait at once."""

    def __init__(self, write):
        self.write, self.go, self.lock = write, threading.Event(), threading.Lock()
        self.running = self.most = self.calls = 0
        self.threads = []

    def __call__(self, path, state):
        with self.lock:
            self.running, self.calls = self.running + 1, self.calls + 1
            self.most = max(self.most, self.running)
            self.threads.append(threading.current_thread())
        assert self.go.wait(20)
        self.write(path, state)
        with self.lock:
            self.running -= 1


@pytest.fixture
def slow(monkeypatch):
    slow = Slow(saving_file.write)
    monkeypatch.setattr(saving_file, "write", slow)
    return slow


class GoAt(kt.Callback):
    """Lets the file be written once so many batches were trained."""

    def __init__(self, slow, batches):
        self.slow, self.left, self.files = slow, batches, None

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            self.files = self.slow.calls
            self.slow.go.set()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_goes_on_meanwhile_and_the_file_has_the_moment_it_was_asked_for(
    model, digits, tmp_path, slow, optimizer
):
    model.compile(optimizer, "cross_entropy", lr=0.1)
    weights, go = Weights(), GoAt(slow, 4)
    saving = ModelCheckpoint(tmp_path / "{step}.pt", save_freq=2, background=True)
    # After the second batch a file is begun, which cannot be written before the fourth is trained.
    model.fit(*digits, callbacks=[saving, weights, go], verbose=0)
    assert go.files == 1 and sorted(os.listdir(tmp_path)) == ["2.pt", "4.pt"]
    for step in (2, 4):
        assert torch.equal(checkpoint.read_weights(tmp_path / f"{step}.pt")["weight"], weights.after[step - 1])
    assert threading.main_thread() not in slow.threads


def test_weights_alone_are_those_of_the_moment_too(model, digits, tmp_path, monkeypatch):
    write, go = saving_file.write_weights, threading.Event()

    def wait(path, weights):
        assert go.wait(20)
        write(path, weights)

    monkeypatch.setattr(saving_file, "write_weights", wait)
    weights, slow = Weights(), Slow(None)
    slow.go = go
    name = tmp_path / "{step}.safetensors"
    saving = ModelCheckpoint(name, save_weights_only=True, save_freq=3, background=True)
    model.fit(*digits, callbacks=[saving, weights, GoAt(slow, 5)], verbose=0)
    found = checkpoint.read_weights(tmp_path / "3.safetensors")["weight"]
    assert torch.equal(found, weights.after[2]) and not torch.equal(found, model.module.weight)


def test_one_file_is_written_at_a_time_and_all_are_there_when_fit_returns(model, digits, tmp_path, slow):
    slow.go.set()
    slow.write = lambda path, state, write=slow.write: (time.sleep(0.02), write(path, state))
    saving = ModelCheckpoint(tmp_path / "{step:02d}.pt", save_freq=1, save_last=True, background=True)
    model.fit(*digits, epochs=2, callbacks=saving, verbose=0)
    assert slow.most == 1 and not any(thread.is_alive() for thread in slow.threads)
    assert sorted(os.listdir(tmp_path)) == [f"{step + 1:02d}.pt" for step in range(2 * STEPS)] + ["last.pt"]
    assert torch.equal(checkpoint.read_weights(tmp_path / "last.pt")["weight"], model.module.weight)


def test_files_are_those_that_are_written_at_once(model, digits, tmp_path):
    def run(name, **options):
        kt.set_seed(0)
        net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 10))
        model = kt.Model(net, backend="cpu").compile("adamw", "cross_entropy", lr=0.01)
        saving = ModelCheckpoint(tmp_path / name / "{epoch}.pt", "loss", save_top_k=2, save_last=True, **options)
        model.fit(*digits, epochs=4, callbacks=[saving], verbose=0)
        return {path.name: checkpoint.read(path) for path in (tmp_path / name).iterdir()}

    at_once, in_the_background = run("a"), run("b", background=True)
    assert at_once.keys() == in_the_background.keys() == {"3.pt", "4.pt", "last.pt"}
    for name, state in at_once.items():
        other = in_the_background[name]
        assert all(torch.equal(state["module"][key], other["module"][key]) for key in state["module"])
        assert state["history"] == other["history"]


class Refused(OSError):
    pass


def refuse(path, state):
    raise Refused(28, "No space left on device", str(path))


def test_an_error_ends_the_run_when_the_next_file_is_due(model, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(saving_file, "write", refuse)
    weights = Weights()
    saving = ModelCheckpoint(tmp_path / "{step}.pt", save_freq=2, background=True)
    with pytest.raises(Refused, match="No space left on device"):
        model.fit(*digits, callbacks=[saving, weights], verbose=0)
    assert len(weights.after) == 4 and saving.best_model_path == ""


def test_an_error_of_the_last_file_is_not_lost(model, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(saving_file, "write", refuse)
    saving = ModelCheckpoint(tmp_path / "a.pt", background=True)
    with pytest.raises(Refused, match="No space left on device"):
        model.fit(*digits, callbacks=saving, verbose=0)
    assert os.listdir(tmp_path) == [] and saving.best_model_path == ""


def test_the_error_of_a_batch_is_the_one_that_is_raised_and_the_file_is_still_written(model, digits, tmp_path, slow):
    class Fail(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                slow.go.set()
                raise RuntimeError("out of luck")

    saving = ModelCheckpoint(tmp_path / "{step}.pt", save_freq=2, background=True)
    with pytest.raises(RuntimeError, match="out of luck"):
        model.fit(*digits, callbacks=[saving, Fail()], verbose=0)
    assert os.listdir(tmp_path) == ["2.pt"] and not any(thread.is_alive() for thread in slow.threads)
