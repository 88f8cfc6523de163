"""What ranks that `fit` has started leave in the calling process: what one process would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import kerastorch as kt

ROOT = Path(kt.__file__).parents[1]
X = torch.rand(101, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
BACKENDS = {"one": lambda: "cpu", "two": lambda: kt.backends.DDP(2, timeout_s=30)}


def both(run):
    """What comes of the same in one process and in two ranks."""
    found = []
    for make in BACKENDS.values():
        kt.set_seed(1)
        found.append(run(make()))
    return found


def regressor(backend, net=None, **options):
    return kt.Model(net or nn.Linear(4, 1), backend=backend).compile("sgd", "mse", **({"lr": 0.1} | options))


class Keeps(kt.callbacks.Callback):
    adds_to_logs = ()

    def __init__(self, out):
        self.out, self.seen, self.path = out, {}, None

    def on_epoch_end(self, epoch, logs=None):
        self.out.append(np.float32(epoch))
        self.seen[epoch] = np.arange(epoch)
        self.path = Path("somewhere")


def test_attributes_of_callbacks_come_back_into_the_lists_that_others_have():
    def run(backend):
        keeps = Keeps(out := [])
        regressor(backend).fit(X, Y, epochs=2, verbose=0, callbacks=[keeps])
        return out, {epoch: one.tolist() for epoch, one in keeps.seen.items()}, keeps.path

    one, two = both(run)
    assert one == two == ([0, 1], {0: [], 1: [0]}, Path("somewhere"))


class Stops(kt.callbacks.Callback):
    adds_to_logs = ()

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


def test_why_a_run_ended_is_known_after_an_evaluation_too():
    def run(backend):
        model = regressor(backend)
        history = model.fit(X, Y, epochs=4, verbose=0, callbacks=[Stops()])
        model.evaluate(X, Y, verbose=0)
        return history.stopped_by, model.history is history, model.stop_training, model.epochs_trained

    assert both(run) == [("stop_training", True, True, 1)] * 2


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += self.training
        return self.layer(x)


def test_buffers_that_no_file_has_come_back():
    def run(backend):
        model = regressor(backend, Counts())
        model.fit(X, Y, verbose=0)
        return model.module.calls.item()

    assert both(run) == [4, 4]


def test_lazy_layers_and_frozen_and_regrouped_parameters_come_back():
    def run(backend):
        net = nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8, momentum=0.5), nn.Linear(8, 1))
        model = regressor(backend, net)
        model.fit(X, Y, verbose=0)
        model.freeze("1")
        unfreeze = kt.callbacks.Unfreeze(0, "1", 0.01)
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[unfreeze])
        counted = int(net[1].num_batches_tracked)
        loss = model.evaluate(X, Y, verbose=0)
        model.fit(X, Y, verbose=0)
        return counted, int(net[1].num_batches_tracked), len(model.optimizer.param_groups), loss

    (*counts, loss), (*others, other) = both(run)
    assert counts == others and counts[1] > counts[0] and counts[2] == 2
    assert other == pytest.approx(loss, abs=1e-5)


class WithRate(kt.Model):
    def compile(self, rate):
        return super().compile("sgd", "mse", lr=rate)


def test_a_compile_of_ones_own_is_not_called_again():
    one, two = both(
        lambda backend: WithRate(nn.Linear(4, 1), backend=backend).compile(0.05).fit(X, Y, verbose=0).history
    )
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)


class OwnError(Exception):
    def __init__(self, code, why):
        super().__init__(code, why)
        self.code, self.why = code, why


class Fails(kt.callbacks.Callback):
    adds_to_logs = ()

    def __init__(self, error):
        self.error = error

    def on_train_begin(self, logs=None):
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OwnError(3, "mine"), OwnError, "mine"),
        (UnicodeDecodeError("utf8", b"x", 0, 1, "bad"), RuntimeError, "UnicodeDecodeError: .*bad"),
        (FileNotFoundError(2, "gone"), FileNotFoundError, "gone"),
        (KeyError("absent"), KeyError, "^'absent"),
        (SystemExit(3), RuntimeError, r"sys.exit\(3\) was called"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_of_ranks_are_of_their_own_type(error, kind, said):
    with pytest.raises(kind, match=said) as caught:
        regressor(BACKENDS["two"]()).fit(X, Y, verbose=0, callbacks=[Fails(error)])
    assert "Fails" in str(caught.value.__cause__) or "on_train_begin" in str(caught.value.__cause__)
    if kind is OwnError:
        assert caught.value.code == 3
    if kind is FileNotFoundError:
        assert caught.value.errno == 2


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = dict(os.environ)
    model = regressor(BACKENDS["two"]())
    model.fit(X, Y, verbose=0)
    model.predict(X, verbose=0)
    assert dict(os.environ) == before
    assert [*tmp_path.iterdir()] == []


class Drawn(Dataset):
    """Samples that draw from torch, and say which they are."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index] + 0 * torch.rand(int(torch.randint(1, 5, ()))).sum(), torch.tensor([index / 1000])


