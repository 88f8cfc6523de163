"""The verbs: what they return, what they remember, and the mistakes they refuse before anything has changed."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from tests import reference

X, Y = torch.rand(40, 3), torch.rand(40, 1)
CLASSES = torch.randint(0, 4, (40,))


@pytest.fixture
def model(classifier):
    return kt.Model(classifier).compile("adam", "cross_entropy", metrics=["accuracy"])


# Results.


def test_compile_returns_the_model_so_that_everything_is_one_line(regressor, diabetes):
    assert isinstance(kt.Model(regressor).compile("adam", "mse").fit(*diabetes, verbose=0), kt.History)


def test_the_arguments_past_the_first_two_are_keywords():
    for verb in (kt.Model.compile, kt.Model.fit, kt.Model.evaluate, kt.Model.train_on_batch, kt.Model.test_on_batch):
        kinds = [parameter.kind for parameter in inspect.signature(verb).parameters.values()]
        assert set(kinds[3:]) == {inspect.Parameter.KEYWORD_ONLY}


def test_evaluate_returns_a_float_a_list_or_a_dict_as_keras_does(classifier, digits):
    x, y = digits
    without = kt.Model(classifier).compile("sgd", "cross_entropy")
    loss = reference.mean_loss(classifier, x, y, F.cross_entropy)
    assert isinstance(without.evaluate(x, y, verbose=0), float)
    assert without.evaluate(x, y, verbose=0) == pytest.approx(loss, abs=1e-6)
    assert without.evaluate(x, y, return_dict=True, verbose=0) == {"loss": pytest.approx(loss, abs=1e-6)}
    accuracy = (classifier(x).argmax(1) == y).float().mean().item()
    both = kt.Model(classifier).compile("sgd", "cross_entropy", metrics=["accuracy"])
    assert both.evaluate(x, y, verbose=0) == pytest.approx([loss, accuracy], abs=1e-6)
    assert list(both.evaluate(x, y, return_dict=True, verbose=0)) == ["loss", "accuracy"]


def test_evaluate_gives_the_last_short_batch_its_share_only(classifier, digits):
    x, y = digits
    loss = reference.mean_loss(classifier, x, y, F.cross_entropy)
    model = kt.Model(classifier).compile("sgd", "cross_entropy")
    for batch_size in (1, 7, 149, 150, 1000):
        assert model.evaluate(x, y, batch_size=batch_size, verbose=0) == pytest.approx(loss, abs=1e-6)


def test_train_on_batch_returns_the_values_before_its_update(classifier, digits):
    x, y = digits
    expected, losses = reference.train(
        classifier,
        lambda epoch: [(x, y)],
        lambda parameters: torch.optim.Adam(parameters, fused=True),
        F.cross_entropy,
        epochs=3,
    )
    model = kt.Model(classifier).compile("adam", "cross_entropy", metrics=["accuracy"])
    got = [model.train_on_batch(x, y) for _ in range(3)]
    assert [loss for loss, _ in got] == pytest.approx(losses, abs=1e-6)
    assert reference.same_weights(classifier, expected)
    assert set(model.train_on_batch(x, y, return_dict=True)) == {"loss", "accuracy"}


def test_train_on_batch_heeds_weights(classifier, digits):
    x, y = digits
    weight = torch.linspace(0, 2, len(x))
    each = F.cross_entropy(classifier(x), y, reduction="none")
    model = kt.Model(classifier).compile("sgd", "cross_entropy", lr=0.0)
    assert model.train_on_batch(x, y, sample_weight=weight) == pytest.approx((each * weight).mean().item(), abs=1e-6)
    doubled = torch.where(y == 1, 2.0, 1.0)
    assert model.train_on_batch(x, y, class_weight={1: 2.0}) == pytest.approx((each * doubled).mean().item(), abs=1e-6)
    assert model.test_on_batch(x, y, sample_weight=weight) == pytest.approx((each * weight).mean().item(), abs=1e-6)


def test_test_on_batch_and_predict_on_batch_change_nothing(digits):
    net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 10))
    before = copy.deepcopy(net)
    model = kt.Model(net).compile("adam", "cross_entropy")
    x, y = digits
    assert model.test_on_batch(x, y) == pytest.approx(reference.mean_loss(net, x, y, F.cross_entropy), abs=1e-6)
    assert torch.equal(model.predict_on_batch(x), before.eval()(x))
    assert isinstance(model.predict_on_batch(x.numpy()), np.ndarray)
    assert reference.same_weights(net, before)


def test_calling_the_model_runs_the_module_in_eval_mode_without_grad(digits):
    net = nn.Sequential(nn.Linear(64, 16), nn.Dropout(), nn.Linear(16, 10))
    output = kt.Model(net)(digits[0])
    assert not output.requires_grad and net.training
    assert torch.equal(output, copy.deepcopy(net).eval()(digits[0]))


def test_predictions_are_detached_and_on_the_cpu(model, digits):
    output = model.predict(digits[0], verbose=0)
    assert output.device.type == "cpu" and not output.requires_grad


def test_predict_needs_no_compile(classifier, digits):
    assert kt.Model(classifier).predict(digits[0], verbose=0).shape == (150, 10)


# Memory of what was before.


def test_a_second_fit_goes_on_and_a_second_compile_starts_over(classifier, digits):
    twin = copy.deepcopy(classifier)
    at_once = kt.Model(twin).compile("adam", "cross_entropy")
    in_two = kt.Model(classifier).compile("adam", "cross_entropy")
    losses = at_once.fit(*digits, epochs=4, verbose=0).history["loss"]
    first = in_two.fit(*digits, epochs=2, verbose=0).history["loss"]
    second = in_two.fit(*digits, epochs=2, verbose=0).history["loss"]
    assert first + second == losses and reference.same_weights(classifier, twin)
    optimizer = in_two.optimizer
    in_two.compile("adam", "cross_entropy")
    assert in_two.optimizer is not optimizer and not in_two.optimizer.state


def test_initial_epoch_counts_and_orders_as_if_the_run_went_on(classifier, digits):
    twin = copy.deepcopy(classifier)
    kt.Model(twin).compile("sgd", "cross_entropy").fit(*digits, epochs=3, verbose=0)
    model = kt.Model(classifier).compile("sgd", "cross_entropy")
    model.fit(*digits, epochs=1, verbose=0)
    history = model.fit(*digits, epochs=3, initial_epoch=1, verbose=0)
    assert history.epoch == [1, 2] and reference.same_weights(classifier, twin)


def test_a_fresh_model_with_an_initial_epoch_takes_the_order_of_that_epoch(classifier, digits):
    twin = copy.deepcopy(classifier)
    late = kt.Model(twin).compile("sgd", "cross_entropy")
    late.epochs_trained = 2
    late.fit(*digits, verbose=0)
    kt.Model(classifier).compile("sgd", "cross_entropy").fit(*digits, epochs=3, initial_epoch=2, verbose=0)
    assert reference.same_weights(classifier, twin)


def test_history_is_also_the_models(model, digits):
    history = model.fit(*digits, epochs=2, verbose=0)
    assert model.history is history
    assert history.params == {"verbose": 0, "epochs": 2, "steps": 5}


def test_evaluating_in_a_callback_disturbs_neither_weights_nor_logs(classifier, digits):
    class Evaluate(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.evaluate(*digits, verbose=0)
            self.model.predict(digits[0], verbose=0)

    twin = copy.deepcopy(classifier)
    quiet = kt.Model(twin).compile("adam", "cross_entropy", metrics=["accuracy", "f1"])
    busy = kt.Model(classifier).compile("adam", "cross_entropy", metrics=["accuracy", "f1"])
    expected = quiet.fit(*digits, epochs=2, verbose=0)
    history = busy.fit(*digits, epochs=2, callbacks=Evaluate(), verbose=0)
    assert history.history == expected.history and reference.same_weights(classifier, twin)


def test_get_and_set_weights_go_round(model, digits):
    before = model.get_weights()
    model.fit(*digits, verbose=0)
    model.set_weights(before)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    with pytest.raises(ValueError, match="weights has 1 arrays, expected 4"):
        model.set_weights(before[:1])


# Modules of other kinds.


def test_lazy_modules_get_their_parameters_from_the_first_batch(digits):
    net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(10))
    model = kt.Model(net).compile("adam", "cross_entropy", metrics=["accuracy"])
    assert model.optimizer is None
    model.fit(iter([digits, digits]), verbose=0)
    assert net[0].weight.shape == (16, 64) and len(model.optimizer.state) == 6
    assert int(net[2].num_batches_tracked) == 2, "the look at the first batch left no trace, and lost no batch"


def test_a_module_without_parameters_can_be_evaluated_but_not_trained():
    model = kt.Model(nn.Identity()).compile("adam", "mse")
    assert model.evaluate(torch.ones(4, 1), torch.zeros(4, 1), verbose=0) == 1.0
    with pytest.raises(ValueError, match="no trainable parameters"):
        model.fit(torch.ones(4, 1), torch.zeros(4, 1), verbose=0)


def test_a_module_may_compute_its_own_loss(diabetes):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(10, 1)

        def forward(self, x, y=None):
            return {"loss": F.mse_loss(self.head(x), y)} if y is not None else self.head(x)

    x, y = diabetes
    net = Own()
    expected, losses = reference.train(
        net.head,
        lambda epoch: reference.cut(x, y, 32),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3, fused=True),
        F.mse_loss,
        epochs=2,
    )
    forms = [({"data": (x, y)}), ({"data": {"x": x, "y": y}}), ({"data": DataLoader(TensorDataset(x, y), 32)})]
    for form in forms:
        twin = copy.deepcopy(net)
        history = kt.Model(twin).compile("sgd").fit(**form, epochs=2, shuffle=False, verbose=0)
        assert history.history["loss"] == pytest.approx(losses, abs=1e-6)
        assert reference.same_weights(twin.head, expected)


def test_weights_that_only_the_module_could_heed_are_refused():
    class Own(nn.Linear):
        def forward(self, x, y):
            return F.mse_loss(super().forward(x), y)

    model = kt.Model(Own(3, 1)).compile("sgd")
    with pytest.raises(ValueError, match="with loss=None the module computes its loss itself"):
        model.fit(X, Y, sample_weight=torch.ones(40), verbose=0)


# Mistakes. Each is one error, and afterwards the model is as it was.

MISTAKES = {
    "epochs zero": ({"epochs": 0}, ValueError, "epochs=0 is less than 1"),
    "epochs negative": ({"epochs": -2}, ValueError, "epochs=-2 is less than 1"),
    "epochs float": ({"epochs": 2.0}, TypeError, "epochs=2.0 is a float"),
    "batch size zero": ({"batch_size": 0}, ValueError, "batch_size=0 is less than 1"),
    "batch size negative": ({"batch_size": -1}, ValueError, "batch_size=-1 is less than 1"),
    "batch size text": ({"batch_size": "32"}, TypeError, "batch_size='32' is a str"),
    "steps zero": ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch=0"),
    "validation steps": ({"validation_steps": -1}, ValueError, "validation_steps=-1"),
    "split of one": ({"validation_split": 1.0}, ValueError, "validation_split=1.0 is not a fraction"),
    "split above one": ({"validation_split": 1.2}, ValueError, "up to but not including 1"),
    "split below zero": ({"validation_split": -0.1}, ValueError, "validation_split=-0.1"),
    "split that leaves nothing": ({"validation_split": 0.99}, ValueError, "leaves none for training"),
    "freq zero": ({"validation_freq": 0}, ValueError, "validation_freq=0"),
    "initial epoch": ({"initial_epoch": -1}, ValueError, "initial_epoch=-1"),
    "verbose": ({"verbose": 3}, ValueError, "verbose=3"),
    "class weight": ({"class_weight": [1.0, 2.0]}, ValueError, "class_weight="),
    "callback class": ({"callbacks": [kt.Callback]}, TypeError, "Callback is a class, expected an instance"),
    "callback function": ({"callbacks": [print]}, TypeError, "without a single hook"),
    "sample weight length": ({"sample_weight": torch.ones(39)}, ValueError, "sample_weight has 39 samples"),
    "validation lengths": ({"validation_data": (X, Y[:5])}, ValueError, "x has 40 samples, y has 5 samples"),
    "validation shape": ({"validation_data": (X, Y[:, 0])}, ValueError, "validation targets y have shape"),
    "unknown argument": ({"epoch": 3}, TypeError, "unexpected keyword argument 'epoch'"),
}


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_argument_of_fit_is_one_clear_error(options, error, message):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    before, drawn = copy.deepcopy(net), torch.get_rng_state()
    model = kt.Model(net).compile("adam", "mse")
    with pytest.raises(error, match=message):
        model.fit(X, Y, **({"verbose": 0} | options))
    assert reference.same_weights(net, before) and not model.optimizer.state
    assert torch.equal(torch.get_rng_state(), drawn) and model.history is None


class Monitor(kt.Callback):
    def __init__(self, monitor):
        self.monitor = monitor

    def on_epoch_end(self, epoch, logs=None):
        """Looks at `logs[self.monitor]`, say."""


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ("acuracy", "the logs will have loss, accuracy.*Did you mean 'accuracy'"),
        ("val_loss", "val_ names need validation_data"),
        ("f1", "add the metric to compile"),
    ],
)
def test_an_unknown_monitor_is_refused_before_training(model, digits, monitor, message):
    with pytest.raises(ValueError, match=message):
        model.fit(*digits, callbacks=Monitor(monitor), verbose=0)
    assert not model.optimizer.state


def test_a_known_monitor_is_not_nor_one_that_an_earlier_callback_may_log(model, digits):
    model.fit(*digits, callbacks=[Monitor("val_accuracy")], validation_split=0.1, verbose=0)
    model.fit(*digits, callbacks=[Monitor("loss"), Monitor("of the first one's making")], verbose=0)


BAD_TARGETS = {
    "mse one dim less": (
        "mse",
        1,
        Y[:, 0],
        r"output has shape \(32, 1\) but target has shape \(32,\).*Try y\[:, None\]",
    ),
    "mse one dim more": ("mse", 1, Y[:, :, None], r"target has shape \(32, 1, 1\)"),
    "classes with a dim of one": ("cross_entropy", 4, CLASSES[:, None], r"try target.squeeze\(1\)"),
    "classes as text": ("cross_entropy", 4, np.array(list("abcd") * 10), "expected numbers"),
    "class too high, in the last row": (
        "cross_entropy",
        4,
        torch.cat([CLASSES[:39], torch.tensor([4])]),
        "from 0 to 4",
    ),
    "class below zero": ("cross_entropy", 4, CLASSES - 1, "from -1 to"),
    "floats as classes": ("cross_entropy", 4, torch.rand(40), "are no class indices"),
    "no probabilities": ("cross_entropy", 4, torch.rand(40, 4), "neither class indices nor probabilities"),
    "wrong width": (
        "bce_with_logits",
        4,
        torch.ones(40, 3),
        r"output has shape \(32, 4\) but target has shape \(32, 3\)",
    ),
}


@pytest.mark.parametrize(("loss", "outputs", "target", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_targets_that_do_not_fit_the_output_are_refused_before_any_update(loss, outputs, target, message):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, outputs))
    before, drawn = copy.deepcopy(net), torch.get_rng_state()
    model = kt.Model(net).compile("adam", loss)
    for verb in (model.fit, model.evaluate, model.train_on_batch):
        with pytest.raises((ValueError, TypeError), match=message if verb == model.fit else None):
            verb(X, target, **({} if verb == model.train_on_batch else {"verbose": 0}))
        assert reference.same_weights(net, before), "not even running statistics have moved"
        assert torch.equal(torch.get_rng_state(), drawn) and not model.optimizer.state and net.training
        assert all(parameter.grad is None for parameter in net.parameters())


def test_validation_targets_out_of_range_are_refused_before_training():
    model = kt.Model(nn.Linear(3, 4)).compile("adam", "cross_entropy")
    with pytest.raises(ValueError, match="from 0 to 7"):
        model.fit(X, CLASSES, validation_data=(X[:2], torch.tensor([0, 7])), verbose=0)
    assert not model.optimizer.state


def test_verbs_before_compile_say_so(classifier, digits):
    model = kt.Model(classifier)
    for verb in (model.fit, model.evaluate, model.train_on_batch, model.test_on_batch):
        with pytest.raises(RuntimeError, match=f"{verb.__name__} was called before compile"):
            verb(*digits)


def test_a_failed_compile_leaves_the_old_one_in_place(model, digits):
    optimizer = model.optimizer
    bad = [
        {"optimizer": "adan"},
        {"loss": "mze"},
        {"loss": "mse", "metrics": ["acuracy"]},
        {"loss": "mse", "lr": -1.0},
        {"loss": "mse", "optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)},
    ]
    for arguments in bad:
        with pytest.raises(ValueError):
            model.compile(**arguments)
    assert model.optimizer is optimizer
    assert list(model.fit(*digits, verbose=0).history) == ["loss", "accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "adan"}, "Did you mean 'adam'"),
        ({"loss": "cross_entrpy"}, "Did you mean 'cross_entropy'"),
        ({"loss": "mse", "metrics": ["acuracy"]}, "Did you mean 'accuracy'"),
        ({"loss": "mse", "metrics": "r3"}, "'r2'"),
    ],
)
def test_a_wrong_name_lists_the_close_ones(classifier, arguments, message):
    with pytest.raises(ValueError, match=message):
        kt.Model(classifier).compile(**arguments)


def test_something_else_than_a_module_is_refused():
    with pytest.raises(TypeError, match="module is a function, expected a torch.nn.Module"):
        kt.Model(lambda x: x)


def test_an_optimizer_may_be_a_name_a_class_a_partial_an_instance_or_a_function(classifier, digits):
    expected, _ = reference.train(
        classifier,
        lambda epoch: reference.cut(*digits, 50),
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
        F.cross_entropy,
        epochs=2,
    )
    momentum = functools.partial(torch.optim.SGD, momentum=0.9)
    choices = [
        lambda net: {"optimizer": momentum, "lr": 0.05},
        lambda net: {"optimizer": functools.partial(momentum, lr=0.05)},
        lambda net: {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True)},
        lambda net: {"optimizer": torch.optim.SGD(net.parameters(), lr=0.7, momentum=0.9, fused=True), "lr": 0.05},
    ]
    for choose in choices:
        net = copy.deepcopy(classifier)
        model = kt.Model(net).compile(**choose(net), loss="cross_entropy")
        model.fit(*digits, epochs=2, batch_size=50, shuffle=False, verbose=0)
        assert reference.same_weights(net, expected)


def test_nothing_is_warned_of_in_an_ordinary_run(model, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(*digits, validation_split=0.2, verbose=0)
        model.evaluate(*digits, verbose=0)
        model.predict(digits[0], verbose=0)


def test_the_summary_is_printed_and_returned(model, capsys):
    summary = model.summary((32, 64))
    assert capsys.readouterr().out.strip() == str(summary).strip()
    assert summary.total_parameters == 64 * 16 + 16 + 16 * 10 + 10
    model.summary((32, 64), verbose=0)
    assert capsys.readouterr().out == ""


def test_memory_stays_flat_over_many_fits_and_predictions(model, digits):
    import gc

    def live_tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def use():
        model.fit(*digits, verbose=0)
        model.predict(digits[0], verbose=0)
        model.evaluate(*digits, verbose=0)

    use()
    before = live_tensors()
    for _ in range(20):
        use()
    assert live_tensors() <= before + 2


# What goes on in a run, or went on before it, leaves no trace in it.


def masked(digits):
    x, y = digits[0].double(), digits[1].clone()
    y[torch.arange(len(y)) % 7 > 2] = -100
    y[:40] = -100
    y[3] = 1
    return x, y


def close(first, second) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("verb", ["evaluate", "test_on_batch", "predict"])
def test_what_a_callback_measures_leaves_masks_and_windows_as_they_are(classifier, digits, verb):
    class Measures(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if verb == "predict":
                self.model.predict(digits[0][:20].double(), verbose=0)
            else:
                options = {"verbose": 0} if verb == "evaluate" else {}
                getattr(self.model, verb)(digits[0][:20].double(), digits[1][:20], **options)

    nets = [classifier.double(), copy.deepcopy(classifier).double()]
    for net, callbacks in zip(nets, ([Measures()], []), strict=True):
        model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", lr=0.5)
        model.fit(*masked(digits), batch_size=10, accumulate=4, epochs=2, callbacks=callbacks, verbose=0)
    assert close(*nets)


def test_a_batch_that_a_callback_trains_on_leaves_the_open_window_as_it_is(digits):
    """At a rate of 0 it changes nothing but what it must not."""

    class Trains(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            group = self.model.optimizer.param_groups[0]
            rate, group["lr"] = group["lr"], 0.0
            self.model.train_on_batch(digits[0][:20].double(), digits[1][:20])
            group["lr"] = rate

    net = nn.Linear(64, 10).double()
    nets = [net, copy.deepcopy(net)]
    for one, callbacks in zip(nets, ([Trains()], []), strict=True):
        model = kt.Model(one, backend="cpu").compile("sgd", "cross_entropy", lr=0.5)
        model.fit(*masked(digits), batch_size=10, accumulate=4, callbacks=callbacks, verbose=0)
    assert close(*nets)


def test_gradients_left_by_a_loop_by_hand_are_not_used(classifier, digits):
    twin = copy.deepcopy(classifier)
    F.cross_entropy(classifier(digits[0]), digits[1]).backward()
    for net in (classifier, twin):
        kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", lr=0.5).fit(*digits, verbose=0)
    assert reference.same_weights(classifier, twin)


def test_an_error_in_an_fp16_step_leaves_the_scaler_usable(classifier, digits):
    class Fails(kt.Callback):
        def on_before_optimizer_step(self, optimizer):
            raise RuntimeError("mine")

    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", precision="16")
    with pytest.raises(RuntimeError, match="mine"):
        model.fit(*digits, callbacks=[Fails()], verbose=0)
    assert len(model.fit(*digits, epochs=2, verbose=0).epoch) == 2


def test_a_first_step_that_overflows_starts_momentum_at_zero(classifier, digits):
    """torch's fused step would leave in it what its memory held before."""
    garbage = [torch.full((size,), 1e30) for size in (1024, 160, 16, 10) for _ in range(64)]
    del garbage
    model = kt.Model(classifier, backend="cpu").compile(
        functools.partial(torch.optim.SGD, momentum=0.9),
        lambda output, y: 1e6 * F.cross_entropy(output, y),
        lr=1e-9,
        precision="16",
    )
    model.fit(*digits, batch_size=150, verbose=0)
    assert model.skipped_steps == 1
    states = [state["momentum_buffer"] for state in model.optimizer.state.values()]
    assert states and not any(state.any() for state in states)


