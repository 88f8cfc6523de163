"""Metrics: what is right in each shape, scores of the whole epoch, the user's own objects and functions, and names."""

from functools import partial

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

import kerastorch as kt

SAMPLES, CLASSES = 30, 4
BATCH = 7  # four whole batches and a part of one


class Echo(nn.Module):
    """Several outputs that are its inputs: a dict for named ones, else a tuple."""

    def forward(self, *outputs: Tensor, **named: Tensor) -> dict | tuple:
        return named or outputs


def measured(output, target, loss, metrics, module=None, **options) -> dict:
    """Loss and metrics that evaluation, in several batches, finds for outputs that are known."""
    model = kt.Model(nn.Identity() if module is None else module, backend="cpu").compile(loss=loss, metrics=metrics)
    return model.evaluate(output, target, batch_size=BATCH, return_dict=True, verbose=0, **options)


def value_of(output, target, loss, metric, **options) -> float:
    found = measured(output, target, loss, [metric], **options)
    return list(found.values())[1]


def close(value) -> object:
    return pytest.approx(float(value), rel=1e-5)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(SAMPLES, CLASSES)


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(CLASSES, (SAMPLES,))


# Accuracy.


def test_accuracy_of_classes_takes_indices_one_hot_and_whole_floats(logits, labels) -> None:
    expected = close((logits.argmax(1) == labels).float().mean())
    for target in (labels, labels.float(), labels.int(), F.one_hot(labels, CLASSES), F.one_hot(labels).float()):
        assert value_of(logits, target, "cross_entropy", "accuracy") == expected
    assert value_of(logits, labels, "cross_entropy", "sparse_categorical_accuracy") == expected
    assert value_of(logits, F.one_hot(labels).float(), "mse", "categorical_accuracy") == expected


@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 1)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.bool], ids=str)
def test_accuracy_of_logits_is_at_zero_and_of_other_values_at_a_half(shape, kind) -> None:
    output, target = torch.randn(shape), (torch.randn(shape) > 0).to(kind)
    at_zero, at_half = ((output > cut) == target.bool() for cut in (0.0, 0.5))
    assert at_zero.sum() != at_half.sum()
    assert value_of(output, target, "bce_with_logits", "accuracy") == close(at_zero.float().mean())
    assert value_of(output, target, nn.BCEWithLogitsLoss(), "binary_accuracy") == close(at_zero.float().mean())
    assert value_of(output, target, "mse", "accuracy") == close(at_half.float().mean())
    assert value_of(output.sigmoid(), target, "bce", "accuracy") == close(at_zero.float().mean())


@pytest.mark.parametrize("loss", ["bce_with_logits", "multilabel_soft_margin"])
def test_accuracy_of_several_labels_counts_each_label(logits, loss) -> None:
    target = (torch.randn_like(logits) > 0).float()
    assert value_of(logits, target, loss, "accuracy") == close(((logits > 0) == (target > 0)).float().mean())


def test_accuracy_of_a_users_loss_tells_columns_from_classes(logits, labels) -> None:
    def loss(output, target):
        return output.square().mean(1)

    right = (logits.argmax(1) == labels).float().mean()
    assert value_of(logits, labels, loss, "accuracy") == close(right)
    assert value_of(logits, F.one_hot(labels, CLASSES), loss, "accuracy") == close(right)
    column, bits = logits[:, :1], labels > 1
    assert value_of(column, bits, loss, "accuracy") == close(((column[:, 0] > 0) == bits).float().mean())


@pytest.mark.parametrize("length", [1, 3, 6])
def test_accuracy_of_tokens_takes_both_layouts_and_leaves_masked_ones_out(length) -> None:
    output, target = torch.randn(SAMPLES, CLASSES, length), torch.randint(CLASSES, (SAMPLES, length))
    target[::3] = -100
    kept = target != -100
    expected = close((output.argmax(1) == target)[kept].float().mean())
    assert value_of(output, target, "cross_entropy", "accuracy") == expected
    assert value_of(output.movedim(1, -1), target, "cross_entropy", "accuracy") == expected


