"""What `fit` can say after its first steps at no cost: each mistake once, and nothing of models that are well."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

import kerastorch as kt
from kerastorch.preflight import hints, last_batch_size


class Hinted(kt.Model):
    """A model that looks whether its runs leave any of the hooks behind that the hints are looked for by."""

    def _training_recipe(self, *arguments, **options):
        recipe = super()._training_recipe(*arguments, **options)
        self.hooks, self.before = recipe.hooks, [len(one) for one in vars(recipe.hooks).values()]
        return recipe

    def fit(self, *data, **options):
        history = super().fit(*data, **options)
        assert self.before == [len(one) for one in vars(self.hooks).values()]
        assert not any(part._forward_pre_hooks for part in self.module.modules())
        return history


def caught(model: kt.Model, *data, epochs: int = 2, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.fit(*data, epochs=epochs, verbose=0, **options)
    return [str(one.message) for one in found]


def fitted(net: nn.Module, *data, loss="cross_entropy", optimizer="sgd", model=Hinted, **options) -> list[str]:
    model = model(net, backend="cpu").compile(optimizer, loss)
    return caught(model, *data, **options)


class Uses(nn.Module):
    """Has two heads, of which `choose(call)` says which is used."""

    def __init__(self, choose) -> None:
        super().__init__()
        self.heads, self.choose, self.calls = nn.ModuleList([nn.Linear(64, 10) for _ in range(2)]), choose, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.heads[self.choose(self.calls)](x)


def test_a_parameter_that_no_batch_uses_is_warned_of_once(digits) -> None:
    found = fitted(Uses(lambda call: 0), *digits)
    assert len(found) == 1 and "2 trainable parameters got no gradient in the first epoch: heads.1" in found[0]
    assert found[0].endswith("or freeze them by model.freeze.")


def test_a_parameter_that_one_batch_of_the_first_epoch_uses_is_not_warned_of(digits) -> None:
    assert fitted(Uses(lambda call: call % 2), *digits) == []
    assert fitted(Uses(lambda call: int(call == 5)), *digits) == []
    assert len(fitted(Uses(lambda call: int(call == 6)), *digits)) == 1


def test_a_long_first_epoch_is_not_waited_for(digits, monkeypatch) -> None:
    monkeypatch.setattr(hints, "PATIENCE_STEPS", 3)
    assert len(fitted(Uses(lambda call: int(call == 4)), *digits, epochs=1)) == 1
    assert fitted(Uses(lambda call: int(call == 3)), *digits, epochs=1) == []


def test_frozen_parameters_are_not_warned_of(digits) -> None:
    net = Uses(lambda call: 0)
    net.heads[1].requires_grad_(False)
    assert fitted(net, *digits) == []


def test_parameters_in_no_optimizer_are_not_warned_of(digits) -> None:
    net = Uses(lambda call: 0)
    assert fitted(net, *digits, optimizer=torch.optim.SGD(net.heads[0].parameters(), lr=0.1)) == []


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"microbatch": 8}], ids=str)
def test_gathered_gradients_count(digits, options) -> None:
    assert fitted(Uses(lambda call: call % 2), *digits, **options) == []
    assert len(fitted(Uses(lambda call: 0), *digits, **options)) == 1


def test_optimizers_that_compute_gradients_in_their_step_are_left_alone(digits, classifier) -> None:
    assert fitted(classifier, *digits, optimizer="lbfgs") == []


class Alternates(Hinted):
    """Steps the generator in every third batch only, and never uses its bias."""

    calls = 0

    def train_step(self, batch):
        generator, critic = self.module["generator"], self.module["critic"]
        fake = F.linear(torch.randn(len(batch[0]), 4), generator.weight)
        loss = F.softplus(-critic(batch[0])).mean() + F.softplus(critic(fake.detach())).mean()
        self.backward(loss)
        self.optimizer_step("critic")
        self.calls += 1
        if self.calls % 3 == 0:
            self.backward(F.softplus(-critic(fake)).mean())
            self.optimizer_step("generator")
        return {"loss": loss}


def test_optimizers_that_step_in_some_batches_are_waited_for(digits) -> None:
    net = nn.ModuleDict({"generator": nn.Linear(4, 64, bias=False), "critic": nn.Linear(64, 1)})
    both = {"generator": "adam", "critic": "adam"}
    assert fitted(net, digits[0], loss=None, optimizer=both, model=Alternates) == []
    net["generator"] = nn.Linear(4, 64)
    found = fitted(net, digits[0], loss=None, optimizer=both, model=Alternates)
    assert len(found) == 1 and "1 trainable parameter got" in found[0] and "generator.bias" in found[0]


def test_where_all_is_well_one_step_is_looked_at_and_no_more(digits, classifier) -> None:
    looks = []

    class Counts(kt.Callback):
        def on_before_zero_grad(self, optimizer):
            looks.append(len(self.model.hooks.on_before_optimizer_step) + len(self.model.hooks.on_epoch_end))

    assert fitted(classifier, *digits, callbacks=Counts(), epochs=1) == []
    assert looks == [0] * 5


def test_an_error_leaves_no_hooks(digits) -> None:
    class Ends(kt.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            raise KeyError("stop")

    model = Hinted(nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)), backend="cpu")
    model.compile("sgd", "cross_entropy")
    with pytest.raises(KeyError):
        model.fit(*digits, callbacks=Ends(), verbose=0)
    assert model.before == [len(one) for one in vars(model.hooks).values()]
    assert not model.module[1]._forward_pre_hooks


# A last batch of one sample.


def norms(*shape: int) -> nn.Module:
    two = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    return two.append(nn.Linear(8, 3))


def test_a_last_batch_that_a_norm_cannot_take_is_warned_of_in_the_first_one() -> None:
    x, y = torch.randn(33, 6), torch.arange(33) % 3
    model = Hinted(norms(), backend="cpu").compile("sgd", "cross_entropy")
    seen = []

    class Sees(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(len(found))

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model.fit(x, y, callbacks=Sees(), verbose=0)
    assert seen == [1] and len(found) == 1
    assert "one sample, by which BatchNorm ('1') cannot normalize" in str(found[0].message)


def test_a_last_batch_that_the_norms_can_take_is_not_warned_of() -> None:
    x, y = torch.randn(33, 2, 6), torch.arange(33) % 3
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 3))
    assert fitted(net, x, y) == []
    model = Hinted(norms(), backend="cpu").freeze("1", "3").compile("sgd", "cross_entropy")
    assert caught(model, torch.randn(33, 6), y) == []
    assert fitted(norms(), torch.randn(34, 6), torch.arange(34) % 3) == []


def test_a_last_batch_that_is_not_trained_on_is_not_warned_of() -> None:
    data = torch.randn(33, 6), torch.arange(33) % 3
    for options in ({"steps_per_epoch": 0.5}, {"overfit_batches": 1}, {"dry_run": True}):
        assert fitted(norms(), *data, **options) == []


class Endless(IterableDataset):
    def __iter__(self):
        yield from torch.zeros(33)


x, data = torch.zeros(33, 2), TensorDataset(torch.zeros(33, 2))


@pytest.mark.parametrize(("given", "options", "expected"), [
    (x, {}, 1), (x.numpy(), {}, 1), (pd.DataFrame(x.numpy()), {}, 1), (x.tolist(), {}, 1), ((x, x[:, 0]), {}, 1),
    ({"a": x, "b": x}, {}, 1), ([x, x], {}, 1), (x, {"batch_size": 33}, 33), (x, {"batch_size": 10}, 3),
    (x, {"batch_size": 1}, 1), (x, {"validation_split": 0.5}, 16), (x[:1], {}, 1), (data, {}, 1),
    (DataLoader(data, 8), {}, 1), (DataLoader(data, 8, drop_last=True), {}, None), (DataLoader(data, None), {}, None),
    (DataLoader(data, batch_sampler=[[0, 1]]), {}, None),
    (DataLoader(data, batch_sampler=BatchSampler(range(33), 4, False)), {}, 1),
    (DataLoader(data, batch_sampler=BatchSampler(range(33), 4, True)), {}, None),
    (DataLoader(data, batch_sampler=BatchSampler(iter(range(33)), 4, False)), {}, None),
    (DataLoader(data, 8, sampler=range(7)), {}, 7),
    (DataLoader(Endless(), 8), {}, None), (Endless(), {}, None), ([(x, x)], {}, None), (iter([x]), {}, None),
    (lambda: x, {}, None), (np.zeros((0, 2)), {}, None),
], ids=lambda one: type(one).__name__)  # fmt: skip
def test_size_of_the_last_batch(given, options, expected) -> None:
    assert last_batch_size(given, **options) == expected
