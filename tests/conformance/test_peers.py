"""The same training elsewhere: a loop by hand, Lightning, Poutyne, skorch, Transformers and Hugging Face's datasets."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt

pytestmark = pytest.mark.conformance

SAMPLES, BATCH, EPOCHS, RATE = 70, 16, 3, 0.05
ORDERS = ["in order", "shuffled", "shuffled by its own generator"]
CLOSE = {"rel": 1e-5, "abs": 1e-6}


def _problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return x, (x @ torch.randn(4, 3, generator=generator)).argmax(1)


def _net():
    torch.manual_seed(0)
    # No bias under the norm: its gradient is rounding alone, which Adam would blow up to full steps.
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def _loader(seed=0, order="in order"):
    """Batches in one of the orders of `ORDERS`."""
    generator = torch.Generator().manual_seed(2) if order == "shuffled by its own generator" else None
    return DataLoader(TensorDataset(*_problem(seed)), BATCH, shuffle=order != "in order", generator=generator)


def _by_hand(net, loader, optimizer, validation=None):
    """The loop everybody writes; returns the mean losses of each epoch, weighted by samples."""
    history = {"loss": [], "val_loss": []}
    for _ in range(EPOCHS):
        net.train()
        total = samples = 0
        for x, y in loader:
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, samples = total + loss.item() * len(y), samples + len(y)
        history["loss"].append(total / samples)
        if validation is not None:
            net.eval()
            with torch.no_grad():
                sums = [(F.cross_entropy(net(x), y, reduction="sum").item(), len(y)) for x, y in validation]
            history["val_loss"].append(sum(total for total, _ in sums) / sum(samples for _, samples in sums))
    return history


def _assert_same_state(net, other):
    for (name, ours), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


@pytest.fixture
def reference(order):
    """`(net, history)` of the loop by hand. Dropout draws from torch's generator: the order of draws must match too."""
    net = _net()
    torch.manual_seed(1)
    return net, _by_hand(net, _loader(order=order), torch.optim.Adam(net.parameters(), RATE), _loader(1))


def test_kerastorch_is_the_loop_by_hand(order, reference):
    net = _net()
    model = kt.Model(net, backend="cpu").compile("adam", "cross_entropy", lr=RATE)
    torch.manual_seed(1)
    history = model.fit(_loader(order=order), validation_data=_loader(1), epochs=EPOCHS, verbose=0).history
    _assert_same_state(net, reference[0])
    assert history == {name: pytest.approx(values, **CLOSE) for name, values in reference[1].items()}


@pytest.mark.filterwarnings("ignore")  # of workers, loggers and the like
def test_lightning_is_the_loop_by_hand_and_so_is_kerastorch(order, reference):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.history = _net(), {"loss": [], "val_loss": []}

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), RATE)

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[1]))
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), batch_size=len(batch[1]))

        def on_train_epoch_end(self):
            for name, values in self.history.items():
                values.append(self.trainer.callback_metrics[name].item())

    classifier = Classifier()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    torch.manual_seed(1)
    trainer.fit(classifier, _loader(order=order), _loader(1))
    _assert_same_state(classifier.net, reference[0])
    assert classifier.history == {name: pytest.approx(values, **CLOSE) for name, values in reference[1].items()}


def test_poutyne_has_the_same_losses_and_weights(order, reference):
    poutyne = pytest.importorskip("poutyne")
    net = _net()
    model = poutyne.Model(net, torch.optim.Adam(net.parameters(), RATE), "cross_entropy")
    torch.manual_seed(1)
    logs = model.fit_generator(_loader(order=order), _loader(1), epochs=EPOCHS, verbose=False)
    _assert_same_state(net, reference[0])
    for name, values in reference[1].items():
        assert [log[name] for log in logs] == pytest.approx(values, **CLOSE)


def test_skorch_has_the_same_losses_and_weights():
    skorch = pytest.importorskip("skorch")
    x, y = _problem()
    net = skorch.NeuralNet(
        _net(),
        nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=RATE,
        batch_size=BATCH,
        max_epochs=EPOCHS,
        train_split=None,
        iterator_train__shuffle=False,
        verbose=0,
    ).initialize()
    torch.manual_seed(1)
    net.partial_fit(x, y)
    ours = _net()
    model = kt.Model(ours, backend="cpu").compile("adam", "cross_entropy", lr=RATE)
    torch.manual_seed(1)
    history = model.fit(_loader(), epochs=EPOCHS, verbose=0).history
    _assert_same_state(ours, net.module_)
    assert history["loss"] == pytest.approx([row["train_loss"] for row in net.history], **CLOSE)