def test_accuracy_leaves_out_the_ignore_index_of_the_losss_module(logits, labels) -> None:
    expected = (logits.argmax(1) == labels)[labels != 2].float().mean()
    assert value_of(logits, labels, nn.CrossEntropyLoss(ignore_index=2), "accuracy") == close(expected)


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("top3_accuracy", 3),
        ("top_2_accuracy", 2),
        ("top2", 2),
        ("TOP3_categorical_accuracy", 3),
        ("top1_acc", 1),
        ("top_k_categorical_accuracy", 5),
        ("sparse_top_k_categorical_accuracy", 5),
    ],
)
def test_top_k_accuracy_is_right_among_the_k_highest(name, k) -> None:
    output, target = torch.randn(SAMPLES, 8), torch.randint(8, (SAMPLES,))
    target[:4] = -100
    right = (output.argsort(1, descending=True)[:, :k] == target[:, None]).any(1)
    found = measured(output, target, "cross_entropy", [name])
    assert list(found) == ["loss", name]
    assert found[name] == close(right[4:].float().mean())


def test_top_k_of_fewer_classes_and_of_one_hot_targets(logits, labels) -> None:
    assert value_of(logits, labels, "cross_entropy", "top5") == 1.0
    right = (logits.topk(2, dim=1).indices == labels[:, None]).any(1).float().mean()
    assert value_of(logits, F.one_hot(labels).float(), "bce_with_logits", "top2") == close(right)


# Errors.


@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 1), (SAMPLES, 3)], ids=str)
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("mse MSE mean_squared_error", lambda y, p: sklearn.metrics.mean_squared_error(y, p)),
        ("mae l1 mean_absolute_error", lambda y, p: sklearn.metrics.mean_absolute_error(y, p)),
        ("rmse root_mean_squared_error", lambda y, p: np.mean((y - p) ** 2) ** 0.5),
        ("r2 r2_score R2", lambda y, p: sklearn.metrics.r2_score(y, p)),
    ],
    ids=["mse", "mae", "rmse", "r2"],
)
def test_errors_are_those_of_the_whole_epoch(names, expected, shape) -> None:
    output, target = torch.randn(shape), 100 + torch.randn(shape)
    for name in names.split():
        found = measured(output, target, "huber", [name])
        assert found[name] == close(expected(target.double().numpy(), output.double().numpy()))


def test_errors_of_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"output has shape \(\d+, 1\) but target has shape \(\d+,\).*must be equal"):
        measured(torch.randn(SAMPLES, 1), torch.randn(SAMPLES), lambda o, t: o.mean(1), ["mse"])


# Scores, equal to scikit-learn's over the whole epoch: the mean of batches is another number.

SCORES = {
    "f1": partial(sklearn.metrics.f1_score, zero_division=0),
    "precision": partial(sklearn.metrics.precision_score, zero_division=0),
    "recall": partial(sklearn.metrics.recall_score, zero_division=0),
}


@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 1)], ids=str)
@pytest.mark.parametrize(("loss", "cut"), [("bce_with_logits", 0.0), ("bce", 0.5), ("mse", 0.5)])
def test_binary_scores_equal_scikit_learns(shape, loss, cut) -> None:
    target = (torch.rand(shape) > 0.6).float()
    output = torch.randn(shape) + target
    output = output.sigmoid() if loss == "bce" else output
    found = measured(output, target, loss, ["auc", *SCORES])
    truth = target.flatten().numpy()
    assert found["auc"] == close(sklearn.metrics.roc_auc_score(truth, output.flatten().numpy()))
    for name, score in SCORES.items():
        assert found[name] == close(score(truth, output.flatten().numpy() > cut))


def test_auc_tells_confident_logits_apart() -> None:
    output = torch.linspace(15, 30, SAMPLES)  # whose sigmoids are all 1 in float32
    target = (torch.arange(SAMPLES) % 3 > 0).float()
    expected = sklearn.metrics.roc_auc_score(target.numpy(), output.numpy())
    assert value_of(output, target, "bce_with_logits", "auroc") == close(expected)


@pytest.mark.parametrize("is_one_hot", [False, True])
def test_multi_class_scores_equal_scikit_learns(logits, labels, is_one_hot) -> None:
    logits[torch.arange(SAMPLES), labels] += 1.0
    target = F.one_hot(labels, CLASSES) if is_one_hot else labels
    found = measured(logits, target, "cross_entropy", ["auc", "f1_score", "precision", "recall"])
    shares = logits.double().softmax(1).numpy()
    expected = sklearn.metrics.roc_auc_score(labels.numpy(), shares, multi_class="ovr", average="macro")
    assert found["auc"] == close(expected)
    for name, score in zip(("f1_score", "precision", "recall"), SCORES.values(), strict=True):
        assert found[name] == close(score(labels.numpy(), logits.argmax(1).numpy(), average="macro"))


