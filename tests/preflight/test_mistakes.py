"""Each mistake is found under its name, with its place and its numbers; models that are well get notes at most."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import kerastorch as kt
from kerastorch.seeding import epoch_order

N = 40


def check(net: nn.Module, data, y=None, loss="cross_entropy", optimizer="sgd", model=kt.Model, verbose=0, **options):
    """Findings, with the arguments of `compile` and those of `check`."""
    settings = {name: options.pop(name) for name in ("precision", "metrics", "tbptt_steps", "jit") if name in options}
    return model(net, backend="cpu").compile(optimizer, loss, **settings).check(data, y, verbose=verbose, **options)


def names(findings) -> list[str]:
    return [finding.name for finding in findings]


def the_only(findings, severity: str, name: str, **texts: str):
    """The one finding there is, with these texts in its fields."""
    assert [(one.severity, one.name) for one in findings] == [(severity, name)], str(findings)
    for field, text in texts.items():
        assert text in getattr(findings[0], field), getattr(findings[0], field)
    return findings[0]


def mlp(inputs: int = 6, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes))


def with_norm(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, 6)


@pytest.fixture
def y() -> Tensor:
    return torch.randperm(N) % 3


class Forward(nn.Module):
    """Two linear layers and a forward of the test's own."""

    def __init__(self, forward, inputs: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 8), nn.Linear(8, outputs)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


# Models that are well.


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).relu()
        return {"kind": self.kind(hidden), "size": self.size(hidden)}


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.linear(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


class LanguageModel(nn.Module):
    """(samples, time) -> (samples, time, tokens), with a state where it is asked for."""

    def __init__(self, tokens: int = 20) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(tokens, 8), nn.Linear(8, tokens)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)

    def forward(self, tokens: Tensor, *state) -> Tensor | tuple:
        hidden, after = self.recurrent(self.embedding(tokens), *state)
        return (self.head(hidden), after) if state else self.head(hidden)


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.embedding = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


