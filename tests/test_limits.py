"""How long a run is, how much data it takes and when it validates: counted by what the module really saw."""

from __future__ import annotations

import itertools
import threading
import warnings
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import kerastorch as kt
from tests import reference

X = torch.arange(40.0)[:, None].repeat(1, 3) / 40
Y = X.sum(1, keepdim=True)


class Watch(kt.Callback):
    """Counts what happens, and does `action` after so many batches of the run."""

    def __init__(self, action=None, after=0):
        self.action, self.after, self.batches = action, after, []
        self.validated_after, self.intervals, self.logs = [], [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.batches[-1] += 1
        if sum(self.batches) == self.after:
            self.action(self.model)

    def on_validation_begin(self, logs=None):
        self.validated_after.append(sum(self.batches))

    def on_interval_end(self, epoch, logs=None):
        self.intervals.append((epoch, dict(logs)))

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


def stop(model):
    model.stop_training = True


def model_of(*, lr=0.01, **options):
    torch.manual_seed(0)
    return kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse", lr=lr, **options)


def run(watch=None, *, data=(X, Y), batch_size=4, verbose=0, **options):
    """Ten batches of four in an epoch, unless something else is given."""
    watch, model = watch or Watch(), model_of()
    if batch_size is not None:
        options["batch_size"] = batch_size
    return watch, model, model.fit(*data, callbacks=[watch], verbose=verbose, **options)


def endless():
    while True:
        yield X[:4], Y[:4]


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle(zip(X, Y, strict=True))


# Steps.


def test_max_steps_end_the_run_in_the_middle_of_an_epoch_whose_end_is_still_told():
    watch, model, history = run(epochs=5, max_steps=13, validation_data=(X, Y))
    assert watch.batches == [10, 3] and model.steps_taken == 13
    assert history.epoch == [0, 1] and history.stopped_by == "max_steps"
    assert len(watch.logs) == 2 and "val_loss" in watch.logs[1]


def test_max_steps_alone_take_as_many_epochs_as_they_need():
    watch, model, history = run(max_steps=25)
    assert watch.batches == [10, 10, 5]


def test_epochs_end_a_run_before_its_max_steps():
    watch, _, history = run(epochs=2, max_steps=99)
    assert watch.batches == [10, 10] and history.stopped_by is None


def test_one_epoch_is_the_default_where_nothing_else_is_said():
    assert run()[0].batches == [10]


@pytest.mark.parametrize(
    "data", [(endless,), (endless(),), (DataLoader(Endless(), 4),)], ids=["callable", "gen", "loader"]
)
def test_data_without_an_end_needs_max_steps_alone(data):
    watch, _, history = run(data=data, batch_size=None, max_steps=7)
    assert watch.batches == [7] and history.params["steps"] is None and history.params["epochs"] is None


def test_steps_are_those_of_the_optimizer_and_not_batches():
    watch, model, _ = run(accumulate=4, epochs=9, max_steps=5)
    # 3 steps an epoch: windows of 4, 4 and 2 batches.
    assert watch.batches == [10, 8] and model.steps_taken == 5


def test_max_steps_of_several_optimizers_are_those_of_each():
    class Two(kt.Model):
        def train_step(self, batch):
            x, y = batch
            for name in ("a", "b"):
                self.backward(nn.functional.mse_loss(self.module[name](x), y))
                self.optimizer_step(name)

    model, watch = Two(nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})), Watch()
    model.compile({"a": "sgd", "b": "sgd"}, "mse").fit(X, Y, batch_size=4, max_steps=6, callbacks=watch, verbose=0)
    assert watch.batches == [6] and model.steps_taken == 6


def test_a_run_of_max_steps_ends_with_the_weights_of_so_many_steps_by_hand():
    watch, model, _ = run(max_steps=13, shuffle=False, epochs=2)
    expected, _ = reference.train(
        model_of().module,
        lambda epoch: reference.cut(X, Y, 4, torch.arange(40))[: 10 if epoch == 0 else 3],
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, fused=True),
        nn.functional.mse_loss,
        epochs=2,
    )
    assert reference.same_weights(model.module, expected)


