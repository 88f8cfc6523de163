"""The same network twice, once in Keras and once in kerastorch, with the same weights, data and optimizer."""

from functools import partial

import keras
import numpy as np
import pytest
import torch
from torch import nn

import kerastorch as kt

# On every test that runs Keras: some of what Keras says on the way is about Keras alone.
MARKS = [
    pytest.mark.conformance,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed, but will be ignored:UserWarning"),
]
SAMPLES, BATCH = 70, 16  # five batches, the last one of 6
STEPS = 5
CLOSE = {"rel": 1e-5, "abs": 1e-5}

# Keras's losses are on probabilities unless told; kerastorch's are on logits, as torch's.
ON_LOGITS = {
    "sparse_categorical_crossentropy": keras.losses.SparseCategoricalCrossentropy,
    "categorical_crossentropy": keras.losses.CategoricalCrossentropy,
    "binary_crossentropy": keras.losses.BinaryCrossentropy,
}
OPTIMIZERS = {
    "sgd": (keras.optimizers.SGD, "sgd"),
    "momentum": (partial(keras.optimizers.SGD, momentum=0.9), partial(torch.optim.SGD, momentum=0.9)),
    # Keras adds epsilon before it corrects the bias, torch after: equal only where epsilon is next to nothing.
    "adam": (partial(keras.optimizers.Adam, epsilon=1e-14), partial(torch.optim.Adam, eps=1e-14)),
    "adamw": (
        partial(keras.optimizers.AdamW, epsilon=1e-14, weight_decay=0.1),
        partial(torch.optim.AdamW, eps=1e-14, weight_decay=0.1),
    ),
}
LAYERS = {
    nn.Linear: lambda linear: keras.layers.Dense(linear.out_features),
    nn.Embedding: lambda table: keras.layers.Embedding(table.num_embeddings, table.embedding_dim),
    nn.Tanh: lambda _: keras.layers.Activation("tanh"),
    nn.Dropout: lambda dropout: keras.layers.Dropout(dropout.p),
    nn.BatchNorm1d: lambda norm: keras.layers.BatchNormalization(momentum=1 - norm.momentum, epsilon=norm.eps),
    nn.Conv2d: lambda conv: keras.layers.Conv2D(conv.out_channels, conv.kernel_size, data_format="channels_first"),
    nn.AdaptiveAvgPool2d: lambda _: keras.layers.GlobalAveragePooling2D(data_format="channels_first"),
}


class Twins:
    """A Keras model and a kerastorch `Model` that compute the same."""

    def __init__(self, keras_model, module):
        self.keras, self.torch = keras_model, kt.Model(module, backend="cpu")

    def compile(
        self, loss, *, optimizer="sgd", lr=0.05, metrics=(), keras_metrics=None, loss_weights=None, weighted=()
    ):
        """`keras_metrics`: where the same metric has another name or threshold in Keras."""
        theirs, ours = OPTIMIZERS[optimizer]
        self.keras.compile(
            theirs(lr),
            keras.tree.map_structure(_on_logits, loss),
            metrics=metrics if keras_metrics is None else keras_metrics,
            loss_weights=loss_weights,
            weighted_metrics=weighted or None,
        )
        self.torch.compile(ours, _weighted(loss, loss_weights), metrics=metrics, weighted_metrics=weighted, lr=lr)
        return self

    def fit(self, *data, **options):
        """Fits both in the same order and returns both histories."""
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | options
        return self.keras.fit(*data, **options), self.torch.fit(*data, **options)

    def assert_same_weights(self):
        theirs = [array for layer in self.keras.layers for array in _as_torch(layer)]
        for array, tensor in zip(theirs, self.torch.module.state_dict().values(), strict=True):
            np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-5, atol=1e-5)

    def assert_same_fit(self, *data, **options):
        """Fits both and compares histories and weights; returns kerastorch's history."""
        theirs, ours = self.fit(*data, **options)
        assert_same_history(theirs, ours)
        self.assert_same_weights()
        return ours


def assert_same_history(theirs, ours):
    assert ours.epoch == theirs.epoch
    assert set(ours.history) == set(theirs.history)
    assert {name: ours.history[name] for name in theirs.history} == {
        name: pytest.approx(values, **CLOSE) for name, values in theirs.history.items()
    }


def twins(*layers, inputs=(4,)):
    """Twins of `nn.Sequential(*layers)`; `inputs` is the shape of one sample."""
    module = nn.Sequential(*layers)
    # Keras's global pooling flattens by itself.
    others = [LAYERS[type(layer)](layer) for layer in layers if not isinstance(layer, nn.Flatten)]
    model = keras.Sequential([keras.Input(inputs), *others])
    copy_weights(module, model)
    return Twins(model, module)


def mlp(outputs=1):
    torch.manual_seed(1)
    return twins(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def copy_weights(module, model):
    """Gives the Keras model the weights of the module, layer by layer."""
    ours = [part for part in module.modules() if part._parameters]
    theirs = [layer for layer in model.layers if layer.weights]
    for part, layer in zip(ours, theirs, strict=True):
        arrays = [tensor.numpy() for name, tensor in part.state_dict().items() if name != "num_batches_tracked"]
        if arrays[0].ndim > 1 and not isinstance(part, nn.Embedding):
            arrays[0] = arrays[0].transpose(*range(2, arrays[0].ndim), 1, 0)
        layer.set_weights(arrays)


def _as_torch(layer):
    """The weights of a Keras layer as torch has them: (in, out) becomes (out, in)."""
    arrays = layer.get_weights()
    if arrays and arrays[0].ndim > 1 and not isinstance(layer, keras.layers.Embedding):
        arrays[0] = arrays[0].transpose(-1 % arrays[0].ndim, -2 % arrays[0].ndim, *range(arrays[0].ndim - 2))
    return arrays


def _on_logits(loss):
    return ON_LOGITS[loss](from_logits=True) if loss in ON_LOGITS else loss


def _weighted(loss, weights):
    """Keras's `loss` and `loss_weights` as the pairs that kerastorch takes."""
    if weights is None:
        return loss
    if isinstance(loss, dict):
        return {name: (part, weights[name]) for name, part in loss.items()}
    return list(zip(loss, weights, strict=True))


# Data: learnable, so that histories move.


def regression(seed=0, samples=SAMPLES, outputs=1):
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, 4)).astype("float32")
    y = x @ random.normal(size=(4, outputs)) + 0.1 * random.normal(size=(samples, outputs))
    return x, y.astype("float32")


def classes(seed=0, samples=SAMPLES, number=3):
    x, y = regression(seed, samples, number)
    return x, y.argmax(1)


def labels(seed=0, samples=SAMPLES):
    """Binary targets of shape (samples, 1)."""
    x, y = regression(seed, samples)
    return x, (y > 0).astype("float32")


def weights(samples=SAMPLES):
    return np.linspace(0.0, 2.0, samples, dtype="float32")


def batches(*arrays, size=BATCH):
    """The arrays cut into batches `(x, y[, weight])`."""
    return [tuple(array[start : start + size] for array in arrays) for start in range(0, len(arrays[0]), size)]


def endless(*arrays):
    """A generator of these batches, pass after pass."""
    while True:
        yield from batches(*arrays)
