"""Profiler on a clock that the test moves, on the real one, and traces that are read back."""

from __future__ import annotations

import gzip
import json
import re
import time
import warnings

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import Profiler, profiler

DATA_S, FORWARD_S, BACKWARD_S, STEP_S, REST_S = 0.5, 2.0, 4.0, 1.0, 0.25
COSTS = {"data": DATA_S, "forward": FORWARD_S, "backward": BACKWARD_S, "optimizer": STEP_S, "rest": REST_S}


class Clock:
    """Time that stands still until somebody moves it, by itself or by sleeping."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def take(self, seconds):
        self.now += seconds


class RealClock(Clock):
    def take(self, seconds):
        time.sleep(seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profiler._HostClock, "now", staticmethod(clock))
    return clock


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, x, clock):
        context.clock = clock
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        context.clock.take(BACKWARD_S * context.clock.scale)
        return gradient, None


class Slow(nn.Module):
    def __init__(self, clock, net=None):
        super().__init__()
        self.clock, self.net = clock, net or nn.Linear(4, 1)

    def forward(self, x, *state):
        self.clock.take((FORWARD_S if self.training else 77.0) * self.clock.scale)
        output = self.net(x, *state)
        if isinstance(output, tuple):
            return SlowBackward.apply(output[0], self.clock), output[1]
        return SlowBackward.apply(output, self.clock)


Clock.scale = 1.0


def slow_sgd(clock):
    class SlowSGD(torch.optim.SGD):
        def step(self, closure=None):
            clock.take(STEP_S * clock.scale)
            return super().step(closure)

    return lambda parameters: SlowSGD(parameters, lr=0.01)


class Rest(kt.Callback):
    """Takes time before the step is over, and around epochs, which is nobody's."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, batch, logs=None):
        self.clock.take(REST_S * self.clock.scale)

    def on_epoch_begin(self, epoch, logs=None):
        self.clock.take(33.0 * self.clock.scale)

    def on_validation_begin(self, logs=None):
        self.clock.take(33.0 * self.clock.scale)

    def on_epoch_end(self, epoch, logs=None):
        self.clock.take(33.0 * self.clock.scale)


def slow(clock, batches):
    def generate():
        for _ in range(batches):
            clock.take(DATA_S * clock.scale)
            yield torch.rand(4, 4), torch.rand(4, 1)

    return generate


def fit(clock, *callbacks, batches=5, model=kt.Model, net=None, data=None, verbose=0, compile=(), **options):
    compiled = model(Slow(clock, net), backend="cpu").compile(slow_sgd(clock), "mse", **dict(compile))
    data = slow(clock, batches) if data is None else data
    compiled.fit(data, callbacks=[Rest(clock), *callbacks], verbose=verbose, **options)
    return compiled


def ms(profile):
    return {stage: values["ms_per_step"] for stage, values in profile.stages.items()}


def expected(**changed):
    return {stage: pytest.approx(1e3 * seconds) for stage, seconds in (COSTS | changed).items()}


# Stages.


@pytest.mark.parametrize("skip", [0, 1, 4, 5, 9])
def test_each_stage_has_its_time_and_nothing_else(clock, skip):
    profile = Profiler(skip)
    fit(clock, profile, epochs=2, validation_data=[(torch.rand(2, 4), torch.rand(2, 1))])
    assert profile.steps == 10 - skip and ms(profile) == expected()
    for stage, values in profile.stages.items():
        assert values["total_s"] == pytest.approx(COSTS[stage] * profile.steps)
        assert values["percent"] == pytest.approx(100 * COSTS[stage] / sum(COSTS.values()))


def test_gathered_batches_step_less_often(clock):
    profile = Profiler(1)
    fit(clock, profile, accumulate=2, batches=9)
    assert ms(profile) == expected(optimizer=STEP_S * 5 / 8)  # the last window is closed after the last batch


def test_pieces_of_a_batch_are_each_a_forward_and_a_backward(clock):
    profile = Profiler()
    fit(clock, profile, microbatch=3)
    assert ms(profile) == expected(forward=2 * FORWARD_S, backward=2 * BACKWARD_S)


