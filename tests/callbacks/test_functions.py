"""LambdaCallback: functions as hooks, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import LambdaCallback
from kerastorch.callbacks.base import HOOKS, hooks_of

DATA = torch.rand(8, 3), torch.rand(8, 1)


def fit(callback, **options):
    model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
    return model.fit(*DATA, callbacks=callback, batch_size=4, verbose=0, **options)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_can_be_given_and_no_other_is_called(name):
    def hook(*arguments):
        """Nothing."""

    table = vars(hooks_of([LambdaCallback(**{name: hook})]))
    heard = {known for known, functions in table.items() if functions}
    assert heard == {name.replace("on_batch_", "on_train_batch_")}
    assert table[heard.pop()] == (hook,)


def test_those_of_keras_come_by_position_in_its_order():
    seen = []

    def note(name):
        return lambda *arguments: seen.append((name, *arguments[:-1]))

    fit(LambdaCallback(*map(note, ("epoch", "epoch end", "train", "train end", "batch", "batch end"))), epochs=2)
    batches = [("batch", 0), ("batch end", 0), ("batch", 1), ("batch end", 1)]
    epochs = [[("epoch", epoch), *batches, ("epoch end", epoch)] for epoch in range(2)]
    assert seen == [("train",), *epochs[0], *epochs[1], ("train end",)]


def test_what_a_function_puts_into_the_logs_gets_into_the_history():
    history = fit(LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(twice=2 * epoch)), epochs=3)
    assert history.history["twice"] == [0, 2, 4]


def test_what_a_function_returns_is_returned():
    callback = LambdaCallback(on_train_batch_begin=lambda batch, logs: -batch)
    assert callback.on_train_batch_begin(1, {}) == -1


def test_it_may_add_anything_to_the_logs_only_where_it_hears_of_the_end_of_an_epoch():
    assert LambdaCallback(on_epoch_end=print).adds_to_logs is None
    assert LambdaCallback(on_epoch_begin=print).adds_to_logs == ()


def test_none_is_none():
    fit(LambdaCallback())
    fit(LambdaCallback(None, on_test_end=None))
    assert not any(vars(hooks_of([LambdaCallback(None, on_test_end=None)])).values())


def test_one_callback_serves_two_runs():
    epochs = []
    callback = LambdaCallback(lambda epoch, logs: epochs.append(epoch))
    fit(callback, epochs=2)
    fit(callback)
    assert epochs == [0, 1, 0]


def test_it_knows_its_model():
    callback = LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(callback.model, "stop_training", True))
    assert len(fit(callback, epochs=9).epoch) == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("on_epoch_ends", "Did you mean 'on_epoch_end'?"),
        ("epoch_begin", "Did you mean 'on_epoch_begin'?"),
        ("on_validation_start", "Did you mean 'on_validation_begin'?"),
        ("logs", "Hooks are on_train_begin, on_train_end, "),
        ("model", "Hooks are on_train_begin, "),
    ],
)
def test_what_is_no_hook_is_refused_with_the_nearest(name, hint):
    with pytest.raises(TypeError) as error:
        LambdaCallback(**{name: print})
    assert str(error.value).startswith(f"LambdaCallback was given {name!r}, which is no hook. {hint}")


@pytest.mark.parametrize("hook", [3, "print", [print]])
def test_what_cannot_be_called_is_refused(hook):
    with pytest.raises(TypeError, match="on_epoch_begin=.* is a .*, expected a function. Give e.g. a lambda"):
        LambdaCallback(hook)
    with pytest.raises(TypeError, match="on_test_end=.* is a .*, expected a function"):
        LambdaCallback(on_test_end=hook)


def test_one_hook_by_two_names_is_refused():
    with pytest.raises(ValueError, match="on_train_batch_end and on_batch_end are one hook by two names"):
        LambdaCallback(on_train_batch_end=print, on_batch_end=print)
