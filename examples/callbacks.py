"""A run that looks after itself: checked before, stopped in time, its best weights saved, each epoch in a file.

Run: python examples/callbacks.py   (needs the extra "examples"; takes some five seconds on two cores)
"""

import csv
import tempfile
from pathlib import Path

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import CSVLogger, EarlyStopping, ModelCheckpoint, ReduceLROnPlateau

kt.set_seed(0)
digits = load_digits()
x_train, x_test, y_train, y_test = train_test_split(digits.data / 16, digits.target, test_size=0.2, random_state=0)
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))
model = kt.Model(net).compile("adam", "cross_entropy", metrics=["accuracy"], lr=3e-3)

with tempfile.TemporaryDirectory() as folder:
    best = Path(folder, "best.safetensors")
    callbacks = [
        EarlyStopping(patience=5, verbose=1),  # by val_loss
        ReduceLROnPlateau(factor=0.5, patience=2),
        ModelCheckpoint(best, save_best_only=True, save_weights_only=True),
        CSVLogger(Path(folder, "log.csv")),
    ]
    data = {"validation_split": 0.1, "callbacks": callbacks}
    assert model.check(x_train, y_train, **data).ok  # one step that changes nothing
    model.fit(x_train, y_train, dry_run=True, **data)  # one batch of everything, which leaves nothing
    history = model.fit(x_train, y_train, epochs=200, max_time="00:00:02:00", verbose=0, **data)

    with Path(folder, "log.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(history.epoch)
    loss, accuracy = model.load_weights(best).evaluate(x_test, y_test, verbose=0)

history.plot(path="callbacks.png")
print(f"stopped by {history.stopped_by} after {len(history.epoch)} epochs, test accuracy {accuracy:.4f}")
assert history.stopped_by == "stop_training" and accuracy >= 0.96
