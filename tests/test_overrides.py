"""A `train_step` and a `compute_loss` of the user's own: the numbers of the loop that one would write by hand."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kerastorch as kt
from kerastorch import seeding
from tests import reference

RATE = 0.05


# Two networks that train against each other, and two that train together.


def g_loss(net, x, noise):
    return F.softplus(-net["d"](net["g"](noise))).mean()


def d_loss(net, x, noise):
    """Without `detach`: it leaves gradients in the generator, which nobody may use."""
    return (F.softplus(-net["d"](x)) + F.softplus(net["d"](net["g"](noise)))).mean()


def joint_loss(net, x, noise):
    return F.mse_loss(net["d"](net["g"](noise)), x.mean(1, keepdim=True))


LOSSES = {"g": g_loss, "d": d_loss, "gd": joint_loss}


@pytest.fixture
def pair() -> nn.Module:
    g = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 64))
    d = nn.Sequential(nn.Linear(64, 16), nn.LeakyReLU(), nn.Linear(16, 1))
    return nn.ModuleDict({"g": g, "d": d})


class Pair(kt.Model):
    """Each of `rounds` names a loss and the optimizers that step on it."""

    rounds = ("d", "g")

    def train_step(self, batch):
        x, _ = batch
        noise = torch.randn(len(x), 4, dtype=x.dtype)
        for names in self.rounds:
            loss = LOSSES[names](self.module, x, noise)
            self.backward(loss)
            for name in names:
                self.optimizer_step(name)
            self.log(f"{names}_loss", loss)


def of_rounds(*rounds):
    return type("Rounds", (Pair,), {"rounds": rounds})


def by_hand(
    net, x, make, *rounds, epochs=2, batch_size=32, accumulate=1, autocast=None, scaler=None, clip=None, schedule=None
):
    """A copy of `net`, trained on x, its optimizers and the means of the losses over each epoch's samples.

    Gradients are asked for by name, so that no loss leaves any behind.

    Args:
        make: Parameters -> optimizer.
        autocast: Dtype of the forward passes.
        clip: Parameters -> norm.
        schedule: Optimizer -> scheduler, stepped after each step of it.
    """
    net = copy.deepcopy(net).train()
    params = {name: list(part.parameters()) for name, part in net.items()}
    optimizers = {name: make(params[name]) for name in net}
    schedulers = {name: schedule(optimizer) for name, optimizer in optimizers.items()} if schedule else {}
    sums = {name: [torch.zeros_like(p) for p in params[name]] for name in net}
    counts, calls, history, norms = dict.fromkeys(net, 0), dict.fromkeys(net, 0), [], {}

    def step(name):
        for parameter, total in zip(params[name], sums[name], strict=True):
            parameter.grad = total / counts[name] * (1 if scaler is None else scaler.get_scale())
            total.zero_()
        counts[name] = calls[name] = 0
        if scaler is not None:
            scaler.unscale_(optimizers[name])
        if clip is not None:
            norms[name] = clip(params[name])
        if scaler is None:
            optimizers[name].step()
        else:
            scaler.step(optimizers[name])
        if name in schedulers:
            schedulers[name].step()
        optimizers[name].zero_grad()

    for epoch in range(epochs):
        logs = dict.fromkeys(rounds, 0.0)
        for rows in seeding.epoch_order(len(x), epoch).split(batch_size):
            noise = torch.randn(len(rows), 4, dtype=x.dtype)
            for names in rounds:
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    loss = LOSSES[names](net, x[rows], noise)
                logs[names] += loss.item() * len(rows)
                scaled, scale = (loss, 1) if scaler is None else (scaler.scale(loss), scaler.get_scale())
                weight = len(rows) if accumulate > 1 else 1
                found = iter(torch.autograd.grad(scaled, [p for name in names for p in params[name]]))
                for name in names:
                    for total in sums[name]:
                        total += next(found) / scale * weight
                    counts[name] += weight
                    calls[name] += 1
                full = [name for name in names if calls[name] == accumulate]
                for name in full:
                    step(name)
                if full and scaler is not None:
                    scaler.update()
        left = [name for name in net if calls[name]]
        for name in left:
            step(name)
        if left and scaler is not None:
            scaler.update()
        history.append({f"{names}_loss": total / len(x) / rounds.count(names) for names, total in logs.items()})
    return net, optimizers, history, norms


def fused(kind, **options):
    return lambda params: kind(params, fused=True, **options)


def trained(kind, pair, x, *, epochs=2, batch_size=32, accumulate=1, callbacks=(), optimizers=None, **compiled):
    """The model of this kind, trained on a copy of `pair`."""
    model = kind(copy.deepcopy(pair), backend="cpu").compile(optimizers or {"g": "sgd", "d": "sgd"}, **compiled)
    torch.manual_seed(5)
    options = {"epochs": epochs, "batch_size": batch_size, "accumulate": accumulate, "callbacks": callbacks}
    model.fit(x, verbose=0, **options)
    return model


def assert_as_by_hand(model, expected, exact=True, **tolerance):
    net, optimizers, history, _ = expected
    if exact:
        assert reference.same_weights(model.module, net)
    for ours, theirs in zip(model.module.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **({"rtol": 1e-5, "atol": 1e-7} | tolerance))
    for name, values in {name: [logs[name] for logs in history] for name in history[0]}.items():
        assert model.history.history[name] == pytest.approx(values, rel=1e-5)


ROUNDS = {
    "discriminator first": ("d", "g"),
    "generator first": ("g", "d"),
    "three steps of the critic": ("d", "d", "d", "g"),
    "one loss, two optimizers": ("gd",),
    "one loss for both, then one for each": ("gd", "g", "d"),
}


@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=ROUNDS)
@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_several_optimizers_are_bit_equal_to_a_loop_by_hand(pair, digits, rounds, name, kind):
    x = digits[0]
    model = trained(of_rounds(*rounds), pair, x, optimizers={"g": name, "d": name}, lr=RATE)
    torch.manual_seed(5)
    expected = by_hand(pair, x, fused(kind, lr=RATE), *rounds)
    assert_as_by_hand(model, expected)
    assert not reference.same_weights(model.module, pair)


def test_the_usual_loop_with_zero_grad_is_this_one(pair, digits):
    """As in torch's tutorials: `zero_grad` of the optimizer whose loss follows."""
    x, net = digits[0], copy.deepcopy(pair)
    optimizers = {name: torch.optim.Adam(net[name].parameters(), RATE, fused=True) for name in "gd"}
    model = trained(Pair, pair, x, optimizers={"g": "adam", "d": "adam"}, lr=RATE, epochs=1)
    torch.manual_seed(5)
    for rows in seeding.epoch_order(len(x), 0).split(32):
        noise = torch.randn(len(rows), 4)
        for name in "dg":
            optimizers[name].zero_grad()
            LOSSES[name](net, x[rows], noise).backward()
            optimizers[name].step()
    assert reference.same_weights(model.module, net)


