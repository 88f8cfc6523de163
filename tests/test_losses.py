"""Losses: the number of each name, what it is the mean of, which shapes belong together, and what is refused."""

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kerastorch as kt

SAMPLES, CLASSES = 12, 4


class Echo(nn.Module):
    """Several outputs that are its inputs: a dict for named ones, else a tuple."""

    def forward(self, *outputs: Tensor, **named: Tensor) -> dict | tuple:
        return named or outputs


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.size = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"kind": self.kind(x), "size": self.size(x)}


def measured(output, target, loss, module=None, **options) -> dict:
    """Loss and metrics that evaluation finds for outputs that are known."""
    model = kt.Model(nn.Identity() if module is None else module, backend="cpu").compile(loss=loss)
    return model.evaluate(output, target, return_dict=True, verbose=0, **options)


def loss_of(output, target, loss, **options) -> float:
    return measured(output, target, loss, **options)["loss"]


def close(value) -> object:
    return pytest.approx(torch.as_tensor(value).item(), rel=1e-5)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(SAMPLES, CLASSES)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(SAMPLES) % CLASSES


# Names.


def samples_of(kind: str) -> tuple[Tensor, Tensor]:
    scores, values = torch.randn(SAMPLES, CLASSES), torch.randn(SAMPLES, CLASSES)
    return {
        "classes": lambda: (scores, torch.arange(SAMPLES) % CLASSES),
        "log classes": lambda: (scores.log_softmax(1), torch.arange(SAMPLES) % CLASSES),
        "values": lambda: (scores, 3.0 * values),
        "counts": lambda: (scores.exp(), values.exp().round()),
        "bits": lambda: (scores, (values > 0).float()),
        "probable bits": lambda: (scores.sigmoid(), (values > 0).float()),
        "signs": lambda: (scores, values.sign()),
        "log shares": lambda: (scores.log_softmax(1), values.softmax(1)),
        "shares": lambda: (scores, values.softmax(1)),
        "several labels": lambda: (scores, torch.tensor([[2, 0, -1, -1]]).repeat(SAMPLES, 1)),
    }[kind]()


