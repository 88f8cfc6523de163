"""Parameters by name: freezing, unfreezing, and a rate for each group."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kerastorch as kt
from kerastorch import seeding
from kerastorch.patterns import matches, parameters_of
from tests import reference

RATE = 0.05


class Net(nn.Module):
    """A backbone to be transferred and a new head, with norms in both."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
        self.norm = nn.BatchNorm1d(16, affine=False)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x):
        return self.head(self.norm(self.backbone(x)))


@pytest.fixture
def net() -> nn.Module:
    return Net()


def by_hand(net, x, y, optimizer, frozen=(), epochs=2):
    """Trains `net` in place, the `frozen` parts of it in eval mode."""
    for epoch in range(epochs):
        net.train()
        for part in frozen:
            part.eval()
        for x_batch, y_batch in reference.cut(x, y, 32, seeding.epoch_order(len(x), epoch)):
            optimizer.zero_grad()
            F.cross_entropy(net(x_batch), y_batch).backward()
            optimizer.step()
    return net


def changed(net, before):
    pairs = zip(net.state_dict().items(), before.state_dict().values(), strict=True)
    return {name for (name, now), then in pairs if not torch.equal(now, then)}


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("backbone.0.weight", "backbone", True),
        ("backbone.0.weight", "backbone.0", True),
        ("backbone.0.weight", "backbone.*", True),
        ("backbone.0.weight", "*.weight", True),
        ("backbone.0.weight", "*", True),
        ("backbone.0.weight", "backbone.?.weight", True),
        ("backbone.0.weight", "backbone.[01]", True),
        ("backbone.0.weight", "back*", True),
        ("backbone.0.weight", "*.0", True),
        ("backbone.0.weight", "back", False),
        ("backbone.0.weight", "weight", False),
        ("backbone.0.weight", "Backbone", False),
        ("backbone.0.weight", "backbone.", False),
        ("backbone.0.weight", "", False),
        ("backbone2.weight", "backbone", False),
        ("backbone2.weight", "backbone.*", False),
    ],
)
def test_a_pattern_is_a_name_or_glob_of_a_parameter_or_of_a_module_around_it(name, pattern, fits):
    assert matches(name, pattern) is fits


def test_parameters_are_found_once_and_in_order(net):
    found = parameters_of(net, ["head.3", "*.bias", "head"], "freeze")
    names = ["head.3.weight", "head.3.bias", "backbone.0.bias", "backbone.1.bias", "backbone.3.bias", "head.0.bias"]
    assert list(found) == [*names, "head.1.bias", "head.0.weight", "head.1.weight"]
    assert all(net.get_parameter(name) is parameter for name, parameter in found.items())


def test_a_shared_parameter_is_that_of_each_module_that_has_it():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    net["head"].weight = net["embed"].weight
    assert list(parameters_of(net, ["head"], "freeze")) == ["head.weight", "head.bias"]
    assert list(parameters_of(net, ["*"], "freeze")) == ["embed.weight", "head.bias"]
    kt.Model(net, backend="cpu").freeze("head.weight")
    assert not net["embed"].weight.requires_grad


# Freezing.


