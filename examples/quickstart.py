"""Handwritten digits in ten lines: summary, training with validation, a test, a picture.

Run: python examples/quickstart.py   (needs the extra "examples"; takes some ten seconds on two cores)
"""

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import kerastorch as kt

kt.set_seed(0)
digits = load_digits()
images = digits.images[:, None] / 16.0  # 1,797 images of 8x8 pixels, one channel
x_train, x_test, y_train, y_test = train_test_split(images, digits.target, test_size=0.2, random_state=0)

net = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Dropout(0.3),
    nn.Linear(64 * 4 * 4, 10),
)

model = kt.Model(net)
model.compile("adam", "cross_entropy", metrics=["accuracy"], lr=2e-3)
model.summary((32, 1, 8, 8))
history = model.fit(x_train, y_train, epochs=12, validation_split=0.1)
history.plot(path="quickstart.png")

loss, accuracy = model.evaluate(x_test, y_test)
print(f"test accuracy {accuracy:.4f}, first five predictions {model.predict(x_test[:5]).argmax(1)}")
assert accuracy >= 0.97, f"the test accuracy is {accuracy:.4f}, expected at least 0.97"