def test_an_optimizer_that_has_stepped_follows_the_precision(classifier, digits):
    optimizer = torch.optim.Adam(classifier.parameters())
    model = kt.Model(classifier, backend="cpu")
    for precision, dtype in (
        ("32", torch.float32),
        ("64", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("32", torch.float32),
    ):
        model.compile(optimizer, "cross_entropy", precision=precision).fit(*digits, verbose=0)
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {dtype}


def test_modules_of_several_dtypes_get_each_its_own_back():
    net = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 2))
    before = copy.deepcopy(net)
    model = kt.Model(net, backend="cpu").compile("sgd", "mse", precision="64")
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}
    model.compile("sgd", "mse")
    assert reference.same_weights(net, before)
    assert [parameter.dtype for parameter in net.parameters()] == [parameter.dtype for parameter in before.parameters()]


def test_a_second_compile_with_the_same_instance_starts_from_its_own_rate(classifier, digits):
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    model, rates = kt.Model(classifier, backend="cpu"), []
    for _ in range(3):
        model.compile(optimizer, "cross_entropy", schedule="cosine")
        rates.append(model.fit(*digits, epochs=2, verbose=0).history["lr"])
    assert rates[0] == rates[1] == rates[2]


def test_a_compile_that_is_refused_leaves_loss_and_optimizer_as_they_are(classifier):
    optimizer, loss = torch.optim.SGD(classifier.parameters(), lr=0.1), nn.CrossEntropyLoss(weight=torch.ones(10))
    with pytest.raises(TypeError):
        kt.Model(classifier, backend="cpu").compile(optimizer, loss, lr=0.5, schedule=lambda one: 3, precision="64")
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert loss.weight.dtype == classifier[0].weight.dtype == torch.float32


