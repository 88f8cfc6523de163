"""`check` changes nothing: whatever the module, the data or an error does, all is bit-equal to before."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info
from torchmetrics.classification import MulticlassAccuracy

import kerastorch as kt
from kerastorch.untouched import untouched

CPU = torch.device("cpu")


class Restless(nn.Module):
    """Changes all it can while it runs: buffers, weights, attributes, generators, requires_grad, modes, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8, max_norm=0.5)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", None)
        self.plain, self.array, self.number = torch.zeros(2), np.zeros(2), 0
        self.seen, self.table, self.recent, self.kinds = [], {"a": [1]}, deque([1], 3), {1}
        self.generator = torch.Generator().manual_seed(1)
        self.drawn, self.older, self.python = np.random.default_rng(1), np.random.RandomState(1), random.Random(1)
        self.fails = False

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        self.latest = torch.ones(3)
        self.plain += 1
        self.array += 1
        self.number += 1
        self.seen.append(len(tokens))
        self.table["a"].append(2)
        self.table["b"] = 3
        self.recent.append(2)
        self.kinds.add(2)
        self.new = 1
        self.head.register_forward_hook(lambda *_: None)
        self.norm.eval()
        torch.rand(1, generator=self.generator)
        self.drawn.random(), self.older.rand(), self.python.random()
        random.random(), np.random.rand(), torch.rand(1)
        with torch.no_grad():
            self.head.bias.add_(1.0)
        if self.fails:
            raise RuntimeError("it fails")
        return self.head(self.norm(self.embedding(tokens).mean(1)))


def held(net: Restless) -> list:
    return [net.plain, net.array, net.seen, net.table, net.recent, net.kinds]


def states(net: Restless) -> list:
    """Of its generators."""
    return [net.generator.get_state(), net.drawn.bit_generator.state, net.older.get_state()[2], net.python.getstate()]


def state_of(model: kt.Model) -> dict:
    """All of a model, deeply copied, in a form that can be compared."""
    module, compiled = model.module, model._compiled
    found = {
        "weights": copy.deepcopy(module.state_dict()),
        "gradients": [None if one.grad is None else one.grad.clone() for one in module.parameters()],
        "identities": [*map(id, module.parameters()), *map(id, module.buffers()), *map(id, module.modules())],
        "requires_grad": [one.requires_grad for one in module.parameters()],
        "classes": [type(one) for one in (*module.modules(), *module.parameters())],
        "modes": [part.training for part in module.modules()],
        "hooks": [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()],
        "attributes": [sorted(vars(part)) for part in module.modules()],
        "random": (random.getstate(), str(np.random.get_state(legacy=False)["state"]), torch.get_rng_state()),
        "model": {name: id(value) for name, value in vars(model).items()},
        "epochs": (model.epochs_trained, copy.deepcopy(vars(model.history)) if model.history else None),
    }
    if compiled is not None:
        losses = [compiled.loss, compiled.logged_loss, *getattr(compiled.loss, "parts", {}).values()]
        found["compiled"] = [{name: id(value) for name, value in vars(one).items()} for one in (compiled, *losses)]
        found["optimizers"] = [copy.deepcopy(one.optimizer.state_dict()) for one in compiled.updates.values()]
        found["trackers"] = [
            {name: id(value) for name, value in vars(one).items()}
            for one in (model._training_tracker, model._evaluation_tracker)
        ]
    return found


def assert_same(before, after, path="") -> None:
    """Equal to the bit, with the place where it is not."""
    assert type(before) is type(after), path
    if isinstance(before, dict):
        assert list(before) == list(after), path
        for key, value in before.items():
            assert_same(value, after[key], f"{path}.{key}")
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after), path
        for index, pair in enumerate(zip(before, after, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    elif isinstance(before, Tensor):
        assert before.dtype == after.dtype and torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0)), path
    else:
        assert before == after, path


