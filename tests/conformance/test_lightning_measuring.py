"""Norms of gradients, timers and throughput beside Lightning's."""

import copy
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import GradNorm, Throughput, Timer, measuring, throughput

lightning = pytest.importorskip("lightning")
pytestmark = [pytest.mark.conformance, pytest.mark.filterwarnings("ignore")]

SAMPLES, BATCH, EPOCHS, RATE = 48, 8, 3, 0.05


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return x, (x @ torch.randn(4, 3, generator=generator)).argmax(1)


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*problem()), BATCH)


class Classifier(lightning.LightningModule):
    def __init__(self, seen=None):
        super().__init__()
        self.net, self.seen = make_net(), seen or (lambda module: None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.net(batch[0])

    def on_before_optimizer_step(self, optimizer):
        self.seen(self.net)


def trainer(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, num_sanity_val_steps=0, logger=False, **quiet, **options
    )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("norm", [1, 2, "inf"])
def test_norms_are_those_that_lightning_finds_in_its_own_run(norm, accumulate):
    from lightning.pytorch.utilities import grad_norm

    found = []
    theirs = Classifier(lambda net: found.append({key: float(v) for key, v in grad_norm(net, norm).items()}))
    # Its accumulated gradient is the mean of the batches', which is right where all are of one size.
    trainer(accumulate_grad_batches=accumulate, gradient_clip_val=0.1).fit(theirs, loader())
    model = kt.Model(make_net(), backend="cpu").compile("sgd", "cross_entropy", lr=RATE, clip=0.1)
    history = model.fit(
        loader(), epochs=EPOCHS, accumulate=accumulate, callbacks=GradNorm(norm, per_layer=True), verbose=0
    ).history
    steps, kind = SAMPLES // BATCH // accumulate, float(norm)
    assert len(found) == steps * EPOCHS
    names = {"grad_norm": f"grad_{kind}_norm_total"}
    names |= {f"grad_norm/{name}": f"grad_{kind}_norm/{name}" for name, _ in make_net().named_parameters()}
    assert set(history) == {"loss", *names}
    for ours, name in names.items():
        means = np.array([step[name] for step in found]).reshape(EPOCHS, steps).mean(1)
        assert history[ours] == pytest.approx(means.tolist(), rel=1e-5)


# Timer, on one clock for both that the batches move.


@pytest.fixture
def clock(monkeypatch):
    from lightning.pytorch.callbacks import timer

    clock = SimpleNamespace(now=1000.0, steps=0)
    for module in (timer, measuring):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Theirs(lightning.pytorch.Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, *arguments):
        self.clock.now += 10
        self.clock.steps += 1

    def on_validation_batch_end(self, *arguments):
        self.clock.now += 3


class Ours(kt.Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, batch, logs=None):
        self.clock.now += 10
        self.clock.steps += 1

    def on_test_batch_end(self, batch, logs=None):
        self.clock.now += 3


def both(clock, duration, interval, state_s=None):
    """What each timer says after a run: elapsed, remaining, begin and end of training and validation; and steps."""
    said = []
    theirs = lightning.pytorch.callbacks.Timer(duration, interval)
    if state_s is not None:
        theirs.load_state_dict({"time_elapsed": {"train": state_s}})
    trainer(callbacks=[Theirs(clock), theirs]).fit(Classifier(), loader(), loader())
    said.append((theirs, clock.steps))
    clock.now, clock.steps = 1000.0, 0
    ours = Timer(duration, interval)
    if state_s is not None:
        ours.load_state_dict({"elapsed_s": state_s})
    model = kt.Model(make_net(), backend="cpu").compile("sgd", "cross_entropy", lr=RATE)
    model.fit(loader(), validation_data=loader(), epochs=EPOCHS, callbacks=[Ours(clock), ours], verbose=0)
    said.append((ours, clock.steps))
    return [
        {
            "steps": steps,
            "remaining": timer.time_remaining(),
            **{stage: timer.time_elapsed(stage) for stage in ("train", "validate", "test", "predict")},
            **{f"{stage} began": timer.start_time(stage) for stage in ("train", "validate", "test")},
            **{f"{stage} ended": timer.end_time(stage) for stage in ("train", "validate", "test")},
        }
        for timer, steps in said
    ]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("duration", [None, "00:00:01:35", {"seconds": 95}, timedelta(seconds=180), {"weeks": 1}])
def test_a_timer_ends_the_run_where_lightnings_ends_it(clock, duration, interval):
    theirs, ours = both(clock, duration, interval)
    assert ours == theirs


def test_a_state_counts_as_in_lightning(clock):
    theirs, ours = both(clock, timedelta(hours=1), "step", state_s=100.0)
    assert ours == theirs and ours["train"] > 100


@pytest.mark.parametrize("text", ["1 hour", "01:00:00", "1:1:1:1", ""])
def test_texts_that_are_refused_there_are_refused_here(text):
    for make, error in ((lightning.pytorch.callbacks.Timer, Exception), (Timer, ValueError)):
        with pytest.raises(error, match="duration"):
            make(text)


# Throughput: the formulas, on one clock.


def test_rates_are_those_of_lightnings_formulas(monkeypatch):
    from lightning.fabric.utilities.throughput import Throughput as TheirThroughput
    from lightning.fabric.utilities.throughput import measure_flops

    clock, sizes = SimpleNamespace(now=0.0), [8, 8, 5, 8, 3]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    net = nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    batches = [(torch.randint(9, (size, 6)), torch.rand(size, 1)) for size in sizes]
    twin = copy.deepcopy(net)
    flops = measure_flops(twin, lambda: twin(batches[0][0]), lambda output: output.square().mean()) / sizes[0]
    theirs = TheirThroughput(available_flops=1e3, window_size=len(sizes))
    samples = 0
    for number, size in enumerate(sizes):
        samples += size
        done = {"batches": number + 1, "samples": samples, "lengths": 6 * samples, "flops": flops * size}
        theirs.update(time=2.5 * (number + 1), **done)
    expected = theirs.compute()

    class Tick(kt.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            clock.now += 2.5

    model = kt.Model(net, backend="cpu").compile("sgd", "mse")
    callback = Throughput("auto", "auto", 1e3, skip=1)
    history = model.fit(batches, callbacks=[Tick(), callback], verbose=0).history
    for ours, name in (("samples", "samples"), ("tokens", "items"), ("flops", "flops")):
        assert history[f"{ours}_per_s"] == [pytest.approx(expected[f"device/{name}_per_sec"])]
    assert history["mfu"] == [pytest.approx(expected["device/mfu"])]
