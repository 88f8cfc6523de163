"""EMA and StochasticWeightAveraging against `torch.optim.swa_utils` in loops by hand; resumed, stopped, repeated."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import kerastorch as kt
from kerastorch.callbacks import EMA, StochasticWeightAveraging, Unfreeze
from tests.reference import cut, mean_loss, same_weights

EPOCHS, BATCH, RATE = 5, 32, 0.1
sgd = partial(torch.optim.SGD, lr=RATE, momentum=0.9, foreach=False)
cross_entropy = nn.functional.cross_entropy


@pytest.fixture
def normalized():
    """A classifier of digits with BatchNorm."""
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


class Watch(kt.Callback):
    """The module's state after each optimizer step and at each end of an epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_before_zero_grad(self, optimizer):
        self.steps.append(copy.deepcopy(self.model.module.state_dict()))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(copy.deepcopy(self.model.module.state_dict()))


class At(kt.Callback):
    """Does something at the end of an epoch."""

    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.act(self.model)


def run(net, data, *callbacks, optimizer=sgd, schedule=None, precision="32", **options):
    """A copy of `net`, trained in order."""
    model = kt.Model(copy.deepcopy(net), backend="cpu")
    model.compile(optimizer, "cross_entropy", schedule=schedule, precision=precision)
    return fit(model, data, *callbacks, **options)