def assert_untouched(model: kt.Model, *data, **options) -> kt.preflight.Findings:
    before = state_of(model)
    findings = model.check(*data, verbose=0, **options)
    assert_same(before, state_of(model))
    return findings


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 10, (20, 4)), torch.arange(20) % 3


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_module_that_changes_itself_is_put_back(tokens, fails, is_compiled) -> None:
    net = Restless()
    net.fails = fails
    values, generators = held(net), states(net)
    model = kt.Model(net, backend="cpu")
    if is_compiled:
        model.compile("sgd", "cross_entropy")
    findings = assert_untouched(model, *tokens)
    assert any("it fails" in one.found for one in findings) == fails
    assert net.number == 0 and net.plain.tolist() == net.array.tolist() == [0, 0] and net.latest is None
    assert (net.seen, net.table, list(net.recent), net.kinds) == ([], {"a": [1]}, [1], {1})
    assert all(one is two for one, two in zip(values, held(net), strict=True))
    assert_same(generators, states(net))


def test_after_training_nothing_changes_either(digits, classifier) -> None:
    classifier.insert(1, nn.BatchNorm1d(16))
    model = kt.Model(classifier, backend="cpu").compile("adam", "cross_entropy", metrics=["accuracy", "f1"], lr=0.01)
    model.fit(*digits, epochs=1, validation_split=0.2, verbose=0)
    classifier[0].weight.grad = torch.ones_like(classifier[0].weight)
    classifier[1].eval()
    assert_untouched(model, *digits, validation_split=0.2)
    assert torch.equal(classifier[0].weight.grad, torch.ones(16, 64)) and classifier[0].bias.grad is None


def test_training_goes_on_as_if_nobody_had_looked(digits) -> None:
    def trained(looks: bool) -> list[Tensor]:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))
        model = kt.Model(net, backend="cpu").compile("adam", "cross_entropy", metrics=["accuracy"], schedule="cosine")
        for _ in range(2):
            for _ in range(2 * looks):
                model.check(*digits, validation_data=digits, verbose=0)
            model.fit(*digits, epochs=2, verbose=0)
        return [*net.state_dict().values(), torch.tensor(model.history.history["loss"]), torch.rand(3)]

    assert_same(trained(False), trained(True))


def test_loss_metrics_and_their_objects_stay_as_they_are(digits, classifier) -> None:
    class Counts:
        calls = 0

        def __call__(self, output, target):
            self.calls += 1
            return F.cross_entropy(output, target)

    loss, metric, accuracy = Counts(), Counts(), MulticlassAccuracy(10)
    model = kt.Model(classifier, backend="cpu").compile("sgd", loss, metrics=[metric, accuracy, "mse"])
    assert_untouched(model, digits[0], F.one_hot(digits[1]).float())
    assert (loss.calls, metric.calls, accuracy.update_count) == (0, 0, 0)
    named = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", metrics=["cross_entropy"])
    assert_untouched(named, *digits)
    measure = named._training_tracker.means[0][1].function.__closure__[0].cell_contents
    assert measure.is_unchecked and named._compiled.loss.is_unchecked


def test_fit_still_warns_of_what_check_has_found(digits) -> None:
    model = kt.Model(nn.Sequential(nn.Linear(64, 10)), backend="cpu").compile("sgd", "cross_entropy")
    model.module.append(nn.Softmax(1))
    assert [one.name for one in assert_untouched(model, *digits)] == ["probabilities"]
    with pytest.warns(UserWarning, match="expects logits"):
        model.fit(*digits, verbose=0)


def test_check_gives_no_warning_itself(digits) -> None:
    net = nn.Sequential(nn.Linear(64, 10))
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy")
    net.append(nn.Softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.check(*digits, verbose=0)


@pytest.mark.parametrize("precision", ["32", "16-true"])
@pytest.mark.filterwarnings("ignore:SGD|Adam divides")
def test_lazy_modules_stay_lazy(digits, precision) -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10))
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", precision=precision)
    before, numbers = [type(one) for one in (*net.modules(), *net.parameters(), *net.buffers())], torch.get_rng_state()
    assert model.check(*digits, verbose=0).ok
    assert before == [type(one) for one in (*net.modules(), *net.parameters(), *net.buffers())]
    assert model.optimizer is None and not model.updates and torch.equal(numbers, torch.get_rng_state())
    assert len(net[0]._forward_pre_hooks) == 1 and net[0].has_uninitialized_params()
    assert model.fit(*digits, verbose=0).history["loss"][0] < 5 and isinstance(net[3], nn.Linear)


