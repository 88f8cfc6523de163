"""`jit`: the same numbers compiled, one graph for training and one for evaluation, and eager where that fails.

Compiled with the backend "aot_eager", which traces all but needs no C++ compiler; one test uses the real one.
"""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kerastorch as kt
from tests import reference


@pytest.fixture(autouse=True)
def traced(monkeypatch, request) -> list:
    """The graphs that were compiled."""
    torch._dynamo.reset()
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if "real" not in request.keywords:
        monkeypatch.setattr(
            torch, "compile", lambda function, **options: compile_(function, backend=backend, **_kept(options))
        )
    return graphs


def _kept(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "mode"}


def fitted(net: nn.Module, data: tuple, jit, loss="cross_entropy", **options) -> tuple[kt.Model, dict]:
    model = kt.Model(net, backend="cpu").compile("sgd", loss, metrics=["accuracy"], lr=0.1, jit=jit)
    return model, model.fit(*data, batch_size=32, epochs=2, verbose=0, validation_data=data, **options).history


def test_a_compiled_run_has_the_numbers_of_an_eager_one(classifier, digits) -> None:
    compiled, eager = classifier, copy.deepcopy(classifier)
    _, ours = fitted(compiled, digits, True)
    _, theirs = fitted(eager, digits, False)
    assert ours == {name: pytest.approx(values, abs=1e-6) for name, values in theirs.items()}
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_odd_last_batch_and_a_second_fit_compile_nothing_anew(classifier, digits, traced) -> None:
    model, _ = fitted(classifier, digits, True)  # batches of 32 and one of 22
    assert len(traced) == 2  # training and validation
    model.fit(*digits, batch_size=32, epochs=2, verbose=0, validation_data=digits)
    assert len(traced) == 2


def test_the_module_and_the_loss_are_in_one_graph_and_the_library_is_not(classifier, digits, traced) -> None:
    fitted(classifier, digits, True)
    names = {str(node.target) for node in traced[0].graph.nodes}
    assert any("cross_entropy" in name for name in names)
    assert any("linear" in name for name in names)


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"microbatch": 8}, {"class_weight": {1: 2.0}}], ids=str)
def test_compiled_steps_are_gathered_and_weighted_as_eager_ones(classifier, digits, options) -> None:
    compiled, eager = classifier, copy.deepcopy(classifier)
    _, ours = fitted(compiled, digits, True, **options)
    _, theirs = fitted(eager, digits, False, **options)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


def test_several_outputs_are_compiled_too(digits) -> None:
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.kind, self.size = nn.Linear(64, 10), nn.Linear(64, 1)

        def forward(self, x):
            return {"kind": self.kind(x), "size": self.size(x)}

    x, y = digits
    targets, losses = {"kind": y, "size": x.sum(1, keepdim=True)}, {"kind": "cross_entropy", "size": ("mse", 0.1)}
    net = Heads()
    histories = []
    for jit in (True, False):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="jit")
            model = kt.Model(copy.deepcopy(net), backend="cpu").compile("sgd", losses, lr=1e-3, jit=jit)
            histories.append(model.fit(x, targets, batch_size=32, verbose=0, accumulate=2).history)
    assert histories[0] == {name: pytest.approx(values, abs=1e-5) for name, values in histories[1].items()}


def test_a_graph_break_falls_back_to_eager_with_one_warning_that_says_why(digits) -> None:
    class Branching(nn.Linear):
        def forward(self, x):
            output = super().forward(x)
            return output * 2 if output.sum().item() > 0 else output

    net = Branching(64, 10)
    eager = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="jit: going on without it, torch.compile failed: .") as caught:
        _, ours = fitted(net, digits, True)
    assert len([one for one in caught if "jit" in str(one.message)]) == 1
    _, theirs = fitted(eager, digits, False)
    assert ours == theirs
    assert reference.same_weights(net, eager)


def test_a_mistake_of_the_users_comes_through_as_without_jit(digits) -> None:
    net = nn.Linear(63, 10)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fitted(net, digits, True)


def test_an_unknown_mode_is_refused(classifier) -> None:
    with pytest.raises(ValueError, match="jit='fast' is not a mode of torch.compile. Give True or one of default"):
        kt.Model(classifier, backend="cpu").compile("sgd", "mse", jit="fast")


@pytest.mark.real
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_the_real_compiler_has_the_numbers_of_an_eager_run(classifier, digits) -> None:
    compiled, eager = classifier, copy.deepcopy(classifier)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="jit")
        _, ours = fitted(compiled, digits, "default")
    _, theirs = fitted(eager, digits, False)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.real
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graphs_keep_the_outputs_that_metrics_wait_for(classifier, digits) -> None:
    eager = copy.deepcopy(classifier)
    model = kt.Model(classifier).compile("sgd", "cross_entropy", metrics=["accuracy"], lr=0.1, jit="reduce-overhead")
    ours = model.fit(*digits, batch_size=30, epochs=3, verbose=0).history
    theirs = kt.Model(eager).compile("sgd", "cross_entropy", metrics=["accuracy"], lr=0.1)
    expected = theirs.fit(*digits, batch_size=30, epochs=3, verbose=0).history
    assert ours == {name: pytest.approx(values, abs=1e-4) for name, values in expected.items()}


def test_a_size_that_stays_is_compiled_even_if_it_is_smaller(digits, traced) -> None:
    x, y = digits
    model = kt.Model(nn.Linear(64, 10), backend="cpu").compile("sgd", "cross_entropy", jit=True)
    model.fit([(x[:40], y[:40])] * 3, verbose=0)
    assert len(traced) == 1
    model.fit([(x[:20], y[:20])] * 6, verbose=0)
    assert len(traced) == 2


def test_as_many_models_are_compiled_as_there_are(digits, traced) -> None:
    """torch gives up on code that it has compiled eight times."""
    for width in range(3, 10):
        net = nn.Sequential(nn.Linear(64, width), nn.Linear(width, 10))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="jit")
            fitted(net, digits, True)
    assert len(traced) == 2 * 7


def test_out_of_memory_is_not_taken_for_a_failure_of_the_compiler(digits, monkeypatch) -> None:
    model, _ = fitted(nn.Linear(64, 10), digits, True)
    jitted = model._compiled.plain

    def fails(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(jitted, "compiled", fails)
    with pytest.raises(torch.OutOfMemoryError):
        model.fit(*digits, verbose=0)


@pytest.mark.parametrize("shape", [(), (6,)], ids=["classes", "tokens"])
def test_a_modules_own_loss_is_compiled_with_it(traced, shape) -> None:
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 4)

        def forward(self, x, labels):
            logits = self.head(x)
            return {"loss": F.cross_entropy(logits.reshape(-1, 4), labels.reshape(-1)), "size": logits.square().mean()}

    data = torch.randn(96, *shape, 5), torch.randint(0, 4, (96, *shape))
    net, histories = Own(), []
    for jit in (True, False):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="jit")
            model = kt.Model(copy.deepcopy(net), backend="cpu").compile("sgd", lr=0.1, jit=jit)
            histories.append(model.fit(*data, batch_size=16, epochs=2, validation_data=data, verbose=0).history)
    assert set(histories[0]) == {"loss", "size", "val_loss", "val_size"}
    assert histories[0] == {name: pytest.approx(values, abs=1e-6) for name, values in histories[1].items()}
    assert len(traced) == 2
