"""Searches where steps, data or models are unusual: each ends, leaves nothing, and answers or says why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, random_split

import kerastorch as kt

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