class Numbers(kt.callbacks.Callback):
    adds_to_logs = ()

    def on_epoch_end(self, epoch, logs=None):
        self.sums = getattr(self, "sums", []) + [round(logs["total"] * 101 * 1000)]


def total(output, target):
    return target.mean()


@pytest.mark.parametrize("data", ["loader", "dataset"])
def test_each_sample_comes_once_an_epoch_whatever_samples_draw(data):
    def run(backend):
        numbers = Numbers()
        model = regressor(backend, metrics=[total])
        given = DataLoader(Drawn(), 13, shuffle=True) if data == "loader" else Drawn()
        model.fit(given, epochs=3, verbose=0, callbacks=[numbers], batch_size=None if data == "loader" else 13)
        return numbers.sums

    assert both(run) == [[sum(range(101))] * 3] * 2


class Noise(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.rand(4), torch.zeros(1)


def test_ranks_draw_other_random_numbers_in_samples():
    predicted = kt.Model(nn.Identity(), backend=BACKENDS["two"]()).predict(DataLoader(Noise(), 20), verbose=0)
    assert len(torch.as_tensor(predicted).unique(dim=0)) == 40


def test_a_sampler_that_gives_each_rank_a_part_is_refused():
    loader = DataLoader(Drawn(), 13, sampler=DistributedSampler(Drawn(), 2, 0))
    with pytest.raises(ValueError, match="has a DistributedSampler"):
        regressor(BACKENDS["two"]()).fit(loader, verbose=0)


def test_a_loader_whose_workers_persist_serves_ranks_too():
    loader = DataLoader(Drawn(), 13, num_workers=1, persistent_workers=True)
    model = regressor("cpu")
    model.fit(loader, verbose=0)
    ranks = regressor(BACKENDS["two"]())
    assert ranks.fit(loader, verbose=0).epoch == [0]
    assert model.fit(loader, verbose=0).epoch == [0]  # its own workers are still there


class Slowly(kt.callbacks.Callback):
    adds_to_logs = ()

    def on_epoch_end(self, epoch, logs=None):
        time.sleep(0.7)


LONG = """
import os, time, torch, kerastorch as kt
from torch import nn
class Waits(kt.callbacks.Callback):
    adds_to_logs = ()
    def on_train_batch_end(self, batch, logs=None):
        if batch == 0 and self.model.backend.rank == 0:
            os.write(1, b"ready\\n")
        time.sleep(0.05)
x = torch.rand(6400, 4)
model = kt.Model(nn.Linear(4, 1), backend=kt.backends.DDP(2)).compile("sgd", "mse")
model.fit(x, x[:, :1], epochs=20, verbose=0, callbacks=[Waits()])
"""


def test_a_handler_of_ones_own_stays():
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        model = regressor(BACKENDS["two"]())
        history = model.fit(X, Y, epochs=3, verbose=0, callbacks=[Slowly()])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert history.epoch == [0, 1, 2] and calls == [signal.SIGUSR1]


def test_ranks_end_with_the_process_that_has_started_them(tmp_path):
    (tmp_path / "train.py").write_text(LONG)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(tmp_path / "train.py")], stdout=subprocess.PIPE, env=environment)
    family = []
    try:
        assert any(line.startswith(b"ready") for line in process.stdout)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        _, left = psutil.wait_procs(family, timeout=15)
        assert len(family) >= 2 and left == []
    finally:
        process.kill()
        for one in family:
            if one.is_running():
                one.kill()
        process.wait()
        process.stdout.close()


def test_a_large_prediction_does_not_take_long_to_come_back():
    model = kt.Model(nn.Identity(), backend=BACKENDS["two"]())
    large = np.random.default_rng(0).random((2000, 1000), dtype=np.float32)
    assert np.array_equal(model.predict(large, batch_size=500, verbose=0), large)


def test_the_norm_of_the_last_gradients_comes_back():
    def run(backend):
        model = regressor(backend, nn.Sequential(nn.Linear(4, 1)), clip=1.0)
        kt.set_seed(2)
        model.module[0].reset_parameters()
        model.fit(X, Y, epochs=1, verbose=0)
        return model.gradient_norm

    one, two = both(run)
    assert one > 0 and torch.allclose(one, two, atol=1e-6)