def fit(model, data, *callbacks, **options):
    options = {"epochs": EPOCHS, "batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    model.fit(*data, callbacks=list(callbacks), **options)
    return model


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshot(model, callback):
    """What a checkpoint has in it, through a file."""
    states = model.module.state_dict(), model.optimizer.state_dict(), callback.state_dict()
    return through_a_file(copy.deepcopy(states))


def resumed(net, data, callback, saved, epoch, **options):
    """What a new process makes of a checkpoint: a model and a callback of its own go on at `epoch`."""
    model = kt.Model(copy.deepcopy(net), backend="cpu").compile(sgd, "cross_entropy", **options)
    weights, steps, averages = saved
    model.module.load_state_dict(weights)
    model.optimizer.load_state_dict(steps)
    callback.load_state_dict(averages)
    return fit(model, data, callback, initial_epoch=epoch)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# EMA.


def ema_by_hand(net, data, decay, epochs=EPOCHS, update_every=1):
    """Net and average, trained in a plain loop, and the average's loss after each epoch."""
    net = copy.deepcopy(net)
    optimizer, average = sgd(net.parameters()), None
    losses, steps = [], 0
    for _ in range(epochs):
        for x, y in cut(*data, BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            steps += 1
            average = average or AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
            if steps == 1 or steps % update_every == 0:
                average.update_parameters(net)
        losses.append(mean_loss(average.module, *data, cross_entropy))
    return net, average.module, losses


@pytest.mark.parametrize("update_every", [1, 3, 100])
def test_ema_is_that_of_a_loop_by_hand_bit_for_bit(classifier, digits, update_every):
    trained, average, _ = ema_by_hand(classifier, digits, 0.9, update_every=update_every)
    ema = EMA(0.9, update_every=update_every)
    model = run(classifier, digits, ema)
    assert same_weights(model.module, average) and not same_weights(model.module, trained)
    ema.swap_weights()
    assert same_weights(model.module, trained)


def test_ema_is_the_formula_over_the_optimizer_steps_of_accumulated_batches(classifier, digits):
    watch, ema = Watch(), EMA(0.8, update_every=2)
    model = run(classifier, digits, watch, ema, accumulate=3)
    assert len(watch.steps) == 2 * EPOCHS and ema.state_dict()["steps"] == {"": 2 * EPOCHS}
    for name, average in model.module.state_dict().items():
        expected = watch.steps[0][name]
        for step in watch.steps[1::2]:
            expected = 0.8 * expected + 0.2 * step[name]
        torch.testing.assert_close(average, expected, atol=1e-6, rtol=0)


def test_validation_sees_the_average_and_training_goes_on_from_the_weights(classifier, digits):
    trained, _, losses = ema_by_hand(classifier, digits, 0.9)
    watch, ema = Watch(), EMA(0.9)
    model = run(classifier, digits, ema, watch, validation_data=digits)
    assert model.history.history["val_loss"] == pytest.approx(losses, abs=1e-6)
    assert equal(watch.epochs[-1], model.module.state_dict()), "what was validated is what a callback can save then"
    watch = Watch()
    run(classifier, digits, EMA(0.9), watch)
    assert equal(watch.epochs[-1], trained.state_dict()), (
        "without validation an epoch ends with the weights of training"
    )
    without = run(classifier, digits, validation_data=digits).history.history
    assert model.history.history["loss"] == without["loss"] and model.history.history["val_loss"] != without["val_loss"]


def test_parameters_stay_the_same_tensors_in_the_same_place(classifier, digits):
    model = kt.Model(classifier, backend="cpu").compile(sgd, "cross_entropy")
    before = [(parameter, parameter.data_ptr()) for parameter in classifier.parameters()]
    fit(model, digits, EMA(0.9), validation_data=digits)
    after = list(classifier.parameters())
    assert all(
        now is parameter and now.data_ptr() == place for now, (parameter, place) in zip(after, before, strict=True)
    )


class Failing(kt.Callback):
    def __init__(self, hook, epoch=2):
        self.left = epoch
        setattr(self, hook, self.fail)

    def fail(self, *arguments):
        if self.left == 0:
            raise KeyError("failed on purpose")
        self.left -= 1


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("hook", ["on_validation_begin", "on_test_begin", "on_validation_end", "on_epoch_end"])
def test_an_error_leaves_the_weights_of_training(classifier, digits, hook, is_first):
    trained, _, _ = ema_by_hand(classifier, digits, 0.9, epochs=3)
    callbacks = [EMA(0.9), Failing(hook)]
    model = kt.Model(copy.deepcopy(classifier), backend="cpu").compile(sgd, "cross_entropy")
    with pytest.raises(KeyError, match="on purpose"):
        fit(model, digits, *(callbacks if is_first else callbacks[::-1]), validation_data=digits)
    assert same_weights(model.module, trained)


def test_an_error_before_the_next_run_leaves_the_average(classifier, digits):
    _, average, _ = ema_by_hand(classifier, digits, 0.9)
    ema = EMA(0.9)
    model = run(classifier, digits, ema)
    with pytest.raises(KeyError, match="on purpose"):
        fit(model, digits, Failing("on_train_begin", 0), ema)
    with pytest.raises(KeyError, match="on purpose"):
        model.evaluate(*digits, callbacks=[ema, Failing("on_test_begin", 0)], verbose=0)
    assert same_weights(model.module, average)


def test_without_swap_the_average_is_there_when_asked_for(classifier, digits):
    trained, average, _ = ema_by_hand(classifier, digits, 0.9)
    ema = EMA(0.9, swap=False)
    with pytest.raises(RuntimeError, match="before the first optimizer step"):
        ema.swap_weights()
    model = run(classifier, digits, ema, validation_data=digits)
    without = run(classifier, digits, validation_data=digits)
    assert same_weights(model.module, trained)
    assert model.history.history == without.history.history
    for expected in (average, trained):
        ema.swap_weights()
        assert same_weights(model.module, expected)


def test_weights_left_swapped_in_a_hook_are_back_before_the_next_batch(classifier, digits):
    ema = EMA(0.9, swap=False)
    model = run(classifier, digits, ema, At(1, lambda model: ema.swap_weights()))
    assert same_weights(model.module, run(classifier, digits).module)


def test_buffers_are_the_models_own_and_what_is_frozen_is_not_averaged(normalized, digits):
    trained, average, _ = ema_by_hand(normalized, digits, 0.9)
    model = run(normalized, digits, EMA(0.9))
    assert equal(dict(model.module.named_parameters()), dict(average.named_parameters()))
    assert equal(dict(model.module.named_buffers()), dict(trained.named_buffers()))
    ema, model = EMA(0.9), kt.Model(normalized, backend="cpu").freeze("0", "1").compile(sgd, "cross_entropy")
    fit(model, digits, ema)
    assert list(ema.state_dict()["averages"]) == ["3.weight", "3.bias"]


@pytest.mark.parametrize("ema_is_first", [True, False])
def test_what_is_unfrozen_is_averaged_from_the_value_it_had(classifier, digits, ema_is_first):
    net = copy.deepcopy(classifier)
    optimizer, average = sgd(net.parameters()), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for epoch in range(EPOCHS):
        net[0].requires_grad_(epoch >= 2)
        for x, y in cut(*digits, BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            average.update_parameters(net)
    model = kt.Model(classifier, backend="cpu").freeze("0").compile(sgd, "cross_entropy")
    callbacks = [EMA(0.9), Unfreeze(2, "0")]
    fit(model, digits, *(callbacks if ema_is_first else callbacks[::-1]))
    assert same_weights(model.module, average.module)


def test_a_validation_within_an_epoch_leaves_training_as_it_is(classifier, digits):
    """Also where it comes with the last batch, whose window is still open: its step is taken on the own weights."""
    whole = run(classifier, digits, EMA(0.9), validation_data=digits, accumulate=2)
    watch = Watch()
    often = run(classifier, digits, EMA(0.9), watch, validation_data=digits, accumulate=2, validation_freq="1 steps")
    assert same_weights(often.module, whole.module)
    assert often.history.history["loss"] == whole.history.history["loss"]


def test_a_checkpoint_of_the_best_epoch_has_the_average_that_was_monitored(classifier, digits):
    kept = []
    keep = At(1, lambda model: kept.append((model.get_weights(), model.evaluate(*digits, verbose=0))))
    model = run(classifier, digits, EMA(0.9), keep, validation_data=digits)
    weights, loss = kept[0]
    assert loss == pytest.approx(model.history.history["val_loss"][1], rel=1e-6)
    assert model.set_weights(weights) is None
    assert model.evaluate(*digits, verbose=0) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("when", ["middle", "end"])
def test_ema_resumes_bit_for_bit(classifier, digits, when):
    ema, saved = EMA(0.9, update_every=3), []
    whole = run(classifier, digits, ema, At(1, lambda model: saved.append(snapshot(model, ema))))
    if when == "end":  # the averages are in the module
        ema = EMA(0.9, update_every=3)
        saved = [snapshot(run(classifier, digits, ema, epochs=2), ema)]
    model = resumed(classifier, digits, EMA(0.9, update_every=3), saved[0], epoch=2)
    assert same_weights(model.module, whole.module)
    assert ema.state_dict()["steps"] != {}


def test_a_loaded_state_is_not_changed_and_serves_one_run(classifier, digits):
    ema = EMA(0.9)
    model = run(classifier, digits, ema, epochs=1)
    state = copy.deepcopy(ema.state_dict())
    before, other = copy.deepcopy(state), EMA(0.9)
    other.load_state_dict(state)
    fit(model, digits, other, epochs=2, initial_epoch=1)
    assert other.state_dict()["steps"] == {"": 10} and equal(state["averages"], before["averages"])
    fit(model, digits, other, epochs=1)
    assert other.state_dict()["steps"] == {"": 5}, "the next run starts anew"


def test_a_state_of_another_module_is_refused(classifier, regressor, digits):
    ema = EMA(0.9)
    run(classifier, digits, ema, epochs=1)
    other = EMA(0.9)
    other.load_state_dict(ema.state_dict())
    model = kt.Model(nn.Linear(64, 10), backend="cpu").compile(sgd, "cross_entropy")
    with pytest.raises(ValueError, match=r"average of '0.weight' with shape \(16, 64\), but the module has no such"):
        fit(model, digits, other)


def test_each_run_starts_anew(classifier, digits):
    ema = EMA(0.9)
    model = run(classifier, digits, ema)
    after = copy.deepcopy(model.module)
    fit(model, digits, ema, epochs=1)
    other = kt.Model(after, backend="cpu").compile(sgd, "cross_entropy")
    other.optimizer.load_state_dict(run(classifier, digits).optimizer.state_dict())
    fit(other, digits, EMA(0.9), epochs=1)
    assert same_weights(model.module, other.module)


class Pair(kt.Model):
    """Two networks that are trained apart, the second one at every other batch."""

    batches = 0

    def train_step(self, batch):
        x, y = batch
        self.batches += 1
        for name in ("first", "second")[: 2 - self.batches % 2]:
            self.backward(cross_entropy(self.module[name](x), y))
            self.optimizer_step(name)


def test_each_optimizer_counts_its_own_steps(digits):
    nets = nn.ModuleDict({name: nn.Linear(64, 10) for name in ("first", "second")})
    model = Pair(nets, backend="cpu").compile({"first": sgd, "second": "adam"})
    seen = {name: [] for name in nets}

    class WatchEach(kt.Callback):
        def on_before_zero_grad(self, optimizer):
            name = next(name for name, other in self.model.optimizer.items() if other is optimizer)
            seen[name].append(nets[name].weight.detach().clone())

    ema = EMA(0.8, update_every=2)
    fit(model, digits, ema, WatchEach(), epochs=2)
    assert ema.state_dict()["steps"] == {"first": 10, "second": 5}
    for name, steps in seen.items():
        expected = steps[0]
        for step in steps[1::2]:
            expected = torch.lerp(expected, step, 1 - 0.8)
        assert torch.equal(nets[name].weight, expected)


def test_half_precision_is_averaged_in_float32(classifier, digits):
    watch, ema = Watch(), EMA(0.999)
    model = run(classifier, digits, watch, ema, precision="bf16-true")
    for name, average in ema.state_dict()["averages"].items():
        expected = watch.steps[0][name].float()
        for step in watch.steps[1:]:
            expected = torch.lerp(expected, step[name].float(), 1 - 0.999)
        assert average.dtype == torch.float32 and torch.equal(average, expected)
        assert torch.equal(model.module.state_dict()[name], average.bfloat16())
    ema.swap_weights()
    assert equal(model.module.state_dict(), watch.steps[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay=1.0 is not a decay"),
        ({"decay": -0.1}, "decay=-0.1 is not a decay"),
        ({"decay": float("nan")}, "decay=nan is not a decay"),
        ({"decay": "0.9"}, "decay='0.9' is not a decay"),
        ({"decay": True}, "decay=True is not a decay"),
        ({"update_every": 0}, "update_every=0 is no count of steps"),
        ({"update_every": 1.5}, "update_every=1.5 is no count of steps"),
    ],
)
def test_ema_refuses_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(**options)


# Stochastic weight averaging.


def swa_by_hand(net, data, start, *, epochs=EPOCHS, anneal=2, strategy="cos", schedule=None, groups=None, rate=0.05):
    """What torch's pieces make of a plain loop: net, average with its statistics, and the rate of each epoch."""
    net = copy.deepcopy(net)
    optimizer = sgd(groups(net) if groups else net.parameters())
    scheduler, average, rates = schedule and schedule(optimizer), None, []
    for epoch in range(epochs):
        if epoch == start:
            scheduler = SWALR(optimizer, rate, anneal, strategy)
            average = AveragedModel(net)
        rates.append(optimizer.param_groups[0]["lr"])
        for x, y in cut(*data, BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
        if epoch >= start:
            average.update_parameters(net)
        if scheduler is not None:
            scheduler.step()
    update_bn(cut(*data, BATCH), average)
    return net, average.module, rates


@pytest.mark.parametrize(("strategy", "anneal"), [("cos", 2), ("linear", 3), ("linear", 0)])
def test_swa_is_that_of_a_loop_by_hand_bit_for_bit(normalized, digits, strategy, anneal):
    _, average, rates = swa_by_hand(normalized, digits, 2, anneal=anneal, strategy=strategy)
    swa = StochasticWeightAveraging(0.05, 2, anneal, strategy)
    model = run(normalized, digits, swa)
    assert same_weights(model.module, average)
    if anneal:
        assert model.history.history["lr"] == rates[2:] and rates[-1] < RATE
    assert model.module[1].momentum == 0.1 and all(part.training for part in model.module.modules())


def test_swa_takes_the_place_of_a_schedule_until_the_run_ends(normalized, digits):
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    _, average, rates = swa_by_hand(normalized, digits, 3, schedule=schedule)
    swa = StochasticWeightAveraging(0.05, 3, 2)
    model = run(normalized, digits, swa, schedule=schedule)
    assert same_weights(model.module, average) and model.history.history["lr"] == rates
    fit(model, digits, epochs=2)
    assert model.history.history["lr"] == [rates[3], rates[3] / 2], "the schedule goes on where it was"


@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_a_second_run_averages_anew_at_the_same_rates(normalized, digits, schedule):
    swa = StochasticWeightAveraging(0.05, 2, 2)
    model = run(normalized, digits, swa, schedule=schedule)
    history, between = model.history.history["lr"], copy.deepcopy(model.module)
    steps = copy.deepcopy(model.optimizer.state_dict())
    fit(model, digits, swa)
    assert model.history.history["lr"] == history
    other = kt.Model(between, backend="cpu").compile(sgd, "cross_entropy", schedule=schedule)
    other.optimizer.load_state_dict(steps)
    fit(other, digits, StochasticWeightAveraging(0.05, 2, 2))
    assert same_weights(model.module, other.module)


@pytest.mark.parametrize(("start", "epochs", "first"), [(0.8, 5, 4), (0.0, 3, 0), (0.5, 5, 2), (0.58, 50, 29)])
def test_a_float_start_is_a_part_of_the_run(start, epochs, first):
    swa, data = StochasticWeightAveraging(0.05, start), (torch.rand(2, 2), torch.rand(2, 1))
    model = kt.Model(nn.Linear(2, 1), backend="cpu").compile("sgd", "mse")
    model.fit(*data, epochs=epochs, callbacks=[swa], verbose=0)
    assert len(model.history.history["lr"]) == epochs - first
    assert swa.state_dict()["count"] == epochs - first - 1, "the last one is the end's"


def test_each_group_has_its_own_rate(normalized, digits):
    def groups(net):
        return [{"params": net[:2].parameters(), "lr": 0.02}, {"params": net[2:].parameters()}]

    _, average, _ = swa_by_hand(normalized, digits, 1, groups=groups, rate=[0.01, 0.3])
    model = kt.Model(normalized, backend="cpu")
    model.compile(sgd, "cross_entropy", lr={"[01]": 0.02, "*": RATE})
    fit(model, digits, StochasticWeightAveraging([0.01, 0.3], 1, 2))
    assert same_weights(model.module, average)


def test_swa_ends_with_a_run_that_stops_early(normalized, digits):
    _, average, _ = swa_by_hand(normalized, digits, 1, epochs=3)
    model = run(normalized, digits, StochasticWeightAveraging(0.05, 1, 2), At(2, stop))
    assert same_weights(model.module, average) and len(model.history.epoch) == 3


def stop(model):
    model.stop_training = True


def test_validation_sees_the_weights_of_training(normalized, digits):
    trained, _, _ = swa_by_hand(normalized, digits, 1)
    watch = Watch()
    model = run(normalized, digits, StochasticWeightAveraging(0.05, 1, 2), watch, validation_data=digits)
    assert equal(watch.epochs[-1], trained.state_dict())
    assert model.history.history["val_loss"][-1] == pytest.approx(mean_loss(trained, *digits, cross_entropy), abs=1e-6)


class Wrapped(nn.Module):
    """The classifier, with another way in."""

    def __init__(self, net, forward):
        super().__init__()
        self.net, self.take = net, forward

    def forward(self, *inputs, **named):
        return self.net(self.take(*inputs, **named))


@pytest.mark.parametrize(
    ("feed", "take"),
    [
        (lambda x: (x[:, :32], x[:, 32:]), lambda left, right: torch.cat([left, right], 1)),
        (lambda x: {"right": x[:, 32:], "left": x[:, :32]}, lambda left, right: torch.cat([left, right], 1)),
    ],
    ids=["tuple", "dict"],
)
def test_statistics_are_computed_whatever_the_inputs(normalized, digits, feed, take):
    x, y = digits
    _, average, _ = swa_by_hand(normalized, digits, 3)
    model = run(Wrapped(normalized, take), (feed(x), y), StochasticWeightAveraging(0.05, 3, 2))
    assert same_weights(model.module.net, average)


def test_statistics_are_computed_as_compute_loss_goes_through_the_module(normalized, digits):
    class Shifted(kt.Model):
        def compute_loss(self, batch):
            x, y = batch
            return cross_entropy(self.module(x - 1), y)

    x, y = digits
    _, average, _ = swa_by_hand(normalized, (x - 1, y), 3)
    model = Shifted(normalized, backend="cpu").compile(sgd)
    fit(model, digits, StochasticWeightAveraging(0.05, 3, 2))
    assert same_weights(model.module, average)


def test_statistics_are_computed_and_what_is_compiled_stays_so(normalized, digits, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, backend="eager", fullgraph=True)
    )
    torch._dynamo.reset()
    expected = run(normalized, digits, StochasticWeightAveraging(0.05, 3, 2))
    model = kt.Model(normalized, backend="cpu").compile(sgd, "cross_entropy", jit=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="jit")
        fit(model, digits, StochasticWeightAveraging(0.05, 3, 2))
    torch.testing.assert_close(model.module.state_dict(), expected.module.state_dict(), atol=1e-6, rtol=0)


def test_frozen_norms_keep_their_statistics(normalized, digits):
    fit(kt.Model(normalized, backend="cpu").compile(sgd, "cross_entropy"), digits, epochs=1)  # statistics to keep
    net, hand = (nn.Sequential(*copy.deepcopy(normalized), nn.BatchNorm1d(10)) for _ in range(2))
    before = copy.deepcopy(net[1].state_dict())
    model = kt.Model(net, backend="cpu").freeze("1").compile(sgd, "cross_entropy")
    fit(model, digits, StochasticWeightAveraging(0.05, 2, 2))
    assert equal(net[1].state_dict(), before)

    hand[1].requires_grad_(False).eval()
    optimizer, average = sgd(hand.parameters()), AveragedModel(hand)
    for epoch in range(EPOCHS):
        if epoch == 2:
            scheduler = SWALR(optimizer, 0.05, 2)
        for x, y in cut(*digits, BATCH):
            optimizer.zero_grad()
            cross_entropy(hand(x), y).backward()
            optimizer.step()
        if epoch >= 2:
            average.update_parameters(hand)
            scheduler.step()
    average.module[4].reset_running_stats()
    average.module[4].momentum = None
    with torch.no_grad():
        for x, _ in cut(*digits, BATCH):
            average.module(x)
    assert same_weights(net, average.module)


@pytest.mark.parametrize("start", [2, 0])
def test_what_is_unfrozen_is_averaged_from_its_frozen_value(classifier, digits, start):
    """Averages of all parameters, frozen ones too, are what AveragedModel makes."""
    watch = Watch()
    model = kt.Model(classifier, backend="cpu").freeze("0").compile(sgd, "cross_entropy")
    fit(model, digits, StochasticWeightAveraging(0.05, start, 2), Unfreeze(3, "0"), watch)
    for name, value in model.module.state_dict().items():
        expected = watch.epochs[start][name]
        for count, epoch in enumerate(watch.epochs[start + 1 :], 1):
            expected = expected + (epoch[name] - expected) / (count + 1)
        assert torch.equal(value, expected)


@pytest.mark.parametrize("saves_first", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_swa_resumes_bit_for_bit_whichever_callback_saves(normalized, digits, epoch, saves_first):
    swa, saved = StochasticWeightAveraging(0.05, 1, 3), []
    save = At(epoch, lambda model: saved.append(snapshot(model, swa)))
    whole = run(normalized, digits, *([save, swa] if saves_first else [swa, save]))
    other = StochasticWeightAveraging(0.05, 1, 3)
    model = resumed(normalized, digits, other, saved[0], epoch + 1)
    assert same_weights(model.module, whole.module)
    assert model.history.history["lr"] == whole.history.history["lr"][epoch:]
    assert model.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] == RATE


@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_swa_resumes_from_what_was_saved_after_its_end(normalized, digits, schedule):
    options = {"validation_data": digits}
    whole = run(normalized, digits, StochasticWeightAveraging(0.05, 1, 3), schedule=schedule, **options)
    swa = StochasticWeightAveraging(0.05, 1, 3)
    model = run(normalized, digits, swa, At(2, stop), schedule=schedule, **options)
    other = StochasticWeightAveraging(0.05, 1, 3)
    model = resumed(normalized, digits, other, snapshot(model, swa), 3, schedule=schedule)
    assert same_weights(model.module, whole.module)
    assert model.history.history["lr"] == whole.history.history["lr"][-2:]


def test_a_run_that_ends_before_the_start_says_so_and_leaves_the_module(normalized, digits):
    without = run(normalized, digits, epochs=2)
    with pytest.warns(UserWarning, match="averaged nothing: the run ended before epoch 3") as warned:
        model = run(normalized, digits, StochasticWeightAveraging(0.05, 3), At(1, stop))
    assert warned[0].filename == __file__
    assert same_weights(model.module, without.module)


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_train_end"])
def test_an_error_leaves_weights_and_rates_of_training(normalized, digits, hook):
    with pytest.raises(KeyError, match="on purpose"):
        model = kt.Model(copy.deepcopy(normalized), backend="cpu").compile(sgd, "cross_entropy")
        left = 4 if hook == "on_epoch_end" else 0
        fit(model, digits, Failing(hook, left), StochasticWeightAveraging(0.05, 2, 2))
    trained, _, _ = swa_by_hand(normalized, digits, 2)
    assert same_weights(model.module, trained)
    assert model.optimizer.param_groups[0]["lr"] == RATE


def test_an_error_in_the_last_pass_leaves_weights_and_statistics_of_training(normalized, digits):
    class Unable(kt.Model):
        is_over = False

        def compute_loss(self, batch):
            if self.is_over:
                self.module(batch[0])
                raise KeyError("failed on purpose")
            return super().compute_loss(batch)

    model = Unable(copy.deepcopy(normalized), backend="cpu").compile(sgd, "cross_entropy")
    with pytest.raises(KeyError, match="on purpose"):
        fit(model, digits, StochasticWeightAveraging(0.05, 2, 2), At(4, lambda model: setattr(model, "is_over", True)))
    assert same_weights(model.module, swa_by_hand(normalized, digits, 2)[0])
    assert model.module[1].momentum == 0.1


def test_half_precision_is_averaged_in_float32_and_rounded_once(classifier, digits):
    watch = Watch()
    model = run(classifier, digits, watch, StochasticWeightAveraging(0.05, 1, 2), precision="bf16-true")
    for name, value in model.module.state_dict().items():
        expected = watch.epochs[1][name].float()
        for count, epoch in enumerate(watch.epochs[2:], 1):
            expected = expected + (epoch[name].float() - expected) / (count + 1)
        assert value.dtype == torch.bfloat16 and torch.equal(value, expected.bfloat16())


def test_endless_data_ends_the_last_pass_with_an_epochs_batches(normalized, digits):
    x, y = digits

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return itertools.cycle(zip(x, y, strict=True))

    model = kt.Model(normalized, backend="cpu").compile(sgd, "cross_entropy")
    loader = torch.utils.data.DataLoader(Endless(), batch_size=10)
    model.fit(loader, epochs=3, steps_per_epoch=7, callbacks=[StochasticWeightAveraging(0.05, 1)], verbose=0)
    assert model.module[1].num_batches_tracked == 7


def test_norms_and_a_generator_are_refused_before_training(normalized, digits):
    before = copy.deepcopy(normalized)
    model = kt.Model(normalized, backend="cpu").compile(sgd, "cross_entropy")
    with pytest.raises(ValueError, match="generator, which cannot be gone through again"):
        model.fit(iter(cut(*digits, 10)), epochs=2, steps_per_epoch=5, callbacks=[StochasticWeightAveraging(0.05)])
    assert same_weights(normalized, before)


def test_the_order_of_a_loader_is_what_it_was(normalized, digits):
    class Digits(torch.utils.data.Dataset):
        def __len__(self):
            return len(digits[1])

        def __getitem__(self, index):
            order.append(index)
            return digits[0][index], digits[1][index]

    orders = []
    for callbacks in ([], [StochasticWeightAveraging(0.05, 1)]):
        order = []
        torch.manual_seed(1)
        model = kt.Model(copy.deepcopy(normalized), backend="cpu").compile(sgd, "cross_entropy")
        loader = torch.utils.data.DataLoader(Digits(), batch_size=BATCH, shuffle=True)
        model.fit(loader, epochs=2, callbacks=callbacks, verbose=0)
        orders.append(order[: 2 * len(digits[1])])
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "swa_lrs=0.0 is no rate"),
        (([0.1, -1],), r"swa_lrs=\[0.1, -1\] is no rate"),
        (([],), r"swa_lrs=\[\] is no rate"),
        ((True,), "swa_lrs=True is no rate"),
        (("0.1",), "swa_lrs='0.1' is no rate"),
        ((0.1, 1.0), "swa_epoch_start=1.0 is no epoch"),
        ((0.1, -1), "swa_epoch_start=-1 is no epoch"),
        ((0.1, "2"), "swa_epoch_start='2' is no epoch"),
        ((0.1, 1, -1), "annealing_epochs=-1 is no count"),
        ((0.1, 1, 2.0), "annealing_epochs=2.0 is no count"),
        ((0.1, 1, 2, "cosine"), "annealing_strategy='cosine' is not known. Give 'cos' or 'linear'"),
    ],
)
def test_swa_refuses_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        StochasticWeightAveraging(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 5), "swa_epoch_start=5 is not in a run of 5 epochs, 0 to 4"),
        (([0.1, 0.1], 1), "has 2 rates for 1 parameter groups"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_training(classifier, digits, arguments, message):
    before = copy.deepcopy(classifier)
    model = kt.Model(classifier, backend="cpu").compile(sgd, "cross_entropy")
    with pytest.raises(ValueError, match=message):
        fit(model, digits, StochasticWeightAveraging(*arguments))
    assert same_weights(classifier, before)


def test_several_optimizers_are_annealed_each(digits):
    nets = nn.ModuleDict({name: nn.Linear(64, 10) for name in ("first", "second")})
    model = Pair(nets, backend="cpu").compile({"first": sgd, "second": "adam"}, lr={"first": 0.1, "second": 0.01})
    watch = Watch()
    fit(model, digits, StochasticWeightAveraging(0.05, 1, 1), watch, epochs=3)
    assert model.history.history["first_lr"] == [0.1, 0.05] and model.history.history["second_lr"] == [0.01, 0.05]
    for name, value in nets.state_dict().items():
        torch.testing.assert_close(value, (watch.epochs[1][name] + watch.epochs[2][name]) / 2)


def test_nothing_warns(normalized, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(normalized, digits, StochasticWeightAveraging(0.05, 0, 2), schedule="one_cycle", precision="bf16")
        run(normalized, digits, EMA(0.9), schedule="one_cycle", precision="bf16", validation_data=digits)