def test_an_optimizer_may_step_every_third_batch(pair, digits):
    x, net = digits[0], copy.deepcopy(pair)

    class Sometimes(Pair):
        seen = 0

        def train_step(self, batch):
            self.seen += 1
            self.rounds = ("d", "g") if self.seen % 3 == 0 else ("d",)
            super().train_step(batch)

    model = trained(Sometimes, pair, x, lr=RATE, batch_size=16)
    optimizers = {name: torch.optim.SGD(net[name].parameters(), RATE, fused=True) for name in "gd"}
    torch.manual_seed(5)
    seen = 0
    for epoch in range(2):
        for rows in seeding.epoch_order(len(x), epoch).split(16):
            noise, seen = torch.randn(len(rows), 4), seen + 1
            for name in "dg" if seen % 3 == 0 else "d":
                net.zero_grad()
                LOSSES[name](net, x[rows], noise).backward()
                optimizers[name].step()
    assert reference.same_weights(model.module, net)


def test_a_backward_whose_step_is_left_out_is_used_by_nobody(pair, digits):
    """The generator's loss of every batch leaves gradients in the discriminator, which steps in the next batch."""
    x = digits[0]

    class Waits(Pair):
        def train_step(self, batch):
            noise = torch.ones(len(batch[0]), 4)
            self.backward(d_loss(self.module, batch[0], noise))
            self.optimizer_step("d")
            self.backward(g_loss(self.module, batch[0], noise))

    class Never(Waits):
        def train_step(self, batch):
            self.backward(d_loss(self.module, batch[0], torch.ones(len(batch[0]), 4)))
            self.optimizer_step("d")

    waits, never = (trained(kind, pair, x, lr=RATE) for kind in (Waits, Never))
    assert reference.same_weights(waits.module, never.module)


def test_a_train_step_without_a_step_leaves_its_gradients_to_the_next(regressor, diabetes):
    """Accumulation by one's own hand."""
    x, y = diabetes

    class Gathers(kt.Model):
        batches = 0

        def train_step(self, batch):
            self.backward(F.mse_loss(self.module(batch[0]), batch[1]) / 2)
            self.batches += 1
            if self.batches % 2 == 0:
                self.optimizer_step()

    expected, _ = reference.train(
        regressor, lambda epoch: reference.cut(x, y, 50), lambda params: torch.optim.SGD(params, RATE), F.mse_loss, 1
    )
    Gathers(regressor, backend="cpu").compile("sgd", lr=RATE).fit(x, y, batch_size=25, shuffle=False, verbose=0)
    for ours, theirs in zip(regressor.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_clears_the_gradients_of_its_optimizer_alone(pair, digits, accumulate):
    seen = []

    class Sees(Pair):
        def train_step(self, batch):
            self.backward(joint_loss(self.module, batch[0], batch[0][:, 20:24]))
            for name in ("g", "d"):
                self.optimizer_step(name)
                seen.append([all(p.grad is None for p in self.module[one].parameters()) for one in ("g", "d")])

    trained(Sees, pair, digits[0], accumulate=accumulate, epochs=1)
    assert seen == [[True, False], [True, True]] * 5


# Accumulation.


@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=ROUNDS)
@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_a_window_of_each_optimizer_is_the_mean_over_its_samples(pair, digits, rounds, accumulate):
    """150 samples in batches of 32: a last batch of 22, and short last windows."""
    x = digits[0].double()
    model = trained(of_rounds(*rounds), pair.double(), x, accumulate=accumulate, lr=RATE, epochs=3)
    torch.manual_seed(5)
    expected = by_hand(pair, x, fused(torch.optim.SGD, lr=RATE), *rounds, accumulate=accumulate, epochs=3)
    assert_as_by_hand(model, expected, exact=False, rtol=1e-10, atol=1e-13)


