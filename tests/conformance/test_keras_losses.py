"""Losses and metrics by name against `keras.losses` and `keras.metrics`, on the same tensors."""

import keras
import numpy as np
import pytest
import torch
from keras_twins import CLOSE, MARKS, classes, labels, mlp, regression
from torch import nn

import kerastorch as kt

pytestmark = MARKS

N = 40
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(N, 4)).astype("float32")
POSITIVE = RANDOM.uniform(0.1, 2.0, size=(N, 4)).astype("float32")
SHARES = RANDOM.dirichlet(np.ones(4), size=N).astype("float32")
INDICES = RANDOM.integers(0, 4, N)
ONE_HOT = np.eye(4, dtype="float32")[INDICES]
BITS = RANDOM.integers(0, 2, (N, 4)).astype("float32")
SIGNS = 2 * BITS - 1
BIT = BITS[:, :1]
WEIGHTS = np.linspace(0.0, 2.0, N, dtype="float32")


def _evaluate(output, target, loss, metrics=(), **options):
    """What kerastorch finds for a module that returned `output`."""
    model = kt.Model(nn.Identity(), backend="cpu").compile("sgd", loss, metrics=metrics)
    return model.evaluate(output, target, verbose=0, **options)


def _softmax(logits):
    return torch.as_tensor(logits).softmax(-1).numpy()


def _sigmoid(logits):
    return torch.as_tensor(logits).sigmoid().numpy()


