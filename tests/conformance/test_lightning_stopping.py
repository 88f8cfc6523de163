"""EarlyStopping against Lightning's own: thresholds and `check_finite`, on thousands of random sequences."""

import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kerastorch as kt

lightning = pytest.importorskip("lightning.pytorch")

pytestmark = pytest.mark.conformance

REASONS = {
    "PATIENCE_EXHAUSTED": "was no better than",
    "STOPPING_THRESHOLD": "better than stopping_threshold",
    "DIVERGENCE_THRESHOLD": "worse than divergence_threshold",
    "NON_FINITE_METRIC": "(nan|inf|-inf)",
}


class Trainer:
    """What Lightning's callback asks a trainer for."""

    def __init__(self):
        self.state = SimpleNamespace(fn=lightning.trainer.states.TrainerFn.FITTING)
        self.strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
        self.sanity_checking = self.fast_dev_run = self.should_stop = False


def theirs_over(values, **options):
    callback, trainer = lightning.callbacks.EarlyStopping("x", check_on_train_epoch_end=True, **options), Trainer()
    for epoch, value in enumerate(values):
        trainer.current_epoch, trainer.callback_metrics = epoch, {"x": torch.tensor(value)}
        callback.on_train_epoch_end(trainer, None)
        if trainer.should_stop:
            return callback, epoch
    return callback, None


def ours_over(values, **options):
    callback = kt.callbacks.EarlyStopping("x", **options)
    model = SimpleNamespace(stop_training=False, module=nn.Linear(1, 1))
    callback.set_model(model)
    callback.on_train_begin({})
    for epoch, value in enumerate(values):
        callback.on_epoch_begin(epoch, {})
        callback.on_epoch_end(epoch, {"x": value})
        if model.stop_training:
            callback.on_train_end({})
            return callback, epoch
    return callback, None


def test_it_stops_as_lightnings_for_the_same_reason():
    stopped = dict.fromkeys(REASONS, 0)
    for seed in range(2000):
        dice = random.Random(seed)
        mode = dice.choice(("min", "max"))
        sign = 1 if mode == "min" else -1
        options = {
            "mode": mode,
            "patience": dice.choice((0, 1, 2, 4, 9)),
            "min_delta": dice.choice((0.0, 0.125, 0.5)),
            "stopping_threshold": sign * dice.choice((-1.0, -2.0)) if dice.random() < 0.5 else None,
            "divergence_threshold": sign * dice.choice((1.5, 2.5)) if dice.random() < 0.5 else None,
            "check_finite": dice.choice((False, True)),
        }
        value, values = 1.0, []
        for epoch in range(dice.randint(1, 12)):
            value += dice.randint(-7, 8) / 8 * sign
            is_lost = dice.random() < 0.05 and epoch > 0
            values.append(dice.choice((math.nan, math.inf, -math.inf)) if is_lost else value)
        theirs, their_epoch = theirs_over(values, **options)
        ours, our_epoch = ours_over(values, **options)
        case = options, values
        assert our_epoch == their_epoch, case
        if our_epoch is None:
            assert ours.reason is None and (ours.wait, ours.best) == (theirs.wait_count, theirs.best_score.item()), case
            continue
        assert ours.stopped_epoch == theirs.stopped_epoch, case
        why = theirs.stopping_reason.name
        stopped[why] += 1
        assert re.match(f"x .*{REASONS[why]}", ours.reason), case
        if why == "PATIENCE_EXHAUSTED":
            assert (ours.wait, ours.best) == (theirs.wait_count, theirs.best_score.item()), case
    assert min(stopped.values()) > 50, stopped