def test_accumulation_of_a_joint_loss_is_the_large_batch(pair, digits):
    x = digits[0].double()[:70]

    class Joint(Pair):
        def train_step(self, batch):
            self.backward(joint_loss(self.module, batch[0], batch[0][:, 20:24]))
            self.optimizer_step("g")
            self.optimizer_step("d")

    small = trained(Joint, pair.double(), x, batch_size=8, accumulate=4, lr=RATE)
    large = trained(Joint, pair, x, batch_size=32, lr=RATE)
    for ours, theirs in zip(small.module.parameters(), large.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_two_backward_passes_before_a_step_are_a_sum_in_a_window_too(pair, digits):
    x = digits[0].double()

    def real(net, x, noise):
        return F.softplus(-net["d"](x)).mean()

    def fake(net, x, noise):
        return F.softplus(net["d"](net["g"](noise))).mean()

    class Halves(Pair):
        def train_step(self, batch):
            noise = torch.randn(len(batch[0]), 4, dtype=torch.float64)
            for loss in (real, fake):
                self.backward(loss(self.module, batch[0], noise))
            self.optimizer_step("d")

    halves = trained(Halves, pair.double(), x, accumulate=3, lr=RATE)
    whole = trained(of_rounds("d"), pair, x, accumulate=3, lr=RATE)
    for ours, theirs in zip(halves.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_the_window_may_change_by_epoch(pair, digits):
    steps = []

    class Counts(kt.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs):
            steps.append(0)

        def on_before_optimizer_step(self, optimizer):
            steps[-1] += 1

    trained(Pair, pair, digits[0], accumulate={0: 4, 1: 2, 2: 1}, epochs=3, callbacks=[Counts()])  # 5 batches
    assert steps == [2 * 2, 2 * 3, 2 * 5]


def test_a_window_left_open_by_an_error_is_in_no_later_step(pair, digits):
    x = digits[0]

    class Fails(Pair):
        fails = False

        def train_step(self, batch):
            if self.fails and self.samples_seen:
                raise OSError("the disk is full")
            super().train_step(batch)

    model = Fails(pair, backend="cpu").compile({"g": "sgd", "d": "sgd"}, lr=RATE)
    model.fails = True
    with pytest.raises(OSError, match="the disk is full"):
        model.fit(x, accumulate=4, verbose=0)
    model.fails, other = False, copy.deepcopy(pair)
    for one in (model, Pair(other, backend="cpu").compile({"g": "sgd", "d": "sgd"}, lr=RATE)):
        torch.manual_seed(5)
        one.train_on_batch(x[:20])
        one.fit(x, accumulate=2, verbose=0)
    assert reference.same_weights(pair, other)


# Precision, clipping, schedules, rates.


@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=ROUNDS)
def test_bf16_is_autocast_around_each_forward_pass(pair, digits, rounds):
    """Each loss is that of the weights of its moment: autocast caches casts of weights, which a step outdates."""
    x = digits[0]
    model = trained(of_rounds(*rounds), pair, x, precision="bf16", lr=0.5)
    torch.manual_seed(5)
    assert_as_by_hand(model, by_hand(pair, x, fused(torch.optim.SGD, lr=0.5), *rounds, autocast=torch.bfloat16))


@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=ROUNDS)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("growth", [1, 2000])
def test_fp16_is_one_scaler_for_all_optimizers(pair, digits, rounds, accumulate, growth):
    """The scale begins so high that gradients overflow; with `growth=1` it also rises at each step."""
    x = digits[0] * 20  # of which batches of 25 are 6: with accumulate=4 a window of 2 is left

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=growth)

    model = of_rounds(*rounds)(copy.deepcopy(pair), backend="cpu")
    model.compile({"g": "sgd", "d": "sgd"}, precision="16", lr=RATE, clip=1.0)
    ours = scaler()
    model._compiled.scaler = ours
    for update in model._compiled.updates.values():
        update.scaled_step.scaler = ours
    torch.manual_seed(5)
    model.fit(x, epochs=4, batch_size=25, accumulate=accumulate, verbose=0)
    theirs = scaler()
    torch.manual_seed(5)
    clip = functools.partial(nn.utils.clip_grad_norm_, max_norm=1.0)
    options = {"autocast": torch.float16, "scaler": theirs, "clip": clip, "epochs": 4, "accumulate": accumulate}
    options["batch_size"] = 25
    expected = by_hand(pair, x, fused(torch.optim.SGD, lr=RATE), *rounds, **options)
    assert_as_by_hand(model, expected, exact=accumulate == 1, rtol=1e-4, atol=1e-6)
    assert ours.get_scale() == theirs.get_scale()
    assert model.skipped_steps > 0


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])  # fused, and one that the scaler steps itself
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_leaves_out_an_optimizer_whose_parameters_are_all_frozen(pair, digits, name, accumulate):
    model = of_rounds("gd")(pair, backend="cpu")
    model.compile({"g": name, "d": name}, precision="16").freeze("g")
    before = copy.deepcopy(pair)
    model.fit(digits[0], epochs=2, accumulate=accumulate, verbose=0)
    assert reference.same_weights(pair["g"], before["g"])
    assert not reference.same_weights(pair["d"], before["d"])


def test_double_precision_is_that_of_a_loop_by_hand(pair, digits):
    model = trained(Pair, pair, digits[0], precision="64", lr=RATE)
    torch.manual_seed(5)
    assert_as_by_hand(model, by_hand(pair.double(), digits[0].double(), fused(torch.optim.SGD, lr=RATE), "d", "g"))


