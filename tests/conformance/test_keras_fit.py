"""`fit` against `keras.Model.fit`: the same weights, data and optimizer give the same history and weights."""

import copy

import keras
import numpy as np
import pytest
import torch
from keras_twins import (
    BATCH,
    CLOSE,
    MARKS,
    OPTIMIZERS,
    SAMPLES,
    STEPS,
    assert_same_history,
    batches,
    classes,
    endless,
    labels,
    mlp,
    regression,
    twins,
    weights,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kerastorch as kt

pytestmark = MARKS


# Problems.


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "mean_squared_error", "mean_absolute_error", "log_cosh"])
def test_regression_has_keras_history(loss):
    mlp().compile(loss, metrics=["mse", "mae"]).assert_same_fit(*regression(), epochs=3)


def test_several_values_a_sample_are_averaged_as_keras_does():
    mlp(3).compile("mse", metrics=["mae"]).assert_same_fit(*regression(outputs=3), epochs=2)


def test_integer_classes_have_keras_history():
    mlp(3).compile("sparse_categorical_crossentropy", metrics=["accuracy"]).assert_same_fit(*classes(), epochs=3)


def test_one_hot_classes_have_keras_history():
    x, y = classes()
    mlp(3).compile("categorical_crossentropy", metrics=["accuracy"]).assert_same_fit(
        x, np.eye(3, dtype="float32")[y], epochs=3
    )