def test_a_schedule_goes_over_max_steps():
    model = model_of(lr=1.0, schedule="linear")
    rates = []
    note = kt.callbacks.base.Callback()
    note.on_before_optimizer_step = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    model.fit(endless, max_steps=5, callbacks=[note], verbose=0)
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_steps_count_anew_in_each_fit_and_not_those_of_a_callback():
    class Nested(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.train_on_batch(X[:4], Y[:4])

    model, watch = model_of(), Watch()
    for _ in range(2):
        model.fit(X, Y, batch_size=4, max_steps=6, callbacks=[watch, Nested()], verbose=0)
    assert watch.batches == [6, 6] and model.steps_taken == 6


# Minimums and stops.


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({}, [3]),
        ({"min_epochs": 0, "min_steps": 0}, [3]),
        ({"min_epochs": 1}, [10]),
        ({"min_epochs": 3}, [10, 10, 10]),
        ({"min_steps": 15}, [10, 5]),
        ({"min_steps": 2}, [3]),
        ({"min_epochs": 1, "min_steps": 12}, [10, 2]),
        ({"min_epochs": 2, "min_steps": 12}, [10, 10]),
        ({"min_steps": 30, "max_steps": 17}, [10, 7]),
        ({"min_epochs": 9, "max_steps": 17}, [10, 7]),
        ({"min_epochs": 9}, [10] * 5),
    ],
    ids=str,
)
def test_minimums_win_over_a_stop_and_maximums_over_all(options, batches):
    watch, _, history = run(Watch(stop, after=3), epochs=5, **options)
    assert watch.batches == batches
    reason = "max_steps" if "max_steps" in options else "stop_training"
    assert history.stopped_by == (None if options == {"min_epochs": 9} else reason)


def test_epochs_to_reach_count_from_the_first_as_in_keras():
    watch, _, _ = run(Watch(stop, after=1), epochs=9, initial_epoch=2, min_epochs=4)
    assert watch.batches == [10, 10]


def test_min_epochs_alone_are_trained():
    assert run(min_epochs=3)[0].batches == [10, 10, 10]


def test_stop_epoch_ends_the_epoch_after_the_batch_and_the_run_goes_on():
    def end(model):
        model.stop_epoch = True

    watch, _, history = run(Watch(end, after=4), epochs=2, validation_data=(X, Y))
    assert watch.batches == [4, 10] and history.stopped_by is None
    assert "val_loss" in watch.logs[0]