def test_an_optimizer_given_beside_a_lazy_module_keeps_its_rate(digits) -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    model = kt.Model(net, backend="cpu").compile(optimizer, "cross_entropy", lr=0.1)
    model.check(*digits, verbose=0)
    assert optimizer.param_groups[0]["lr"] == 0.5 and "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_and_compiled_modules_are_put_back(digits) -> None:
    norm = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(norm)
    compiled = []
    for net in (scripted, torch.compile(norm, backend=lambda graph, inputs: compiled.append(graph) or graph)):
        model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy")
        before = copy.deepcopy({name: value.clone() for name, value in net.state_dict().items()})
        findings = model.check(*digits, verbose=0)
        assert list(findings) == [] and "gradient norm" in findings.checked
        assert_same(before, dict(net.state_dict()))
        assert all(one.grad is None for one in net.parameters()) and not compiled


def test_precision_and_jit_are_as_compiled_and_nothing_is_compiled(digits, classifier, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", precision="16", jit=True)
    scaler, jitted = dict(vars(model._compiled.scaler)), dict(vars(model._compiled.compute))
    dtypes = []
    handle = classifier[0].register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
    assert list(assert_untouched(model, *digits)) == []
    handle.remove()
    assert set(dtypes) == {torch.float16} and len(compiled) == 1
    assert scaler == vars(model._compiled.scaler) and jitted == vars(model._compiled.compute)


class TwoSteps(kt.Model):
    """Steps by the model's means, by the optimizer itself, and moves a network that is not in the module."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.target, self.moments = copy.deepcopy(self.module), []

    def train_step(self, batch):
        loss = F.cross_entropy(self.module(batch[0]), batch[1])
        self.backward(loss)
        self.optimizer.step()
        self.optimizer_step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(self.target.parameters(), self.module.parameters(), strict=True):
                ours.lerp_(theirs + 1, 0.5)
        self.moments.append(float(loss.detach()))
        return {"loss": loss}


def test_steps_of_ones_own_move_nothing(digits, classifier) -> None:
    model = TwoSteps(classifier, backend="cpu").compile("adam", "cross_entropy")
    model.fit(*digits, verbose=0)
    target, moments = copy.deepcopy(model.target.state_dict()), list(model.moments)
    assert model.optimizer.state
    assert assert_untouched(model, *digits).ok
    assert_same(target, model.target.state_dict())
    assert moments == model.moments


def test_check_within_a_callback_of_a_running_fit_changes_nothing(digits, classifier) -> None:
    class Looks(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.findings = self.model.check(*digits, verbose=0)

    def trained(*callbacks) -> list:
        model = kt.Model(copy.deepcopy(classifier), backend="cpu")
        model.compile("adam", "cross_entropy", metrics=["accuracy"])
        history = model.fit(*digits, epochs=2, callbacks=callbacks, verbose=0).history
        return [*model.module.state_dict().values(), history]

    looks = Looks()
    assert_same(trained(), trained(looks))
    assert list(looks.findings) == []


# Data.


class Draws(Dataset):
    """Adds noise of its own, and counts."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.reads, self.noise = x, y, 0, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple:
        self.reads += 1
        return self.x[index] + self.noise.random(), self.y[index]


def test_loaders_and_datasets_go_on_as_if_nobody_had_looked(digits, classifier) -> None:
    def batches(looks: bool) -> list:
        torch.manual_seed(0)
        data = Draws(*digits)
        loader = DataLoader(data, 50, shuffle=True, generator=torch.Generator().manual_seed(5))
        if looks:
            model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy")
            assert model.check(loader, validation_data=DataLoader(Draws(*digits), 50), verbose=0).ok
        assert data.reads == 0
        return [*loader, torch.rand(2)]

    assert_same(batches(False), batches(True))


class Alone(TensorDataset):
    """Is read in this process, or not at all."""

    def __getitem__(self, index):
        assert get_worker_info() is None
        return super().__getitem__(index)


@pytest.mark.parametrize("order", ["batch_size", "batch_sampler", "samples"])
def test_loaders_with_workers_are_read_without_starting_them(digits, classifier, order) -> None:
    options = {"batch_size": {"batch_size": 50}, "samples": {"batch_size": None},
               "batch_sampler": {"batch_sampler": [[0, 1, 2], [3, 4, 5]]}}[order]  # fmt: skip
    data = Alone(*(part.reshape(3, 50, *part.shape[1:]) if order == "samples" else part for part in digits))
    loader = DataLoader(data, num_workers=2, persistent_workers=True, **options)
    findings = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy").check(loader, verbose=0)
    assert findings.ok and f"x ({3 if order == 'batch_sampler' else 50}, 64)" in findings.checked
    assert loader._iterator is None


def test_arrays_are_never_written_to(digits, classifier) -> None:
    x, y = (part.numpy().copy() for part in digits)
    for array in (x, y):
        array.setflags(write=False)
    assert kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy").check(x, y, verbose=0).ok


# The context itself.


def test_untouched_puts_back_on_an_error_too() -> None:
    net = nn.BatchNorm1d(2)
    with pytest.raises(KeyboardInterrupt), untouched([net], device=CPU):
        net(torch.rand(4, 2)).sum().backward()
        raise KeyboardInterrupt
    assert net.running_mean.tolist() == [0, 0] and net.weight.grad is None and net.num_batches_tracked == 0


def test_untouched_finds_what_lies_in_lists_and_tuples() -> None:
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(1, 1)]
            self.pair = (torch.zeros(1), {"deep": [torch.zeros(1)]})

    net = Holds()
    net.cycle = [net]
    weight = net.layers[0].weight.detach().clone()
    with untouched([net], device=CPU):
        net.layers[0].weight.data += 1
        net.pair[0].add_(1), net.pair[1]["deep"][0].add_(1)
        net.layers.append(3)
    assert torch.equal(net.layers[0].weight, weight) and len(net.layers) == 1
    assert float(net.pair[0]) == float(net.pair[1]["deep"][0]) == 0


