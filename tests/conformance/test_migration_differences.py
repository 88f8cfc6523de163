"""What the guides for those who come from Lightning or Keras say that differs, tried with both libraries.

Shapes, steps, generators, logits and NaN beside Keras are in `test_keras_differences.py` and `test_keras_stopping.py`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import os
import signal
import typing

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt

keras = pytest.importorskip("keras")
pl = pytest.importorskip("lightning.pytorch")

pytestmark = [pytest.mark.conformance, pytest.mark.filterwarnings("ignore")]


# Lightning.


X3, Y1 = torch.rand(20, 3), torch.rand(20, 1)
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def silence(tmp_path, monkeypatch):
    """Lightning writes and says things."""
    monkeypatch.chdir(tmp_path)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Regressor(pl.LightningModule):
    """Notes in `seen` what it trains (`"t"`) and validates (`"v"`) on."""

    def __init__(self, net=None):
        super().__init__()
        self.net, self.seen = net or nn.Linear(3, 1), []

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, index):
        self.seen.append("t")
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.seen.append("v")
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0 if isinstance(self.net, nn.Linear) else 0.01)


def batches(samples=20, size=2):
    return DataLoader(TensorDataset(X3[:samples], Y1[:samples]), size)


def their_fit(module=None, data=None, val=None, *callbacks, **options):
    """Fits with Lightning; returns the module and the trainer."""
    module, trainer = module or Regressor(), pl.Trainer(callbacks=list(callbacks), **QUIET | options)
    trainer.fit(module, data or batches(), val)
    return module, trainer


def our_model(net=None, lr=1.0):
    return kt.Model(net or nn.Linear(3, 1), backend="cpu").compile("sgd", "mse", lr=lr)


def our_fit(data=None, *callbacks, model=None, **options):
    model = model or our_model()
    history = model.fit(data or batches(), callbacks=list(callbacks), verbose=0, **options)
    return model, history


def on(**hooks):
    """A Lightning callback of functions `(trainer, module)`."""
    wrapped = {name: lambda trainer, module, *_, hook=hook: hook(trainer, module) for name, hook in hooks.items()}
    return pl.callbacks.LambdaCallback(**wrapped)


def stop_at(count):
    calls = itertools.count(1)

    def stop(trainer, module):
        trainer.should_stop |= next(calls) == count

    return on(on_train_batch_end=stop)


class StopAt(kt.Callback):
    def __init__(self, count):
        self.count, self.calls = count, 0

    def on_train_batch_end(self, batch, logs=None):
        self.calls += 1
        if self.calls == self.count:
            self.model.stop_training = True


def test_a_run_that_is_told_nothing_is_one_epoch_where_lightning_takes_1000():
    epochs = []
    their_fit(None, None, None, on(on_train_start=lambda trainer, _: epochs.append(trainer.max_epochs)), stop_at(1))
    assert epochs == [1000]
    assert our_fit()[1].epoch == [0]


def test_a_short_window_makes_half_a_step_in_lightning_and_none_where_a_stop_cuts_it():
    nets = [nn.Linear(3, 1)]
    nets += [nn.Linear(3, 1) for _ in range(2)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    before = nets[0].weight.detach().clone()
    their_fit(Regressor(nets[0]), batches(4), max_epochs=1, accumulate_grad_batches=4)
    our_fit(batches(4), model=our_model(nets[1]), accumulate=4)
    our_fit(batches(4, 4), model=our_model(nets[2]))
    theirs, ours, whole = (net.weight.detach() - before for net in nets)
    torch.testing.assert_close(theirs, whole / 2)
    torch.testing.assert_close(ours, whole)
    _, trainer = their_fit(None, None, None, stop_at(6), max_epochs=1, accumulate_grad_batches=4)
    assert trainer.global_step == 1 and our_fit(None, StopAt(6), accumulate=4)[0].steps_taken == 2


def test_what_a_training_step_logs_is_the_last_batch_in_lightning_unless_told():
    class Logs(Regressor):
        def training_step(self, batch, index):
            self.log("last", float(index))
            self.log("mean", float(index), on_step=False, on_epoch=True)
            return super().training_step(batch, index)

    class Ours(kt.Model):
        def compute_loss(self, batch):
            self.log("index", next(indices))
            return super().compute_loss(batch)

    _, trainer = their_fit(Logs(), batches(5), max_epochs=1)
    indices = itertools.count()
    history = Ours(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse").fit(batches(5), verbose=0)
    assert trainer.callback_metrics["last"] == 2
    assert trainer.callback_metrics["mean"] == pytest.approx(0.8) == history.history["index"][0]


@pytest.mark.parametrize("kind", ["EarlyStopping", "ModelCheckpoint"])
def test_an_unknown_monitor_is_an_error_before_the_first_batch_where_lightnings_comes_after_the_epoch(kind):
    module = Regressor()
    theirs = getattr(pl.callbacks, kind)(monitor="nope")
    options = {"enable_checkpointing": True} if kind == "ModelCheckpoint" else {}
    with pytest.raises(Exception, match="nope"):
        their_fit(module, None, batches(2), theirs, max_epochs=2, **options)
    assert module.seen == ["t"] * 10 + ["v"]
    seen = []
    note = kt.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: seen.append(batch))
    options = {"filepath": "a.pt", "save_best_only": True} if kind == "ModelCheckpoint" else {}
    with pytest.raises(ValueError, match="nope"):
        our_fit(None, getattr(kt.callbacks, kind)(monitor="nope", **options), note, validation_data=batches(2))
    assert seen == []


def test_a_count_of_batches_is_the_same_ones_in_each_epoch_in_lightning():
    class Notes(Regressor):
        def training_step(self, batch, index):
            self.seen.append(batch[0][0, 0].item())
            return self.loss(batch)

    first = [X3[index, 0].item() for index in range(0, 20, 2)]
    assert their_fit(Notes(), max_epochs=2, limit_train_batches=3)[0].seen == first[:3] * 2
    for count, expected in ((3, first[:6]), (0.3, first[:3] * 2)):
        seen = []

        class Ours(kt.Model):
            def compute_loss(self, batch, seen=seen):
                seen.append(batch[0][0, 0].item())
                return super().compute_loss(batch)

        model = Ours(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
        our_fit(model=model, epochs=2, steps_per_epoch=count)
        assert seen == expected


def test_fractions_that_give_no_batch_are_refused_by_lightning_and_one_batch_here():
    with pytest.raises(Exception, match="0.05"):
        their_fit(max_epochs=1, limit_train_batches=0.05)
    assert our_fit(steps_per_epoch=0.05)[0].steps_taken == 1


class TwoOptimizers(Regressor):
    def __init__(self):
        super().__init__(nn.ModuleDict({"left": nn.Linear(3, 1), "right": nn.Linear(3, 1)}))
        self.automatic_optimization = False

    def training_step(self, batch, index):
        self.seen.append("t")
        for optimizer, net in zip(self.optimizers(), self.net.values(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 0.01) for net in self.net.values()]


def test_steps_of_two_optimizers_are_added_in_lightning():
    class Pair(kt.Model):
        seen = 0

        def train_step(self, batch):
            self.seen += 1
            for name, net in self.module.items():
                self.backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                self.optimizer_step(name)

    module, trainer = their_fit(TwoOptimizers(), max_epochs=3, max_steps=6)
    assert len(module.seen) == 3 and trainer.global_step == 6
    pair = Pair(TwoOptimizers().net, backend="cpu").compile({"left": "sgd", "right": "sgd"})
    our_fit(model=pair, epochs=3, max_steps=6)
    assert pair.seen == pair.steps_taken == 6


def test_min_steps_alone_is_an_epoch_too_in_lightning():
    assert their_fit(None, None, None, stop_at(2), max_epochs=5, min_steps=3)[1].global_step == 10
    assert our_fit(None, StopAt(2), epochs=5, min_steps=3)[0].steps_taken == 3


def test_a_run_that_max_steps_cuts_is_validated_here_alone():
    module, _ = their_fit(None, None, batches(2), max_steps=3)
    assert "v" not in module.seen
    assert len(our_fit(max_steps=3, validation_data=batches(2))[1].history["val_loss"]) == 1


def test_a_module_in_eval_mode_is_trained_so_in_lightning():
    def net():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1))

    modes = []
    note = on(on_train_batch_end=lambda _, module: modes.append([part.training for part in module.net]))
    module = Regressor(net().eval())
    their_fit(module, batches(2), None, note, max_epochs=1)
    module = Regressor(net())
    module.freeze()
    module.net[3].requires_grad_(True)
    their_fit(module, batches(2), None, note, max_epochs=1)
    model = our_model(net().eval())
    note = kt.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: modes.append([one.training for one in model.module])
    )
    our_fit(None, note, model=model)
    model.freeze("0", "1")
    our_fit(None, note, model=model)
    assert not model.module.training
    assert modes[:2] == [[False] * 4] * 2 and modes[2] == [True] * 4 and modes[-1] == [True, False, True, True]


def test_a_second_fit_has_new_optimizers_in_lightning_or_does_nothing():
    module, trainer = their_fit(max_epochs=2)
    optimizer = trainer.optimizers[0]
    trainer.fit(module, batches())
    assert trainer.global_step == 20 == len(module.seen)
    _, trainer = their_fit(module, max_epochs=1)
    assert trainer.optimizers[0] is not optimizer
    model, _ = our_fit()
    optimizer = model.optimizer
    assert our_fit(model=model, epochs=2)[1].epoch == [0, 1] and model.optimizer is optimizer
    assert model.epochs_trained == 3


def test_nothing_is_written_or_checked_unless_asked_for(tmp_path):
    our_fit(validation_data=batches(2))
    assert not list(tmp_path.iterdir())
    module = Regressor()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, batches(), batches())
    assert module.seen[:3] == ["v", "v", "t"]
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["epoch=1-step=20.ckpt"]


def test_a_dry_run_is_undone_and_tries_files_where_fast_dev_run_is_neither(tmp_path):
    module = Regressor()
    before = module.net.weight.detach().clone()
    checkpoint = pl.callbacks.ModelCheckpoint("theirs")
    their_fit(module, None, None, checkpoint, fast_dev_run=2, enable_checkpointing=True)
    assert not torch.equal(module.net.weight, before) and not (tmp_path / "theirs").exists()
    model, saved = our_model(), []
    before = model.module.weight.detach().clone()
    note = kt.callbacks.LambdaCallback(on_train_end=lambda logs: saved.append(model.path_for("ours.pt").exists()))
    our_fit(None, kt.callbacks.ModelCheckpoint("ours.pt"), note, model=model, dry_run=2)
    assert saved == [True] and torch.equal(model.module.weight, before) and not (tmp_path / "ours.pt").exists()


def test_overfit_batches_validates_on_the_training_batches_here_alone():
    class Notes(Regressor):
        def training_step(self, batch, index):
            self.seen.append(batch[0][0, 0].item())
            return self.loss(batch)

        def validation_step(self, batch, index):
            self.training_step(batch, index)

    other = DataLoader(TensorDataset(X3.flip(0), Y1), 2)
    theirs = their_fit(Notes(), None, other, max_epochs=1, overfit_batches=2)[0].seen
    assert theirs == X3[[0, 2], 0].tolist() + X3.flip(0)[[0, 2], 0].tolist()
    seen = []

    class Ours(kt.Model):
        def compute_loss(self, batch):
            seen.append(batch[0][0, 0].item())
            return super().compute_loss(batch)

    model = Ours(nn.Linear(3, 1), backend="cpu").compile("sgd", "mse")
    our_fit(model=model, validation_data=other, overfit_batches=2)
    assert seen == X3[[0, 2], 0].tolist() * 2


def average_of(weights, decay):
    """The moving average that begins with the first weights."""
    average = weights[0]
    for one in weights[1:]:
        average = decay * average + (1 - decay) * one
    return average


def test_ema_is_lightnings_but_for_buffers():
    def net():
        return nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))

    class Validates(Regressor):
        def validation_step(self, batch, index):
            validated.append(self.net[0].weight.detach().clone())

    weights, validated, means = [], [], []

    def note(net):
        weights.append(net[0].weight.detach().clone())
        means.append(net[1].running_mean.clone())

    module = Validates(net())
    ema, notes = pl.callbacks.EMAWeightAveraging(decay=0.5), on(on_train_batch_end=lambda _, one: note(one.net))
    their_fit(module, None, batches(2), ema, notes, max_epochs=1)
    torch.testing.assert_close(validated[0], average_of(weights, 0.5))
    torch.testing.assert_close(module.net[0].weight.detach(), average_of(weights, 0.5))
    assert not torch.equal(module.net[1].running_mean, means[-1])

    weights.clear(), validated.clear(), means.clear()
    model = our_model(net(), lr=0.01)
    notes = kt.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: note(model.module),
        on_test_batch_begin=lambda *_: validated.append(model.module[0].weight.detach().clone()),
    )
    saving = kt.callbacks.ModelCheckpoint("ema.safetensors", save_weights_only=True)
    our_fit(None, kt.callbacks.EMA(0.5), saving, notes, model=model, validation_data=batches(2))
    torch.testing.assert_close(validated[0], average_of(weights, 0.5))
    torch.testing.assert_close(model.module[0].weight.detach(), average_of(weights, 0.5))
    assert torch.equal(model.module[1].running_mean, means[-1])
    saved = kt.Model(net(), backend="cpu").load_weights("ema.safetensors").module
    assert torch.equal(saved[0].weight, model.module[0].weight)


def test_epochs_of_swa_are_counted_from_1_in_lightning():
    for start in (2, 0.5):
        theirs = pl.callbacks.StochasticWeightAveraging(0.5, swa_epoch_start=start)
        their_fit(None, None, None, theirs, max_epochs=4)
        ours = kt.callbacks.StochasticWeightAveraging(0.5, swa_epoch_start=start)
        our_fit(None, ours, epochs=4)
        assert int(theirs.n_averaged) == 3
        assert ours.state_dict()["count"] + 1 == 2  # with the epoch that ended last


def test_checkpoints_are_put_last_by_lightning():
    stopping = pl.callbacks.EarlyStopping("val_loss")
    given = [pl.callbacks.ModelCheckpoint("a"), stopping, pl.callbacks.Timer()]
    trainer = pl.Trainer(**QUIET | {"enable_checkpointing": True}, callbacks=given)
    assert trainer.callbacks == [*given[1:], given[0]]


def test_epochs_in_file_names_and_files_of_one_name(tmp_path):
    for _ in range(2):
        saving = pl.callbacks.ModelCheckpoint("theirs", filename="{epoch}", save_top_k=-1)
        their_fit(None, None, None, saving, max_epochs=1, enable_checkpointing=True)
        our_fit(None, kt.callbacks.ModelCheckpoint("ours/{epoch}.pt"))
    names = {folder: sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("theirs", "ours")}
    assert names == {"theirs": ["epoch=0-v1.ckpt", "epoch=0.ckpt"], "ours": ["1.pt"]}


def test_ctrl_c_ends_the_program_in_lightning():
    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        their_fit(None, None, None, on(on_train_batch_end=press), max_epochs=1)
    _, history = our_fit(None, kt.callbacks.LambdaCallback(on_train_batch_end=press))
    assert history.stopped_by == "interrupt" and len(history.history["loss"]) == 1


def test_an_interval_of_batches_is_counted_anew_in_each_epoch_by_lightning_unless_told():
    seen = "".join(their_fit(None, None, batches(2), max_epochs=2, val_check_interval=4)[0].seen)
    assert seen == "ttttvttttvtt" * 2
    _, history = our_fit(epochs=2, validation_data=batches(2), validation_freq="4 steps")
    assert [(one["epoch"], one["batch"]) for one in history.intervals] == [(0, 3), (0, 7), (1, 1), (1, 5), (1, 9)]


def test_gradients_are_dropped_with_the_next_batch_in_lightning():
    events = []
    notes = {
        "on_before_zero_grad": lambda *_: events.append("zero"),
        "on_before_optimizer_step": lambda *_: events.append("step"),
    }
    their_fit(None, batches(4), None, on(**notes), max_epochs=1)
    our_fit(batches(4), kt.callbacks.LambdaCallback(**notes))
    assert events == ["zero", "step"] * 2 + ["step", "zero"] * 2


def test_gradients_are_there_after_each_batch_and_whole_but_not_clipped_before_a_step_in_both():
    events, nets = [], [nn.Linear(3, 1), nn.Linear(3, 1)]
    nets[1].load_state_dict(nets[0].state_dict())

    def notes(net):
        return {
            "on_after_backward": lambda *_: events.append("backward"),
            "on_before_optimizer_step": lambda *_: events.append(round(net.weight.grad.norm().item(), 4)),
        }

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3}
    their_fit(Regressor(nets[0]), batches(4), None, on(**notes(nets[0])), max_epochs=1, **options)
    model = our_model(nets[1]).compile("sgd", "mse", clip=1e-3)
    our_fit(batches(4), kt.callbacks.LambdaCallback(**notes(nets[1])), model=model, accumulate=2)
    assert events[:3] == events[3:] and events[:2] == ["backward"] * 2 and events[2] > 0.01


def test_predictions_are_a_list_of_batches_in_lightning():
    class Predicts(Regressor):
        def predict_step(self, batch, index):
            return self.net(batch[0])

    module = Predicts()
    theirs = pl.Trainer(**QUIET).predict(module, batches())
    ours = our_model(module.net).predict(batches(), verbose=0)
    assert len(theirs) == 10
    torch.testing.assert_close(torch.cat(theirs), ours)


def test_names_of_lightnings_precisions_are_known():
    kinds = typing.get_args(inspect.signature(pl.Trainer).parameters["precision"].annotation)
    names = {name for kind in kinds for name in typing.get_args(kind) if "transformer" not in str(name)}
    assert len(names) > 10
    for name in names:
        our_model().compile("sgd", "mse", precision=name)


def test_unfreezing_counts_epochs_from_0_in_both():
    class Backbone(Regressor):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
            self.backbone = self.net[0]

        def configure_optimizers(self):
            return torch.optim.SGD(self.net[1].parameters(), lr=0.01)

    trained = []
    tuning = pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    note = on(on_train_epoch_end=lambda _, module: trained.append(module.backbone.weight.requires_grad))
    their_fit(Backbone(), None, None, tuning, note, max_epochs=3)
    model = our_model(Backbone().net).freeze("0")
    note = kt.callbacks.LambdaCallback(on_epoch_end=lambda *_: trained.append(model.module[0].weight.requires_grad))
    our_fit(None, kt.callbacks.Unfreeze(at_epoch=1, pattern="0"), note, model=model, epochs=3)
    assert trained == [False, True, True] * 2


def test_going_on_from_the_checkpoint_of_an_epoch_takes_the_same_steps():
    def make():
        torch.manual_seed(0)
        return kt.Model(nn.Linear(3, 1), backend="cpu").compile("adam", "mse", lr=0.01, schedule="cosine")

    options = {"epochs": 6, "batch_size": 4, "verbose": 0}
    whole = make()
    whole.fit(X3, Y1, **options, callbacks=kt.callbacks.ModelCheckpoint("{epoch}.pt"))
    other = make().load("3.pt")
    assert other.epochs_trained == 3
    other.fit(X3, Y1, **options, initial_epoch=other.epochs_trained)
    assert torch.equal(other.module.weight, whole.module.weight)


# Keras.


ORDERED = {"batch_size": 4, "shuffle": False, "verbose": 0}
A, B = X3.numpy(), Y1.numpy()


def keras_model(optimizer="sgd", **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", **options)
    return model


def test_the_default_optimizer_of_keras_is_rmsprop():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    assert isinstance(model.optimizer, keras.optimizers.RMSprop)
    assert isinstance(our_model().compile(loss="mse").optimizer, torch.optim.Adam)


def as_torch(model):
    """A linear layer with the weights of a Keras model of one."""
    net = nn.Linear(3, 1)
    kernel, bias = model.get_weights()
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(kernel.T))
        net.bias.copy_(torch.from_numpy(bias))
    return net


def test_weight_decay_shrinks_weights_in_every_optimizer_of_keras():
    options = {"weight_decay": 0.5, "epsilon": 1e-14}
    ends = []
    for kind in (keras.optimizers.Adam, keras.optimizers.AdamW):
        model = keras_model(kind(0.1, **options))
        nets = [as_torch(model) for _ in range(2)]
        model.fit(A, B, **ORDERED)
        ends.append(as_torch(model).weight.detach())
    for net, kind in zip(nets, (torch.optim.Adam, torch.optim.AdamW), strict=True):
        make = functools.partial(kind, lr=0.1, weight_decay=0.5, eps=1e-14)
        kt.Model(net, backend="cpu").compile(make, "mse").fit(A, B, **ORDERED)
        ends.append(net.weight.detach())
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ends[0], ends[2], atol=1e-2)


def test_clipnorm_is_for_each_variable_and_global_clipnorm_is_clip():
    steps = {}
    for name in ("clipnorm", "global_clipnorm"):
        model = keras_model(keras.optimizers.SGD(1.0, **{name: 0.1}))
        before = model.get_weights()
        model.fit(A, 100 * B, **ORDERED | {"batch_size": 20})
        steps[name] = [np.linalg.norm(after - one) for after, one in zip(model.get_weights(), before, strict=True)]
    net = as_torch(keras_model())
    before = torch.cat([one.detach().flatten() for one in net.parameters()])
    model = kt.Model(net, backend="cpu").compile("sgd", "mse", lr=1.0, clip=0.1)
    model.fit(A, 100 * B, **ORDERED | {"batch_size": 20})
    ours = torch.cat([one.detach().flatten() for one in net.parameters()]) - before
    assert steps["clipnorm"] == pytest.approx([0.1, 0.1])
    assert np.linalg.norm(steps["global_clipnorm"]) == pytest.approx(0.1) == ours.norm().item()


def test_accumulation_goes_over_epochs_in_keras():
    model, weights = keras_model(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)), []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: weights.append(model.get_weights()[0]))
    model.fit(A, B, epochs=2, callbacks=[note], **ORDERED)  # 5 batches each
    changes = [index + 2 for index, pair in enumerate(itertools.pairwise(weights)) if not np.array_equal(*pair)]
    assert changes == [4, 8]
    model = our_model()
    model.fit(A, B, epochs=2, accumulate=4, **ORDERED)
    assert model.steps_taken == 4


def test_the_rate_is_learning_rate_in_the_logs_of_keras_and_that_of_a_schedule_is_not_there():
    model = keras_model()
    set_rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)
    assert set(model.fit(A, B, callbacks=[set_rate], **ORDERED).history) == {"loss", "learning_rate"}
    model = keras_model(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 100)))
    assert set(model.fit(A, B, **ORDERED).history) == {"loss"}
    model = our_model().compile("sgd", "mse", schedule="cosine")
    assert set(model.fit(A, B, **ORDERED).history) == {"loss", "lr"}


@pytest.mark.parametrize("swaps", [False, True])
def test_use_ema_validates_with_the_weights_of_training_unless_they_are_swapped(swaps):
    model, weights, validated = keras_model(keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)), [], []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: weights.append(model.get_weights()[0].copy()),
        on_test_begin=lambda logs: validated.append(model.get_weights()[0].copy()),
    )
    swapping = [keras.callbacks.SwapEMAWeights()] if swaps else []
    model.fit(A, B, validation_data=(A, B), callbacks=[*swapping, note], **ORDERED)
    average = average_of(weights, 0.5)
    np.testing.assert_allclose(validated[0], average if swaps else weights[-1], atol=1e-6)
    np.testing.assert_allclose(model.get_weights()[0], average, atol=1e-6)


def test_keras_saves_epochs_without_validation_as_if_they_were_better(tmp_path):
    options = {"validation_data": (A, B), "validation_freq": 2, "epochs": 3} | ORDERED
    saving = {"save_best_only": True, "save_weights_only": True}
    keras_model().fit(A, B, callbacks=[keras.callbacks.ModelCheckpoint("{epoch}.weights.h5", **saving)], **options)
    our_model(lr=0.01).fit(A, B, callbacks=[kt.callbacks.ModelCheckpoint("{epoch}.safetensors", **saving)], **options)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["1.weights.h5", "2.safetensors", "2.weights.h5", "3.weights.h5"]


def test_an_unknown_monitor_is_a_warning_after_each_epoch_in_keras():
    with pytest.warns(UserWarning, match="nope"):
        keras_model().fit(A, B, callbacks=[keras.callbacks.EarlyStopping("nope", mode="min")], **ORDERED)
    with pytest.raises(ValueError, match="nope"):
        our_model().fit(A, B, callbacks=[kt.callbacks.EarlyStopping("nope", mode="min")], **ORDERED)


def test_ctrl_c_is_raised_by_keras():
    press = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        keras_model().fit(A, B, callbacks=[press], **ORDERED)


def test_a_backup_within_an_epoch_goes_on_there_where_keras_begins_the_epoch_anew():
    class Seen(keras.callbacks.Callback):
        def __init__(self, fails_at=None):
            super().__init__()
            self.batches, self.fails_at = [], fails_at

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            self.batches.append((self.epoch, batch))
            if len(self.batches) == self.fails_at:
                raise RuntimeError("cut")

    seen = []
    for library, make in ((keras, keras_model), (kt, our_model)):
        for fails_at in (8, None):
            backup, note = library.callbacks.BackupAndRestore(library.__name__, save_freq=2), Seen(fails_at)
            try:
                make().fit(A, B, epochs=2, callbacks=[backup, note], **ORDERED)
            except RuntimeError:
                continue
            seen.append(note.batches)
    assert seen == [[(1, batch) for batch in range(first, 5)] for first in (0, 1)]


@pytest.mark.parametrize(("name", "ours"), [("bfloat16", "bf16-true"), ("float16", "16-true")])
def test_precisions_named_after_one_dtype_are_that_of_the_weights_in_keras(name, ours):
    layer = keras.layers.Dense(1, dtype=name)
    layer.build((None, 3))
    assert name in str(layer.kernel.dtype)
    assert our_model().compile("sgd", "mse", precision=ours).module.weight.dtype == getattr(torch, name)
    assert our_model().compile("sgd", "mse", precision=name).module.weight.dtype == torch.float32


def test_frozen_batch_norm_keeps_its_statistics_in_both():
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    before = model.layers[0].get_weights()[2].copy()
    model.fit(A, B, **ORDERED)
    assert np.array_equal(model.layers[0].get_weights()[2], before)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    our_model(net).freeze("0").fit(A, B, **ORDERED)
    assert torch.equal(net[0].running_mean, torch.zeros(3))


def test_a_keras_model_trains_here_without_its_dropout_and_statistics():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    )
    before = [array.copy() for array in model.get_weights()]
    kt.Model(model, backend="cpu").compile("sgd", "mse", lr=0.1).fit(A + 3, B, **ORDERED)
    gamma, _, mean, _, kernel, _ = (not np.allclose(*pair) for pair in zip(before, model.get_weights(), strict=True))
    assert kernel and gamma and not mean


RUN_HERE = {
    "CSVLogger": ("log.csv",),
    "Callback": (),
    "EarlyStopping": ("loss", 0, 0, 0, "min"),
    "History": (),
    "LambdaCallback": (),
    "ProgbarLogger": (),
    "RemoteMonitor": (),
    "TerminateOnNaN": (),
}
REFUSED_HERE = {
    "BackupAndRestore": ("backup",),
    "LearningRateScheduler": (lambda epoch: 0.1,),
    "ModelCheckpoint": ("a.keras",),
    "ReduceLROnPlateau": ("loss", 0.1, 0, 0, "min"),
    "SwapEMAWeights": (),
}


@pytest.mark.parametrize("name", RUN_HERE)
def test_callbacks_of_keras_that_know_no_optimizer_and_no_file_run_here(name):
    our_fit(None, getattr(keras.callbacks, name)(*RUN_HERE[name]), validation_data=batches(2), epochs=2)


@pytest.mark.parametrize("name", REFUSED_HERE)
def test_the_others_fail_here_and_say_who(name):
    with pytest.raises((AttributeError, TypeError, ValueError), match=f"raised in {name}"):
        our_fit(None, getattr(keras.callbacks, name)(*REFUSED_HERE[name]), validation_data=batches(2), epochs=2)


def test_metrics_and_losses_of_keras_are_refused_with_what_to_give():
    model = our_model()
    for metric in (
        keras.metrics.MeanAbsoluteError(),
        keras.metrics.MeanAbsoluteError,
        keras.metrics.mean_squared_error,
    ):
        with pytest.raises(TypeError, match="is Keras's own.*Give the name as a text"):
            model.compile("sgd", "mse", metrics=["mae", metric])
    with pytest.raises(TypeError, match="loss MeanAbsolutePercentageError is Keras's own"):
        model.compile("sgd", keras.losses.MeanAbsolutePercentageError())


def test_a_sequence_of_batches_is_taken_and_its_hooks_are_not_called():
    called = []

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            called.append(index)
            return A[4 * index : 4 * index + 4], B[4 * index : 4 * index + 4]

        def on_epoch_end(self):
            called.append("end")

    our_fit(Sequence(), epochs=2)
    assert called == [0, 1, 2, 3, 4] * 2


def test_batch_norm_of_keras_has_other_defaults():
    theirs, ours = keras.layers.BatchNormalization(), nn.BatchNorm1d(3)
    assert (theirs.momentum, ours.momentum) == (0.99, 0.1)


def test_validations_within_an_epoch_are_judged_each():
    stopping = kt.callbacks.EarlyStopping(patience=2, min_delta=1e9)
    _, history = our_fit(None, stopping, epochs=9, validation_data=batches(2), validation_freq=0.2)
    assert len(history.intervals) == 3 and len(history.history["val_loss"]) == 1
    their = pl.callbacks.EarlyStopping("val_loss", patience=2, min_delta=1e9)
    assert their_fit(None, None, batches(2), their, max_epochs=9, val_check_interval=0.2)[1].global_step == 6