TORCH_NAMES = [
    ("cross_entropy CrossEntropyLoss CROSS_ENTROPY cross-entropy crossentropy", F.cross_entropy, "classes"),
    ("sparse_categorical_crossentropy categorical_crossentropy", F.cross_entropy, "classes"),
    ("nll nll_loss NLLLoss", F.nll_loss, "log classes"),
    ("multi_margin MultiMarginLoss multi_margin_loss", F.multi_margin_loss, "classes"),
    ("mse MSE mse_loss MSELoss mean_squared_error", F.mse_loss, "values"),
    ("l1 L1Loss l1_loss mae MAE mean_absolute_error", F.l1_loss, "values"),
    ("smooth_l1 smooth_l1_loss SmoothL1Loss", F.smooth_l1_loss, "values"),
    ("huber huber_loss HuberLoss", F.huber_loss, "values"),
    ("bce_with_logits BCE_with_logits BCEWithLogitsLoss", F.binary_cross_entropy_with_logits, "bits"),
    ("binary_crossentropy binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, "bits"),
    ("bce BCELoss binary_cross_entropy", F.binary_cross_entropy, "probable bits"),
    ("poisson_nll poisson_nll_loss PoissonNLLLoss", F.poisson_nll_loss, "counts"),
    ("kl_div KLDivLoss", F.kl_div, "log shares"),
    ("soft_margin soft_margin_loss SoftMarginLoss", F.soft_margin_loss, "signs"),
    ("hinge_embedding hinge_embedding_loss HingeEmbeddingLoss", F.hinge_embedding_loss, "signs"),
    ("multilabel_soft_margin MultiLabelSoftMarginLoss", F.multilabel_soft_margin_loss, "bits"),
    ("multilabel_margin MultiLabelMarginLoss", F.multilabel_margin_loss, "several labels"),
]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's, on kl_div
@pytest.mark.parametrize(
    ("name", "function", "kind"),
    [(name, function, kind) for names, function, kind in TORCH_NAMES for name in names.split()],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_name_means_the_torch_function(name, function, kind) -> None:
    output, target = samples_of(kind)
    assert loss_of(output, target, name) == close(function(output, target))


KERAS_FORMULAS = [
    ("kl_divergence kld", "shares", lambda p, y: (y * (y.log() - p.log_softmax(1))).sum(1).mean()),
    ("poisson", "counts", lambda p, y: (p - y * (p + 1e-7).log()).mean()),
    ("log_cosh logcosh LogCosh", "values", lambda p, y: (p - y).cosh().log().mean()),
    ("hinge", "signs", lambda p, y: (1 - y * p).clamp_min(0).mean()),
    ("hinge", "bits", lambda p, y: (1 - (2 * y - 1) * p).clamp_min(0).mean()),
    ("squared_hinge", "signs", lambda p, y: (1 - y * p).clamp_min(0).square().mean()),
    ("mape mean_absolute_percentage_error", "values", lambda p, y: 100 * ((y - p) / y).abs().mean()),
    ("msle", "counts", lambda p, y: ((p + 1).log() - (y.clamp_min(1e-7) + 1).log()).square().mean()),
    ("cosine_similarity", "values", lambda p, y: -(F.normalize(p, dim=1) * F.normalize(y, dim=1)).sum(1).mean()),
]


@pytest.mark.parametrize(
    ("name", "kind", "formula"),
    [(name, kind, formula) for names, kind, formula in KERAS_FORMULAS for name in names.split()],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_keras_name_means_kerass_formula(name, kind, formula) -> None:
    output, target = samples_of(kind)
    assert loss_of(output, target, name) == close(formula(output, target))


def test_log_cosh_of_a_large_error_is_finite() -> None:
    assert loss_of(torch.full((2, 1), 500.0), torch.zeros(2, 1), "log_cosh") == close(500 - 0.69314718)


@pytest.mark.parametrize(("given", "meant"), [("cros_entropy", "cross_entropy"), ("hubr", "huber"), ("msee", "mse")])
def test_wrong_name_lists_close_ones(given, meant) -> None:
    with pytest.raises(ValueError, match=f"loss='{given}' is not a loss. Did you mean .*'{meant}'"):
        kt.Model(nn.Linear(1, 1), backend="cpu").compile(loss=given)


def test_name_close_to_nothing_lists_known_ones() -> None:
    with pytest.raises(ValueError, match="Known are cross_entropy, nll"):
        kt.Model(nn.Linear(1, 1), backend="cpu").compile(loss="zzzzzzzz")


def test_class_instead_of_instance_is_refused() -> None:
    with pytest.raises(TypeError, match=r"MSELoss is a class, expected an instance. Give MSELoss\(\)"):
        kt.Model(nn.Linear(1, 1), backend="cpu").compile(loss=nn.MSELoss)


@pytest.mark.parametrize("loss", [3, ("mse", 0.5)])
def test_what_is_no_loss_is_refused(loss) -> None:
    with pytest.raises(TypeError, match="expected a name, an nn.Module, a callable"):
        kt.Model(nn.Linear(1, 1), backend="cpu").compile(loss=loss)


# Modules and callables.


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 4.0])),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.MultiMarginLoss(margin=0.5),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
    ids=["weight", "label_smoothing", "ignore_index", "margin", "sum"],
)
def test_module_keeps_its_options(loss, logits, labels) -> None:
    assert loss_of(logits, labels, loss) == close(loss(logits, labels))


def test_value_module_keeps_its_options(logits) -> None:
    target, loss = torch.randn_like(logits), nn.HuberLoss(delta=0.3)
    assert loss_of(logits, target, loss) == close(loss(logits, target))


def test_positive_weight_of_bce_is_kept(logits) -> None:
    target, loss = (torch.randn_like(logits) > 0).float(), nn.BCEWithLogitsLoss(pos_weight=torch.full((CLASSES,), 3.0))
    assert loss_of(logits, target, loss) == close(loss(logits, target))


def test_callable_may_return_a_scalar_or_a_loss_for_each_sample(logits) -> None:
    target = torch.randn_like(logits)
    expected = (logits - target).abs().pow(3).mean()
    assert loss_of(logits, target, lambda o, t: (o - t).abs().pow(3).mean()) == close(expected)
    assert loss_of(logits, target, lambda o, t: (o - t).abs().pow(3).mean(1)) == close(expected)
    assert loss_of(logits, target, lambda o, t: (o - t).abs().pow(3)) == close(expected)


def test_torch_function_given_as_it_is_gets_the_checks_of_its_name(logits) -> None:
    with pytest.raises(ValueError, match="class indices of shape"):
        loss_of(logits, torch.zeros(SAMPLES, 1, dtype=torch.int64), F.cross_entropy)