def test_a_run_that_is_refused_leaves_the_rate_as_it_is(classifier, digits):
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", lr=0.1)
    model.compile("sgd", "cross_entropy", lr=0.1, schedule=kt.schedules.cosine(warmup=3))
    with pytest.raises(ValueError, match="class indices"):
        model.fit(digits[0], digits[1] + 5, verbose=0)
    assert model.optimizer.param_groups[0]["lr"] == 0.1


def test_a_plateau_is_found_in_a_run_without_validation_after_one_with_it(classifier, digits):
    flat = kt.schedules.plateau(patience=0, threshold=10.0, threshold_mode="abs", factor=0.5)
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", lr=0.1, schedule=flat)
    model.fit(*digits, epochs=2, validation_split=0.2, verbose=0)
    rates = model.fit(*digits, epochs=4, verbose=0).history["lr"]
    assert rates[-1] < rates[0]


def test_rates_in_tensors_are_logged_as_they_were(classifier, digits):
    model = kt.Model(classifier, backend="cpu").compile(
        lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.1)), "cross_entropy", schedule="linear"
    )
    rates = model.fit(*digits, epochs=3, verbose=0).history["lr"]
    assert all(type(rate) is float for rate in rates)
    assert rates == pytest.approx([0.1 * (1 - step / 15) for step in (4, 9, 14)], rel=1e-5)


