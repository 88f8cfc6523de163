"""ModelCheckpoint: when it saves, under which names, and what is left, against sequences worked out by hand."""

from __future__ import annotations

import copy
import io
import math
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch import checkpoint
from kerastorch.callbacks import EMA, ModelCheckpoint
from kerastorch.callbacks.base import hooks_of
from kerastorch.callbacks.filenames import FileName
from tests.reference import same_weights

STEPS = 5


@pytest.fixture
def model():
    return kt.Model(nn.Linear(64, 10), backend="cpu").compile("sgd", "cross_entropy", metrics=["accuracy"], lr=0.1)


@pytest.fixture
def fit(model, digits):
    """Trains over as many epochs as `values` has, which stand in the logs as `name`; returns the files after each."""

    def fit(*callbacks, values=(0,), name="val_loss", model=model, **options):
        column = list(values)
        files = Files(callbacks[0])
        fed = [Column(name, column), *callbacks, files]
        options = {"epochs": len(column), "batch_size": 32, "verbose": 0} | options
        model.fit(*digits, callbacks=fed, **options)
        return files.seen

    return fit


class Column(kt.Callback):
    """Puts given values into the logs, as if they had been measured; none where it is `None`."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    def on_epoch_end(self, epoch, logs=None):
        if self.values[epoch] is not None:
            logs[self.name] = self.values[epoch]


class Files(kt.Callback):
    """Names of the files, without their ending, and the weights after each epoch."""

    def __init__(self, saving):
        self.saving, self.seen, self.weights = saving, [], []

    def on_epoch_end(self, epoch, logs=None):
        self.model.at_safe_point(self.look)

    def look(self):
        folder = self.model.path_for(self.saving._name.folder)
        self.seen.append(sorted(os.path.splitext(name)[0] for name in os.listdir(folder)))
        self.weights.append(copy.deepcopy(self.model.module.state_dict()))


class At(kt.Callback):
    """Does something after a batch."""

    def __init__(self, epoch, batch, act):
        self.moment, self.act = (epoch, batch), act

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.moment:
            self.act(self.model)


def names(*files):
    return [file.split() for file in files]


def weights_in(path):
    return checkpoint.read_weights(path)


# Every epoch.


def test_each_epoch_has_a_file_of_all_state(fit, model, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{epoch:02d}-{loss:.2f}.pt")
    fit(saving, values=[0, 0, 0])
    losses = model.history.history["loss"]
    expected = [f"{epoch + 1:02d}-{loss:.2f}.pt" for epoch, loss in enumerate(losses)]
    assert sorted(os.listdir(tmp_path)) == expected
    assert (saving.best_model_path, saving.best_model_score) == (str(tmp_path / expected[-1]), None)
    other = kt.Model(nn.Linear(64, 10), backend="cpu").compile("sgd", "cross_entropy").load(tmp_path / expected[-1])
    assert same_weights(other.module, model.module)


def test_a_file_has_the_weights_of_its_moment(fit, tmp_path):
    saving, watch = ModelCheckpoint(tmp_path / "{epoch}.safetensors", save_weights_only=True), Files
    watch = watch(saving)
    fit(saving, watch, values=[0, 0, 0])
    for epoch, weights in enumerate(watch.weights):
        found = weights_in(tmp_path / f"{epoch + 1}.safetensors")
        assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_one_name_is_overwritten(fit, model, tmp_path):
    assert fit(ModelCheckpoint(tmp_path / "run.pt"), values=[0] * 3) == [["run"]] * 3
    assert torch.equal(weights_in(tmp_path / "run.pt")["weight"], model.module.weight)


def test_weights_alone_are_for_load_weights(fit, model, tmp_path):
    fit(ModelCheckpoint(tmp_path / "w.safetensors", save_weights_only=True))
    other = kt.Model(nn.Linear(64, 10), backend="cpu").load_weights(tmp_path / "w.safetensors")
    assert same_weights(other.module, model.module)


def test_folders_in_the_name_are_made(fit, tmp_path):
    fit(ModelCheckpoint(tmp_path / "a" / "{epoch}" / "run.pt"), values=[0, 0])
    assert (tmp_path / "a" / "1" / "run.pt").exists() and (tmp_path / "a" / "2" / "run.pt").exists()


def test_a_path_in_the_working_folder_needs_no_folder(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saving = ModelCheckpoint("{epoch}.pt", save_top_k=1, save_last=True)
    fit(saving, values=[2, 1])
    assert sorted(os.listdir()) == ["2.pt", "last.pt"] and saving.best_model_path == "2.pt"


# The best.

SCORES = [0.9, 0.7, 0.8, 0.7, 0.6, math.nan, 0.5]


@pytest.mark.parametrize(
    ("mode", "values", "saved"),
    [
        ("auto", SCORES, [1, 2, 5, 7]),
        ("min", SCORES, [1, 2, 5, 7]),
        ("max", SCORES, [1]),
        ("min", [math.nan, 0.5, 0.6], [1, 2]),
        ("min", [None, 0.5, None, 0.4], [2, 4]),
        ("min", [-1.0, -1.0, -2.0], [1, 3]),
    ],
)
def test_only_what_is_better_than_all_before_is_saved(fit, tmp_path, mode, values, saved):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", save_best_only=True, mode=mode)
    files = fit(saving, values=values)
    assert files == [[str(epoch) for epoch in saved if epoch <= last + 1] for last in range(len(values))]
    assert saving.best_model_path == str(tmp_path / f"{saved[-1]}.pt")
    assert saving.best == saving.best_model_score == values[saved[-1] - 1]


def test_the_name_says_which_way_is_better(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", "val_accuracy", save_best_only=True)
    assert fit(saving, values=[0.5, 0.7, 0.6], name="val_accuracy")[-1] == ["1", "2"]


def test_the_first_must_beat_the_threshold(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", save_best_only=True, initial_value_threshold=0.75)
    assert saving.best == 0.75 and saving.best_model_score is None
    assert fit(saving, values=SCORES) == names("", "2", "2", "2", "2 5", "2 5", "2 5 7")
    assert saving.best_model_score == 0.5


def test_a_second_run_must_beat_the_first(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{val_loss}.pt", save_best_only=True)
    fit(saving, values=[0.8, 0.5])
    assert fit(saving, values=[0.7, 0.4]) == names("0.5 0.8", "0.4 0.5 0.8")


def test_a_validation_within_an_epoch_is_judged_and_not_once_more_at_its_end(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{step}.pt", save_best_only=True, save_last=True)
    middle = At(0, 1, lambda model: saving.on_interval_end(0, {"val_loss": 0.5}))
    later = At(0, 2, lambda model: saving.on_interval_end(0, {"val_loss": 0.6}))
    last = At(0, 4, lambda model: saving.on_interval_end(0, {"val_loss": 0.4}))
    files = fit(saving, middle, later, last, values=[0.4, 0.3])
    assert files == names("2 5 last", "10 2 5 last")
    assert saving.best == 0.3


def test_the_training_is_judged_at_the_end_of_an_epoch_alone(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{step}.pt", "score", save_best_only=True)
    middle = At(0, 1, lambda model: saving.on_interval_end(0, {"score": 0.1}))
    assert fit(saving, middle, values=[0.5, 0.4], name="score")[-1] == ["10", "5"]


# The k best.


@pytest.mark.parametrize(
    ("count", "mode", "values", "kept"),
    [
        (1, "min", [3, 4, 2, 2, 1], names("1", "1", "3", "3", "5")),
        (2, "min", [3, 4, 2, 2, 1], names("1", "1 2", "1 3", "3 4", "4 5")),
        (2, "max", [3, 4, 2, 2, 1], names("1", "1 2", "1 2", "1 2", "1 2")),
        (3, "max", [1, 2, 3, 4], names("1", "1 2", "1 2 3", "2 3 4")),
        (2, "min", [1, 1, 1, 0.5], names("1", "1 2", "1 2", "2 4")),
        (2, "min", [math.nan, 2, 3, 1], names("1", "1 2", "2 3", "2 4")),
        (2, "max", [math.nan, 2, math.nan, -1], names("1", "1 2", "1 2", "2 4")),
        (2, "min", [2, math.nan, 3], names("1", "1 2", "1 3")),
        (2, "max", [2, math.nan, 1], names("1", "1 2", "1 3")),
        (-1, "min", [3, 4, 2], names("1", "1 2", "1 2 3")),
        (2, "min", [5, None, 4, None, 3], names("1", "1", "1 3", "1 3", "3 5")),
    ],
)
def test_the_k_best_are_kept(fit, tmp_path, count, mode, values, kept):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", save_top_k=count, mode=mode)
    assert fit(saving, values=values) == kept
    best = (min if mode == "min" else max)(value for value in values if value is not None and value == value)
    assert saving.best_model_score == saving.best == best
    assert saving.best_model_path == str(tmp_path / f"{values.index(best) + 1}.pt")


def test_of_equal_names_the_second_gets_a_number(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{val_loss:.0f}.pt", save_top_k=3)
    kept = names("1", "1 1-v1", "1 1-v1 1-v2", "1-v1 1-v2 1", "1 1-v1 1-v2", "1 1-v1 1-v2")
    assert fit(saving, values=[1.4, 1.3, 1.2, 1.1, 1.0, 0.9]) == [sorted(files) for files in kept]
    values = {os.path.basename(path): value for path, value in saving._kept.items()}
    assert values == {"1.pt": 1.1, "1-v1.pt": 1.0, "1-v2.pt": 0.9}


def test_one_name_is_enough_for_one_file(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "best.pt", save_top_k=1)
    watch = Files(saving)
    assert fit(saving, watch, values=[2, 1, 3]) == [["best"]] * 3
    assert torch.equal(weights_in(tmp_path / "best.pt")["weight"], watch.weights[1]["weight"])


def test_a_file_is_deleted_when_the_next_one_is_safe_and_not_before(fit, model, tmp_path, monkeypatch):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", save_top_k=1)
    save = kt.Model.save

    def full(self, path):
        if Path(path).name == "2.pt":
            raise OSError(28, "No space left on device")
        save(self, path)

    monkeypatch.setattr(kt.Model, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(saving, values=[2, 1])
    assert os.listdir(tmp_path) == ["1.pt"]
    assert (saving.best, saving.best_model_path) == (2, str(tmp_path / "1.pt"))
    monkeypatch.undo()
    fit(saving, values=[1.5, 3])
    assert os.listdir(tmp_path) == ["1.pt"] and saving.best == 1.5


def test_a_file_that_cannot_be_deleted_is_no_reason_to_end(fit, tmp_path, monkeypatch):
    def fail(self, missing_ok):
        if self.suffix == ".pt":
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.warns(UserWarning, match=r"ModelCheckpoint could not delete '.*1.pt': Permission denied\."):
        files = fit(ModelCheckpoint(tmp_path / "{epoch}.pt", save_top_k=1), values=[2, 1])
    assert files[-1] == ["1", "2"]


def test_a_second_run_goes_on_with_the_files_that_are_still_there(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{val_loss:.0f}.pt", save_top_k=2)
    fit(saving, values=[5, 3, 4])
    assert fit(saving, values=[6, 2]) == names("3 4", "2 3")
    (tmp_path / "2.pt").unlink()
    assert fit(saving, values=[7, 4]) == names("3 7", "3 4")


# Batches and time.


def test_batches_are_counted_over_epochs(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{epoch}-{batch}-{step:02d}.pt", save_freq=3)
    assert fit(saving, values=[0] * 3)[-1] == ["1-3-03", "2-1-06", "2-4-09", "3-2-12", "3-5-15"]


def test_a_value_of_the_training_is_judged_at_each_of_these_batches(fit, model, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{step}-{loss:.4f}.pt", "loss", save_best_only=True, save_freq=2)
    seen = []
    watch = kt.Callback()
    watch.on_train_batch_end = lambda batch, logs=None: seen.append(logs["loss"])
    fit(saving, watch, values=[0, 0])
    best, expected = math.inf, []
    for step in (2, 4, 6, 8, 10):
        if seen[step - 1] < best:
            best = seen[step - 1]
            expected.append(f"{step}-{best:.4f}.pt")
    assert sorted(os.listdir(tmp_path)) == sorted(expected) and len(expected) >= 3
    assert saving.best == pytest.approx(best)


def test_a_value_of_the_validation_is_judged_after_the_next_one(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{step}.pt", save_top_k=-1, save_freq=7, save_last=True)
    early = At(0, 3, lambda model: saving.on_interval_end(0, {"val_loss": 0.1}))
    within = At(1, 2, lambda model: saving.on_interval_end(1, {"val_loss": 0.2}))
    files = fit(saving, early, within, values=[0.5, 0.5, 0.5, 0.5])
    # Due after the batches 7 and 14, and judged after 8, which is within an epoch, and 15.
    assert files == [[], ["8", "last"], ["15", "8", "last"], ["15", "8", "last"]]
    assert saving.state_dict()["batches"] == 20 % 7


class Clock:
    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr("kerastorch.callbacks.checkpoint.time.monotonic", lambda: self.now_s)


@pytest.mark.parametrize("every", [2.5, timedelta(seconds=2.5), {"seconds": 2.5}])
def test_time_is_looked_at_after_each_batch(fit, tmp_path, monkeypatch, every):
    clock = Clock(monkeypatch)

    class Tick(kt.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            clock.now_s += 1.0

    saving = ModelCheckpoint(tmp_path / "{step}.pt", every=every)
    assert fit(saving, Tick(), values=[0, 0])[-1] == ["3", "6", "9"]
    clock.now_s += 1000.0  # between two runs nothing is due
    assert fit(saving, Tick())[-1] == ["3", "6", "9"]
    text = ModelCheckpoint(tmp_path / "text{step}.pt", every="00:00:00:04")
    assert fit(text, Tick(), values=[0, 0])[-1] == ["3", "6", "9", "text4", "text8"]


def test_a_batch_costs_nothing_where_epochs_are_saved(tmp_path):
    assert hooks_of([ModelCheckpoint(tmp_path / "a.pt", save_best_only=True)]).on_train_batch_end == ()
    assert len(hooks_of([ModelCheckpoint(tmp_path / "a.pt", save_freq=2)]).on_train_batch_end) == 1
    copied = copy.deepcopy(ModelCheckpoint(tmp_path / "a.pt"))
    assert copied.on_train_batch_end.__self__ is copied


def test_batches_between_two_files_read_nothing_of_the_logs(fit, model, tmp_path):
    class Unread(dict):
        def __contains__(self, name):
            raise AssertionError("the logs were read")

        __getitem__ = __iter__ = __contains__

    saving = ModelCheckpoint(tmp_path / "{step}.pt", save_freq=10**6)
    fit(saving, At(0, 2, lambda model: saving.on_train_batch_end(2, Unread())))
    assert os.listdir(tmp_path) == []


def test_a_subclass_hears_of_batches(fit, tmp_path):
    heard = []

    class Own(ModelCheckpoint):
        def on_train_batch_end(self, batch, logs=None):
            heard.append(batch)
            super().on_train_batch_end(batch, logs)

    assert fit(Own(tmp_path / "{epoch}.pt")) == [["1"]] and heard == list(range(STEPS))


# The newest.


def test_last_is_the_newest_among_the_best_or_not(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", save_top_k=1, save_last=True)
    watch = Files(saving)
    assert fit(saving, watch, values=[2, 1, 3]) == names("1 last", "2 last", "2 last")
    assert saving.last_model_path == str(tmp_path / "last.pt")
    assert torch.equal(weights_in(tmp_path / "last.pt")["weight"], watch.weights[2]["weight"])
    assert torch.equal(weights_in(tmp_path / "2.pt")["weight"], watch.weights[1]["weight"])


def test_last_needs_no_room_of_its_own_where_there_are_links(fit, tmp_path, monkeypatch):
    saving = ModelCheckpoint(tmp_path / "{epoch}.safetensors", save_weights_only=True, save_last=True)
    fit(saving, values=[0, 0])
    assert os.path.samefile(tmp_path / "last.safetensors", tmp_path / "2.safetensors")
    assert saving.last_model_path.endswith("last.safetensors")

    def no_links(*paths):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    fit(saving, values=[0, 0, 0])
    assert not os.path.samefile(tmp_path / "last.safetensors", tmp_path / "3.safetensors")
    assert (tmp_path / "last.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_last_is_in_the_folder_before_the_first_brace(fit, tmp_path):
    assert fit(ModelCheckpoint(tmp_path / "{epoch}" / "run.pt", save_last=True)) == [["1", "last"]]
    assert fit(ModelCheckpoint(tmp_path / "b" / "{epoch}", save_last=True)) == [["1", "last"]]


def test_last_is_there_when_a_run_is_stopped(fit, model, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", save_freq=1000, save_last=True)
    fit(saving, At(1, 2, lambda model: setattr(model, "stop_training", True)), values=[0] * 5)
    assert os.listdir(tmp_path) == ["last.pt"]
    assert torch.equal(weights_in(tmp_path / "last.pt")["weight"], model.module.weight)


@pytest.mark.skipif(os.name == "nt", reason="needs the signals of POSIX")
@pytest.mark.parametrize("batch", [1, 4])
def test_last_is_there_after_ctrl_c(fit, model, tmp_path, digits, batch):
    saving = ModelCheckpoint(tmp_path / "{epoch}-{val_loss:.2f}.pt", save_best_only=True, save_last=True)
    interrupt = At(0, batch, lambda model: os.kill(os.getpid(), signal.SIGINT))
    fit(saving, interrupt, values=[None] * 5, validation_data=digits)
    assert os.listdir(tmp_path) == ["last.pt"] and model.steps_taken == batch + 1
    assert torch.equal(weights_in(tmp_path / "last.pt")["weight"], model.module.weight)


def test_last_is_not_written_again_where_nothing_was_trained_since(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", save_last=True)
    inodes = []

    class Look(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.at_safe_point(lambda: inodes.append((tmp_path / "last.pt").stat().st_ino))

    fit(saving, Look(), values=[0, 0])
    assert (tmp_path / "last.pt").stat().st_ino == inodes[-1] != inodes[0]


def test_last_follows_batches_and_time(fit, model, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{step}.pt", "loss", save_top_k=1, save_freq=2, mode="max", save_last=True)
    seen = []

    class Look(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.at_safe_point(self.look)

        def look(self):
            found = weights_in(tmp_path / "last.pt")["weight"] if (tmp_path / "last.pt").exists() else None
            seen.append(found is not None and torch.equal(found, self.model.module.weight))

    fit(saving, Look())
    assert seen == [False, True, False, True, False]
    assert torch.equal(weights_in(tmp_path / "last.pt")["weight"], model.module.weight)


def test_last_is_no_file_of_a_moment_before(fit, model, tmp_path):
    weights = {}

    class Look(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights[self.model.steps_taken] = self.model.module.weight.clone()

    within = ModelCheckpoint(tmp_path / "a" / "{step}.pt", save_top_k=-1, save_last=True)
    judged = At(0, 1, lambda model: within.on_interval_end(0, {"val_loss": 0.5}))
    assert fit(within, judged, Look()) == [["2", "last"]]
    assert torch.equal(weights_in(tmp_path / "a" / "last.pt")["weight"], weights[5])

    waiting = ModelCheckpoint(tmp_path / "b" / "{step}.pt", save_top_k=-1, save_freq=3, save_last=True)
    found = []
    look = At(1, 0, lambda model: model.at_safe_point(lambda: found.append(weights_in(tmp_path / "b" / "last.pt"))))
    assert fit(waiting, Look(), look, values=[0, 0]) == [["5", "last"], ["10", "5", "last"]]
    assert torch.equal(found[0]["weight"], weights[6]) and not torch.equal(weights[5], weights[6])


# Errors.


def fail(model):
    raise RuntimeError("out of luck")


def test_an_error_is_saved_where_that_is_asked_for_and_what_a_run_goes_on_from_stays(fit, model, tmp_path):
    saving = ModelCheckpoint(tmp_path / "best.pt", save_best_only=True, save_last=True, on_exception=True)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(saving, At(1, 2, fail), values=[1, 1])
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "exception.pt", "last.pt"]
    assert torch.equal(weights_in(tmp_path / "exception.pt")["weight"], model.module.weight)
    assert not torch.equal(weights_in(tmp_path / "best.pt")["weight"], model.module.weight)
    assert torch.equal(weights_in(tmp_path / "last.pt")["weight"], weights_in(tmp_path / "best.pt")["weight"])
    assert sorted(path.name for path in saving.saved_files()) == ["best.pt", "last.pt"]


def test_of_weights_alone_last_is_what_an_error_left(fit, model, tmp_path):
    options = {"save_weights_only": True, "save_last": True, "on_exception": True}
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(ModelCheckpoint(tmp_path / "{epoch}.safetensors", **options), At(1, 2, fail), values=[1, 1])
    assert sorted(os.listdir(tmp_path)) == ["1.safetensors", "exception.safetensors", "last.safetensors"]
    for name in ("exception", "last"):
        assert torch.equal(weights_in(tmp_path / f"{name}.safetensors")["weight"], model.module.weight)


@pytest.mark.parametrize("asked", [True, False])
def test_nothing_is_saved_where_it_is_not_asked_for_or_nothing_was_trained(fit, tmp_path, asked):
    saving = ModelCheckpoint(tmp_path / "a.pt", save_last=True, on_exception=asked)

    class Begin(kt.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == (0 if asked else 1):
                fail(None)

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(saving, Begin())
    assert os.listdir(tmp_path) == []


def test_who_presses_ctrl_c_twice_does_not_wait_for_a_file(fit, tmp_path):
    def interrupt(model):
        raise KeyboardInterrupt

    class Twice(At):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    saving = ModelCheckpoint(tmp_path / "a.pt", save_freq=1000, on_exception=True)
    with pytest.raises(KeyboardInterrupt):
        fit(saving, Twice(0, 1, interrupt))
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_saving_hides_no_other_one(fit, tmp_path, monkeypatch):
    saving = ModelCheckpoint(tmp_path / "a.pt", save_freq=1000, on_exception=True)

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kt.Model, "save", full)
    expected = r"ModelCheckpoint could not save what RuntimeError\('out of luck .*'\) ended: .*No space left"
    with pytest.raises(RuntimeError, match="out of luck"), pytest.warns(UserWarning, match=expected):
        fit(saving, At(0, 1, fail))


def test_an_error_outside_of_the_run_is_no_matter_of_its(fit, model, digits, tmp_path):
    saving = ModelCheckpoint(tmp_path / "a.pt", save_freq=1000, on_exception=True)
    fit(saving)

    class Fails(kt.Callback):
        def on_test_begin(self, logs=None):
            fail(None)

    with pytest.raises(RuntimeError, match="out of luck"):
        model.evaluate(*digits, callbacks=[saving, Fails()], verbose=0)
    assert os.listdir(tmp_path) == []


# State.


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "options",
    [
        {"save_top_k": 2},
        {"save_best_only": True},
        {"save_best_only": True, "initial_value_threshold": 4.5},
        {"save_top_k": 2, "save_freq": 7, "save_last": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_a_run_that_is_resumed_leaves_the_files_of_one_that_was_not(fit, tmp_path, options):
    values = [5.0, 3.0, 4.0, 3.5, 2.0, 2.5]
    whole = ModelCheckpoint(tmp_path / "whole" / "{epoch}.pt", **options)
    files = fit(whole, values=values)
    first, second = (ModelCheckpoint(tmp_path / "cut" / "{epoch}.pt", **options) for _ in range(2))
    fit(first, values=values[:3])
    second.load_state_dict(through_a_file(first.state_dict()))
    assert fit(second, values=values, initial_epoch=3) == files[3:]
    ends, expected = second.state_dict(), whole.state_dict()
    del ends["moment_of_last"], expected["moment_of_last"]  # steps of this fit
    assert str(ends).replace("cut", "whole") == str(expected)


def test_a_file_has_the_state_that_counts_it_in(fit, tmp_path):
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt", save_top_k=1)
    fit(saving, values=[2, 1])
    states = dict(state for state in checkpoint.read(tmp_path / "2.pt")["callbacks"] if state[0] == "ModelCheckpoint")
    assert states["ModelCheckpoint"] == saving.state_dict() | {"leaving": str(tmp_path / "1.pt")}
    assert states["ModelCheckpoint"]["kept"] == [[str(tmp_path / "2.pt"), 1.0]]


def test_files_of_another_folder_are_not_deleted(fit, tmp_path):
    first = ModelCheckpoint(tmp_path / "a" / "{epoch}.pt", save_top_k=1)
    fit(first, values=[2])
    second = ModelCheckpoint(tmp_path / "b" / "{epoch}.pt", save_top_k=1)
    second.load_state_dict(first.state_dict())
    assert fit(second, values=[3, 1]) == names("1", "2")
    assert os.listdir(tmp_path / "a") == ["1.pt"]


def test_an_average_of_the_weights_is_in_the_callbacks_state(fit, model, digits, tmp_path):
    ema = EMA(0.5)
    saving = ModelCheckpoint(tmp_path / "{epoch}.pt")
    watch = Files(saving)
    fit(saving, ema, watch, values=[0, 0], validation_data=digits)
    state = checkpoint.read(tmp_path / "2.pt")
    assert torch.equal(state["module"]["weight"], watch.weights[1]["weight"])
    averages = next(state for name, state in state["callbacks"] if name == "EMA")["averages"]
    assert torch.equal(averages["weight"], model.module.weight)


def test_of_a_dry_run_nothing_is_left(fit, model, tmp_path):
    saving = ModelCheckpoint(tmp_path / "real" / "{epoch}.pt", save_top_k=1, save_last=True)
    fit(saving, values=[2])
    before = saving.state_dict()
    model._dry_run_folder = tmp_path / "dry"
    assert fit(saving, values=[1, 0.5]) == names("1 last", "2 last")
    model._dry_run_folder = None
    assert saving.state_dict() == before and sorted(os.listdir(tmp_path / "real")) == ["1.pt", "last.pt"]
    assert fit(saving, values=[3, 1.5])[-1] == ["2", "last"]


# Names.


@pytest.mark.parametrize(
    ("text", "name", "folder", "suffix", "needed"),
    [
        ("a/{epoch:02d}-{val_loss:.3f}.pt", "a/03-0.250.pt", "a", ".pt", ("val_loss",)),
        ("a/b/{epoch}/{step:06d}/run.ckpt", "a/b/3/000017/run.ckpt", "a/b", ".ckpt", ()),
        ("{grad_norm/0.weight:.1e}.pt", "2.0e+00.pt", "", ".pt", ("grad_norm/0.weight",)),
        ("b{batch}{batch}", "b55", "", "", ()),
        ("{{x}}-{epoch}.pt", "{x}-3.pt", "", ".pt", ()),
        ("/r.d/best", "/r.d/best", "/r.d", "", ()),
        ("run-{val_mae:.2f}.pt", "run-nan.pt", "", ".pt", ("val_mae",)),
        ("{top:>6.1%}.w.safetensors", " 50.0%.w.safetensors", "", ".safetensors", ("top",)),
    ],
)
def test_names_are_filled_in(text, name, folder, suffix, needed):
    template = FileName(text)
    logs = {"val_loss": 0.25, "grad_norm/0.weight": 2, "top": torch.tensor(0.5)}
    assert template.filled({"epoch": 3, "batch": 5, "step": 17}, logs) == name
    assert (template.folder, template.suffix) == (folder, suffix)
    assert tuple(key for key in template.names if key not in FileName.COUNTS) == needed


def test_what_the_logs_must_have_is_known_before_the_run(tmp_path):
    saving = ModelCheckpoint(tmp_path / "{epoch}-{val_accuracy:.2f}-{lr}.pt", "val_accuracy")
    assert saving.keys_needed == ("val_accuracy", "lr") and saving.monitor is None
    assert ModelCheckpoint(tmp_path / "a.pt", "val_accuracy", save_best_only=True).monitor == "val_accuracy"
    assert ModelCheckpoint(tmp_path / "{epoch}", "val_accuracy", save_top_k=3).monitor == "val_accuracy"


def test_a_name_that_the_logs_do_not_have_is_refused_with_those_they_have(fit, tmp_path):
    with pytest.raises(ValueError, match="names 'aucc', but the logs have loss, accuracy, val_loss. Name one of these"):
        fit(ModelCheckpoint(tmp_path / "{aucc}.pt"))


def test_what_is_monitored_and_not_there_is_refused_before_training(model, digits, tmp_path):
    before = copy.deepcopy(model.module)
    with pytest.raises(ValueError, match="ModelCheckpoint monitors 'val_loss', but the logs will have loss, accuracy"):
        model.fit(*digits, callbacks=ModelCheckpoint(tmp_path / "a.pt", save_best_only=True), verbose=0)
    assert same_weights(model.module, before) and os.listdir(tmp_path) == []
    model.fit(*digits, callbacks=ModelCheckpoint(tmp_path / "a.pt"), verbose=0)


def test_lines_say_what_was_saved_and_what_was_not(fit, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(ModelCheckpoint("{epoch}.pt", save_top_k=1, verbose=1), values=[0.5, 0.25, 0.75])
    fit(ModelCheckpoint("a.pt", verbose=1))
    fit(ModelCheckpoint("b.pt", save_best_only=True, initial_value_threshold=0.5, verbose=1), values=[0.5])
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 1: val_loss = 0.50000, the best is 0.50000, saved 1.pt",
        "Epoch 2: val_loss = 0.25000, the best is 0.25000, saved 2.pt",
        "Epoch 3: val_loss = 0.75000 is not among the best, down to 0.25000",
        "Epoch 1: saved a.pt",
        "Epoch 1: val_loss = 0.50000 is not among the best, down to 0.50000",
    ]


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"filepath": 3}, TypeError, "filepath=3 is a int, expected a path such as 'run.pt'"),
        ({"filepath": ""}, ValueError, "filepath='' names no file. Give one, e.g. 'runs/{epoch:02d}.pt'"),
        ({"filepath": "runs/"}, ValueError, "filepath='runs/' names no file"),
        ({"filepath": "{epoch"}, ValueError, "is no template: .* Write braces in pairs"),
        ({"filepath": "{}.pt"}, ValueError, "has braces without a name. Write one in them: {epoch:02d}"),
        ({"filepath": "{0}.pt"}, ValueError, "has braces without a name"),
        ({"filepath": "{epoch:.2q}.pt"}, ValueError, "gives 'epoch' the format '.2q': .* Give one of numbers, as in"),
        ({"filepath": "{val_loss:d}.pt"}, ValueError, "gives 'val_loss' the format 'd'"),
        ({"filepath": "{loss!r}.pt"}, ValueError, "has !r, which numbers do not need. Leave it out"),
        ({"filepath": "a.keras"}, ValueError, "'a.keras' ends as Keras's files do. Give 'a.pt'"),
        ({"filepath": "{epoch}.safetensors"}, ValueError, "ends as weights alone do. Give '{epoch}.pt'"),
        ({"filepath": "a.weights.h5", "save_weights_only": True}, ValueError, "Keras's files do. Give 'a.safetensors'"),
        (
            {"filepath": "a", "save_weights_only": True},
            ValueError,
            "does not end in '.safetensors', .* Give 'a.safetensors'",
        ),
        ({"filepath": "a.npz", "save_weights_only": True}, ValueError, "Give 'a.safetensors'"),
        ({"filepath": "{batch}.pt"}, ValueError, "names the batch, but epochs are saved. Name the epoch or the step"),
        (
            {"filepath": "{val_loss}.pt", "save_freq": 5},
            ValueError,
            "names 'val_loss', which is not known within an epoch",
        ),
        ({"filepath": "last.pt", "save_last": True}, ValueError, "filepath='last.pt' is where 'last' goes, too"),
        ({"filepath": "./exception.pt", "on_exception": True}, ValueError, "is where 'exception' goes, too"),
        ({"save_freq": 0}, ValueError, "save_freq=0 is neither 'epoch' nor a number of batches from 1 up"),
        ({"save_freq": True}, ValueError, "save_freq=True is neither"),
        (
            {"save_freq": "hour"},
            ValueError,
            "save_freq='hour' is neither .* For a time give every, such as every={'hours': 1}",
        ),
        ({"save_freq": 5, "every": 60}, ValueError, "save_freq=5 and every both say when to save. Give one of them"),
        ({"every": "hour"}, ValueError, "every='hour' is no duration"),
        ({"every": 0}, ValueError, "every=0 is no duration"),
        ({"save_top_k": 0}, ValueError, "save_top_k=0 is no number of files. Give 1 or more, or -1"),
        ({"save_top_k": -2}, ValueError, "save_top_k=-2 is no number of files"),
        ({"save_top_k": True}, ValueError, "save_top_k=True is no number of files"),
        (
            {"save_top_k": 1, "save_best_only": True},
            ValueError,
            "save_best_only=True and save_top_k=1 both say what to keep",
        ),
        ({"filepath": "a.pt", "save_top_k": 2}, ValueError, "keeps several files, but filepath='a.pt' is one"),
        ({"filepath": "a.pt", "save_top_k": -1}, ValueError, "save_top_k=-1 keeps several files"),
        (
            {"initial_value_threshold": 0.5},
            ValueError,
            "initial_value_threshold=0.5 is a number for save_best_only=True",
        ),
        (
            {"initial_value_threshold": "0.5", "save_best_only": True},
            ValueError,
            "initial_value_threshold='0.5' is a number",
        ),
        ({"mode": "down"}, ValueError, "mode='down' is not known"),
        ({"monitor": None, "save_top_k": 1}, TypeError, "monitor=None is a NoneType, expected a name"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ModelCheckpoint(**{"filepath": "{epoch}.pt"} | arguments)


def test_what_keras_takes_by_position_means_the_same(tmp_path):
    saving = ModelCheckpoint(str(tmp_path / "a.safetensors"), "val_mae", 1, True, True, "min", 5, 0.5)
    found = (
        saving.monitor,
        saving.verbose,
        saving.save_best_only,
        saving.save_weights_only,
        saving.mode,
        saving.save_freq,
    )
    assert (*found, saving.best) == ("val_mae", 1, True, True, "min", 5, 0.5)
    assert ModelCheckpoint("a.pt", None).monitor is None


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(model, digits, tmp_path):
    (tmp_path / "file").write_text("")
    before = copy.deepcopy(model.module)
    with pytest.raises(
        OSError, match="ModelCheckpoint cannot write to '.*file': .* Give a folder that can be written to"
    ):
        model.fit(*digits, callbacks=ModelCheckpoint(tmp_path / "file" / "{epoch}.pt"), verbose=0)
    assert same_weights(model.module, before) and (tmp_path / "file").read_text() == ""


class Unsavable(kt.Callback):
    def on_train_begin(self, logs=None):
        self.handle = object()

    def state_dict(self):
        return {"handle": self.handle}


def test_a_state_that_no_file_can_hold_is_refused_before_training(model, digits, tmp_path):
    before = copy.deepcopy(model.module)
    callbacks = [ModelCheckpoint(tmp_path / "{epoch}.pt"), Unsavable()]
    with pytest.raises(TypeError, match=r"state\['callbacks'\]\[1\]\[1\]\['handle'\] is a object, which"):
        model.fit(*digits, callbacks=callbacks, verbose=0)
    assert same_weights(model.module, before) and os.listdir(tmp_path) == []
    weights = ModelCheckpoint(tmp_path / "{epoch}.safetensors", save_weights_only=True)
    model.fit(*digits, callbacks=[weights, Unsavable()], verbose=0)
    assert os.listdir(tmp_path) == ["1.safetensors"]


def test_weights_that_no_file_can_hold_are_refused_before_training(digits, tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return "text"

        def set_extra_state(self, state):
            pass

    model = kt.Model(Extra(64, 10), backend="cpu").compile("sgd", "cross_entropy")
    before = model.module.weight.clone()
    with pytest.raises(TypeError, match="'_extra_state' is a str, and safetensors holds dense tensors alone"):
        weights = ModelCheckpoint(tmp_path / "{epoch}.safetensors", save_weights_only=True)
        model.fit(*digits, callbacks=weights, verbose=0)
    assert torch.equal(model.module.weight, before)
