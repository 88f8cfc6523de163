"""Monitoring: which way is better, what is in the logs, and the moments at which a value is judged."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import Monitoring

NAN, INF = math.nan, math.inf
DATA = torch.rand(8, 3), torch.rand(8, 1)


class Watch(Monitoring):
    """Notes what it is given to judge."""

    def __init__(self, monitor="val_loss", *arguments):
        self.seen = []
        super().__init__(monitor, *arguments)

    def judge(self, epoch, logs, value):
        self.seen.append((epoch, value))


def compiled(**options):
    return kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse", **options)


# Which way is better.


@pytest.mark.parametrize(
    "name",
    [
        *("accuracy", "val_acc", "val_top5_accuracy", "top_3", "sparse_categorical_accuracy", "AUC", "binary_auroc"),
        *("f1", "val_f1_score", "BinaryF1Score", "multiclass_f_beta_score", "precision", "recall_1", "r2", "r2_score"),
        *("head_accuracy", "acc@1", "val_IoU", "mean_io_u", "dice", "mAP", "ndcg", "psnr", "myaccuracy", "acc2"),
    ],
)
def test_of_these_names_more_is_better(name):
    assert Watch(name).mode == "max"


@pytest.mark.parametrize(
    "name",
    [
        *("loss", "val_loss", "mse", "val_mae", "perplexity", "val_cross_entropy", "anything", "lr", ""),
        *(
            "accuracy_loss",
            "top1_error",
            "val_precision_loss",
            "accumulated",
            "vaccine",
            "topology",
            "mapping",
            "scape",
        ),
    ],
)
def test_of_all_others_less_is_better(name):
    assert Watch(name).mode == "min"


def test_a_mode_that_is_given_wins_over_the_name():
    assert (Watch("accuracy", "min").mode, Watch("loss", "max").mode) == ("min", "max")


@pytest.mark.parametrize(
    ("value", "reference", "expected"),
    [
        (1.0, None, True),
        (NAN, None, True),
        (1.0, NAN, True),
        (NAN, NAN, False),
        (NAN, 1.0, False),
        (0.75, 1.0, True),
        (1.0, 1.0, False),
        (1.25, 1.0, False),
        (-INF, INF, True),
        (INF, INF, False),
    ],
)
def test_a_value_is_better_when_it_is_lower(value, reference, expected):
    assert Watch("loss").is_better(value, reference) is expected
    # The same, upside down.
    assert Watch("accuracy").is_better(-value, None if reference is None else -reference) is expected


def test_exactly_min_delta_better_is_not_better():
    lower, higher = Watch("loss", "auto", 0.25), Watch("accuracy", "auto", 0.25)
    assert [lower.is_better(value, 1.0) for value in (0.74, 0.75, 0.76)] == [True, False, False]
    assert [higher.is_better(value, 1.0) for value in (1.26, 1.25, 1.24)] == [True, False, False]


# What is in the logs.


@pytest.mark.parametrize(
    "value",
    [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5)],
)
def test_a_value_is_any_kind_of_number(value):
    watched = Watch().watched({"val_loss": value})
    assert watched == 0.5 and type(watched) is float


def test_a_whole_number_is_one_too():
    assert Watch().watched({"val_loss": 3}) == Watch().watched({"val_loss": torch.tensor(3)}) == 3.0


@pytest.mark.parametrize("value", [[0.5], "0.5", None, torch.ones(2), np.ones(1), 1j, torch.tensor(1j)])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="Watch monitors 'val_loss', which is a .*, expected a number. Log its mean"):
        Watch().watched({"val_loss": value})


def test_a_name_with_val_waits_for_a_validation():
    assert Watch("val_loss").watched({"loss": 1.0, "accuracy": 0.5}) is None
    assert Watch("val_loss").watched({}) is None


def test_a_missing_name_is_an_error_with_the_nearest():
    logs = {"loss": 1.0, "accuracy": 0.5, "val_loss": 1.0, "val_accuracy": 0.5}
    known = "but the logs have loss, accuracy, val_loss, val_accuracy"
    with pytest.raises(ValueError, match=f"Watch monitors 'val_accurracy', {known}. Did you mean 'val_accuracy'?"):
        Watch("val_accurracy").watched(logs)
    with pytest.raises(
        ValueError, match=f"Watch monitors 'f1', {known}. Give one of these, or add the metric to compile"
    ):
        Watch("f1").watched(logs)
    with pytest.raises(ValueError, match="Watch monitors 'f1'"):
        Watch("f1").watched({"loss": 1.0})


# When it is judged.


def intervals(callback, epoch, *values, end=None, **others):
    """An epoch with several validations, as the loop tells of them."""
    callback.on_epoch_begin(epoch, {})
    for value in values:
        callback.on_interval_end(epoch, {"loss": 1.0, "val_loss": value})
    logs = {"loss": 1.0} | ({"val_loss": values[-1]} if values else {}) | others
    callback.on_epoch_end(epoch, logs if end is None else end)


def test_a_value_of_an_epoch_is_judged_at_its_end():
    watch = Watch()
    for epoch in range(3):
        watch.on_epoch_begin(epoch, {})
        watch.on_epoch_end(epoch, {"loss": 1.0, "val_loss": 0.5 * epoch})
    assert watch.seen == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_several_validations_of_an_epoch_are_judged_once_each():
    watch = Watch()
    intervals(watch, 0, 3.0, 2.0, 1.0)
    intervals(watch, 1, 0.5)
    assert watch.seen == [(0, 3.0), (0, 2.0), (0, 1.0), (1, 0.5)]


def test_an_epoch_without_validations_within_is_judged_at_its_end_again():
    watch = Watch()
    intervals(watch, 0, 3.0)
    intervals(watch, 1, val_loss=2.0)
    assert watch.seen == [(0, 3.0), (1, 2.0)]


def test_a_mean_of_the_training_is_judged_at_the_end_alone():
    watch = Watch("loss")
    intervals(watch, 0, 3.0, 2.0)
    assert watch.seen == [(0, 1.0)]


def test_what_other_callbacks_put_into_the_logs_is_judged_at_the_end():
    watch = Watch("val_bleu")
    intervals(watch, 0, 3.0, 2.0, val_bleu=0.5)
    assert watch.seen == [(0, 0.5)]
    with pytest.raises(ValueError, match="Watch monitors 'val_bleu'"):
        intervals(watch, 1, 3.0, 2.0)


def test_validations_within_an_epoch_that_was_broken_off_do_not_count_in_the_next_run():
    watch = Watch()
    watch.on_interval_end(2, {"val_loss": 3.0})
    watch.on_train_begin({})
    watch.on_epoch_end(2, {"val_loss": 2.0})
    assert watch.seen == [(2, 3.0), (2, 2.0)]


def test_only_epochs_with_a_validation_are_judged():
    watch = Watch()
    history = compiled().fit(*DATA, validation_data=DATA, validation_freq=2, epochs=5, callbacks=watch, verbose=0)
    assert watch.seen == [*zip((1, 3), history.history["val_loss"], strict=True)]


def test_each_epoch_has_its_own_loss():
    watch = Watch("loss")
    history = compiled().fit(*DATA, validation_data=DATA, epochs=3, callbacks=watch, verbose=0)
    assert [value for _, value in watch.seen] == history.history["loss"]


def test_hooks_called_without_logs_have_nothing_to_judge():
    watch = Watch()
    watch.on_interval_end(0)
    watch.on_epoch_end(0)
    assert watch.seen == []


class OwnLoss(kt.Model):
    """What it logs cannot be known before training."""

    def compute_loss(self, batch):
        return super().compute_loss(batch)


def test_a_run_in_which_nothing_was_judged_says_so():
    model = OwnLoss(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
    with pytest.warns(
        UserWarning, match="Watch monitors 'val_loss', but the run ended without a validation: it judged n"
    ):
        model.fit(*DATA, callbacks=Watch(), verbose=0)
    watch = Watch()
    model.fit(*DATA, validation_data=DATA, callbacks=watch, verbose=0)
    with pytest.warns(UserWarning, match="the run ended without a validation"):
        model.fit(*DATA, callbacks=watch, verbose=0)


def test_a_monitor_that_cannot_be_known_before_is_refused_in_the_first_epoch():
    model = OwnLoss(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
    with pytest.raises(ValueError, match="Watch monitors 'val_los', but the logs have loss, val_loss. Did you mean"):
        model.fit(*DATA, validation_data=DATA, callbacks=Watch("val_los"), verbose=0)


# Runs and states.


class Count(Watch):
    """Counts its judgements, and forgets them."""

    def reset(self):
        super().reset()
        self.seen = []


def test_each_run_starts_anew():
    count, model = Count(), compiled()
    for epochs in (3, 2):
        model.fit(*DATA, validation_data=DATA, epochs=epochs, callbacks=count, verbose=0)
        assert len(count.seen) == epochs


def test_a_run_goes_on_from_a_state_and_the_one_after_it_starts_anew():
    first, second, model = Count(), Count(), compiled()
    intervals(first, 1, 3.0, end={})  # what is saved now was saved within the epoch
    first.on_interval_end(2, {"val_loss": 2.0})
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.seen = ["loaded"]
    second.load_state_dict(torch.load(file, weights_only=True))
    second.on_train_begin({})
    second.on_epoch_begin(2, {})
    second.on_epoch_end(2, {"val_loss": 2.0})  # judged before the state was saved
    second.on_epoch_end(3, {"val_loss": 1.0})
    assert second.seen == ["loaded", (3, 1.0)]
    model.fit(*DATA, validation_data=DATA, callbacks=second, verbose=0)
    assert len(second.seen) == 1


def test_a_state_does_not_keep_an_epoch_of_that_number_in_the_next_run_from_being_judged():
    first, second = Watch(), Watch()
    intervals(first, 0, 3.0)
    second.load_state_dict(first.state_dict())
    second.on_train_begin({})
    intervals(second, 0, val_loss=2.0)
    assert second.seen == [(0, 2.0)]


# Arguments.


@pytest.mark.parametrize("monitor", [None, 3, ["val_loss"], nn.MSELoss()])
def test_a_monitor_is_a_name(monitor):
    with pytest.raises(TypeError, match="monitor=.* is a .*, expected a name such as 'val_loss'"):
        Watch(monitor)


@pytest.mark.parametrize("mode", ["Min", "maximum", None, 1])
def test_modes_are_three(mode):
    with pytest.raises(ValueError, match="mode=.* is not known. Give 'min', 'max' or 'auto'"):
        Watch("loss", mode)


@pytest.mark.parametrize("min_delta", [-1, -1e-9, NAN, INF, True, "0", None, torch.tensor(0.1)])
def test_min_delta_is_a_number_from_0_up(min_delta):
    with pytest.raises(ValueError, match="min_delta=.* is no size of a change. Give a number from 0 up"):
        Watch("loss", "auto", min_delta)


def test_a_subclass_says_what_a_value_means():
    with pytest.raises(NotImplementedError, match=r"Monitoring has no judge\(epoch, logs, value\)"):
        Monitoring("loss").on_epoch_end(0, {"loss": 1.0})
