"""Where kerastorch differs from Keras on purpose: each test says what, and shows both."""

import keras
import numpy as np
import pytest
import torch
from keras_twins import BATCH, CLOSE, MARKS, assert_same_history, batches, classes, endless, labels, mlp, regression

pytestmark = MARKS


# Steps.


def test_steps_per_epoch_across_two_passes_go_on_where_keras_cuts_the_epoch():
    x, y = regression()
    pair = mlp().compile("mse")
    with pytest.warns(UserWarning, match="ran out of data"):
        theirs, ours = pair.fit(x, y, epochs=3, steps_per_epoch=3)  # Keras takes 3 + 2 + 3 of the 5 steps of a pass
    assert theirs.history["loss"] != pytest.approx(ours.history["loss"], **CLOSE)
    pair = mlp().compile("mse")
    theirs = pair.keras.fit(endless(x, y), epochs=3, steps_per_epoch=3, verbose=0)
    assert_same_history(theirs, ours)


def test_a_validation_generator_goes_on_where_keras_repeats_thebatches_it_peeked_at():
    x, y = regression(1)
    pair = mlp().compile("mse", lr=1e-12)  # weights stand still: only the choice of batches counts
    options = {"validation_steps": 2, "epochs": 2, "shuffle": False, "verbose": 0}
    theirs, ours = (
        fit(*regression(), validation_data=endless(x, y), **options).history["val_loss"]
        for fit in (pair.keras.fit, pair.torch.fit)
    )
    first, second = (slice(start, start + 2 * BATCH) for start in (0, 2 * BATCH))
    assert theirs == pytest.approx([pair.keras.evaluate(x[first], y[first], verbose=0)] * 2, **CLOSE)
    goes_on = [pair.keras.evaluate(x[rows], y[rows], verbose=0) for rows in (first, second)]
    assert ours == pytest.approx(goes_on, **CLOSE)


def test_steps_without_a_batch_size_arebatches_of_32_where_keras_divides_the_samples_by_them():
    (x, y), pair = regression(), mlp().compile("mse")
    theirs, ours = (model.evaluate(x, y, steps=2, verbose=0) for model in (pair.keras, pair.torch))
    assert theirs == pytest.approx(pair.keras.evaluate(x, y, verbose=0), **CLOSE)
    assert ours == pytest.approx(pair.keras.evaluate(x[:64], y[:64], verbose=0), **CLOSE)


def test_a_generator_that_is_over_ends_the_run_where_keras_goes_on_with_the_batches_it_peeked_at():
    pair = mlp().compile("mse")
    options = {"steps_per_epoch": 3, "epochs": 4, "verbose": 0}
    x, y = regression()
    theirs = pair.keras.fit((batch for batch in batches(x, y)), **options)
    with pytest.warns(UserWarning, match="the data ended after 2 of 3 steps in epoch 2"):
        ours = pair.torch.fit((batch for batch in batches(x, y)), **options)
    assert theirs.epoch == [0, 1, 2, 3] and ours.epoch == [0, 1]
    assert ours.history["loss"] == pytest.approx(theirs.history["loss"][:2], **CLOSE)


def test_no_epochs_are_refused_where_keras_returns_an_empty_history():
    pair = mlp().compile("mse")
    assert pair.keras.fit(*regression(), epochs=0, verbose=0).history == {}
    with pytest.raises(ValueError, match="epochs=0 is less than 1"):
        pair.torch.fit(*regression(), epochs=0, verbose=0)


# Logits, shapes and structure.


@pytest.mark.parametrize(
    ("loss", "activation", "data"),
    [
        ("sparse_categorical_crossentropy", "softmax", classes()),
        ("categorical_crossentropy", "softmax", (classes()[0], np.eye(3, dtype="float32")[classes()[1]])),
        ("binary_crossentropy", "sigmoid", labels()),
    ],
)
def test_losses_are_on_logits_where_the_same_name_in_keras_is_on_probabilities(loss, activation, data):
    pair = mlp(1 if activation == "sigmoid" else 3)
    on_probabilities = keras.Sequential([pair.keras, keras.layers.Activation(activation)])
    on_probabilities.compile(keras.optimizers.SGD(0.05), loss)
    pair.torch.compile("sgd", loss, lr=0.05)
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0}
    assert_same_history(on_probabilities.fit(*data, **options), pair.torch.fit(*data, **options))


def test_targets_of_another_shape_are_refused_where_keras_reshapes_them():
    x, y = regression()
    pair = mlp().compile("mse")
    pair.keras.fit(x, y[:, 0], verbose=0)
    with pytest.raises(ValueError, match=r"Try y\[:, None\]"):
        pair.torch.fit(x, y[:, 0], verbose=0)
    x, y = classes()
    pair = mlp(3).compile("sparse_categorical_crossentropy")
    pair.keras.fit(x, y[:, None], verbose=0)
    with pytest.raises(ValueError, match=r"try target.squeeze\(1\)"):
        pair.torch.fit(x, y[:, None], verbose=0)


def test_class_weight_and_sample_weight_multiply_where_keras_refuses_them_together():
    x, y = classes()
    class_weight, weight = {0: 1.0, 1: 3.0, 2: 0.5}, np.linspace(0.0, 2.0, len(x), dtype="float32")
    pair = mlp(3).compile("sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="class_weight"):
        pair.keras.fit(x, y, class_weight=class_weight, sample_weight=weight, verbose=0)
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    factors = np.array([class_weight[index] for index in y], dtype="float32")
    theirs = pair.keras.fit(x, y, sample_weight=weight * factors, **options)
    assert_same_history(theirs, pair.torch.fit(x, y, class_weight=class_weight, sample_weight=weight, **options))


def test_predict_returns_tensors_for_tensors_where_keras_returns_numpy():
    pair, x = mlp(), torch.tensor(regression()[0])
    theirs, ours = (model.predict(x, verbose=0) for model in (pair.keras, pair.torch))
    assert isinstance(theirs, np.ndarray) and isinstance(ours, torch.Tensor) and not ours.requires_grad
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)


# Keras's callbacks.


def test_keras_early_stopping_must_be_told_the_mode_of_a_metric_which_only_metrics_of_keras_tell():
    stopping = keras.callbacks.EarlyStopping("mae")
    mlp().compile("mse", metrics=["mae"]).keras.fit(*regression(), callbacks=[stopping], verbose=0)
    stopping = keras.callbacks.EarlyStopping("mae")
    with pytest.raises(ValueError, match="mode='min'"):
        mlp().compile("mse", metrics=["mae"]).torch.fit(*regression(), callbacks=[stopping], verbose=0)
