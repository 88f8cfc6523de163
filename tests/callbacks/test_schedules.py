"""ReduceLROnPlateau and LearningRateScheduler: rates by hand, groups, several optimizers, schedules beside them."""

from __future__ import annotations

import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import LearningRateScheduler, ReduceLROnPlateau, StochasticWeightAveraging, Unfreeze
from tests.reference import cut, same_weights

NAN, INF = math.nan, math.inf
cross_entropy = nn.functional.cross_entropy


class Score(kt.Callback):
    """Puts a value into the logs of each epoch."""

    adds_to_logs = ("score",)

    def __init__(self, *values):
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = self.values[epoch]


class Watch(kt.Callback):
    """The rates of all groups in each epoch, at its first optimizer step."""

    def __init__(self):
        self.rates = {}

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_before_optimizer_step(self, optimizer):
        self.rates.setdefault(self.epoch, []).append([float(group["lr"]) for group in optimizer.param_groups])

    def firsts(self):
        return [steps[0][0] for steps in self.rates.values()]


def compiled(net=None, optimizer="sgd", **options):
    net = net or nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10))
    return kt.Model(net, backend="cpu").compile(optimizer, "cross_entropy", **options)


def fit(model, data, *callbacks, **options):
    """The rates in each epoch, as the optimizer had them and as they were logged."""
    watch = Watch()
    options = {"epochs": 4, "batch_size": 50, "verbose": 0} | options
    history = model.fit(*data, callbacks=[*callbacks, watch], **options)
    return watch, history


def plateau(*values, **options):
    return Score(*values), ReduceLROnPlateau("score", **{"factor": 0.5, "patience": 1, "min_delta": 0} | options)


# ReduceLROnPlateau.


@pytest.mark.parametrize(
    ("values", "options", "rates"),
    [
        ([3, 2, 1, 0], {}, [0.8] * 4),
        ([3, 3, 3, 3], {}, [0.8, 0.8, 0.4, 0.2]),
        ([3, 3, 3, 3], {"patience": 0}, [0.8, 0.8, 0.4, 0.2]),
        ([3, 3, 3, 3, 3, 3], {"patience": 2}, [0.8, 0.8, 0.8, 0.4, 0.4, 0.2]),
        ([3, 3, 2, 3, 3, 3], {"patience": 2}, [0.8] * 5 + [0.4]),
        ([3, 3, 3, 3, 3, 3], {"cooldown": 1}, [0.8, 0.8, 0.4, 0.2, 0.1, 0.05]),  # over before it is the next one's turn
        ([3, 3, 3, 3, 3, 3], {"cooldown": 2}, [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]),
        ([1, 2, 3, 3, 2], {"mode": "max"}, [0.8, 0.8, 0.8, 0.8, 0.4]),
        ([3, 2.5, 2, 1.5], {"min_delta": 1}, [0.8, 0.8, 0.4, 0.2]),
        ([3, 3, 3, 3, 3], {"min_lr": 0.3}, [0.8, 0.8, 0.4, 0.3, 0.3]),
        ([3, 3, 3], {"min_lr": 2.0}, [0.8] * 3),
        ([3, 3, 3], {"factor": 0}, [0.8, 0.8, 0.0]),
        ([NAN, 3, 3, NAN], {}, [0.8, 0.8, 0.8, 0.4]),
    ],
)
def test_rates_are_those_that_one_computes_by_hand(digits, values, options, rates):
    watch, history = fit(compiled(lr=0.8), digits, *plateau(*values, **options), epochs=len(values))
    assert watch.firsts() == pytest.approx(rates)
    assert history.history["lr"] == pytest.approx(rates), "logged is what the epoch was trained with"


def test_it_watches_the_validation(digits):
    plateau = ReduceLROnPlateau(factor=0.1, patience=2, min_delta=100)
    watch, _ = fit(compiled(lr=1.0), digits, plateau, validation_data=digits, epochs=10, validation_freq=2)
    assert watch.firsts() == pytest.approx([1.0] * 6 + [0.1] * 4)
    assert (plateau.wait, plateau.cooldown_counter) == (0, 0)


