"""Callbacks: only what is overridden is called, by whatever class; a misspelt hook is reported."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks.base import HOOKS, hooks_of

DATA = torch.rand(8, 3), torch.rand(8, 1)


def fit(*callbacks, **options):
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse")
    return model, model.fit(*DATA, callbacks=list(callbacks), batch_size=4, verbose=0, **options)


def test_a_hook_that_nobody_overrode_is_not_in_the_table():
    class One(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            """Nothing."""

    one = One()
    table = vars(hooks_of([one, kt.Callback()]))
    assert {name: hooks for name, hooks in table.items() if hooks} == {"on_epoch_end": (one.on_epoch_end,)}


def test_the_base_hooks_are_never_called(monkeypatch):
    def fail(self, *arguments):
        raise AssertionError("called")

    fail._is_default = True
    for name in HOOKS:
        monkeypatch.setattr(kt.Callback, name, fail)
    model, _ = fit(kt.Callback(), validation_data=DATA)
    model.predict(DATA[0], callbacks=kt.Callback(), verbose=0)


def test_callbacks_know_their_model_and_parameters():
    callback = kt.Callback()
    callback.on_epoch_end = lambda epoch, logs: None
    model, _ = fit(callback, epochs=3)
    assert callback.model is model and callback.params == {"verbose": 0, "epochs": 3, "steps": 2}


def test_anything_with_hooks_works():
    class Plain:
        def __init__(self):
            self.losses = []

        def on_epoch_end(self, epoch, logs):
            self.losses.append(logs["loss"])

    plain = Plain()
    _, history = fit(plain, epochs=2)
    assert plain.losses == history.history["loss"]


def test_hooks_may_be_set_on_the_instance():
    epochs = []
    callback = kt.Callback()
    callback.on_epoch_begin = lambda epoch, logs=None: epochs.append(epoch)
    fit(callback, epochs=2)
    assert epochs == [0, 1]


def test_on_batch_end_is_another_name_and_called_once():
    class Old(kt.Callback):
        def on_batch_begin(self, batch, logs=None):
            seen.append(("begin", batch))

        def on_batch_end(self, batch, logs=None):
            seen.append(("end", batch))

    seen = []
    fit(Old())
    assert seen == [("begin", 0), ("end", 0), ("begin", 1), ("end", 1)]


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("on_epoch_ended", "on_epoch_end"),
        ("on_train_batch_ends", "on_train_batch_end"),
        ("on_epoch_start", "on_epoch_begin"),
    ],
)
def test_a_misspelt_hook_is_reported_before_training(misspelt, meant):
    callback = type("Mine", (kt.Callback,), {misspelt: lambda self, *arguments: None})()
    with pytest.raises(ValueError, match=f"Mine has a method '{misspelt}', which is no hook.*Did you mean '{meant}'"):
        fit(callback)


def test_other_methods_of_a_callback_are_its_own_business():
    class Mine(kt.Callback):
        def on_improvement(self):
            """A helper."""

        def on_epoch_end(self, epoch, logs=None):
            self.on_improvement()

    fit(Mine())


def test_batch_logs_are_the_means_of_the_epoch_so_far():
    class Watch(kt.Callback):
        def __init__(self):
            self.seen, self.kept = [], []

        def on_train_batch_end(self, batch, logs=None):
            self.kept.append(logs)
            if batch == 0:
                self.seen.append(logs["loss"])

    watch = Watch()
    model = kt.Model(nn.Linear(3, 1)).compile("sgd", "mse", lr=0.0)
    x, y = DATA
    losses = [nn.functional.mse_loss(model.module(x[rows]), y[rows]).item() for rows in ([0, 1, 2], [3, 4, 5], [6, 7])]
    means = [losses[0], (losses[0] + losses[1]) / 2, (3 * losses[0] + 3 * losses[1] + 2 * losses[2]) / 8]
    model.fit(x, y, batch_size=3, shuffle=False, callbacks=watch, verbose=0)
    assert watch.seen == pytest.approx(means[:1], abs=1e-6)
    assert [logs["loss"] for logs in watch.kept] == pytest.approx(means, abs=1e-6), "each keeps its moment's values"


def test_torchs_moments_see_the_loss_the_gradients_and_the_optimizer():
    class Watch(kt.Callback):
        def on_before_backward(self, loss):
            assert loss.requires_grad and loss.ndim == 0
            assert all(parameter.grad is None for parameter in self.model.module.parameters())

        def on_after_backward(self):
            assert all(parameter.grad is not None for parameter in self.model.module.parameters())
            self.before = [parameter.detach().clone() for parameter in self.model.module.parameters()]

        def on_before_optimizer_step(self, optimizer):
            assert optimizer is self.model.optimizer
            for parameter in self.model.module.parameters():
                parameter.grad.zero_()  # what a hook does to the gradients counts

        def on_before_zero_grad(self, optimizer):
            self.after = [parameter.detach().clone() for parameter in self.model.module.parameters()]
            assert all(parameter.grad is not None for parameter in self.model.module.parameters())

    watch = Watch()
    fit(watch)
    assert all(torch.equal(a, b) for a, b in zip(watch.before, watch.after, strict=True))


def test_every_hook_says_when_it_is_called():
    for name in HOOKS:
        assert inspect.getdoc(getattr(kt.Callback, name)), name
