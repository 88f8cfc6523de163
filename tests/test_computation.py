"""From a batch to its loss: a module that computes its own, and a `compute_loss` of the user's."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kerastorch as kt
from kerastorch import seeding
from tests import reference

RATE = 0.1


# A module with a loss of its own.


class Classifier(nn.Module):
    """Returns its loss in one of the forms in which modules do."""

    def __init__(self, form):
        super().__init__()
        self.form, self.head = form, nn.Linear(64, 10)

    def forward(self, x, labels):
        logits = self.head(x)
        loss, size = F.cross_entropy(logits, labels), logits.square().mean()
        return {
            "scalar": loss,
            "dict": {"loss": loss, "logits": logits, "size": size},
            "object": SimpleNamespace(loss=loss, logits=logits, size=size),
            "tuple": (logits, loss),
        }[self.form]


FORMS = ["scalar", "dict", "object", "tuple"]


def by_hand(head, x, y, epochs=2):
    """A copy of `head`, trained, and the means of loss and size over each epoch's samples."""
    head, history = copy.deepcopy(head), {"loss": [], "size": []}
    optimizer = torch.optim.SGD(head.parameters(), RATE, fused=True)
    for epoch in range(epochs):
        sums = dict.fromkeys(history, 0.0)
        for x_batch, y_batch in reference.cut(x, y, 32, seeding.epoch_order(len(x), epoch)):
            optimizer.zero_grad()
            logits = head(x_batch)
            loss = F.cross_entropy(logits, y_batch)
            loss.backward()
            optimizer.step()
            for name, value in (("loss", loss), ("size", logits.square().mean())):
                sums[name] += value.item() * len(x_batch)
        for name, total in sums.items():
            history[name].append(pytest.approx(total / len(x), rel=1e-5))
    return head, history


def data_in(how, x, y):
    """Inputs and target in one of the ways in which a module with its own loss may get them."""
    return {
        "target": (x, y),
        "by name": ({"x": x, "labels": y}, None),
        "tuple": ((x, y), None),
        "target behind a tuple": ((x,), y),
    }[how]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["target", "by name", "target behind a tuple"])
