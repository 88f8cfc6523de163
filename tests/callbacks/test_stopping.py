"""EarlyStopping by hand-computed sequences, in runs, with its weights and states; TerminateOnNaN near and far."""

from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import EMA, EarlyStopping, TerminateOnNaN, stopping
from tests.reference import cut, same_weights

NAN, INF = math.nan, math.inf
mse = nn.functional.mse_loss


class Score(kt.Callback):
    """Puts a value into the logs of each epoch, and a copy of the module aside."""

    adds_to_logs = ("score",)

    def __init__(self, *values):
        self.values, self.modules = values, []

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = self.values[epoch]
        self.modules.append(copy.deepcopy(self.model.module))


@pytest.fixture
def net():
    """With buffers, and with a layer to freeze."""
    return nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def compiled(net, **options):
    return kt.Model(copy.deepcopy(net), backend="cpu").compile("adam", "mse", **{"lr": 0.05} | options)


def run(net, data, values, *arguments, epochs=None, initial_epoch=0, callback=None, **options):
    """A fit of which an `EarlyStopping` judges these values: `(callback, model, score)`."""
    callback = callback or EarlyStopping("score", *arguments, **options)
    model, score = compiled(net), Score(*values)
    model.fit(*data, epochs=epochs or len(values), initial_epoch=initial_epoch, callbacks=[score, callback], verbose=0)
    return callback, model, score


def judged(values, **options):
    """Numbers alone: the callback, and the epoch in which it stopped or `None`."""
    callback = EarlyStopping("x", **options)
    callback.set_model(SimpleNamespace(stop_training=False, backend=kt.backends.CPU(), module=nn.Linear(1, 1)))
    callback.on_train_begin({})
    for epoch, value in enumerate(values):
        callback.on_epoch_begin(epoch, {})
        callback.on_epoch_end(epoch, {"x": value})
        if callback.model.stop_training:
            return callback, epoch
    return callback, None


# By hand.


@pytest.mark.parametrize(
    ("values", "options", "stopped_in"),
    [
        ([3, 2, 1, 2, 3], {}, 3),
        ([3, 2, 1, 1], {}, 3),  # as good is no better
        ([3, 2, 1, 2, 3], {"patience": 1}, 3),
        ([3, 2, 1, 2, 3], {"patience": 2}, 4),
        ([3, 2, 1, 2, 0.5, 2, 1], {"patience": 2}, 6),
        ([3, 2, 1, 2, 3], {"patience": 3}, None),
        ([1, 2, 3, 2, 1], {"patience": 2, "mode": "max"}, 4),
        ([3, 2.5, 2], {"min_delta": 0.5, "patience": 2}, None),  # 2 is better than 3 by more than a half
        ([3, 2.5, 2.5], {"min_delta": 0.5, "patience": 2}, 2),
        ([3], {}, None),
        ([NAN, NAN, NAN], {"patience": 2}, 2),
        ([NAN, 3, 2, 1], {"patience": 1}, None),
        ([3, NAN, 2, NAN, NAN], {"patience": 2}, 4),
        # A baseline has to be passed within the patience. A best value does not stop, however long the wait.
        ([5, 4, 3, 4], {"patience": 2, "baseline": 1}, 3),
        ([5, 4, 0.5, 1, 1], {"patience": 2, "baseline": 1}, 4),
        ([5, 4, 0.5, 0.4, 1], {"patience": 2, "baseline": 1}, None),
        # The first epochs are not judged.
        ([0, 9, 3, 2, 3], {"start_from_epoch": 2}, 4),
        ([3, 3, 3], {"start_from_epoch": 2}, None),
        ([3, 3, 3], {"start_from_epoch": 1}, 2),
        # At once.
        ([3, 2, 1], {"stopping_threshold": 2, "patience": 9}, 2),
        ([3, 2, 1], {"stopping_threshold": 2.5, "patience": 9}, 1),
        ([1, 2, 3], {"stopping_threshold": 2, "patience": 9, "mode": "max"}, 2),
        ([0], {"stopping_threshold": 2}, 0),
        ([3, 4, 5], {"divergence_threshold": 4, "patience": 9}, 2),
        ([3, 2, 1], {"divergence_threshold": 2, "patience": 9, "mode": "max"}, 2),
        ([0, 9, 3], {"divergence_threshold": 4, "start_from_epoch": 2, "patience": 9}, None),
        ([3, NAN, 2], {"patience": 9, "check_finite": True}, 1),
        ([3, -INF, 2], {"patience": 9, "check_finite": True}, 1),
        ([3, -INF, 2], {"patience": 9}, None),
        ([NAN], {"check_finite": True}, 0),
    ],
)
def test_it_stops_in_the_epoch_that_one_computes_by_hand(values, options, stopped_in):
    callback, epoch = judged(values, **options)
    assert epoch == stopped_in
    assert callback.stopped_epoch == (stopped_in or 0)
    assert (callback.reason is None) == (stopped_in is None)


