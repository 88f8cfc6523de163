"""Throughput on a clock that the test moves: what is timed, what is counted, and what nobody can know."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import kerastorch as kt
from kerastorch.callbacks import Throughput, throughput

DATA_S, TRAIN_S, TEST_S = 1.0, 2.0, 50.0
STEP_S = DATA_S + TRAIN_S


class Clock:
    """Time that stands still until somebody moves it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=clock))
    return clock


class Slow(nn.Module):
    """Takes its time."""

    def __init__(self, clock, net=None):
        super().__init__()
        self.clock, self.net = clock, net or nn.Linear(4, 1)

    def forward(self, *inputs, **named):
        self.clock.now += TRAIN_S if self.training else TEST_S
        return self.net(*inputs, **named)


def slow(batches, clock):
    """A function that makes a generator of batches, each of which takes its time."""

    def generate():
        for batch in batches:
            clock.now += DATA_S
            yield batch

    return generate


def batches_of(*sizes):
    return [(torch.rand(size, 4), torch.rand(size, 1)) for size in sizes]


def fit(net, data, *callbacks, clock=None, loss="mse", optimizer="sgd", model=kt.Model, jit=False, **options):
    compiled = model(net, backend="cpu").compile(optimizer, loss, jit=jit)
    data = data if clock is None else slow(data, clock)
    return compiled.fit(data, callbacks=list(callbacks), verbose=0, **options).history


# Time.


@pytest.mark.parametrize(("skip", "first"), [(1, (4 + 4 + 2) / 3), (2, (4 + 2) / 2), (3, 2 / 1)])
def test_samples_are_those_of_the_time_of_training(clock, skip, first):
    options = {"clock": clock, "epochs": 3, "validation_data": slow(batches_of(9, 9), clock)}
    history = fit(Slow(clock), batches_of(4, 4, 4, 2), Throughput(skip=skip), **options)
    rest = 14 / 4
    assert history["samples_per_s"] == pytest.approx([first / STEP_S, rest / STEP_S, rest / STEP_S])
    assert [*history] == ["loss", "val_loss", "samples_per_s"]


def test_first_steps_may_be_whole_epochs(clock):
    history = fit(Slow(clock), batches_of(8), Throughput(), clock=clock, epochs=5)
    assert history["samples_per_s"] == pytest.approx([8 / STEP_S] * 3)
    assert len(history["loss"]) == 5


def test_what_callbacks_do_around_an_epoch_is_not_timed(clock):
    class Busy(kt.Callback):
        def on_validation_end(self, logs=None):
            clock.now += 1e6

        def on_epoch_end(self, epoch, logs=None):
            clock.now += 1e6

    validated = {"validation_data": batches_of(3)}
    history = fit(Slow(clock), batches_of(4, 4), Busy(), Throughput(), clock=clock, epochs=3, **validated)
    assert history["samples_per_s"] == pytest.approx([8 / (2 * STEP_S)] * 2)
    history = fit(Slow(clock), batches_of(4, 4), Throughput(), Busy(), clock=clock, epochs=3)
    assert history["samples_per_s"] == pytest.approx([8 / (2 * STEP_S)] * 2)


class Within(kt.Callback):
    """Validates after the second batch, in the order of hooks that the loop has."""

    def __init__(self, callback, clock):
        self.callback, self.clock, self.logs = callback, clock, {}

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self.callback.on_validation_begin({})
            self.clock.now += 1e6
            self.callback.on_validation_end({})
            self.callback.on_interval_end(0, self.logs)


@pytest.mark.parametrize(
    ("skip", "so_far", "whole"), [(1, 5 / 1, (5 + 6) / 2), (2, None, 6 / 1), (3, None, None), (9, None, None)]
)
def test_a_validation_within_an_epoch_is_not_timed(clock, skip, so_far, whole):
    callback = Throughput(skip=skip)
    within = Within(callback, clock)
    history = fit(Slow(clock), batches_of(4, 5, 6), callback, within, clock=clock)
    assert within.logs == ({} if so_far is None else {"samples_per_s": pytest.approx(so_far / STEP_S)})
    assert history.get("samples_per_s") == (None if whole is None else [pytest.approx(whole / STEP_S)])