def test_scores_of_several_labels_equal_scikit_learns(logits) -> None:
    target = (torch.randn_like(logits) + logits > 0).long()
    found = measured(logits, target, "bce_with_logits", ["auc", *SCORES])
    assert found["auc"] == close(sklearn.metrics.roc_auc_score(target.numpy(), logits.numpy(), average="macro"))
    for name, score in SCORES.items():
        assert found[name] == close(score(target.numpy(), (logits > 0).long().numpy(), average="macro"))


@pytest.mark.parametrize("length", [1, 3])
def test_scores_of_tokens_leave_masked_ones_out(length) -> None:
    output, target = torch.randn(SAMPLES, CLASSES, length), torch.randint(CLASSES, (SAMPLES, length))
    target[::4] = -100
    kept = target != -100
    expected = close(SCORES["f1"](target[kept].numpy(), output.argmax(1)[kept].numpy(), average="macro"))
    assert value_of(output, target, "cross_entropy", "f1") == expected
    assert value_of(output.movedim(1, -1), target, "cross_entropy", "f1") == expected


def test_scores_of_training_and_validation_do_not_mix(logits, labels) -> None:
    net, y = nn.Linear(CLASSES, 1), (labels > 1).float()[:, None]
    scores = net(logits).detach()
    model = kt.Model(net, backend="cpu").compile("sgd", "bce_with_logits", metrics=["auc"], lr=0.0)
    data = (logits[:10], y[:10])
    history = model.fit(logits, y, validation_data=data, epochs=2, batch_size=BATCH, verbose=0).history
    assert history["auc"] == [close(sklearn.metrics.roc_auc_score(y, scores))] * 2
    assert history["val_auc"] == [close(sklearn.metrics.roc_auc_score(y[:10], scores[:10]))] * 2


# The user's own.


def test_torchmetrics_object_is_updated_batch_by_batch_and_named_in_snake_case(logits, labels) -> None:
    metric = torchmetrics.classification.MulticlassF1Score(CLASSES, average="weighted")
    found = measured(logits, labels, "cross_entropy", [metric])
    assert list(found) == ["loss", "multiclass_f1_score"]
    expected = sklearn.metrics.f1_score(labels.numpy(), logits.argmax(1).numpy(), average="weighted")
    assert found["multiclass_f1_score"] == close(expected)


def collection(**options) -> torchmetrics.MetricCollection:
    return torchmetrics.MetricCollection(
        {"right": torchmetrics.classification.BinaryAccuracy(), "f": torchmetrics.classification.BinaryF1Score()},
        **options,
    )


def test_collection_of_torchmetrics_is_logged_under_its_own_keys(logits) -> None:
    output, target = logits[:, 0].sigmoid(), (logits[:, 1] > 0).float()
    found = measured(output, target, "bce", ["mae", collection(prefix="my_")])
    assert set(found) == {"loss", "mae", "my_right", "my_f"}
    assert found["my_right"] == close(((output > 0.5) == (target > 0)).float().mean())
    assert found["my_f"] == close(sklearn.metrics.f1_score(target, output > 0.5))


def test_object_with_update_compute_and_reset_is_a_metric(logits, labels) -> None:
    class LargestBatch:
        largest = 0

        def update(self, output, target):
            self.largest = max(self.largest, len(target))

        def compute(self):
            return self.largest

        def reset(self):
            self.largest = 0

    assert measured(logits, labels, "cross_entropy", [LargestBatch()])["largest_batch"] == BATCH


def test_users_torchmetrics_object_holds_the_last_evaluation(logits, labels) -> None:
    metric = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")
    model = kt.Model(nn.Linear(CLASSES, CLASSES), backend="cpu").compile("sgd", "cross_entropy", metrics=[metric])
    history = model.fit(logits, labels, validation_data=(logits[:9], labels[:9]), verbose=0).history
    assert metric.compute() == close(history["val_multiclass_accuracy"][0])
    _, value = model.evaluate(logits, labels, verbose=0)
    model.fit(logits[:5], labels[:5], verbose=0)
    assert metric.compute() == close(value)