def test_callable_may_take_targets_of_any_structure(logits) -> None:
    """Several batches, so that batches that cannot be joined are never joined."""
    low, high = torch.randn(2, SAMPLES, CLASSES)
    assert loss_of(logits, (low, high), lambda o, t: (o - t[0]).abs() + (o - t[1]).abs(), batch_size=4) == close(
        ((logits - low).abs() + (logits - high).abs()).mean()
    )


def test_batches_may_have_targets_of_different_widths(logits) -> None:
    batches = [(logits[:4], torch.ones(4, 2)), (logits[4:8], torch.ones(4, 5)), (logits[8:], torch.ones(4, 5))]
    loss = (
        kt.Model(nn.Identity(), backend="cpu")
        .compile(loss=lambda o, t: o.mean() * t.shape[1])
        .evaluate(batches, verbose=0)
    )
    assert loss == close((logits[:4].sum() * 2 + logits[4:].sum() * 5) / logits.numel())


def test_module_may_return_one_number_for_a_batch(logits) -> None:
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    found = measured(logits, logits + 1, lambda o, t: (o - t.mean()).abs(), module=Mean(), batch_size=4)
    assert found["loss"] == close(1.0)


def test_integer_and_bool_targets_are_values_for_mse_and_bce(logits) -> None:
    bits = logits.flip(0) > 0
    for target in (bits, bits.int(), bits.long()):
        assert loss_of(logits, target, "bce_with_logits") == close(
            F.binary_cross_entropy_with_logits(logits, bits.float())
        )
        assert loss_of(logits, target, "mse") == close(F.mse_loss(logits, bits.float()))


def test_whole_floats_are_class_indices(logits, labels) -> None:
    expected = close(F.cross_entropy(logits, labels))
    assert loss_of(logits, labels.float(), "cross_entropy") == expected
    assert loss_of(logits, labels.to(torch.int8), "cross_entropy") == expected


def test_one_hot_and_probability_targets_are_taken_by_cross_entropy(logits, labels) -> None:
    one_hot, shares = F.one_hot(labels, CLASSES), torch.randn_like(logits).softmax(1)
    assert loss_of(logits, one_hot, "cross_entropy") == close(F.cross_entropy(logits, labels))
    assert loss_of(logits, one_hot.double(), "categorical_crossentropy") == close(F.cross_entropy(logits, labels))
    assert loss_of(logits, shares, "cross_entropy", batch_size=5) == close(F.cross_entropy(logits, shares))


# Weights.