@pytest.mark.parametrize(("batches", "is_validated", "waits"), [(4, False, 6), (40, False, 6), (4, True, 6)])
def test_the_device_is_waited_for_where_a_stretch_begins_and_ends(clock, monkeypatch, batches, is_validated, waits):
    devices = []
    monkeypatch.setattr(throughput, "_wait_for", devices.append)
    options = {"validation_data": batches_of(3)} if is_validated else {}
    fit(Slow(clock), batches_of(*[4] * batches), Throughput(), epochs=3, **options)
    # After a validation the device has nothing to do: it costs nothing to wait for it there.
    assert devices == [torch.device("cpu")] * (waits + 3 * is_validated)


def test_a_second_run_is_measured_as_the_first(clock):
    callback = Throughput(tokens=lambda x: 3 * len(x), flops="auto", peak_flops=1e3)
    options = {"clock": clock, "epochs": 2}
    first = fit(Slow(clock), batches_of(4, 4, 2), callback, **options)
    second = fit(Slow(clock, nn.Linear(4, 1)), batches_of(4, 4, 2), callback, **options)
    assert {**first, "loss": None} == {**second, "loss": None} and len(first) == 5


def test_real_time_is_not_faster_than_the_run(digits, classifier):
    history = fit(classifier, [digits] * 20, Throughput(skip=1), loss="cross_entropy", epochs=2)
    assert all(0 < value < 1e9 for value in history["samples_per_s"])


# Tokens.


