"""Optimizers: every name, every form, and a lean step that is torch's own fused step bit for bit."""

import copy
import pickle
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import kerastorch as kt
from kerastorch import optimizers

STEPS = 20
NAMES = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def model_of(net: nn.Module, optimizer="sgd", loss="mse", **options) -> kt.Model:
    return kt.Model(net, backend="cpu").compile(optimizer, loss, **options)


# Names and forms.


@pytest.mark.parametrize("name", NAMES)
def test_every_class_of_torch_takes_its_own_step_by_name(name) -> None:
    """On a matrix alone, which Muon needs; on an embedding where gradients must be sparse."""
    is_sparse = name == "SparseAdam"
    net = nn.Embedding(5, 2, sparse=True) if is_sparse else nn.Linear(5, 2, bias=False)
    by_hand, x, y = copy.deepcopy(net), torch.arange(5) if is_sparse else torch.randn(5, 5), torch.randn(5, 2)
    expected = getattr(torch.optim, name)(by_hand.parameters())

    def closure() -> Tensor:
        expected.zero_grad()
        loss = F.mse_loss(by_hand(x), y)
        loss.backward()
        return loss

    expected.step(closure)
    for form in (name, name.lower(), name.upper(), getattr(torch.optim, name)):
        trained = copy.deepcopy(net)
        model = model_of(trained, form)
        assert type(model.optimizer).__name__ == name and isinstance(model.optimizer, getattr(torch.optim, name))
        model.train_on_batch(x, y)
        assert not torch.equal(trained.weight, net.weight)
        assert torch.allclose(trained.weight, by_hand.weight, atol=1e-6)


def test_unknown_name_lists_close_ones() -> None:
    with pytest.raises(ValueError, match="optimizer='adamm' is not in torch.optim. Did you mean 'adam' or"):
        model_of(nn.Linear(1, 1), "adamm")
    with pytest.raises(ValueError, match="Known are adadelta, adafactor, adagrad, adam"):
        model_of(nn.Linear(1, 1), "zzzzzz")


@pytest.mark.parametrize(
    "form",
    [
        "sgd",
        torch.optim.SGD,
        partial(torch.optim.SGD, lr=0.7, momentum=0.5),
        lambda parameters: torch.optim.SGD(parameters, lr=0.7),
        lambda parameters: torch.optim.SGD([{"params": [parameter], "lr": 0.7} for parameter in parameters]),
    ],
    ids=["name", "class", "partial", "callable", "callable with groups"],
)
def test_lr_overrides_the_rate_of_every_form(form) -> None:
    optimizer = model_of(nn.Linear(2, 1), form, lr=0.25).optimizer
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert optimizer.param_groups[0]["momentum"] == (0.5 if isinstance(form, partial) else 0)


def test_rate_is_the_forms_own_without_lr() -> None:
    assert model_of(nn.Linear(2, 1), "adam").optimizer.param_groups[0]["lr"] == 1e-3
    assert model_of(nn.Linear(2, 1), partial(torch.optim.SGD, lr=0.7)).optimizer.param_groups[0]["lr"] == 0.7


def test_instance_is_used_as_it_is_with_lr_put_in() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.RMSprop(net.parameters(), lr=0.7)
    model = model_of(net, optimizer)
    assert model.optimizer is optimizer and optimizer.param_groups[0]["lr"] == 0.7
    assert model_of(net, optimizer, lr=0.25).optimizer.param_groups[0]["lr"] == 0.25


def test_instance_of_some_of_the_parameters_leaves_the_others() -> None:
    net = nn.Linear(2, 1)
    before = copy.deepcopy(net)
    model = model_of(net, torch.optim.SGD([net.bias], lr=0.1))
    model.train_on_batch(torch.randn(4, 2), torch.randn(4, 1))
    assert torch.equal(net.weight, before.weight) and not torch.equal(net.bias, before.bias)


def test_optimizer_of_other_parameters_is_refused() -> None:
    net, other = nn.Linear(2, 1), nn.Linear(2, 1)
    foreign = torch.optim.Adam([net.weight, other.weight, other.bias])
    with pytest.raises(ValueError, match="2 of the 3 parameters that this Adam optimizes are not the module's"):
        model_of(net, foreign)
    with pytest.raises(ValueError, match="not the module's"):
        model_of(net, lambda _: torch.optim.SGD(other.parameters(), lr=0.1))


