"""EarlyStopping, ReduceLROnPlateau, LearningRateScheduler, TerminateOnNaN and LambdaCallback against Keras's own.

Both get the same numbers: thousands of random sequences with random options, and real runs of twins. The numbers are
multiples of an eighth, which are exact in Keras's float32 too.
"""

import inspect
import math
import random
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import torch
from keras_twins import BATCH, CLOSE, MARKS, assert_same_history, mlp, regression
from torch import nn

import kerastorch as kt

pytestmark = MARKS

OPTIONS = {"batch_size": BATCH, "shuffle": False, "verbose": 0}


# Numbers alone.


class Peer:
    """What Keras's callbacks ask a model for; its weights are the number of the epoch."""

    def __init__(self, rates=(0.5,)):
        self.stop_training, self.weights, self.metrics = False, [], []
        optimizers = [SimpleNamespace(name=f"o{i}", learning_rate=rate) for i, rate in enumerate(rates)]
        self.optimizer = optimizers[0] if len(rates) == 1 else SimpleNamespace(optimizers=optimizers)
        self.optimizers = optimizers

    def get_weights(self):
        return list(self.weights)

    def set_weights(self, weights):
        self.weights = list(weights)


class Ours:
    """The same of kerastorch's."""

    def __init__(self, rates=(0.5,)):
        self.stop_training, self.module, self.backend = False, nn.Linear(1, 1), kt.backends.CPU()
        names = [""] if len(rates) == 1 else [f"o{i}" for i in range(len(rates))]
        self.updates = {
            name: SimpleNamespace(
                optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate),
                schedule=None,
                rate_name=f"{name}_lr" if name else "lr",
            )
            for name, rate in zip(names, rates, strict=True)
        }


def play(callback, model, values, name):
    """A run of these values, one for each epoch, until it is stopped; yields the epochs that were finished."""
    callback.set_model(model)
    callback.on_train_begin({})
    model.stop_training = False
    for epoch, value in enumerate(values):
        callback.on_epoch_begin(epoch, {})
        if isinstance(model, Ours):
            nn.init.constant_(model.module.weight, float(epoch))
        else:
            model.weights = [np.full((1, 1), float(epoch))]
        callback.on_epoch_end(epoch, {"loss": 1.0} | ({} if value is None else {name: value}))
        yield epoch
        if model.stop_training:
            break
    callback.on_train_end({})


def sequences(number, mode, seed):
    """Random walks with plateaus, jumps, ties, and now and then NaN, infinity or no validation."""
    dice = random.Random(seed)
    for _ in range(number):
        value, values = dice.randint(-8, 24) / 8, []
        drift = dice.choice((-2, -1, 0, 0, 1)) * (1 if mode == "min" else -1)
        strange = dice.choice((None, None, None, math.nan, math.inf, -math.inf, "none"))
        for epoch in range(dice.randint(1, 14)):
            value += dice.choice((drift, drift, 0, dice.randint(-4, 4))) / 8
            is_strange = strange is not None and dice.random() < 0.15
            if strange is math.nan and epoch < 4:  # as the first that is judged it stays the best in Keras, see below
                is_strange = False
            values.append((None if strange == "none" else strange) if is_strange else value)
        yield values


def stopping_options(seed):
    dice = random.Random(seed)
    return {
        "patience": dice.choice((0, 0, 1, 2, 3, 5)),
        "min_delta": dice.choice((0, 0, 0.125, 0.25, 1)),
        "mode": dice.choice(("min", "max")),
        "baseline": dice.choice((None, None, 0.5, 1.0, 2.0, -1.0)),
        "restore_best_weights": dice.choice((False, True)),
        "start_from_epoch": dice.choice((0, 0, 0, 1, 3)),
    }


@pytest.mark.filterwarnings("ignore:Early stopping conditioned on metric", "ignore:EarlyStopping monitors 'val_x'")
def test_early_stopping_stops_waits_and_restores_as_keras_on_thousands_of_sequences(capsys):
    stopped = restored = 0
    for seed in range(500):
        options = stopping_options(seed)
        theirs = keras.callbacks.EarlyStopping("val_x", verbose=1, **options)
        ours = kt.callbacks.EarlyStopping("val_x", verbose=1, **options)
        for values in sequences(8, options["mode"], seed):  # one instance for several runs
            peer, own = Peer(), Ours()
            capsys.readouterr()
            their_epochs = [*play(theirs, peer, values, "val_x")]
            their_text = capsys.readouterr().out.splitlines()
            our_epochs = [*play(ours, own, values, "val_x")]
            our_text = capsys.readouterr().out.splitlines()
            case = options, values
            assert our_epochs == their_epochs, case
            assert own.stop_training == peer.stop_training, case
            assert ours.stopped_epoch == theirs.stopped_epoch, case
            assert ours.wait == theirs.wait, case
            assert ours.best_epoch == theirs.best_epoch, case
            assert str(ours.best) == str(theirs.best), case  # NaN too
            assert own.module.weight.item() == peer.weights[0].item(), case
            assert [line.partition(". ")[0].rstrip(".") for line in our_text] == [x.rstrip(".") for x in their_text], (
                case
            )
            stopped += own.stop_training
            restored += len(our_epochs) - 1 != own.module.weight.item()
    assert stopped > 1000 and restored > 300


