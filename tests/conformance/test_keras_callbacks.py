"""Hooks against Keras's: one recorder hears both libraries; Keras's own callbacks serve both unchanged."""

import csv

import keras
import numpy as np
import pytest
from keras_twins import BATCH, CLOSE, MARKS, STEPS, assert_same_history, mlp, regression, weights

pytestmark = MARKS

HOOKS = [
    f"on_{moment}_{end}"
    for moment in ("train", "epoch", "train_batch", "test", "test_batch", "predict", "predict_batch")
    for end in ("begin", "end")
]


class Recorder(keras.callbacks.Callback):
    """Notes each call as `(hook, number or None, logs)`."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def order(self):
        return [(hook, number, sorted(logs)) for hook, number, logs in self.calls]

    def values(self):
        """Every float that was in any logs, in order."""
        return [logs[name] for _, _, logs in self.calls for name in sorted(logs) if isinstance(logs[name], float)]


def _noting(hook):
    def note(self, *arguments, logs=None):
        *number, logs = arguments if logs is None else (*arguments, logs)
        self.calls.append((hook, *(number or [None]), dict(logs)))

    return note


for _hook in HOOKS:
    setattr(Recorder, _hook, _noting(_hook))


class BatchRecorder(keras.callbacks.Callback):
    """Hears Keras's older names of the hooks of a training batch."""

    def __init__(self):
        super().__init__()
        self.calls = []

    on_batch_begin, on_batch_end = _noting("on_batch_begin"), _noting("on_batch_end")
    order, values = Recorder.order, Recorder.values


def _recorded(pair, verb, *arguments, recorder=Recorder, **options):
    """Calls a verb of both with a recorder each, compares what they heard and returns the order of it."""
    recorders = recorder(), recorder()
    for model, one in zip((pair.keras, pair.torch), recorders, strict=True):
        given = [one, *(make() for make in options.get("callbacks", ()))]
        getattr(model, verb)(*arguments, **options | {"callbacks": given, "verbose": 0})
    theirs, ours = recorders
    assert ours.order() == theirs.order()
    assert ours.values() == pytest.approx(theirs.values(), nan_ok=True, **CLOSE)
    return ours.order()


FIT = {"batch_size": BATCH, "shuffle": False}


# Order, arguments and logs.


def test_fit_calls_the_hooks_of_keras_in_its_order():
    calls = _recorded(mlp().compile("mse", metrics=["mae"]), "fit", *regression(), epochs=2, **FIT)
    assert calls[:4] == [
        ("on_train_begin", None, []),
        ("on_epoch_begin", 0, []),
        ("on_train_batch_begin", 0, []),
        ("on_train_batch_end", 0, ["loss", "mae"]),
    ]
    assert calls[-2:] == [("on_epoch_end", 1, ["loss", "mae"]), ("on_train_end", None, ["loss", "mae"])]
    assert len(calls) == 2 + 2 * (2 + 2 * STEPS)


@pytest.mark.parametrize("freq", [1, 2, [1, 3]])
def test_validation_calls_the_test_hooks_between_the_last_batch_and_the_end_of_the_epoch(freq):
    options = {"validation_data": regression(1), "validation_freq": freq, "epochs": 3} | FIT
    calls = _recorded(mlp().compile("mse", metrics=["mae"]), "fit", *regression(), **options)
    begin = calls.index(("on_test_begin", None, []))
    assert calls[begin - 1][0] == "on_train_batch_end"
    end = calls.index(("on_test_end", None, ["loss", "mae"]))  # no `val_` here
    assert calls[end + 1] == ("on_epoch_end", calls[end + 1][1], ["loss", "mae", "val_loss", "val_mae"])


@pytest.mark.parametrize(
    "options",
    [
        {"initial_epoch": 2, "epochs": 4},
        {"initial_epoch": 2, "epochs": 2},
        {"validation_split": 0.3, "validation_steps": 1},
        {"validation_split": 0.3, "validation_batch_size": 5},
        {"sample_weight": weights(), "validation_split": 0.3},
    ],
    ids=lambda options: ", ".join(options),
)
def test_arguments_of_fit_move_the_hooks_as_in_keras(options):
    _recorded(mlp().compile("mse", metrics=["mae"]), "fit", *regression(), **options | FIT)


