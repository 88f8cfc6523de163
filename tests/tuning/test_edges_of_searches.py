"""Searches where steps, data or models are unusual: each ends, leaves nothing, and answers or says why not."""

from __future__ import annotations

import copy
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, random_split

import kerastorch as kt
from kerastorch.tuning.budget import Peak
from kerastorch.tuning.forecast import traced_bytes

X = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def model_of(module: nn.Module | None = None, kind: type[kt.Model] = kt.Model, **options) -> kt.Model:
    return kind(module or nn.Linear(4, 1), backend="cpu").compile(**({"optimizer": "sgd", "loss": "mse"} | options))


class OneLossForTwo(kt.Model):
    def train_step(self, batch):
        decoded = self.module["decoder"](self.module["encoder"](batch[0]))
        self.backward(((decoded - batch[0]) ** 2).mean())
        self.optimizer_step("encoder")
        self.optimizer_step("decoder")


def test_one_loss_may_be_that_of_two_optimizers():
    module = nn.ModuleDict({"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4)})
    model = model_of(module, OneLossForTwo, optimizer={"encoder": "adam", "decoder": "adam"}, loss=None)
    found = model.find_lr(X, apply=False)
    assert found["encoder"].losses[0] == pytest.approx(found["decoder"].losses[0])
    assert all(len(one.losses) > 50 and one.lr is not None for one in found.values())


class NeverSteps(kt.Model):
    def train_step(self, batch):
        self.backward(((self.module(batch[0]) - batch[1]) ** 2).mean())


def test_a_step_that_asks_for_none_ends_both_searches():
    with pytest.raises(ValueError, match="has made no step in 100 batches"):
        model_of(kind=NeverSteps).find_lr(X, Y)
    assert model_of(kind=NeverSteps).find_batch_size(X, Y) == 200


def test_where_nothing_can_be_learned_there_is_no_rate():
    torch.manual_seed(0)
    x, y, module = torch.randn(2000, 4), torch.randn(2000, 1), nn.Linear(4, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    model = model_of(module)
    with pytest.warns(UserWarning, match="no rate has made the loss lower than it is untrained"):
        found = model.find_lr(x, y)
    assert found.lr is None and found.refuted and model.optimizer.param_groups[0]["lr"] == 1e-3


def test_the_range_of_negative_losses_holds_the_rate():
    found = model_of(loss=lambda output, target: ((output - target) ** 2).mean() - 5).find_lr(X, Y)
    low, high = found.range
    assert low <= found.lr <= high and found.plot() is not None


def test_a_frozen_groups_rate_of_zero_stays():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [{"params": module[0].parameters(), "lr": 0.0}, {"params": module[1].parameters(), "lr": 0.1}]
    model = model_of(module, optimizer=torch.optim.SGD(groups))
    found = model.find_lr(X, Y)
    assert [group["lr"] for group in model.optimizer.param_groups] == [0.0, found.lr]


class Stream(IterableDataset):
    def __init__(self, samples: int | None) -> None:
        self.samples = samples

    def __iter__(self):
        number = 0
        while number != self.samples:
            yield X[number % 200], Y[number % 200]
            number += 1


@pytest.mark.parametrize(("data", "size"), [(DataLoader(Stream(100), 8, drop_last=True), 100), (Stream(None), 2**14)])
def test_streams_are_tried_as_far_as_they_go(data, size):
    assert model_of().find_batch_size(data, steps_per_trial=1) == size


@pytest.mark.parametrize("samples", [3, 5, 65])
@pytest.mark.parametrize("mode", ["predict", "power", "binsearch"])
def test_a_sample_that_is_left_over_is_no_batch_of_a_trial(samples, mode):
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    assert model_of(module).find_batch_size(X[:samples], Y[:samples], mode=mode) == samples


class Untraced(kt.Model):
    def train_step(self, batch):
        self.backward(((self.module(batch[0]) - batch[1]) ** 2).mean())
        self.optimizer_step()


def test_too_few_trials_are_not_too_little_memory():
    module = nn.Sequential(nn.Linear(4, 4096), nn.Linear(4096, 1))
    x = torch.rand(20000, 4)
    options = {"memory": "50MB", "mode": "power", "init": 10000, "max_trials": 1}
    with pytest.raises(ValueError, match="none of max_trials=1 trials has fitted"):
        model_of(module, Untraced).find_batch_size(x, x.sum(1, keepdim=True), **options)


@pytest.mark.parametrize("mode", ["predict", "power"])
@pytest.mark.parametrize("init", [1, 2, 50])
def test_a_normalization_for_which_there_is_no_room_is_told_so(mode, init):
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with pytest.raises(torch.OutOfMemoryError, match="does not fit into the 1 B there are for it"):
        model_of(module).find_batch_size(X, Y, memory=1, mode=mode, init=init)


class OneAtMost(nn.Module):
    """Has memory for one sample, which its normalization refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x):
        if len(x) > 1 and type(x) is torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")
        return self.layer(self.norm(x))


def test_a_normalization_that_has_memory_for_one_sample_lacks_it_for_two():
    calls = []

    class Fits(OneAtMost):
        def forward(self, x):  # the warm-up goes well
            calls.append(len(x))
            return self.layer(self.norm(x)) if len(x) == 2 and len(calls) < 6 else super().forward(x)

    with pytest.raises(torch.OutOfMemoryError, match="a step of batch size 2 .*does not fit") as raised:
        model_of(Fits()).find_batch_size(X, Y, mode="power", init=4)
    assert "more than 1 value per channel" in str(raised.value.__cause__)


def test_a_trace_that_a_normalization_refuses_for_one_sample_is_there_for_more():
    module = nn.Sequential(nn.Linear(4, 5000), nn.BatchNorm1d(5000), nn.Linear(5000, 1))
    forecast = traced_bytes(model_of(module), (X[:2], Y[:2], None))
    assert forecast(1) == forecast(2) < forecast(20) < forecast(200)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of Linux")
def test_nothing_is_run_that_is_forecast_not_to_fit():
    wide = nn.Sequential(nn.Linear(4, 10_000_000, bias=False), nn.Tanh(), nn.Linear(10_000_000, 1))  # 80 MB a sample
    model = model_of(wide)
    with Peak(torch.device("cpu")) as taken, pytest.raises(torch.OutOfMemoryError, match="batch size 1 takes"):
        model.find_batch_size(X, Y, memory="30MB")
    assert taken.bytes < 30_000_000 + 4 * sum(one.numel() for one in wide.parameters())  # the copies to restore from


class Picky(nn.Module):
    """Raises, as `torch.distributions` do, where its output is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x):
        output = self.layers(x)
        if type(x) is torch.Tensor and not output.isfinite().all():
            raise ValueError("not finite")
        return output


def range_test(module, steps, smoothing, stop_factor):
    """By hand: the losses up to where the smoothed one has diverged."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-7)
    losses, average, best = [], 0.0, float("inf")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-7 * (10 / 1e-7) ** (step / (steps - 1))
        loss = nn.functional.mse_loss(module(X), Y)
        losses.append(loss.item())
        average = smoothing * average + (1 - smoothing) * losses[-1]
        smoothed = average / (1 - smoothing ** (step + 1))
        if step and not smoothed <= stop_factor * best:
            return losses
        best = min(best, smoothed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.98])
def test_a_module_that_raises_where_it_diverges_is_swept_up_to_there(smoothing):
    torch.manual_seed(0)
    module = Picky()
    by_hand = range_test(copy.deepcopy(module), 100, smoothing, 4)
    model = model_of(module)
    found = model.find_lr(X, Y, batch_size=200, smoothing=smoothing, confirm=False, apply=False)
    assert len(by_hand) < 95 and found.losses == pytest.approx(by_hand, rel=0.01)
    before = [one.clone() for one in module.parameters()]
    confirmed = model.find_lr(X, Y, batch_size=200, smoothing=smoothing)
    assert confirmed.lr > found.lr and all(map(torch.equal, module.parameters(), before))


def test_a_rate_at_which_a_module_raises_is_none_to_take():
    class Fragile(Picky):
        def forward(self, x):
            if self.layers[0].weight.abs().max() > 0.9 and type(x) is torch.Tensor:
                self.layers[0].weight.data.fill_(float("nan"))
            return super().forward(x)

    torch.manual_seed(0)
    found = model_of(Fragile()).find_lr(X, Y, batch_size=50)
    assert float("inf") in found.tried.values() and math.isfinite(found.tried[found.lr])


def test_a_step_that_fails_for_another_reason_comes_through():
    class Breaks(Picky):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 25:
                raise ValueError("that is another matter")
            return super().forward(x)

    with pytest.raises(ValueError, match="that is another matter"):
        model_of(Breaks()).find_lr(X, Y, batch_size=200)
    frozen = model_of(nn.Linear(4, 1).requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable parameters"):
        frozen.find_lr(X, Y)


class Drawn(IterableDataset):
    """Rows with noise, whose random numbers live as long as a worker."""

    def __iter__(self):
        for x, y in zip(X, Y, strict=True):
            yield x + torch.randn(4), y


@pytest.mark.parametrize("search", ["find_lr", "find_batch_size"])
def test_workers_that_stay_alive_draw_what_they_would_have_drawn(search):
    losses = []
    for searches in (False, True):
        kt.set_seed(0)
        torch.manual_seed(0)
        data, model = DataLoader(Drawn(), 20, num_workers=1, persistent_workers=True), model_of(lr=0.05)
        losses += model.fit(data, verbose=0).history["loss"]
        if searches:
            getattr(model, search)(data, apply=False)
        losses += model.fit(data, verbose=0).history["loss"]
    assert losses[:2] == losses[2:] and losses[0] != losses[1]


def test_a_rate_is_found_for_the_batch_size_that_is_trained_with(monkeypatch):
    sizes, sweep = [], kt.tuning.find_lr
    data, model = DataLoader(torch.utils.data.TensorDataset(X, Y), 10), model_of(lr="auto")

    def noted(model, data, *args, **named):
        sizes.append(data.batch_size)
        return sweep(model, data, *args, **named)

    monkeypatch.setattr(kt.tuning, "find_lr", noted)
    found = model.find_batch_size(data)
    assert model.fit(data, validation_split=0.25, verbose=0).params["steps"] == 1
    assert sizes == [found]


@pytest.mark.parametrize("data", [lambda: iter([(X, Y)]), lambda: DataLoader([*zip(X, Y, strict=True)], 8), "abc"])
def test_batches_that_are_made_already_are_no_data_of_a_search(data):
    with pytest.raises(TypeError, match="batches are made already .* Give arrays, a Dataset, or a DataLoader"):
        model_of().find_batch_size(data)


@pytest.mark.parametrize("name", ["init", "max_trials", "steps_per_trial"])
@pytest.mark.parametrize("number", [None, 0, -1, True, 1.5, "2"])
def test_numbers_of_a_search_are_whole(name, number):
    with pytest.raises(ValueError, match=f"{name}={number!r} is no .* Give a whole number from 1 up"):
        model_of().find_batch_size(X, Y, **{name: number})


def test_numbers_may_be_those_of_numpy():
    whole = np.int64(4)
    data = DataLoader(torch.utils.data.TensorDataset(X, Y), 10)
    numbers = {"init": whole, "max_trials": np.int64(20), "steps_per_trial": np.int32(2)}
    assert model_of().find_batch_size(X, Y, mode="power", **numbers) == 200
    assert model_of().find_batch_size(data, mode="power", **numbers) == 200
    found = model_of().find_lr(X, Y, batch_size=np.int64(50), confirm=np.int64(5), steps=np.int64(20), apply=False)
    assert len(found.lrs) <= 20
    assert model_of().fit(X, Y, batch_size=np.int64(50), verbose=0).params["steps"] == 4
    with pytest.raises(ValueError, match="stop_factor=nan is no factor"):
        model_of().find_lr(X, Y, stop_factor=float("nan"))


def test_a_linear_sweep_is_drawn_over_a_linear_axis():
    pytest.importorskip("matplotlib")
    options = {"confirm": False, "apply": False, "min_lr": 0.01, "max_lr": 1}
    for mode, scale in (("linear", "linear"), ("exponential", "log")):
        assert model_of().find_lr(X, Y, mode=mode, **options).plot().axes[0].get_xscale() == scale


class Jitter:
    """A transform with random numbers of its own."""

    def __init__(self) -> None:
        self.random = np.random.RandomState(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * float(self.random.rand())


class Jittered(Dataset):
    def __init__(self) -> None:
        self.transform = Jitter()

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int):
        return self.transform(X[index]), Y[index]


@pytest.mark.parametrize(
    "of", [lambda data: data, lambda data: Subset(data, range(150)), lambda data: random_split(data, [150, 50])[0]]
)
def test_random_numbers_deep_in_the_data_are_put_back(of):
    losses = []
    for finds in (False, True):
        kt.set_seed(0)
        model, data = model_of(), DataLoader(of(Jittered()), 32, shuffle=True)
        if finds:
            model.find_batch_size(data, apply=False)
            model.find_lr(data, apply=False, confirm=5)
        losses.append(model.fit(data, epochs=2, verbose=0).history["loss"])
    assert losses[0] == losses[1]


class FindsItself(kt.Model):
    def fit(self, data, y=None, *, epochs=1):
        self.find_lr(data, y)
        return super().fit(data, y, epochs=epochs, verbose=0)


def test_a_fit_of_ones_own_may_search():
    assert len(model_of(kind=FindsItself).fit(X, Y, epochs=2).history["loss"]) == 2


def test_auto_searches_what_is_trained_on():
    model = model_of(lr="auto")
    history = model.fit(X, Y, batch_size="auto", validation_split=0.5, verbose=0)
    assert f"{model.batch_size}" == "100" and history.params["steps"] == 1


@pytest.mark.parametrize("verbose", [0, 2])
def test_auto_tells_in_a_line_each_what_was_found(capsys, verbose):
    model = model_of(lr="auto")
    model.fit(X, Y, batch_size="auto", verbose=verbose)
    told, rate = capsys.readouterr().out.splitlines(), model.optimizer.param_groups[0]["lr"]
    lines = [model.batch_size.title, f"learning rate: {rate:.3g}"]
    assert told[:2] == lines and len(told) == 3 if verbose else not told


class Stops(kt.callbacks.Callback):
    """After so many batches, as a machine that is taken away would."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, batch, logs=None):
        self.batches -= 1
        if not self.batches:
            raise ConnectionError


@pytest.mark.parametrize("as_loader", [False, True])
def test_a_run_that_goes_on_searches_for_nothing_and_goes_on_exactly(monkeypatch, tmp_path, as_loader):
    data = (DataLoader(torch.utils.data.TensorDataset(X, Y), 7, shuffle=True),) if as_loader else (X, Y)
    ends, calls = [], []
    search, sweep = kt.tuning.find_batch_size, kt.tuning.find_lr
    sizes = iter([50, 50, 40])  # another machine, or the same one later, has room for another

    def found(model, *args, **named):
        search(model, *args, **named)
        return kt.tuning.BatchSize(next(sizes))

    monkeypatch.setattr(kt.tuning, "find_batch_size", found)
    monkeypatch.setattr(kt.tuning, "find_lr", lambda *args, **named: calls.append(1) or sweep(*args, **named))
    for is_cut in (False, True):
        kt.set_seed(3)
        torch.manual_seed(3)
        folder = tmp_path / str(is_cut)
        backup = [kt.callbacks.BackupAndRestore(folder, save_freq=1)]
        run = {"batch_size": "auto", "epochs": 4, "verbose": 0}
        model = model_of(lr="auto", precision="64")
        if is_cut:
            with pytest.raises(ConnectionError):
                model.fit(*data, callbacks=[*backup, Stops(6)], **run)
            model, before = model_of(lr="auto", precision="64"), len(calls)
            backup = [kt.callbacks.BackupAndRestore(folder, save_freq=1)]
        history = model.fit(*data, callbacks=backup, **run)
        assert not is_cut or len(calls) == before
        assert model.batch_size == model.batch_size.per_rank == 50 or not is_cut
        assert model.batch_size == 50 and history.params["steps"] == 4
        ends.append((history.history["loss"], model.optimizer.param_groups[0]["lr"], model.module.weight.tolist()))
    assert ends[0] == ends[1]


def test_auto_tells_of_each_optimizer(capsys):
    module = nn.ModuleDict({"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4)})
    optimizers = {"encoder": "adam", "decoder": "adam"}
    model_of(module, OneLossForTwo, optimizer=optimizers, loss=None, lr="auto").fit(X, verbose=2)
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told[:2]] == [f"learning rate of {name!r}" for name in optimizers]


def test_a_loader_that_has_its_size_is_swept_with_it():
    data, model = DataLoader(torch.utils.data.TensorDataset(X, Y), 1), model_of()
    assert model.find_batch_size(data) == 200
    whole = model_of()
    assert model.find_lr(data, confirm=False, apply=False).losses[0] == pytest.approx(
        ((model.module(X) - Y) ** 2).mean().item()
    )
    with pytest.raises(TypeError, match="batch_size='auto'"):
        whole.find_lr(X, Y, batch_size="auto")


def test_a_number_of_confirming_steps_is_refused_where_nothing_is_confirmed():
    module = nn.ModuleDict({"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4)})
    model = model_of(module, OneLossForTwo, optimizer={"encoder": "adam", "decoder": "adam"}, loss=None)
    with pytest.raises(ValueError, match="confirm=30 was given with several optimizers"):
        model.find_lr(X, confirm=30)