def test_the_rate_is_in_the_logs_from_the_first_batch_on(classifier, digits):
    seen = []

    class Looks(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs["lr"])

    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", lr=0.1, schedule="cosine")
    model.fit(*digits, accumulate=3, callbacks=[Looks()], verbose=0)
    assert seen[:2] == [0.1, 0.1]


def test_a_schedule_over_a_run_cannot_be_changed_to_within_it(classifier, digits):
    class Changes(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.change_schedule("cosine")

    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy")
    with pytest.raises(RuntimeError, match="change_schedule was called outside of fit"):
        model.change_schedule(None)
    with pytest.raises(ValueError, match="change_schedule was given 'cosine', which goes over a whole run"):
        model.fit(*digits, callbacks=[Changes()], verbose=0)


def test_parameters_that_the_optimizer_does_not_have_cannot_be_unfrozen(classifier):
    classifier[0].requires_grad_(False)
    optimizer = torch.optim.SGD(classifier[2].parameters(), lr=0.1)
    model = kt.Model(classifier, backend="cpu").compile(optimizer, "cross_entropy")
    with pytest.raises(ValueError, match="unfreeze was given '0', but the optimizer was made without these"):
        model.unfreeze("0")


def test_class_weights_are_no_half_precision(classifier, digits):
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", lr=0.0, precision="16-true")
    x, y = digits
    heavy = model.fit(x, y, class_weight={0: 1e5}, verbose=0).history["loss"]
    same = model.fit(x, y, sample_weight=torch.where(y == 0, 1e5, 1.0), verbose=0).history["loss"]
    assert heavy == pytest.approx(same)


def test_adafactor_whose_eps_are_two_is_made_in_half_precision(classifier):
    kt.Model(classifier, backend="cpu").compile("adafactor", "cross_entropy", precision="16-true")


def test_a_loss_in_an_object_is_float32_in_half_precision(digits):
    class Result:
        def __init__(self, loss):
            self.loss = loss

    class Net(nn.Linear):
        def forward(self, x, y):
            return Result(F.cross_entropy(super().forward(x), y))

    losses = []

    class Sees(kt.Callback):
        def on_before_backward(self, loss):
            losses.append(loss.dtype)

    model = kt.Model(Net(64, 10), backend="cpu").compile("sgd", precision="bf16-true")
    model.fit(*digits, callbacks=[Sees()], verbose=0)
    assert set(losses) == {torch.float32}


def test_two_averages_cannot_both_be_left_in_the_module(classifier, digits):
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy")
    both = [kt.callbacks.EMA(), kt.callbacks.StochasticWeightAveraging(0.1)]
    with pytest.raises(ValueError, match="EMA and StochasticWeightAveraging would each leave their average"):
        model.fit(*digits, epochs=2, callbacks=both, verbose=0)
