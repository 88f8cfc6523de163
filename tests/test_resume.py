"""Runs that end anywhere and go on: bit-equal to one that did not end."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections import OrderedDict
from functools import partial
from itertools import islice

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import EMA, BackupAndRestore, EarlyStopping, ModelCheckpoint

from . import processes, reference
from .reference import Killed

generator = torch.Generator().manual_seed(0)
X = torch.randn(52, 6, generator=generator)
Y = (X.sum(1, keepdim=True) > 0).float()


class Die(kt.Callback):
    """Raises before the batch of a number, counted over the run."""

    def __init__(self, at):
        self.left = at

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1
        if self.left < 0:
            raise Killed


class Augmented(Dataset):
    """Samples with noise of all three libraries."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index] + 0.1 * torch.randn(6) + random.random() + np.random.rand(), Y[index]


class OwnNoise(Dataset):
    """Samples with noise from generators of the dataset's own."""

    def __init__(self):
        self.numpy, self.legacy = np.random.default_rng(3), np.random.RandomState(1)
        self.python, self.torch = random.Random(2), torch.Generator().manual_seed(4)

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        noise = float(self.numpy.normal()) + self.legacy.rand() + self.python.random()
        return X[index] + noise + torch.randn(6, generator=self.torch), Y[index]


class Stream(IterableDataset):
    """Samples one after the other, that knows where it is."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 50:
            self.at += 1
            yield X[self.at - 1], Y[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def loader(dataset=None, **options):
    return DataLoader(dataset or Augmented(), 5, shuffle=not isinstance(dataset, Stream), **options)


DATA = {
    "arrays": lambda: ((X, Y), {"batch_size": 5}),
    "arrays that go on": lambda: ((X, Y), {"batch_size": 5, "steps_per_epoch": 7}),
    "dataset": lambda: ((Augmented(),), {"batch_size": 5}),
    "dataset with generators": lambda: ((OwnNoise(),), {"batch_size": 5}),
    "loader": lambda: ((loader(),), {}),
    "loader that goes on": lambda: ((loader(),), {"steps_per_epoch": 7}),
    "loader with a generator": lambda: ((loader(generator=torch.Generator().manual_seed(3)),), {}),
    "loader of tensors": lambda: ((loader(TensorDataset(X, Y)),), {}),
    "loader of tensors that goes on": lambda: ((loader(TensorDataset(X, Y)),), {"steps_per_epoch": 7}),
    "workers": lambda: ((loader(num_workers=2),), {}),
    "workers that persist": lambda: (
        (loader(num_workers=2, persistent_workers=True),),
        {"steps_per_epoch": 7},
    ),
    "stream with a state": lambda: ((Stream(),), {"batch_size": 5}),
    "list of batches": lambda: (([(X[i : i + 5], Y[i : i + 5]) for i in range(0, 52, 5)],), {}),
    "callable": lambda: ((lambda: ((X[i : i + 5], Y[i : i + 5]) for i in range(0, 52, 5)),), {}),
}


def run(data, *callbacks, **options):
    kt.set_seed(11)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    schedule = kt.schedules.cosine(steps=15)
    model = kt.Model(net, backend="cpu").compile(
        "adamw", "bce_with_logits", metrics=["accuracy", "auc"], schedule=schedule, lr=0.01, clip=1.0
    )
    given, more = DATA[data]()
    options = {"epochs": 3, "accumulate": 3, "validation_data": (X[:20], Y[:20]), "verbose": 0} | more | options
    return model, model.fit(*given, callbacks=[EMA(0.9), *callbacks], **options)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("freq", "at"), [(1, 9), (4, 20)])
def test_a_run_that_died_ends_as_the_one_that_did_not(tmp_path, data, freq, at):
    whole, history = run(data)
    with pytest.raises(Killed):
        run(data, Die(at), BackupAndRestore(tmp_path, save_freq=freq))
    model, resumed = run(data, BackupAndRestore(tmp_path, save_freq=freq))
    assert reference.same_weights(model.module, whole.module)
    assert resumed.history == history.history and resumed.epoch == history.epoch


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"batch_size": 4}, {"batch_size": 5, "steps_per_epoch": 11}])
def test_a_stream_that_is_over_is_not_gone_through_again(tmp_path, options):
    """Its own state says at its end what it says at its beginning."""

    def died(at):
        with pytest.raises(Killed):
            run("stream with a state", Die(at), BackupAndRestore(tmp_path, save_freq=1), **options)

    whole, history = run("stream with a state", **options)
    died(len(X) // options["batch_size"] + (options["batch_size"] == 5))  # at the first batch of the second epoch
    model, resumed = run("stream with a state", BackupAndRestore(tmp_path, save_freq=1), **options)
    assert reference.same_weights(model.module, whole.module)
    assert resumed.history == history.history


@pytest.mark.parametrize(("freq", "at"), [("epoch", 105), (9, 105), (50, 230)])
def test_means_in_float64_have_the_same_last_bit(tmp_path, freq, at):
    """Where the first batch of a process was added up by itself, they had not."""

    def fit(*callbacks):
        kt.set_seed(3)
        model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("adamw", "mse", metrics=["mae"], precision="64")
        x, y = torch.cat([X] * 10).double(), torch.cat([Y] * 10).double()
        data = {"validation_data": (x[:200], y[:200]), "validation_batch_size": 5, "batch_size": 5}
        return model.fit(x, y, epochs=3, callbacks=callbacks, verbose=0, **data).history

    whole = fit()
    with pytest.raises(Killed):
        fit(Die(at), BackupAndRestore(tmp_path, save_freq=freq))
    assert fit(BackupAndRestore(tmp_path, save_freq=freq)) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_before_the_place_are_not_loaded(tmp_path, workers):
    class Counting(Augmented):
        loaded = torch.zeros(52, dtype=torch.int64).share_memory_()

        def __getitem__(self, index):
            self.loaded[index] += 1
            return super().__getitem__(index)

    def fit(*callbacks):
        kt.set_seed(0)
        model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("sgd", "mse")
        model.fit(loader(Counting(), num_workers=workers), callbacks=callbacks, verbose=0)

    with pytest.raises(Killed):
        fit(BackupAndRestore(tmp_path, save_freq=8), Die(8))
    Counting.loaded.zero_()
    fit(BackupAndRestore(tmp_path, save_freq=8))
    assert Counting.loaded.sum() == 12


def test_what_workers_draw_does_not_depend_on_how_many_there_are(monkeypatch):
    two, _ = run("workers")
    monkeypatch.setitem(DATA, "workers", lambda: ((loader(num_workers=3),), {}))
    three, _ = run("workers")
    assert reference.same_weights(two.module, three.module)


def test_a_file_of_a_finished_run_is_gone_on_from_with_more_epochs(tmp_path):
    schedule = {"epochs": 4}
    whole, history = run("loader", **schedule)
    model, _ = run("loader", epochs=2)
    model.save(tmp_path / "half.pt")
    torch.rand(7)  # what is drawn in between is no part of the run
    resumed, after = run("loader", resume=tmp_path / "half.pt", **schedule)
    assert reference.same_weights(resumed.module, whole.module) and after.history == history.history


def test_a_run_that_max_steps_cut_goes_on_within_its_window(tmp_path):
    whole, history = run("arrays", max_steps=9)
    run("arrays", BackupAndRestore(tmp_path, delete_checkpoint=False), max_steps=5)
    model, resumed = run("arrays", BackupAndRestore(tmp_path), max_steps=9)
    assert reference.same_weights(model.module, whole.module) and resumed.history == history.history


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("data", ["arrays", "workers"])
def test_a_signal_ends_a_run_that_can_go_on_exactly(tmp_path, name, data):
    class Signal(kt.Callback):
        def on_before_backward(self, loss):
            if self.model._live_run.position.epoch == 1 and self.model._live_run.position.batch == 4:
                os.kill(os.getpid(), getattr(signal, name))

    whole, history = run(data)
    _, cut = run(data, BackupAndRestore(tmp_path), Signal())
    assert cut.stopped_by == ("interrupt" if name == "SIGINT" else name) and cut.epoch == [0, 1]
    model, resumed = run(data, BackupAndRestore(tmp_path))
    assert reference.same_weights(model.module, whole.module) and resumed.history == history.history
    assert resumed.stopped_by is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("freq", [1, "4 steps"])
def test_a_validation_that_a_signal_broke_off_is_done_again(tmp_path, freq):
    class Signal(kt.Callback):
        validations = 0

        def on_test_batch_end(self, batch, logs=None):
            self.validations += batch == 0
            if self.validations == 2 and batch == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"validation_freq": freq, "validation_batch_size": 5}
    whole, history = run("loader", **options)
    run("loader", BackupAndRestore(tmp_path), Signal(), **options)
    model, resumed = run("loader", BackupAndRestore(tmp_path), **options)
    assert reference.same_weights(model.module, whole.module)
    assert resumed.history == history.history and resumed.intervals == history.intervals


def test_a_second_ctrl_c_stops_at_once():
    class Twice(kt.Callback):
        def on_before_backward(self, loss):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("arrays", Twice())


LAUNCHERS = {
    "a process": ([sys.executable], 1, lambda process: os.killpg(process.pid, signal.SIGTERM), "SIGTERM"),
    "torchrun": (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        2,
        lambda process: os.kill(process.pid, signal.SIGINT),
        "interrupt",
    ),
}
SCRIPT = """
import os, sys, time, torch, kerastorch as kt
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self):
        return 4000

    def __getitem__(self, index):
        time.sleep(0.002)
        return torch.rand(3), torch.rand(1)

