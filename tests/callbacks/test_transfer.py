"""Unfreeze against loops that move parameters between groups by hand; with schedules, states, norms and each other."""

from __future__ import annotations

import copy
import io
import math
from functools import partial

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import StochasticWeightAveraging, Unfreeze
from tests.reference import cut, distance, same_weights

EPOCHS, BATCH, STEPS = 4, 32, 5
cross_entropy = nn.functional.cross_entropy
momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False)


@pytest.fixture
def net():
    """A backbone of two layers, and a head."""
    backbone = nn.Sequential(nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh())
    return nn.Sequential().append(backbone).append(nn.Linear(16, 10))


class Watch(kt.Callback):
    """The rates of all groups at each optimizer step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, optimizer):
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])


def frozen(net, *patterns, optimizer=momentum, **options):
    model = kt.Model(copy.deepcopy(net), backend="cpu").freeze(*patterns or ("0",))
    return model.compile(optimizer, "cross_entropy", **options)


def fit(model, data, *callbacks, **options):
    options = {"epochs": EPOCHS, "batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    model.fit(*data, callbacks=list(callbacks), **options)
    return model


def by_hand(net, data, at_epoch, lr=None, optimizer=momentum, part="0", epochs=EPOCHS, norm_is_frozen=True):
    """`part` frozen until an epoch, then moved to a group of its own where it has a rate."""
    net = copy.deepcopy(net)
    optimizer, backbone = optimizer(net.parameters()), net.get_submodule(part)
    backbone.requires_grad_(False)
    for epoch in range(epochs):
        net.train()
        if epoch >= at_epoch:
            backbone.requires_grad_(True)
        elif norm_is_frozen:
            backbone.eval()
        if epoch == at_epoch and lr is not None:
            (group,), moved = optimizer.param_groups, list(backbone.parameters())
            ids = set(map(id, moved))
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            optimizer.add_param_group(group | {"params": moved, "lr": lr})
        for x, y in cut(*data, BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
    return net


@pytest.mark.parametrize("lr", [None, 0.01, 0.0])
@pytest.mark.parametrize("at_epoch", [0, 2, 3, 9])
@pytest.mark.parametrize("optimizer", [momentum, partial(torch.optim.AdamW, lr=0.01, foreach=False)])
def test_it_is_that_of_a_loop_by_hand_bit_for_bit(net, digits, optimizer, at_epoch, lr):
    model = fit(frozen(net, optimizer=optimizer), digits, Unfreeze(at_epoch, "0", lr))
    assert same_weights(model.module, by_hand(net, digits, at_epoch, lr, optimizer))


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam", "Lion"])
def test_whatever_the_optimizer(net, digits, kind):
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = partial(getattr(torch.optim, kind, Lion), lr=0.01, **options)
    model = fit(frozen(net, optimizer=optimizer), digits, Unfreeze(2, "0", 0.001))
    assert distance(model.module, by_hand(net, digits, 2, 0.001, optimizer)) < 1e-6
    assert len(model.optimizer.param_groups) == 2


class Lion(torch.optim.Optimizer):
    """An optimizer of the user's own (Chen et al. 2023)."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    parameter -= group["lr"] * mean.lerp(parameter.grad, 1 - group["betas"][0]).sign()
                    mean.lerp_(parameter.grad, 1 - group["betas"][1])


def test_frozen_norms_keep_their_statistics_until_then(net, digits):
    seen = []

    class Look(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(copy.deepcopy(self.model.module[0][1].state_dict()))

    model = fit(frozen(net), digits, Unfreeze(2, "0"), Look())
    for epoch, state in enumerate(seen):
        is_still = all(torch.equal(value, state[name]) for name, value in net[0][1].state_dict().items())
        assert is_still == (epoch < 2) and state["num_batches_tracked"] == max(0, epoch - 1) * STEPS
    assert same_weights(model.module, by_hand(net, digits, 2))


# Schedules.


def rates_of(net, digits, schedule, *callbacks, **options):
    watch = Watch()
    fit(frozen(net, schedule=schedule), digits, *callbacks, watch, **options)
    return watch.rates


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "one_cycle", "triangular"])
def test_a_schedule_moves_both_rates_alike(net, digits, schedule):
    alone = [rate for (rate,) in rates_of(net, digits, schedule)]
    for pattern, lr in (("0", 0.02), ("0.0", 0.3)):
        both = rates_of(net, digits, schedule, Unfreeze(2, pattern, lr))
        assert [first for first, _ in both] == pytest.approx(alone)
        assert [second for _, second in both] == pytest.approx([rate * lr / 0.1 for rate in alone])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "one_cycle", "triangular"])