@pytest.mark.parametrize("lr", [-0.1, float("nan"), "fast", True, [0.1]], ids=str)
def test_bad_rate_is_refused(lr) -> None:
    with pytest.raises(ValueError, match="is not a learning rate. Give a number from 0 up"):
        model_of(nn.Linear(1, 1), "sgd", lr=lr)


def test_what_makes_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="optimizer=3 is a int; expected a name"):
        model_of(nn.Linear(1, 1), 3)
    with pytest.raises(TypeError, match="returned a list, expected a torch.optim.Optimizer"):
        model_of(nn.Linear(1, 1), list)


def test_implementation_that_the_user_chose_is_kept() -> None:
    group = model_of(nn.Linear(1, 1), partial(torch.optim.Adam, foreach=True)).optimizer.param_groups[0]
    assert group["foreach"] and not group["fused"]
    group = model_of(nn.Linear(1, 1), partial(torch.optim.Adam, fused=False)).optimizer.param_groups[0]
    assert group["fused"] is False and not group["foreach"]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's
@pytest.mark.parametrize("name", ["sgd", "adagrad", "sparseadam"])
def test_sparse_gradients_get_an_implementation_that_takes_them(name) -> None:
    net, x, y = nn.Embedding(6, 2, sparse=True), torch.tensor([0, 3, 3]), torch.randn(3, 2)
    before = net.weight.detach().clone()
    model_of(net, name).train_on_batch(x, y)
    changed = (net.weight != before).any(1)
    assert changed.tolist() == [True, False, False, True, False, False]


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_fits_a_linear_regression(line_search) -> None:
    x = torch.randn(50, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 3
    net = nn.Linear(3, 1)
    first = F.mse_loss(net(x), y).item()
    model = model_of(net, partial(torch.optim.LBFGS, line_search_fn=line_search), metrics=["mae"])
    history = model.fit(x, y, batch_size=50, epochs=10, verbose=0).history
    assert history["loss"][0] == pytest.approx(first)  # that before the update
    assert history["loss"][-1] < 1e-8 and history["mae"][-1] < 1e-3
    assert torch.allclose(net.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=1e-3)


# The lean step.

KINDS = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.Adam, {"maximize": True}),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.3, "maximize": True}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"weight_decay": 0.1, "maximize": True}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]
FEW = [KINDS[2], KINDS[4], KINDS[6], KINDS[9]]
of_kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda part: getattr(part, "__name__", str(part)))
of_few = pytest.mark.parametrize(("kind", "options"), FEW, ids=lambda part: getattr(part, "__name__", str(part)))


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def whole(net: nn.Module) -> list:
    return [{"params": list(net.parameters())}]


def unchanged(step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What happens between backward and step: nothing."""


def trained(kind, net, options, event=unchanged, groups=whole) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of `net` after some steps; `event` comes before each and may return another net and optimizer."""
    net = copy.deepcopy(net)
    optimizer = kind(groups(net), **{"lr": 0.05, "fused": True} | options)
    for step in range(STEPS):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step), dtype=net[0].weight.dtype)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        net, optimizer = event(step, net, optimizer) or (net, optimizer)
        optimizer.step()
    return net, optimizer


def assert_equal_to_torchs(kind, options, event=unchanged, net=None, groups=whole, fused=True) -> torch.optim.Optimizer:
    """Parameters and states are equal bit for bit; to rounding where torch's are not `fused`."""
    net = small_net() if net is None else net
    equal = torch.equal if fused else torch.allclose
    theirs, expected = trained(kind, net, options | {"fused": fused}, event, groups)
    ours, optimizer = trained(optimizers.LEAN[kind], net, options, event, groups)
    assert type(optimizer) is optimizers.LEAN[kind] and type(expected) is kind
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert equal(own, other)
    states, others = optimizer.state_dict()["state"], expected.state_dict()["state"]
    assert states.keys() == others.keys()
    for index, state in states.items():
        assert state.keys() == others[index].keys()
        assert all(equal(state[name], others[index][name]) for name in state)
    return optimizer