def test_pieces_of_a_sequence_are_each_a_step(clock):
    def data():
        for _ in range(5):
            clock.take(DATA_S)
            yield torch.rand(4, 6, 3), torch.rand(4, 6, 2)

    profile = Profiler()
    fit(clock, profile, net=nn.GRU(3, 2, batch_first=True), data=data, compile={"tbptt_steps": 2})
    assert ms(profile) == expected(forward=3 * FORWARD_S, backward=3 * BACKWARD_S, optimizer=3 * STEP_S)


class Twice(kt.Model):
    def train_step(self, batch):
        for _ in range(2):
            self.backward((self.module(batch[0]) - batch[1]).square().mean())
            self.optimizer_step()


def test_a_train_step_may_go_forward_and_backward_several_times(clock):
    profile = Profiler()
    fit(clock, profile, model=Twice)
    assert ms(profile) == expected(forward=2 * FORWARD_S, backward=2 * BACKWARD_S, optimizer=2 * STEP_S)


def test_a_train_step_without_gradients_is_rest(clock):
    class Idle(kt.Model):
        def train_step(self, batch):
            self.module(batch[0])

    profile = Profiler()
    with pytest.warns(UserWarning, match="did not call self.optimizer_step"):
        fit(clock, profile, model=Idle, data=[(torch.rand(4, 4), torch.rand(4, 1))] * 5)
    assert ms(profile) == dict.fromkeys(COSTS, 0.0) | {"rest": pytest.approx(1e3 * (FORWARD_S + REST_S))}


def test_a_validation_within_an_epoch_is_not_measured(clock):
    class Within(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                clock.take(55.0)
                profile.on_validation_end({})

    profile = Profiler()
    fit(clock, profile, Within())
    assert ms(profile) == expected()


@pytest.mark.parametrize("marks", [2, 3, 7, 12])
def test_a_long_epoch_is_added_up_in_between(clock, monkeypatch, marks):
    monkeypatch.setattr(profiler, "MAX_MARKS", marks)
    most = []

    class Look(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            most.append(len(profile._marks))

    profile = Profiler()
    fit(clock, profile, Look(), epochs=2, batches=20)
    assert profile.steps == 38 and ms(profile) == expected()
    assert max(most) <= marks + 1


def test_moments_are_read_once_the_device_has_come_to_them(clock, monkeypatch):
    reached = []

    def seconds(self, start, end):
        assert end <= reached[-1]
        return end - start

    monkeypatch.setattr(profiler, "MAX_MARKS", 12)
    monkeypatch.setattr(profiler._HostClock, "wait", lambda self, moment: reached.append(moment))
    monkeypatch.setattr(profiler._HostClock, "seconds", seconds)
    profile = Profiler()
    fit(clock, profile, batches=9)
    assert ms(profile) == expected() and len(reached) < profile.steps


def test_a_second_run_starts_anew(clock):
    profile = Profiler(1)
    fit(clock, profile, batches=3)
    fit(clock, profile, batches=5)
    assert profile.steps == 4 and ms(profile) == expected()


def test_on_a_real_clock_no_stage_is_shorter_than_it_is_and_all_fit_into_the_run(monkeypatch):
    clock = RealClock()
    monkeypatch.setattr(RealClock, "scale", 0.005, raising=False)
    profile, steps = Profiler(1), MeasuredSteps()
    began = time.perf_counter()
    fit(clock, profile, steps, batches=6)
    wall_s = time.perf_counter() - began
    for stage, values in profile.stages.items():
        assert values["ms_per_step"] >= 1e3 * COSTS[stage] * clock.scale
    total_s = sum(values["total_s"] for values in profile.stages.values())
    assert total_s <= wall_s
    assert total_s == pytest.approx(steps.ends[-1] - steps.ends[0], rel=0.1)


class MeasuredSteps(kt.Callback):
    """When each batch ended."""

    def __init__(self):
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())


# The table.

TABLE = """\
Profile of 3 steps
stage        ms/step      %    total s
---------  ---------  -----  ---------
data         500.000    6.5      1.500
forward     2000.000   25.8      6.000
backward    4000.000   51.6     12.000
optimizer   1000.000   12.9      3.000
rest         250.000    3.2      0.750
total       7750.000  100.0     23.250"""


def test_the_table_has_a_row_for_each_stage(clock, capsys):
    profile = Profiler()
    fit(clock, profile)
    assert profile.table() == str(profile) == TABLE
    assert capsys.readouterr().out == ""


def test_it_is_printed_at_the_end_unless_all_is_silent(clock, capsys):
    fit(clock, Profiler(), verbose=2)
    assert capsys.readouterr().out.endswith(TABLE + "\n")


def test_a_run_too_short_says_so(clock):
    profile = Profiler(skip=9)
    assert str(profile) == "Profiler measured no step: the first 9 of a run are not."
    fit(clock, profile)
    assert str(profile) == "Profiler measured no step: the first 9 of a run are not."
    assert profile.stages["data"] == {"ms_per_step": 0.0, "percent": 0.0, "total_s": 0.0}


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 1, 1], [33.4, 33.3, 33.3]),
        ([1, 1, 1, 1, 1, 1], [16.7, 16.7, 16.7, 16.7, 16.6, 16.6]),
        ([0, 0, 3], [0.0, 0.0, 100.0]),
        ([1e-9, 1e-9, 1], [0.0, 0.0, 100.0]),
        ([0, 0], [0.0, 0.0]),
        ([2, 1], [66.7, 33.3]),
    ],
)
def test_percentages_add_up(values, shown):
    assert profiler._percentages(values) == pytest.approx(shown)
    assert sum(shown) in (0, pytest.approx(100))