def test_what_it_remembers():
    callback, _ = judged([3, 1, 2, 2, 2], patience=3)
    assert (callback.best, callback.best_epoch, callback.stopped_epoch, callback.wait) == (1, 1, 4, 3)
    callback, _ = judged([3, 1, -INF], check_finite=True)
    assert (callback.best, callback.best_epoch, callback.stopped_epoch) == (1, 1, 2)
    callback, _ = judged([3, 1], stopping_threshold=2)
    assert (callback.best, callback.best_epoch) == (1, 1)


@pytest.mark.parametrize(
    ("values", "options", "reason"),
    [
        ([3, 1.25, 2, 2], {"patience": 2}, "x was no better than 1.25 (epoch 2) for 2 epochs."),
        ([3, 3], {}, "x was no better than 3 (epoch 1) for 1 epoch."),
        ([3, 3], {"baseline": 1}, "x was no better than baseline=1 for 2 epochs."),
        ([0.5, 3], {"baseline": 1}, "x was no better than 0.5 (epoch 1) for 1 epoch."),
        ([3, 1], {"stopping_threshold": 2}, "x is 1, better than stopping_threshold=2."),
        ([3, 5], {"divergence_threshold": 4.5}, "x is 5, worse than divergence_threshold=4.5."),
        ([3, NAN], {"check_finite": True}, "x is nan."),
    ],
)
def test_it_says_why(values, options, reason):
    assert judged(values, **options)[0].reason == reason


def test_with_several_validations_in_an_epoch_patience_counts_them():
    callback = EarlyStopping(patience=3, restore_best_weights=True)
    callback.set_model(SimpleNamespace(stop_training=False, backend=kt.backends.CPU(), module=nn.Linear(1, 1)))
    callback.on_train_begin({})
    callback.on_epoch_begin(0, {})
    for value in (3.0, 2.0, 2.0, 2.5):
        assert not callback.model.stop_training
        nn.init.constant_(callback.model.module.weight, value)
        callback.on_test_end({"loss": value})
        callback.on_interval_end(0, {"loss": 1.0, "val_loss": value})
    assert callback.wait == 2
    callback.on_epoch_end(0, {"loss": 1.0, "val_loss": 2.5})
    assert callback.wait == 2 and not callback.model.stop_training
    callback.on_epoch_begin(1, {})
    callback.on_test_end({"loss": 2.0})
    callback.on_interval_end(1, {"loss": 1.0, "val_loss": 2.0})
    assert callback.model.stop_training and (callback.best_epoch, callback.stopped_epoch) == (0, 1)
    assert callback.reason == "val_loss was no better than 2 (epoch 1) for 3 validations."
    callback.on_train_end({})
    assert callback.model.module.weight.item() == 2.0


# In a run.


def test_a_run_ends_where_its_history_says(net, diabetes):
    x, y = diabetes
    callback, model = EarlyStopping("val_loss", patience=3), compiled(net)
    history = model.fit(x[:30], y[:30], validation_data=(x[30:], y[30:]), epochs=60, callbacks=callback, verbose=0)
    losses, best, waited = history.history["val_loss"], INF, 0
    for epoch, loss in enumerate(losses):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        assert (waited == 3) == (epoch == len(losses) - 1)
    assert len(losses) < 60 and callback.best == best == min(losses)
    assert callback.best_epoch == len(losses) - 4 == losses.index(best)