@of_kinds
def test_lean_step_is_torchs_fused_step(kind, options) -> None:
    assert_equal_to_torchs(kind, options)


@of_few
def test_lean_step_calls_the_kernel_at_once_after_the_first_step(kind, options, monkeypatch) -> None:
    name = "sgd" if kind is torch.optim.SGD else "adam"
    module = sys.modules[f"torch.optim.{name}"]
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(1) or function(*a, **k))
    trained(optimizers.LEAN[kind], small_net(), options)
    assert len(calls) == 1
    trained(kind, small_net(), options)
    assert len(calls) == 1 + STEPS


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_fit_by_name_is_torchs_fused_loop(name) -> None:
    net, x, y = small_net(), torch.randn(40, 3), torch.randn(40, 2)
    by_hand = copy.deepcopy(net)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    expected = kind(by_hand.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        for rows in range(0, 40, 8):
            expected.zero_grad()
            F.mse_loss(by_hand(x[rows : rows + 8]), y[rows : rows + 8]).backward()
            expected.step()
    model = model_of(net, name, lr=0.01)
    model.fit(x, y, epochs=3, batch_size=8, shuffle=False, verbose=0)
    assert type(model.optimizer) is optimizers.LEAN[kind]
    assert all(torch.equal(own, other) for own, other in zip(net.parameters(), by_hand.parameters(), strict=True))


@of_few
def test_groups_keep_their_options(kind, options) -> None:
    def groups(net):
        return [
            {"params": net[0].parameters(), "lr": 0.2, "weight_decay": 0.3},
            {"params": [net[2].weight]},
            {"params": [net[2].bias], "lr": 0.001},
        ]

    assert_equal_to_torchs(kind, options, groups=groups)


def has_momentum(options: dict) -> bool:
    """torch's own fused SGD raises where a parameter gets its first momentum later than others."""
    return "momentum" in options


@of_few
def test_parameter_may_be_without_gradient_in_some_steps(kind, options) -> None:
    def drop(step, net, optimizer):
        for number, parameter in enumerate(net.parameters()):
            if (step + number) % 5 == 0 or step in (7, 8):
                parameter.grad = None

    assert_equal_to_torchs(kind, options, drop, fused=not has_momentum(options))


@of_few
def test_parameter_may_be_unfrozen_in_the_middle(kind, options) -> None:
    net = small_net()
    net[0].requires_grad_(False)

    def unfreeze(step, net, optimizer):
        if step == 9:
            net[0].requires_grad_()

    assert_equal_to_torchs(kind, options, unfreeze, net, fused=not has_momentum(options))
    assert not torch.equal(trained(optimizers.LEAN[kind], net, options, unfreeze)[0][0].weight, net[0].weight)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_sgd_with_momentum_trains_a_layer_that_is_unfrozen_later(dampening) -> None:
    net, x, y = small_net(), torch.randn(8, 3), torch.randn(8, 2)
    by_hand = copy.deepcopy(net)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    expected = torch.optim.SGD(by_hand.parameters(), **options)
    model = model_of(net[0].requires_grad_(False) and net, partial(torch.optim.SGD, **options))
    by_hand[0].requires_grad_(False)
    for _ in range(2):
        model.fit(x, y, batch_size=2, shuffle=False, verbose=0)
        for rows in range(0, 8, 2):
            expected.zero_grad()
            F.mse_loss(by_hand(x[rows : rows + 2]), y[rows : rows + 2]).backward()
            expected.step()
        net[0].requires_grad_()
        by_hand[0].requires_grad_()
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(net.parameters(), by_hand.parameters(), strict=True))


@of_few
def test_scheduler_may_change_the_rate_between_steps(kind, options) -> None:
    schedulers = {}

    def schedule(step, net, optimizer):
        if step == 0:
            schedulers[optimizer] = LambdaLR(optimizer, lambda number: 0.9**number)
        else:
            schedulers[optimizer].step()

    optimizer = assert_equal_to_torchs(kind, options, schedule)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.9 ** (STEPS - 1))