def within(output, target, margin=1.0):
    return (output - target).abs() < margin


def mean_within(output, target):
    return within(output, target).float().mean()


def test_callable_may_return_a_scalar_or_a_value_for_each_sample_and_gives_its_name(logits) -> None:
    output, target = logits[:, 0], logits[:, 1]
    found = measured(output, target, "mse", [within, mean_within, partial(within, margin=0.2)])
    assert list(found) == ["loss", "within", "mean_within", "within_1"]
    expected = within(output, target).float().mean()
    assert found["within"] == close(expected)
    assert found["mean_within"] == close(expected)
    assert found["within_1"] == close(within(output, target, 0.2).float().mean())


def test_callable_object_is_named_after_its_class_and_may_return_a_number(logits) -> None:
    class MeanOutput:
        def __call__(self, output, target):
            return output.mean().item()

    assert measured(logits, logits + 1, "mse", [MeanOutput()])["mean_output"] == pytest.approx(
        logits.mean().item(), abs=1e-6
    )


def test_callable_sees_the_batches_as_they_are(logits) -> None:
    sizes = []

    def seen(output, target):
        sizes.append((len(output), len(target)))
        return 0.0

    measured(logits, logits + 1, "mse", [seen, "mae"])
    assert sizes == [(7, 7)] * 4 + [(2, 2)]


def test_metrics_are_not_weighted_by_sample_weights(logits, labels) -> None:
    weight = torch.rand(SAMPLES)
    metrics = ["accuracy", "f1", lambda output, target: output.argmax(1) == target]
    plain = measured(logits, labels, "cross_entropy", metrics)
    weighted = measured(logits, labels, "cross_entropy", metrics, sample_weight=weight)
    assert weighted.pop("loss") != close(plain.pop("loss"))
    assert weighted == plain and len(plain) == 3


# Names.


def test_metric_is_logged_under_the_name_that_was_given_and_twice_with_a_number(logits, labels) -> None:
    found = measured(logits, labels, "cross_entropy", ["acc", "accuracy", "accuracy", "f1", "f1"])
    assert list(found) == ["loss", "acc", "accuracy", "accuracy_1", "f1", "f1_1"]
    assert found["acc"] == found["accuracy"] == found["accuracy_1"]
    assert found["f1"] == found["f1_1"]


def test_metric_alone_needs_no_list(logits, labels) -> None:
    assert list(measured(logits, labels, "cross_entropy", "accuracy")) == ["loss", "accuracy"]


def test_results_come_as_a_list_in_the_order_of_the_metrics(logits, labels) -> None:
    model = kt.Model(nn.Identity(), backend="cpu").compile(loss="cross_entropy", metrics=["f1", "accuracy"])
    named = model.evaluate(logits, labels, return_dict=True, verbose=0)
    assert list(named) == ["loss", "f1", "accuracy"]
    assert model.evaluate(logits, labels, verbose=0) == list(named.values())


@pytest.mark.parametrize(("given", "meant"), [("acuracy", "accuracy"), ("f_1", "f1"), ("prescision", "precision")])
def test_unknown_name_lists_close_ones(given, meant) -> None:
    with pytest.raises(ValueError, match=f"metric '{given}' is not a metric. Did you mean .*'{meant}'"):
        kt.Model(nn.Linear(1, 1), backend="cpu").compile(loss="mse", metrics=[given])


def test_what_is_no_metric_is_refused() -> None:
    model = kt.Model(nn.Linear(1, 1), backend="cpu")
    with pytest.raises(TypeError, match=r"BinaryF1Score is a class, expected an instance. Give BinaryF1Score\("):
        model.compile(loss="mse", metrics=[torchmetrics.classification.BinaryF1Score])
    with pytest.raises(TypeError, match="metric 3 is a int; expected a name, a callable"):
        model.compile(loss="mse", metrics=[3])
    with pytest.raises(ValueError, match="metrics were given with loss=None"):
        model.compile(metrics=["accuracy"])
    with pytest.raises(ValueError, match=r"metrics is a dict of outputs \['a'\], but loss is not"):
        model.compile(loss="mse", metrics={"a": ["accuracy"]})


# Several outputs.

LOSSES = {"kind": "cross_entropy", "size": "mse"}


