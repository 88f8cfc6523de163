"""ModelCheckpoint against Keras's and Lightning's: the same values, and which files are there after each epoch."""

import math
import os
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch import checkpoint

pytestmark = pytest.mark.conformance

BATCHES = 5
FALLING, MIXED = [0.9, 0.7, 0.6, 0.5], [0.5, 0.7, 0.3, 0.3, 0.6, 0.2]
X, Y = torch.rand(4 * BATCHES, 3), torch.zeros(4 * BATCHES, 1)


class Column(kt.Callback):
    def __init__(self, values):
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = self.values[epoch]


class Look(kt.Callback):
    """What is in the folder after each epoch, when all is saved: names without their ending, and what is in them."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_epoch_end(self, epoch, logs=None):
        self.model.at_safe_point(lambda: self.seen.append(contents(self.folder)))


def contents(folder):
    return {name.rpartition(".")[0]: (folder / name).read_text() for name in sorted(os.listdir(folder))}


# Keras.


class Written:
    """A model whose files have the number of steps that were taken in them."""

    def __init__(self):
        self.steps_taken = 0

    def save(self, path, overwrite=True):
        with open(path, "w") as file:
            file.write(str(self.steps_taken))

    save_weights = save


def files_of_keras(folder, name, runs, **options):
    """The same calls that Keras's `fit` makes."""
    import keras

    callback = keras.callbacks.ModelCheckpoint(str(folder / f"{name}.keras"), **options)
    seen = []
    for values in runs:
        model = Written()
        callback.set_model(model)
        for epoch, value in enumerate(values):
            callback.on_epoch_begin(epoch)
            for batch in range(BATCHES):
                model.steps_taken += 1
                callback.on_train_batch_end(batch, {"loss": 1 / (1 + model.steps_taken)})
            callback.on_epoch_end(epoch, {"loss": 1 / (1 + model.steps_taken), "val_loss": value})
            seen.append(contents(folder))
    return seen, callback.best


class Steps(kt.Model):
    """Its files have the number of steps in them, its loss is what that number says."""

    def save(self, path):
        path.unlink(missing_ok=True)  # as files are replaced, and not written over: `last` may be another name of one
        path.write_text(str(self.steps_taken))

    def train_step(self, batch):
        super().train_step(batch)
        self._running.tracker.reset()
        self.log("loss", 1 / (1 + self.steps_taken))


def files_of_ours(folder, name, runs, **options):
    callback, look = kt.callbacks.ModelCheckpoint(folder / f"{name}.pt", **options), Look(folder)
    for values in runs:
        model = Steps(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
        model.fit(X, Y, batch_size=4, epochs=len(values), callbacks=[Column(values), callback, look], verbose=0)
    return look.seen, callback.best


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "runs", "options"),
    [
        ("{epoch:02d}-{val_loss:.2f}", [MIXED], {}),
        ("{epoch}", [MIXED], {"save_best_only": True}),
        ("best", [MIXED], {"save_best_only": True}),
        ("{epoch}-{val_loss:.1f}", [MIXED], {"save_best_only": True, "mode": "max"}),
        ("{epoch}", [MIXED], {"save_best_only": True, "initial_value_threshold": 0.4}),
        ("{epoch}", [[0.5, math.nan, 0.4]], {"save_best_only": True}),
        ("{val_loss:.2f}", [FALLING, MIXED], {"save_best_only": True}),
        ("{epoch}-{batch}", [MIXED], {"save_freq": 3}),
        ("{epoch}-{batch}", [FALLING, MIXED], {"save_freq": 7}),
        ("{epoch}-{batch}", [FALLING], {"save_freq": 1}),
        ("{epoch}-{batch}-{loss:.3f}", [MIXED], {"save_freq": 4, "save_best_only": True, "monitor": "loss"}),
        ("{epoch}-{batch}", [MIXED], {"save_freq": 4, "save_best_only": True, "monitor": "loss", "mode": "max"}),
    ],
    ids=str,
)
def test_the_files_are_those_of_keras(tmp_path, name, runs, options):
    pytest.importorskip("keras")
    folders = tmp_path / "theirs", tmp_path / "ours"
    for folder in folders:
        folder.mkdir()
    theirs, best = files_of_keras(folders[0], name, runs, **options)
    ours, our_best = files_of_ours(folders[1], name, runs, **options)
    assert ours == theirs and theirs[-1]
    if options.get("save_best_only"):
        assert our_best == pytest.approx(best)