def test_a_module_with_its_own_loss_trains_as_by_hand(digits, form, how):
    x, y = digits
    net = Classifier(form)
    expected, history = by_hand(net.head, x, y)
    data = data_in(how, x, y)
    model = kt.Model(net, backend="cpu").compile("sgd", lr=RATE)
    ours = model.fit(*data, epochs=2, validation_data=data, verbose=0).history
    assert reference.same_weights(net.head, expected)
    if form != "dict":  # of an object nothing is known but its loss
        history.pop("size")
    assert {name: ours[name] for name in history} == history
    assert set(ours) == {prefix + name for prefix in ("", "val_") for name in history}
    with torch.no_grad():
        loss = F.cross_entropy(expected(x), y).item()
    assert ours["val_loss"][-1] == pytest.approx(loss, rel=1e-5)
    assert model.evaluate(*data, return_dict=True, verbose=0)["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["target", "by name"])
@pytest.mark.parametrize("name", ["compute_loss", "train_step"])
def test_overrides_ask_for_the_modules_own_loss(digits, form, how, name):
    x, y = digits

    class ComputeLoss(kt.Model):
        def compute_loss(self, batch):
            loss = super().compute_loss(batch)
            self.log("seen", loss)
            return loss

    class TrainStep(kt.Model):
        def train_step(self, batch):
            super().train_step(batch)

    net, data = Classifier(form), data_in(how, x, y)
    kind = {"compute_loss": ComputeLoss, "train_step": TrainStep}[name]
    nets, histories = [net, copy.deepcopy(net)], []
    for one, module in zip((kt.Model, kind), nets, strict=True):
        model = one(module, backend="cpu").compile("sgd", lr=RATE)
        histories.append(model.fit(*data, epochs=2, validation_data=data, verbose=0).history)
    assert reference.same_weights(*nets)
    plain, own = histories
    assert own.pop("seen", plain["loss"]) == pytest.approx(plain["loss"])
    own.pop("val_seen", None)
    assert own == {key: pytest.approx(values) for key, values in plain.items()}


# Tokens, of which some are masked.


class Tokens(nn.Module):
    """A loss for each token."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, tokens, labels):
        logits = self.head(self.embed(tokens))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def ForCausalLMLoss(logits, labels):  # told by its name
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Causal(Tokens):
    """As Transformers' causal language models: each token is predicted from the one before."""

    @property
    def loss_function(self):
        return ForCausalLMLoss

    def forward(self, tokens, labels):
        logits = self.head(self.embed(tokens))
        return {"loss": self.loss_function(logits, labels), "logits": logits}


class Unshifted(Causal):
    """As Transformers' BART: the function is there, but is not called."""

    loss_type = "ForCausalLM"

    def forward(self, tokens, labels):
        return Tokens.forward(self, tokens, labels)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Causal()

    def forward(self, tokens, labels):
        return self.inner(tokens, labels)


@pytest.fixture
def tokens():
    """45 sentences of 7 tokens, of which each has another share masked, the last 3 all but one of theirs."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 12, (45, 7), generator=generator)
    masked = torch.rand(45, 7, generator=generator) < torch.linspace(0, 0.9, 45)[:, None]
    masked[-3:] = True
    masked[-3:, 3] = False
    return tokens, torch.where(masked, -100, (tokens * 5 + 1) % 12)


class AsksSuper(kt.Model):
    def compute_loss(self, batch):
        return super().compute_loss(batch)


@pytest.mark.parametrize("net_of", [Tokens, Causal, Unshifted, Wrapped])
@pytest.mark.parametrize("kind", [kt.Model, AsksSuper])
@pytest.mark.parametrize("how", ["target", "by name"])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_accumulated_tokens_count_as_in_the_large_batch(tokens, net_of, kind, how, batch_size):
    x, y = tokens
    data = (x, y) if how == "target" else ({"tokens": x, "labels": y}, None)
    net = net_of().double()
    nets, histories = [net, copy.deepcopy(net)], []
    for module, size, accumulate in zip(nets, (batch_size * 4, batch_size), (1, 4), strict=True):
        model = kind(module, backend="cpu").compile("sgd", lr=1.0)
        options = {"batch_size": size, "accumulate": accumulate, "shuffle": False, "verbose": 0}
        histories.append(model.fit(*data, epochs=2, **options).history["loss"])
    for ours, theirs in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    if batch_size * 4 >= len(x):  # the large batch is the whole epoch: no step within it
        assert histories[1] == pytest.approx(histories[0])


@pytest.mark.parametrize("net_of", [Tokens, Causal, Unshifted, Wrapped])
@pytest.mark.parametrize("kind", [kt.Model, AsksSuper])
@pytest.mark.parametrize("how", ["target", "by name"])
def test_the_loss_of_an_epoch_is_the_mean_over_its_tokens(tokens, net_of, kind, how):
    x, y = tokens
    data = (x, y) if how == "target" else ({"tokens": x, "labels": y}, None)
    net = net_of()
    whole = pytest.approx(net(x, y)["loss"].item(), rel=1e-6)
    model = kind(net, backend="cpu").compile("sgd", lr=0.0)
    assert model.evaluate(*data, batch_size=4, verbose=0) == whole  # before any training, too
    history = model.fit(*data, batch_size=8, validation_data=data, verbose=0).history
    assert history == {"loss": [whole], "val_loss": [whole]}


def test_a_batch_without_a_token_counts_for_nothing(tokens):
    x, y = (part.clone() for part in tokens)
    y[8:16] = -100
    net = Tokens().double()
    small, large = net, copy.deepcopy(net)
    for module, size, accumulate in ((small, 8, 6), (large, 45, 1)):
        model = kt.Model(module, backend="cpu").compile("sgd", lr=1.0)
        loss = model.fit(x, y, batch_size=size, accumulate=accumulate, shuffle=False, verbose=0).history["loss"]
        assert loss == [pytest.approx(Tokens.forward(large, x, y)["loss"].item(), rel=1e-6)] or module is large
    for ours, theirs in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("output", "described"),
    [
        (lambda logits, loss: logits, r"a tensor of shape \(8, 10\)"),
        (lambda logits, loss: {"logits": logits}, "a dict"),
        (lambda logits, loss: (logits, loss, loss), "a tuple"),
        (lambda logits, loss: SimpleNamespace(loss=3.0), "a SimpleNamespace"),
    ],
)
def test_a_module_without_a_loss_is_refused_with_a_remedy(digits, output, described):
    class Net(Classifier):
        def forward(self, x, labels):
            logits = self.head(x)
            return output(logits, F.cross_entropy(logits, labels))

    model = kt.Model(Net("none"), backend="cpu").compile("sgd")
    expected = "loss=None means that the module returns its own loss, but it returned " + described
    with pytest.raises(ValueError, match=f"{expected}.*give compile a loss, or override compute_loss"):
        model.fit(digits[0][:8], digits[1][:8], verbose=0)


def test_only_the_module_can_weigh_its_own_loss(digits):
    x, y = digits
    model = kt.Model(Classifier("scalar"), backend="cpu").compile("sgd")
    for weights in ({"sample_weight": torch.ones(len(x))}, {"class_weight": {0: 2.0}}):
        with pytest.raises(ValueError, match="with loss=None the module computes its loss itself. Weigh the samples"):
            model.fit(x, y, verbose=0, **weights)
    with pytest.raises(ValueError, match="metrics were given with loss=None"):
        kt.Model(Classifier("scalar"), backend="cpu").compile("sgd", metrics=["accuracy"])
    with pytest.raises(ValueError, match="loss=None and inputs by name: put the target among them too"):
        model.fit({"x": x}, y, verbose=0)


# A `compute_loss` of the user's own.


class Alone(kt.Model):
    """Asks nobody."""

    def compute_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.module(x), y)


class WithOutput(kt.Model):
    def compute_loss(self, batch):
        x, y = batch
        logits = self.module(x)
        return F.cross_entropy(logits, y), logits


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Alone, {}),
        (Alone, {"loss": "cross_entropy"}),
        (WithOutput, {"loss": "cross_entropy", "metrics": ["accuracy"]}),
    ],
)
def test_a_compute_loss_trains_as_by_hand(digits, kind, options):
    x, y = digits
    net = nn.Linear(64, 10)
    expected, history = by_hand(net, x, y)
    model = kind(net, backend="cpu").compile("sgd", lr=RATE, **options)
    ours = model.fit(x, y, epochs=2, validation_data=(x, y), verbose=0).history
    assert reference.same_weights(net, expected)
    assert ours["loss"] == history["loss"]
    with torch.no_grad():
        logits = expected(x)
    assert ours["val_loss"][-1] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert len(ours) == 2 + 2 * bool(options.get("metrics"))
    if options.get("metrics"):
        assert ours["val_accuracy"][-1] == pytest.approx((logits.argmax(1) == y).double().mean().item())


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_compute_loss_is_accumulated_as_a_mean_over_samples(digits, accumulate):
    x, y = digits[0].double(), digits[1]
    small, large = (nn.Linear(64, 10).double() for _ in range(2))
    large.load_state_dict(small.state_dict())
    for net, size, window in ((small, 16, accumulate), (large, 16 * accumulate, 1)):
        model = Alone(net, backend="cpu").compile("sgd", lr=RATE)
        model.fit(x, y, epochs=2, batch_size=size, accumulate=window, shuffle=False, verbose=0)
    for ours, theirs in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"microbatch": 5}], ids=str)
def test_a_term_beside_a_masked_loss_leaves_it_a_mean_over_targets(digits, options):
    """The penalty is the same for all batches of a window, so that the large batch has it once."""
    x, y = digits[0].double(), digits[1].clone()
    y[:40:2] = -100

    class Regularized(kt.Model):
        def compute_loss(self, batch):
            penalty = self.module.weight.square().sum()
            self.log("penalty", penalty)
            return super().compute_loss(batch) + 0.01 * penalty

    small, large = (nn.Linear(64, 10).double() for _ in range(2))
    large.load_state_dict(small.state_dict())
    histories = []
    for net, more in ((small, options), (large, {})):
        model = Regularized(net, backend="cpu").compile("sgd", "cross_entropy", lr=RATE)
        size = 16 if "accumulate" in more else 64
        histories.append(model.fit(x, y, epochs=1, batch_size=size, shuffle=False, verbose=0, **more).history)
    for ours, theirs in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert histories[0] == {name: pytest.approx(values, rel=1e-6) for name, values in histories[1].items()}


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.digit, self.size = nn.Linear(64, 10), nn.Linear(64, 1)

    def forward(self, x):
        return {"digit": self.digit(x), "size": self.size(x)}


@pytest.mark.parametrize("asks", [True, False])
def test_a_compute_loss_over_several_outputs_is_the_loss_that_is_logged(digits, asks):
    x, y = digits
    targets = {"digit": y, "size": x.sum(1, keepdim=True)}

    class More(kt.Model):
        def compute_loss(self, batch):
            if asks:
                return super().compute_loss(batch) + 100
            return F.cross_entropy(self.module(batch[0])["digit"], batch[1]["digit"]) + 100

    net = Heads()
    with torch.no_grad():
        digit = F.cross_entropy(net(x)["digit"], y).item()
        size = F.mse_loss(net(x)["size"], targets["size"]).item()
    model = More(net, backend="cpu").compile("sgd", {"digit": "cross_entropy", "size": ("mse", 0.5)}, lr=0.0)
    expected = {"loss": digit + size / 2 + 100, "digit_loss": digit, "size_loss": size} if asks else {}
    expected = {name: [pytest.approx(value, rel=1e-5)] for name, value in (expected or {"loss": digit + 100}).items()}
    assert model.fit(x, targets, verbose=0).history == expected


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"microbatch": 5}], ids=str)
def test_a_term_beside_several_outputs_is_in_the_gradient_once(digits, options):
    """One output is a mean over targets of which some are masked, the other one over the samples."""
    x, y = digits[0].double(), digits[1].clone()
    y[:40:2] = -100
    targets = {"digit": y, "size": x.sum(1, keepdim=True)}

    class Regularized(kt.Model):
        def compute_loss(self, batch):
            return super().compute_loss(batch) + 0.1 * self.module.size.weight.square().sum()

    losses = {"digit": "cross_entropy", "size": ("mse", 0.5)}
    small = Heads().double()
    large = copy.deepcopy(small)
    for net, more in ((small, options), (large, {})):
        model = Regularized(net, backend="cpu").compile("sgd", losses, lr=0.01)
        size = 16 if "accumulate" in more else 64
        model.fit(x, targets, batch_size=size, shuffle=False, verbose=0, **more)
    for ours, theirs in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_compute_loss_runs_in_the_precision_compiled(digits):
    x, y = digits
    dtypes = []

    class Sees(kt.Model):
        def compute_loss(self, batch):
            logits = self.module(batch[0])
            dtypes.append(logits.dtype)
            return F.cross_entropy(logits, batch[1])

    net = nn.Linear(64, 10)
    expected = copy.deepcopy(net)
    Sees(net, backend="cpu").compile("sgd", lr=RATE, precision="bf16").fit(x, y, batch_size=150, verbose=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(expected(x[order := seeding.epoch_order(150, 0)]), y[order])
    loss.backward()
    torch.optim.SGD(expected.parameters(), RATE, fused=True).step()
    assert reference.same_weights(net, expected)
    assert dtypes == [torch.bfloat16]


def test_an_evaluation_hands_compute_loss_the_batches_that_were_asked_for(digits):
    """A loss of its own may compare the samples of a batch with each other."""
    sizes = []

    class Sees(kt.Model):
        def compute_loss(self, batch):
            sizes.append(len(batch[0]))
            return super().compute_loss(batch)

    model = Sees(nn.Linear(64, 10), backend="cpu").compile("sgd", "cross_entropy")
    model.evaluate(*digits, verbose=0)
    assert sizes == [32, 32, 32, 32, 22]


def test_lbfgs_evaluates_an_overridden_loss(regressor, diabetes):
    class Doubled(kt.Model):
        def compute_loss(self, batch):
            return 2 * super().compute_loss(batch)

    x, y = diabetes
    twin = copy.deepcopy(regressor)
    Doubled(regressor, backend="cpu").compile("lbfgs", "mse").fit(x, y, batch_size=150, shuffle=False, verbose=0)
    kt.Model(twin, backend="cpu").compile("lbfgs", lambda out, y: 2 * F.mse_loss(out, y)).fit(
        x, y, batch_size=150, shuffle=False, verbose=0
    )
    assert reference.same_weights(regressor, twin)


def test_nothing_of_a_batch_is_kept_after_a_run(regressor, diabetes):
    class Own(kt.Model):
        def train_step(self, batch):
            self.backward(super().compute_loss(batch))
            self.optimizer_step()

    model = Own(regressor, backend="cpu").compile("sgd", "mse")
    model.fit(*diabetes, verbose=0)
    copy.deepcopy(model)  # which fails on what is part of a graph


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda losses: losses, r"compute_loss returned a loss of shape \(8,\), expected a scalar tensor"),
        (lambda losses: losses.mean().item(), "compute_loss returned a loss of type float, expected a scalar tensor"),
        (lambda losses: None, "compute_loss returned a loss of type NoneType, expected a scalar tensor"),
    ],
)
def test_a_compute_loss_returns_a_scalar(digits, returned, message):
    class Wrong(kt.Model):
        def compute_loss(self, batch):
            return returned(F.cross_entropy(self.module(batch[0]), batch[1], reduction="none"))

    with pytest.raises(TypeError, match=message):
        Wrong(nn.Linear(64, 10), backend="cpu").compile("sgd").fit(digits[0][:8], digits[1][:8], verbose=0)


def test_metrics_need_an_output(digits):
    model = Alone(nn.Linear(64, 10), backend="cpu").compile("sgd", "cross_entropy", metrics=["accuracy"])
    with pytest.raises(ValueError, match=r"compute_loss returned no output to measure. Return \(loss, output\), or"):
        model.fit(*digits, verbose=0)