WEIGHTED = [
    ("cross_entropy", "classes", lambda o, t: F.cross_entropy(o, t, reduction="none")),
    ("mse", "values", lambda o, t: (o - t).square().mean(1)),
    ("hinge", "bits", lambda o, t: (1 - (2 * t - 1) * o).clamp_min(0).mean(1)),
    ("cosine_similarity", "values", lambda o, t: -F.cosine_similarity(o, t, dim=1)),
    (nn.CrossEntropyLoss(label_smoothing=0.1), "classes", nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")),
    (nn.SmoothL1Loss(beta=0.5), "values", lambda o, t: F.smooth_l1_loss(o, t, beta=0.5, reduction="none").mean(1)),
    (lambda o, t: (o - t).abs().sum(1), "values", lambda o, t: (o - t).abs().sum(1)),
]


@pytest.mark.parametrize(("loss", "kind", "per_sample"), WEIGHTED, ids=lambda part: str(part)[:24])
def test_weighted_loss_is_the_weighted_sum_over_the_number_of_samples(loss, kind, per_sample) -> None:
    output, target = samples_of(kind)
    weight = torch.rand(SAMPLES) * 3
    expected = (weight * per_sample(output, target)).sum() / SAMPLES
    assert loss_of(output, target, loss, sample_weight=weight) == close(expected)
    assert loss_of(output, target, loss, sample_weight=weight[:, None], batch_size=5) == close(expected)


def test_weights_leave_the_users_module_as_it_is(logits, labels) -> None:
    loss = nn.CrossEntropyLoss()
    loss_of(logits, labels, loss, sample_weight=torch.rand(SAMPLES))
    assert loss.reduction == "mean"


def test_tokens_may_have_a_weight_each() -> None:
    output, target, weight = torch.randn(4, 3, 5), torch.randint(3, (4, 5)), torch.rand(4, 5)
    expected = (F.cross_entropy(output, target, reduction="none") * weight).sum() / 20
    assert loss_of(output, target, "cross_entropy", sample_weight=weight) == close(expected)


def test_weights_with_a_loss_that_is_one_number_are_refused(logits) -> None:
    def mean_error(output, target):
        return (output - target).abs().mean()

    with pytest.raises(ValueError, match=r"'mean_error' returned one number. Return a tensor of shape \(12,\)"):
        loss_of(logits, logits + 1, mean_error, sample_weight=torch.ones(SAMPLES))


def test_gradient_is_that_of_the_weighted_loss(labels) -> None:
    net, x, weight = nn.Linear(5, CLASSES), torch.randn(SAMPLES, 5), torch.rand(SAMPLES)
    loss = (F.cross_entropy(net(x), labels, reduction="none") * weight).sum() / SAMPLES
    expected = net.weight.detach() - 0.1 * torch.autograd.grad(loss, net.weight)[0]
    kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", lr=0.1).train_on_batch(x, labels, sample_weight=weight)
    assert torch.allclose(net.weight, expected, atol=1e-6)


def test_class_weight_multiplies_each_sample_of_its_class(labels) -> None:
    net, x = nn.Linear(5, CLASSES), torch.randn(SAMPLES, 5)
    per_sample = F.cross_entropy(net(x), labels, reduction="none")
    expected = torch.where(labels == 1, 3.0, torch.where(labels == 2, 0.0, 1.0)) * per_sample
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", lr=0.0)
    history = model.fit(x, labels, class_weight={1: 3.0, 2: 0.0}, batch_size=5, verbose=0).history
    assert history["loss"] == [close(expected.mean())]


def test_class_weights_of_the_data_multiply_those_of_the_module(labels) -> None:
    """The mean stays torch's weighted one, so that weights of 1 in the data change nothing."""
    net, x, own = nn.Linear(5, CLASSES), torch.randn(SAMPLES, 5), torch.tensor([1.0, 2.0, 0.5, 4.0])
    per_sample = F.cross_entropy(net(x), labels, weight=own, reduction="none")
    expected = (per_sample * torch.where(labels == 1, 3.0, 1.0)).sum() / own[labels].sum()
    model = kt.Model(net, backend="cpu").compile("sgd", nn.CrossEntropyLoss(weight=own), lr=0.0)
    history = model.fit(x, labels, class_weight={1: 3.0}, verbose=0).history
    assert history["loss"] == [close(expected)]


# Masks.


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(reduction="none")], ids=["mean", "none"])
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_loss_is_the_mean_over_targets_that_are_not_ignored(logits, labels, loss, kind) -> None:
    labels[[0, 1, 2, 5]] = -100  # batches of four have 1, 3 and 4 targets left
    expected = close(F.cross_entropy(logits, labels))
    assert loss_of(logits, labels.to(kind), loss) == expected
    assert loss_of(logits, labels.to(kind), loss, batch_size=4) == expected


def test_ignore_index_of_a_module_is_heeded(logits, labels) -> None:
    loss = nn.CrossEntropyLoss(ignore_index=3)
    labels = labels.sort().values
    assert loss_of(logits, labels, loss, batch_size=5) == close(loss(logits, labels))


def test_weighted_loss_is_over_the_number_of_targets_that_are_not_ignored(logits, labels) -> None:
    labels[:5], weight = -100, torch.rand(SAMPLES)
    expected = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / 7
    assert loss_of(logits, labels, "cross_entropy", sample_weight=weight, batch_size=SAMPLES) == close(expected)


@pytest.mark.parametrize("weight", [None, torch.ones(SAMPLES)], ids=["unweighted", "weighted"])
def test_fully_masked_batch_poisons_neither_the_mean_nor_the_weights(labels, weight) -> None:
    net, x = nn.Linear(5, CLASSES), torch.randn(SAMPLES, 5)
    labels[:4] = -100
    expected = F.cross_entropy(net(x), labels)
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", metrics=["accuracy"], lr=0.0)
    history = model.fit(x, labels, sample_weight=weight, batch_size=4, shuffle=False, verbose=0).history
    assert history["loss"] == [close(expected)]
    assert history["accuracy"] == [close((net(x).argmax(1) == labels)[4:].float().mean())]
    model.compile("sgd", "cross_entropy", lr=0.1).fit(x, labels, batch_size=4, verbose=0)
    assert net.weight.isfinite().all()