def test_where_keras_saves_what_it_cannot_judge_nothing_is_saved_here(tmp_path):
    pytest.importorskip("keras")
    (tmp_path / "theirs").mkdir()
    options = {"monitor": "val_mae", "mode": "min", "save_best_only": True}
    with pytest.warns(UserWarning, match="Can save best model only with val_mae available"):
        theirs, _ = files_of_keras(tmp_path / "theirs", "{epoch}", [FALLING], **options)
    assert list(theirs[-1]) == list("1234")
    callback = kt.callbacks.ModelCheckpoint(tmp_path / "ours" / "{epoch}.pt", **options)
    model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse", metrics=["mae"])
    history = model.fit(X, Y, validation_data=(X, Y), validation_freq=2, epochs=4, callbacks=callback, verbose=0)
    second, fourth = history.history["val_mae"]
    assert fourth < second and sorted(os.listdir(tmp_path / "ours")) == ["2.pt", "4.pt"]


# Lightning.


def files_of_lightning(folder, values, **options):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch):
            x, y = batch
            return nn.functional.mse_loss(self.layer(x), y)

        def on_train_epoch_end(self):
            self.log("val_loss", values[self.current_epoch])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class LookBetween(lightning.Callback):
        """A checkpoint callback is called last, so: before the next epoch, and after the run."""

        def __init__(self):
            self.seen = []

        def look(self, trainer, module):
            self.seen.append({name.rpartition(".")[0]: step_in(folder / name) for name in sorted(os.listdir(folder))})

        on_train_epoch_start = on_fit_end = look

    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "{step}", monitor="val_loss", auto_insert_metric_name=False, **options
    )
    look = LookBetween()
    trainer = lightning.Trainer(
        max_epochs=len(values),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[look, saving],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module(), DataLoader(TensorDataset(X, Y), 4))
    return look.seen[1:], saving


def step_in(path):
    return str(torch.load(path, weights_only=False)["global_step"])


SCORES = {
    "falling": FALLING,
    "rising": FALLING[::-1],
    "mixed": MIXED,
    "equal": [0.5, 0.5, 0.5, 0.4, 0.4, 0.6],
    "nan": [math.nan, 0.5, math.nan, 0.7, 0.3],
}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("count", [1, 2, 3, -1])
@pytest.mark.parametrize("values", SCORES)
def test_the_k_best_are_those_of_lightning(tmp_path, values, count, mode):
    folders = tmp_path / "theirs", tmp_path / "ours"
    for folder in folders:
        folder.mkdir()
    options = {"save_top_k": count, "mode": mode, "save_last": True}
    theirs, saving = files_of_lightning(folders[0], SCORES[values], **options)
    callback, look = kt.callbacks.ModelCheckpoint(folders[1] / "{step}.pt", **options), Look(folders[1])
    model = Steps(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
    fed = [Column(SCORES[values]), callback, look]
    model.fit(X, Y, batch_size=4, epochs=len(SCORES[values]), callbacks=fed, verbose=0)

    for epoch, (ours, lightnings) in enumerate(zip(look.seen, theirs, strict=True)):
        # Theirs is the newest of those that were among the best, ours the newest.
        assert lightnings.pop("last") in {str(BATCHES * (one + 1)) for one in range(epoch + 1)}
        assert ours.pop("last") == str(BATCHES * (epoch + 1))
        assert ours == lightnings
    assert os.path.basename(callback.best_model_path) == os.path.basename(saving.best_model_path).replace("ckpt", "pt")
    assert callback.best_model_score == pytest.approx(float(saving.best_model_score))
    assert os.path.basename(callback.last_model_path) == "last.pt"


def test_a_file_of_lightning_is_known_as_such(tmp_path):
    _, saving = files_of_lightning(tmp_path, FALLING)
    with pytest.raises(ValueError, match="is a checkpoint of Lightning. Its names begin with the attribute"):
        checkpoint.read(saving.best_model_path)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_file_of_keras_is_known_as_such(tmp_path):
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.save(tmp_path / "a.keras")
    model.save_weights(tmp_path / "a.weights.h5")
    for name in ("a.keras", "a.weights.h5"):
        with pytest.raises(ValueError, match="is a Keras file, no checkpoint"):
            checkpoint.read(tmp_path / name)
        with pytest.raises(ValueError, match="is a Keras file, no safetensors"):
            checkpoint.read_weights(tmp_path / name)