def test_a_schedule_goes_on_where_the_rate_of_trained_parameters_changes(net, digits, schedule):
    alone = [rate for (rate,) in rates_of(net, digits, schedule)]
    all_of_it = rates_of(net, digits, schedule, Unfreeze(2, "*", 0.02))
    change = 2 * STEPS
    assert [rate for (rate,) in all_of_it] == pytest.approx(alone[:change] + [0.2 * rate for rate in alone[change:]])


def test_cosine_is_its_formula_for_a_group_that_is_split_in_mid_run(net, digits):
    rates = rates_of(net, digits, "cosine", Unfreeze(2, "1", 0.02))
    factors = [(1 + math.cos(math.pi * step / (EPOCHS * STEPS))) / 2 for step in range(EPOCHS * STEPS)]
    assert rates[:10] == [pytest.approx([0.1 * factor]) for factor in factors[:10]]
    assert rates[10:] == [pytest.approx([0.1 * factor, 0.02 * factor]) for factor in factors[10:]]


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.lr_scheduler.StepLR, step_size=2),
        partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.5**epoch),
        partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    ],
    ids=lambda make: make.func.__name__,
)
def test_a_scheduler_of_ones_own_moves_both_rates_alike(net, digits, make):
    alone = [rate for (rate,) in rates_of(net, digits, make)]
    both = rates_of(net, digits, make, Unfreeze(2, "0", 0.02))
    assert both == [pytest.approx([rate, 0.2 * rate]) for rate in alone]


def test_a_plateau_goes_on(net, digits):
    schedule = kt.schedules.plateau(factor=0.5, patience=0, threshold=10.0)  # cuts after each epoch
    expected = [0.1, 0.05, 0.025, 0.0125]
    frozen_before = rates_of(net, digits, schedule, Unfreeze(2, "0", 0.02))[::STEPS]
    assert frozen_before[2:] == [[0.025, 0.02], [0.0125, 0.01]]
    assert [first for first, _ in frozen_before] == expected
    trained_before = rates_of(net, digits, schedule, Unfreeze(2, "1", 0.02))[::STEPS]
    assert trained_before == [[0.1], [0.05], [0.025, 0.02], [0.0125, 0.01]]


@pytest.mark.parametrize("schedule", [None, "cosine"])
@pytest.mark.parametrize("at_epoch", [0, 1, 2, 3])
def test_the_rate_of_averaging_is_gone_to_by_all(net, digits, schedule, at_epoch):
    alone = [rate for (rate,) in rates_of(net, digits, schedule, swa())][::STEPS]
    both = rates_of(net, digits, schedule, swa(), Unfreeze(at_epoch, "0", 0.02))[::STEPS]
    assert [first for first, _ in both] == pytest.approx(alone)
    assert [second for _, second in both[:2]] == pytest.approx([0.2 * rate for rate in alone[:2]])
    assert both[2][1] == pytest.approx((both[1][1] + 0.05) / 2) and both[3][1] == pytest.approx(0.05)
    trained = rates_of(net, digits, schedule, swa(), Unfreeze(at_epoch, "1", 0.02))[::STEPS]
    assert [rates[0] for rates in trained] == pytest.approx(alone)
    assert [len(rates) for rates in trained] == [1 + (epoch >= at_epoch) for epoch in range(EPOCHS)]


def swa():
    return StochasticWeightAveraging(0.05, 1, annealing_epochs=2)


def test_a_scheduler_of_ones_own_and_trained_parameters_are_refused(net, digits):
    model = frozen(net, schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=2))
    with pytest.raises(ValueError, match=r"would change the rate of '\*', which is trained already, from 0.1 to 0.02"):
        fit(model, digits, Unfreeze(2, "*", 0.02))
    assert same_weights(model.module, net) and len(model.optimizer.param_groups) == 1


# Groups.