def test_fully_masked_batch_of_one_output_poisons_no_mean() -> None:
    net, x = TwoHeads(), torch.randn(SAMPLES, 5)
    kinds, sizes = torch.arange(SAMPLES) % 3, torch.randn(SAMPLES, 1)
    kinds[:6] = -100
    output = net(x)
    kind, size = F.cross_entropy(output["kind"], kinds).item(), F.mse_loss(output["size"], sizes).item()
    model = kt.Model(net, backend="cpu").compile("sgd", {"kind": ("cross_entropy", 0.5), "size": "mse"}, lr=0.0)
    history = model.fit(x, {"kind": kinds, "size": sizes}, batch_size=4, shuffle=False, verbose=0).history
    assert history["kind_loss"] == [close(kind)]
    assert history["size_loss"] == [close(size)]
    assert history["loss"] == [close(0.5 * kind + size)]


# Tokens.


@pytest.mark.parametrize("length", [1, 3, 6])
def test_classes_of_tokens_may_come_second_or_last(length) -> None:
    output, target = torch.randn(SAMPLES, CLASSES, length), torch.randint(CLASSES, (SAMPLES, length))
    target[:3] = -100
    expected = close(F.cross_entropy(output, target))
    assert loss_of(output, target, "cross_entropy", batch_size=5) == expected
    assert loss_of(output.movedim(1, -1), target, "cross_entropy", batch_size=5) == expected


def test_as_many_tokens_as_classes_are_read_in_torchs_layout() -> None:
    output, target = torch.randn(5, CLASSES, CLASSES), torch.randint(CLASSES, (5, CLASSES))
    assert loss_of(output, target, "cross_entropy") == close(F.cross_entropy(output, target))


def test_pixels_may_have_their_classes_last() -> None:
    output, target = torch.randn(2, 3, 5, 6), torch.randint(3, (2, 5, 6))
    assert loss_of(output.movedim(1, -1), target, "cross_entropy") == close(F.cross_entropy(output, target))


# Several outputs.


def several() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    outputs = {"kind": torch.randn(SAMPLES, 3), "size": torch.randn(SAMPLES, 1)}
    return outputs, {"kind": torch.arange(SAMPLES) % 3, "size": torch.randn(SAMPLES, 1)}


def test_losses_by_name_are_summed_with_their_weights() -> None:
    outputs, targets = several()
    kind, size = F.cross_entropy(outputs["kind"], targets["kind"]), F.mse_loss(outputs["size"], targets["size"])
    losses = {"kind": "cross_entropy", "size": ("mse", 0.25)}
    found = measured(outputs, targets, losses, module=Echo(), batch_size=5)
    assert found == {"loss": close(kind + 0.25 * size), "kind_loss": close(kind), "size_loss": close(size)}


def test_losses_by_place_are_summed_with_their_weights() -> None:
    outputs, targets = (tuple(tree.values()) for tree in several())
    kind, size = F.cross_entropy(outputs[0], targets[0]), F.mse_loss(outputs[1], targets[1])
    found = measured(outputs, targets, [("cross_entropy", 2), nn.MSELoss()], module=Echo())
    assert found == {"loss": close(2 * kind + size), "output_1_loss": close(kind), "output_2_loss": close(size)}


def test_gradient_of_several_losses_is_that_of_their_weighted_sum() -> None:
    net, x, (_, targets) = TwoHeads(), torch.randn(SAMPLES, 5), several()
    before = net.size.weight.detach().clone()
    gradient = torch.autograd.grad(0.25 * F.mse_loss(net(x)["size"], targets["size"]), net.size.weight)[0]
    model = kt.Model(net, backend="cpu").compile("sgd", {"kind": "cross_entropy", "size": ("mse", 0.25)}, lr=0.1)
    model.train_on_batch(x, targets)
    assert torch.allclose(net.size.weight, before - 0.1 * gradient, atol=1e-6)


def test_outputs_may_have_sample_weights_of_their_own() -> None:
    outputs, targets = several()
    weights = {"kind": torch.rand(SAMPLES), "size": torch.rand(SAMPLES)}
    losses = {"kind": "cross_entropy", "size": "mse"}
    found = measured(outputs, targets, losses, module=Echo(), sample_weight=weights)
    kind = F.cross_entropy(outputs["kind"], targets["kind"], reduction="none")
    size = (outputs["size"] - targets["size"]).square()[:, 0]
    assert found["kind_loss"] == close((kind * weights["kind"]).mean())
    assert found["size_loss"] == close((size * weights["size"]).mean())
    shared = measured(outputs, targets, losses, module=Echo(), sample_weight=weights["kind"])
    assert shared["size_loss"] == close((size * weights["kind"]).mean())