def test_epochs_without_validation_do_not_wait(net, diabetes):
    callback = EarlyStopping("val_loss", patience=2, min_delta=100)
    history = compiled(net).fit(
        *diabetes, validation_data=diabetes, validation_freq=3, epochs=30, callbacks=callback, verbose=0
    )
    assert len(history.epoch) == 9 and callback.stopped_epoch == 8


def test_a_monitor_that_no_logs_will_have_is_refused_before_training(net, diabetes):
    model = compiled(net)
    with pytest.raises(
        ValueError, match="EarlyStopping monitors 'val_loss', but the logs will have loss.*validation_data"
    ):
        model.fit(*diabetes, callbacks=EarlyStopping(), verbose=0)
    assert same_weights(model.module, net)


def test_it_says_what_it_does_if_asked_to(net, diabetes, capsys):
    run(net, diabetes, (3, 1, 2, 0.5), 0.5, 2, 1, "min", None, True)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 4: early stopping. score was no better than 1 (epoch 2) for 2 epochs.",
        "Restoring model weights from the end of the best epoch: 2.",
    ]
    run(net, diabetes, (3, 1), verbose=1, restore_best_weights=True)
    assert capsys.readouterr().out == "Restoring model weights from the end of the best epoch: 2.\n"
    run(net, diabetes, (3, 4), verbose=1)
    assert capsys.readouterr().out == "Epoch 2: early stopping. score was no better than 3 (epoch 1) for 1 epoch.\n"
    run(net, diabetes, (3, 4), restore_best_weights=True)
    assert capsys.readouterr().out == ""


def test_a_run_that_goes_on_over_a_stop_is_judged_on():
    """As `fit(min_epochs=...)` does: it takes the request back."""
    callback = EarlyStopping("x", patience=2)
    callback.set_model(SimpleNamespace(stop_training=False))
    callback.on_train_begin({})
    asked = []
    for epoch, value in enumerate([3, 3, 3, 3, 1, 2, 2]):
        callback.model.stop_training = False
        callback.on_epoch_end(epoch, {"x": value})
        asked.append((callback.model.stop_training, callback.stopped_epoch))
    no = (False, 0)
    assert asked == [no, no, (True, 2), (True, 3), no, no, (True, 6)]
    assert (callback.best, callback.best_epoch, callback.wait) == (1, 4, 2)


def test_a_stop_that_is_only_put_off_keeps_its_reason():
    callback, _ = judged([3, 4, 4])
    callback.on_epoch_end(2, {"x": 1})  # the request still stands
    assert callback.stopped_epoch == 1 and callback.reason == "x was no better than 3 (epoch 1) for 1 epoch."


def test_the_same_instance_starts_anew_in_the_next_run(net, diabetes):
    callback, first, _ = run(net, diabetes, (3, 1, 2, 2, 2), patience=2, restore_best_weights=True)
    assert callback.best == 1
    _, second, score = run(net, diabetes, (5, 4, 6), callback=callback)
    assert (callback.best, callback.best_epoch, callback.stopped_epoch, callback.wait) == (4, 1, 0, 1)
    assert callback.reason is None
    assert same_weights(second.module, score.modules[1])


@pytest.mark.filterwarnings("ignore:EarlyStopping monitors 'val_loss', but the run ended without a validation")
def test_what_stopped_one_run_is_not_said_of_the_next(net, diabetes, capsys):
    callback = EarlyStopping(min_delta=100, verbose=1)
    options = {"validation_data": diabetes, "callbacks": callback, "verbose": 0}
    compiled(net).fit(*diabetes, epochs=3, **options)
    assert callback.stopped_epoch == 1 and capsys.readouterr().out.startswith("Epoch 2: early stopping.")
    compiled(net).fit(*diabetes, validation_freq=2, **options)
    assert (callback.stopped_epoch, callback.reason) == (0, None) and capsys.readouterr().out == ""


# Weights.


def test_the_best_weights_and_buffers_are_put_back_bit_for_bit(net, diabetes):
    callback, model, score = run(net, diabetes, (3, 2, 1, 2, 3), patience=2, restore_best_weights=True)
    assert len(score.modules) == 5 and same_weights(model.module, score.modules[2])
    assert not same_weights(score.modules[2], score.modules[4])
    assert model.module[1].num_batches_tracked == 3 * 5


