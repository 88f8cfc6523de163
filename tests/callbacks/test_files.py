"""The system refuses to write a file in the middle of a run: what is there stays, and training goes on if asked."""

from __future__ import annotations

import os
import re
import resource
import threading
import warnings

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch import checkpoint
from kerastorch.callbacks import BackupAndRestore, ModelCheckpoint


@pytest.fixture
def model():
    return kt.Model(nn.Linear(64, 10), backend="cpu").compile("adam", "cross_entropy", lr=0.1)


@pytest.fixture
def bound():
    """Sets how large files may become; the system refuses to write more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class BoundIn(kt.Callback):
    """No file gets larger than 1,000 bytes in some epochs."""

    def __init__(self, bound, *epochs):
        self.bound, self.epochs = bound, epochs

    def on_epoch_begin(self, epoch, logs=None):
        for thread in threading.enumerate():
            if thread.name == "kerastorch-background":
                thread.join()
        self.bound(1000 if epoch in self.epochs else None)

    def on_train_end(self, logs=None):
        self.bound(None)

    def on_exception(self, error):
        self.bound(None)


@pytest.mark.parametrize("background", [False, True])
def test_the_run_ends_and_the_file_before_is_whole(model, digits, tmp_path, bound, background):
    saving = ModelCheckpoint(tmp_path / "run.pt", background=background)
    with pytest.raises(OSError, match="File too large"):
        model.fit(*digits, epochs=3, callbacks=[saving, BoundIn(bound, 1)], verbose=0)
    assert os.listdir(tmp_path) == ["run.pt"]
    assert checkpoint.read(tmp_path / "run.pt")["history"]["epoch"] == [0]
    assert len(model.history.epoch) == 2 + background  # there it is seen at the end of the next epoch


@pytest.mark.parametrize("background", [False, True])
def test_the_run_goes_on_where_that_is_asked_for(model, digits, tmp_path, bound, background):
    options = {"on_write_error": "warn", "background": background}
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", save_last=True, **options)
    with pytest.warns(UserWarning) as found:
        model.fit(*digits, epochs=6, callbacks=[saving, BoundIn(bound, 1, 2, 5)], verbose=0)
    said = [str(one.message) for one in found if "goes on" in str(one.message)]
    assert len(said) == 1 and re.fullmatch("ModelCheckpoint goes on without a file: .*2.pt.*File too large.*", said[0])
    assert sorted(os.listdir(tmp_path)) == ["1.pt", "4.pt", "5.pt", "last.pt"]
    assert checkpoint.read(tmp_path / "last.pt")["history"]["epoch"] == [0, 1, 2, 3, 4]
    assert saving.best_model_path == str(tmp_path / "5.pt") and saving.last_model_path == str(tmp_path / "last.pt")
    assert len(model.history.epoch) == 6


def test_what_could_not_be_written_is_not_among_the_best(model, digits, tmp_path, bound):
    class Values(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["value"] = [3.0, 1.0, 2.0][epoch]

    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", "value", mode="min", save_top_k=1, on_write_error="warn")
    with pytest.warns(UserWarning, match="goes on without a file"):
        model.fit(*digits, epochs=3, callbacks=[Values(), saving, BoundIn(bound, 1)], verbose=0)
    assert os.listdir(tmp_path) == ["3.pt"] and saving.best == 2.0


def test_a_new_run_is_told_of_it_again(model, digits, tmp_path, bound):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", on_write_error="warn")
    for _ in range(2):
        with pytest.warns(UserWarning, match="ModelCheckpoint goes on without a file: .*File too large\\."):
            model.fit(*digits, callbacks=[saving, BoundIn(bound, 0)], verbose=0)


def test_what_is_wrong_with_the_state_is_no_matter_of_the_disk(model, digits, tmp_path):
    class Late(kt.Callback):
        state = 1

        def on_epoch_end(self, epoch, logs=None):
            self.state = object()

        def state_dict(self):
            return {"state": self.state}

    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", on_write_error="warn")
    with pytest.raises(TypeError, match="is a object, which"):
        model.fit(*digits, callbacks=[saving, Late()], verbose=0)


@pytest.mark.parametrize("double", [False, True])
def test_a_backup_that_cannot_be_written_leaves_the_one_before(digits, tmp_path, bound, double):
    def run(*callbacks, policy="warn"):
        kt.set_seed(0)
        model = kt.Model(nn.Linear(64, 10), backend="cpu").compile("adam", "cross_entropy", lr=0.1)
        backup = BackupAndRestore(tmp_path, double_checkpoint=double, delete_checkpoint=False, on_write_error=policy)
        model.fit(*digits, epochs=3, callbacks=[backup, *callbacks], verbose=0)
        return model

    with pytest.warns(UserWarning, match="BackupAndRestore goes on without a file: .*File too large\\."):
        whole = run(BoundIn(bound, 1, 2))
    assert checkpoint.read(tmp_path / "backup.pt")["history"]["epoch"] == [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run()
    assert torch.equal(again.module.weight, whole.module.weight)
    (tmp_path / "backup.pt").unlink()
    (tmp_path / "previous.pt").unlink(missing_ok=True)
    with pytest.raises(OSError, match="File too large"):
        run(BoundIn(bound, 1), policy="raise")
    assert checkpoint.read(tmp_path / "backup.pt")["history"]["epoch"] == [0]


@pytest.mark.parametrize("make", [ModelCheckpoint, BackupAndRestore])
@pytest.mark.parametrize("policy", ["ignore", None, True])
def test_other_policies_are_refused(make, policy):
    with pytest.raises(ValueError, match=f'on_write_error={policy!r} is not known. Give "raise" or "warn".'):
        make("a.pt", on_write_error=policy)