# Name -> (output, target, the Keras loss, the output it takes).
LOSSES = {
    "mse": (LOGITS, POSITIVE, keras.losses.MeanSquaredError(), LOGITS),
    "mean_squared_error": (LOGITS, POSITIVE, keras.losses.MeanSquaredError(), LOGITS),
    "MeanSquaredError": (LOGITS, POSITIVE, keras.losses.MeanSquaredError(), LOGITS),
    "mae": (LOGITS, POSITIVE, keras.losses.MeanAbsoluteError(), LOGITS),
    "mean_absolute_error": (LOGITS, POSITIVE, keras.losses.MeanAbsoluteError(), LOGITS),
    "huber": (3 * LOGITS, POSITIVE, keras.losses.Huber(), 3 * LOGITS),
    "log_cosh": (3 * LOGITS, POSITIVE, keras.losses.LogCosh(), 3 * LOGITS),
    "logcosh": (3 * LOGITS, POSITIVE, keras.losses.LogCosh(), 3 * LOGITS),
    "mape": (LOGITS, POSITIVE, keras.losses.MeanAbsolutePercentageError(), LOGITS),
    "mean_absolute_percentage_error": (LOGITS, POSITIVE, keras.losses.MeanAbsolutePercentageError(), LOGITS),
    "msle": (POSITIVE, SHARES, keras.losses.MeanSquaredLogarithmicError(), POSITIVE),
    "mean_squared_logarithmic_error": (LOGITS, SHARES, keras.losses.MeanSquaredLogarithmicError(), LOGITS),
    "poisson": (POSITIVE, SHARES, keras.losses.Poisson(), POSITIVE),
    "cosine_similarity": (LOGITS, POSITIVE, keras.losses.CosineSimilarity(), LOGITS),
    "CosineSimilarity": (LOGITS, POSITIVE, keras.losses.CosineSimilarity(), LOGITS),
    "hinge": (LOGITS, SIGNS, keras.losses.Hinge(), LOGITS),
    "squared_hinge": (LOGITS, SIGNS, keras.losses.SquaredHinge(), LOGITS),
    "kl_divergence": (LOGITS, SHARES, keras.losses.KLDivergence(), _softmax(LOGITS)),
    "kld": (LOGITS, SHARES, keras.losses.KLDivergence(), _softmax(LOGITS)),
    "sparse_categorical_crossentropy": (
        LOGITS, INDICES, keras.losses.SparseCategoricalCrossentropy(from_logits=True), LOGITS,
    ),
    "categorical_crossentropy": (LOGITS, ONE_HOT, keras.losses.CategoricalCrossentropy(from_logits=True), LOGITS),
    "CategoricalCrossentropy": (LOGITS, SHARES, keras.losses.CategoricalCrossentropy(from_logits=True), LOGITS),
    "binary_crossentropy": (LOGITS, BITS, keras.losses.BinaryCrossentropy(from_logits=True), LOGITS),
    "bce": (_sigmoid(LOGITS), BITS, keras.losses.BinaryCrossentropy(), _sigmoid(LOGITS)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_value_of_keras(name):
    output, target, keras_loss, keras_output = LOSSES[name]
    assert _evaluate(output, target, name) == pytest.approx(float(keras_loss(target, keras_output)), **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_a_weighted_loss_has_the_value_of_keras(name):
    output, target, keras_loss, keras_output = LOSSES[name]
    theirs = float(keras_loss(target, keras_output, sample_weight=WEIGHTS))
    assert _evaluate(output, target, name, sample_weight=WEIGHTS) == pytest.approx(theirs, **CLOSE)


@pytest.mark.parametrize("name", ["hinge", "squared_hinge"])
def test_hinge_takes_labels_of_0_and_1_for_signs_as_keras_does(name):
    theirs = float(keras.losses.get(name)(BITS, LOGITS).mean())
    assert _evaluate(LOGITS, BITS, name) == pytest.approx(theirs, **CLOSE)


@pytest.mark.parametrize("metric", ["RootMeanSquaredError", "BinaryAccuracy", "F1Score", "R2Score", "mape", "msle"])
def test_a_metric_is_found_by_every_name_that_keras_knows(metric):
    assert keras.metrics.get(metric)
    assert _evaluate(LOGITS, POSITIVE, "mse", metrics=[metric])


# Metrics.


@pytest.mark.parametrize("name", ["accuracy", "acc", "sparse_categorical_accuracy"])
def test_metrics_of_integer_classes_have_the_names_and_values_of_keras(name):
    mlp(3).compile("sparse_categorical_crossentropy", metrics=[name]).assert_same_fit(*classes(), epochs=2)


@pytest.mark.parametrize("name", ["accuracy", "acc", "categorical_accuracy"])
def test_metrics_of_one_hot_classes_have_the_names_and_values_of_keras(name):
    x, y = classes()
    mlp(3).compile("categorical_crossentropy", metrics=[name]).assert_same_fit(x, np.eye(3)[y], epochs=2)


@pytest.mark.parametrize("name", ["mse", "mae", "mean_squared_error", "mean_absolute_error"])
def test_metrics_of_values_have_the_names_and_values_of_keras(name):
    mlp(2).compile("huber", metrics=[name]).assert_same_fit(*regression(outputs=2), epochs=2, validation_split=0.2)


def test_rmse_is_the_root_of_the_mean_over_the_epoch():
    theirs = [keras.metrics.RootMeanSquaredError(name="rmse")]
    mlp().compile("mse", metrics=["rmse"], keras_metrics=theirs).assert_same_fit(*regression(), epochs=2)


def test_r2_is_that_of_the_epoch():
    theirs = [keras.metrics.R2Score(name="r2")]
    mlp().compile("mse", metrics=["r2"], keras_metrics=theirs).assert_same_fit(*regression(), epochs=2)


def test_r2_of_several_values_is_averaged_uniformly():
    theirs = [keras.metrics.R2Score(name="r2")]
    mlp(3).compile("mse", metrics=["r2"], keras_metrics=theirs).assert_same_fit(*regression(outputs=3), epochs=2)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_accuracy_counts_targets_among_the_k_highest(k):
    theirs = [keras.metrics.SparseTopKCategoricalAccuracy(k, name=f"top{k}_accuracy")]
    mlp(5).compile(
        "sparse_categorical_crossentropy", metrics=[f"top{k}_accuracy"], keras_metrics=theirs
    ).assert_same_fit(*classes(number=5), epochs=2)


def test_top_k_categorical_accuracy_is_of_5_as_in_keras():
    x, y = classes(number=8)
    name = "top_k_categorical_accuracy"
    mlp(8).compile("categorical_crossentropy", metrics=[name]).assert_same_fit(x, np.eye(8)[y], epochs=2)
    mlp(8).compile("sparse_categorical_crossentropy", metrics=[f"sparse_{name}"]).assert_same_fit(x, y, epochs=2)


def _of_logits(metric):
    """A Keras metric of probabilities, given logits."""
    update = metric.update_state
    metric.update_state = lambda y, output, sample_weight=None: update(y, keras.ops.sigmoid(output), sample_weight)
    return metric


BINARY = {
    "precision": (lambda: keras.metrics.Precision(name="precision"), CLOSE),
    "recall": (lambda: keras.metrics.Recall(name="recall"), CLOSE),
    "f1": (lambda: keras.metrics.F1Score(threshold=0.5, average="micro", name="f1"), CLOSE),
    "binary_accuracy": (lambda: keras.metrics.BinaryAccuracy(name="binary_accuracy"), CLOSE),
    # Keras's area is that of a polygon with a corner for each threshold; ours is exact.
    "auc": (lambda: keras.metrics.AUC(num_thresholds=5000, name="auc"), {"abs": 2e-3}),
}


@pytest.mark.parametrize("name", BINARY)
def test_scores_of_binary_labels_are_those_of_keras_on_probabilities(name):
    make, close = BINARY[name]
    pair = mlp().compile("binary_crossentropy", metrics=[name], keras_metrics=[_of_logits(make())])
    theirs, ours = pair.fit(*labels(), epochs=3, validation_split=0.2)
    assert set(ours.history) == set(theirs.history) == {"loss", "val_loss", name, f"val_{name}"}
    for key in (name, f"val_{name}"):
        assert ours.history[key] == pytest.approx(theirs.history[key], **close)


def test_f1_of_classes_is_averaged_over_them_as_keras_macro():
    x, y = classes()
    theirs = [keras.metrics.F1Score(average="macro", name="f1")]
    mlp(3).compile("categorical_crossentropy", metrics=["f1"], keras_metrics=theirs).assert_same_fit(
        x, np.eye(3, dtype="float32")[y], epochs=3
    )


def test_a_callable_metric_is_logged_under_its_name_with_output_first_where_keras_has_the_target_first():
    def bias(output, target):
        return (output - target).mean()

    def theirs(y_true, y_pred):
        return keras.ops.mean(y_pred - y_true)

    theirs.__name__ = "bias"
    x, y = regression(samples=64)  # full batches: Keras takes the mean of the batches' means
    mlp().compile("mse", metrics=[bias], keras_metrics=[theirs]).assert_same_fit(x, y, epochs=2)


def test_a_callable_metric_of_each_sample_is_averaged_over_the_samples():
    def error(output, target):
        return (output - target).abs().squeeze(-1)

    mlp().compile(
        "mse", metrics=[error], keras_metrics=[keras.metrics.MeanAbsoluteError(name="error")]
    ).assert_same_fit(*regression(), epochs=2)


def test_the_same_metric_twice_gets_a_number():
    def error(output, target):
        return (output - target).abs()

    theirs = [keras.metrics.MeanAbsoluteError(name="error"), keras.metrics.MeanAbsoluteError(name="error")]
    mlp().compile("mse", metrics=[error, error], keras_metrics=theirs).assert_same_fit(*regression(), epochs=2)