@pytest.mark.parametrize("seed", range(20))
def test_percentages_of_anything_add_up(seed):
    values = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(4).tolist()
    shown = profiler._percentages(values)
    assert sum(shown) == pytest.approx(100, abs=1e-9)
    assert all(abs(one - 100 * value / sum(values)) < 0.1 for one, value in zip(shown, values, strict=True))


# Traces.


def train(callback, batches=12, model=kt.Model, **options):
    compiled = model(nn.Linear(4, 1), backend="cpu").compile("sgd", "mse")
    data = [(torch.rand(4, 4), torch.rand(4, 1))] * batches
    compiled.fit(data, callbacks=callback, verbose=0, **options)


def events(path):
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_text()
    return [event["name"] for event in json.loads(text)["traceEvents"] if "name" in event]


def steps_in(path):
    return sorted({int(name[1]) for name in map(re.compile(r"ProfilerStep#(\d+)").fullmatch, events(path)) if name})


@pytest.mark.filterwarnings("error:the run ended")
@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
@pytest.mark.parametrize(("skip", "trace_steps"), [(0, 1), (2, 3)])
def test_a_trace_has_the_operators_of_so_many_steps(tmp_path, name, skip, trace_steps):
    path = tmp_path / "new" / name
    profile = Profiler(skip, trace=path, trace_steps=trace_steps)
    train(profile)
    assert steps_in(path) == list(range(skip + 1, skip + 1 + trace_steps))
    assert {"aten::addmm", "aten::mse_loss_backward"} <= set(events(path))
    assert events(path).count("aten::addmm") == trace_steps
    assert profile.steps == 12 - skip - 1 - trace_steps
    assert not torch.autograd._profiler_enabled() and [one.name for one in path.parent.iterdir()] == [name]


class Own(kt.Model):
    def train_step(self, batch):
        self.backward((self.module(batch[0]) - batch[1]).square().mean())
        self.optimizer_step()


@pytest.mark.parametrize("options", [{"accumulate": 5}, {"model": Own}, {"batches": 3, "epochs": 4}])
def test_a_trace_goes_by_batches_whatever_a_step_is(tmp_path, options):
    train(Profiler(trace=tmp_path / "trace.json"), **options)
    assert steps_in(tmp_path / "trace.json") == [3, 4, 5]