def test_it_reduces_within_an_epoch_after_its_validations(digits):
    plateau = ReduceLROnPlateau(factor=0.5, patience=2, min_delta=0)
    model = compiled(lr=0.8)

    class Validations(kt.Callback):
        """What the loop does with several validations in an epoch."""

        def on_train_batch_end(self, batch, logs=None):
            plateau.on_interval_end(0, {"loss": 1.0, "val_loss": 1.0})

    watch, history = fit(model, digits, Validations(), plateau, batch_size=30, epochs=1, validation_data=digits)
    assert [rate for (rate,) in watch.rates[0]] == [0.8, 0.8, 0.8, 0.4, 0.4]
    assert history.history["lr"] == [0.2]


def test_all_groups_are_reduced_alike(digits):
    model = compiled(lr={"0.weight": 0.8, "0.*": 0.2, "*": 0.1})
    watch, history = fit(model, digits, *plateau(3, 3, 3, 3, min_lr=0.05), epochs=4)
    rates = [steps[0] for steps in watch.rates.values()]
    assert rates == [
        pytest.approx(one) for one in ([0.8, 0.2, 0.1], [0.8, 0.2, 0.1], [0.4, 0.1, 0.05], [0.2, 0.05, 0.05])
    ]
    assert history.history["lr"] == pytest.approx([0.8, 0.8, 0.4, 0.2])


def test_while_any_group_can_be_reduced_the_cooldown_begins_anew():
    model = compiled(lr={"0.*": 0.8, "*": 0.1})
    _, callback = plateau(cooldown=5, min_lr=0.1)
    callback.set_model(model)
    callback.on_train_begin({})
    for epoch, (rates, cooldown, wait) in enumerate(
        [([0.8, 0.1], 0, 0), ([0.4, 0.1], 5, 0), *[([0.4, 0.1], left, 0) for left in (4, 3, 2, 1)]]
        + [([0.2, 0.1], 5, 0), *[([0.2, 0.1], left, 0) for left in (4, 3, 2, 1)], ([0.1, 0.1], 5, 0)]
        + [*[([0.1, 0.1], left, 0) for left in (4, 3, 2, 1)], ([0.1, 0.1], 0, 1), ([0.1, 0.1], 0, 2)]
    ):
        callback.on_epoch_end(epoch, {"score": 1})
        assert [group["lr"] for group in model.optimizer.param_groups] == pytest.approx(rates)
        assert (callback.cooldown_counter, callback.wait) == (cooldown, wait)


@pytest.mark.parametrize("kind", [ReduceLROnPlateau, LearningRateScheduler])
def test_a_rate_in_a_tensor_stays_in_that_tensor(digits, kind):
    optimizer = partial(torch.optim.Adam, lr=torch.tensor(0.8), foreach=False, capturable=False)
    model = compiled(optimizer=optimizer)
    rate = model.optimizer.param_groups[0]["lr"]
    callbacks = plateau(3, 3, 3, 3) if kind is ReduceLROnPlateau else [kind(lambda epoch: (0.8, 0.8, 0.4, 0.2)[epoch])]
    watch, history = fit(model, digits, *callbacks)
    assert model.optimizer.param_groups[0]["lr"] is rate
    assert watch.firsts() == history.history["lr"] == pytest.approx([0.8, 0.8, 0.4, 0.2])


def test_a_tensor_that_cannot_hold_min_lr_exactly_is_not_reduced_for_ever():
    model = compiled(optimizer=partial(torch.optim.Adam, lr=torch.tensor(0.06), foreach=False))
    _, callback = plateau(min_lr=0.05, cooldown=1)  # 0.0500000007 in float32
    callback.set_model(model)
    for epoch in range(6):
        callback.on_epoch_end(epoch, {"score": 1})
    assert callback.wait == 4 and model.optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)


class Pair(kt.Model):
    def train_step(self, batch):
        x, y = batch
        for name in ("first", "second"):
            loss = cross_entropy(self.module[name](x), y)
            self.backward(loss)
            self.optimizer_step(name)
            self.log("loss", loss)


def pair(**options):
    nets = nn.ModuleDict({name: nn.Linear(64, 10) for name in ("first", "second")})
    return Pair(nets, backend="cpu").compile({"first": "sgd", "second": "sgd"}, **options)