def test_binary_labels_have_keras_history_with_the_threshold_of_logits_at_zero():
    at_zero = [keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")]
    mlp().compile("binary_crossentropy", metrics=["accuracy"], keras_metrics=at_zero).assert_same_fit(
        *labels(), epochs=3
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_of_one_name_take_the_same_steps(optimizer):
    mlp().compile("mse", optimizer=optimizer, lr=0.01).assert_same_fit(*regression(), epochs=5)


def test_convolutions_have_keras_history():
    x, y = np.random.default_rng(0).normal(size=(40, 1, 6, 6)).astype("float32"), np.arange(40) % 3
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    pair = twins(*layers, inputs=(1, 6, 6)).compile("sparse_categorical_crossentropy", metrics=["accuracy"])
    pair.assert_same_fit(x, y, epochs=2)


def _tokens():
    """Sequences of 5 tokens out of 7, each token of one of 3 classes."""
    tokens = np.random.default_rng(0).integers(0, 7, (SAMPLES, 5))
    return tokens, tokens % 3


def _tagger():
    torch.manual_seed(0)
    pair = twins(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3), inputs=(5,))
    return pair.compile("sparse_categorical_crossentropy", metrics=["accuracy"])


def test_classes_of_tokens_with_classes_last_have_keras_history():
    _tagger().assert_same_fit(*_tokens(), epochs=3, validation_split=0.2)


def test_a_weight_for_each_token_or_for_each_sample_weighs_tokens_as_in_keras():
    each = np.random.default_rng(1).uniform(size=(SAMPLES, 5)).astype("float32")
    _tagger().assert_same_fit(*_tokens(), sample_weight=each, epochs=2)
    _tagger().assert_same_fit(*_tokens(), sample_weight=weights()[:, None], epochs=2)


@pytest.mark.parametrize("kind", ["float64", "float16", "int64", "bool"])
def test_targets_of_any_dtype_have_keras_history(kind):
    x, y = regression()
    mlp().compile("mse").assert_same_fit(x, y.astype(kind), epochs=2)


def test_inputs_in_float64_are_trained_in_float32_as_in_keras():
    x, y = regression()
    mlp().compile("mse").assert_same_fit(x.astype("float64"), y, epochs=2)


# Modes.


def _with_batch_norm():
    return twins(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).compile("mse")


@pytest.mark.parametrize("is_training", [True, False])
def test_the_module_trains_in_train_mode_and_is_handed_back_in_the_mode_it_came_in(is_training):
    pair = _with_batch_norm()
    module = pair.torch.module.train(is_training)
    module[2].train(not is_training)
    modes = [part.training for part in module.modules()]
    assert_same_history(*pair.fit(*regression(), epochs=3))
    assert [part.training for part in module.modules()] == modes
    # Keras's running variance is that of the batch, torch's is the unbiased one: n / (n - 1) times as large.
    theirs = pair.keras.layers[1].get_weights()
    np.testing.assert_allclose(module[1].running_mean.numpy(), theirs[2], rtol=1e-5, atol=1e-5)


def test_validation_and_evaluation_use_the_running_statistics():
    x, y = regression()
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    theirs = keras.Sequential([keras.layers.TorchModuleWrapper(copy.deepcopy(module))])
    theirs.compile(keras.optimizers.SGD(0.05), "mse")
    ours = kt.Model(module, backend="cpu").compile("sgd", "mse", lr=0.05)
    options = {"epochs": 3, "batch_size": BATCH, "shuffle": False, "verbose": 0, "validation_split": 0.2}
    assert_same_history(theirs.fit(x, y, **options), ours.fit(x, y, **options))
    assert ours.evaluate(x, y, verbose=0) == pytest.approx(theirs.evaluate(x, y, verbose=0), **CLOSE)


# Weights.


def test_sample_weight_weighs_the_loss_and_not_the_metrics():
    mlp().compile("mse", metrics=["mae"]).assert_same_fit(*regression(), sample_weight=weights(), epochs=3)


def test_sample_weight_of_several_values_a_sample():
    mlp(3).compile("mse").assert_same_fit(*regression(outputs=3), sample_weight=weights(), epochs=2)


def test_sample_weight_of_shape_samples_by_1():
    mlp().compile("mse").assert_same_fit(*regression(), sample_weight=weights()[:, None], epochs=2)


def test_class_weight_of_integer_classes():
    pair = mlp(3).compile("sparse_categorical_crossentropy", metrics=["accuracy"])
    pair.assert_same_fit(*classes(), class_weight={0: 1.0, 1: 3.0, 2: 0.5}, epochs=3)


def test_class_weight_of_one_hot_classes():
    x, y = classes()
    pair = mlp(3).compile("categorical_crossentropy")
    pair.assert_same_fit(x, np.eye(3, dtype="float32")[y], class_weight={0: 1.0, 1: 3.0, 2: 0.5}, epochs=3)


def test_class_weight_of_binary_labels():
    mlp().compile("binary_crossentropy").assert_same_fit(*labels(), class_weight={0: 1.0, 1: 4.0}, epochs=3)


def test_class_weight_does_not_touch_validation():
    pair = mlp(3).compile("sparse_categorical_crossentropy")
    pair.assert_same_fit(*classes(), class_weight={0: 2.0, 1: 3.0, 2: 0.5}, validation_split=0.3, epochs=2)


def test_a_class_that_class_weight_does_not_name_counts_once():
    mlp(3).compile("sparse_categorical_crossentropy").assert_same_fit(*classes(), class_weight={1: 3.0}, epochs=2)


def test_class_weight_may_have_numpy_integers_for_keys():
    x, y = classes()
    class_weight = dict(zip(np.unique(y), [1.0, 3.0, 0.5], strict=True))  # as after sklearn's compute_class_weight
    mlp(3).compile("sparse_categorical_crossentropy").assert_same_fit(x, y, class_weight=class_weight, epochs=2)


# Forms of data, all the same samples: Keras gets arrays where it cannot take the form.


def _tensors(*arrays):
    return TensorDataset(*map(torch.as_tensor, arrays))


class Rows(Dataset):
    """A dataset that is not known to hold tensors."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, index):
        return tuple(array[index] for array in self.arrays)


FORMS = {
    "pair of arrays": lambda *arrays: ((arrays,), {"batch_size": BATCH}),
    "tensors": lambda *arrays: ((tuple(map(torch.as_tensor, arrays)),), {"batch_size": BATCH}),
    "TensorDataset": lambda *arrays: ((_tensors(*arrays),), {"batch_size": BATCH}),
    "Dataset": lambda *arrays: ((Rows(*arrays),), {"batch_size": BATCH}),
    "DataLoader": lambda *arrays: ((DataLoader(_tensors(*arrays), BATCH),), {}),
    "DataLoader of rows": lambda *arrays: ((DataLoader(Rows(*arrays), BATCH),), {}),
    "list of batches": lambda *arrays: ((batches(*arrays),), {}),
    "callable": lambda *arrays: ((lambda: iter(batches(*arrays)),), {}),
    "generator": lambda *arrays: ((endless(*arrays),), {"steps_per_epoch": STEPS}),
}


@pytest.mark.parametrize("is_weighted", [False, True], ids=["x, y", "x, y, weight"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_has_the_history_of_keras_on_arrays(form, is_weighted):
    arrays = (*regression(), weights()) if is_weighted else regression()
    pair = mlp().compile("mse", metrics=["mae"])
    theirs = pair.keras.fit(*arrays[:2], sample_weight=arrays[2] if is_weighted else None, **ARRAYS, epochs=3)
    given, options = FORMS[form](*arrays)
    assert_same_history(theirs, pair.torch.fit(*given, epochs=3, shuffle=False, verbose=0, **options))
    pair.assert_same_weights()


ARRAYS = {"batch_size": BATCH, "shuffle": False, "verbose": 0}


@pytest.mark.parametrize("is_weighted", [False, True], ids=["x, y", "x, y, weight"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_validation_data_has_the_values_of_keras_on_arrays(form, is_weighted):
    arrays = (*regression(1), weights()) if is_weighted else regression(1)
    pair = mlp().compile("mse", metrics=["mae"])
    options = {"epochs": 3, "shuffle": False, "verbose": 0}
    theirs = pair.keras.fit(*regression(), validation_data=arrays, **options)
    (given,), form_options = FORMS[form](*arrays)
    steps = form_options.get("steps_per_epoch")
    ours = pair.torch.fit(*regression(), validation_data=given, validation_steps=steps, **options)
    assert_same_history(theirs, ours)


def test_the_batch_size_of_fit_is_not_that_of_a_validation_loader():
    loader = DataLoader(_tensors(*regression(1)), 7)
    mlp().compile("mse").assert_same_fit(*regression(), validation_data=loader, epochs=2)


def test_validation_data_may_be_a_list_of_x_and_y():
    mlp().compile("mse").assert_same_fit(*regression(), validation_data=list(regression(1)), epochs=2)


@pytest.mark.parametrize("form", ["DataLoader", "generator"])
def test_keras_takes_the_same_object(form):
    pair = mlp().compile("mse", metrics=["mae"])
    histories = []
    for fit in (pair.keras.fit, pair.torch.fit):
        (data,), options = FORMS[form](*regression(), weights())
        histories.append(fit(data, epochs=3, verbose=0, **options))
    assert_same_history(*histories)
    pair.assert_same_weights()


def test_pandas_has_the_history_of_numpy():
    pandas = pytest.importorskip("pandas")
    x, y = regression()
    pair = mlp().compile("mse")
    theirs = pair.keras.fit(x, y, **ARRAYS, epochs=2)
    assert_same_history(theirs, pair.torch.fit(pandas.DataFrame(x), pandas.DataFrame(y), **ARRAYS, epochs=2))


# Steps and epochs.


def test_a_generator_goes_on_where_the_last_epoch_stopped():
    pair = mlp().compile("mse")
    options = {"epochs": 4, "steps_per_epoch": 3, "verbose": 0}
    fits = pair.keras.fit, pair.torch.fit
    assert_same_history(*(fit(endless(*regression()), **options) for fit in fits))
    pair.assert_same_weights()


def test_steps_per_epoch_that_divide_a_pass_are_keras_epochs():
    x, y = regression(samples=4 * BATCH)
    mlp().compile("mse").assert_same_fit(x, y, epochs=4, steps_per_epoch=2)


def test_epochs_are_counted_from_initial_epoch():
    ours = mlp().compile("mse").assert_same_fit(*regression(), epochs=5, initial_epoch=2)
    assert ours.epoch == [2, 3, 4]


def test_nothing_is_trained_where_initial_epoch_is_the_last():
    ours = mlp().compile("mse").assert_same_fit(*regression(), epochs=2, initial_epoch=2)
    assert ours.history == {} and ours.epoch == []


def test_a_second_fit_continues_with_the_optimizer_of_the_first():
    pair = mlp().compile("mse", optimizer="adam", lr=0.01)
    pair.assert_same_fit(*regression(), epochs=2)
    pair.assert_same_fit(*regression(), epochs=2)


def test_a_second_compile_resets_the_optimizer_and_keeps_the_weights():
    pair = mlp().compile("mse", optimizer="adam", lr=0.01)
    pair.fit(*regression(), epochs=2)
    pair.compile("mae", optimizer="adam", lr=0.02, metrics=["mse"])
    pair.assert_same_fit(*regression(), epochs=2)


@pytest.mark.parametrize("samples", [1, BATCH - 1, BATCH, BATCH + 1])
def test_edge_sizes_have_keras_history(samples):
    mlp().compile("mse", metrics=["mae"]).assert_same_fit(*regression(samples=samples), epochs=2)


def test_the_default_batch_size_is_32():
    mlp().compile("mse").assert_same_fit(*regression(), epochs=2, batch_size=None)


def test_history_params_are_those_of_keras():
    theirs, ours = mlp().compile("mse").fit(*regression(), epochs=2)
    assert ours.params == theirs.params == {"verbose": 0, "epochs": 2, "steps": STEPS}
    theirs, ours = mlp().compile("mse").fit(*regression(), epochs=3, steps_per_epoch=2)
    assert ours.params == theirs.params == {"verbose": 0, "epochs": 3, "steps": 2}


def test_fit_returns_the_history_that_the_model_remembers():
    pair = mlp().compile("mse")
    theirs, ours = pair.fit(*regression())
    assert pair.keras.history is theirs
    assert pair.torch.history is ours


# Validation.


def test_validation_split_takes_the_tail():
    mlp().compile("mse", metrics=["mae"]).assert_same_fit(*regression(), validation_split=0.3, epochs=3)


def test_validation_split_takes_the_tail_of_weights_too():
    pair = mlp().compile("mse")
    pair.assert_same_fit(*regression(), sample_weight=weights(), validation_split=0.25, epochs=3)


def test_validation_split_takes_the_tail_before_shuffling():
    x, y = regression()
    pair = mlp().compile("mse", lr=1e-12)  # weights stand still: only the choice of samples counts
    theirs, ours = pair.fit(x, y, validation_split=0.3, shuffle=True)
    assert_same_history(theirs, ours)


def test_validation_data_wins_over_validation_split():
    pair = mlp().compile("mse")
    pair.assert_same_fit(*regression(), validation_data=regression(1), validation_split=0.5, epochs=2)


@pytest.mark.parametrize("freq", [1, 2, 3, [1, 4], [2]])
def test_validation_freq_counts_epochs_from_1(freq):
    pair = mlp().compile("mse")
    pair.assert_same_fit(*regression(), validation_data=regression(1), validation_freq=freq, epochs=4)


def test_validation_freq_with_initial_epoch():
    pair = mlp().compile("mse")
    pair.assert_same_fit(*regression(), validation_split=0.3, validation_freq=2, initial_epoch=1, epochs=4)


def test_validation_freq_and_steps_may_be_numpy_integers():
    options = {"validation_freq": list(np.arange(1, 3)), "steps_per_epoch": np.int64(2), "epochs": 2}
    mlp().compile("mse").assert_same_fit(*regression(), validation_split=0.2, **options)


@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_validation_steps_start_each_validation_anew(steps):
    pair = mlp().compile("mse")
    pair.assert_same_fit(*regression(), validation_data=regression(1), validation_steps=steps, epochs=3)


@pytest.mark.parametrize("size", [None, 7, 100])
def test_validation_batch_size_changes_no_value(size):
    pair = mlp().compile("mse")
    pair.assert_same_fit(*regression(), validation_data=regression(1), validation_batch_size=size, epochs=2)


@pytest.mark.parametrize("samples", [10, 11, 33])
@pytest.mark.parametrize("split", [0.1, 0.15, 0.33, 0.5, 0.8])
def test_the_rounding_of_validation_split_is_that_of_keras(samples, split):
    mlp().compile("mse").assert_same_fit(*regression(samples=samples), validation_split=split)


# Weighted metrics.


@pytest.mark.parametrize("metrics", [[], ["mae"]], ids=["alone", "beside the same unweighted"])
def test_weighted_metrics_have_keras_values_and_names(metrics):
    x, y = regression()
    pair = mlp().compile("mse", metrics=metrics, weighted=["mae", "mse"])
    history = pair.assert_same_fit(x, y, sample_weight=weights(), epochs=2, validation_data=(x, y, weights()))
    assert ("weighted_mae" in history.history) == bool(metrics)


def test_weighted_accuracy_counts_by_class_weight_as_keras_does():
    pair = mlp(3).compile("sparse_categorical_crossentropy", weighted=["accuracy"])
    pair.assert_same_fit(*classes(), class_weight={0: 1.0, 1: 5.0, 2: 0.5}, epochs=2)