# Transformers and datasets.


def _tokens():
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 9, 24)
    tokens = generator.integers(1, 30, (24, 8))
    mask = (np.arange(8) < lengths[:, None]).astype(int)
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": tokens[:, 0] % 2}


def _bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            num_labels=2,
        )
    )


@pytest.fixture(scope="module")
def bert_by_hand():
    net, columns = _bert(), {name: torch.as_tensor(column) for name, column in _tokens().items()}
    optimizer, losses = torch.optim.AdamW(net.parameters(), 1e-3), []
    torch.manual_seed(1)
    net.train()
    for _ in range(2):
        total = 0.0
        for start in range(0, 24, 9):  # 9, 9 and 6
            batch = {name: column[start : start + 9] for name, column in columns.items()}
            loss = net(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(batch["labels"])
        losses.append(total / 24)
    return net, losses


@pytest.mark.parametrize("form", ["columns", "datasets.Dataset"])
def test_a_transformer_with_a_loss_of_its_own_trains_as_by_hand(form, bert_by_hand):
    data = _tokens()
    if form == "datasets.Dataset":
        data = pytest.importorskip("datasets").Dataset.from_dict(data)
    net = _bert()
    model = kt.Model(net, backend="cpu").compile("adamw", lr=1e-3)
    torch.manual_seed(1)
    history = model.fit(data, epochs=2, batch_size=9, shuffle=False, verbose=0).history
    assert history == {"loss": pytest.approx(bert_by_hand[1], **CLOSE)}
    for ours, theirs in zip(net.parameters(), bert_by_hand[0].parameters(), strict=True):
        # Adam divides by the root of squares: weights whose gradients are next to nothing amplify rounding.
        np.testing.assert_allclose(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-4)
    evaluated = model.evaluate(data, batch_size=9, verbose=0)
    columns = {name: torch.as_tensor(column) for name, column in _tokens().items()}
    with torch.no_grad():
        assert evaluated == pytest.approx(net.eval()(**columns).loss.item(), rel=1e-5)


def test_a_transformer_predicts_a_structure_in_input_order():
    columns = {name: column for name, column in _tokens().items() if name != "labels"}
    net = _bert().eval()
    with torch.no_grad():
        theirs = net(**{name: torch.as_tensor(column) for name, column in columns.items()}).logits
    ours = kt.Model(net, backend="cpu").predict(columns, batch_size=9, verbose=0)
    np.testing.assert_allclose(ours["logits"], theirs.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [BATCH, None])
def test_a_column_of_a_dataset_may_be_the_target(batch_size):
    datasets = pytest.importorskip("datasets")
    x, y = _problem()
    dataset = datasets.Dataset.from_dict({"x": x.numpy(), "label": y.numpy()})
    options = {"epochs": EPOCHS, "batch_size": batch_size, "shuffle": False, "verbose": 0, "validation_split": 0.2}
    nets, histories = (_net(), _net()), []
    for net, data in zip(nets, ((x, y), (dataset, "label")), strict=True):
        model = kt.Model(net, backend="cpu").compile("adam", "cross_entropy", metrics=["accuracy"], lr=RATE)
        torch.manual_seed(1)
        histories.append(model.fit(*data, **options).history)
    assert histories[0] == {name: pytest.approx(values, **CLOSE) for name, values in histories[1].items()}
    _assert_same_state(*nets)


def test_a_dataset_shuffles_in_the_order_of_arrays():
    datasets = pytest.importorskip("datasets")
    x, y = _problem()
    dataset = datasets.Dataset.from_dict({"x": x.numpy(), "label": y.numpy()})
    histories = []
    for data in ((x, y), (dataset, "label")):
        kt.set_seed(0)
        model = kt.Model(_net(), backend="cpu").compile("sgd", "cross_entropy", lr=RATE)
        kt.set_seed(1)
        histories.append(model.fit(*data, epochs=EPOCHS, verbose=0).history["loss"])
    assert histories[0] == pytest.approx(histories[1], **CLOSE)


def test_a_module_that_was_trained_elsewhere_evaluates_the_same_here():
    net = _net()
    _by_hand(net, _loader(), torch.optim.SGD(net.parameters(), RATE))
    other = copy.deepcopy(net)
    x, y = _problem(1)
    with torch.no_grad():
        logits = other.eval()(x)
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", metrics=["accuracy"])
    assert model.evaluate(x, y, verbose=0) == pytest.approx(
        [F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()], **CLOSE
    )