def test_steps_of_a_generator_are_counted_from_0_in_each_epoch():
    x, y = regression()
    pair = mlp().compile("mse")
    recorders = Recorder(), Recorder()
    for model, recorder in zip((pair.keras, pair.torch), recorders, strict=True):
        batches = ((x[:BATCH], y[:BATCH]) for _ in range(6))
        model.fit(batches, epochs=2, steps_per_epoch=3, callbacks=[recorder], verbose=0)
    assert recorders[1].order() == recorders[0].order()


def test_evaluate_calls_the_hooks_of_keras_in_its_order():
    pair = mlp().compile("mse", metrics=["mae"])
    calls = _recorded(pair, "evaluate", *regression(), batch_size=BATCH)
    assert len(calls) == 2 + 2 * STEPS
    _recorded(pair, "evaluate", *regression(), batch_size=BATCH, steps=2)


def test_predict_calls_the_hooks_of_keras_in_its_order():
    calls = _recorded(mlp(), "predict", regression()[0], batch_size=BATCH)
    assert calls[:3] == [
        ("on_predict_begin", None, []),
        ("on_predict_batch_begin", 0, []),
        ("on_predict_batch_end", 0, ["outputs"]),
    ]
    assert len(calls) == 2 + 2 * STEPS


def test_batches_that_somebody_hears_of_are_those_of_keras_without_a_batch_size_too():
    pair = mlp().compile("mse")
    _recorded(pair, "fit", *regression(), validation_data=regression(1), shuffle=False)
    _recorded(pair, "evaluate", *regression())
    _recorded(pair, "predict", regression()[0])


def test_batch_hooks_are_called_by_their_older_names_too():
    calls = _recorded(mlp().compile("mse"), "fit", *regression(), recorder=BatchRecorder, epochs=2, **FIT)
    assert len(calls) == 4 * STEPS


def test_several_callbacks_are_called_in_the_order_given():
    pair = mlp().compile("mse")
    heard = []
    for model in (pair.keras, pair.torch):
        names = []
        callbacks = [
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs, name=name, to=names: to.append(name))
            for name in "abc"
        ]
        model.fit(*regression(), epochs=2, callbacks=callbacks, verbose=0)
        heard.append(names)
    assert heard == [list("abcabc")] * 2


def test_one_callback_serves_two_fits():
    pair = mlp().compile("mse")
    recorders = Recorder(), Recorder()
    for model, recorder in zip((pair.keras, pair.torch), recorders, strict=True):
        for _ in range(2):
            model.fit(*regression(), epochs=2, callbacks=[recorder], verbose=0, **FIT)
    assert recorders[1].order() == recorders[0].order()
    assert recorders[1].values() == pytest.approx(recorders[0].values(), **CLOSE)


