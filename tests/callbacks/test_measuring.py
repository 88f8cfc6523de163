"""GradNorm against norms by hand, DeviceStats against what it reads off, Timer on a clock that the test moves."""

from __future__ import annotations

import copy
import io
import math
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kerastorch as kt
from kerastorch.callbacks import DeviceStats, GradNorm, Timer, measuring
from tests.reference import cut

BATCH, STEPS = 32, 5  # 150 digits: four batches of 32 and one of 22
cross_entropy = nn.functional.cross_entropy
sgd = partial(torch.optim.SGD, lr=0.1)


def fit(model, data, *callbacks, **options):
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    return model.fit(*data, callbacks=list(callbacks), **options).history


def compiled(net, optimizer=sgd, loss="cross_entropy", **options):
    return kt.Model(copy.deepcopy(net), backend="cpu").compile(optimizer, loss, **options)


# GradNorm.


def by_hand(net, batches, norm=2, epochs=1):
    """Norms at each step of each epoch: by name, the total's name is ""."""
    net, found = copy.deepcopy(net), []
    optimizer = sgd(net.parameters())
    for _ in range(epochs):
        found.append([])
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            gradients = {name: one.grad.clone() for name, one in net.named_parameters() if one.grad is not None}
            norms = {name: gradient.norm(norm).item() for name, gradient in gradients.items()}
            norms[""] = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm(norm).item()
            found[-1].append(norms)
            optimizer.step()
    return found


def means(epochs, name=""):
    return [sum(step[name] for step in steps) / len(steps) for steps in epochs]


@pytest.mark.parametrize("norm", [1, 2, 2.0, math.inf, "inf"])
def test_it_is_the_mean_of_the_norms_by_hand(classifier, digits, norm):
    expected = by_hand(classifier, cut(*digits, BATCH), float(norm), epochs=3)
    history = fit(compiled(classifier), digits, GradNorm(norm), epochs=3)
    assert [*history] == ["loss", "grad_norm"]
    assert history["grad_norm"] == pytest.approx(means(expected), rel=1e-5)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_so_is_that_of_each_layer(classifier, digits, norm):
    classifier[0].bias.requires_grad_(False)
    expected = by_hand(classifier, cut(*digits, BATCH), norm, epochs=2)
    history = fit(compiled(classifier), digits, GradNorm(norm, per_layer=True), epochs=2)
    names = ["0.weight", "2.weight", "2.bias"]
    assert [*history] == ["loss", "grad_norm", *(f"grad_norm/{name}" for name in names)]
    assert history["grad_norm"] == pytest.approx(means(expected), rel=1e-5)
    for name in names:
        assert history[f"grad_norm/{name}"] == pytest.approx(means(expected, name), rel=1e-5)


def test_it_is_measured_before_clipping(classifier, digits):
    model = compiled(classifier, partial(torch.optim.SGD, lr=0.0), clip=1e-3)
    (expected,) = fit(compiled(classifier, partial(torch.optim.SGD, lr=0.0)), digits, GradNorm())["grad_norm"]
    assert fit(model, digits, GradNorm())["grad_norm"] == [pytest.approx(expected)] and expected > 0.1


@pytest.mark.parametrize("options", [{}, {"microbatch": 7}])
def test_gathered_gradients_are_measured_once(classifier, digits, options):
    expected = by_hand(classifier, cut(*digits, 2 * BATCH))  # the last window is one short batch
    history = fit(compiled(classifier), digits, GradNorm(), accumulate=2, **options)
    assert history["grad_norm"] == pytest.approx(means(expected), rel=1e-4)


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4]), (3, [0, 3]), (5, [0]), (100, [0])])
def test_every_so_many_steps_from_the_first_of_each_epoch(classifier, digits, every, steps):
    epochs = by_hand(classifier, cut(*digits, BATCH), epochs=2)
    expected = means([[norms[step] for step in steps] for norms in epochs])
    assert fit(compiled(classifier), digits, GradNorm(every=every), epochs=2)["grad_norm"] == pytest.approx(expected)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("overflow", [0, 3, 4])