class Say(kt.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 5:
            os.write(1, f"ready {os.getpid()}\\n".encode())

rank = os.environ.get("RANK", "0")
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
model = kt.Model(torch.nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
callbacks = [Say(), kt.callbacks.BackupAndRestore(os.path.join(sys.argv[1], rank))]
history = model.fit(DataLoader(Slow(), 5, num_workers=2), callbacks=callbacks, verbose=0)
os.write(1, f"stopped by {history.stopped_by}\\n".encode())
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_that_are_told_to_end_save_and_leave_nobody_behind(tmp_path, launcher):
    command, ranks, tell, reason = LAUNCHERS[launcher]
    (tmp_path / "train.py").write_text(SCRIPT)
    started = [*command, str(tmp_path / "train.py"), str(tmp_path / "backups")]
    process = subprocess.Popen(started, stdout=subprocess.PIPE, text=True, start_new_session=True, env=os.environ)
    family = []
    try:
        ready = (line for line in process.stdout if line.startswith("ready"))  # Gloo says something, too
        assert len(list(islice(ready, ranks))) == ranks
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2 * ranks  # with their data workers
        tell(process)
        said = [line for line in process.stdout if line.startswith("stopped")]
        assert said == [f"stopped by {reason}\n"] * ranks
        assert process.wait(60) == (launcher == "torchrun")  # which says that it was a signal
        assert [os.listdir(folder) for folder in (tmp_path / "backups").iterdir()] == [["backup.pt"]] * ranks
        assert psutil.wait_procs(family, timeout=5)[1] == []
    finally:
        for one in [process, *family]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()


ENDING = """
import torch, kerastorch as kt
from torch.utils.data import DataLoader, Dataset

class Samples(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.rand(3), torch.rand(1)

def fit():
    model = kt.Model(torch.nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
    model.fit(loader, epochs=2, verbose=0)

class Keeps(kt.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise RuntimeError("kept with all that it came through")

if __name__ == "__main__":
    loader = DataLoader(Samples(), 5, num_workers=2, persistent_workers=True)
    process = torch.multiprocessing.get_context("fork").Process(target=fit)
    process.start()
    process.join()
    fit()
    try:
        model = kt.Model(torch.nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
        model.fit(DataLoader(Samples(), 5, num_workers=2), callbacks=Keeps(), verbose=0)
    except RuntimeError as error:
        kept = error
    print("the end", process.exitcode)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes made by fork")
def test_a_script_ends_whose_workers_are_still_there(tmp_path):
    """They ignore a SIGTERM that may have gone to all processes, but not that of their own process."""
    (tmp_path / "train.py").write_text(ENDING)
    done = processes.run(tmp_path / "train.py", limit_s=60)
    assert (done.returncode, done.stdout) == (0, "the end 0\n")
    assert "Traceback" not in done.stderr


def test_a_sample_that_fails_is_named(tmp_path):
    class Broken(Augmented):
        def __getitem__(self, index):
            if index == 17:
                raise ValueError("no such picture")
            return super().__getitem__(index)

    for data in (Broken(), loader(Broken()), loader(Broken(), num_workers=2)):
        model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("sgd", "mse")
        with pytest.raises(ValueError, match=r"no such picture \(raised by the dataset for sample 17\)"):
            model.fit(data, verbose=0)


class Pair(kt.Model):
    """Two optimizers, with a step of its own."""

    def train_step(self, batch):
        for name, loss in (("first", 1.0), ("second", 2.0)):
            self.backward(loss * nn.functional.mse_loss(self.module(batch[0]), batch[1]))
            self.optimizer_step(name)
        return {"loss": loss}


def pair(*callbacks, precision="32", accumulate=4):
    kt.set_seed(2)
    net = nn.Sequential(OrderedDict(first=nn.Linear(6, 8), drop=nn.Dropout(0.3), second=nn.Linear(8, 1)))
    optimizers = {"first": "adam", "second": "sgd"}
    model = Pair(net, backend="cpu").compile(optimizers, precision=precision, lr=0.01)
    return model, model.fit(X, Y, batch_size=5, epochs=3, accumulate=accumulate, callbacks=callbacks, verbose=0)


def pieces(*callbacks, microbatch=3):
    """Without metrics: what they would be made of is a shape alone."""
    kt.set_seed(2)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    model = kt.Model(net, backend="cpu").compile("adam", "bce_with_logits", lr=0.01)
    return model, model.fit(X, Y, batch_size=5, epochs=3, microbatch=microbatch, callbacks=callbacks, verbose=0)


class Noisy(nn.Module):
    """A module with random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.generator = nn.Linear(6, 1), torch.Generator().manual_seed(5)

    def forward(self, x):
        return self.layer(x + 0.1 * torch.randn(x.shape, generator=self.generator))


def noisy(*callbacks):
    kt.set_seed(2)
    model = kt.Model(nn.Sequential(Noisy()), backend="cpu").compile("adam", "mse", lr=0.01)
    return model, model.fit(X, Y, batch_size=5, epochs=3, callbacks=callbacks, verbose=0)


def deep(*callbacks):
    """Random numbers of the dataset, deep within it."""
    data = Subset(Subset(ConcatDataset([OwnNoise(), OwnNoise()]), range(60)), range(52))
    kt.set_seed(2)
    model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("adam", "mse", lr=0.01)
    return model, model.fit(DataLoader(data, 5, shuffle=True), epochs=3, callbacks=callbacks, verbose=0)


TRAININGS = {
    "steps of its own": pair,
    "steps of its own in fp16": partial(pair, precision="16"),
    "steps of its own, one by one": partial(pair, accumulate=1),
    "pieces": pieces,
    "as large pieces as fit": partial(pieces, microbatch="auto"),
    "a module with random numbers of its own": noisy,
    "a dataset with random numbers deep within it": deep,
}


@pytest.mark.parametrize("at", [3, 15])
@pytest.mark.parametrize("training", TRAININGS)
def test_whatever_is_trained_is_gone_on_with(tmp_path, training, at):
    whole, history = TRAININGS[training]()
    with pytest.raises(Killed):
        TRAININGS[training](Die(at), BackupAndRestore(tmp_path, save_freq=1))
    model, resumed = TRAININGS[training](BackupAndRestore(tmp_path, save_freq=1))
    assert reference.same_weights(model.module, whole.module) and resumed.history == history.history


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("precision", ["32", "16", "bf16"])
def test_on_a_gpu_too(tmp_path, precision, background):
    """With the random numbers of the device, and the scale of the loss."""

    def fit(*callbacks, **options):
        kt.set_seed(2)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        model = kt.Model(net, backend="gpu").compile("adamw", "bce_with_logits", precision=precision, lr=0.01)
        options |= {"batch_size": 5, "epochs": 3, "accumulate": 3, "verbose": 0}
        return model, model.fit(X, Y, callbacks=[EMA(0.9), *callbacks], **options)

    whole, history = fit()
    saving = partial(ModelCheckpoint, tmp_path / "{epoch}-{batch}.pt", save_freq=4, background=background)
    with pytest.raises(Killed):
        fit(saving(), Die(18))
    model, resumed = fit(saving(), resume=tmp_path / "2-5.pt")
    assert reference.same_weights(model.module, whole.module) and resumed.history == history.history


def test_what_has_a_shape_alone_is_saved_in_the_background_too(tmp_path):
    saving = partial(ModelCheckpoint, tmp_path / "{step}.pt", save_freq=4, background=True)
    whole, history = pieces(saving())
    kt.set_seed(2)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    model = kt.Model(net, backend="cpu").compile("adam", "bce_with_logits", lr=0.01)
    resumed = model.fit(X, Y, batch_size=5, epochs=3, microbatch=3, resume=tmp_path / "16.pt", verbose=0)
    assert reference.same_weights(model.module, whole.module) and resumed.history == history.history


class Batches:
    """Batches of numbers, of any type that torch takes."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 11

    def __iter__(self):
        for first in torch.randperm(11).tolist():
            yield self.kind(range(5 * first, min(5 * first + 5, 52)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda numbers: numbers])
def test_batches_of_numbers_may_be_of_any_type(kind, workers):
    def fit(loader):
        kt.set_seed(0)
        model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("sgd", "mse", lr=0.1)
        model.fit(loader, verbose=0)
        return model.module.weight

    class Seen(TensorDataset):
        """Which is not seen through."""

    seen = Seen(X, Y)
    expected = fit(DataLoader(seen, batch_sampler=Batches(list)))
    assert torch.equal(fit(DataLoader(seen, batch_sampler=Batches(kind), num_workers=workers)), expected)


@pytest.mark.parametrize("freq", ["epoch", 1])
def test_a_run_that_was_to_stop_stops_when_it_is_gone_on_with(tmp_path, freq):
    def stopped(*callbacks):
        stopping = EarlyStopping("loss", patience=0, min_delta=10.0)
        kt.set_seed(1)
        model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("sgd", "mse", lr=0.01)
        return model, model.fit(X, Y, epochs=9, batch_size=5, callbacks=[stopping, *callbacks], verbose=0)

    class DieAtTheEnd(kt.Callback):
        def on_train_end(self, logs=None):
            raise Killed

    whole, history = stopped()
    with pytest.raises(Killed):
        stopped(BackupAndRestore(tmp_path, save_freq=freq), DieAtTheEnd())
    assert os.listdir(tmp_path) == ["backup.pt"]  # others may fail until the very end
    seen = Die(-1)
    model, resumed = stopped(BackupAndRestore(tmp_path, save_freq=freq), seen)
    assert history.epoch == resumed.epoch == [0, 1] and history.stopped_by == resumed.stopped_by == "stop_training"
    assert resumed.history == history.history and reference.same_weights(model.module, whole.module)
    assert seen.left == -1  # no batch was trained
    assert os.listdir(tmp_path) == []


def test_the_epoch_that_max_steps_cut_is_closed_by_the_run_that_goes_on(tmp_path):
    whole, history = run("arrays", max_steps=5, epochs=None)
    with pytest.raises(Killed):
        run(
            "arrays",
            reference.DieBehindWhatIsSaved(14),
            BackupAndRestore(tmp_path, save_freq=1),
            max_steps=5,
            epochs=None,
        )
    model, resumed = run("arrays", BackupAndRestore(tmp_path, save_freq=1), max_steps=5, epochs=None)
    assert resumed.history == history.history and resumed.epoch == history.epoch == [0, 1]
    assert reference.same_weights(model.module, whole.module)


def test_an_interruption_within_a_step_does_not_take_the_place_of_the_backup(tmp_path):
    class Interrupt(kt.Callback):
        def on_before_optimizer_step(self, optimizer):
            if self.model.history.epoch == [0] and self.model.samples_seen > 20:
                raise KeyboardInterrupt

    whole, history = run("arrays")
    _, cut = run("arrays", BackupAndRestore(tmp_path), Interrupt())
    assert cut.stopped_by == "interrupt"
    model, resumed = run("arrays", BackupAndRestore(tmp_path))
    assert resumed.history == history.history and reference.same_weights(model.module, whole.module)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_at_the_end_of_a_run_is_told_of(name):
    class Last(kt.Callback):
        def on_train_end(self, logs=None):
            os.kill(os.getpid(), getattr(signal, name))

    _, history = run("arrays", Last())
    assert history.stopped_by == {"SIGINT": "interrupt"}.get(name, name)


def test_a_ctrl_c_after_sigterm_stops_at_once():
    class Both(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("arrays", Both())


def test_workers_that_persist_serve_one_pass_at_a_time():
    """Beside a pass that is under way there is one with workers of its own; torch would end the first."""
    loader = DataLoader(OwnNoise(), 13, num_workers=1, persistent_workers=True)
    counted = Die(100)
    model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("sgd", "mse")
    model.fit(loader, epochs=2, validation_data=loader, validation_freq=0.5, callbacks=counted, verbose=0)
    assert counted.left == 100 - 8 and len(model.history.intervals) == 4


def test_fit_within_fit_of_the_same_model_is_refused():
    class Nested(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.fit(X, Y, verbose=0)

    with pytest.raises(RuntimeError, match="fit was called by a callback while the same model trains"):
        run("arrays", Nested())


def test_a_model_that_was_saved_before_any_run_is_one_to_begin_with(tmp_path):
    model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("sgd", "mse")
    model.save(tmp_path / "new.pt")
    other = kt.Model(nn.Linear(6, 1), backend="cpu").compile("sgd", "mse")
    assert other.fit(X, Y, epochs=2, resume=tmp_path / "new.pt", verbose=0).epoch == [0, 1]


def test_no_backup_is_gone_on_from_where_that_is_not_wanted(tmp_path):
    with pytest.raises(Killed):
        run("arrays", Die(14), BackupAndRestore(tmp_path))
    _, history = run("arrays", counted := Die(100), BackupAndRestore(tmp_path), resume=False)
    assert counted.left == 100 - 33 and history.epoch == [0, 1, 2]


def test_data_that_ends_before_the_place_is_refused(tmp_path):
    def fit(batches, **options):
        model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("sgd", "mse")
        return model.fit(((X[:4], Y[:4]) for _ in range(batches)), verbose=0, **options)

    with pytest.warns(UserWarning, match="data of type generator has neither numbered samples nor a state_dict"):
        fit(20, callbacks=ModelCheckpoint(tmp_path / "{batch}.pt", save_freq=15))
    with pytest.raises(ValueError, match=r"goes on after batch 15 of an epoch, but the data ended after 10\. Give"):
        fit(10, resume=tmp_path / "15.pt")


def test_a_damaged_backup_is_said_to_be_one(tmp_path):
    with pytest.raises(Killed):
        run("arrays", Die(14), BackupAndRestore(tmp_path))
    path = tmp_path / "backup.pt"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"^the run would go on from what it has saved, but .* to begin anew\.$"):
        run("arrays", BackupAndRestore(tmp_path))


def test_what_cannot_be_exact_is_said_once(tmp_path):
    def batches():
        for start in range(0, 52, 5):
            yield X[start : start + 5], Y[start : start + 5]

    model = kt.Model(nn.Linear(6, 1), backend="cpu").compile("sgd", "mse")
    with pytest.warns(UserWarning, match="is not exact") as said:
        model.fit(batches(), callbacks=BackupAndRestore(tmp_path, save_freq=2), verbose=0)
    assert len(said) == 1 and "neither numbered samples nor a state_dict" in str(said[0].message)


REFUSED = {
    "no file": ({"resume": "nowhere.pt"}, FileNotFoundError, "there is no file 'nowhere.pt'"),
    "no path": ({"resume": 3}, TypeError, "resume=3 is a int, expected the path of a file, or True, False or None"),
    "no saver": ({"resume": True}, ValueError, "resume=True looks for files of the callbacks, none of which"),
    "dry": ({"resume": True, "dry_run": True}, ValueError, "resume=True and dry_run=True were both given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_run_to_go_on_with_is_refused(case):
    options, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        run("arrays", **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"batch_size": 4}, "goes on at batch 4 of 11, but the data now has 13"), ({"accumulate": 2}, "accumulate=3")],
)
def test_other_data_and_windows_are_refused_within_an_epoch(tmp_path, options, text):
    with pytest.raises(Killed):
        run("arrays", BackupAndRestore(tmp_path, save_freq=4), Die(5))
    with pytest.raises(ValueError, match=text):
        run("arrays", BackupAndRestore(tmp_path), **options)