def test_several_optimizers_are_reduced_alike(digits, capsys):
    model, (score, callback) = pair(lr={"first": 0.8, "second": 0.1}), plateau(3, 3, 3, 3, min_lr=0.04, verbose=1)
    _, history = fit(model, digits, score, callback)
    assert callback.wait == 0, "one of them was reduced"
    assert history.history["first_lr"] == pytest.approx([0.8, 0.8, 0.4, 0.2])
    assert history.history["second_lr"] == pytest.approx([0.1, 0.1, 0.05, 0.04])
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 2: ReduceLROnPlateau reducing the learning rate of 'first' to 0.4.",
        "Epoch 2: ReduceLROnPlateau reducing the learning rate of 'second' to 0.05.",
        "Epoch 3: ReduceLROnPlateau reducing the learning rate of 'first' to 0.2.",
        "Epoch 3: ReduceLROnPlateau reducing the learning rate of 'second' to 0.04.",
        "Epoch 4: ReduceLROnPlateau reducing the learning rate of 'first' to 0.1.",
    ]


def test_it_is_silent_unless_asked(digits, capsys):
    fit(compiled(lr=0.8), digits, *plateau(3, 3, 3, 3))
    assert capsys.readouterr().out == ""
    fit(compiled(lr=0.8), digits, *plateau(3, 3, 2, 1, verbose=1))
    assert capsys.readouterr().out == "Epoch 2: ReduceLROnPlateau reducing the learning rate to 0.4.\n"


def test_the_same_plateau_starts_anew_in_the_next_run(digits):
    _, callback = plateau()
    for _ in range(2):
        watch, _ = fit(compiled(lr=0.8), digits, Score(3, 3, 3, 2), callback)
        assert watch.firsts() == pytest.approx([0.8, 0.8, 0.4, 0.2])
        assert (callback.best, callback.wait) == (2, 0)