def test_steps_that_loss_scaling_skips_are_left_out(classifier, digits, overflow, per_layer):
    batches = [(x, y, torch.ones(len(x))) for x, y in cut(*digits, BATCH)]
    batches[overflow][2].fill_(1e20)  # more than fp16 holds
    norms = by_hand(classifier, batches_without(batches, overflow), epochs=1)
    model = compiled(classifier, precision="16")
    history = model.fit(batches, callbacks=GradNorm(per_layer=per_layer), verbose=0).history
    assert model.skipped_steps == 1
    assert history["grad_norm"] == pytest.approx(means(norms), rel=1e-2)  # computed in fp16
    for name in ("0.weight", "2.bias") if per_layer else ():
        assert history[f"grad_norm/{name}"] == pytest.approx(means(norms, name), rel=1e-2)


def batches_without(batches, index):
    return [(x, y) for number, (x, y, _) in enumerate(batches) if number != index]


def test_an_epoch_of_skipped_steps_alone_has_no_mean(regressor, diabetes):
    x, y = diabetes[0][:BATCH], torch.full((BATCH, 1), 1e18)
    assert math.isnan(fit(compiled(regressor, loss="mse", precision="16"), (x, y), GradNorm())["grad_norm"][0])


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.filterwarnings("ignore:.*NaN", "ignore:the loss of epoch")
def test_without_loss_scaling_nothing_is_hidden(regressor, diabetes, norm):
    x, y = diabetes[0], diabetes[1].clone()
    y[-1] = math.nan
    history = fit(compiled(regressor, loss="mse"), (x, y), GradNorm(norm))
    assert math.isnan(history["grad_norm"][0])


def test_norms_of_half_precision_do_not_overflow():
    model = kt.Model(nn.Linear(64, 1, bias=False), backend="cpu").compile("sgd", "mse", lr=0.0, precision="16-true")
    model.module.weight.data.fill_(0.0)
    x, y = torch.full((1, 64), 100.0), torch.full((1, 1), -150.0)
    expected = 2 * 150 * 100 * 64  # of each element 30,000, which fp16 holds; of their sum it does not
    assert fit(model, (x, y), GradNorm(1))["grad_norm"] == [pytest.approx(expected)] and expected > 65504


def test_float64_is_measured_in_float64(regressor, diabetes):
    net, data = regressor.double(), tuple(part.double() for part in diabetes)
    nn.functional.mse_loss(net(data[0]), data[1]).backward()
    expected = torch.cat([one.grad.flatten() for one in net.parameters()]).norm().item()
    net.zero_grad()
    history = fit(compiled(net, loss="mse", precision="64"), data, GradNorm(), batch_size=150)
    assert history["grad_norm"] == [pytest.approx(expected, rel=1e-14)]


def test_a_mean_of_many_is_as_exact_as_one(regressor, diabetes):
    model = compiled(regressor, partial(torch.optim.SGD, lr=0.0), "mse")
    batches = [tuple(part[:8] for part in diabetes)]
    once, often = (
        model.fit(data, callbacks=GradNorm(), verbose=0).history["grad_norm"] for data in (batches, batches * 1000)
    )
    assert once == often