def test_stop_epoch_at_its_beginning_leaves_it_without_a_batch():
    class Skip(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.stop_epoch = epoch == 1

    watch, model = Watch(), model_of()
    history = model.fit(X, Y, batch_size=4, epochs=3, callbacks=[watch, Skip()], verbose=0)
    assert watch.batches == [10, 0, 10] and history.epoch == [0, 1, 2]
    assert len(history.history["loss"]) == 2


def test_a_window_cut_short_by_stop_epoch_makes_its_step():
    def end(model):
        model.stop_epoch = True

    _, model, _ = run(Watch(end, after=6), accumulate=4, epochs=1)
    assert model.steps_taken == 2


class SkipFrom(kt.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_begin(self, batch, logs=None):
        return -1 if batch == self.at else None


@pytest.mark.parametrize("at", [0, 2])
def test_minus_one_before_a_batch_ends_the_epoch_without_it(at):
    model, watch = model_of(), Watch()
    history = model.fit(X, Y, batch_size=4, epochs=3, callbacks=[SkipFrom(at), watch], verbose=0)
    assert watch.batches == [at] * 3 and history.epoch == [0, 1, 2] and model.steps_taken == 3 * at


def test_a_run_without_a_last_epoch_ends_where_epochs_end_at_once():
    model, watch = model_of(), Watch()
    history = model.fit(X, Y, batch_size=4, max_steps=10, callbacks=[SkipFrom(0), watch], verbose=0)
    assert watch.batches == [0] and history.epoch == [0]
    model.fit(X, Y, batch_size=4, max_steps=10, callbacks=[SkipFrom(4), watch], verbose=0)
    assert watch.batches == [0, 4, 4, 2]


def test_all_hooks_before_a_batch_are_called_though_the_first_ends_the_epoch():
    seen = []
    last = kt.Callback()
    last.on_train_batch_begin = lambda batch, logs=None: seen.append(batch)
    model_of().fit(X, Y, batch_size=4, callbacks=[SkipFrom(1), last], verbose=0)
    assert seen == [0, 1]


def test_data_that_goes_on_is_not_said_to_have_ended_where_an_epoch_was_ended():
    def end(model):
        model.stop_epoch = True

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch, _, _ = run(Watch(end, after=2), data=(endless(),), batch_size=None, epochs=2, steps_per_epoch=3)
    assert watch.batches == [2, 3]


# Time.


@pytest.mark.parametrize("time", [0.2, timedelta(milliseconds=200), {"milliseconds": 200}], ids=str)
def test_max_time_ends_a_run_that_nothing_else_ends(time):
    watch, _, history = run(data=(endless,), batch_size=None, max_time=time, validation_data=(X, Y))
    assert history.stopped_by == "max_time" and len(history.epoch) == 1
    assert sum(watch.batches) >= 1 and "val_loss" in watch.logs[0]


def test_max_time_finishes_the_batch_it_ends_in_and_wins_over_minimums():
    slow = kt.Callback()
    slow.on_train_batch_begin = lambda batch, logs=None: threading.Event().wait(0.05)
    model, watch = model_of(), Watch()
    history = model.fit(X, Y, batch_size=4, max_time=0.01, min_epochs=3, callbacks=[slow, watch], verbose=0)
    assert watch.batches == [1] and history.stopped_by == "max_time"


def test_a_run_shorter_than_max_time_ends_by_itself():
    watch, _, history = run(epochs=2, max_time="00:01:00:00")
    assert watch.batches == [10, 10] and history.stopped_by is None


# When it validates.


@pytest.mark.parametrize(
    ("freq", "after"),
    [
        (1, [10, 20, 30]),
        (2, [20]),
        ([1, 3], [10, 30]),
        (1.0, [10, 20, 30]),
        (0.5, [5, 10, 15, 20, 25, 30]),
        (0.25, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]),
        (0.3, [3, 6, 9, 13, 16, 19, 23, 26, 29]),
        (0.04, list(range(1, 31))),
        ("7 steps", [7, 14, 21, 28]),
        ("10 steps", [10, 20, 30]),
        ("1 step", list(range(1, 31))),
        ("40 steps", []),
    ],
    ids=str,
)
def test_validation_comes_after_so_many_epochs_or_batches(freq, after):
    watch, _, history = run(epochs=3, validation_data=(X, Y), validation_freq=freq)
    assert watch.validated_after == after
    by_batches = isinstance(freq, str) or freq in (0.5, 0.25, 0.3, 0.04)
    assert [10 * one["epoch"] + one["batch"] + 1 for one in history.intervals] == (after if by_batches else [])
    assert len(watch.intervals) == len(history.intervals)


def test_data_without_an_end_is_validated_every_so_many_steps():
    watch, _, history = run(
        data=(endless,), batch_size=None, max_steps=20, validation_data=(X, Y), validation_freq="6 steps"
    )
    assert watch.validated_after == [6, 12, 18]
    assert history.history["val_loss"] == [history.intervals[-1]["val_loss"]]


def test_an_epoch_has_the_last_validation_within_it_and_none_of_an_epoch_before():
    watch, _, history = run(epochs=3, validation_data=(X, Y), validation_freq="15 steps")
    assert ["val_loss" in logs for logs in watch.logs] == [False, True, True]
    assert history.history["val_loss"] == [one["val_loss"] for one in history.intervals]
    assert [epoch for epoch, _ in watch.intervals] == [1, 2]


def test_values_within_an_epoch_are_those_of_the_weights_of_that_moment():
    class Evaluate(kt.Callback):
        values = []

        def on_interval_end(self, epoch, logs=None):
            self.values.append((logs["val_loss"], self.model.evaluate(X, Y, verbose=0)))

    model = model_of()
    history = model.fit(
        X, Y, batch_size=4, epochs=2, validation_data=(X, Y), validation_freq=0.5, callbacks=[Evaluate()], verbose=0
    )
    assert len(Evaluate.values) == 4
    for logged, evaluated in Evaluate.values:
        assert logged == pytest.approx(evaluated, rel=1e-6)
    assert history.history["val_loss"] == [Evaluate.values[1][0], Evaluate.values[3][0]]


def test_validating_within_an_epoch_changes_neither_training_nor_its_logs():
    torch.manual_seed(0)
    weights, losses = [], []
    for freq in (1, 0.2, "3 steps"):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        model = kt.Model(net, backend="cpu").compile("adam", "mse", metrics=["mae"])
        history = model.fit(
            X, Y, batch_size=4, epochs=2, accumulate=3, validation_data=(X, Y), validation_freq=freq, verbose=0
        )
        weights.append(net.state_dict())
        losses.append((history.history["loss"], history.history["mae"]))
    assert losses[0] == losses[1] == losses[2]
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_validation_steps_of_zero_switch_validation_off():
    watch, _, history = run(validation_data=(X, Y), validation_steps=0)
    assert watch.validated_after == [] and list(history.history) == ["loss"]
    with pytest.raises(ValueError, match="val_ names need validation_data"):
        run(_monitoring("val_loss"), validation_data=(X, Y), validation_steps=0)


def _monitoring(name):
    watch = Watch()
    watch.monitor = name
    return watch


# Trying a validation before training.


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.calls = nn.Linear(3, 1), []

    def forward(self, x):
        self.calls.append((self.training, len(x)))
        return self.inner(x)


@pytest.mark.parametrize(("steps", "tried"), [(1, 1), (2, 2), (-1, 3), (9, 3)])
def test_sanity_steps_validate_before_training_and_keep_nothing(steps, tried):
    net, watch = Counted(), Watch()
    torch.manual_seed(5)
    net.inner.load_state_dict(model_of().module.state_dict())
    model = kt.Model(net, backend="cpu").compile("sgd", "mse", lr=0.01, metrics=["mae"])
    options = {"batch_size": 4, "validation_data": (X[:12], Y[:12]), "verbose": 0, "epochs": 2}
    history = model.fit(X, Y, callbacks=watch, sanity_steps=steps, validation_batch_size=4, **options)
    assert net.calls[: tried + 1] == [(False, 4)] * tried + [(True, 4)]
    assert watch.validated_after == [10, 20]
    assert len(history.history["val_loss"]) == 2
    plain = model_of(metrics=["mae"])
    again = plain.fit(X, Y, validation_batch_size=4, **options)
    assert again.history == history.history
    assert reference.same_weights(plain.module, net.inner)


def test_sanity_steps_find_a_broken_validation_before_any_training():
    watch, model = Watch(), model_of()
    before = model.module.weight.clone()
    with pytest.raises(RuntimeError):
        model.fit(X, Y, validation_data=(X[:, :2], Y), sanity_steps=1, callbacks=watch, verbose=0)
    assert watch.batches == [] and model.module.weight.equal(before) and model.history is None


def test_sanity_steps_give_a_generator_its_batches_back():
    drawn = []

    def batches():
        for start in range(0, 40, 4):
            drawn.append(start)
            yield X[start : start + 4], Y[start : start + 4]

    options = {"epochs": 3, "validation_steps": 3}
    losses = [run(validation_data=batches(), sanity_steps=n, **options)[2].history["val_loss"] for n in (0, 2)]
    assert losses[0] == losses[1]


def test_all_sanity_steps_are_no_more_than_a_validation_takes():
    drawn = []

    def batches():
        for start in itertools.cycle(range(0, 40, 4)):
            drawn.append(start)
            yield X[start : start + 4], Y[start : start + 4]

    run(validation_data=batches, validation_steps=2, sanity_steps=-1)
    assert len(drawn) <= 6


@pytest.mark.parametrize("ends", ["stop_epoch", -1])
def test_an_epoch_that_ends_before_its_first_batch_is_judged_by_nobody(tmp_path, ends):
    def end(index, logs=None):
        if ends == -1:
            return -1 if skip.epoch == 1 else None

    def begin(epoch, logs=None):
        skip.epoch = epoch
        skip.model.stop_epoch = ends == "stop_epoch" and epoch == 1

    skip = kt.Callback()
    skip.on_train_batch_begin, skip.on_epoch_begin = end, begin
    callbacks = [
        skip,
        kt.callbacks.EarlyStopping("loss", patience=9),
        kt.callbacks.ReduceLROnPlateau("loss"),
        kt.callbacks.ModelCheckpoint(tmp_path / "{epoch}-{loss:.2f}.pt"),
    ]
    history = model_of().fit(X, Y, epochs=3, callbacks=callbacks, verbose=0)
    assert history.epoch == [0, 1, 2] and len(history.history["loss"]) == 2
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["1", "3"]


# Less data.


def test_a_fraction_of_shuffled_data_is_another_part_of_it_in_each_epoch():
    seen = _seen(epochs=3, steps_per_epoch=0.3)
    assert [len(epoch) for epoch in seen] == [12, 12, 12]
    assert len({tuple(sorted(epoch)) for epoch in seen}) == 3


def test_a_fraction_of_data_in_order_is_always_its_beginning():
    seen = _seen(epochs=2, steps_per_epoch=0.35, shuffle=False)
    assert seen == [list(range(12))] * 2


def test_steps_per_epoch_as_a_count_go_on_where_the_epoch_before_ended():
    assert _seen(epochs=3, steps_per_epoch=4, shuffle=False) == [
        list(range(16)),
        list(range(16, 32)),
        [*range(32, 40), *range(8)],
    ]


@pytest.mark.parametrize(("fraction", "batches"), [(0.01, 1), (0.29, 2), (0.3, 3), (0.7, 7), (1.0, 10)])
def test_fractions_round_down_to_at_least_one_batch(fraction, batches):
    assert run(steps_per_epoch=fraction)[0].batches == [batches]
    watch, _, history = run(validation_data=(X, Y), validation_steps=fraction, validation_batch_size=4)
    expected = nn.functional.mse_loss(torch.zeros(1), torch.zeros(1))  # of the weights at the end, by hand:
    model = model_of()
    model.fit(X, Y, batch_size=4, verbose=0)
    expected = nn.functional.mse_loss(model(X[: 4 * batches]), Y[: 4 * batches]).item()
    assert history.history["val_loss"] == pytest.approx([expected], rel=1e-5)


def test_29_hundredths_of_100_batches_are_29():
    x = torch.rand(100, 3)
    assert run(data=(x, x[:, :1]), batch_size=1, steps_per_epoch=0.29)[0].batches == [29]


def _seen(**options):
    """Which samples each epoch was trained on, by their first value."""
    net, epochs = Counted(), []
    net.register_forward_pre_hook(lambda _, inputs: epochs[-1].extend((inputs[0][:, 0] * 40).round().int().tolist()))
    note = kt.Callback()
    note.on_epoch_begin = lambda epoch, logs=None: epochs.append([])
    model = kt.Model(net, backend="cpu").compile("sgd", "mse", lr=0.0)
    data = options.pop("data", (X, Y))
    batch_size = {} if isinstance(data[0], DataLoader) or callable(data[0]) else {"batch_size": 4}
    model.fit(*data, callbacks=note, verbose=0, **batch_size, **options)
    return epochs


@pytest.mark.parametrize(("wanted", "samples"), [(1, 4), (3, 12), (0.25, 8), (99, 40)])
@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        (TensorDataset(X, Y),),
        (DataLoader(TensorDataset(X, Y), 4, shuffle=True),),
    ],
    ids=["arrays", "dataset", "shuffled loader"],
)
def test_overfit_batches_are_the_first_ones_in_every_epoch(data, wanted, samples):
    assert _seen(data=data, epochs=2, overfit_batches=wanted, validation_steps=0) == [list(range(samples))] * 2