def several() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    outputs = {"kind": torch.randn(SAMPLES, CLASSES), "size": torch.randn(SAMPLES, 1)}
    return outputs, {"kind": torch.randint(CLASSES, (SAMPLES,)), "size": torch.randn(SAMPLES, 1)}


def test_metrics_of_several_outputs_carry_the_outputs_name() -> None:
    outputs, targets = several()
    metrics = {"size": ["mae", mean_within], "kind": "accuracy"}
    found = measured(outputs, targets, LOSSES, metrics, module=Echo())
    assert list(found) == ["loss", "kind_loss", "size_loss", "kind_accuracy", "size_mae", "size_mean_within"]
    assert found["kind_accuracy"] == close((outputs["kind"].argmax(1) == targets["kind"]).float().mean())
    assert found["size_mae"] == close(F.l1_loss(outputs["size"], targets["size"]))
    assert found["size_mean_within"] == close(mean_within(outputs["size"], targets["size"]))


def test_metrics_of_several_outputs_may_be_lists_in_the_order_of_the_losses() -> None:
    outputs, targets = (tuple(tree.values()) for tree in several())
    found = measured(outputs, targets, list(LOSSES.values()), [["accuracy", "f1"], []], module=Echo())
    assert list(found) == ["loss", "output_1_loss", "output_2_loss", "output_1_accuracy", "output_1_f1"]
    assert found["output_1_accuracy"] == close((outputs[0].argmax(1) == targets[0]).float().mean())


def test_collections_of_several_outputs_do_not_overwrite_one_another(logits) -> None:
    outputs = {"a": logits[:, 0].sigmoid(), "b": logits[:, 1].sigmoid()}
    targets = {"a": (logits[:, 2] > 0).float(), "b": (logits[:, 3] > 0).float()}
    metrics = {name: [collection()] for name in outputs}
    found = measured(outputs, targets, {"a": "bce", "b": "bce"}, metrics, module=Echo())
    for name in outputs:
        expected = ((outputs[name] > 0.5) == (targets[name] > 0)).float().mean()
        assert found[f"{name}_right"] == close(expected)


def test_keys_of_collections_are_known_to_callbacks_that_monitor_them(logits) -> None:
    targets = {"a": (logits[:, 2] > 0).float(), "b": (logits[:, 3] > 0).float()}

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({name: nn.Linear(CLASSES, 1) for name in targets})

        def forward(self, x):
            return {name: head(x)[:, 0] for name, head in self.heads.items()}

    losses = {"a": "bce_with_logits", "b": "bce_with_logits"}
    model = kt.Model(Both(), backend="cpu").compile("sgd", losses, metrics={"b": [collection()]})
    watcher = kt.Callback()
    watcher.monitor = "b_right"
    assert "b_right" in model.fit(logits, targets, callbacks=[watcher], verbose=0).history


def test_metrics_that_fit_no_output_are_refused() -> None:
    model = kt.Model(Echo(), backend="cpu")
    with pytest.raises(ValueError, match="metrics name the output 'colour', but the losses name kind, size"):
        model.compile(loss=LOSSES, metrics={"colour": ["accuracy"]})
    with pytest.raises(ValueError, match="metrics is a list of 1 for 2 outputs"):
        model.compile(loss=LOSSES, metrics=["accuracy"])


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge", "soft_margin"])
def test_margins_decide_at_zero(loss) -> None:
    output, target = torch.tensor([[0.2], [0.3], [-0.1], [0.4]]), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    model = kt.Model(nn.Identity(), backend="cpu").compile("sgd", loss, metrics=["accuracy"])
    assert model.evaluate(output, target, verbose=0)[1] == 0.75


def test_the_best_none_of_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="'top0_accuracy' asks for the best 0 classes"):
        kt.Model(nn.Linear(2, 3), backend="cpu").compile("sgd", "cross_entropy", metrics=["top0_accuracy"])


def test_scores_of_margins_take_targets_of_both_signs() -> None:
    output, target = torch.tensor([[0.2], [0.3], [-0.1], [0.4]]), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    model = kt.Model(nn.Identity(), backend="cpu").compile("sgd", "hinge", metrics=["precision", "recall"])
    assert model.evaluate(output, target, verbose=0)[1:] == pytest.approx([2 / 3, 1.0])


# Weighted.