@pytest.mark.parametrize("cut_at", [1, 2, 3, 5])
def test_a_plateau_that_is_resumed_goes_on(digits, cut_at):
    values, options = (3, 3, 4, 4, 2, 3, 3, 3), {"patience": 2, "cooldown": 1}
    whole, _ = fit(compiled(lr=0.8), digits, *plateau(*values, **options), epochs=8)
    assert len(set(whole.firsts())) > 2

    score, first = plateau(*values, **options)
    model = compiled(lr=0.8)
    fit(model, digits, score, first, epochs=cut_at)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    score, second = plateau(*values, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    rest, _ = fit(model, digits, score, second, epochs=8, initial_epoch=cut_at)
    assert rest.firsts() == pytest.approx(whole.firsts()[cut_at:])


def test_groups_that_are_added_are_reduced_too(digits):
    model = compiled(lr=0.8).freeze("0")
    watch, _ = fit(model, digits, Unfreeze(1, "0", 0.08), *plateau(3, 3, 3, 3))
    assert [steps[0] for steps in watch.rates.values()] == [
        pytest.approx(one) for one in ([0.8, 0.08], [0.8, 0.08], [0.4, 0.04], [0.2, 0.02])
    ]


@pytest.mark.parametrize(
    "make",
    [lambda: plateau(3, 3, 3, 3)[1], lambda: LearningRateScheduler(lambda epoch: 0.1)],
    ids=["plateau", "function"],
)
@pytest.mark.parametrize(
    ("schedule", "name"),
    [("cosine", "cosine"), ("plateau", "plateau"), (partial(torch.optim.lr_scheduler.StepLR, step_size=1), "StepLR")],
)
def test_beside_a_compiled_schedule_it_is_refused_before_training(digits, make, schedule, name):
    model, callback = compiled(lr=0.8, schedule=schedule), make()
    before = [parameter.clone() for parameter in model.module.parameters()]
    kind = type(callback).__name__
    with pytest.raises(
        ValueError,
        match=f"{kind} sets the learning rate, and schedule='{name}' of compile sets it too. Leave {kind} out to go by "
        f"the schedule, or leave schedule out of compile to go by {kind}.",
    ):
        fit(model, digits, Score(3, 3, 3, 3), callback)
    assert all(map(torch.equal, before, model.module.parameters()))


def test_beside_one_of_several_optimizers_with_a_schedule_it_is_refused_too(digits):
    model = pair(schedule={"first": None, "second": "cosine"})
    with pytest.raises(ValueError, match="schedule='cosine' of compile sets it too"):
        fit(model, digits, Score(3), ReduceLROnPlateau("score"))


@pytest.mark.parametrize("kind", ["plateau", "function"])
@pytest.mark.parametrize("is_first", [True, False])
def test_once_weights_are_averaged_the_rate_is_the_averages(digits, kind, is_first):
    swa = StochasticWeightAveraging(0.05, 2, annealing_epochs=1)
    ours = plateau(3, 3, 3, 3, 3) if kind == "plateau" else [LearningRateScheduler(lambda epoch: 0.8 / 2**epoch)]
    watch, _ = fit(compiled(lr=0.8), digits, *([swa, *ours] if is_first else [*ours, swa]), epochs=5)
    before = [0.8, 0.8 if kind == "plateau" else 0.4]
    third = watch.firsts()[2]  # the average's way begins at the rate of the moment
    assert watch.firsts() == pytest.approx([*before, third, 0.05, 0.05]) and third > 0.05


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factor": 1}, ValueError, "factor=1 reduces nothing. Give a number from 0 up to but not including 1."),
        ({"factor": 2.0}, ValueError, "factor=2.0 reduces nothing"),
        ({"factor": -0.1}, ValueError, "factor=-0.1 reduces nothing"),
        ({"factor": NAN}, ValueError, "factor=nan is nothing to compare with"),
        ({"factor": "0.1"}, TypeError, "factor='0.1' is a str, expected a number"),
        ({"patience": -1}, ValueError, "patience=-1 is less than 0. Give a whole number from 0 up."),
        ({"patience": 1.5}, TypeError, "patience=1.5 is a float"),
        ({"cooldown": -1}, ValueError, "cooldown=-1 is less than 0"),
        ({"cooldown": 0.5}, TypeError, "cooldown=0.5 is a float"),
        ({"min_lr": -1e-3}, ValueError, "min_lr=-0.001 is not a learning rate. Give a number from 0 up, e.g. 1e-6."),
        ({"min_lr": INF}, ValueError, "min_lr=inf is not a learning rate"),
        ({"min_lr": NAN}, ValueError, "min_lr=nan is nothing to compare with"),
        ({"min_lr": [0.1]}, TypeError, r"min_lr=[0.1] is a list, expected a number"),
        ({"min_delta": -1}, ValueError, "min_delta=-1 is no size of a change"),
        ({"mode": "up"}, ValueError, "mode='up' is not known"),
        ({"monitor": None}, TypeError, "monitor=None is a NoneType"),
        ({"verbose": -1}, ValueError, "verbose=-1 is not known"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options, error, message):
    with pytest.raises(error) as caught:
        ReduceLROnPlateau(**options)
    assert message in str(caught.value)


# LearningRateScheduler.


def test_rates_are_those_that_the_function_returns(digits):
    watch, history = fit(compiled(lr=0.5), digits, LearningRateScheduler(lambda epoch: 0.8 / (epoch + 1)))
    assert watch.firsts() == history.history["lr"] == [0.8, 0.4, 0.8 / 3, 0.2]


def test_the_function_gets_the_rate_of_the_moment(digits):
    seen = []

    def schedule(epoch, lr):
        seen.append((epoch, lr))
        return lr / 2

    watch, _ = fit(compiled(lr=0.8), digits, LearningRateScheduler(schedule), initial_epoch=1)
    assert seen == [(1, 0.8), (2, 0.4), (3, 0.2)] and watch.firsts() == [0.4, 0.2, 0.1]


def test_a_second_argument_with_a_default_is_the_rate_too_as_in_keras(digits):
    watch, _ = fit(compiled(lr=0.8), digits, LearningRateScheduler(lambda epoch, lr=9.0: lr / 2), epochs=2)
    assert watch.firsts() == [0.4, 0.2]


def test_it_is_a_loop_that_sets_the_rate_by_hand(digits):
    net = nn.Linear(64, 10)
    hand = nn.Linear(64, 10)
    hand.load_state_dict(net.state_dict())
    optimizer = torch.optim.SGD(hand.parameters(), lr=9.0, momentum=0.9)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + epoch)
        for x, y in cut(*digits, 50):
            optimizer.zero_grad()
            cross_entropy(hand(x), y).backward()
            optimizer.step()
    model = compiled(net, partial(torch.optim.SGD, momentum=0.9), lr=9.0)
    fit(model, digits, LearningRateScheduler(lambda epoch: 0.1 / (1 + epoch)), epochs=3, shuffle=False)
    assert same_weights(net, hand)