def test_optimizers_compute_outside_of_the_autocast(pair, digits):
    """Muon and its like multiply matrices in their steps."""
    dtypes = set()

    class Orthogonal(torch.optim.SGD):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad.ndim == 2:
                    dtypes.add((parameter.grad @ parameter.grad.T).dtype)
            return super().step(closure)

    trained(Pair, pair, digits[0], optimizers={"g": Orthogonal, "d": "sgd"}, precision="bf16")
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("bound", [0.01, ("value", 0.001)])
def test_gradients_of_each_optimizer_are_clipped_for_themselves(pair, digits, bound):
    x = digits[0]
    clip = functools.partial(nn.utils.clip_grad_norm_, max_norm=0.01)
    if bound != 0.01:
        clip = functools.partial(nn.utils.clip_grad_value_, clip_value=0.001)
    model = trained(Pair, pair, x, clip=bound, lr=1.0)
    torch.manual_seed(5)
    expected = by_hand(pair, x, fused(torch.optim.SGD, lr=1.0), "d", "g", clip=clip)
    assert_as_by_hand(model, expected)
    if bound == 0.01:
        assert model.gradient_norm == expected[3]


def test_clipping_is_of_the_mean_over_the_window(pair, digits):
    x = digits[0].double()
    clip = functools.partial(nn.utils.clip_grad_norm_, max_norm=0.01)
    model = trained(Pair, pair.double(), x, clip=0.01, accumulate=3, lr=1.0)
    torch.manual_seed(5)
    expected = by_hand(pair, x, fused(torch.optim.SGD, lr=1.0), "d", "g", clip=clip, accumulate=3)
    assert_as_by_hand(model, expected, exact=False, rtol=1e-10, atol=1e-13)