def test_groups_of_patterns_are_split_each(net, digits):
    model = frozen(net, lr={"0.0": 0.01, "*.weight": 0.1, "*": 0.2})
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    watch = Watch()
    fit(model, digits, Unfreeze(1, "0", 0.05), watch)
    groups = [([names[id(one)] for one in group["params"]], group["lr"]) for group in model.optimizer.param_groups]
    assert groups == [
        (["0.0.weight"], 0.05),
        (["1.weight"], 0.1),
        (["1.bias"], 0.2),
        (["0.1.weight", "0.3.weight"], 0.05),
        (["0.1.bias", "0.3.bias"], 0.05),
    ]

    hand = copy.deepcopy(net)
    optimizer = momentum(
        [
            {"params": hand[0].parameters(), "lr": 0.05},
            {"params": [hand[1].weight], "lr": 0.1},
            {"params": [hand[1].bias], "lr": 0.2},
        ]
    )
    for epoch in range(EPOCHS):
        hand[0].requires_grad_(epoch >= 1)
        hand[0].train(epoch >= 1)
        for x, y in cut(*digits, BATCH):
            optimizer.zero_grad()
            cross_entropy(hand(x), y).backward()
            optimizer.step()
    assert same_weights(model.module, hand)


def test_several_unfreeze_layer_by_layer(net, digits):
    hand = copy.deepcopy(net)
    hand[0].requires_grad_(False)
    optimizer = momentum(
        [
            {"params": hand[1].parameters()},
            {"params": hand[0][3].parameters(), "lr": 0.03},
            {"params": [*hand[0][0].parameters(), *hand[0][1].parameters()], "lr": 0.01},
        ]
    )
    for epoch in range(EPOCHS):
        hand[0][3].requires_grad_(epoch >= 1)
        hand[0][:2].requires_grad_(epoch >= 2)
        hand[0][1].train(epoch >= 2)
        for x, y in cut(*digits, BATCH):
            optimizer.zero_grad()
            cross_entropy(hand(x), y).backward()
            optimizer.step()
    model = fit(frozen(net), digits, Unfreeze(1, "0.3", 0.03), Unfreeze(2, "0.[01]", 0.01))
    assert same_weights(model.module, hand)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_trained_parameters_keep_their_state_in_the_new_group(net, digits, kind):
    make = {"adamw": partial(torch.optim.AdamW, lr=0.01), "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}[kind]
    hand = copy.deepcopy(net)
    optimizer = make([{"params": hand[0].parameters()}, {"params": hand[1].parameters()}], fused=True)
    for epoch in range(EPOCHS):
        if epoch == 2:
            optimizer.param_groups[1]["lr"] = 0.003
        for x, y in cut(*digits, BATCH):
            optimizer.zero_grad()
            cross_entropy(hand(x), y).backward()
            optimizer.step()
    model = kt.Model(net, backend="cpu").compile(make, "cross_entropy")
    assert type(model.optimizer).__module__.startswith("kerastorch"), "the lean one"
    fit(model, digits, Unfreeze(2, "1", 0.003))
    assert same_weights(net, hand)


def test_a_rate_in_a_tensor_becomes_another_tensor(net, digits):
    make = partial(torch.optim.Adam, lr=torch.tensor(0.01), foreach=False, capturable=False)
    model = fit(frozen(net, optimizer=make), digits, Unfreeze(2, "0", 0.001))
    first, second = (group["lr"] for group in model.optimizer.param_groups)
    assert (first.item(), second.item()) == pytest.approx((0.01, 0.001)) and first is not second


def test_names_of_parameters_go_with_them(net, digits):
    model = kt.Model(net, backend="cpu").freeze("0")
    model.compile(momentum(list(net.named_parameters())), "cross_entropy")
    fit(model, digits, Unfreeze(2, "0.0", 0.01))
    head, backbone = (group["param_names"] for group in model.optimizer.param_groups)
    assert backbone == ["0.0.weight"] and "1.weight" in head and "0.0.weight" not in head


class Pair(kt.Model):
    def train_step(self, batch):
        x, y = batch
        for name in ("first", "second"):
            self.backward(cross_entropy(self.module[name](x), y))
            self.optimizer_step(name)


def test_each_of_several_optimizers_takes_its_own_parameters(digits):
    nets = nn.ModuleDict({name: nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10)) for name in ("first", "second")})
    model = Pair(nets, backend="cpu").freeze("*.0").compile({"first": momentum, "second": momentum})
    before = copy.deepcopy(nets)
    fit(model, digits, Unfreeze(1, "*.0", 0.01), epochs=1)
    assert same_weights(nets["first"][0], before["first"][0])
    fit(model, digits, Unfreeze(1, "*.0", 0.01), epochs=2)
    for name, optimizer in model.optimizer.items():
        groups = [(list(map(id, group["params"])), group["lr"]) for group in optimizer.param_groups]
        assert groups == [(list(map(id, nets[name][1 - i].parameters())), lr) for i, lr in ((0, 0.1), (1, 0.01))]
        assert not same_weights(nets[name][0], before[name][0])


