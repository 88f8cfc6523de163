"""`evaluate`, `predict`, the verbs on one batch, several inputs and outputs: values, order and structure of Keras."""

import keras
import numpy as np
import pytest
import torch
from keras_twins import BATCH, CLOSE, MARKS, SAMPLES, Twins, classes, copy_weights, labels, mlp, regression, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = MARKS


def _both(pair, verb, *arguments, **options):
    return [getattr(model, verb)(*arguments, **options) for model in (pair.keras, pair.torch)]


def _assert_same(theirs, ours):
    """Equal in structure, type and value; Keras's own order of keys, the alphabet, is not asked for."""
    assert type(ours) is type(theirs)
    assert ours == pytest.approx(theirs, **CLOSE)


def _assert_same_arrays(theirs, ours):
    keras.tree.assert_same_structure(theirs, ours)
    for their_array, our_array in zip(keras.tree.flatten(theirs), keras.tree.flatten(ours), strict=True):
        assert isinstance(our_array, np.ndarray) and our_array.dtype == their_array.dtype
        np.testing.assert_allclose(our_array, their_array, rtol=1e-5, atol=1e-5)


# evaluate.


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("metrics", [[], ["mae"], ["mse", "mae"]])
def test_evaluate_returns_a_float_a_list_or_a_dict_as_keras_does(metrics, return_dict):
    pair = mlp().compile("huber", metrics=metrics)
    _assert_same(*_both(pair, "evaluate", *regression(), verbose=0, return_dict=return_dict))


@pytest.mark.parametrize("options", [{}, {"batch_size": 7}, {"batch_size": 7, "steps": 3}])
def test_evaluate_has_the_values_of_keras_whatever_the_batches(options):
    pair = mlp().compile("mse", metrics=["mae"])
    _assert_same(*_both(pair, "evaluate", *regression(), verbose=0, **options))


def test_evaluate_weighs_the_loss_and_not_the_metrics():
    pair = mlp().compile("mse", metrics=["mae"])
    _assert_same(*_both(pair, "evaluate", *regression(), sample_weight=weights(), verbose=0, return_dict=True))


def test_evaluate_takes_loaders_and_generators():
    x, y = regression()
    batches = [(x[:BATCH], y[:BATCH]), (x[BATCH:], y[BATCH:])]
    pair = mlp().compile("mse", metrics=["mae"])
    theirs = pair.keras.evaluate(x, y, verbose=0)
    for data in (batches, iter(batches), DataLoader(TensorDataset(*map(torch.tensor, (x, y))), BATCH), lambda: batches):
        _assert_same(theirs, pair.torch.evaluate(data, verbose=0))
    _assert_same(*_both(pair, "evaluate", DataLoader(TensorDataset(*map(torch.tensor, (x, y))), BATCH), verbose=0))


def test_steps_of_a_generator_leave_the_rest_in_it():
    x, y = regression()
    rows = iter([(x[start : start + 10], y[start : start + 10]) for start in range(0, SAMPLES, 10)])
    pair = mlp().compile("mse")
    assert pair.torch.evaluate(rows, steps=3, verbose=0) == pytest.approx(
        pair.keras.evaluate(x[:30], y[:30], verbose=0), **CLOSE
    )
    assert pair.torch.evaluate(rows, verbose=0) == pytest.approx(
        pair.keras.evaluate(x[30:], y[30:], verbose=0), **CLOSE
    )


# One batch.


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("metrics", [[], ["mae"]])
@pytest.mark.parametrize("verb", ["train_on_batch", "test_on_batch"])
def test_a_batch_has_its_own_values_and_those_of_before_the_update(verb, metrics, return_dict):
    x, y = regression()
    pair = mlp().compile("mse", metrics=metrics)
    for rows in (slice(0, 20), slice(20, 27), slice(27, 28)):  # each batch alone, nothing carried over
        _assert_same(*_both(pair, verb, x[rows], y[rows], return_dict=return_dict))
    pair.assert_same_weights()


@pytest.mark.parametrize("verb", ["train_on_batch", "test_on_batch"])
def test_a_batch_is_weighted_by_sample(verb):
    pair = mlp().compile("mse", metrics=["mae"])
    _assert_same(*_both(pair, verb, *regression(), sample_weight=weights()))
    pair.assert_same_weights()


