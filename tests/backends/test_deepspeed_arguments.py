"""What `DeepSpeed` says before anything has begun, whether the package is there or not."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.backends import DeepSpeed


@pytest.fixture
def there(monkeypatch):
    """Whether deepspeed can be found; it is never imported where no processes have met."""

    def set_to(is_there):
        find = importlib.util.find_spec
        found = lambda name, *rest: is_there or None if name == "deepspeed" else find(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", found)

    return set_to


def test_without_the_package_the_constructor_says_how_to_get_it(there):
    there(False)
    with pytest.raises(ImportError, match=r"needs the package deepspeed: pip install kerastorch\[deepspeed\]"):
        DeepSpeed(devices=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stage": 0}, "stage=0 is none of ZeRO's. Give 1"),
        ({"stage": 4}, "stage=4 is none"),
        ({"stage": True}, "stage=True is none"),
        ({"stage": "2"}, "stage='2' is none"),
        ({"offload": 1}, "offload=1 is neither True nor False"),
        ({"devices": 0}, "devices=0 names no devices"),
        ({"timeout_s": 0}, "timeout_s=0 is no time"),
        ({"max_restarts": -1}, "max_restarts=-1"),
    ],
)
def test_arguments_are_refused_early(there, options, words):
    there(True)
    with pytest.raises(ValueError, match=words):
        DeepSpeed(**options)


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


class OwnStep(kt.Model):
    def train_step(self, batch):
        return super().train_step(batch)


class OwnLoss(kt.Model):
    def compute_loss(self, batch):
        return super().compute_loss(batch)


class Rows(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        """Nothing: it is refused before."""


@pytest.mark.parametrize(
    ("stage", "model", "options", "words"),
    [
        (1, kt.Model, {"optimizer": "lbfgs"}, "LBFGS may look at more than single numbers"),
        (1, kt.Model, {"optimizer": "adafactor"}, "Adafactor may look at more"),
        (2, kt.Model, {"optimizer": Rows}, "Rows may look at more"),
        (2, kt.Model, {"precision": "16"}, "precision='16' does not go with backend=DeepSpeed"),
        (2, kt.Model, {"precision": "64"}, "precision='64' does not go with .*: it makes its steps in float32"),
        (1, kt.Model, {"precision": "bf16-true"}, "precision='bf16-true' does not go with"),
        (1, kt.Model, {"precision": "16-true"}, "precision='16-true' does not go with"),
        (2, kt.Model, {"jit": True}, "jit does not go with"),
        (2, kt.Model, {"tbptt_steps": 2}, "tbptt_steps does not go with"),
        (1, OwnStep, {}, "an override of train_step does not go with"),
        (3, OwnLoss, {}, "an override of compute_loss does not go with .* Give stage=2"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_when_it_is_compiled(there, stage, model, options, words):
    there(True)
    module = net()
    before = copy.deepcopy(module.state_dict())
    made = model(module, backend=DeepSpeed(stage, devices=1))
    with pytest.raises(ValueError, match=words):
        made.compile(**{"optimizer": "sgd", "loss": "cross_entropy"} | options)
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
    assert {one.dtype for one in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        (1, {"microbatch": 2}, "microbatch does not go with"),
        (1, {"callbacks": [kt.callbacks.GradNorm()]}, "a callback of all parameters does not go with .* Leave it out"),
        (3, {"callbacks": [kt.callbacks.EMA(0.9)]}, "a callback of all parameters does not go with .* Leave it out"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_when_training_begins(there, stage, options, words):
    there(True)
    model = kt.Model(net(), backend=DeepSpeed(stage, devices=1)).compile("sgd", "cross_entropy")
    with pytest.raises(ValueError, match=words):
        model.fit(torch.ones(4, 4), torch.zeros(4, dtype=torch.int64), verbose=0, **options)


def test_parameters_of_another_precision_are_refused(there):
    there(True)
    with pytest.raises(ValueError, match="parameters are torch.float64, and DeepSpeed makes its steps in float32"):
        kt.Model(net().double(), backend=DeepSpeed(devices=1)).compile("sgd", "cross_entropy")


def test_a_lazy_module_is_refused(there):
    there(True)
    with pytest.raises(ValueError, match="the module is lazy"):
        kt.Model(nn.LazyLinear(3), backend=DeepSpeed(devices=1))


def test_a_scalar_is_refused_by_stage_3_alone(there):
    there(True)
    module = net()
    module.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(
        ValueError, match=r"'scale' is a parameter without dimensions.*Give it shape \(1,\), or stage=2"
    ):
        kt.Model(module, backend=DeepSpeed(3, devices=1))
    kt.Model(module, backend=DeepSpeed(2, devices=1))


def test_a_process_by_itself_computes_without_it(there):
    there(True)
    x, y = torch.ones(4, 4), torch.zeros(4, dtype=torch.int64)
    torch.manual_seed(1)
    module = net()
    models = [
        kt.Model(copy.deepcopy(module), backend=backend).compile("adam", "cross_entropy", clip=("value", 0.1))
        for backend in (DeepSpeed(devices=1), "cpu")
    ]
    for model in models:
        model.fit(x, y, verbose=0)
    first, second = (model.get_weights() for model in models)
    assert all((one == other).all() for one, other in zip(first, second, strict=True))