def half_cosine(steps):
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: (1 + math.cos(math.pi * i / steps)) / 2
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_schedule_goes_for_each_optimizer_over_the_run(pair, digits, accumulate):
    x, steps = digits[0], -(-5 // accumulate) * 2
    model = trained(Pair, pair, x, schedule="cosine", accumulate=accumulate, lr={"g": 0.1, "d": 0.2})
    torch.manual_seed(5)
    make = iter((fused(torch.optim.SGD, lr=0.1), fused(torch.optim.SGD, lr=0.2)))
    schedule, options = half_cosine(steps), {"accumulate": accumulate}
    expected = by_hand(pair, x, lambda params: next(make)(params), "d", "g", schedule=schedule, **options)
    assert_as_by_hand(model, expected, exact=False)
    last = [0.1 * (1 + math.cos(math.pi * (epoch * steps // 2 + steps // 2 - 1) / steps)) / 2 for epoch in range(2)]
    assert model.history.history["g_lr"] == pytest.approx(last)
    assert model.history.history["d_lr"] == pytest.approx([2 * rate for rate in last])


def test_a_schedule_may_be_for_one_optimizer_alone(pair, digits):
    model = trained(Pair, pair, digits[0], schedule={"g": "cosine", "d": None}, lr=0.1)
    scheduled, plain = (trained(Pair, pair, digits[0], schedule=name, lr=0.1) for name in ("cosine", None))
    assert model.history.history["g_lr"] == scheduled.history.history["g_lr"]
    assert "d_lr" not in model.history.history
    assert model.optimizer["d"].param_groups[0]["lr"] == plain.optimizer["d"].param_groups[0]["lr"] == 0.1


def test_a_schedule_ends_with_the_run_however_often_an_optimizer_steps(pair, digits):
    """It goes by batches: three steps of the critic in one are taken at one rate."""
    model = trained(of_rounds("d", "d", "d", "g"), pair, digits[0], schedule="linear", lr=1.0)
    assert model.history.history["g_lr"] == pytest.approx([1 - 4 / 10, 1 - 9 / 10])
    assert model.history.history["d_lr"] == model.history.history["g_lr"]


def test_an_optimizer_that_seldom_steps_has_the_rate_of_its_batch(pair, digits):
    class Seldom(Pair):
        def train_step(self, batch):
            fake = torch.ones(len(batch[0]), 4)
            for name, loss_of in (("g", g_loss), ("d", d_loss)):
                if name == "g" or len(taken["g"]) % 3 == 0:
                    self.backward(loss_of(self.module, batch[0], fake))
                    self.optimizer_step(name)

    taken = {"g": [], "d": []}
    model = Seldom(pair, backend="cpu").compile({"g": "sgd", "d": "sgd"}, lr=1e-3, schedule="linear")
    for name, optimizer in model.optimizer.items():
        optimizer.register_step_pre_hook(lambda one, *_, name=name: taken[name].append(one.param_groups[0]["lr"]))
    model.fit(digits[0], batch_size=25, verbose=0)
    assert taken["g"] == pytest.approx([1e-3 * (1 - step / 6) for step in range(6)])
    assert taken["d"] == pytest.approx([1e-3 * (1 - step / 6) for step in (2, 5)])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_of_the_superclass_is_accumulated_over_unmasked_targets(classifier, digits, accumulate):
    class Asks(kt.Model):
        def train_step(self, batch):
            super().train_step(batch)

    x, y = digits[0].double(), digits[1].clone()
    y[torch.arange(len(y)) % 7 > 2] = -100
    y[:40] = -100
    nets = [classifier.double(), copy.deepcopy(classifier).double()]
    for kind, net in zip((Asks, kt.Model), nets, strict=True):
        model = kind(net, backend="cpu").compile("sgd", "cross_entropy", lr=0.5)
        model.fit(x, y, batch_size=50 // accumulate, accumulate=accumulate, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_metrics_that_a_train_step_measures_nowhere_are_said(classifier, digits):
    class Alone(kt.Model):
        def train_step(self, batch):
            self.backward(F.cross_entropy(self.module(batch[0]), batch[1]))
            self.optimizer_step()

    model = Alone(classifier, backend="cpu").compile("sgd", "cross_entropy", metrics=["accuracy"])
    with pytest.warns(UserWarning, match="metrics were given, but train_step measured none"):
        model.fit(*digits, epochs=2, verbose=0)


def test_a_validation_without_a_forward_is_refused_before_training(pair, digits):
    assert not hasattr(type(pair), "forward") or type(pair).forward is nn.Module.forward
    model = Pair(pair, backend="cpu").compile({"g": "sgd", "d": "sgd"})
    with pytest.raises(ValueError, match="has no forward and compute_loss is not overridden"):
        model.fit(digits[0], validation_split=0.2, verbose=0)


def test_rates_by_optimizer_and_by_pattern(pair):
    def rates(lr):
        optimizers = Pair(pair, backend="cpu").compile({"g": "sgd", "d": "sgd"}, lr=lr).optimizer
        return {name: [group["lr"] for group in one.param_groups] for name, one in optimizers.items()}

    assert rates(0.3) == {"g": [0.3], "d": [0.3]}
    assert rates({"g": 0.1, "d": 0.2}) == {"g": [0.1], "d": [0.2]}
    assert rates({"g": 0.1}) == {"g": [0.1], "d": [1e-3]}  # torch's own
    assert rates({"g": {"g.0": 0.1, "*": 0.2}, "d": 0.3}) == {"g": [0.1, 0.2], "d": [0.3]}
    assert rates({"*.0": 0.1, "*": 0.2}) == {"g": [0.1, 0.2], "d": [0.1, 0.2]}
    assert rates({"g.0": 0.1, "*": 0.2}) == {"g": [0.1, 0.2], "d": [0.2]}
    assert rates({"g": 0.1, "*": 0.2}) == {"g": [0.1], "d": [0.2]}
    assert rates({"*.0": 0.1, "g": 0.2, "*": 0.3}) == {"g": [0.1, 0.2], "d": [0.1, 0.3]}
    with pytest.raises(ValueError, match="lr has the pattern 'g', which fits no parameter"):
        rates({"*": 0.2, "g": 0.1})


# What may be an optimizer, and what it is for.


def test_optimizers_of_a_dict_may_be_given_in_every_form(pair, digits):
    x = digits[0]
    by_name = trained(Pair, pair, x, lr=RATE)
    for g, d in (
        (torch.optim.SGD, functools.partial(torch.optim.SGD, lr=RATE)),
        (lambda params: torch.optim.SGD(params, lr=RATE), "SGD"),
    ):
        model = trained(Pair, pair, x, optimizers={"g": g, "d": d}, lr=RATE)
        for ours, theirs in zip(model.module.parameters(), by_name.module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    net = copy.deepcopy(pair)
    given = {"first": torch.optim.SGD(net["g"].parameters(), RATE), "d": torch.optim.SGD(net["d"].parameters(), RATE)}

    class Given(kt.Model):  # an instance has its parameters, so that its name is free
        def train_step(self, batch):
            noise = torch.randn(len(batch[0]), 4)
            for name, loss in (("d", d_loss), ("first", g_loss)):
                self.backward(loss(self.module, batch[0], noise))
                self.optimizer_step(name)

    model = Given(net, backend="cpu").compile(given)
    assert model.optimizer == given
    torch.manual_seed(5)
    model.fit(x, epochs=2, verbose=0)
    for ours, theirs in zip(net.parameters(), by_name.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_optimizers_are_for_nested_submodules_and_globs(pair):
    def counts(*names):
        model = Pair(pair, backend="cpu").compile(dict.fromkeys(names, "sgd"))
        return [len(one.param_groups[0]["params"]) for one in model.optimizer.values()]

    assert counts("g.0", "g.2", "d") == [2, 2, 4]
    assert counts("*.0", "*.2") == [4, 4]
    assert counts("*.bias", "*.weight") == [4, 4]


def test_parameters_without_an_optimizer_stay_and_gather_no_gradients(pair, digits):
    x = digits[0]
    pair["extra"] = nn.Linear(64, 64)
    before, seen = copy.deepcopy(pair["extra"]), []

    class WithExtra(kt.Model):
        def train_step(self, batch):
            noise = torch.ones(len(batch[0]), 4)
            self.backward(d_loss(self.module, self.module["extra"](batch[0]), noise))
            seen.append(self.module["extra"].bias.grad.clone())
            self.optimizer_step("d")

    model = WithExtra(pair, backend="cpu").compile({"d": "sgd"}, lr=0.0)
    model.fit(torch.cat([x[:32]] * 3), batch_size=32, shuffle=False, verbose=0)
    assert reference.same_weights(pair["extra"], before)
    assert len(seen) == 3
    assert all(torch.equal(gradient, seen[0]) for gradient in seen)


def test_hooks_are_called_for_each_optimizer_in_order(pair, digits):
    calls = []

    class Records(kt.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs):
            calls.append("batch")

        def on_before_backward(self, loss):
            calls.append(("before backward", loss.requires_grad))

        def on_after_backward(self):
            calls.append("after backward")

        def on_before_optimizer_step(self, optimizer):
            calls.append(("step", names[id(optimizer)], optimizer.param_groups[0]["params"][0].grad is not None))

        def on_before_zero_grad(self, optimizer):
            calls.append(("zero grad", names[id(optimizer)]))

    model = of_rounds("d", "gd")(pair, backend="cpu").compile({"g": "sgd", "d": "adam"})
    names = {id(optimizer): name for name, optimizer in model.optimizer.items()}
    model.fit(digits[0][:32], verbose=0, callbacks=[Records()])
    backward = [("before backward", True), "after backward"]

    def step(name):
        return [("step", name, True), ("zero grad", name)]

    assert calls == ["batch", *backward, *step("d"), *backward, *step("g"), *step("d")]


# One optimizer, and the superclass.


class Asks(kt.Model):
    def train_step(self, batch):
        super().train_step(batch)


class AsksForLoss(kt.Model):
    def compute_loss(self, batch):
        loss = super().compute_loss(batch)
        self.log("again", loss)
        return loss


class AsksForBoth(AsksForLoss):
    def train_step(self, batch):
        super().train_step(batch)


@pytest.mark.parametrize("kind", [Asks, AsksForLoss, AsksForBoth])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 4},
        {"precision": "bf16"},
        {"precision": "16", "accumulate": 2},
        {"clip": 0.1, "accumulate": 2},
        {"schedule": "one_cycle"},
    ],
    ids=str,
)
def test_an_override_that_asks_its_superclass_changes_nothing(classifier, digits, kind, options):
    x, y = digits
    accumulate = options.pop("accumulate", 1)
    models = []
    for one in (kt.Model, kind):
        model = one(copy.deepcopy(classifier), backend="cpu")
        model.compile("sgd", "cross_entropy", metrics=["accuracy"], lr=RATE, **options)
        torch.manual_seed(5)
        model.fit(x, y, epochs=2, accumulate=accumulate, validation_split=0.2, verbose=0)
        models.append(model)
    plain, asking = models
    if accumulate == 1:
        assert reference.same_weights(plain.module, asking.module)
    for ours, theirs in zip(asking.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    logs = asking.history.history
    again = {name: logs.pop(name) for name in ("again", "val_again") if name in logs}
    assert logs == {name: pytest.approx(values, rel=1e-4) for name, values in plain.history.history.items()}
    for name, values in again.items():
        assert values == pytest.approx(logs[name.replace("again", "loss")])
    assert bool(again) == (kind is not Asks)
    assert plain.evaluate(x, y, verbose=0) == pytest.approx(
        [asking.evaluate(x, y, return_dict=True, verbose=0)[name] for name in ("loss", "accuracy")], rel=1e-4
    )


def test_a_loss_with_a_term_more_is_that_of_a_loop_by_hand(classifier, digits):
    x, y = digits

    class Regularized(kt.Model):
        def compute_loss(self, batch):
            penalty = self.module[0].weight.square().sum()
            self.log("penalty", penalty)
            return super().compute_loss(batch) + 0.01 * penalty

    net = copy.deepcopy(classifier)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, fused=True)
    history = {"loss": [], "penalty": []}
    for epoch in range(2):
        sums = {"loss": 0.0, "penalty": 0.0}
        for x_batch, y_batch in reference.cut(x, y, 32, seeding.epoch_order(len(x), epoch)):
            optimizer.zero_grad()
            penalty = net[0].weight.square().sum()
            loss = F.cross_entropy(net(x_batch), y_batch) + 0.01 * penalty
            loss.backward()
            optimizer.step()
            sums["loss"] += loss.item() * len(x_batch)
            sums["penalty"] += penalty.item() * len(x_batch)
        for name, total in sums.items():
            history[name].append(total / len(x))
    model = Regularized(classifier, backend="cpu").compile("sgd", "cross_entropy", metrics=["accuracy"], lr=0.1)
    ours = model.fit(x, y, epochs=2, validation_data=(x, y), verbose=0).history
    assert reference.same_weights(classifier, net)
    assert {name: ours[name] for name in history} == {n: pytest.approx(v, rel=1e-5) for n, v in history.items()}
    assert ours["val_penalty"][-1] == pytest.approx(net[0].weight.square().sum().item(), rel=1e-5)
    expected = reference.mean_loss(net, x, y, F.cross_entropy) + 0.01 * ours["val_penalty"][-1]
    assert ours["val_loss"][-1] == pytest.approx(expected, rel=1e-5)
    assert list(ours) == [*(one := ["loss", "penalty", "accuracy"]), *(f"val_{name}" for name in one)]


# Logs.


def test_what_is_logged_is_averaged_over_the_samples_of_the_epoch(regressor, diabetes):
    x, y = diabetes

    class Logs(kt.Model):
        def train_step(self, batch):
            super().train_step(batch)
            self.log("tensor", batch[0][:, 0].mean())
            self.log("float", batch[0][:, 0].mean().item())
            if self.samples_seen > 100:
                self.log("at the end", 7)
            for value in (1.0, 2.0):
                self.log("twice", value)
            return {"returned": batch[1].mean(), "number": 3}

    history = Logs(regressor, backend="cpu").compile("sgd", "mse").fit(x, y, batch_size=40, verbose=0).history
    mean = x[:, 0].mean().item()
    expected = {"tensor": mean, "float": mean, "at the end": 7, "twice": 1.5, "returned": y.mean().item(), "number": 3}
    assert {name: history[name] for name in expected} == {
        name: [pytest.approx(value, abs=1e-6)] for name, value in expected.items()
    }


def test_callbacks_see_the_means_of_the_epoch_so_far(regressor, diabetes):
    seen = []

    class Counts(kt.Model):
        def train_step(self, batch):
            super().train_step(batch)
            self.log("seen before", self.samples_seen)

    class Sees(kt.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            seen.append(logs["seen before"])

    model = Counts(regressor, backend="cpu").compile("sgd", "mse")
    model.fit(*diabetes, epochs=2, batch_size=50, verbose=0, callbacks=[Sees()])
    assert seen == [50, 75, 100] * 2


def test_a_callback_may_monitor_what_is_logged(pair, digits):
    class Monitors(kt.callbacks.Callback):
        monitor = "d_loss"

    trained(Pair, pair, digits[0], callbacks=[Monitors()])


def test_batches_by_hand_are_steps_of_the_override(pair, digits):
    x = digits[0][:32]
    model, net = Pair(copy.deepcopy(pair), backend="cpu").compile({"g": "sgd", "d": "sgd"}, lr=RATE), pair
    torch.manual_seed(5)
    logs = model.train_on_batch(x, return_dict=True)
    torch.manual_seed(5)
    noise = torch.randn(len(x), 4)
    expected = {}
    for name in "dg":
        net.zero_grad()
        loss = LOSSES[name](net, x, noise)
        loss.backward()
        torch.optim.SGD(net[name].parameters(), RATE, fused=True).step()
        expected[f"{name}_loss"] = pytest.approx(loss.item(), rel=1e-6)
    assert reference.same_weights(model.module, net)
    assert logs == expected
    torch.manual_seed(5)
    assert isinstance(model.train_on_batch(x), list)


def test_batches_by_hand_have_the_overridden_loss(regressor, diabetes):
    x, y = diabetes

    class Doubled(kt.Model):
        def compute_loss(self, batch):
            return 2 * super().compute_loss(batch)

    before = reference.mean_loss(regressor, x, y, F.mse_loss)
    model = Doubled(regressor, backend="cpu").compile("sgd", "mse")
    assert model.test_on_batch(x, y) == pytest.approx(2 * before)
    assert model.train_on_batch(x, y) == pytest.approx(2 * before)
    assert model.test_on_batch(x, y) < 2 * before


@pytest.mark.parametrize(("logged", "expected"), [({}, []), ({"only": 3.0}, 3.0), ({"loss": 1, "more": 2}, [1, 2])])
def test_train_on_batch_returns_what_the_override_logged(regressor, diabetes, logged, expected):
    class Logs(kt.Model):
        def train_step(self, batch):
            self.backward(F.mse_loss(self.module(batch[0]), batch[1]))
            self.optimizer_step()
            return logged

    model = Logs(regressor, backend="cpu").compile("sgd")
    assert model.train_on_batch(*diabetes) == expected
    assert model.train_on_batch(*diabetes, return_dict=True) == logged


def test_weights_of_samples_come_as_the_third_of_a_batch(classifier, digits):
    seen = []

    class Sees(kt.Model):
        def train_step(self, batch):
            seen.append(batch[2:])
            super().train_step(batch)

    model = Sees(classifier, backend="cpu").compile("sgd", "cross_entropy")
    x, y = digits[0][:8], digits[1][:8]
    model.fit(x, y, verbose=0)
    model.fit(x, y, verbose=0, shuffle=False, sample_weight=torch.arange(8.0))
    model.fit(x, y, verbose=0, shuffle=False, class_weight={0: 2.0, 1: 1.0, **dict.fromkeys(range(2, 10), 0.5)})
    expected = torch.full((8,), 0.5)
    expected[y == 0], expected[y == 1] = 2.0, 1.0
    assert seen[0] == ()
    assert torch.equal(seen[1][0], torch.arange(8.0))
    assert torch.equal(seen[2][0], expected)


# Mistakes.


def fit_with(net, x, y, train_step, optimizer="sgd", **options):
    kind = type("Mistaken", (kt.Model,), {"train_step": train_step})
    return kind(net, backend="cpu").compile(optimizer, "mse", **options).fit(x, y, verbose=0)


def loss_of(model, batch):
    return F.mse_loss(model.module(batch[0]), batch[1])


def test_several_optimizers_need_a_train_step(pair):
    with pytest.raises(ValueError, match=r"nothing says which loss is whose. Override train_step\(self, batch\)"):
        kt.Model(pair, backend="cpu").compile({"g": "sgd", "d": "sgd"}, "mse")
    with pytest.raises(ValueError, match="optimizer is an empty dict. Give an optimizer for each submodule"):
        Pair(pair, backend="cpu").compile({})


def test_an_optimizer_needs_a_submodule_of_its_name(pair):
    with pytest.raises(ValueError, match="optimizer='gg' is the name or pattern of no parameter. Did you mean 'g'?"):
        Pair(pair, backend="cpu").compile({"gg": "sgd", "d": "sgd"})
    with pytest.raises(ValueError, match="optimizer='g.1' is the name or pattern of no parameter. What it fits has"):
        Pair(pair, backend="cpu").compile({"g.1": "sgd", "d": "sgd"})


def test_no_parameter_is_for_two_optimizers(pair):
    with pytest.raises(ValueError, match="'g' and 'g.0' share 2 parameters"):
        Pair(pair, backend="cpu").compile({"g": "sgd", "g.0": "sgd", "d": "sgd"})


def test_rates_and_schedules_are_for_optimizers_that_are_there(pair):
    with pytest.raises(ValueError, match="schedule has 'e', which names no optimizer; they are 'g', 'd'"):
        Pair(pair, backend="cpu").compile({"g": "sgd", "d": "sgd"}, schedule={"e": "cosine"})
    with pytest.raises(ValueError, match="lr has the pattern 'e', which fits no parameter"):
        Pair(pair, backend="cpu").compile({"g": "sgd", "d": "sgd"}, lr={"e": 0.1})


def test_a_step_names_an_optimizer_that_is_there(pair, regressor, diabetes):
    class Wrong(Pair):
        name = "e"

        def train_step(self, batch):
            self.backward(d_loss(self.module, batch[0], torch.ones(len(batch[0]), 4)))
            self.optimizer_step(self.name)

    model = Wrong(pair, backend="cpu").compile({"g": "sgd", "d": "sgd"})
    before = copy.deepcopy(pair)
    for name in ("e", None):
        model.name = name
        with pytest.raises(ValueError, match=f"given {name!r}, but the optimizers are 'g', 'd'. Name one of them"):
            model.fit(torch.rand(8, 64), verbose=0)
    assert reference.same_weights(pair, before)

    def train_step(self, batch):
        self.backward(loss_of(self, batch))
        self.optimizer_step("g")

    with pytest.raises(ValueError, match=r"given 'g', but compile was given one optimizer.*self.optimizer_step\(\)"):
        fit_with(regressor, *diabetes, train_step)


def test_steps_are_taken_in_train_step_alone(regressor, diabetes):
    class Own(kt.Model):
        def train_step(self, batch):
            super().train_step(batch)

    for kind in (kt.Model, Own):
        model = kind(regressor, backend="cpu").compile("sgd", "mse")
        model.fit(*diabetes, verbose=0)
        with pytest.raises(RuntimeError, match="backward was called outside of train_step. Override train_step"):
            model.backward(torch.ones((), requires_grad=True))
        with pytest.raises(RuntimeError, match="optimizer_step was called outside of train_step."):
            model.optimizer_step()
        with pytest.raises(RuntimeError, match=r"log\('a'\) was called outside of a step. Call it in train_step or"):
            model.log("a", 1.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: loss.detach(), "backward was given a loss without a gradient, expected a scalar tensor"),
        (lambda loss: loss.item(), r"backward was given \d.*, a float, expected a scalar tensor computed from"),
        (lambda loss: loss.expand(3), r"backward was given a tensor of shape \(3,\), expected a scalar tensor"),
    ],
)
def test_backward_takes_a_scalar_with_a_gradient(regressor, diabetes, spoil, message):
    def train_step(self, batch):
        self.backward(spoil(loss_of(self, batch)))
        self.optimizer_step()

    before = copy.deepcopy(regressor)
    with pytest.raises(ValueError, match=message):
        fit_with(regressor, *diabetes, train_step)
    assert reference.same_weights(regressor, before)


def test_a_loss_without_a_gradient_is_refused_without_overrides_too(regressor, diabetes):
    with pytest.raises(ValueError, match="the loss has no gradient: .* Leave out what cuts the graph"):
        kt.Model(regressor, backend="cpu").compile("sgd", lambda out, y: F.mse_loss(out.detach(), y)).fit(
            *diabetes, verbose=0
        )


@pytest.mark.parametrize("returned", [torch.ones(()), 3.0, ("loss", 1.0)])
def test_train_step_returns_a_dict_or_nothing(regressor, diabetes, returned):
    def train_step(self, batch):
        self.backward(loss_of(self, batch))
        self.optimizer_step()
        return returned

    with pytest.raises(TypeError, match=r"train_step returned a \w+, expected None or a dict of values to log"):
        fit_with(regressor, *diabetes, train_step)


@pytest.mark.parametrize("value", [torch.ones(3), "high", None])
def test_what_is_logged_is_a_number(regressor, diabetes, value):
    class Logs(kt.Model):
        def compute_loss(self, batch):
            self.log("name", value)
            return super().compute_loss(batch)

    model = Logs(regressor, backend="cpu").compile("sgd", "mse")
    before = copy.deepcopy(regressor)
    with pytest.raises(TypeError, match="log was given .* as 'name', expected a number or a scalar"):
        model.fit(*diabetes, verbose=0)
    assert reference.same_weights(regressor, before)

    def train_step(self, batch):
        self.backward(loss_of(self, batch))
        self.optimizer_step()
        return {"name": value}

    with pytest.raises(TypeError, match="log was given .* as 'name', expected a number or a scalar"):
        fit_with(regressor, *diabetes, train_step)


def test_a_train_step_that_never_steps_warns_once(regressor, diabetes):
    def train_step(self, batch):
        self.backward(loss_of(self, batch))

    before = copy.deepcopy(regressor)
    with pytest.warns(UserWarning) as caught:
        fit_with(regressor, *diabetes, train_step)
    assert [str(one.message) for one in caught] == [
        "train_step did not call self.optimizer_step in the first epoch (5 batches): no optimizer has stepped. Call it "
        "after self.backward(loss)."
    ]
    assert caught[0].filename == __file__
    assert reference.same_weights(regressor, before)


@pytest.mark.parametrize("accumulate", [1, 7])
def test_a_train_step_that_steps_does_not_warn(pair, digits, accumulate):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(Pair, pair, digits[0], accumulate=accumulate)


@pytest.mark.parametrize("name", ["train_step", "compute_loss"])
def test_overrides_go_with_neither_jit_nor_tbptt(regressor, name):
    model = type("Own", (kt.Model,), {name: lambda self, batch: None})(regressor, backend="cpu")
    with pytest.raises(ValueError, match=f"jit=True compiles the module .*, but {name} is overridden. Call"):
        model.compile("sgd", "mse", jit=True)
    with pytest.raises(ValueError, match=f"tbptt_steps=4 cuts sequences .*, but {name} is overridden. Cut them"):
        model.compile("sgd", "mse", tbptt_steps=4)


def test_a_train_step_goes_with_no_microbatch(pair, digits):
    model = Pair(pair, backend="cpu").compile({"g": "sgd", "d": "sgd"})
    with pytest.raises(ValueError, match="microbatch=4 cannot cut a batch that your own train_step works on"):
        model.fit(digits[0], microbatch=4, verbose=0)


def test_lbfgs_goes_with_no_train_step(regressor, diabetes):
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times a step, which does not go with a tra"):
        Asks(regressor, backend="cpu").compile("lbfgs", "mse").fit(*diabetes, verbose=0)
