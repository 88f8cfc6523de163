"""How many images a step has room for, what each batch size takes, and from which one on more is no faster.

Run: python examples/find_batch_size.py [FOLDER]   (needs the extra "examples"; takes half a minute on one core)
The picture is saved in the folder, or here.
"""

import sys
from pathlib import Path

from sklearn.datasets import load_digits
from torch import nn

import kerastorch as kt

kt.set_seed(0)
digits = load_digits()
images = digits.images[:, None].repeat(4, axis=2).repeat(4, axis=3) / 16.0  # 1,797 images of 32x32 pixels

net = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(4),
    nn.Conv2d(32, 32, 3, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 8 * 8, 10),
)
model = kt.Model(net).compile("adam", "cross_entropy", metrics=["accuracy"], lr=2e-3)

# Each trial is a few real steps and a validation, of which nothing is left; without `memory` it takes what is free.
size = model.find_batch_size(images, digits.target, memory="400MB", mode="binsearch", init=16)
print(size, end="\n\n")
size.plot(path=Path(*sys.argv[1:2], "find_batch_size.png"))

# By default a forecast, made without running anything, says where to look.
forecast = model.find_batch_size(images, digits.target, memory="400MB")
print(forecast)
run, run_by_forecast = (sum(trial.was_run for trial in found.trials) for found in (size, forecast))
assert 0.75 < forecast / size < 1.33, f"the sizes {size} and {forecast} differ by more than a quarter"
print(f"\n{run} and {run_by_forecast} trials run; as fast from {size.throughput_best} on, which is often enough")