def test_a_batch_is_weighted_by_class():
    pair = mlp(3).compile("sparse_categorical_crossentropy")
    for _ in range(2):
        _assert_same(*_both(pair, "train_on_batch", *classes(), class_weight={0: 1.0, 1: 3.0, 2: 0.5}))
    pair.assert_same_weights()


def test_train_on_batch_and_fit_share_the_optimizer():
    pair = mlp().compile("mse", optimizer="adam", lr=0.01)
    pair.fit(*regression(), epochs=2)
    _both(pair, "train_on_batch", *regression(1))
    pair.assert_same_fit(*regression(), epochs=2)


def test_predict_on_batch_is_what_keras_returns():
    _assert_same_arrays(*_both(mlp(3), "predict_on_batch", regression()[0]))


# predict.


@pytest.mark.parametrize("options", [{}, {"batch_size": 7}, {"batch_size": 7, "steps": 3}])
def test_predict_keeps_the_order_of_the_input(options):
    _assert_same_arrays(*_both(mlp(3), "predict", regression()[0], verbose=0, **options))


def test_predict_needs_no_compile_and_leaves_the_module_in_its_mode():
    pair = mlp()
    pair.torch.module.train()
    _assert_same_arrays(*_both(pair, "predict", regression()[0], verbose=0))
    assert pair.torch.module.training


def test_predict_leaves_the_targets_of_a_loader_aside():
    x, y = regression()
    pair = mlp()
    loader = DataLoader(TensorDataset(torch.tensor(x), torch.tensor(y)), BATCH)
    np.testing.assert_allclose(
        pair.torch.predict(loader, verbose=0).numpy(), pair.keras.predict(x, verbose=0), rtol=1e-5, atol=1e-5
    )


# Several inputs.


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


def _adds(as_dict):
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    output = keras.layers.Add()([keras.layers.Dense(2)(left), keras.layers.Dense(2)(right)])
    module, model = Adds(), keras.Model({"left": left, "right": right} if as_dict else (left, right), output)
    copy_weights(module, model)
    return Twins(model, module)


INPUTS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"left": a, "right": b},
    "dict in another order": lambda a, b: {"right": b, "left": a},
}


@pytest.mark.parametrize("form", INPUTS)
def test_several_inputs_have_keras_values(form):
    torch.manual_seed(0)
    (a, y), (b, _) = regression(0, outputs=2), regression(1)
    pair, x = _adds(form.startswith("dict")).compile("mse", metrics=["mae"]), INPUTS[form](a, b)
    pair.assert_same_fit(x, y, epochs=2, validation_split=0.2, sample_weight=weights())
    _assert_same(*_both(pair, "evaluate", x, y, verbose=0))
    _assert_same_arrays(*_both(pair, "predict", x, verbose=0))
    _assert_same(*_both(pair, "train_on_batch", x, y))
    _assert_same(*_both(pair, "test_on_batch", x, y))
    _assert_same_arrays(*_both(pair, "predict_on_batch", x))


# Several outputs.


class Heads(nn.Module):
    """A regression and a classification; in the alphabet, Keras's order of metrics, the second comes first."""

    def __init__(self, form):
        super().__init__()
        self.body, self.b_value, self.a_class = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 3)
        self.form = form

    def forward(self, x):
        hidden = self.body(x).tanh()
        value, logits = self.b_value(hidden), self.a_class(hidden)
        return {"b_value": value, "a_class": logits} if self.form is dict else self.form((value, logits))


def _heads(form):
    torch.manual_seed(0)
    x = keras.Input((4,))
    hidden = keras.layers.Activation("tanh")(keras.layers.Dense(8)(x))
    outputs = {"b_value": keras.layers.Dense(1, name="b_value")(hidden)}
    outputs["a_class"] = keras.layers.Dense(3, name="a_class")(hidden)
    module = Heads(form)
    model = keras.Model(x, outputs if form is dict else form(outputs.values()))
    weighted = {layer.name: layer for layer in model.layers if layer.weights}
    for name, layer in weighted.items():
        part = getattr(module, name, module.body)
        layer.set_weights([part.weight.detach().numpy().T, part.bias.detach().numpy()])
    return Twins(model, module)


def _targets(form=dict):
    value, index = regression()[1], classes()[1]
    return {"b_value": value, "a_class": index} if form is dict else form((value, index))