@pytest.mark.parametrize(
    ("tree", "what"), [(0, "outputs"), (1, "targets")], ids=["missing in outputs", "missing in targets"]
)
def test_name_that_only_the_losses_have_is_refused(tree, what) -> None:
    trees = several()
    del trees[tree]["size"]
    with pytest.raises(ValueError, match=rf"the losses name 'size', but the {what} are \['kind'\]"):
        measured(*trees, {"kind": "cross_entropy", "size": "mse"}, module=Echo())


@pytest.mark.parametrize("losses", [["mse"], ["mse", "mse"]])
def test_losses_by_place_never_take_samples_of_a_tensor_for_outputs(losses, logits) -> None:
    with pytest.raises(ValueError, match=r"are a tensor of shape \(12, 4\)"):
        measured(logits, logits + 1, losses)
    with pytest.raises(ValueError, match=r"the losses name 0, but the outputs are a tensor of shape \(12, 4\)"):
        measured(logits, tuple(logits for _ in losses), losses)


@pytest.mark.parametrize("losses", [{}, [], {"a": ("mse",)}, {"a": ("mse", "half")}])
def test_losses_that_are_no_losses_are_refused(losses) -> None:
    with pytest.raises(ValueError, match="has no entries|expected a loss or \\(loss, weight\\)"):
        kt.Model(nn.Linear(1, 1), backend="cpu").compile(loss=losses)


def test_several_outputs_for_one_loss_are_refused() -> None:
    outputs, targets = several()
    with pytest.raises(ValueError, match="returned a dict, but loss='mse' takes one tensor. Give a loss for each"):
        measured(outputs, targets["size"], "mse", module=Echo())


# The module's own loss.


class OwnLoss(nn.Module):
    """Computes the mean square of its output and returns it in some form."""

    def __init__(self, form) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(3, 1), form

    def forward(self, x: Tensor, y: Tensor) -> object:
        output = self.linear(x)
        return self.form(F.mse_loss(output, y), output)


@pytest.mark.parametrize(
    "form",
    [
        lambda loss, output: loss,
        lambda loss, output: {"loss": loss, "logits": output},
        lambda loss, output: SimpleNamespace(loss=loss, logits=output),
    ],
    ids=["scalar", "dict", "object"],
)
def test_loss_of_the_module_itself_is_trained_and_averaged(form) -> None:
    net, x, y = OwnLoss(form), torch.randn(10, 3), torch.randn(10, 1)
    before = F.mse_loss(net.linear(x), y)
    model = kt.Model(net, backend="cpu").compile("sgd", lr=0.0)
    assert model.fit(x, y, batch_size=4, verbose=0).history["loss"] == [close(before)]
    assert model.evaluate(x, y, batch_size=4, verbose=0) == close(before)
    model.compile("sgd", lr=0.1).fit(x, y, epochs=5, verbose=0)
    assert F.mse_loss(net.linear(x), y) < before


@pytest.mark.parametrize(
    ("form", "described"),
    [
        (lambda loss, output: output, r"a tensor of shape \(10, 1\)"),
        (lambda loss, output: {"logits": output}, r"a dict of \['logits'\]"),
        (lambda loss, output: (loss, loss), "a tuple of 2"),
        (lambda loss, output: SimpleNamespace(loss=loss.item()), "a SimpleNamespace"),
    ],
    ids=["output", "dict", "tuple", "float"],
)
def test_module_without_a_loss_of_its_own_is_refused(form, described) -> None:
    model = kt.Model(OwnLoss(form), backend="cpu").compile("sgd")
    with pytest.raises(ValueError, match=f"returned {described}. Return a scalar"):
        model.fit(torch.randn(10, 3), torch.randn(10, 1), verbose=0)


# What is refused.