@pytest.mark.filterwarnings(
    "ignore:Learning rate reduction is conditioned", "ignore:ReduceLROnPlateau monitors 'val_x'"
)
def test_reduce_lr_on_plateau_reduces_as_keras_on_thousands_of_sequences():
    reduced = 0
    for seed in range(500):
        dice = random.Random(seed)
        options = {
            "patience": dice.choice((0, 1, 2, 3)),
            "factor": dice.choice((0.5, 0.1, 0.25, 0)),
            "min_delta": dice.choice((0, 0.125, 0.25)),
            "mode": dice.choice(("min", "max")),
            "cooldown": dice.choice((0, 0, 1, 3)),
            "min_lr": dice.choice((0, 0.125, 0.0625, 1.0)),
        }
        theirs = keras.callbacks.ReduceLROnPlateau("val_x", **options)
        ours = kt.callbacks.ReduceLROnPlateau("val_x", **options)
        for values in sequences(4, options["mode"], seed):
            rates = dice.choice(((0.5,), (0.25,), (0.5, 0.125)))
            peer, own = Peer(rates), Ours(rates)
            for _ in zip(play(theirs, peer, values, "val_x"), play(ours, own, values, "val_x"), strict=True):
                case = options, values
                their_rates = [optimizer.learning_rate for optimizer in peer.optimizers]
                assert [update.optimizer.param_groups[0]["lr"] for update in own.updates.values()] == their_rates, case
                assert (ours.wait, ours.cooldown_counter) == (theirs.wait, theirs.cooldown_counter), case
                assert str(ours.best) == str(theirs.best), case
            reduced += tuple(their_rates) != rates
    assert reduced > 500


@pytest.mark.parametrize("kind", ["EarlyStopping", "ReduceLROnPlateau"])
def test_a_first_value_that_is_nan_stays_the_best_for_ever_in_keras_alone(kind):
    values, best = [math.nan, 0.5, 0.25, 0.125], {}
    for library, model in ((keras, Peer()), (kt, Ours())):
        callback = getattr(library.callbacks, kind)("val_x", mode="min", patience=9)
        list(play(callback, model, values, "val_x"))
        best[library] = callback.best
    assert math.isnan(best[keras]) and best[kt] == 0.125


def test_the_signatures_are_those_of_keras_and_more():
    for name in ("EarlyStopping", "ReduceLROnPlateau", "LearningRateScheduler", "TerminateOnNaN", "LambdaCallback"):
        theirs, ours = (
            list(inspect.signature(getattr(library.callbacks, name)).parameters.values()) for library in (keras, kt)
        )
        theirs = [one for one in theirs if one.kind != one.VAR_KEYWORD]
        assert [(one.name, one.default) for one in ours[: len(theirs)]] == [(one.name, one.default) for one in theirs]
        assert all(one.kind in (one.KEYWORD_ONLY, one.VAR_KEYWORD) for one in ours[len(theirs) :])


def test_the_direction_of_every_metric_of_keras_shows_in_its_name():
    made = 0
    for name, kind in vars(keras.metrics).items():
        if not inspect.isclass(kind):
            continue
        metric = next(filter(None, (_made(kind, *given) for given in ((), (0.5,), (2,), (2, [0])))), None)
        direction = getattr(metric, "_direction", None)
        if (
            direction is None or name == "CosineSimilarity"
        ):  # kerastorch's of this name is the loss, the lower the better
            continue
        made += 1
        mode = kt.callbacks.EarlyStopping(f"val_{metric.name}").mode
        assert mode == {"up": "max", "down": "min"}[direction], metric.name
    assert made > 30


def _made(kind, *arguments):
    try:
        return kind(*arguments)
    except (TypeError, ValueError):
        return None


@pytest.mark.parametrize(
    "schedule",
    [
        lambda epoch, lr: lr * 0.5,
        lambda epoch, lr: 0.1 / (epoch + 1),
        lambda epoch: 0.1 * 0.9**epoch,
        lambda epoch, lr=7.0: lr + 0.25 * epoch,
        lambda *arguments: 0.5 / len(arguments),
    ],
)
@pytest.mark.parametrize("rates", [(0.5,), (0.5, 0.125)])
def test_learning_rate_scheduler_sets_the_rates_of_keras(schedule, rates):
    peer, own = Peer(rates), Ours(rates)
    theirs, ours = keras.callbacks.LearningRateScheduler(schedule), kt.callbacks.LearningRateScheduler(schedule)
    for _ in zip(play(theirs, peer, range(6), "x"), play(ours, own, range(6), "x"), strict=True):
        their_rates = [optimizer.learning_rate for optimizer in peer.optimizers]
        assert [update.optimizer.param_groups[0]["lr"] for update in own.updates.values()] == their_rates


# Real runs.