def test_each_run_is_traced(tmp_path):
    profile = Profiler(trace=tmp_path / "trace.json")
    for _ in range(2):
        train(profile)
        assert steps_in(tmp_path / "trace.json") == [3, 4, 5]
        (tmp_path / "trace.json").unlink()


@pytest.mark.parametrize(("batches", "traced"), [(2, 0), (3, 0), (4, 1), (5, 2)])
def test_a_run_too_short_for_its_trace_is_told(tmp_path, batches, traced):
    message = f"the run ended after {traced} of trace_steps=3 steps were traced. Train for more than 6 steps"
    with pytest.warns(UserWarning, match=message):
        train(Profiler(trace=tmp_path / "trace.json"), batches)
    assert not torch.autograd._profiler_enabled()
    assert traced == 0 or len(steps_in(tmp_path / "trace.json")) >= traced


@pytest.mark.parametrize("at", [0, 2, 3, 4, 8])
def test_an_error_leaves_no_profiler_running(tmp_path, at):
    class Fail(kt.Callback):
        def on_before_backward(self, loss):
            self.calls = getattr(self, "calls", -1) + 1
            if self.calls == at:
                raise RuntimeError("on purpose")

    profile = Profiler(trace=tmp_path / "trace.json")
    with pytest.raises(RuntimeError, match="on purpose"):
        train([profile, Fail()])
    assert not torch.autograd._profiler_enabled()
    train(profile)
    assert steps_in(tmp_path / "trace.json") == [3, 4, 5] and profile.steps == 6


def test_the_model_says_where_a_trace_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(kt.Model, "path_for", lambda self, path: tmp_path / "elsewhere" / path.name)
    train(Profiler(trace=tmp_path / "trace.json"))
    assert steps_in(tmp_path / "elsewhere" / "trace.json") == [3, 4, 5]
    assert not (tmp_path / "trace.json").exists()


def test_a_dry_run_is_as_short_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(kt.Model, "is_dry_run", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Profiler(trace=tmp_path / "trace.json"), batches=1)


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    net = nn.Linear(4, 1)
    weight = net.weight.clone()
    model = kt.Model(net, backend="cpu").compile("sgd", "mse")
    with pytest.raises(OSError, match=r"Profiler cannot write to .*Give a folder that can be written to"):
        model.fit(torch.rand(4, 4), torch.rand(4, 1), callbacks=Profiler(trace=tmp_path / "file" / "a.json"), verbose=0)
    assert torch.equal(net.weight, weight) and not torch.autograd._profiler_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": -1}, "skip=-1 is no number of steps. Give a whole number from 0 up"),
        ({"skip": True}, "skip=True is no number of steps"),
        ({"trace_steps": 0}, "trace_steps=0 is no number of steps. Give a whole number from 1 up"),
        ({"trace_steps": 1.5}, "trace_steps=1.5 is no number of steps"),
        ({"trace": "traces"}, r"trace='traces' is no file for a trace. Give one that ends in .json\[.gz\]"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Profiler(**options)


# GPUs.


def test_a_gpus_clock_is_made_of_events(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.waited = 0

        def synchronize(self):
            self.waited += 1

        def elapsed_time(self, other):
            return 5.0

    class Stream:
        def record_event(self, event):
            recorded.append((device, event))
            return event

    recorded, device = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", {device: Stream()}.get)
    clock = profiler._CudaClock(device)
    start, end = clock.now(), clock.now()
    clock.wait(end)
    assert [event for _, event in recorded] == [start, end] and (start.waited, end.waited) == (0, 1)
    assert clock.seconds(start, end) == 0.005


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_table_is_of_its_own_time():
    net = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048))
    x = torch.rand(4096, 2048)
    model = kt.Model(net, backend="gpu").compile("sgd", "mse")
    profile, steps = Profiler(), MeasuredSteps()
    began = time.perf_counter()
    model.fit(x, x, batch_size=128, epochs=3, callbacks=[profile, steps], verbose=0)
    wall_s = time.perf_counter() - began
    assert profile.steps == 3 * 32 - 2
    assert all(values["total_s"] > 0 for values in profile.stages.values())
    assert sum(values["total_s"] for values in profile.stages.values()) <= wall_s
