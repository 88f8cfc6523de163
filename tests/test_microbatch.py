"""Micro-batches: a batch in pieces is the batch; what is out of memory is halved until it fits, and nothing else is."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn

import kerastorch as kt
from tests import reference

sgd = partial(torch.optim.SGD, lr=0.5)
MASKED = -100
ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


@pytest.fixture
def arrays(digits):
    """140 digits in float64."""
    return digits[0][:140].double(), digits[1][:140]


def train(net, data, loss="cross_entropy", *, epochs=2, optimizer=sgd, precision="64", metrics=(), seed=0, **options):
    """A copy of `net`, trained without shuffling, and its history."""
    net = copy.deepcopy(net)
    torch.manual_seed(seed)
    if isinstance(data, tuple):
        options = {"shuffle": False, "batch_size": 40} | options
    model = kt.Model(net, backend="cpu").compile(optimizer, loss, precision=precision, metrics=metrics)
    return net, model.fit(data, epochs=epochs, verbose=0, **options).history


def assert_same(ours, theirs, tolerance=1e-12):
    (net, history), (expected, expected_history) = ours, theirs
    assert reference.distance(net, expected) < tolerance
    assert history.keys() == expected_history.keys()
    for name, values in expected_history.items():
        assert history[name] == pytest.approx(values, rel=tolerance, abs=tolerance)


# The same as the whole batch.


@pytest.mark.parametrize("size", [1, 7, 16, 20, 39, 40, 1000])
def test_any_size_gives_the_same_as_the_whole_batch(classifier, arrays, size):
    """Batches of 40, 40, 40 and 20."""
    whole, pieces = (
        train(classifier, arrays, metrics=["accuracy", "top3_accuracy"], microbatch=n) for n in (None, size)
    )
    assert_same(pieces, whole)


def test_no_piece_is_larger(classifier, arrays):
    seen = []
    classifier.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    train(classifier, arrays, epochs=1, microbatch=16)
    assert seen == [16, 16, 8] * 3 + [16, 4]


def test_in_float32_it_is_equal_to_1e_6(classifier, digits):
    assert_same(*(train(classifier, digits, precision="32", microbatch=size) for size in (16, None)), tolerance=1e-6)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("size", [1, 9, 16])
def test_masked_targets_do_not_count(classifier, arrays, size, accumulate):
    """Among them whole pieces, and a whole batch."""
    x, y = arrays[0], arrays[1].clone()
    y[3:50], y[80:120] = MASKED, MASKED
    whole, pieces = (train(classifier, (x, y), microbatch=n, accumulate=accumulate) for n in (None, size))
    assert_same(pieces, whole)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_it_goes_with_windows_of_batches(classifier, arrays, accumulate):
    x, y = arrays
    data = [*zip(x[:64].split([5, 40, 17, 2]), y[:64].split([5, 40, 17, 2]), strict=True)]
    windows = [reference.joined(window) for window in reference.windows(data, accumulate)]
    expected, _ = reference.train(copy.deepcopy(classifier).double(), lambda epoch: windows, sgd, F.cross_entropy, 2)
    net, _ = train(classifier, data, accumulate=accumulate, microbatch=6)
    assert reference.distance(net, expected) < 1e-12


def test_weights_go_with_their_samples(classifier, arrays):
    weight, class_weight = torch.linspace(0, 2, 140, dtype=torch.float64), {digit: 1 + digit for digit in range(10)}
    for options in ({"sample_weight": weight}, {"class_weight": class_weight}):
        whole, pieces = (train(classifier, arrays, microbatch=n, **options) for n in (None, 9))
        assert_same(pieces, whole)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.linspace(0.2, 3, 10).double(), ignore_index=3),
        nn.CrossEntropyLoss(reduction="none"),
        partial(F.cross_entropy, label_smoothing=0.1),
        partial(F.cross_entropy, reduction="sum"),
    ],
)
def test_every_kind_of_loss_is_the_mean_of_the_batch(classifier, arrays, loss):
    optimizer = partial(torch.optim.SGD, lr=0.01)
    whole, pieces = (train(classifier, arrays, loss, microbatch=n, optimizer=optimizer)[0] for n in (None, 9))
    assert reference.distance(pieces, whole) < 1e-12


class Masked(nn.Module):
    """Two heads on digits, each with classes of its own."""

    def __init__(self):
        super().__init__()
        self.digit, self.parity = nn.Linear(64, 10), nn.Linear(64, 2)

    def forward(self, x):
        return {"digit": self.digit(x), "parity": self.parity(x)}


@pytest.mark.parametrize("size", [9, "auto"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_several_outputs_are_each_the_mean_over_their_own_targets(arrays, accumulate, size):
    x, digit, parity = arrays[0], arrays[1].clone(), arrays[1] % 2
    digit[3:90:2], parity[:50] = MASKED, MASKED
    data = x, {"digit": digit, "parity": parity}
    loss = {"digit": ("cross_entropy", 0.5), "parity": "cross_entropy"}
    metrics = {"digit": ["accuracy"]}
    net = Masked()
    whole, pieces = (train(net, data, loss, microbatch=n, accumulate=accumulate, metrics=metrics) for n in (None, size))
    assert_same(pieces, whole)


def test_inputs_by_name_and_in_tuples_are_cut_too(arrays):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, left, right):
            return self.head(torch.cat([left, right], dim=1))

    x, y = arrays
    net, (left, right) = Two(), x.split(32, dim=1)
    expected = train(net, ((left, right), y))
    for inputs in ((left, right), {"left": left, "right": right}):
        assert_same(train(net, (inputs, y), microbatch=9), expected)


def test_a_loss_of_ones_own_counts_by_samples(classifier, arrays):
    class Own(kt.Model):
        def compute_loss(self, batch):
            x, y = batch
            loss = F.cross_entropy(self.module(x), y)
            self.log("double", 2 * loss)
            return loss

    results = []
    for size in (None, 9, "auto"):
        net = copy.deepcopy(classifier)
        model = Own(net, backend="cpu").compile(sgd, precision="64")
        options = {"epochs": 2, "batch_size": 40, "shuffle": False, "verbose": 0}
        results.append((net, model.fit(*arrays, microbatch=size, **options).history))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_batch_norm_sees_the_pieces(arrays):
    """As documented: statistics are those of a piece, so here the split does change the result."""
    net = nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Linear(12, 10))
    x, y = arrays
    whole, pieces = (train(net, (x, y), microbatch=n, batch_size=70, epochs=1)[0] for n in (None, 35))
    assert reference.distance(pieces, whole) > 1e-3
    assert pieces[1].num_batches_tracked == 2 * whole[1].num_batches_tracked
    assert all(value.isfinite().all() for value in pieces.state_dict().values())


def test_dropout_draws_as_in_a_loop_over_the_pieces(arrays):
    net = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10)).double()
    torch.manual_seed(3)
    expected = reference.train_in_windows(
        net,
        lambda epoch: reference.cut(*arrays, 10),
        sgd,
        partial(F.cross_entropy, reduction="sum"),
        epochs=2,
        accumulate=lambda epoch: 2,
    )
    for size in (10, "auto"):
        ours, _ = train(net, reference.cut(*arrays, 20 if size == 10 else 10), seed=3, microbatch=size,
                        accumulate=1 if size == 10 else 2)  # fmt: skip
        assert reference.distance(ours, expected.net) < 1e-12


# Out of memory.


class Limited(nn.Module):
    """A network that has no memory for more than `limit` samples.

    Attributes:
        tries: Samples in each call.
        held: Weak references to what each call left behind for its backward pass.
        alive: For each call, how much of what the calls before left behind was still there when it began.
    """

    def __init__(self, net, limit, where="forward", error=torch.OutOfMemoryError):
        super().__init__()
        self.net, self.limit, self.where, self.error = net, limit, where, error
        self.tries, self.held, self.alive = [], [], []

    def forward(self, x):
        self.tries.append(len(x))
        self.alive.append(sum(reference() is not None for reference in self.held))
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor):
            output = self.net(x)
        if self.training and len(x) > self.limit:
            if self.where == "forward":
                self._fail()
            output.register_hook(self._fail)
        return output

    def _keep(self, tensor):
        kept = _Kept(tensor.detach())  # with its graph it would hold itself
        self.held.append(weakref.ref(kept))
        return kept

    def _fail(self, gradient=None):
        raise self.error(ON_CPU if self.error is RuntimeError else "out of memory. Tried to allocate 9 GiB.")

    def __deepcopy__(self, memo):
        return type(self)(copy.deepcopy(self.net, memo), self.limit, self.where, self.error)


class _Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def random_net():
    """Everything that a failed try could leave a trace in: random numbers and buffers."""
    return nn.Sequential(nn.Linear(64, 12), nn.Dropout(0.3), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


OUT_OF_MEMORY = [("forward", torch.OutOfMemoryError), ("backward", torch.OutOfMemoryError),
                 ("forward", RuntimeError), ("backward", RuntimeError), ("forward", MemoryError)]  # fmt: skip


@pytest.mark.parametrize(("where", "error"), OUT_OF_MEMORY)
def test_auto_halves_until_it_fits_and_leaves_no_trace_of_what_failed(arrays, where, error):
    net = Limited(random_net(), 6, where, error)
    expected = train(net.net, arrays, microbatch=5, optimizer="adam")
    with pytest.warns(UserWarning, match="microbatch='auto'") as said:
        trained, history = train(net, arrays, microbatch="auto", optimizer="adam")
    assert trained.tries[:11] == [40, 20, 10, *[5] * 8]
    assert trained.tries[11:] == [5] * (2 * 28 - 8)
    assert len(said) == 1
    assert "40 samples did not fit" in str(said[0].message)
    assert reference.same_weights(trained.net, expected[0])
    assert history == expected[1]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_auto_frees_what_failed_before_it_tries_again(arrays, where):
    with pytest.warns(UserWarning, match="microbatch='auto'"):
        trained, _ = train(Limited(random_net(), 6, where), arrays, microbatch="auto", epochs=1)
    assert trained.tries[:4] == [40, 20, 10, 5]
    assert trained.alive[1:4] == [0, 0, 0]
    assert len(trained.held) > 10


def test_auto_frees_what_a_module_returned_beside_its_loss(arrays):
    class WithLoss(Limited):
        def forward(self, x, y):
            output = super().forward(x)
            return {"loss": F.cross_entropy(output, y), "spread": output.var()}

    net = WithLoss(random_net().double(), 6, "backward")
    with pytest.warns(UserWarning, match="microbatch='auto'"):
        kt.Model(net, backend="cpu").compile(sgd, precision="64").fit(
            *arrays, batch_size=40, microbatch="auto", verbose=0
        )
    assert net.tries[:4] == [40, 20, 10, 5]
    assert net.alive[1:4] == [0, 0, 0]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gradients_of_earlier_batches_of_the_window_are_kept(classifier, arrays, where):
    x, y = arrays
    sizes = [5, 40, 17, 2, 30]
    data = [*zip(x[:94].split(sizes), y[:94].split(sizes), strict=True)]
    windows = [reference.joined(window) for window in reference.windows(data, 3)]
    expected, _ = reference.train(copy.deepcopy(classifier).double(), lambda epoch: windows, sgd, F.cross_entropy, 2)
    with pytest.warns(UserWarning, match="a piece of 40 samples .* going on with pieces of 20"):
        trained, _ = train(Limited(classifier, 18, where), data, accumulate=3, microbatch="auto")
    assert trained.tries[:9] == [5, 40, 20, 10, 10, 10, 10, 10, 7]
    assert reference.distance(trained.net, expected) < 1e-12


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_masks_and_several_outputs_survive_a_failed_try(arrays, where):
    class Two(Limited):
        def forward(self, x):
            output = super().forward(x)
            return {"digit": output[:, :10], "parity": output[:, 10:]}

    x, digit, parity = arrays[0], arrays[1].clone(), arrays[1] % 2
    digit[3:90:2], parity[:50] = MASKED, MASKED
    data, loss = (x, {"digit": digit, "parity": parity}), {"digit": "cross_entropy", "parity": ("cross_entropy", 3.0)}
    results = []
    for limit, size in ((1000, None), (12, "auto")):
        net = Two(nn.Linear(64, 12), limit, where)
        torch.manual_seed(0)
        net.net.reset_parameters()
        model = kt.Model(net, backend="cpu").compile(sgd, loss, precision="64")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            options = {"accumulate": 3, "epochs": 2, "shuffle": False, "verbose": 0}
            results.append((net.net, model.fit(*data, batch_size=40, microbatch=size, **options).history))
        assert len(said) == (size is not None)
    assert_same(results[1], results[0])


def test_loss_scaling_survives_a_failed_try(digits):
    net = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.3), nn.Linear(16, 10))
    expected, _ = train(net, digits, precision="16", microbatch=10)
    with pytest.warns(UserWarning, match="microbatch='auto'"):
        trained, _ = train(Limited(net, 10, "backward"), digits, precision="16", microbatch="auto")
    assert reference.same_weights(trained.net, expected)


def test_a_later_batch_that_is_larger_is_cut_from_then_on(classifier, arrays):
    x, y = arrays
    data = [*zip(x[:60].split([10, 30, 20]), y[:60].split([10, 30, 20]), strict=True)]
    with pytest.warns(UserWarning, match="a piece of 30 samples"):
        trained, _ = train(Limited(classifier, 16), data, microbatch="auto", epochs=1)
    assert trained.tries == [10, 30, 15, 15, 15, 5]


def test_metrics_count_each_sample_once(arrays):
    metrics = ["accuracy", torchmetrics.F1Score("multiclass", num_classes=10)]
    net = nn.Sequential(nn.Linear(64, 10))
    expected = train(net, arrays, metrics=[copy.deepcopy(metric) for metric in metrics])
    with pytest.warns(UserWarning, match="microbatch='auto'"):
        trained, history = train(Limited(net, 16), arrays, metrics=metrics, microbatch="auto")
    assert_same((trained.net, history), expected, tolerance=1e-6)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_pieces_before_the_one_that_failed_leave_no_trace_either(arrays, where):
    class Picky(Limited):
        """Out of memory where a piece has the last sample of the first batch among more than `limit`."""

        def forward(self, x):
            self.limit = 6 if (x == last).all(1).any() else 1000
            return super().forward(x)

    last, metrics = arrays[0][39], ["accuracy", torchmetrics.F1Score("multiclass", num_classes=10)]
    net = Picky(random_net(), 6, where)
    expected = train(net.net, arrays, microbatch=5, metrics=[copy.deepcopy(metric) for metric in metrics])
    with pytest.warns(UserWarning, match="microbatch='auto'"):
        trained, history = train(net, arrays, microbatch="auto", metrics=metrics)
    assert trained.tries[:14] == [40, 20, 20, 10, 10, 10, 10, *[5] * 7]
    assert reference.same_weights(trained.net, expected[0])
    assert history == expected[1]


@pytest.mark.parametrize(("where", "error"), OUT_OF_MEMORY)
def test_a_single_sample_that_does_not_fit_is_an_error(classifier, arrays, where, error):
    net = Limited(classifier, 0, where, error)
    before = copy.deepcopy(net.net)
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy")
    with (
        pytest.raises(error, match="allocate"),
        pytest.warns(UserWarning, match="microbatch='auto'"),
    ):
        model.fit(*arrays, batch_size=40, microbatch="auto", verbose=0)
    assert net.tries == [40, 20, 10, 5, 2, 1]
    assert reference.same_weights(net.net, before)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, ZeroDivisionError])
def test_other_errors_come_through_unchanged(classifier, arrays, where, error):
    class Failing(Limited):
        def _fail(self, gradient=None):
            raise self.error("something else")

    net = Failing(classifier, 10, where, error)
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy")
    with pytest.raises(error, match="something else"):
        model.fit(*arrays, batch_size=40, microbatch="auto", verbose=0)
    assert net.tries == [40]


def test_a_number_is_what_was_asked_for_and_is_not_halved(classifier, arrays):
    with pytest.raises(torch.OutOfMemoryError):
        train(Limited(classifier, 10), arrays, microbatch=20)


REAL = """
    import resource, sys, warnings
    import torch
    from torch import nn
    import kerastorch as kt

    torch.set_num_threads(1)

    class Wide(nn.Module):  # 2 MB for each sample, a few times over
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, x):
            return self.layer(x.repeat(1, 62_500).tanh().sigmoid().reshape(len(x), -1, 8).mean(1) + x)

    def trained(microbatch):
        torch.manual_seed(0)
        net, x = Wide(), torch.rand(32, 8)
        model = kt.Model(net, backend="cpu").compile("sgd", "mse", lr=0.1)
        model.fit(x, x.sum(1, keepdim=True), batch_size=32, shuffle=False, microbatch=microbatch, verbose=0)
        return net.state_dict()

    expected = trained(None)
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 80 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        trained(None)
    except RuntimeError as error:
        print("whole:", str(error)[:80])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        halved = trained("auto")
    print("auto:", *(str(warning.message) for warning in said))
    print("equal:", all(torch.allclose(halved[name], expected[name], atol=1e-6) for name in expected))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_memory_that_has_really_run_out():
    """Under a limit on the process's address space, in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REAL)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    whole, auto, equal = ran.stdout.splitlines()
    assert whole.startswith("whole:")
    assert "a piece of 32 samples did not fit into memory" in auto
    assert equal == "equal: True"


# Bad input.


@pytest.mark.parametrize("size", [0, -4, 2.5, True, "automatic"])
def test_an_impossible_size_is_refused(classifier, arrays, size):
    with pytest.raises(ValueError, match="microbatch=.* is no number of samples"):
        train(classifier, arrays, microbatch=size)


@pytest.mark.parametrize("size", [4, "auto"])
def test_an_optimizer_that_evaluates_the_loss_again_is_refused(regressor, diabetes, size):
    with pytest.raises(ValueError, match="LBFGS .* does not go with accumulate or microbatch"):
        train(regressor, diabetes, "mse", optimizer="lbfgs", microbatch=size)


def test_a_train_step_of_ones_own_is_refused(regressor, diabetes):
    class Own(kt.Model):
        def train_step(self, batch):
            pass

    with pytest.raises(ValueError, match="microbatch=4 cannot cut a batch that your own train_step works on"):
        Own(regressor, backend="cpu").compile("sgd", "mse").fit(*diabetes, microbatch=4, verbose=0)