@pytest.mark.parametrize("value", [0.25, np.float32(0.25), np.float64(0.25), torch.tensor([0.25])])
def test_a_rate_is_any_kind_of_number(digits, value):
    watch, _ = fit(compiled(lr=0.5), digits, LearningRateScheduler(lambda epoch: value), epochs=1)
    assert watch.firsts() == [0.25]
    assert type(watch.rates[0][0][0]) is float


def test_a_whole_number_is_a_rate(digits):
    watch, _ = fit(compiled(lr=0.5), digits, LearningRateScheduler(lambda epoch: 0), epochs=1)
    assert watch.firsts() == [0.0]


def test_groups_keep_their_ratios_past_a_rate_of_0_too(digits):
    model = compiled(lr={"0.weight": 0.4, "0.*": 0.2, "*": 0.1})
    rates = (0.8, 0.0, 0.0, 0.4)
    watch, history = fit(model, digits, LearningRateScheduler(lambda epoch: rates[epoch]))
    assert [steps[0] for steps in watch.rates.values()] == [
        pytest.approx(one) for one in ([0.8, 0.4, 0.2], [0.0] * 3, [0.0] * 3, [0.4, 0.2, 0.1])
    ]
    assert history.history["lr"] == [0.8, 0.0, 0.0, 0.4]


@pytest.mark.parametrize("cut_at", [1, 2, 3])
def test_they_keep_them_in_a_run_that_is_resumed(digits, cut_at):
    rates, lr = (0.8, 0.0, 0.0, 0.4), {"0.*": 0.4, "*": 0.1}
    model, first, second = compiled(lr=lr), *(LearningRateScheduler(lambda epoch: rates[epoch]) for _ in range(2))
    fit(model, digits, first, epochs=cut_at)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    watch, _ = fit(model, digits, second, initial_epoch=cut_at)
    assert watch.rates[3][0] == pytest.approx([0.4, 0.1])


def test_the_ratios_of_one_run_are_not_those_of_the_next(digits):
    callback = LearningRateScheduler(lambda epoch: 0.4)
    fit(compiled(lr={"0.*": 0.4, "*": 0.1}), digits, callback)
    watch, _ = fit(compiled(lr={"0.*": 0.0, "*": 0.0}), digits, callback)
    assert watch.rates[0][0] == [0.4, 0.4], "where all are 0 they are alike"
    callback.load_state_dict({"ratios": {"": [1.0, 0.5]}})
    for ratio in (0.5, 1.0):
        watch, _ = fit(compiled(lr={"0.*": 0.0, "*": 0.0}), digits, callback, epochs=1)
        assert watch.rates[0][0] == [0.4, 0.4 * ratio]


def test_a_group_at_0_stays_there_and_the_rate_is_that_of_the_first_other(digits):
    model = compiled(lr={"0.*": 0.0, "*": 0.1})
    watch, history = fit(model, digits, LearningRateScheduler(lambda epoch, lr: lr * 2), epochs=2)
    assert [steps[0] for steps in watch.rates.values()] == [[0.0, 0.2], [0.0, 0.4]]
    assert history.history["lr"] == [0.2, 0.4]


def test_groups_that_are_added_keep_their_ratio(digits):
    model = compiled(lr=0.8).freeze("0")
    callbacks = LearningRateScheduler(lambda epoch, lr: lr / 2), Unfreeze(1, "0", 0.08)
    watch, _ = fit(model, digits, *callbacks)
    assert [steps[0] for steps in watch.rates.values()] == [
        pytest.approx(one) for one in ([0.4, 0.04], [0.2, 0.08], [0.1, 0.04], [0.05, 0.02])
    ]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda epoch, lr: lr / 2,
        lambda epoch, lr: {"first": 0.4 / 2**epoch, "second": 0.1 / 2**epoch},
        lambda epoch: {"second": 0.1 / 2**epoch, "first": torch.tensor(0.4 / 2**epoch).double()},
    ],
)
def test_several_optimizers_are_set_each(digits, schedule, capsys):
    model = pair(lr={"first": 0.8, "second": 0.2})
    _, history = fit(model, digits, LearningRateScheduler(schedule, verbose=1), epochs=2)
    assert history.history["first_lr"] == pytest.approx([0.4, 0.2])
    assert history.history["second_lr"] == pytest.approx([0.1, 0.05])
    assert capsys.readouterr().out.splitlines()[:2] == [
        "Epoch 1: LearningRateScheduler setting the learning rate of 'first' to 0.4.",
        "Epoch 1: LearningRateScheduler setting the learning rate of 'second' to 0.1.",
    ]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"first": 0.1}, "schedule returned rates for 'first' in epoch 0, but the optimizers are 'first', 'second'."),
        ({"first": 0.1, "second": 0.1, "third": 0.1}, "for 'first', 'second', 'third' in epoch 0, but the optimizers"),
        ({}, "schedule returned rates for nothing in epoch 0"),
    ],
)
def test_rates_by_name_are_for_all_optimizers_and_no_others(digits, returned, message):
    with pytest.raises(ValueError) as error:
        fit(pair(), digits, LearningRateScheduler(lambda epoch: returned))
    assert message in str(error.value)


