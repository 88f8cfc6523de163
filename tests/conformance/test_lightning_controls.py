"""The controls of a run beside Lightning's Trainer: the same batches, the same validations, after the same steps."""

from __future__ import annotations

import logging
import random
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import kerastorch as kt

pytestmark = pytest.mark.conformance

X = torch.rand(20, 3)
Y = X.sum(1, keepdim=True)


class Seen:
    """What happened, batch by batch: numbers of epochs at their batches, and `"val"` at validations."""

    def __init__(self, stop_after=None):
        self.events, self.stop_after, self.batches = [], stop_after, 0

    def batch(self, epoch):
        self.events.append(epoch)
        self.batches += 1
        return self.batches == self.stop_after


def lightning_run(loader, *, stop_after=None, skip_at=None, **options):
    import lightning.pytorch as pl

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seen = Seen(stop_after)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 1)

        def training_step(self, batch, index):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            pass

        def on_validation_start(self):
            seen.events.append("val")

        def on_train_batch_start(self, batch, index):
            return -1 if index == skip_at else None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if seen.batch(trainer.current_epoch):
                trainer.should_stop = True

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            enable_model_summary=False,
            callbacks=[Record()],
            num_sanity_val_steps=0,
            **quiet,
            **options,
        )
        trainer.fit(Module(), loader, DataLoader(TensorDataset(X[:4], Y[:4]), 4))
    return seen.events, trainer.global_step


def our_run(loader, *, stop_after=None, skip_at=None, **options):
    seen = Seen(stop_after)

    class Record(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_begin(self, batch, logs=None):
            return -1 if batch == skip_at else None

        def on_train_batch_end(self, batch, logs=None):
            if seen.batch(self.epoch):
                self.model.stop_training = True

        def on_validation_begin(self, logs=None):
            seen.events.append("val")

    model = kt.Model(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
    options = {"validation_data": (X[:4], Y[:4])} | options
    model.fit(loader, callbacks=[Record()], verbose=0, **options)
    return seen.events, model.steps_taken


def loader_of(batches):
    return DataLoader(TensorDataset(X[: 2 * batches], Y[: 2 * batches]), 2)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield X[0], Y[0]


def without_validation(events):
    return [one for one in events if one != "val"]


@pytest.mark.parametrize("seed", range(25))
def test_epochs_steps_and_stops_end_a_run_at_the_same_batch(seed):
    draw = random.Random(seed)
    batches, accumulate = draw.randint(1, 7), draw.choice([1, 1, 2, 3])
    ours = {
        "epochs": draw.randint(1, 6),
        "min_epochs": draw.choice([None, None, 1, 2, 4]),
        "min_steps": draw.choice([None, None, 1, 5, 12]),
        "max_steps": draw.choice([None, None, 1, 4, 9, 13]),
        "accumulate": accumulate,
        "stop_after": draw.choice([None, 1, 3, 6, 11]),
    }
    theirs = {
        "max_epochs": ours["epochs"],
        "min_epochs": ours["min_epochs"] or 0,  # where it is left out, min_steps makes an epoch of it there
        "min_steps": ours["min_steps"],
        "max_steps": ours["max_steps"] or -1,
        "accumulate_grad_batches": accumulate,
        "stop_after": ours["stop_after"],
    }
    loader = loader_of(batches)
    (our_events, our_steps), (their_events, their_steps) = our_run(loader, **ours), lightning_run(loader, **theirs)
    assert without_validation(our_events) == without_validation(their_events), ours
    # A window that a stop cuts short makes its step here; Lightning drops its gradients.
    assert our_steps == their_steps or (accumulate > 1 and our_steps == their_steps + 1 and ours["stop_after"]), ours


@pytest.mark.parametrize("batches", [1, 4, 7, 10])
@pytest.mark.parametrize("interval", [0.1, 0.25, 0.3, 0.5, 1.0])
def test_a_fraction_of_an_epoch_validates_after_the_same_batches(batches, interval):
    loader = loader_of(batches)
    ours, _ = our_run(loader, epochs=3, validation_freq=interval)
    assert ours == lightning_run(loader, max_epochs=3, val_check_interval=interval)[0]


@pytest.mark.parametrize("batches", [1, 4, 7, 10])
@pytest.mark.parametrize("interval", [1, 3, 5, 12])
def test_so_many_steps_validate_after_the_same_batches_across_epochs(batches, interval):
    loader = loader_of(batches)
    ours, _ = our_run(loader, epochs=3, validation_freq=f"{interval} steps")
    theirs, _ = lightning_run(loader, max_epochs=3, val_check_interval=interval, check_val_every_n_epoch=None)
    assert ours == theirs


@pytest.mark.parametrize("every", [1, 2, 3])
def test_so_many_epochs_validate_after_the_same_epochs(every):
    loader = loader_of(3)
    ours, _ = our_run(loader, epochs=5, validation_freq=every)
    assert ours == lightning_run(loader, max_epochs=5, check_val_every_n_epoch=every)[0]


def test_data_without_an_end_is_trained_and_validated_alike():
    loader = DataLoader(Endless(), 2)
    ours = our_run(loader, max_steps=11, validation_freq="4 steps")
    theirs = lightning_run(loader, max_steps=11, val_check_interval=4, check_val_every_n_epoch=None)
    assert ours == theirs


def test_max_steps_alone_take_as_many_epochs():
    ours = our_run(loader_of(4), max_steps=10, validation_steps=0)
    assert ours == lightning_run(loader_of(4), max_steps=10, limit_val_batches=0)


@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.5, 1.0])
def test_fractions_of_the_data_are_as_many_batches(fraction):
    ours = our_run(loader_of(10), epochs=2, steps_per_epoch=fraction)
    assert ours == lightning_run(loader_of(10), max_epochs=2, limit_train_batches=fraction)


def test_overfit_batches_train_on_as_many():
    ours = our_run(loader_of(10), epochs=2, overfit_batches=3)
    assert ours == lightning_run(loader_of(10), max_epochs=2, overfit_batches=3)


@pytest.mark.parametrize("at", [0, 2])
def test_minus_one_before_a_batch_ends_the_epoch_alike(at):
    (ours, steps), (theirs, their_steps) = (
        our_run(loader_of(5), epochs=3, skip_at=at),
        lightning_run(loader_of(5), max_epochs=3, skip_at=at),
    )
    assert without_validation(ours) == without_validation(theirs) and steps == their_steps


def test_validation_of_a_run_cut_by_max_steps_is_ours_alone():
    """A checkpoint of the last epoch shall have a value of that epoch; Lightning ends without one."""
    ours, _ = our_run(loader_of(5), epochs=3, max_steps=7)
    theirs, _ = lightning_run(loader_of(5), max_epochs=3, max_steps=7)
    assert ours == [*theirs, "val"]