def test_weighted_metrics_are_means_weighted_by_the_samples() -> None:
    x, weight = torch.randn(20, 4), torch.rand(20)
    y, values = torch.arange(20) % 3, torch.randn(20, 2)
    right = (x[:, :3].argmax(1) == y).float()
    model = kt.Model(nn.Identity(), backend="cpu").compile(
        "sgd", "cross_entropy", metrics=["accuracy"], weighted_metrics=["accuracy", "nll", agreement]
    )
    found = model.evaluate(x[:, :3], y, sample_weight=weight, batch_size=6, return_dict=True, verbose=0)
    assert found["accuracy"] == pytest.approx(right.mean().item())
    for name in ("weighted_accuracy", "agreement"):
        assert found[name] == pytest.approx(((right * weight).sum() / weight.sum()).item(), abs=1e-6)
    per_sample = -x[torch.arange(20), y]
    assert found["nll"] == pytest.approx(((per_sample * weight).sum() / weight.sum()).item(), abs=1e-5)
    squared = (x[:, :2] - values).square().mean(1)
    model.compile("sgd", "mse", weighted_metrics=["mse", "rmse"])
    found = model.evaluate(x[:, :2], values, sample_weight=weight, batch_size=6, return_dict=True, verbose=0)
    expected = ((squared * weight).sum() / weight.sum()).item()
    assert [found["mse"], found["rmse"]] == pytest.approx([expected, expected**0.5], abs=1e-6)
    unweighted = model.evaluate(x[:, :2], values, return_dict=True, verbose=0)
    assert unweighted["mse"] == pytest.approx(squared.mean().item(), abs=1e-6)


def agreement(output, target):
    return (output.argmax(1) == target).float()


def test_weighted_accuracy_leaves_masked_targets_out() -> None:
    x, y, weight = torch.randn(8, 3), torch.arange(8) % 3, torch.rand(8)
    y[[1, 4]] = -100
    right, there = (x.argmax(1) == y).float(), (y >= 0).float()
    model = kt.Model(nn.Identity(), backend="cpu").compile("sgd", "cross_entropy", weighted_metrics=["accuracy"])
    expected = ((right * weight).sum() / (there * weight).sum()).item()
    assert model.evaluate(x, y, sample_weight=weight, verbose=0)[1] == pytest.approx(expected, abs=1e-6)


def test_weighted_metrics_of_several_outputs_take_the_weights_of_each() -> None:
    class Heads(nn.Module):
        def forward(self, x):
            return {"a": x[:, :1], "b": x[:, 1:]}

    x, y = torch.randn(10, 2), torch.zeros(10, 1)
    model = kt.Model(Heads(), backend="cpu").compile(
        "sgd", {"a": "mse", "b": "mse"}, metrics={"a": ["mae"]}, weighted_metrics={"a": ["mae"], "b": ["mae"]}
    )
    weights = {"a": torch.rand(10), "b": torch.rand(10)}
    found = model.evaluate(x, {"a": y, "b": y}, sample_weight=weights, return_dict=True, verbose=0)
    for name, column, key in (("a_weighted_mae", 0, "a"), ("b_mae", 1, "b")):
        expected = (x[:, column].abs() * weights[key]).sum() / weights[key].sum()
        assert found[name] == pytest.approx(expected.item(), abs=1e-6)


def test_what_cannot_be_weighted_is_refused() -> None:
    model = kt.Model(nn.Identity(), backend="cpu")
    with pytest.raises(ValueError, match="weighted_metrics has 'f1', which has a state of its own"):
        model.compile("sgd", "cross_entropy", weighted_metrics=["f1"])
    model.compile("sgd", "mse", weighted_metrics=[lambda output, target: (output - target).mean()])
    with pytest.raises(ValueError, match=r"returned one number for a batch. Return a value for each sample"):
        model.evaluate(torch.rand(4, 1), torch.rand(4, 1), sample_weight=torch.rand(4), verbose=0)


def test_cosine_similarity_is_higher_where_outputs_are_better_though_its_loss_is_lower():
    x, y = torch.rand(20, 3), torch.rand(20, 3)
    model = kt.Model(nn.Identity()).compile("sgd", "cosine_similarity", metrics=["cosine_similarity"])
    loss, similarity = model.evaluate(x, y, batch_size=8, verbose=0)
    expected = torch.nn.functional.cosine_similarity(x, y).mean().item()
    assert similarity == pytest.approx(expected, rel=1e-5) and loss == pytest.approx(-expected, rel=1e-5)