@pytest.mark.parametrize("when", ["before compile", "after compile"])
def test_a_frozen_backbone_is_that_of_a_loop_by_hand(net, digits, when):
    expected, before = copy.deepcopy(net), copy.deepcopy(net)
    expected.backbone.requires_grad_(False)
    head = [parameter for parameter in expected.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(head, RATE, weight_decay=0.5, fused=True)
    by_hand(expected, *digits, optimizer, frozen=[expected.backbone])
    model, adamw = kt.Model(net, backend="cpu"), functools.partial(torch.optim.AdamW, weight_decay=0.5)
    if when == "before compile":
        model.freeze("backbone").compile(adamw, "cross_entropy", lr=RATE)
    else:
        model.compile(adamw, "cross_entropy", lr=RATE).freeze("backbone")
    model.fit(*digits, epochs=2, validation_data=digits, verbose=0)
    assert reference.same_weights(net, expected)
    assert not any(name.startswith("backbone") for name in changed(net, before))
    assert {"head.1.running_mean", "norm.running_mean", "head.0.weight"} <= changed(net, before)


@pytest.mark.parametrize(
    ("patterns", "frozen_norms"),
    [
        (["backbone"], {"backbone.1"}),
        (["backbone.*"], {"backbone.1"}),
        (["backbone.1"], {"backbone.1"}),
        (["*.1"], {"backbone.1", "head.1"}),
        (["backbone.1.weight"], set()),
        (["backbone.1.weight", "backbone.1.bias"], {"backbone.1"}),
        (["*.0", "*.3"], set()),
        (["backbone", "head.0", "head.1.*"], {"backbone.1", "head.1"}),
        (["*.1*"], {"backbone.1", "head.1"}),
        (["*[med]"], {"backbone.1", "norm", "head.1"}),  # `norm` has no parameters, but its name fits
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_norm_is_frozen_with_all_its_parameters(net, digits, patterns, frozen_norms, at_once):
    net.last = nn.Linear(16, 10)
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy")
    net.forward = lambda x: net.last(net.head[:3](net.norm(net.backbone(x))))
    for chosen in [patterns] if at_once else [[pattern] for pattern in patterns]:
        model.freeze(*chosen)
    model.fit(*digits, verbose=0)
    seen = {name: int(part.num_batches_tracked) for name, part in net.named_modules() if hasattr(part, "running_mean")}
    assert {name for name, batches in seen.items() if batches == 0} == frozen_norms
    assert all(batches in (0, 5) for batches in seen.values())


def test_a_norm_that_was_frozen_elsewhere_is_left_as_it_was(net, digits):
    """As in torch, where `requires_grad_(False)` stops no statistics."""
    net.backbone.requires_grad_(False)
    kt.Model(net, backend="cpu").compile("sgd", "cross_entropy").freeze("head.0").fit(*digits, verbose=0)
    assert net.backbone[1].num_batches_tracked == 5


def test_unfreezing_goes_on_where_a_loop_by_hand_would(net, digits):
    expected = copy.deepcopy(net)
    expected.backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW(expected.parameters(), RATE, fused=True)
    by_hand(expected, *digits, optimizer, frozen=[expected.backbone], epochs=1)
    expected.backbone.requires_grad_(True)
    for x_batch, y_batch in reference.cut(*digits, 32, seeding.epoch_order(len(digits[0]), 1)):
        expected.train()
        optimizer.zero_grad()
        F.cross_entropy(expected(x_batch), y_batch).backward()
        optimizer.step()
    model = kt.Model(net, backend="cpu").compile("adamw", "cross_entropy", lr=RATE).freeze("backbone")
    model.fit(*digits, verbose=0)
    model.unfreeze("backbone").fit(*digits, verbose=0)
    for ours, theirs in zip(net.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert net.backbone[1].num_batches_tracked == 5
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_unfreezing_a_part_leaves_the_rest_frozen(net, digits):
    before = copy.deepcopy(net)
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", lr=RATE).freeze("*").unfreeze("head", "*.3.*")
    model.fit(*digits, verbose=0)
    moved = changed(net, before)
    parameters = {name for name in moved if name.endswith(("weight", "bias"))}
    # The gradient of a bias before a norm is rounding alone, which may be none.
    assert {"backbone.3.weight", "head.0.weight", "head.1.weight", "head.3.bias"} <= parameters
    assert parameters <= {"backbone.3.weight", "backbone.3.bias"} | {n for n in parameters if n.startswith("head")}
    assert {name for name in moved if "running" in name} == {"head.1.running_mean", "head.1.running_var"}


def test_weight_decay_and_momentum_leave_frozen_parameters_alone(net, digits):
    options = functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
    model = kt.Model(net, backend="cpu").compile(options, "cross_entropy", lr=RATE)
    model.fit(*digits, verbose=0)
    before = copy.deepcopy(net)
    model.freeze("backbone").fit(*digits, verbose=0)
    assert not any(name.startswith("backbone") for name in changed(net, before))


def test_modes_are_handed_back_and_other_verbs_heed_what_is_frozen(net, digits):
    model = kt.Model(net.eval(), backend="cpu").compile("sgd", "cross_entropy").freeze("backbone")
    net.backbone[1].train()
    before = copy.deepcopy(net)
    model.train_on_batch(*digits)
    assert not any(name.startswith("backbone") for name in changed(net, before))
    assert net.backbone[1].training
    assert not net.head.training
    assert model.freeze("head") is model
    assert model.unfreeze("head") is model


def test_frozen_networks_stay_in_a_train_step_of_ones_own(digits):
    nets = nn.ModuleDict({"a": nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8)), "b": nn.Linear(8, 10)})
    before = copy.deepcopy(nets)

    class Both(kt.Model):
        def train_step(self, batch):
            self.backward(F.cross_entropy(self.module["b"](self.module["a"](batch[0])), batch[1]))
            self.optimizer_step("a")
            self.optimizer_step("b")

    Both(nets, backend="cpu").compile({"a": "adamw", "b": "adamw"}).freeze("a").fit(*digits, epochs=2, verbose=0)
    assert changed(nets, before) == {"b.weight", "b.bias"}


@pytest.mark.parametrize("verb", ["freeze", "unfreeze"])
def test_a_pattern_that_fits_nothing_is_refused_and_nothing_is_changed(net, verb):
    model = kt.Model(net, backend="cpu")
    getattr(model, verb)("head")
    before = [parameter.requires_grad for parameter in net.parameters()]
    for pattern, message in [
        ("backbon", "Did you mean 'backbone'?"),
        ("head.3.weigth", "Did you mean 'head.3.weight'?"),
        ("zzz", "Submodules are backbone, backbone.0,"),
        ("", "Submodules are backbone, backbone.0,"),
        ("norm", "What it fits has none; name the module around it."),
    ]:
        with pytest.raises(ValueError, match=rf"{verb}='{pattern}' is the name or pattern of no parameter. {message}"):
            getattr(model, verb)("backbone", pattern)
    with pytest.raises(ValueError, match=rf"{verb} was given no name or pattern. Give one, or '\*' for all"):
        getattr(model, verb)()
    for pattern in (["head"], 0, None):
        with pytest.raises(TypeError, match=f"{verb}=.* is a .*, expected a name or pattern"):
            getattr(model, verb)("backbone", pattern)
    assert [parameter.requires_grad for parameter in net.parameters()] == before


def test_training_needs_a_parameter_that_is_not_frozen(net, digits):
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy").freeze("*")
    with pytest.raises(ValueError, match=r"no trainable parameters. Unfreeze some \(model.unfreeze\('\*'\)\)"):
        model.fit(*digits, verbose=0)
    model.evaluate(*digits, verbose=0)
    model.unfreeze("*").fit(*digits, verbose=0)


# Rates.


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
@pytest.mark.parametrize(
    ("lr", "groups"),
    [
        ({"backbone.*": 1e-5, "*": 1e-2}, [("backbone", 1e-5), ("head", 1e-2)]),
        ({"backbone": 1e-5}, [("backbone", 1e-5), ("head", None)]),
        ({"backbone.3.*": 1e-4, "backbone": 0.0, "*": 1e-2}, [("backbone.3", 1e-4), ("backbone", 0.0), ("head", 1e-2)]),
    ],
)
def test_rates_by_pattern_are_the_groups_of_a_loop_by_hand(net, digits, name, kind, lr, groups):
    expected, taken, by_rate = copy.deepcopy(net), set(), []
    for prefix, rate in groups:
        params = [p for n, p in expected.named_parameters() if n.startswith(prefix) and n not in taken]
        taken |= {n for n, _ in expected.named_parameters() if n.startswith(prefix)}
        by_rate.append({"params": params} | ({} if rate is None else {"lr": rate}))
    by_hand(expected, *digits, kind(by_rate, fused=True))
    model = kt.Model(net, backend="cpu").compile(name, "cross_entropy", lr=lr)
    default = kind(expected.parameters()).param_groups[0]["lr"]
    assert [group["lr"] for group in model.optimizer.param_groups] == [
        default if rate is None else rate for _, rate in groups
    ]
    model.fit(*digits, epochs=2, verbose=0)
    assert reference.same_weights(net, expected)


def test_the_first_pattern_that_fits_decides(net):
    def rates(lr):
        groups = kt.Model(net, backend="cpu").compile("sgd", "mse", lr=lr).optimizer.param_groups
        found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        return {name: found[id(parameter)] for name, parameter in net.named_parameters()}

    bias_first, backbone_first = rates({"*.bias": 0.1, "backbone": 0.2}), rates({"backbone": 0.2, "*.bias": 0.1})
    assert [bias_first[name] for name in ("backbone.0.bias", "backbone.0.weight", "head.0.bias")] == [0.1, 0.2, 0.1]
    assert [backbone_first[name] for name in ("backbone.0.bias", "head.0.bias", "head.0.weight")] == [0.2, 0.1, 1e-3]


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd",
        torch.optim.SGD,
        functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        lambda groups: torch.optim.SGD(groups, lr=0.5),
    ],
)
def test_every_form_but_an_instance_takes_rates_by_pattern(net, optimizer):
    model = kt.Model(net, backend="cpu").compile(optimizer, "mse", lr={"head": 0.1})
    default = 1e-3 if optimizer in ("sgd", torch.optim.SGD) else 0.5
    assert [group["lr"] for group in model.optimizer.param_groups] == [0.1, default]
    instance = torch.optim.SGD(net.parameters(), lr=0.5)
    with pytest.raises(ValueError, match="names parameters, but the optimizer is an instance with groups of its own"):
        kt.Model(net, backend="cpu").compile(instance, "mse", lr={"head": 0.1})


