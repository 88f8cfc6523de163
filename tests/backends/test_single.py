"""One device: names, what is not there, and the same numbers on CPU and GPU."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch import backends

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_auto_is_the_best_device_that_is_usable():
    expected = next(name for name in ("cuda", "mps", "xpu", "cpu") if backends.single.real_device(torch.device(name)))
    assert backends.get("auto").device.type == expected


def test_a_device_may_be_named_as_in_torch():
    for name in ("cpu", torch.device("cpu")):
        assert kt.Model(nn.Linear(1, 1), backend=name).backend.device == torch.device("cpu")
    chosen = backends.Single("cpu")
    assert kt.Model(nn.Linear(1, 1), backend=chosen).backend is chosen


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "mps"])
def test_a_device_that_is_not_there_is_refused(name):
    if name != "cuda:99" and backends.get("auto").device.type != "cpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match='Give backend="cpu"'):
        kt.Model(nn.Linear(1, 1), backend=name)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="backend='tpux' is not known"):
        kt.Model(nn.Linear(1, 1), backend="tpux")


def test_auto_is_ddp_under_torchrun(monkeypatch):
    ranks = backends.Single("cpu")
    monkeypatch.setattr(backends, "DDP", lambda: ranks)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert kt.Model(nn.Linear(1, 1)).backend is ranks
    assert kt.Model(nn.Linear(1, 1), backend="cpu").backend is not ranks  # a model of its own in each process


@pytest.mark.parametrize(("given", "said"), [(backends.CPU, "Make one of it: backend=CPU()"), (3, "backend is a int")])
def test_what_is_no_backend_is_refused(given, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        kt.Model(nn.Linear(1, 1), backend=given)


def test_backends_have_names_of_their_own():
    assert kt.Model(nn.Linear(1, 1), backend=backends.CPU()).backend.device == torch.device("cpu")
    with pytest.raises(ValueError, match="index=-1"):
        backends.GPU(-1)


def test_on_the_cpu_batches_are_handed_on_untouched():
    batches = [(torch.rand(2), None, None)]
    assert next(backends.Single("cpu").feed(batches)) is batches[0]


def test_the_next_batch_is_copied_before_this_one_is_handed_out(monkeypatch):
    """The order of copies, waits and steps, with streams that only write down what they are asked for."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return f"copy of batch {len([event for event in events if event.startswith('read')]) - 1}"

        def wait_event(self, event):
            events.append(f"{self.name} waits for {event}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def batches():
        for index in range(3):
            events.append(f"read {index}")
            yield torch.tensor([index]), None, None

    for x, _, _ in backends.Single("cpu")._copied_ahead(batches()):
        events.append(f"step on {int(x)}")
    assert events == [
        *("read 0", "read 1", "main waits for copy of batch 0", "step on 0"),
        *("read 2", "main waits for copy of batch 1", "step on 1"),
        *("main waits for copy of batch 2", "step on 2"),
    ]


@pytest.fixture
def problem(digits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    return net, digits


@gpu
@needs_cuda
def test_a_device_has_the_number_that_its_tensors_have():
    assert backends.Single("cuda").device == torch.ones(1, device="cuda").device


@gpu
@needs_cuda
@pytest.mark.parametrize("held", [True, False], ids=["data on the device", "data copied ahead"])
def test_cuda_gives_the_numbers_of_the_cpu(problem, held, monkeypatch):
    net, (x, y) = problem
    monkeypatch.setattr(backends.single, "HELD_SHARE", 0.25 if held else 0.0)
    histories, predictions = [], []
    for backend in ("cpu", "cuda"):
        model = kt.Model(copy.deepcopy(net), backend=backend).compile("adam", "cross_entropy", metrics=["accuracy"])
        histories.append(model.fit(x, y, epochs=3, validation_split=0.2, verbose=0).history)
        predictions.append(model.predict(x, verbose=0))
    for name, values in histories[0].items():
        assert histories[1][name] == pytest.approx(values, abs=1e-3)
    assert predictions[1].device.type == "cpu" and torch.allclose(*predictions, atol=1e-2)


@gpu
@needs_cuda
def test_a_step_on_cuda_never_waits_for_the_device(problem):
    net, (x, y) = problem

    class Strict(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.steps = 0

        def on_train_batch_begin(self, batch, logs=None):
            torch.cuda.set_sync_debug_mode("error" if batch > 0 else "default")

        def on_exception(self, error):
            torch.cuda.set_sync_debug_mode("default")

    class Last(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            torch.cuda.set_sync_debug_mode("default")

    model = kt.Model(net, backend="cuda").compile("adam", "cross_entropy", metrics=["accuracy"])
    model.fit(x, y, epochs=2, callbacks=[Strict(), Last()], verbose=0)


@gpu
@needs_cuda
def test_predict_keeps_no_batch_on_the_device(problem):
    net, (x, _) = problem
    model = kt.Model(net, backend="cuda")
    model.predict(x, verbose=0)
    before = torch.cuda.memory_allocated()
    outputs = model.predict(x, verbose=0)
    assert torch.cuda.memory_allocated() <= before and outputs.device.type == "cpu"