def test_overfit_batches_of_a_loader_with_a_sampler_of_its_own_stay_the_same():
    dataset = TensorDataset(X, Y)
    loader = DataLoader(dataset, batch_sampler=[[index] * 3 for index in RandomSampler(dataset)])
    first, second = _seen(data=(loader,), epochs=2, overfit_batches=2, validation_steps=0)
    assert first == second and len(first) == 6
    generated = _seen(
        data=(lambda: iter([(X[:4], Y[:4]), (X[4:], Y[4:])]),), epochs=2, overfit_batches=1, validation_steps=0
    )
    assert generated == [[0, 1, 2, 3]] * 2


def test_overfit_batches_are_validated_on_too():
    model = model_of(lr=0.0)
    history = model.fit(X, Y, batch_size=4, overfit_batches=2, validation_data=(X + 9, Y), verbose=0)
    assert history.history["val_loss"] == pytest.approx(history.history["loss"], rel=1e-6)


def test_a_model_learns_overfit_batches_by_heart(digits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = kt.Model(net).compile("adam", "cross_entropy", metrics=["accuracy"], lr=0.01)
    history = model.fit(*digits, epochs=30, overfit_batches=1, verbose=0)
    assert history.history["val_accuracy"][-1] == 1.0


# Wrong arguments.

MISTAKES = {
    "time as a sentence": ({"max_time": "1 hour"}, ValueError, "max_time='1 hour' is no duration. Give seconds"),
    "time of nothing": ({"max_time": 0}, ValueError, "max_time=0 is no duration"),
    "time backwards": ({"max_time": -5}, ValueError, "max_time=-5"),
    "time as a list": ({"max_time": [1]}, TypeError, r"max_time=\[1\] is a list"),
    "max steps zero": ({"max_steps": 0}, ValueError, "max_steps=0 is less than 1"),
    "max steps float": ({"max_steps": 10.0}, TypeError, "max_steps=10.0 is a float"),
    "min steps negative": ({"min_steps": -1}, ValueError, "min_steps=-1 is less than 1"),
    "min epochs text": ({"min_epochs": "2"}, TypeError, "min_epochs='2' is a str"),
    "freq zero": ({"validation_freq": 0}, ValueError, "validation_freq=0 does not say when to validate"),
    "freq negative": ({"validation_freq": -0.5}, ValueError, "validation_freq=-0.5"),
    "freq above one": ({"validation_freq": 1.5}, ValueError, "validation_freq=1.5"),
    "freq bool": ({"validation_freq": True}, ValueError, "validation_freq=True"),
    "freq of no epoch": ({"validation_freq": [0]}, ValueError, r"validation_freq=\[0\]"),
    "freq of no epochs": ({"validation_freq": []}, ValueError, r"validation_freq=\[\]"),
    "freq no steps": ({"validation_freq": "0 steps"}, ValueError, "validation_freq='0 steps'"),
    "freq text": ({"validation_freq": "often"}, ValueError, '"100 steps"'),
    "steps above one": ({"steps_per_epoch": 1.5}, ValueError, "steps_per_epoch=1.5 is no number of batches"),
    "steps bool": ({"steps_per_epoch": True}, TypeError, "steps_per_epoch=True"),
    "validation steps negative": ({"validation_steps": -1}, ValueError, "validation_steps=-1"),
    "sanity fraction": ({"sanity_steps": 0.5}, ValueError, "sanity_steps=0.5 is no number of batches"),
    "sanity minus two": ({"sanity_steps": -2}, ValueError, "sanity_steps=-2"),
    "overfit negative": ({"overfit_batches": -1}, ValueError, "overfit_batches=-1"),
    "overfit above one": ({"overfit_batches": 2.5}, ValueError, "overfit_batches=2.5"),
    "dry run negative": ({"dry_run": -1}, ValueError, "dry_run=-1 is no number of batches"),
    "dry run float": ({"dry_run": 0.5}, ValueError, "dry_run=0.5"),
    "initial epoch": ({"initial_epoch": -1}, ValueError, "initial_epoch=-1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_argument_is_one_clear_error_before_anything_runs(name):
    options, error, text = MISTAKES[name]
    watch, model = Watch(), model_of()
    before = model.module.weight.clone()
    with pytest.raises(error, match=text):
        model.fit(X, Y, callbacks=watch, verbose=0, **options)
    assert watch.batches == [] and model.module.weight.equal(before) and model.history is None


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("validation_freq", '"100 steps"'),
        ("steps_per_epoch", "a whole number of batches"),
        ("overfit_batches", "a whole number of batches"),
    ],
)
def test_a_fraction_of_nobody_knows_how_much_is_refused(name, instead):
    with pytest.raises(ValueError, match=f"{name}=0.5 is a fraction of an epoch, but this data has no known length"):
        run(data=(endless,), batch_size=None, max_steps=3, validation_data=(X, Y), **{name: 0.5})


def test_a_generator_to_validate_on_cannot_serve_several_validations_within_an_epoch():
    with pytest.raises(ValueError, match="ends after the first of several validations"):
        run(validation_data=iter([(X, Y)]), validation_freq=0.5)