def test_a_schedule_moves_each_rate_in_proportion(net, digits):
    model = kt.Model(net, backend="cpu").compile(
        "sgd", "cross_entropy", lr={"backbone": 1e-3, "*": 0.1}, schedule="linear"
    )
    seen = []

    class Sees(kt.callbacks.Callback):
        def on_before_optimizer_step(self, optimizer):
            seen.append([group["lr"] for group in optimizer.param_groups])

    model.fit(*digits, epochs=2, verbose=0, callbacks=[Sees()])
    assert seen == [[pytest.approx(1e-3 * (1 - i / 10)), pytest.approx(0.1 * (1 - i / 10))] for i in range(10)]


def test_frozen_parameters_are_in_their_groups_for_when_they_are_unfrozen(net, digits):
    before = copy.deepcopy(net)
    model = kt.Model(net, backend="cpu").freeze("backbone")
    model.compile("sgd", "cross_entropy", lr={"backbone": 1e-3, "*": 0.1}).fit(*digits, verbose=0)
    assert torch.equal(net.backbone[0].weight, before.backbone[0].weight)
    model.unfreeze("backbone").fit(*digits, verbose=0)
    moved = (net.backbone[0].weight - before.backbone[0].weight).abs().max()
    assert 0 < moved < 0.01


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"zzz": 0.1, "*": 0.2}, "lr has the pattern 'zzz', which fits no parameter that a pattern before it does not"),
        ({"*": 0.2, "head": 0.1}, "lr has the pattern 'head', which fits no parameter that a pattern before it does"),
        ({"head": "fast"}, "lr={'head': 'fast'} is not a learning rate. Give a number from 0 up"),
        ({"head": -0.1}, "lr={'head': -0.1} is not a learning rate."),
        ({"head": True}, "lr={'head': True} is not a learning rate."),
    ],
)
def test_rates_that_are_none_are_refused(net, lr, message):
    with pytest.raises(ValueError, match=message):
        kt.Model(net, backend="cpu").compile("sgd", "mse", lr=lr)
