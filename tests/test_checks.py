"""What callbacks ask of a run is refused before its first epoch where the run will not have it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import (
    EMA,
    CSVLogger,
    EarlyStopping,
    GradNorm,
    ModelCheckpoint,
    ReduceLROnPlateau,
    StochasticWeightAveraging,
)

X = torch.rand(20, 3)
Y = X.sum(1, keepdim=True)


def fit(*callbacks, **options):
    model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse", metrics=["mae"])
    before = model.module.weight.clone()
    try:
        return model.fit(X, Y, callbacks=callbacks, verbose=0, **options)
    except ValueError:
        assert model.module.weight.equal(before) and model.history is None
        raise


class Adds(kt.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["mine"] = 1.0


@pytest.mark.parametrize(
    ("callbacks", "options", "text"),
    [
        ([EarlyStopping("val_los")], {"validation_split": 0.2}, "EarlyStopping monitors 'val_los'.*mean 'val_loss'"),
        ([EarlyStopping()], {}, r"'val_loss', but the logs will have loss, mae \(val_ names need validation_data\)"),
        ([CSVLogger("x.csv"), EarlyStopping("acc")], {}, "monitors 'acc'"),
        ([ReduceLROnPlateau("loss"), EarlyStopping("rl")], {}, "the logs will have loss, mae, lr"),
        ([ModelCheckpoint("{epoch}-{val_f1:.2f}.pt")], {"validation_split": 0.2}, "named after 'val_f1'"),
        ([ModelCheckpoint("{epoch}.pt", "val_loss", save_best_only=True)], {}, "monitors 'val_loss'"),
        ([EarlyStopping("mine"), Adds()], {}, "monitors 'mine'.*put the callback that logs it first"),
        ([ModelCheckpoint("{epohc}.pt")], {}, "named after 'epohc'.*Did you mean 'epoch'"),
        ([GradNorm(), ModelCheckpoint("a.pt", "grad_norm", save_best_only=True, save_freq=5)], {}, "'grad_norm'"),
        (
            [ModelCheckpoint("{epoch}.pt", "loss", save_top_k=1), ModelCheckpoint("./{epoch}.pt", "mae", save_top_k=1)],
            {},
            "two callbacks write to '{epoch}.pt'",
        ),
    ],
)
def test_a_name_that_no_log_will_have_is_refused_with_the_nearest(tmp_path, monkeypatch, callbacks, options, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=text):
        fit(*callbacks, **options)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


@pytest.mark.parametrize(
    "callbacks",
    [
        [Adds(), EarlyStopping("mine", patience=9)],
        [GradNorm(), EarlyStopping("grad_norm", patience=9)],
        [ReduceLROnPlateau("loss"), EarlyStopping("lr", patience=9)],
        [ModelCheckpoint("{epoch}-{loss:.2f}.pt")],
    ],
)
def test_what_callbacks_before_it_put_into_the_logs_can_be_monitored(tmp_path, monkeypatch, callbacks):
    monkeypatch.chdir(tmp_path)
    assert len(fit(*callbacks, epochs=2).epoch) == 2


BEST = {"monitor": "loss", "restore_best_weights": True}


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        ([EarlyStopping(**BEST), EMA()], "EMA comes after EarlyStopping.*Give EMA first"),
        ([EarlyStopping(**BEST), StochasticWeightAveraging(0.1, 0)], "one of them would be lost"),
        ([StochasticWeightAveraging(0.1, 0), EarlyStopping(**BEST)], "one of them would be lost"),
        ([EMA(), StochasticWeightAveraging(0.1, 0)], "EMA and StochasticWeightAveraging would each leave"),
    ],
)
def test_weights_of_which_one_would_overwrite_the_other_are_refused(callbacks, text):
    with pytest.raises(ValueError, match=text):
        fit(*callbacks)


def test_the_best_average_is_restored_where_both_are_wanted():
    torch.manual_seed(0)
    stopping = EarlyStopping("val_loss", patience=1, restore_best_weights=True, min_delta=10.0)
    model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse", lr=0.1)
    history = model.fit(X, Y, epochs=5, callbacks=[EMA(0.5), stopping], validation_data=(X, Y), verbose=0)
    assert stopping.best_epoch == 0 and len(history.epoch) == 2
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(history.history["val_loss"][0], rel=1e-6)


def test_a_callback_sees_the_epoch_it_is_told_of_in_the_history():
    seen = []

    class Look(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((list(self.model.history.epoch), self.model.epochs_trained))
            logs["mine"] = epoch

    history = fit(Look(), epochs=2)
    assert seen == [([0], 1), ([0, 1], 2)]
    assert history.history["mine"] == [0, 1] and len(history.history["loss"]) == 2