class Choosing(nn.Module):
    """Uses its second layer only for positive batches."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.first(x) + (self.second(x) if x[0, 0] > 0 else 0)


def test_a_parameter_counts_where_it_has_a_gradient():
    net, x, y = Choosing(), torch.tensor([[1.0, 2.0], [-1.0, 3.0], [2.0, 5.0]]), torch.zeros(3, 1)
    norms = []
    for row in x:
        net.zero_grad()
        net(row[None]).square().mean().backward()
        norms.append([math.nan if one.grad is None else one.grad.norm().item() for one in net.parameters()])
    net.zero_grad()
    model = compiled(net, partial(torch.optim.SGD, lr=0.0), "mse")
    history = fit(model, (x, y), GradNorm(per_layer=True), batch_size=1)
    assert history["grad_norm/first.weight"] == [pytest.approx(sum(first for first, _ in norms) / 3)]
    assert history["grad_norm/second.weight"] == [pytest.approx((norms[0][1] + norms[2][1]) / 2)]


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("per_layer", [False, True])
def test_sparse_gradients_have_the_norms_of_dense_ones(norm, per_layer):
    tokens, y = torch.randint(6, (40, 3)), torch.rand(40, 4)
    histories = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.EmbeddingBag(6, 4, sparse=sparse), nn.Linear(4, 4))
        model = kt.Model(net, backend="cpu").compile(partial(torch.optim.SGD, lr=0.1), "mse")
        histories.append(fit(model, (tokens, y), GradNorm(norm, per_layer=per_layer), epochs=2, batch_size=8))
    assert histories[0] == {name: pytest.approx(values) for name, values in histories[1].items()}


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return (x * self.weight).abs() + self.empty.sum()


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_complex_gradients_and_those_of_nothing(norm):
    net, x, y = Spectral(), torch.rand(4, 2), torch.rand(4, 2)
    nn.functional.mse_loss(net(x), y).backward()
    expected = net.weight.grad.abs().norm(norm).item()
    net.zero_grad()
    history = fit(compiled(net, loss="mse"), (x, y), GradNorm(norm, per_layer=True))
    assert history["grad_norm/weight"] == history["grad_norm"] == [pytest.approx(expected)]
    assert history["grad_norm/empty"] == [0.0]


class Pair(kt.Model):
    def train_step(self, batch):
        x, y = batch
        left = cross_entropy(self.module["left"](x), y)
        self.backward(left + cross_entropy(self.module["right"](x), y))  # leaves a gradient in the other one too
        self.optimizer_step("left")
        self.backward(cross_entropy(self.module["right"](x), y))
        self.optimizer_step("right")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_of_several_optimizers_has_its_own(digits, accumulate):
    nets = nn.ModuleDict({name: nn.Linear(64, 10) for name in ("left", "right")})
    model = Pair(copy.deepcopy(nets), backend="cpu").compile({"left": sgd, "right": sgd})
    model.module.requires_grad_(True)
    history = fit(model, digits, GradNorm(per_layer=True), epochs=2, accumulate=accumulate)
    for name, net in nets.items():
        expected = by_hand(net, cut(*digits, accumulate * BATCH), epochs=2)
        assert history[f"grad_norm_{name}"] == pytest.approx(means(expected), rel=1e-5)
        assert history[f"grad_norm/{name}.weight"] == pytest.approx(means(expected, "weight"), rel=1e-5)
    assert "grad_norm" not in history


def test_an_unfrozen_layer_is_there_from_its_epoch_on(classifier, digits):
    model = compiled(classifier.requires_grad_(True))
    model.freeze("0")
    history = fit(model, digits, kt.callbacks.Unfreeze(1, "0"), GradNorm(per_layer=True), epochs=3)
    assert [len(history[f"grad_norm/{name}"]) for name in ("0.weight", "2.weight")] == [2, 3]


def test_lbfgs_has_no_gradients_before_its_step(regressor, diabetes):
    history = fit(compiled(regressor, "lbfgs", "mse"), diabetes, GradNorm(), batch_size=150)
    assert [*history] == ["loss"]


def test_a_callback_measures_two_runs_alike(classifier, digits):
    norm = GradNorm(every=2)
    first = fit(compiled(classifier), digits, norm, epochs=2)
    assert first == fit(compiled(classifier), digits, norm, epochs=2)


def test_an_interval_has_the_mean_so_far_and_changes_nothing(classifier, digits):
    class Interval(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                norm.on_interval_end(0, so_far)

    norm, so_far = GradNorm(), {}
    (expected,) = by_hand(classifier, cut(*digits, BATCH))
    history = fit(compiled(classifier), digits, norm, Interval())
    assert so_far == {"grad_norm": pytest.approx(means([expected[:3]])[0])}
    assert history["grad_norm"] == pytest.approx(means([expected]))


class NoReads(TorchDispatchMode):
    """Refuses to bring a value to the host."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a step reads the device"
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("precision", ["32", "16"])
def test_no_step_reads_the_device(classifier, digits, precision):
    class Watched(GradNorm):
        def on_before_optimizer_step(self, optimizer):
            with NoReads():
                super().on_before_optimizer_step(optimizer)

    assert fit(compiled(classifier, precision=precision), digits, Watched(per_layer=True))["grad_norm"][0] > 0
    with pytest.raises(AssertionError, match="reads the device"), NoReads():
        torch.ones(()).item()


