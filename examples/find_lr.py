"""A good learning rate for SGD, where the usual 0.01 is far off: a sweep, and short runs that confirm what it says.

Run: python examples/find_lr.py [FOLDER]   (needs the extra "examples"; takes some ten seconds on one core)
The picture is saved in the folder, or here.
"""

import sys
from pathlib import Path

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import kerastorch as kt

digits = load_digits()
images = digits.images[:, None] / 16.0  # 1,797 images of 8x8 pixels, one channel
x_train, x_test, y_train, y_test = train_test_split(images, digits.target, test_size=0.2, random_state=0)


def new_model(lr):
    kt.set_seed(0)
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    net = nn.Sequential(*layers)
    return kt.Model(net).compile("sgd", "cross_entropy", metrics=["accuracy"], lr=lr)


def accuracy_of(model):
    model.fit(x_train, y_train, epochs=3, verbose=0)
    return model.evaluate(x_test, y_test, verbose=0)[1]


model = new_model(lr=0.01)
found = model.find_lr(x_train, y_train)  # the optimizer has the rate from now on; nothing else has changed
print(found)
found.plot(path=Path(*sys.argv[1:2], "find_lr.png"))

usual, better = accuracy_of(new_model(lr=0.01)), accuracy_of(model)
print(f"\ntest accuracy after three epochs: {usual:.3f} with lr=0.01, {better:.3f} with lr={found.lr:.3g}")
assert better > max(usual, 0.9), f"the test accuracy is {better:.3f}, expected more than {usual:.3f} and 0.9"