def test_they_are_put_back_too_where_the_run_was_not_stopped(net, diabetes):
    callback, model, score = run(net, diabetes, (3, 1, 2), patience=9, restore_best_weights=True)
    assert callback.reason is None and same_weights(model.module, score.modules[1])


def test_without_being_asked_to_it_leaves_the_last_weights(net, diabetes):
    callback, model, score = run(net, diabetes, (3, 1, 2), patience=9)
    assert callback.best_weights is None and same_weights(model.module, score.modules[2])


def test_the_weights_past_a_threshold_are_the_best(net, diabetes):
    _, model, score = run(net, diabetes, (3, 2, 1, 0), patience=9, stopping_threshold=1.5, restore_best_weights=True)
    assert len(score.modules) == 3 and same_weights(model.module, score.modules[2])


def test_the_weights_of_a_value_that_is_not_finite_are_not(net, diabetes):
    options = {"check_finite": True, "restore_best_weights": True, "patience": 9}
    _, model, score = run(net, diabetes, (3, 2, -INF, 0), **options)
    assert len(score.modules) == 3 and same_weights(model.module, score.modules[1])
    callback, model, score = run(net, diabetes, (NAN, 2), **options)
    assert callback.best_weights is None and same_weights(model.module, score.modules[0])


def test_parameters_stay_the_same_objects_and_no_copy_shares_their_memory(net, diabetes):
    model, score = compiled(net), Score(3, 1, 2)
    parameters = [*model.module.parameters()]
    callback = EarlyStopping("score", patience=9, restore_best_weights=True)
    model.fit(*diabetes, epochs=3, callbacks=[score, callback], verbose=0)
    assert all(one is other for one, other in zip(parameters, model.module.parameters(), strict=True))
    kept = {value.data_ptr() for value in callback.best_weights.values()}
    assert kept.isdisjoint(value.data_ptr() for value in model.module.state_dict().values())
    before = copy.deepcopy(callback.best_weights)
    model.fit(*diabetes, verbose=0)  # trains on from there
    assert all(torch.equal(value, before[name]) for name, value in callback.best_weights.items())


def test_frozen_parts_and_those_unfrozen_meanwhile_are_put_back(net, diabetes):
    model, score = compiled(net).freeze("0"), Score(3, 1, 2, 2)
    unfreeze = kt.callbacks.Unfreeze(2, "0")
    callback = EarlyStopping("score", patience=9, restore_best_weights=True)
    model.fit(*diabetes, epochs=4, callbacks=[score, unfreeze, callback], verbose=0)
    assert same_weights(model.module, score.modules[1])
    assert not torch.equal(score.modules[3][0].weight, score.modules[1][0].weight)


class Extra(nn.Linear):
    """A module with some state that is no tensor."""

    def __init__(self):
        super().__init__(10, 1)
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += self.training
        return super().forward(x)

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, calls):
        self.calls = calls


def test_extra_state_is_put_back_too(diabetes):
    _, model, _ = run(Extra(), diabetes, (3, 1, 2), patience=9, restore_best_weights=True)
    assert model.module.calls == [10]


def test_of_a_validation_with_averages_it_is_the_averages_that_are_put_back(net, diabetes):
    class Look(kt.Callback):
        def on_test_end(self, logs=None):
            seen.append((logs["loss"], copy.deepcopy(self.model.module)))

    x, y = diabetes
    seen, callback, ema = [], EarlyStopping(patience=3, restore_best_weights=True), EMA(0.8)
    model = compiled(net)
    model.fit(x[:30], y[:30], validation_data=(x[30:], y[30:]), epochs=40, callbacks=[ema, callback, Look()], verbose=0)
    assert len(seen) < 40
    best = min(range(len(seen)), key=lambda epoch: seen[epoch][0])
    assert best == callback.best_epoch and same_weights(model.module, seen[best][1])
    assert model.evaluate(x[30:], y[30:], verbose=0) == pytest.approx(callback.best)