def test_it_says_which_names_it_adds(classifier, digits):
    assert GradNorm().adds_to_logs is None
    classifier[0].requires_grad_(False)
    for norm in (GradNorm(), GradNorm(per_layer=True)):
        history = fit(compiled(classifier), digits, norm)
        assert ("loss", *norm.adds_to_logs) == (*history,)
    norm = GradNorm()
    norm.set_model(Pair(nn.ModuleDict({"left": nn.Linear(2, 1)}), backend="cpu").compile({"left": sgd}))
    assert norm.adds_to_logs == ("grad_norm_left",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 3}, r"norm=3 is not known. Give 1, 2, math.inf or 'inf'"),
        ({"norm": True}, "norm=True is not known"),
        ({"norm": "2"}, "norm='2' is not known"),
        ({"norm": None}, "norm=None is not known"),
        ({"norm": [2]}, r"norm=\[2\] is not known"),
        ({"norm": -math.inf}, "norm=-inf is not known"),
        ({"every": 0}, "every=0 is no number of steps. Give a whole number from 1 up"),
        ({"every": 1.5}, "every=1.5 is no number"),
        ({"every": True}, "every=True is no number"),
    ],
)
def test_other_norms_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradNorm(**options)


# DeviceStats.


class Clock:
    """Time that stands still until somebody moves it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock, busy = Clock(), Clock()
    clock.busy = busy
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=clock, process_time=busy))
    return clock


class Tick(kt.Callback):
    """Each batch takes a while."""

    def __init__(self, clock, train_s=10.0, test_s=3.0, busy_s=0.0):
        self.clock, self.train_s, self.test_s, self.busy_s = clock, train_s, test_s, busy_s
        self.steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self.clock.now += self.train_s
        self.clock.busy.now += self.busy_s
        self.steps += 1

    def on_test_batch_end(self, batch, logs=None):
        self.clock.now += self.test_s

    def on_predict_batch_end(self, batch, logs=None):
        self.clock.now += 7.0


def test_the_process_is_there_on_every_machine(classifier, digits):
    import psutil

    history = fit(compiled(classifier), digits, DeviceStats(), epochs=2)
    assert [*history] == ["loss", "cpu_percent", "cpu_memory_bytes"]
    now = psutil.Process().memory_info().rss
    assert all(0.5 * now < value < 2 * now for value in history["cpu_memory_bytes"])
    assert all(isinstance(value, int) for value in history["cpu_memory_bytes"])
    assert all(value > 0 for value in history["cpu_percent"])


def test_memory_that_a_step_takes_is_seen(classifier, digits):
    class Hog(kt.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.held = torch.ones(50_000_000) if batch == 1 else None

    stats = DeviceStats(every_s=0)
    before = fit(compiled(classifier), digits, stats)["cpu_memory_bytes"][0]
    during = fit(compiled(classifier), digits, Hog(), stats)["cpu_memory_bytes"][0]
    assert during > before + 150e6


def test_cpu_percent_is_processor_time_over_time(classifier, digits, clock):
    history = fit(compiled(classifier), digits, Tick(clock, 10.0, busy_s=15.0), DeviceStats(), epochs=2)
    assert history["cpu_percent"] == pytest.approx([150.0, 150.0])
    history = fit(
        compiled(classifier), digits, Tick(clock, 10.0, 30.0, busy_s=16.0), DeviceStats(), validation_data=digits
    )
    batches = -(-150 // 32)
    assert history["cpu_percent"] == pytest.approx([100 * 5 * 16 / (5 * 10 + batches * 30)])


@pytest.fixture
def gauges(monkeypatch):
    """A device whose values are counted up; how often it was asked."""
    asked = {"gpu_memory_allocated_bytes": 0, "gpu_utilization_percent": 0}

    def read(name):
        asked[name] += 1
        return {"bytes": 100 - asked[name], "percent": 10 * asked[name]}[name.rpartition("_")[2]]

    monkeypatch.setattr(measuring, "_gauges", lambda device: {name: partial(read, name) for name in asked})
    return asked


def test_bytes_are_the_most_and_percentages_the_mean(classifier, digits, clock, gauges):
    stats = DeviceStats(every_s=20)
    history = fit(compiled(classifier), digits, stats, Tick(clock), epochs=2)  # at 0, 20 and 40 s, and at the end
    assert set(gauges.values()) == {8}
    assert history["gpu_utilization_percent"] == [25.0, 65.0]
    assert history["gpu_memory_allocated_bytes"] == [99, 95]
    assert stats.adds_to_logs == ("cpu_percent", *gauges) == (*history,)[1:]


@pytest.mark.parametrize(("every_s", "looks"), [(0, 6), (10, 6), (11, 4), (1000, 2)])
def test_it_looks_so_often(classifier, digits, clock, gauges, every_s, looks):
    fit(compiled(classifier), digits, DeviceStats(every_s), Tick(clock))
    assert set(gauges.values()) == {looks}


def test_an_interval_has_what_was_seen_so_far(classifier, digits, clock, gauges):
    class Interval(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                stats.on_interval_end(0, so_far)

    stats, so_far = DeviceStats(every_s=1000), {}
    fit(compiled(classifier), digits, stats, Tick(clock), Interval())
    assert so_far["gpu_utilization_percent"] == 15.0 and "cpu_percent" in so_far


def test_what_torch_says_of_a_gpu_is_what_is_read(monkeypatch):
    device = torch.device("cuda:0")
    for number, name in enumerate(("memory_allocated", "memory_reserved", "max_memory_allocated", "utilization")):
        monkeypatch.setattr(torch.cuda, name, lambda asked, number=number: (asked, number))
    gauges = measuring._gauges(device)
    assert {name: read() for name, read in gauges.items() if name.startswith("gpu")} == {
        "gpu_memory_allocated_bytes": (device, 0),
        "gpu_memory_reserved_bytes": (device, 1),
        "gpu_memory_peak_bytes": (device, 2),
        "gpu_utilization_percent": (device, 3),
    }


@pytest.mark.parametrize("error", [ModuleNotFoundError, RuntimeError, type("NVMLError", (Exception,), {})])
def test_utilization_is_left_out_where_nobody_knows_it(monkeypatch, error):
    def fail(device):
        raise error

    monkeypatch.setattr(torch.cuda, "utilization", fail)
    assert [*measuring._gauges(torch.device("cuda:0"))][-1] == "gpu_memory_peak_bytes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_has_memory(classifier, digits):
    history = fit(kt.Model(classifier, backend="gpu").compile("sgd", "cross_entropy"), digits, DeviceStats())
    allocated, reserved, peak = (history[f"gpu_memory_{name}_bytes"][0] for name in ("allocated", "reserved", "peak"))
    assert 0 < allocated <= peak <= reserved
    assert 0 <= history.get("gpu_utilization_percent", [0])[0] <= 100


def test_it_says_nothing_of_names_before_it_knows_the_device():
    assert DeviceStats().adds_to_logs is None


@pytest.mark.parametrize("every_s", [-1, math.inf, math.nan, True, "1", None])
def test_what_is_no_time_is_refused(every_s):
    with pytest.raises(ValueError, match=f"every_s={every_s!r} is no time. Give seconds from 0 up"):
        DeviceStats(every_s)


# Timer.


def test_each_stage_is_timed(classifier, digits, clock):
    timer, tick = Timer(), Tick(clock)
    model = compiled(classifier)
    assert timer.time_elapsed() == 0 and timer.start_time() is timer.end_time() is None
    fit(model, digits, timer, tick, epochs=2, validation_data=digits)
    validation_s = 5 * 3.0
    assert timer.time_elapsed() == timer.time_elapsed("train") == 2 * (50 + validation_s)
    assert timer.time_elapsed("validate") == validation_s  # the latest
    assert (timer.start_time(), timer.end_time()) == (1000.0, 1130.0)
    assert (timer.start_time("validate"), timer.end_time("validate")) == (1115.0, 1130.0)
    assert timer.time_elapsed("test") == 0 and timer.start_time("test") is timer.end_time("test") is None
    model.evaluate(*digits, batch_size=50, callbacks=[timer, tick], verbose=0)
    assert timer.time_elapsed("test") == 9.0 and timer.time_elapsed("validate") == validation_s
    model.predict(digits[0], batch_size=50, callbacks=[timer, tick], verbose=0)
    assert timer.time_elapsed("predict") == 21.0
    assert timer.time_elapsed() == 130 and timer.time_remaining() is None


def test_time_runs_while_a_stage_does(classifier, digits, clock):
    class Look(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append((timer.time_elapsed(), timer.time_remaining(), timer.end_time()))

        def on_test_batch_end(self, batch, logs=None):
            seen.append(timer.time_elapsed("validate"))

    timer, seen = Timer(1000), []
    fit(compiled(classifier), digits, timer, Tick(clock), Look(), batch_size=75, validation_data=digits, epochs=2)
    first, second = seen[:4], seen[4:]
    assert first == [(10, 990, None), (20, 980, None), 3.0, 6.0]
    assert second == [(36, 964, None), (46, 954, None), 3.0, 6.0]


@pytest.mark.parametrize("duration", [25, 30, "00:00:00:30", timedelta(seconds=30), {"minutes": 0.5}])
def test_training_ends_after_the_batch_in_which_time_is_over(classifier, digits, clock, duration):
    tick, timer = Tick(clock), Timer(duration)
    history = fit(compiled(classifier), digits, tick, timer, epochs=9)
    assert tick.steps == 3 and len(history["loss"]) == 1
    assert timer.time_elapsed() == 30 and timer.time_remaining() == timer.duration_s - 30


def test_or_after_the_epoch(classifier, digits, clock):
    tick, timer = Tick(clock), Timer(51, interval="epoch")
    history = fit(compiled(classifier), digits, tick, timer, epochs=9)
    assert tick.steps == 2 * STEPS and len(history["loss"]) == 2


def test_validation_takes_of_the_time_too(classifier, digits, clock):
    tick = Tick(clock, 10.0, 100.0)
    history = fit(compiled(classifier), digits, tick, Timer(500), epochs=9, validation_data=digits)
    assert len(history["val_loss"]) == 1 and tick.steps == STEPS


def test_enough_time_ends_nothing(classifier, digits, clock):
    tick = Tick(clock)
    fit(compiled(classifier), digits, tick, Timer(101), epochs=2)
    assert tick.steps == 2 * STEPS


def test_a_resumed_run_goes_on_from_the_time_it_had(classifier, digits, clock):
    class Save(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            torch.save(first.state_dict(), buffer)

    first, buffer = Timer(80), io.BytesIO()
    fit(compiled(classifier), digits, first, Tick(clock), Save())
    clock.now += 9999
    buffer.seek(0)
    second, tick = Timer(80), Tick(clock)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.time_elapsed() == 50 and second.time_remaining() == 30
    fit(compiled(classifier), digits, tick, second, epochs=9)
    assert tick.steps == 3 and second.time_elapsed() == 80
    assert second.state_dict() == {"elapsed_s": 80}


def test_a_run_that_has_no_time_left_ends_after_its_first_batch(classifier, digits, clock):
    timer, tick = Timer(80, interval="epoch"), Tick(clock)
    timer.load_state_dict({"elapsed_s": 80.0})
    fit(compiled(classifier), digits, timer, tick, epochs=9)
    assert tick.steps == 1


def test_another_run_starts_anew(classifier, digits, clock):
    timer, model = Timer(1e6), compiled(classifier)
    timer.load_state_dict({"elapsed_s": 7.0})
    fit(model, digits, timer, Tick(clock), validation_data=digits)
    assert timer.time_elapsed() == 7 + 50 + 15
    timer.load_state_dict({"elapsed_s": 8.0})
    assert timer.time_elapsed() == 8 and timer.start_time() is None
    fit(model, digits, timer, Tick(clock))
    assert timer.time_elapsed() == 58 and timer.time_elapsed("validate") == 0
    fit(model, digits, timer, Tick(clock))
    assert timer.time_elapsed() == 50


def test_an_error_ends_what_was_running(classifier, digits, clock):
    class Fail(kt.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            raise RuntimeError("no")

    timer, model = Timer(), compiled(classifier)
    with pytest.raises(RuntimeError, match="no"):
        fit(model, digits, timer, Tick(clock), Fail(), validation_data=digits)
    clock.now += 100
    assert timer.time_elapsed() == 50 and timer.time_elapsed("validate") == 0
    assert timer.end_time("validate") == 1050 and timer.end_time("test") is None
    model.evaluate(*digits, callbacks=[timer, Tick(clock)], batch_size=150, verbose=0)
    assert timer.time_elapsed("test") == 3


def test_a_stage_that_is_none_is_refused():
    for ask in (Timer().time_elapsed, Timer().start_time, Timer().end_time):
        with pytest.raises(ValueError, match="stage='fit' is not known. Give one of 'train', 'validate', 'test', 'pre"):
            ask("fit")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("1 hour",), ValueError, "duration='1 hour' is no duration. Give seconds"),
        ((0,), ValueError, "duration=0 is no duration"),
        ((True,), TypeError, "duration=True is a bool"),
        ((None, "batch"), ValueError, "interval='batch' is not known. Give 'step' or 'epoch'"),
    ],
)
def test_bad_durations_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Timer(*arguments)