# Runs.


def test_a_run_that_begins_later_unfreezes_at_once(net, digits):
    model = fit(frozen(net), digits, Unfreeze(1, "0", 0.01), initial_epoch=3, epochs=5)
    assert same_weights(model.module, by_hand(net, digits, 0, 0.01, epochs=2))


@pytest.mark.parametrize("schedule", [None, "cosine", partial(torch.optim.lr_scheduler.StepLR, step_size=3)])
def test_a_second_run_finds_everything_done(net, digits, schedule):
    model, unfreeze = frozen(net, schedule=schedule), Unfreeze(2, "0", 0.01)
    fit(model, digits, unfreeze)
    watch, without, alone = Watch(), frozen(net, schedule=schedule), Watch()
    fit(fit(without, digits), digits, alone)
    fit(model, digits, unfreeze, watch)
    assert len(model.optimizer.param_groups) == 2
    assert watch.rates == [pytest.approx([rate, 0.1 * rate]) for (rate,) in alone.rates]
    fit(model.freeze("0"), digits, unfreeze, watch)
    assert len(model.optimizer.param_groups) == 2 and all(one.requires_grad for one in model.module.parameters())
    other = fit(frozen(net, schedule=schedule), digits, unfreeze, epochs=1)
    assert len(other.optimizer.param_groups) == 2


@pytest.mark.parametrize("pattern", ["0", "*"])
@pytest.mark.parametrize("schedule", [None, "cosine"])
@pytest.mark.parametrize(("epoch", "loads_first"), [(0, True), (1, False), (2, True), (2, False)])
def test_it_resumes_bit_for_bit(net, digits, epoch, loads_first, schedule, pattern):
    saved = []

    class Save(kt.Callback):
        def on_epoch_end(self, number, logs=None):
            if number == epoch:
                states = self.model.module, self.model.optimizer, unfreeze
                buffer = io.BytesIO()
                torch.save([one.state_dict() for one in states], buffer)
                buffer.seek(0)
                saved.extend(torch.load(buffer, weights_only=True))

    class Halve(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            for group in self.model.optimizer.param_groups if schedule is None else ():
                group["lr"] /= 2

    unfreeze = Unfreeze(2, pattern, 0.01)
    whole = fit(frozen(net, schedule=schedule), digits, Halve(), Save(), unfreeze)

    class Load(kt.Callback):
        def on_train_begin(self, logs=None):
            other.load_state_dict(saved[2])
            self.model.optimizer.load_state_dict(saved[1])
            self.model.module.load_state_dict(saved[0])

    other, model = Unfreeze(2, pattern, 0.01), frozen(net, schedule=schedule)
    fit(frozen(net, schedule=schedule), digits, other)  # which is of no account
    fit(model, digits, *([Load(), other] if loads_first else [other, Load()]), Halve(), initial_epoch=epoch + 1)
    assert same_weights(model.module, whole.module)
    rates = [[group["lr"] for group in one.optimizer.param_groups] for one in (model, whole)]
    assert rates[0] == rates[1]


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, "0"), ValueError, "at_epoch=-1 is no epoch"),
        ((1.5, "0"), ValueError, "at_epoch=1.5 is no epoch"),
        ((True, "0"), ValueError, "at_epoch=True is no epoch"),
        ((1, 0), TypeError, "pattern=0 is a int"),
        ((1, "0", -0.1), ValueError, "lr=-0.1 is not a learning rate"),
        ((1, "0", math.inf), ValueError, "lr=inf is not a learning rate"),
        ((1, "0", "0.1"), ValueError, "lr='0.1' is not a learning rate"),
    ],
)
def test_bad_values_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Unfreeze(*arguments)


@pytest.mark.parametrize(
    ("optimizer", "unfreeze", "message"),
    [
        (momentum, Unfreeze(3, "backbone"), "'backbone' is the name or pattern of no parameter"),
        (lambda all: momentum(list(all)[-2:]), Unfreeze(3, "0"), "means '0.0.weight', which no optimizer has"),
        ("lbfgs", Unfreeze(3, "0", 0.1), "LBFGS has one rate for all"),
    ],
)
def test_what_cannot_be_is_refused_before_training(net, digits, optimizer, unfreeze, message):
    model = frozen(net, optimizer=optimizer)
    with pytest.raises(ValueError, match=message):
        fit(model, digits, unfreeze)
    assert same_weights(model.module, net) and len(model.optimizer.param_groups) == 1