def test_weights_of_a_mean_of_the_training_are_those_at_the_end_of_the_epoch(net, diabetes):
    score, model = Score(*range(9)), compiled(net)
    callback = EarlyStopping("loss", patience=9, restore_best_weights=True)
    model.fit(*diabetes, validation_data=diabetes, epochs=3, callbacks=[score, callback], verbose=0)
    assert same_weights(model.module, score.modules[callback.best_epoch])


def test_weights_of_a_value_without_a_validation_of_ours_are_those_of_the_moment():
    """Another callback measured it, say."""
    module, callback = nn.Linear(1, 1), EarlyStopping(patience=9, restore_best_weights=True)
    callback.set_model(SimpleNamespace(stop_training=False, backend=kt.backends.CPU(), module=module))
    nn.init.constant_(module.weight, 9.0)
    callback.on_test_end({"loss": 0.5})  # of an evaluation outside
    callback.on_train_begin({})
    for epoch in range(3):
        nn.init.constant_(module.weight, float(epoch))
        if epoch == 1:
            callback.on_test_end({"loss": 3.0 - epoch})
        callback.on_epoch_end(epoch, {"val_loss": 3.0 - epoch})
        assert callback.best_weights["weight"].item() == epoch


def test_no_weights_are_copied_where_none_will_be_put_back(net, diabetes, monkeypatch):
    monkeypatch.setattr(EarlyStopping, "_weights", None)
    compiled(net).fit(*diabetes, validation_data=diabetes, epochs=2, callbacks=EarlyStopping(patience=9), verbose=0)


def test_weights_are_copied_once_for_each_better_value(net, diabetes, monkeypatch):
    copies, real = [], EarlyStopping._weights
    monkeypatch.setattr(EarlyStopping, "_weights", lambda self: copies.append(1) or real(self))
    for callback, values in (
        (EarlyStopping("score", patience=9, restore_best_weights=True), (3, 1, 2, 0.5, 2)),
        (EarlyStopping("val_loss", patience=9, restore_best_weights=True), range(6)),
    ):
        copies.clear()
        history = compiled(net).fit(
            *diabetes, validation_data=diabetes, epochs=5, callbacks=[Score(*values), callback], verbose=0
        )
        judged = history.history[callback.monitor]
        assert len(copies) == sum(value < min(judged[:i], default=INF) for i, value in enumerate(judged))


# States.