class Words(nn.Module):
    """Classes of sequences of tokens, whatever else it is given."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(9, 3), nn.Linear(3, 1)

    def forward(self, input_ids, mask=None):
        return self.head(self.embed(input_ids))


def sequences(*sizes, dtype=torch.int64):
    """Batches of four sequences so long."""
    return [(torch.randint(9, (4, size), dtype=dtype), torch.rand(4, 1)) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_tokens_are_the_elements_of_the_first_input_of_whole_numbers(clock, dtype, microbatch):
    data = sequences(5, 7, 11, dtype=dtype)
    if microbatch is None:
        net, step_s = Slow(clock, Words()), STEP_S
    else:
        net, step_s = Slow(clock, Words()), DATA_S + 2 * TRAIN_S
    history = fit(net, data, Throughput("auto", skip=1), clock=clock, epochs=2, microbatch=microbatch)
    assert history["tokens_per_s"] == pytest.approx([4 * (7 + 11) / 2 / step_s, 4 * (5 + 7 + 11) / 3 / step_s])
    assert [*history] == ["loss", "samples_per_s", "tokens_per_s"]


def by_name(batches):
    return [({"mask": torch.arange(x.numel()).reshape(x.shape) % 3 > 0, "input_ids": x}, y) for x, y in batches]


def test_inputs_by_name_are_looked_through(clock):
    history = fit(Slow(clock, Words()), by_name(sequences(5, 7, 11)), Throughput("auto", skip=1), clock=clock)
    assert history["tokens_per_s"] == pytest.approx([4 * (7 + 11) / 2 / STEP_S])


@pytest.mark.parametrize("function", [lambda mask: mask.sum(), lambda mask: int(mask.sum()), torch.count_nonzero])
def test_a_function_may_count_them(clock, function):
    data = by_name(sequences(5, 7, 11))
    expected = sum(int(x["mask"].sum()) for x, _ in data[1:])
    callback = Throughput(lambda inputs: function(inputs["mask"]), skip=1)
    assert fit(Slow(clock, Words()), data, callback, clock=clock)["tokens_per_s"] == pytest.approx(
        [expected / 2 / STEP_S]
    )


@pytest.mark.parametrize(
    ("form", "kind"),
    [(lambda x: x, torch.Tensor), (lambda x: (x, x > 3), tuple), (lambda x: {"input_ids": x}, dict)],
)
def test_a_function_gets_what_forward_gets(clock, form, kind):
    kinds = set()

    def tokens(inputs):
        kinds.add(type(inputs))
        return 1

    fit(Slow(clock, Words()), [(form(x), y) for x, y in sequences(5, 5)], Throughput(tokens))
    assert kinds == {kind}


def test_a_function_gets_both_kinds_of_arguments(clock):
    class Masked(kt.Model):
        def train_step(self, batch):
            self.backward(self.module(batch[0], mask=batch[0] > 3).mean())
            self.optimizer_step()

    def tokens(inputs):
        ids, named = inputs
        return named["mask"].sum() + 0 * ids.sum()

    data = sequences(5, 7, 11)
    history = fit(Slow(clock, Words()), data, Throughput(tokens, skip=1), clock=clock, model=Masked)
    expected = sum(int((x > 3).sum()) for x, _ in data[1:])
    assert history["tokens_per_s"] == pytest.approx([expected / 2 / STEP_S])


def test_a_module_with_a_loss_of_its_own_gets_its_targets_behind_its_inputs(clock):
    class Own(Words):
        def forward(self, input_ids, target):
            return (super().forward(input_ids) - target).square().mean()

    history = fit(Slow(clock, Own()), sequences(5, 7, 11), Throughput("auto", skip=1), clock=clock, loss=None)
    assert history["tokens_per_s"] == pytest.approx([4 * (7 + 11) / 2 / STEP_S])


def test_what_callbacks_have_the_module_do_is_not_counted(clock):
    class Peek(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.module(torch.zeros(4, 99, dtype=torch.int64))

    data = sequences(5, 7, 11)
    options = {"validation_data": sequences(99), "epochs": 2}
    callback = Throughput("auto", skip=1)
    history = fit(Slow(clock, Words()), data, callback, Peek(), clock=clock, **options)
    samples_by_tokens = 8 / (4 * (7 + 11)), 12 / (4 * (5 + 7 + 11))
    for samples, tokens, ratio in zip(
        history["samples_per_s"], history["tokens_per_s"], samples_by_tokens, strict=True
    ):
        assert samples / tokens == pytest.approx(ratio)


class Twice(kt.Model):
    def train_step(self, batch):
        x, y = batch
        self.backward((self.module(x) + self.module(x) - y).square().mean())
        self.optimizer_step()


class InParts(kt.Model):
    def train_step(self, batch):
        x, y = batch
        self.backward((self.module.net.head(self.module.net.embed(x)) - y).square().mean())
        self.optimizer_step()


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (batches_of(4, 4), {}),
        ([(x[..., None], y) for x, y in sequences(4, 4)], {}),
        (sequences(4, 4, dtype=torch.uint8), {}),
        ([(x > 3, y) for x, y in sequences(4, 4)], {}),
    ],
    ids=["floats", "three dims", "bytes", "truth values"],
)
def test_inputs_that_are_no_tokens_have_no_rate(clock, data, options):
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x.float().mean(tuple(range(1, x.ndim)))[:, None] * self.weight

    history = fit(Slow(clock, Any()), data, Throughput("auto", skip=1), clock=clock, **options)
    assert [*history] == ["loss", "samples_per_s"]


@pytest.mark.parametrize("options", [{"model": Twice}, {"model": InParts}, {"optimizer": "lbfgs"}])
def test_samples_that_go_through_the_module_more_or_less_than_once_have_no_rate(clock, options):
    history = fit(Slow(clock, Words()), sequences(5, 5, 5), Throughput("auto"), clock=clock, **options)
    assert "tokens_per_s" not in history and "samples_per_s" in history


@pytest.mark.parametrize(("returned", "shown"), [("12", "'12'"), (None, "None"), (torch.ones(2), r"tensor\(\[1")])
def test_a_function_that_returns_no_number_is_refused_before_anything_is_trained(returned, shown):
    net = nn.Linear(4, 1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(TypeError, match=f"tokens returned {shown}.*expected their number"):
        fit(net, batches_of(4, 4), Throughput(lambda inputs: returned))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net._forward_pre_hooks


@pytest.mark.filterwarnings("error:jit")
@pytest.mark.parametrize("microbatch", [None, 3])
def test_compiled_code_is_left_alone(monkeypatch, microbatch):
    torch._dynamo.reset()
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, fullgraph, mode: compile_(function, backend=backend))
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    data = batches_of(4, 4, 4, 4)
    callback = Throughput(lambda x: len(x), flops="auto", peak_flops=1e9)
    history = fit(nets[0], data, callback, jit=True, epochs=3, microbatch=microbatch)
    assert len(graphs) == 1 and "tokens_per_s" not in history
    assert callback.flops_per_sample == 2 * (4 * 3 * 2 + 3 * 1 * 3) and len(history["mfu"]) == 3
    assert history["loss"] == pytest.approx(fit(nets[1], data, epochs=3)["loss"])


# FLOPs.

MLP = 2 * (4 * 8 * 2 + 8 * 1 * 3)  # by sample: the first layer's input needs no gradient


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


@pytest.mark.parametrize("options", [{}, {"microbatch": 3}, {"accumulate": 2}, {"optimizer": "adamw"}])
def test_they_are_counted_in_the_first_step(clock, options):
    callback = Throughput(flops="auto", peak_flops=1e3)
    history = fit(Slow(clock, mlp()), batches_of(4, 8, 8), callback, clock=clock, epochs=2, **options)
    assert callback.flops_per_sample == MLP
    assert history["flops_per_s"] == pytest.approx([MLP * rate for rate in history["samples_per_s"]])
    assert history["mfu"] == pytest.approx([rate / 1e3 for rate in history["flops_per_s"]])
    assert [*history] == ["loss", "samples_per_s", "flops_per_s", "mfu"]


def test_they_may_be_given(clock):
    history = fit(Slow(clock), batches_of(4, 4, 4), Throughput(flops=60.0, peak_flops=1e3), clock=clock)
    assert history["samples_per_s"] == pytest.approx([4 / STEP_S])
    assert history["flops_per_s"] == pytest.approx([80.0]) and history["mfu"] == pytest.approx([0.08])


@pytest.mark.parametrize(
    ("peaks", "mfu"),
    [({"bf16": 1e3, "fp32": 1e2}, True), ({"fp16": 1e3}, False), ({}, False)],
)
def test_the_peak_is_that_of_the_format(clock, monkeypatch, peaks, mfu):
    monkeypatch.setattr(throughput, "peaks_of", lambda device: peaks)
    model = kt.Model(Slow(clock, mlp()), backend="cpu").compile("sgd", "mse", precision="bf16")
    callback = Throughput(flops="auto")
    history = model.fit(slow(batches_of(4, 4, 4), clock), callbacks=callback, verbose=0).history
    assert history.get("mfu") == ([pytest.approx(history["flops_per_s"][0] / 1e3)] if mfu else None)
    assert ("mfu" in callback.adds_to_logs) == bool(peaks)


def test_a_peak_needs_the_format(clock, monkeypatch):
    monkeypatch.setattr(throughput, "peaks_of", lambda device: {"fp32": 1e3})
    callback = Throughput(flops=60.0)
    assert "mfu" not in fit(Slow(clock), batches_of(4, 4, 4), callback, clock=clock)
    assert callback.adds_to_logs == ("samples_per_s", "flops_per_s")


def test_a_module_without_products_has_no_flops(clock):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (x * self.weight).sum(1, keepdim=True)

    history = fit(Slow(clock, Scale()), batches_of(4, 4, 4), Throughput(flops="auto"), clock=clock)
    assert [*history] == ["loss", "samples_per_s"]


# What is left behind.


class Fail(kt.Callback):
    def __init__(self, hook):
        setattr(self, hook, self.fail)

    def fail(self, *arguments):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("hook", ["on_before_backward", "on_before_zero_grad", "on_train_batch_end", "on_epoch_end"])
def test_nothing_is_left_after_an_error(hook):
    net, callback = mlp(), Throughput(len, flops="auto")
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(net, batches_of(4, 4), callback, Fail(hook))
    assert not net._forward_pre_hooks and _get_current_dispatch_mode() is None
    history = fit(net, batches_of(4, 4, 4), callback)
    assert callback.flops_per_sample == MLP and "tokens_per_s" in history
    assert not net._forward_pre_hooks and _get_current_dispatch_mode() is None


def test_an_epoch_that_ends_in_its_first_step_counts_nothing(clock):
    class Interrupt(kt.Callback):
        def on_before_zero_grad(self, optimizer):
            raise KeyboardInterrupt

    callback = Throughput(flops="auto")
    history = fit(Slow(clock, mlp()), batches_of(4, 4, 4), callback, Interrupt(), validation_data=batches_of(2))
    assert callback.flops_per_sample is None and [*history] == []
    assert _get_current_dispatch_mode() is None


def test_a_validation_is_not_counted_where_no_first_step_came_before_it(clock):
    class Within(kt.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0:
                callback.on_validation_begin({})
                assert _get_current_dispatch_mode() is None
                self.model.module(torch.rand(9, 4))
                callback.on_train_batch_begin(0, {})

    callback = Throughput(flops="auto")
    fit(Slow(clock, mlp()), batches_of(4, 4, 4), callback, Within(), clock=clock)
    assert callback.flops_per_sample == MLP


def test_it_says_which_names_it_adds(clock):
    assert Throughput().adds_to_logs is None
    for options in ({}, {"tokens": len}, {"flops": 1.0}, {"tokens": len, "flops": "auto", "peak_flops": 1.0}):
        callback = Throughput(**options)
        history = fit(Slow(clock), batches_of(4, 4, 4), callback, clock=clock)
        assert ("loss", *callback.adds_to_logs) == (*history,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "all"}, "tokens='all' is not known. Give 'auto', a function, or None"),
        ({"tokens": 5}, "tokens=5 is not known"),
        ({"flops": "lots"}, "flops='lots' is not known. Give 'auto', the FLOPs of one sample, or None"),
        ({"flops": 0}, "flops=0 is not above 0 and finite"),
        ({"flops": True}, "flops=True is not known"),
        ({"peak_flops": -1}, "peak_flops=-1 is not above 0 and finite. Give FLOP/s such as 312e12"),
        ({"peak_flops": float("nan")}, "peak_flops=nan is not above 0 and finite"),
        ({"peak_flops": "auto"}, "peak_flops='auto' is not known"),
        ({"skip": 0}, "skip=0 is no number of steps. Give a whole number from 1 up"),
        ({"skip": 1.5}, "skip=1.5 is no number of steps"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Throughput(**options)


def test_waiting_for_a_device_is_torchs(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for name in ("cpu", "cuda:1", "mps:0"):
        throughput._wait_for(torch.device(name))
    assert waited == [torch.device("cuda:1"), torch.device("mps:0")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_gpu_is_not_faster_than_its_peak(precision):
    net = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    model = kt.Model(net, backend="gpu").compile("sgd", "mse", precision=precision)
    callback, x = Throughput(flops="auto"), torch.rand(8192, 1024)
    history = model.fit(x, x, batch_size=1024, epochs=3, callbacks=callback, verbose=0).history
    assert callback.flops_per_sample == 2 * (2 + 3) * 1024 * 4096
    assert all(0 < mfu < 1 for mfu in history.get("mfu", [0.5]))


def test_where_each_process_has_its_part_the_rates_are_those_of_all(clock, monkeypatch):
    monkeypatch.setattr(kt.backends.Single, "portion", 0.25)
    callback = Throughput("auto", flops=60.0, peak_flops=1e3)
    history = fit(Slow(clock), batches_of(4, 4, 4), callback, clock=clock)
    assert history["samples_per_s"] == pytest.approx([4 * 4 / STEP_S])
    assert history["flops_per_s"] == pytest.approx([4 * 80.0])
    assert history["mfu"] == pytest.approx([0.08])  # of each device