def test_rates_by_name_are_for_optimizers_with_names(digits):
    for name in ("", "first"):
        with pytest.raises(ValueError, match="the optimizers are one alone, without a name. Return a rate for each"):
            fit(compiled(), digits, LearningRateScheduler(partial(lambda rates, epoch: rates, {name: 0.1})))


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            None,
            TypeError,
            "schedule returned None in epoch 1, which is a NoneType, expected a number. Return the learning",
        ),
        ("0.1", TypeError, "schedule returned '0.1' in epoch 1, which is a str"),
        (True, TypeError, "which is a bool"),
        ([0.1], TypeError, "which is a list"),
        (torch.ones(2), TypeError, "which is a Tensor"),
        (
            -0.1,
            ValueError,
            "schedule returned -0.1 in epoch 1, which is not a learning rate. Return a number from 0 up",
        ),
        (NAN, ValueError, "schedule returned nan in epoch 1, which is not a learning rate"),
        (INF, ValueError, "schedule returned inf in epoch 1, which is not a learning rate"),
        (torch.tensor(NAN), ValueError, "schedule returned nan in epoch 1"),
    ],
)
def test_what_is_no_rate_is_refused(digits, returned, error, message):
    model = compiled(lr=0.5)
    with pytest.raises(error, match=message):
        fit(model, digits, LearningRateScheduler(lambda epoch: returned if epoch else 0.5))
    assert model.optimizer.param_groups[0]["lr"] == 0.5


class Schedule:
    def __call__(self, epoch):
        return 0.1


@pytest.mark.parametrize(
    "schedule", [Schedule(), partial(lambda base, epoch: base, 0.1), lambda epoch, *, base=0.1: base]
)
def test_whatever_takes_an_epoch_is_a_schedule(digits, schedule):
    watch, _ = fit(compiled(lr=0.5), digits, LearningRateScheduler(schedule), epochs=1)
    assert watch.firsts() == [0.1]


def test_an_error_within_the_function_is_the_functions(digits):
    """Keras would call it again, with the epoch alone."""
    with pytest.raises(TypeError, match="unsupported operand"):
        fit(compiled(), digits, LearningRateScheduler(lambda epoch, lr=0.1: lr + "0.1"))


@pytest.mark.parametrize("schedule", ["cosine", 0.1, None, {0: 0.1}])
def test_what_cannot_be_called_is_refused(schedule):
    with pytest.raises(
        TypeError, match=r"schedule=.* is a .*, expected a function \(epoch, rate\) -> rate. A schedule by"
    ):
        LearningRateScheduler(schedule)


@pytest.mark.parametrize("schedule", [lambda: 0.1, lambda epoch, lr, more: 0.1, lambda *, epoch: 0.1, min])
def test_what_takes_other_arguments_is_refused(schedule):
    with pytest.raises(
        TypeError, match=r"schedule=.* takes neither \(epoch, rate\) nor \(epoch\). Give a function that"
    ):
        LearningRateScheduler(schedule)


def test_its_verbose_is_0_or_1():
    with pytest.raises(ValueError, match="verbose=3 is not known"):
        LearningRateScheduler(lambda epoch: 0.1, verbose=3)


def test_messages_do_not_break_the_live_line(digits, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    fit(compiled(lr=0.8), digits, *plateau(3, 3, 3, 3, verbose=1), verbose=1)
    lines = [line.split("\r")[-1].strip() for line in terminal.getvalue().split("\n")]
    assert "Epoch 2: ReduceLROnPlateau reducing the learning rate to 0.4." in lines