@of_few
def test_group_may_be_added_in_the_middle(kind, options) -> None:
    def add(step, net, optimizer):
        if step == 6:
            optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.3})

    assert_equal_to_torchs(kind, options, add, groups=lambda net: [{"params": net[0].parameters()}])


@of_few
def test_state_may_be_loaded_in_the_middle(kind, options) -> None:
    saved = {}

    def reload(step, net, optimizer):
        if step == 5:
            saved[optimizer] = copy.deepcopy(optimizer.state_dict())
        if step == 12:
            optimizer.load_state_dict(saved[optimizer])

    assert_equal_to_torchs(kind, options, reload)


@of_few
def test_state_may_be_cleared_by_hand(kind, options) -> None:
    def clear(step, net, optimizer):
        if step == 8:
            optimizer.state.clear()
        if step == 14:
            optimizer.state.pop(net[2].bias, None)

    assert_equal_to_torchs(kind, options, clear, fused=not has_momentum(options))


@of_few
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copy_goes_on_as_the_original_would(kind, options, way) -> None:
    def copied(step, net, optimizer):
        if step in (0, 7):
            gradients = [parameter.grad for parameter in net.parameters()]
            pair = (net, optimizer)
            net, optimizer = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter.grad = gradient
            return net, optimizer

    assert_equal_to_torchs(kind, options, copied)


@of_few
def test_hooks_of_the_step_are_called_each_time(kind, options) -> None:
    calls = []

    def register(step, net, optimizer):
        if step == 3:
            optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
            optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    trained(optimizers.LEAN[kind], small_net(), options, register)
    assert calls == ["before", "after"] * (STEPS - 3)


@of_few
def test_other_dtypes_are_updated_as_torch_does(kind, options) -> None:
    assert_equal_to_torchs(kind, options, net=small_net().double())
    assert_equal_to_torchs(kind, options, net=small_net().bfloat16())


class TwoDtypes(nn.Sequential):
    """A float32 layer, then one in float64."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 2).double())

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).double())


@of_few
def test_dtypes_may_be_mixed_within_a_group_and_between_groups(kind, options) -> None:
    assert_equal_to_torchs(kind, options, net=TwoDtypes())
    assert_equal_to_torchs(
        kind, options, net=TwoDtypes(), groups=lambda net: [{"params": layer.parameters()} for layer in net]
    )


def test_momentum_and_rate_may_change_in_the_middle() -> None:
    def change(step, net, optimizer):
        optimizer.param_groups[0]["momentum"] = 0.9 if 5 <= step < 12 else 0.0
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01) if step > 15 else 0.05

    assert_equal_to_torchs(torch.optim.SGD, {}, change)


def test_betas_may_change_in_the_middle_as_one_cycle_does() -> None:
    def change(step, net, optimizer):
        optimizer.param_groups[0]["betas"] = (0.9 - 0.02 * step, 0.99)

    assert_equal_to_torchs(torch.optim.Adam, {}, change)


@of_few
def test_gradient_scaler_is_heeded(kind, options) -> None:
    def steps(make) -> list[Tensor]:
        net = copy.deepcopy(first)
        optimizer = make(net.parameters(), lr=0.05, fused=True, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(8):
            optimizer.zero_grad()
            scaler.scale(net(torch.full((2, 3), 1.0 + step)).sum()).backward()
            if step == 4:
                net[0].weight.grad[0] = float("inf")  # this step is to be left out
            scaler.step(optimizer)
            scaler.update()
        return list(net.parameters())

    first = small_net()
    assert all(torch.equal(*pair) for pair in zip(steps(kind), steps(optimizers.LEAN[kind]), strict=True))


@of_few
def test_closure_is_called_with_gradients_and_its_loss_returned(kind, options) -> None:
    net = small_net()
    optimizer = optimizers.LEAN[kind](net.parameters(), lr=0.05, fused=True, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_lean_optimizer_has_the_name_of_torchs() -> None:
    for kind, lean in optimizers.LEAN.items():
        assert lean.__name__ == kind.__name__ and issubclass(lean, kind)