@pytest.mark.parametrize("cut_at", [1, 2, 3, 4])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(net, diabetes, cut_at):
    values, options = (3, 2.5, 1, 2, 1.5, 2, 9, 9), {"patience": 3, "restore_best_weights": True}
    whole, model, score = run(net, diabetes, values, **options)
    assert whole.stopped_epoch == 5

    first, half, _ = run(net, diabetes, values, epochs=cut_at, **options)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = EarlyStopping("score", **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    half = compiled(net)
    half.module.load_state_dict(score.modules[cut_at - 1].state_dict())
    again = Score(*values)
    half.fit(*diabetes, epochs=8, initial_epoch=cut_at, callbacks=[again, second], verbose=0)
    for name in ("best", "best_epoch", "stopped_epoch", "wait", "reason"):
        assert getattr(second, name) == getattr(whole, name), name
    if cut_at > 2:
        assert same_weights(half.module, score.modules[2])

    half.fit(*diabetes, epochs=1, callbacks=[Score(7), second], verbose=0)
    assert second.best == 7, "the run after it starts anew"


def test_a_state_without_weights_goes_on_with_those_of_the_moment(net, diabetes):
    first, _, _ = run(net, diabetes, (1, 2), patience=9)
    second = EarlyStopping("score", patience=9, restore_best_weights=True)
    second.load_state_dict(first.state_dict())
    _, model, score = run(net, diabetes, (0, 0, 3, 2), callback=second, initial_epoch=2)
    assert second.best == 1 and second.best_epoch == 2 and same_weights(model.module, score.modules[0])


def test_weights_in_a_state_are_put_back_only_where_that_is_asked_for(net, diabetes):
    first, _, _ = run(net, diabetes, (1, 2), patience=9, restore_best_weights=True)
    second = EarlyStopping("score", patience=9)
    second.load_state_dict(first.state_dict())
    _, model, score = run(net, diabetes, (0, 0, 3, 2), callback=second, initial_epoch=2)
    assert second.best == 1 and same_weights(model.module, score.modules[-1])


# Arguments.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patience": -1}, ValueError, "patience=-1 is less than 0. Give a whole number from 0 up."),
        ({"patience": 1.5}, TypeError, "patience=1.5 is a float, expected a whole number."),
        ({"patience": True}, TypeError, "patience=True is a bool, expected a whole number."),
        ({"patience": None}, TypeError, "patience=None is a NoneType, expected a whole number."),
        ({"start_from_epoch": -1}, ValueError, "start_from_epoch=-1 is less than 0"),
        ({"start_from_epoch": 0.5}, TypeError, "start_from_epoch=0.5 is a float"),
        ({"baseline": "0.5"}, TypeError, "baseline='0.5' is a str, expected a number. Give one such as 0.1."),
        ({"baseline": NAN}, ValueError, "baseline=nan is nothing to compare with. Give a number such as 0.1."),
        ({"baseline": False}, TypeError, "baseline=False is a bool, expected a number"),
        ({"stopping_threshold": NAN}, ValueError, "stopping_threshold=nan is nothing to compare with"),
        ({"divergence_threshold": "high"}, TypeError, "divergence_threshold='high' is a str"),
        ({"min_delta": -1}, ValueError, "min_delta=-1 is no size of a change"),
        ({"min_delta": NAN}, ValueError, "min_delta=nan is no size of a change"),
        ({"mode": "lowest"}, ValueError, "mode='lowest' is not known. Give 'min', 'max' or 'auto'"),
        ({"monitor": 3}, TypeError, "monitor=3 is a int, expected a name"),
        ({"verbose": 2}, ValueError, "verbose=2 is not known, expected 0 or 1"),
        ({"verbose": "auto"}, ValueError, "verbose='auto' is not known"),
        (
            {"stopping_threshold": 2, "divergence_threshold": 1},
            ValueError,
            "stopping_threshold=2 is no better than divergence_threshold=1 with mode='min': any value would end",
        ),
        ({"stopping_threshold": 1, "divergence_threshold": 2, "mode": "max"}, ValueError, "with mode='max'"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options, error, message):
    with pytest.raises(error) as caught:
        EarlyStopping(**options)
    assert message in str(caught.value)


def test_thresholds_on_both_sides_are_fine():
    EarlyStopping(stopping_threshold=1, divergence_threshold=2)
    EarlyStopping("accuracy", stopping_threshold=0.9, divergence_threshold=0.1)


# TerminateOnNaN.


class Spoil(kt.Callback):
    """Makes the weights NaN before a batch, and counts the batches."""

    def __init__(self, epoch, batch, value=NAN):
        self.when, self.value, self.batches, self.ends = (epoch, batch), value, [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        self.batches.append((self.epoch, batch))
        if (self.epoch, batch) == self.when:
            with torch.no_grad():
                next(self.model.module.parameters()).fill_(self.value)

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(epoch)


@pytest.fixture
def far(monkeypatch):
    """Losses are where reading them would wait for the device."""
    monkeypatch.setattr(stopping, "_is_at_hand", lambda loss: False)


lost = pytest.mark.filterwarnings("ignore:the loss of epoch")


def spoiled(net, data, spoil, callback=None, model=None, **options):
    model = model or compiled(net)
    callback = callback or TerminateOnNaN()
    model.fit(*data, **{"epochs": 4, "callbacks": [spoil, callback], "batch_size": 30, "verbose": 0} | options)
    return spoil


@lost
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("when", [(0, 0), (0, 4), (1, 2)])
def test_a_lost_loss_ends_the_run_after_its_batch(diabetes, when, value, capsys):
    spoil = spoiled(nn.Linear(10, 1), diabetes, Spoil(*when, value), validation_data=diabetes)
    assert spoil.batches[-1] == when and spoil.ends[-1] == when[0], "the epoch is concluded"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Epoch {when[0] + 1}: the loss of batch {when[1] + 1} is ")
    assert line.endswith(("nan, the run ends.", "inf, the run ends."))


def test_finite_losses_end_nothing(net, diabetes, capsys):
    spoil = spoiled(net, diabetes, Spoil(9, 9))
    assert len(spoil.batches) == 20 and capsys.readouterr().out == ""


@lost
def test_far_away_it_is_read_at_the_end_of_the_epoch(net, diabetes, far, capsys):
    spoil = spoiled(net, diabetes, Spoil(1, 2))
    assert spoil.batches[-1] == (1, 4) and spoil.ends == [0, 1]
    assert capsys.readouterr().out == "Epoch 2: the loss of batch 3 is nan, the run ends.\n"


@lost
def test_far_away_it_is_read_after_a_time(net, diabetes, far, capsys, monkeypatch):
    monkeypatch.setattr(stopping, "READ_EVERY_S", 0.0)
    spoil = spoiled(net, diabetes, Spoil(1, 2))
    assert spoil.batches[-1] == (1, 2)
    assert capsys.readouterr().out == "Epoch 2: the loss of batch 3 is nan, the run ends.\n"


@lost
@pytest.mark.parametrize(("batch", "seen_at"), [(0, 1), (1, 1), (2, 3), (3, 3), (4, 4)])
def test_far_away_it_is_read_when_the_slots_are_full(net, diabetes, far, capsys, monkeypatch, batch, seen_at):
    monkeypatch.setattr(stopping, "LOSSES_KEPT", 2)
    spoil = spoiled(net, diabetes, Spoil(1, batch))
    assert spoil.batches[-1] == (1, seen_at)
    assert capsys.readouterr().out == f"Epoch 2: the loss of batch {batch + 1} is nan, the run ends.\n"


def test_far_away_an_epoch_is_read_once(net, diabetes, far, monkeypatch):
    reads, real = [], TerminateOnNaN._read

    def read(self):
        reads.append((list(self._batches), torch.stack(self._slots[: len(self._batches)]).mean().item()))
        real(self)

    monkeypatch.setattr(TerminateOnNaN, "_read", read)
    history = compiled(net).fit(*diabetes, epochs=3, batch_size=10, callbacks=TerminateOnNaN(), verbose=0)
    assert [batches for batches, _ in reads] == [[*range(15)]] * 3
    assert [mean for _, mean in reads] == pytest.approx(history.history["loss"], rel=1e-6)


def test_far_away_no_step_reads_a_tensor(net, diabetes, far, monkeypatch):
    def refuse(*_):
        raise AssertionError("read")

    callback, model = TerminateOnNaN(), compiled(net)
    callback.set_model(model)
    callback.on_train_begin({})
    callback.on_epoch_begin(0, {})
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for batch in range(5):
        callback.on_train_batch_begin(batch, {})
        callback.on_before_backward(torch.tensor(1.0, requires_grad=True) * 2)
    with pytest.raises(AssertionError, match="read"):
        callback.on_epoch_end(0, {})


def test_a_large_loss_in_float64_is_finite_far_away_too(diabetes, far):
    x, y = (part.double() for part in diabetes)
    model = kt.Model(nn.Linear(10, 1).double(), backend="cpu").compile("sgd", "mse", lr=0.0)
    spoil = spoiled(None, (x, y + 1e60), Spoil(9, 9), model=model)
    assert len(spoil.batches) == 20


@lost
@pytest.mark.parametrize("where", ["near", "far"])
def test_it_can_raise_an_error(net, diabetes, where, request):
    if where == "far":
        request.getfixturevalue("far")
    model, spoil = compiled(net), Spoil(0, 3)
    with pytest.raises(
        RuntimeError, match="NaN or Inf loss encountered at batch 4 of epoch 1, both counted from 1. Loss"
    ):
        spoiled(net, diabetes, spoil, TerminateOnNaN(raise_error=True), model=model)
    assert spoil.ends == ([] if where == "near" else [0])


@pytest.mark.filterwarnings("ignore:x has 10 NaN")
def test_an_error_comes_before_the_weights_are_spoiled(net, diabetes):
    x, y = diabetes[0].clone(), diabetes[1].clone()
    x[70] = NAN
    model = compiled(nn.Linear(10, 1))
    before = copy.deepcopy(model.module)
    optimizer = torch.optim.Adam(before.parameters(), 0.05)
    for inputs, targets in cut(x, y, 30)[:2]:
        optimizer.zero_grad()
        mse(before(inputs), targets).backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="batch 3 of epoch 1.*Loss value: nan. Try a lower lr"):
        model.fit(x, y, batch_size=30, shuffle=False, callbacks=TerminateOnNaN(True), verbose=0)
    assert torch.allclose(model.module.weight, before.weight, atol=1e-6)


@lost
@pytest.mark.parametrize("options", [{"accumulate": 2}, {"microbatch": 7}, {"accumulate": 5, "microbatch": 30}])
@pytest.mark.parametrize("where", ["near", "far"])
def test_batches_in_windows_and_pieces_are_named_as_they_are_counted(net, diabetes, options, where, request, capsys):
    if where == "far":
        request.getfixturevalue("far")
    spoil = spoiled(nn.Linear(10, 1), diabetes, Spoil(1, 2), **options)
    assert spoil.batches[-1] == ((1, 2) if where == "near" else (1, 4))
    assert capsys.readouterr().out == "Epoch 2: the loss of batch 3 is nan, the run ends.\n"


class Pair(kt.Model):
    def train_step(self, batch):
        x, y = batch
        for name in ("first", "second"):
            self.backward(mse(self.module[name](x), y)[None] if name == "second" else mse(self.module[name](x), y))
            self.optimizer_step(name)


@pytest.mark.parametrize("where", ["near", "far"])
def test_the_losses_of_all_optimizers_count(diabetes, where, request, capsys):
    if where == "far":
        request.getfixturevalue("far")
    model = Pair(nn.ModuleDict({"first": nn.Linear(10, 1), "second": nn.Linear(10, 1)}), backend="cpu")
    model.compile({"first": "sgd", "second": "sgd"})
    spoil = Spoil(1, 2)
    spoil.on_train_batch_begin = lambda batch, logs=None: (
        spoil.batches.append((spoil.epoch, batch)),
        (spoil.epoch, batch) == (1, 2) and nn.init.constant_(model.module["second"].bias, INF),
    )
    spoiled(None, diabetes, spoil, model=model)
    assert spoil.batches[-1] == ((1, 2) if where == "near" else (1, 4))
    assert capsys.readouterr().out == "Epoch 2: the loss of batch 3 is inf, the run ends.\n"


@lost
@pytest.mark.parametrize("where", ["near", "far"])
def test_the_same_instance_serves_two_runs(net, diabetes, where, request, capsys):
    if where == "far":
        request.getfixturevalue("far")
    callback = TerminateOnNaN()
    for _ in range(2):
        spoil = spoiled(net, diabetes, Spoil(1, 2), callback)
        assert spoil.ends == [0, 1]
        assert capsys.readouterr().out == "Epoch 2: the loss of batch 3 is nan, the run ends.\n"
    assert spoiled(net, diabetes, Spoil(9, 9), callback).ends == [0, 1, 2, 3]


@pytest.mark.parametrize("where", ["near", "far"])
def test_a_run_that_goes_on_over_it_is_told_of_it_once(where, request, capsys):
    if where == "far":
        request.getfixturevalue("far")
    callback = TerminateOnNaN()
    callback.set_model(SimpleNamespace(stop_training=False))
    callback.on_train_begin({})
    for epoch in range(2):
        callback.model.stop_training = False
        callback.on_epoch_begin(epoch, {})
        for batch in range(2):
            callback.on_train_batch_begin(batch, {})
            callback.on_before_backward(torch.tensor(NAN))
        callback.on_epoch_end(epoch, {})
        assert callback.model.stop_training
    assert capsys.readouterr().out == "Epoch 1: the loss of batch 1 is nan, the run ends.\n"


def test_losses_of_an_epoch_that_was_broken_off_are_forgotten(far):
    callback = TerminateOnNaN()
    callback.set_model(SimpleNamespace(stop_training=False))
    callback.on_train_begin({})
    callback.on_epoch_begin(0, {})
    callback.on_before_backward(torch.tensor(NAN))
    callback.on_train_begin({})
    callback.on_epoch_begin(0, {})
    callback.on_epoch_end(0, {})
    assert not callback.model.stop_training