LOSS = {"b_value": "mse", "a_class": "sparse_categorical_crossentropy"}
METRICS = {"b_value": ["mae", "mse"], "a_class": ["accuracy"]}


def _compile_heads(pair, **options):
    pair.assert_same_weights = lambda: None  # by name above, not in the order of the module
    return pair.compile(LOSS, **options)


def test_a_dict_of_outputs_has_keras_history_and_evaluate_keras_order():
    x, y, pair = regression()[0], _targets(), _compile_heads(_heads(dict), metrics=METRICS)
    ours = pair.assert_same_fit(x, y, epochs=3, validation_split=0.2)
    assert set(ours.history) >= {"loss", "a_class_loss", "b_value_loss", "a_class_accuracy", "b_value_mae", "val_loss"}
    _assert_same(*_both(pair, "evaluate", x, y, verbose=0))
    _assert_same(*_both(pair, "evaluate", x, y, verbose=0, return_dict=True))
    _assert_same_arrays(*_both(pair, "predict", x, verbose=0))
    _assert_same_arrays(*_both(pair, "predict_on_batch", x))
    _assert_same(*_both(pair, "train_on_batch", x, y))
    _assert_same(*_both(pair, "test_on_batch", x, y))


def test_the_order_of_the_losses_is_that_of_the_dict_given_and_that_of_metrics_the_alphabet():
    pair = _compile_heads(_heads(dict), metrics=METRICS)
    x, y = regression()[0], _targets()
    assert list(pair.torch.evaluate(x, y, verbose=0, return_dict=True)) == [
        "loss", "b_value_loss", "a_class_loss", "a_class_accuracy", "b_value_mae", "b_value_mse",
    ]  # fmt: skip


def test_loss_weights_count_in_the_sum_and_not_in_the_parts():
    pair = _compile_heads(_heads(dict), loss_weights={"b_value": 0.25, "a_class": 2.0})
    history = pair.assert_same_fit(regression()[0], _targets(), epochs=2).history
    assert history["loss"] == pytest.approx(
        [0.25 * b + 2.0 * a for a, b in zip(history["a_class_loss"], history["b_value_loss"], strict=True)]
    )


def test_a_weight_of_each_sample_counts_for_every_output():
    pair = _compile_heads(_heads(dict), metrics=METRICS)
    # Keras takes one weight for each output, or one for all only where outputs are a list.
    both = {name: weights() for name in LOSS}
    theirs = pair.keras.fit(regression()[0], _targets(), sample_weight=both, batch_size=BATCH, shuffle=False, verbose=0)
    ours = pair.torch.fit(
        regression()[0], _targets(), sample_weight=weights(), batch_size=BATCH, shuffle=False, verbose=0
    )
    assert ours.history == {name: pytest.approx(values, **CLOSE) for name, values in theirs.history.items()}


def test_every_output_may_have_weights_of_its_own():
    pair = _compile_heads(_heads(dict), metrics=METRICS)
    weight = {"b_value": weights(), "a_class": weights()[::-1].copy()}
    pair.assert_same_fit(regression()[0], _targets(), sample_weight=weight, epochs=2)
    _assert_same(*_both(pair, "evaluate", regression()[0], _targets(), sample_weight=weight, verbose=0))


@pytest.mark.parametrize("form", [tuple, list])
def test_a_tuple_or_list_of_outputs_has_keras_values_under_numbered_names(form):
    x, y, pair = regression()[0], _targets(form), _heads(form)
    pair.compile(list(LOSS.values()), metrics=list(METRICS.values()), loss_weights=[0.5, 1.0])
    theirs, ours = pair.fit(x, y, epochs=2, validation_split=0.2)
    names = {"b_value": "output_1", "a_class": "output_2"}  # a torch module does not name its outputs

    def renamed(name):
        for their_name, our_name in names.items():
            name = name.replace(their_name, our_name)
        return name

    assert ours.history == {renamed(name): pytest.approx(values, **CLOSE) for name, values in theirs.history.items()}
    _assert_same_arrays(*_both(pair, "predict", x, verbose=0))


def test_binary_labels_take_logits_in_every_verb():
    pair = mlp().compile("binary_crossentropy")
    _assert_same(*_both(pair, "train_on_batch", *labels()))
    _assert_same(*_both(pair, "evaluate", *labels(), verbose=0))