def test_what_a_callback_puts_into_the_logs_of_an_epoch_is_heard_by_the_next_and_gets_into_the_history():
    class Adds(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["epoch_squared"] = float(epoch**2)

    pair = mlp().compile("mse")
    histories = []
    for model in (pair.keras, pair.torch):
        recorder = Recorder()
        histories.append(model.fit(*regression(), epochs=3, callbacks=[Adds(), recorder], verbose=0, **FIT))
        hook, _, logs = recorder.calls[-2]
        assert hook == "on_epoch_end" and logs["epoch_squared"] == 4.0
    assert_same_history(*histories)


def test_callbacks_know_the_model_and_the_params_of_keras():
    pair = mlp().compile("mse")
    params = []
    for model in (pair.keras, pair.torch):
        seen = Recorder()
        model.fit(*regression(), epochs=3, callbacks=[seen], verbose=0, **FIT)
        assert seen.model is model
        params.append(dict(seen.params))
        model.evaluate(*regression(), callbacks=[seen], verbose=0, batch_size=BATCH)
        params.append(dict(seen.params))
    assert params[:2] == params[2:]


# Stopping.


class StopAt(keras.callbacks.Callback):
    """Asks for the end at the `count`-th call of a hook."""

    def __init__(self, hook, count):
        super().__init__()
        self.count = count
        setattr(self, hook, self._hear)

    def _hear(self, *_, **__):
        self.count -= 1
        if self.count == 0:
            self.model.stop_training = True


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_begin",
        "on_epoch_begin",
        "on_train_batch_begin",
        "on_train_batch_end",
        "on_test_begin",
        "on_test_batch_end",
        "on_test_end",
        "on_epoch_end",
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_ends_the_run_where_keras_ends_it(hook, count):
    calls = _recorded(
        mlp().compile("mse", metrics=["mae"]),
        "fit",
        *regression(),
        validation_data=regression(1),
        epochs=4,
        callbacks=[lambda: StopAt(hook, count)],
        **FIT,
    )
    assert calls[-1][0] == "on_train_end"


def test_a_run_that_was_stopped_can_be_followed_by_another():
    pair = mlp().compile("mse")
    options = {"epochs": 3, "verbose": 0} | FIT
    for model in (pair.keras, pair.torch):
        model.fit(*regression(), callbacks=[StopAt("on_train_batch_end", 2)], **options)
    pair.assert_same_fit(*regression(), epochs=3)


# Keras's own callbacks, unchanged.


def _fit_with(make, *data, lr=0.05, **options):
    """Fits twins, each with a callback of its own, and returns `(twins, callbacks, histories)`."""
    pair, callbacks = mlp().compile("mse", metrics=["mae"], lr=lr), (make(), make())
    histories = [
        model.fit(*data, callbacks=[callback], **{"verbose": 0} | FIT | options)
        for model, callback in zip((pair.keras, pair.torch), callbacks, strict=True)
    ]
    assert_same_history(*histories)
    return pair, callbacks, histories


@pytest.mark.parametrize("restore_best_weights", [False, True])
@pytest.mark.parametrize("monitor", ["val_loss", "val_mae"])
def test_keras_early_stopping_stops_and_restores_as_in_keras(monitor, restore_best_weights):
    def stopping():
        return keras.callbacks.EarlyStopping(monitor, mode="min", patience=2, restore_best_weights=restore_best_weights)

    x, y = regression()
    pair, (theirs, ours), _ = _fit_with(stopping, x, y, validation_data=(x, -y), epochs=20, lr=0.02)
    assert 0 < ours.stopped_epoch == theirs.stopped_epoch < 19
    assert ours.best == pytest.approx(theirs.best, **CLOSE)
    pair.assert_same_weights()


def test_keras_early_stopping_with_all_its_options():
    def stopping():
        return keras.callbacks.EarlyStopping("loss", min_delta=0.2, patience=1, baseline=0.9, start_from_epoch=2)

    _, (theirs, ours), histories = _fit_with(stopping, *regression(), epochs=20)
    assert ours.stopped_epoch == theirs.stopped_epoch < 19
    assert len(histories[1].epoch) == ours.stopped_epoch + 1


@pytest.mark.filterwarnings("ignore:y has 1 NaN")
def test_keras_terminate_on_nan_ends_after_the_batch():
    x, y = regression()
    y[BATCH] = np.nan
    pair = mlp().compile("mse")
    calls = _recorded(pair, "fit", x, y, epochs=2, callbacks=[keras.callbacks.TerminateOnNaN], **FIT)[-4:]
    assert [call[:2] for call in calls] == [
        ("on_train_batch_begin", 1),
        ("on_train_batch_end", 1),
        ("on_epoch_end", 0),
        ("on_train_end", None),
    ]


def test_keras_csv_logger_writes_the_same_file(tmp_path):
    paths = iter([tmp_path / "theirs.csv", tmp_path / "ours.csv"])
    _fit_with(lambda: keras.callbacks.CSVLogger(str(next(paths))), *regression(), epochs=3, validation_split=0.2)
    theirs, ours = (list(csv.reader((tmp_path / name).open())) for name in ("theirs.csv", "ours.csv"))
    assert ours[0] == theirs[0] == ["epoch", "loss", "mae", "val_loss", "val_mae"]
    assert np.array(ours[1:], float) == pytest.approx(np.array(theirs[1:], float), **CLOSE)


def test_keras_lambda_callback_hears_the_same():
    heard = [], []
    notes = iter(heard)

    def make():
        note = next(notes).append
        return keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: note("begin"),
            on_epoch_end=lambda epoch, logs: note((epoch, sorted(logs))),
            on_train_batch_end=lambda batch, logs: note((batch, sorted(logs))),
        )

    _fit_with(make, *regression(), epochs=2)
    assert heard[0] == heard[1]


def test_keras_history_records_what_fit_returns():
    _, (theirs, ours), histories = _fit_with(keras.callbacks.History, *regression(), epochs=3, validation_split=0.2)
    assert_same_history(theirs, ours)
    assert ours.history == histories[1].history
    assert ours.epoch == histories[1].epoch


def test_keras_history_does_not_take_the_place_of_ours():
    pair = mlp().compile("mse")
    history = pair.torch.fit(*regression(), callbacks=[keras.callbacks.History()], verbose=0)
    assert pair.torch.history is history