def refused_by_fit(x: Tensor, y, loss, match: str, net: nn.Module | None = None, **options) -> None:
    """`fit` raises before the first update."""
    net = nn.Linear(x.shape[1], CLASSES) if net is None else net
    before = [parameter.clone() for parameter in net.parameters()]
    model = kt.Model(net, backend="cpu").compile("sgd", loss)
    with pytest.raises(ValueError, match=match):
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0, **options)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_missing_targets_are_refused() -> None:
    refused_by_fit(torch.randn(8, 3), None, "mse", "the data has no targets, but loss='mse' needs them")


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", nn.L1Loss()], ids=str)
def test_values_that_would_broadcast_are_refused(loss) -> None:
    x = torch.randn(8, 3)
    refused_by_fit(
        x, torch.zeros(8), loss, r"output has shape \(4, 1\) but target has shape \(4,\).*y\[:, None\]", nn.Linear(3, 1)
    )
    squeezed = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    refused_by_fit(x, torch.zeros(8, 1), loss, r"shape \(4,\) but target has shape \(4, 1\).*y.squeeze\(-1\)", squeezed)


@pytest.mark.parametrize("loss", ["cross_entropy", "nll", nn.CrossEntropyLoss()], ids=str)
def test_class_targets_in_a_column_are_refused(loss) -> None:
    match = (
        r"output has shape \(4, 4\) but target has shape \(4, 1\).*class indices of shape \(4,\): try target.squeeze"
    )
    refused_by_fit(torch.randn(8, 3), torch.zeros(8, 1, dtype=torch.int64), loss, match)


@pytest.mark.parametrize("target", [torch.zeros(8), torch.zeros(8, dtype=torch.int64)], ids=["float", "int"])
def test_classes_of_an_output_without_classes_are_refused(target) -> None:
    net = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    refused_by_fit(torch.randn(8, 3), target, "cross_entropy", r"return an output of shape \(samples, classes\)", net)


@pytest.mark.parametrize("loss", ["nll", "multi_margin"])
def test_probability_targets_are_refused_where_torch_takes_indices_only(loss) -> None:
    refused_by_fit(torch.randn(8, 3), torch.full((8, 4), 0.25), loss, r"takes class indices of shape \(4,\)")


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_index_out_of_range_in_any_sample_is_found_before_the_first_update(wrong, labels) -> None:
    labels[-1] = wrong  # in the last of three batches
    match = rf"class indices from {min(wrong, 0)} to {max(wrong, 3)}, but the output has 4 classes, 0 to 3"
    refused_by_fit(torch.randn(SAMPLES, 3), labels, "cross_entropy", match)


def test_index_out_of_range_is_found_in_validation_targets_and_in_one_of_several_outputs(labels) -> None:
    x, wrong = torch.randn(SAMPLES, 5), labels.clone()
    wrong[-1] = 9
    refused_by_fit(x, labels, "cross_entropy", "from 0 to 9", validation_data=(x, wrong))
    targets = {"kind": torch.where(wrong == 9, 9, 0), "size": torch.zeros(SAMPLES, 1)}
    refused_by_fit(x, targets, {"kind": "cross_entropy", "size": "mse"}, "from 0 to 9", TwoHeads())


def test_index_out_of_range_is_found_where_classes_come_last() -> None:
    y = torch.zeros(8, 6, dtype=torch.int64)
    y[7, 5] = CLASSES
    refused_by_fit(torch.randn(8, 6, 3), y, "cross_entropy", "has 4 classes", nn.Linear(3, CLASSES))


def test_floats_that_are_neither_indices_nor_probabilities_are_refused(labels) -> None:
    x = torch.randn(SAMPLES, 3)
    fraction, unequal = labels.float(), torch.full((SAMPLES, CLASSES), 0.25)
    fraction[-1], unequal[-1, 0] = 1.5, 0.75
    refused_by_fit(x, fraction, "cross_entropy", "values such as 1.5 are no class indices")
    refused_by_fit(x, unequal, "cross_entropy", "neither class indices nor probabilities that sum to 1")


# Logits or probabilities.


class Ends(nn.Module):
    """A linear layer and a last operation that is no layer."""

    def __init__(self, operation, outputs: int = CLASSES) -> None:
        super().__init__()
        self.linear, self.operation = nn.Linear(3, outputs), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.linear(x))


SQUASHED = [
    (nn.Sequential(nn.Linear(3, CLASSES), nn.Softmax(1)), "cross_entropy"),
    (nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.Linear(8, CLASSES), nn.Softmax(1))), nn.CrossEntropyLoss()),
    (nn.Sequential(nn.Linear(3, CLASSES), nn.Sigmoid()), "bce_with_logits"),
    (Ends(lambda output: output.softmax(1)), "cross_entropy"),
    (Ends(torch.sigmoid), "bce_with_logits"),
    (Ends(lambda output: torch.sigmoid(output).view(-1, 2, 2).flatten(1)), "binary_crossentropy"),
]