def _fit_with(make, *data, lr=0.05, **options):
    """Fits twins, each with its own library's callback: `(twins, (theirs, ours), histories)`."""
    pair, callbacks = mlp().compile("mse", metrics=["mae"], lr=lr), (make(keras.callbacks), make(kt.callbacks))
    histories = [
        model.fit(*data, callbacks=[callback], **OPTIONS | options)
        for model, callback in zip((pair.keras, pair.torch), callbacks, strict=True)
    ]
    return pair, callbacks, histories


@pytest.mark.parametrize("restore_best_weights", [False, True])
@pytest.mark.parametrize("monitor", ["val_loss", "val_mae"])
def test_early_stopping_in_a_run(monitor, restore_best_weights):
    x, y = regression()
    options = {"mode": "min", "patience": 2, "restore_best_weights": restore_best_weights}
    pair, (theirs, ours), histories = _fit_with(
        lambda library: library.EarlyStopping(monitor, **options), x, y, validation_data=(x, -y), epochs=20, lr=0.02
    )
    assert_same_history(*histories)
    assert 0 < ours.stopped_epoch == theirs.stopped_epoch < 19
    assert ours.best_epoch == theirs.best_epoch and ours.best == pytest.approx(theirs.best, **CLOSE)
    pair.assert_same_weights()


def test_early_stopping_that_never_stops_restores_too():
    x, y = regression()
    pair, (theirs, ours), _ = _fit_with(
        lambda library: library.EarlyStopping("val_loss", patience=99, restore_best_weights=True),
        *(x, y),
        validation_data=(x, -y),
        epochs=6,
        lr=0.02,
    )
    assert ours.stopped_epoch == theirs.stopped_epoch == 0 and ours.best_epoch == theirs.best_epoch < 5
    pair.assert_same_weights()


def test_reduce_lr_on_plateau_in_a_run():
    x, y = regression()
    pair, _, (theirs, ours) = _fit_with(
        lambda library: library.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, cooldown=1),
        *(x, y),
        validation_data=(x, -y),
        epochs=9,
    )
    assert ours.history["lr"] == pytest.approx(theirs.history["learning_rate"], **CLOSE)
    assert len(set(ours.history["lr"])) > 3
    assert ours.history["val_loss"] == pytest.approx(theirs.history["val_loss"], **CLOSE)
    pair.assert_same_weights()


def test_learning_rate_scheduler_in_a_run():
    pair, _, (theirs, ours) = _fit_with(
        lambda library: library.LearningRateScheduler(lambda epoch, lr: lr * 0.7 if epoch > 1 else lr),
        *regression(),
        epochs=5,
    )
    assert ours.history["lr"] == pytest.approx(theirs.history["learning_rate"], **CLOSE)
    assert ours.history["loss"] == pytest.approx(theirs.history["loss"], **CLOSE)
    pair.assert_same_weights()


@pytest.mark.filterwarnings("ignore:y has 1 NaN", "ignore:the loss of epoch 2 is")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_terminate_on_nan_ends_after_the_same_batch(bad):
    x, y = regression()
    heard = []
    pair = mlp().compile("mse")
    for library, model in ((keras, pair.keras), (kt, pair.torch)):
        targets, calls = y.copy(), []

        class Note(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None, calls=calls):
                calls.append(batch)

            def on_epoch_begin(self, epoch, logs=None, targets=targets, model=model):
                if epoch == 1:
                    model.set_weights([np.where(array == array.flat[0], bad, array) for array in model.get_weights()])

        history = model.fit(x, targets, epochs=3, callbacks=[library.callbacks.TerminateOnNaN(), Note()], **OPTIONS)
        heard.append((calls, history.epoch))
    assert heard[0] == heard[1] == ([0, 1, 2, 3, 4, 0], [0, 1])


@pytest.mark.filterwarnings("ignore:y has 1 NaN")
def test_terminate_on_nan_raises_the_same_kind_of_error():
    x, y = regression()
    y[BATCH] = math.nan
    pair = mlp().compile("mse")
    for library, model, batch in ((keras, pair.keras, 1), (kt, pair.torch, 2)):
        with pytest.raises(RuntimeError, match=f"NaN or Inf loss encountered at batch {batch}.*Loss value: nan"):
            model.fit(x, y, callbacks=[library.callbacks.TerminateOnNaN(raise_error=True)], **OPTIONS)


def test_lambda_callback_hears_the_same():
    heard = {}

    def make(library):
        note = heard.setdefault(library, []).append
        return library.LambdaCallback(
            lambda epoch, logs: note(("epoch begin", epoch, sorted(logs))),
            lambda epoch, logs: note(("epoch end", epoch, sorted(logs))),
            lambda logs: note(("begin", sorted(logs))),
            lambda logs: note(("end", sorted(logs))),
            lambda batch, logs: note(("batch begin", batch, sorted(logs))),
            lambda batch, logs: note(("batch end", batch, sorted(logs))),
            on_test_end=lambda logs: note(("test end", sorted(logs))),
            on_test_batch_begin=lambda batch, logs: note(("test batch begin", batch)),
        )

    _fit_with(make, *regression(), epochs=2, validation_split=0.2)
    theirs, ours = heard.values()
    assert ours == theirs and len(ours) > 20