class LowRank(nn.Module):
    """A frozen layer with an addition that begins at 0: the gradient of `down` is 0 in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 10).requires_grad_(False)
        self.down, self.up = nn.Linear(64, 2, bias=False), nn.Linear(2, 10, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Gan(kt.Model):
    def train_step(self, batch: tuple) -> dict[str, Tensor]:
        real, generator, critic = batch[0], self.module["generator"], self.module["critic"]
        fake = generator(torch.randn(len(real), 4))
        critic_loss = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
        self.backward(critic_loss)
        self.optimizer_step("critic")
        loss = F.softplus(-critic(fake)).mean()
        self.backward(loss)
        self.optimizer_step("generator")
        return {"critic_loss": critic_loss, "loss": loss}


class Penalized(kt.Model):
    def compute_loss(self, batch: tuple) -> Tensor:
        penalty = sum(one.abs().sum() for one in self.module.parameters())
        self.log("penalty", penalty)
        return super().compute_loss(batch) + 1e-4 * penalty


def convnet() -> nn.Module:
    stem = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    body = nn.Sequential(nn.MaxPool2d(2), nn.Dropout(0.3), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(stem, body, nn.Linear(64, 10))


def digits_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def tokens() -> Tensor:
    return torch.randint(0, 20, (N, 7))


def autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64), nn.Sigmoid())


HEALTHY = {
    "mlp": lambda d: check(digits_mlp(), *d, metrics=["accuracy", "f1"], validation_split=0.2),
    "convnet": lambda d: check(convnet(), *d, optimizer="adam", validation_data=(d[0][-40:], d[1][-40:])),
    "autoencoder": lambda d: check(autoencoder(), d[0], d[0], "mse", validation_split=0.2),
    "binary": lambda d: check(nn.Linear(64, 1), d[0], (d[1] > 4).float()[:, None], "bce_with_logits"),
    "sigmoid": lambda d: check(nn.Sequential(nn.Linear(64, 1), nn.Sigmoid()), d[0], (d[1] > 4).float()[:, None], "bce"),
    "log softmax": lambda d: check(nn.Sequential(nn.Linear(64, 10), nn.LogSoftmax(1)), *d, "nll"),
    "several outputs": lambda d: check(
        TwoHeads(), d[0], {"kind": d[1], "size": d[0].mean(1, True)}, {"kind": "cross_entropy", "size": "mse"}
    ),
    "own loss": lambda d: check(OwnLoss(), *d, None),
    "tokens": lambda d: check(LanguageModel(), tokens(), tokens()),
    "encoder": lambda d: check(Encoder(batch_first=True), tokens(), tokens()),
    "tbptt": lambda d: check(LanguageModel(), tokens(), tokens(), tbptt_steps=3),
    "low rank": lambda d: check(LowRank(), *d),
    "gan": lambda d: check(
        nn.ModuleDict({"generator": nn.Linear(4, 64), "critic": nn.Linear(64, 1)}),
        d[0], loss=None, optimizer={"generator": "adam", "critic": "adam"}, model=Gan,
    ),
    "compute_loss": lambda d: check(digits_mlp(), *d, model=Penalized),
    "lbfgs": lambda d: check(digits_mlp(), *d, optimizer="lbfgs"),
    "lazy": lambda d: check(nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10)), *d),
    "fp16": lambda d: check(digits_mlp(), *d, precision="16"),
    "bf16": lambda d: check(convnet(), *d, precision="bf16"),
    "bf16-true": lambda d: check(digits_mlp(), *d, precision="bf16-true"),
    "64": lambda d: check(digits_mlp(), *d, precision="64"),
    "weights": lambda d: check(digits_mlp(), *d, sample_weight=torch.rand(len(d[0]))),
    "own function": lambda d: check(digits_mlp(), *d, lambda output, target: F.cross_entropy(output, target)),
    "loader": lambda d: check(digits_mlp(), DataLoader(TensorDataset(*d), 32, shuffle=True, num_workers=2)),
    "batches": lambda d: check(digits_mlp(), [(d[0][:32], d[1][:32]), (d[0][32:64], d[1][32:64])]),
    "callable": lambda d: check(digits_mlp(), lambda: ((d[0][i : i + 8], d[1][i : i + 8]) for i in range(0, 64, 8))),
    "numpy": lambda d: check(digits_mlp(), d[0].numpy().astype("float64"), d[1].numpy()),
    "pandas": lambda d: check(digits_mlp(), pd.DataFrame(d[0].numpy()), pd.Series(d[1].numpy())),
    "raw digits": lambda d: check(digits_mlp(), d[0] * 16, d[1]),
    "masked tokens": lambda d: check(LanguageModel(), tokens(), tokens().masked_fill(torch.rand(N, 7) < 0.2, -100)),
    "one batch": lambda d: check(with_norm(), torch.randn(20, 6), torch.arange(20) % 3),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_a_model_that_is_well_has_no_warnings_and_no_errors(name, digits) -> None:
    findings = HEALTHY[name](digits)
    assert not findings.errors and not findings.warnings, str(findings)
    assert "1 batch" in findings.checked or "one batch of x" in findings.checked


def test_a_model_that_is_well_is_well_after_training_too(diabetes, regressor) -> None:
    model = kt.Model(regressor, backend="cpu").compile("adam", "mse", metrics=["mae"])
    model.fit(*diabetes, epochs=2, validation_split=0.2, verbose=0)
    assert list(model.check(*diabetes, validation_split=0.2, verbose=0)) == []


def test_classifier_notes_nothing_at_all(digits, classifier) -> None:
    findings = check(classifier, *digits)
    assert list(findings) == [] and findings.ok
    assert "2,410" not in findings.checked and "1,210 parameters" in findings.checked


# Shapes, dtypes, and what else ends a run.


def test_wrong_width_is_found_in_the_layer_that_has_it(x, y) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(9, 3))
    the_only(check(net, x, y), "error", "shapes", where="2 (Linear)", found="the layer was given float32 (32, 8)")


def test_values_that_would_broadcast_are_found(x) -> None:
    findings = check(mlp(classes=1), x, torch.rand(N), "mse")
    the_only(findings, "error", "shapes", where="loss", found="shape (32, 1) but target has shape (32,)")
    assert "y[:, None]" in findings[0].remedy


def test_a_loss_of_ones_own_that_broadcasts_is_found(x) -> None:
    def squares(output, target):
        return (output - target).square().mean()

    def squeezed(output, target):
        return (output.squeeze(-1) - target).square().mean()

    one = the_only(check(mlp(classes=1), x, torch.rand(N), squares), "warning", "broadcast", where="y")
    assert "y[:, None]" in one.remedy and "(32, 1) with targets (32,)" in one.found
    flat = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    assert "y.squeeze(-1)" in the_only(check(flat, x, torch.rand(N, 1), squares), "warning", "broadcast").remedy
    assert list(check(mlp(classes=1), x, torch.rand(N), squeezed)) == []
    assert list(check(mlp(classes=1), x, torch.rand(N, 1), squares)) == []


def test_broadcasting_that_torch_warns_of_in_a_modules_own_loss_is_found(x) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 1)

        def forward(self, x, y):
            return F.mse_loss(self.linear(x), y)

    the_only(check(Own(), x, torch.rand(N), None), "warning", "broadcast", found="Using a target size")


def test_other_warnings_of_a_step_are_notes(x, y) -> None:
    def forward(self, x):
        warnings.warn("something is odd. Look at it.", stacklevel=1)
        return self.second(self.first(x))

    the_only(check(Forward(forward), x, y), "note", "warning", found="Something is odd.", remedy="Look at it.")


def test_whole_numbers_for_float_layers_are_found() -> None:
    findings = check(mlp(), torch.randint(0, 9, (N, 6)), torch.arange(N) % 3)
    the_only(findings, "error", "dtype", where="0 (Linear)", remedy='astype("float32")')


def test_tokens_beyond_the_embedding_are_found() -> None:
    ids = torch.randint(0, 20, (N, 7))
    ids[:, 3] = 20
    findings = check(LanguageModel(), ids, ids % 20)
    the_only(findings, "error", "index-range", where="embedding (Embedding)", found="from 0 to 20", remedy="21 rows")
    findings = check(LanguageModel(), ids - 21, ids % 20)
    the_only(findings, "error", "index-range", remedy="number the inputs from 0")


def test_embeddings_that_make_their_own_indices_are_left_alone() -> None:
    class Positions(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(torch.arange(tokens.shape[1])).expand(len(tokens), -1, -1)

    net, ids = LanguageModel(), torch.randint(0, 20, (N, 7))
    net.embedding = nn.Sequential(Positions(7, 8))
    assert list(check(net, ids, ids)) == []


@pytest.mark.parametrize(("wrong", "text"), [(3, "from 0 to 3"), (-1, "from -1 to 2")])
def test_classes_out_of_range_are_found_wherever_they_are(x, y, wrong, text) -> None:
    y[-1] = wrong
    the_only(check(mlp(), x, y), "error", "target-range", found=text)
    validation = (x.clone(), y)
    the_only(check(mlp(), x, y.clamp(0, 2), validation_data=validation), "error", "target-range", found=text)


def test_missing_targets_are_found(x) -> None:
    the_only(check(mlp(), x), "error", "no-targets", remedy="Give y")


def test_data_that_cannot_be_opened_is_an_error(x, y) -> None:
    the_only(check(mlp(), x, y[:-1]), "error", "data", where="data", found="x has 40 samples, y has 39 samples")
    the_only(check(mlp(), []), "error", "data", found="The data is empty")
    texts = pd.DataFrame({"name": ["a", "b"], "size": [1.0, 2.0]})
    the_only(check(mlp(), texts, y[:2]), "error", "data", found="no numbers: ['name']", remedy="Encode them")


def test_validation_data_that_cannot_be_opened_is_told_from_training_data(x, y) -> None:
    findings = check(mlp(), x, y, validation_data=(x.clone(), y[:-1]))
    the_only(findings, "error", "validation-data", where="validation_data", found="y has 39 samples")
    assert "loss at start" in findings.checked
    findings = check(mlp(), x, y[:-1], validation_data=(x.clone(), y[:-1]))
    the_only(findings, "error", "data", where="data", found="y has 39 samples")


def test_validation_inputs_of_another_shape_are_found_before_the_first_epoch(x, y) -> None:
    findings = check(mlp(), x, y, validation_data=(x[:, :5], y))
    the_only(findings, "error", "shapes", where="validation_data, 0 (Linear)", found="float32 (40, 5)")


def test_metric_that_does_not_fit_is_found(x, y) -> None:
    def broken(output, target):
        raise ValueError("the metric wants three outputs. Give it three.")

    findings = check(mlp(), x, y, metrics=[broken])
    the_only(findings, "error", "metrics", where="metrics", found="The metric wants three outputs.", remedy="Give it")


def test_monitors_and_callbacks_that_are_none_are_found(x, y) -> None:
    class Stop(kt.Callback):
        monitor = "val_los"

        def on_epoch_end(self, epoch, logs=None):
            pass

    the_only(check(mlp(), x, y, callbacks=Stop()), "error", "monitor", where="callbacks", found="monitors 'val_los'")
    named = check(mlp(), x, y, callbacks=[Stop()], validation_split=0.5)
    the_only(named, "error", "monitor", remedy="Did you mean 'val_loss'?")
    the_only(check(mlp(), x, y, callbacks=[Stop]), "error", "callbacks", found="Stop is a class", remedy="Give Stop()")


def test_frozen_modules_and_detached_losses_are_found(x, y) -> None:
    the_only(check(mlp().requires_grad_(False), x, y), "error", "nothing-to-train", remedy="Unfreeze some")
    cut = Forward(lambda self, x: self.second(self.first(x)).detach())
    the_only(check(cut, x, y), "error", "no-gradient", found="The loss has no gradient", remedy="detach")


def test_errors_of_any_kind_become_findings(x, y) -> None:
    def forward(self, x):
        raise KeyError("tokenizer")

    the_only(check(Forward(forward), x, y), "error", "step", where="the module (Forward)", found="KeyError:")


def test_errors_that_forward_catches_are_not_taken_for_the_one_that_ends_it(x, y) -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong = nn.Sequential(nn.Sequential(nn.Linear(5, 3)))

        def forward(self, x):
            try:
                return self.wrong(x)
            except RuntimeError:
                return x

    net = nn.Sequential(Tries(), Forward(lambda self, x: self.nothing))
    the_only(check(net, x, y), "error", "step", where="1 (Forward)", found="no attribute 'nothing'")
    outer = Forward(lambda self, x: self.tries(x) + self.nothing)
    outer.tries = Tries()
    the_only(check(outer, x, y), "error", "step", where="the module (Forward)", found="no attribute 'nothing'")


def test_out_of_memory_is_named_as_such(x, y) -> None:
    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    the_only(check(Forward(forward), x, y), "error", "memory", remedy='fit(microbatch="auto")')


def test_an_error_in_eval_mode_alone_is_found(x, y) -> None:
    def forward(self, x):
        return self.second(self.first(x)) if self.training else self.first(self.first(x))

    the_only(check(Forward(forward), x, y), "error", "shapes", where="eval mode, first (Linear)")


# Logits, probabilities, log-probabilities.


@pytest.mark.parametrize("net", [
    nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)),
    Forward(lambda self, x: self.second(self.first(x)).softmax(1)),
], ids=["layer", "function"])  # fmt: skip
def test_probabilities_where_logits_are_expected_are_found_each_time(net, x, y) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy")
    for _ in range(2):
        one = the_only(model.check(x, y, verbose=0), "warning", "probabilities", where="outputs")
        assert one.remedy == "Remove the final Softmax or Sigmoid."


def test_probabilities_are_found_after_fit_has_warned_of_them(x, y) -> None:
    net = Forward(lambda self, x: F.normalize(self.second(self.first(x)).exp(), p=1, dim=1))
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy")
    with pytest.warns(UserWarning, match="expects logits"):
        model.fit(x, y, verbose=0)
    the_only(model.check(x, y, verbose=0), "warning", "probabilities", found="look like probabilities")


@pytest.mark.parametrize("operation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_probabilities_of_classes_are_found_by_their_last_operation(y, operation, precision) -> None:
    end = {"sigmoid": torch.sigmoid, "softmax": lambda output: output.softmax(1)}[operation]
    net = Forward(lambda self, x: end(self.second(self.first(x))))
    findings = check(net, torch.randn(5, 6), y[:5], precision=precision)
    the_only(findings, "warning", "probabilities", where="outputs", remedy=f"Remove the final {operation.title()}.")


def test_logits_where_probabilities_are_expected_are_found(x) -> None:
    findings = check(mlp(classes=1), x, torch.rand(N, 1).round(), "bce")
    the_only(findings, "error", "probabilities", found="loss='bce' takes probabilities", remedy="Sigmoid")
    both = check(TwoHeads(), torch.randn(N, 64), {"kind": torch.arange(N) % 10, "size": torch.rand(N, 1).round()},
                 {"kind": "cross_entropy", "size": nn.BCELoss()})  # fmt: skip
    the_only(both, "error", "probabilities", found="loss='BCELoss' takes probabilities")


@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(1), nn.LogSigmoid()], ids=lambda one: type(one).__name__)
def test_outputs_that_are_no_log_probabilities_are_found(x, y, last) -> None:
    findings = check(nn.Sequential(nn.Linear(6, 3), last), x, y, "nll")
    the_only(findings, "error", "no-log-probabilities", where="outputs", remedy="LogSoftmax, or give 'cross_entropy'")


def test_log_probabilities_with_classes_last_are_none_too_many() -> None:
    class Ends(LanguageModel):
        def forward(self, tokens):
            return super().forward(tokens).log_softmax(-1)

    ids = torch.randint(0, 20, (N, 7))
    assert list(check(Ends(), ids, ids, "nll")) == []
    assert names(check(LanguageModel(), ids, ids, "nll")) == ["no-log-probabilities"]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's, on kl_div
def test_kl_div_wants_log_probabilities(x) -> None:
    shares = torch.rand(N, 3).softmax(1)
    findings = check(nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), x, shares, "kl_div")
    assert [one.remedy for one in findings.errors] == [
        "End the module in a LogSoftmax, or give 'kl_divergence', which takes logits."
    ]
    assert not check(nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1)), x, shares, "kl_div").errors


def test_logits_behind_a_relu_are_found(x, y) -> None:
    the_only(check(nn.Sequential(nn.Linear(6, 3), nn.ReLU()), x, y), "warning", "clipped-logits", remedy="final ReLU")
    squeezed = Forward(lambda self, x: self.second(self.first(x)).relu().squeeze(-1), outputs=1)
    findings = check(squeezed, x, torch.rand(N).round(), "bce_with_logits")
    the_only(findings, "warning", "clipped-logits")


# Targets.


@pytest.mark.parametrize(("loss", "target", "text"), [
    ("bce_with_logits", 2.0, "from 0 to 1"), (nn.BCEWithLogitsLoss(), -1.0, "from 0 to 1"),
    ("multilabel_soft_margin", 2.0, "from 0 to 1"), ("hinge", -2.0, "from -1 to 1"),
    ("soft_margin", 3.0, "from -1 to 1"), ("poisson_nll", -1.0, "from 0 up"), ("msle", -1.0, "from 0 up"),
], ids=str)  # fmt: skip
def test_targets_that_a_loss_does_not_take_are_found_in_any_sample(x, loss, target, text) -> None:
    y = torch.rand(N, 1).round()
    assert not check(mlp(classes=1), x, y, loss).errors
    y[-1] = target
    the_only(check(mlp(classes=1), x, y, loss), "error", "target-range", where="y", found=text)


def test_targets_of_a_loader_are_looked_at_in_the_first_batch(x) -> None:
    class Own(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return x[index], torch.full((1,), 2.0)

    the_only(check(mlp(classes=1), Own(), loss="bce_with_logits"), "error", "target-range", found="from 2 to 2")


@pytest.mark.parametrize(("last", "target", "is_found"), [
    (nn.Sigmoid(), 5.0, True), (nn.Tanh(), -3.0, True), (nn.ReLU(), -1.0, True), (nn.Softmax(1), 2.0, True),
    (nn.Sigmoid(), 1.0, False), (nn.Tanh(), -1.0, False), (nn.ReLU(), 9.0, False), (nn.GELU(), -3.0, False),
    (nn.Flatten(), -3.0, False),
], ids=str)  # fmt: skip
def test_targets_that_the_last_activation_cannot_reach_are_found(x, last, target, is_found) -> None:
    y = torch.rand(N, 2)
    y[-1, 0] = target
    findings = check(nn.Sequential(nn.Linear(6, 2), last), x, y, "mse")
    assert names(findings) == ["targets-out-of-reach"] * is_found
    assert all(f"to {max(target, float(y.max())):.4g}" in one.found and one.where == "y" for one in findings)


def test_targets_a_little_beyond_reach_are_let_pass(x) -> None:
    y = torch.rand(N, 2)
    y[0, 0] = 1.005
    assert list(check(nn.Sequential(nn.Linear(6, 2), nn.Sigmoid()), x, y, "mse")) == []


@pytest.mark.parametrize(("loss", "y", "severity"), [
    ("cross_entropy", torch.ones(N, dtype=torch.int64), "warning"), ("mse", torch.full((N, 3), 2.5), "warning"),
    ("mse", torch.zeros(N, 3), "note"),  # a residual that shall vanish
], ids=["classes", "values", "zeros"])  # fmt: skip
def test_targets_that_are_all_the_same_are_found(x, loss, y, severity) -> None:
    the_only(check(mlp(), x, y, loss), severity, "constant-targets", found=f"targets are {float(y.flatten()[0]):g}.")


def test_targets_of_a_loss_of_ones_own_may_be_anything(x) -> None:
    assert list(check(mlp(), x, torch.zeros(N), lambda output, target: output.square().mean())) == []


def test_sorted_targets_are_a_note_and_with_a_split_a_warning() -> None:
    iris = load_iris()
    x, y = torch.tensor(iris.data, dtype=torch.float32), torch.tensor(iris.target)
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    nn.init.zeros_(net[0].weight)
    the_only(check(net, x, y), "note", "sorted-targets", where="y")
    findings = check(net, x, y, validation_split=0.2)
    the_only(findings, "warning", "sorted-targets", found="holds back the end: class 2 alone.", remedy="Shuffle")
    the_only(check(net, x.flip(0), y.flip(0), validation_split=0.4), "warning", "sorted-targets", found="classes 0, 1")
    the_only(check(net, DataLoader(TensorDataset(x, y), 32)), "warning", "sorted-targets", remedy="shuffle=True")
    assert list(check(net, DataLoader(TensorDataset(x, y), 32, shuffle=True), validation_data=(x[::2], y[::2]))) == []


def test_classes_that_only_validation_has_are_found(x, y) -> None:
    seen = y != 2
    findings = check(mlp(), x[seen], y[seen], validation_data=(x, y))
    the_only(findings, "warning", "unseen-classes", found="that training has not: class 2.")
    ignored = nn.CrossEntropyLoss(ignore_index=2)
    assert list(check(mlp(), x[seen], y[seen], ignored, validation_data=(x, y))) == []


def test_large_regression_targets_are_noted(x) -> None:
    one = check(mlp(classes=1), x, 3e5 + 1e4 * torch.randn(N, 1), "l1")
    the_only(one, "note", "target-scale", found="root mean square 2.98e+05")


# Inputs.


def test_nan_and_infinity_are_found_with_their_columns(x, y) -> None:
    frame = pd.DataFrame(x.numpy().copy(), columns=list("abcdef"))
    frame.loc[7, "d"] = np.nan
    findings = check(mlp(), frame, y)
    the_only(findings, "error", "data-not-finite", where="x", found="column 'd'", remedy="Fill or drop")
    x[3, 2] = float("inf")
    findings = check(mlp(), x, y, batch_size=N)
    the_only(findings, "error", "data-not-finite", where="x", found="x has 1 infinite value:")


def test_nan_that_the_module_puts_up_with_is_no_error(x, y) -> None:
    x[0, 0] = float("nan")
    net = Forward(lambda self, x: self.second(self.first(x.nan_to_num())))
    the_only(check(net, x, y), "warning", "data-not-finite", found="1 NaN in column 0")


def test_files_that_are_mapped_into_memory_are_not_read_whole(tmp_path, x, y) -> None:
    mapped = np.memmap(tmp_path / "x", dtype="float32", mode="w+", shape=x.shape)
    mapped[:] = x.numpy()
    assert list(check(mlp(), mapped, y)) == []
    first = set(epoch_order(N, 0)[:8].tolist())
    mapped[[row for row in range(N) if row not in first]] = np.inf
    assert list(check(mlp(), mapped, y, batch_size=8)) == []
    mapped[:] = np.inf
    the_only(check(mlp(), mapped, y), "error", "data-not-finite", where="x", found="x has 192 infinite values")


@pytest.mark.parametrize(("factor", "severity"), [(0.05, None), (6.0, None), (100.0, "note"), (1e4, "warning")])
def test_inputs_of_a_large_scale_are_noted(x, y, factor, severity) -> None:
    net = Forward(lambda self, x: self.second(self.first(x) / self.factor))
    net.factor = factor
    nn.init.zeros_(net.first.bias)
    found = [(one.severity, one.name) for one in check(net, factor * x, y)]
    assert found == ([(severity, "input-scale")] if severity else [])


def test_inputs_that_are_normalized_by_the_module_may_have_any_scale(x, y) -> None:
    divides = Forward(lambda self, x: self.second(self.first(x / 255)))
    assert list(check(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), 255 * x, y)) == []
    assert list(check(divides, 255 * x, y)) == []


def test_large_float64_arrays_are_noted() -> None:
    x, y = np.random.randn(6000, 64), np.arange(6000) % 10
    the_only(check(digits_mlp(), x, y), "note", "float64-data", where="x", found="as float32: 2 MB")
    assert list(check(digits_mlp(), x, y, precision="64")) == []
    assert list(check(digits_mlp(), (x.astype("float32"), y))) == []


@pytest.mark.parametrize("samples", [1 + 32, 65])
def test_a_last_batch_of_one_sample_is_found_where_a_norm_cannot_take_it(samples) -> None:
    x, y = torch.randn(samples, 6), torch.arange(samples) % 3
    one = the_only(check(with_norm(), x, y), "error", "last-batch-of-one", where="1")
    size = int(one.remedy.split("batch_size=")[1].partition(",")[0])
    assert list(check(with_norm(), x, y, batch_size=size)) == []
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kt.Model(with_norm(), backend="cpu").compile("sgd", "cross_entropy").fit(x, y, verbose=0)
    assert list(check(mlp(), x, y)) == []


def test_a_last_batch_of_one_sample_is_fine_where_samples_have_several_values() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(33, 2, 6), torch.arange(33) % 3
    assert list(check(net, x, y)) == []
    kt.Model(net, backend="cpu").compile("sgd", "cross_entropy").fit(x, y, verbose=0)


def test_last_batch_of_one_is_known_of_loaders_datasets_and_splits() -> None:
    x, y = torch.randn(33, 6), torch.arange(33) % 3
    data = TensorDataset(x, y)
    found = [the_only(check(with_norm(), one), "error", "last-batch-of-one") for one in (DataLoader(data, 8), data)]
    assert "drop_last=True" in found[0].remedy and "batch_size=33" in found[1].remedy
    assert list(check(with_norm(), DataLoader(data, 8, drop_last=True, shuffle=True))) == []
    more, labels = torch.randn(44, 6), torch.randperm(44) % 3
    the_only(check(with_norm(), more, labels, validation_split=0.25), "error", "last-batch-of-one")
    assert list(check(with_norm(), more, labels)) == []
    assert list(check(with_norm(), more, labels, validation_split=0.25, validation_data=(more.clone(), labels))) == []


def test_frozen_norms_take_a_last_batch_of_one() -> None:
    x, y = torch.randn(33, 6), torch.arange(33) % 3
    model = kt.Model(with_norm(), backend="cpu").freeze("1").compile("sgd", "cross_entropy")
    assert names(model.check(x, y, verbose=0)) == ["frozen-parameters"]


def test_batches_of_one_sample_are_found_at_once(x, y) -> None:
    findings = check(with_norm(), x, y, batch_size=1)
    the_only(findings, "error", "batch-of-one", where="1 (BatchNorm1d)", remedy="at least 2 samples")


# Validation.


def test_validation_data_that_was_prepared_in_another_way_is_found(x, y) -> None:
    findings = check(mlp(), x, y, validation_data=(255 * x, y))
    the_only(findings, "warning", "validation-scale", where="validation_data", remedy="in the same way")


def test_validating_on_the_training_data_is_noted(x, y) -> None:
    the_only(check(mlp(), x, y, validation_data=(x, y)), "note", "validation-is-training")
    assert list(check(mlp(), x, y, validation_data=(x.clone(), y))) == []


def test_a_validation_loss_of_nan_is_found(x, y) -> None:
    def forward(self, x):
        return self.second(self.first(x)) if self.training else self.second(self.first(x)) * float("nan")

    the_only(check(Forward(forward), x, y, validation_data=(x.clone(), y)), "error", "loss-not-finite",
             where="validation_data", found="is nan")  # fmt: skip


# Losses and gradients.


def test_a_loss_of_nan_is_traced_to_the_first_layer_that_has_it(x, y) -> None:
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    net = nn.Sequential(nn.Linear(6, 8), Log(), nn.Linear(8, 3))
    one = the_only(check(net, x, y), "error", "loss-not-finite", where="1", remedy="logarithm")
    assert "1 is the first layer to return NaN" in one.found
    by_loss = check(mlp(), x, y, lambda output, target: (output.sum() - output.sum()).log().sqrt())
    the_only(by_loss, "error", "loss-not-finite", where="loss", found="though every layer is finite")


def test_gradients_in_fp16_are_scaled_as_in_fit(x) -> None:
    y, net = torch.rand(N, 1), mlp(classes=1)

    def tiny(output, target):
        return 1e-8 * (output - target).square().mean()

    found = [check(net, x, y, tiny, precision=precision) for precision in ("32", "16")]
    exact, scaled = (float(one.checked.split("gradient norm ")[1].partition(",")[0]) for one in found)
    assert scaled == pytest.approx(exact, rel=0.05) and exact > 0


def test_gradients_that_overflow_in_fp16_are_left_to_the_scaler(x) -> None:
    def steep(output, target):
        return 1e3 * (output - target).square().mean()

    assert not check(mlp(classes=1), x, torch.rand(N, 1), steep, precision="16").errors


def test_a_first_batch_that_is_masked_whole_is_a_note(x, y) -> None:
    batches = [(x[:8], torch.full((8,), -100)), (x[8:], y[8:])]
    the_only(check(mlp(), batches), "note", "masked-targets", where="y", found="batch are -100, which is masked")
    both = {"kind": torch.full((8,), -100), "size": torch.rand(8, 1)}
    heads = check(TwoHeads(), [(torch.randn(8, 64), both)], loss={"kind": "cross_entropy", "size": "mse"})
    assert not heads.errors and ("masked-targets", "y['kind']") in [(one.name, one.where) for one in heads]


def test_a_gradient_of_nan_behind_a_finite_loss_is_found(x) -> None:
    net = Forward(lambda self, x: (self.second(self.first(x)) * 0).norm(dim=1, keepdim=True).sqrt())
    findings = check(net, x, torch.rand(N, 1), "mse")
    the_only(findings, "error", "gradient-not-finite", where="first.weight", remedy="square root")


def test_gradients_that_vanish_and_explode_are_found(x) -> None:
    y = torch.rand(N, 3)
    flat = check(Forward(lambda self, x: self.second(self.first(x)) * 0), x, y, "mse")
    the_only(flat, "warning", "vanishing-gradient", found="norm 0")
    steep = Forward(lambda self, x: self.second(self.first(x)) * 1e4)
    the_only(check(steep, x, y, "mse"), "warning", "exploding-gradient", remedy="clip=1.0")
    clipped = kt.Model(steep, backend="cpu").compile("sgd", "mse", clip=1.0)
    assert list(clipped.check(x, y, verbose=0)) == []


def test_a_loss_far_above_that_of_guessing_is_noted(x, y) -> None:
    loud = Forward(lambda self, x: 30 * self.second(self.first(x)))
    findings = check(loud, x, y)
    the_only(findings, "note", "large-loss", where="outputs", found="guessing among 3 classes has 1.1")
    kinds = {"kind": torch.arange(N) % 10, "size": torch.rand(N, 1)}
    heads = TwoHeads()
    heads.kind.weight.data *= 100
    both = check(heads, torch.randn(N, 64), kinds, {"kind": "cross_entropy", "size": "mse"})
    the_only(both, "note", "large-loss", where="outputs['kind']", found="guessing among 10 classes")
    assert list(check(loud, x, y, nn.CrossEntropyLoss(weight=torch.ones(3)))) == []
    assert list(check(loud, x, y, sample_weight=torch.ones(N))) == []
    assert list(check(mlp(), x, y, nn.CrossEntropyLoss(reduction="sum"))) == []


def test_parameters_without_a_gradient_are_found_by_the_largest_module(x, y) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.partly = nn.Linear(6, 3), mlp(), nn.Linear(6, 3)

        def forward(self, x):
            return self.used(x) + self.partly.bias

    findings = check(Unused(), x, y)
    the_only(findings, "warning", "unused-parameters", where="idle, partly.weight", found="5 of 8 trainable")


def test_samples_that_depend_on_others_are_found(x, y) -> None:
    ids = torch.randint(0, 20, (N, 7))
    the_only(check(Encoder(batch_first=False), ids, ids), "warning", "samples-mix", remedy="batch_first=True")
    shuffled = Forward(lambda self, x: self.second(self.first(x.t().reshape(x.shape))))
    the_only(check(shuffled, x, y), "warning", "samples-mix")


def test_norms_without_statistics_may_mix_samples(x, y) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    assert list(check(net, x, y)) == []


def test_outputs_that_compare_the_samples_may_mix_them(x) -> None:
    net = Forward(lambda self, x: self.first(x) @ self.first(x).T + self.second.bias.sum() + self.second.weight.sum())
    findings = check(net, x, torch.arange(N), lambda output, target: F.cross_entropy(output, target % len(output)))
    assert "samples-mix" not in names(findings) and not findings.errors


def test_dropout_that_stays_on_mixes_no_samples(x, y) -> None:
    net = Forward(lambda self, x: self.second(F.dropout(self.first(x), 0.5, training=True)))
    assert list(check(net, x, y)) == []


# The module and its optimizer.


def test_frozen_parameters_are_noted_by_the_largest_module(x, y) -> None:
    model = kt.Model(nn.Sequential(mlp(6, 8), nn.Linear(8, 3)), backend="cpu").freeze("0", "1.bias")
    findings = model.compile("sgd", "cross_entropy").check(x, y, verbose=0)
    the_only(findings, "note", "frozen-parameters", where="0, 1.bias", found="5 of 6 parameters")


def test_norms_frozen_by_hand_are_noted_since_their_statistics_move(x, y) -> None:
    net = with_norm()
    net[1].requires_grad_(False)
    findings = check(net, x, y)
    assert sorted(names(findings)) == ["frozen-norms-move", "frozen-parameters"]
    one = findings[names(findings).index("frozen-norms-move")]
    assert one.where == "1" and "model.freeze('1')" in one.remedy
    frozen = kt.Model(net, backend="cpu").freeze("1").compile("sgd", "cross_entropy")
    assert names(frozen.check(x, y, verbose=0)) == ["frozen-parameters"]


def test_eval_mode_is_noted_and_left_to_frozen_norms(x, y) -> None:
    the_only(check(with_norm().eval(), x, y), "note", "eval-mode", where="the module", found="5 of 5 modules")
    net = with_norm()
    net[1].eval()
    the_only(check(net, x, y), "note", "eval-mode", where="1")
    frozen = kt.Model(net, backend="cpu").freeze("1").compile("sgd", "cross_entropy")
    assert names(frozen.check(x, y, verbose=0)) == ["frozen-parameters"]


def test_modes_that_the_module_sets_itself_are_noted(x, y) -> None:
    class Stays(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = with_norm()

        def forward(self, x):
            self.net[1].eval()
            return self.net(x)

    the_only(check(Stays(*with_norm()), x, y), "note", "stays-in-eval", where="1")
    the_only(check(Sets(), x, y), "note", "forward-sets-modes", where="net.1")


def test_optimizers_of_other_parameters_are_found(x, y) -> None:
    net = mlp()
    head = torch.optim.SGD(net[2].parameters(), lr=0.1)
    the_only(check(net, x, y, optimizer=head), "warning", "not-in-optimizer", where="0", found="2 of 4 trainable")
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy")
    net[2] = nn.Linear(8, 3)
    findings = model.check(x, y, verbose=0)
    assert names(findings) == ["foreign-parameters", "not-in-optimizer"]
    assert "2 of the 4" in findings[0].found and "Call compile again" in findings[0].remedy and not findings.ok


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_parameters_given_twice_and_in_one_place_are_found(x, y) -> None:
    net = mlp()
    twice = torch.optim.SGD([*net.parameters(), net[2].bias], lr=0.1)
    findings = check(net, x, y, optimizer=twice)
    the_only(findings, "warning", "duplicate-parameters", where="optimizer", found="1 of its 5")
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    tied[1].weight = nn.Parameter(tied[0].weight.data)
    the_only(check(tied, x, y), "warning", "shared-memory", where="0.weight, 1.weight")
    tied[1].requires_grad_(False)
    assert names(check(tied, x, y)) == ["frozen-parameters"]
    tied[1].requires_grad_(True)
    tied[1].weight = tied[0].weight
    assert list(check(tied, x, y)) == []


def test_broken_weights_are_found_and_explain_the_rest(x, y) -> None:
    net = with_norm()
    net[0].weight.data[0, 0] = float("nan")
    net[1].running_var[1] = float("inf")
    the_only(check(net, x, y), "error", "weights-not-finite", where="0.weight, 1.running_var", found="2 of 9")


def test_double_weights_are_noted(x, y) -> None:
    net = mlp().double()
    the_only(check(net, x, y), "note", "float64-weights", where="the module", remedy='precision="64"')


def test_before_compile_the_module_and_its_inputs_are_checked(x, y) -> None:
    model = kt.Model(mlp(), backend="cpu")
    the_only(model.check(x, y, verbose=0), "note", "not-compiled")
    assert names(model.check(x[:, :5], y, verbose=0)) == ["shapes", "not-compiled"]


def test_overrides_are_noted_and_run(x, y) -> None:
    class Halves(kt.Model):
        def train_step(self, batch):
            loss = F.cross_entropy(self.module[0](batch[0]), batch[1])
            self.backward(loss)
            self.optimizer_step()
            return {"loss": loss}

    findings = check(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3)), x, y, model=Halves)
    assert [(one.severity, one.name) for one in findings] == [("note", "unused-parameters"), ("note", "overridden")]
    assert findings[0].where == "1" and "loss at start" in findings.checked
    wrong = check(nn.Sequential(nn.Linear(5, 3)), x, y, model=Halves)
    assert names(wrong) == ["shapes", "overridden"]


# What check itself refuses.


def test_a_generator_is_refused_and_left_whole(x, y) -> None:
    batches = ((x[i : i + 8], y[i : i + 8]) for i in range(0, N, 8))
    with pytest.raises(ValueError, match="data is a generator, which would miss the batch that check takes out of it"):
        check(mlp(), batches)
    with pytest.raises(ValueError, match="validation_data is a generator"):
        check(mlp(), x, y, validation_data=batches)
    assert len(list(batches)) == 5


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"batch_size": 0}, ValueError, "batch_size=0 is less than 1"),
    ({"batch_size": 2.5}, TypeError, "batch_size=2.5 is a float"),
    ({"validation_split": 1.0}, ValueError, "validation_split=1.0 is not a fraction"),
], ids=str)  # fmt: skip
def test_arguments_that_are_none_are_refused(x, y, options, error, text) -> None:
    with pytest.raises(error, match=text):
        check(mlp(), x, y, **options)


def test_endless_data_is_read_for_one_batch_only(x, y) -> None:
    class Endless(IterableDataset):
        taken = 0

        def __iter__(self):
            while True:
                type(self).taken += 1
                yield x[0], y[0]

    assert list(check(mlp(), Endless(), batch_size=8)) == []
    assert Endless.taken <= 9


def test_partial_functions_are_known_as_the_functions_are(x) -> None:
    weighed = partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor([2.0]))
    the_only(check(mlp(classes=1), x, 2 * torch.ones(N, 1).cumsum(0), weighed), "error", "target-range")