def test_untouched_puts_back_storage_dtype_gradient_and_flag() -> None:
    net = nn.Linear(2, 2)
    kept, gradient = net.weight.data_ptr(), torch.ones(2, 2)
    net.weight.grad = gradient
    with untouched([net], device=CPU):
        assert net.weight.grad is None
        net.double()
        net.bias.requires_grad_(False)
        net.weight.grad = torch.zeros(2, 2, dtype=torch.float64)
    assert net.weight.data_ptr() == kept and net.weight.dtype is torch.float32 and net.bias.requires_grad
    assert net.weight.grad is gradient


def test_untouched_leaves_tensors_alone_that_cannot_be_written() -> None:
    net = nn.Linear(2, 2)
    net.wide, net.sparse = torch.zeros(1).expand(3), torch.eye(2).to_sparse()
    with torch.inference_mode():
        net.inferred = torch.ones(2)
    net.nowhere = torch.zeros(2, device="meta")
    with untouched([net], device=CPU):
        net.weight.data += 1
    assert net.wide.tolist() == [0, 0, 0] and net.inferred.tolist() == [1, 1]


def test_untouched_writes_to_no_weight_that_did_not_change() -> None:
    """A graph that waits for its backward pass, and weights in a file that is open for reading, stay valid."""

    class Writes(TorchDispatchMode):
        copied = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.copied += function is torch.ops.aten.copy_.default
            return function(*arguments, **(options or {}))

    net = nn.Linear(2, 1)
    net.bias.data = torch.zeros(1)
    loss = net(torch.ones(3, 2)).square().sum()
    versions = [one._version for one in net.parameters()]
    with Writes() as mode, untouched([net], device=CPU):
        net.bias.data += 1
    assert mode.copied == 1 and net.bias.tolist() == [0]
    assert versions == [one._version for one in net.parameters()]
    loss.backward()
    assert net.weight.grad is not None