@pytest.mark.parametrize(("net", "loss"), SQUASHED, ids=lambda part: str(part)[:12])
def test_probabilities_where_logits_are_expected_are_warned_of_once(net, loss) -> None:
    x, y = torch.randn(SAMPLES, 3), F.one_hot(torch.arange(SAMPLES) % CLASSES, CLASSES).float()
    with pytest.warns(UserWarning, match="expects logits .*Remove the final Softmax or Sigmoid") as caught:
        model = kt.Model(net, backend="cpu").compile("sgd", loss)
        model.fit(x, y, epochs=2, validation_data=(x, y), verbose=0)
        model.fit(x, y, verbose=0)
    assert len(caught) == 1


NOT_SQUASHED = [
    (nn.Linear(3, CLASSES), "cross_entropy"),
    (nn.Sequential(nn.Linear(3, CLASSES), nn.LogSoftmax(1)), "nll"),
    (nn.Sequential(nn.Linear(3, CLASSES), nn.LogSoftmax(1)), "cross_entropy"),
    (nn.Sequential(nn.Linear(3, CLASSES), nn.Sigmoid()), "bce"),
    (nn.Sequential(nn.Linear(3, CLASSES), nn.Softmax(1)), "mse"),
    (Ends(lambda output: 0.1 * output.tanh() + 0.5), "bce_with_logits"),  # logits that happen to be in [0, 1]
    (Ends(lambda output: 0.1 * output.tanh() + 0.5), "cross_entropy"),
]


@pytest.mark.parametrize(("net", "loss"), NOT_SQUASHED, ids=lambda part: str(part)[:12])
def test_outputs_that_a_loss_expects_are_not_warned_of(net, loss) -> None:
    x, labels = torch.randn(SAMPLES, 3), torch.arange(SAMPLES) % CLASSES
    y = labels if loss in ("cross_entropy", "nll") else F.one_hot(labels, CLASSES).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kt.Model(net, backend="cpu").compile("sgd", loss).fit(x, y, verbose=0)


def test_softmax_that_is_not_the_last_operation_is_not_warned_of() -> None:
    net = Ends(lambda output: output)
    net.softmax = nn.Softmax(1)  # for a method of the user's own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kt.Model(net, backend="cpu").compile("sgd", "cross_entropy")


def test_a_module_that_sums_goes_on_summing_with_weights() -> None:
    output, target, weight = torch.randn(6, 2), torch.randn(6, 2), torch.rand(6)
    model = kt.Model(nn.Identity(), backend="cpu").compile("sgd", nn.MSELoss(reduction="sum"))
    expected = ((output - target).square() * weight[:, None]).sum().item()
    assert model.evaluate(output, target, sample_weight=weight, batch_size=6, verbose=0) == pytest.approx(expected)


def test_a_batch_of_as_many_tokens_as_classes_is_read_as_the_others_were() -> None:
    """(N, 5, 5) for targets (N, 5) fits torch's layout and that of classes last."""
    last = nn.Linear(3, 5)
    batches = [(torch.randn(4, steps, 3), torch.randint(0, 5, (4, steps))) for steps in (7, 5, 9)]
    expected = sum(F.cross_entropy(last(x).movedim(-1, 1), y, reduction="sum") for x, y in batches) / (4 * 21)
    right = sum((last(x).argmax(-1) == y).sum() for x, y in batches) / (4 * 21)
    model = kt.Model(last, backend="cpu").compile("sgd", "cross_entropy", metrics=["accuracy", "cross_entropy"])
    assert model.evaluate(batches, verbose=0)[:2] == [close(expected), close(right)]


def test_a_partial_of_a_function_is_known_as_the_function_is(logits, labels) -> None:
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0])
    for options in ({"weight": weights}, {"ignore_index": 2}, {"label_smoothing": 0.1}):
        expected = F.cross_entropy(logits, labels, **options)
        assert loss_of(logits, labels, functools.partial(F.cross_entropy, **options), batch_size=3) == close(expected)
    unreduced = F.cross_entropy(logits, labels, weight=weights, reduction="none")
    for loss in (
        functools.partial(F.cross_entropy, weight=weights, reduction="none"),
        nn.CrossEntropyLoss(weight=weights, reduction="none"),
    ):
        assert loss_of(logits, labels, loss, batch_size=3) == close(unreduced.mean())
