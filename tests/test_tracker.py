"""The tracker: epoch means by hand, logs that keep their moment, reads only when somebody looks, and what is kept."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kerastorch as kt
from kerastorch import losses, tracker
from kerastorch.backends import Single
from kerastorch.tracker import Tracker

SAMPLES, BATCH = 30, 4  # seven whole batches and a half
LOSSES = {"kind": "cross_entropy", "size": ("mse", 0.5)}


class KeepLogs(kt.Callback):
    """Keeps the logs of each batch, unread."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def on_train_batch_end(self, batch, logs=None):
        self.kept.append(logs)

    on_test_batch_end = on_train_batch_end


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.size = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"kind": self.kind(x), "size": self.size(x)}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def reads(monkeypatch) -> list:
    """Grows by one at each read of the sums."""
    found, read = [], Tracker._read
    monkeypatch.setattr(Tracker, "_read", lambda self, *sums, **how: found.append(1) or read(self, *sums, **how))
    return found


def means_so_far(values: Tensor) -> list:
    """Mean of all samples up to the end of each batch."""
    return [pytest.approx(values[: start + BATCH].mean().item(), rel=1e-5) for start in range(0, len(values), BATCH)]


def classifier(**options) -> kt.Model:
    return kt.Model(nn.Linear(5, 3), backend="cpu").compile("sgd", "cross_entropy", lr=0.0, **options)


def classified(model: kt.Model) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data, and the loss and the rightness of each sample."""
    x, y = torch.randn(SAMPLES, 5), torch.arange(SAMPLES) % 3
    output = model(x)
    return x, y, F.cross_entropy(output, y, reduction="none"), (output.argmax(1) == y).float()


# Means.


def test_epoch_means_weigh_the_short_last_batch_by_its_samples() -> None:
    model = classifier(metrics=["accuracy", lambda output, target: output.mean()])
    x, y, losses, right = classified(model)
    history = model.fit(x, y, batch_size=BATCH, epochs=2, validation_data=(x[:9], y[:9]), verbose=0).history
    assert history["loss"] == [pytest.approx(losses.mean().item())] * 2
    assert history["accuracy"] == [pytest.approx(right.mean().item())] * 2
    assert history["<lambda>"] == [pytest.approx(model(x).mean().item(), abs=1e-6)] * 2
    assert history["val_loss"] == [pytest.approx(losses[:9].mean().item())] * 2


@pytest.mark.parametrize("size", [1, 2, 3, SAMPLES, 1000])
def test_means_do_not_depend_on_the_batch_size(size) -> None:
    model = classifier(metrics=["accuracy", "f1"])
    x, y, losses, right = classified(model)
    loss, accuracy, f1 = model.evaluate(x, y, batch_size=size, verbose=0)
    assert loss == pytest.approx(losses.mean().item())
    assert accuracy == pytest.approx(right.mean().item())
    assert f1 == model.evaluate(x, y, verbose=0)[2]


def test_batches_of_changing_sizes_count_by_their_samples() -> None:
    model = classifier(metrics=["accuracy"])
    x, y, losses, right = classified(model)
    batches = list(zip(x.split([1, 1, 8, 8, 3, 9]), y.split([1, 1, 8, 8, 3, 9]), strict=True))
    assert model.evaluate(batches, verbose=0) == pytest.approx([losses.mean().item(), right.mean().item()])


def test_values_of_history_are_plain_numbers() -> None:
    model = classifier(metrics=["accuracy", "f1"])
    x, y, *_ = classified(model)
    assert {type(values[0]) for values in model.fit(x, y, verbose=0).history.values()} == {float}


def test_batch_verbs_return_the_batchs_own_values_before_the_update() -> None:
    model = classifier(metrics=["accuracy"])
    x, y, losses, right = classified(model)
    model.optimizer.param_groups[0]["lr"] = 1.0
    expected = [pytest.approx(losses[:9].mean().item()), pytest.approx(right[:9].mean().item())]
    assert model.test_on_batch(x[9:], y[9:]) != expected
    assert model.test_on_batch(x[:9], y[:9]) == expected
    assert model.train_on_batch(x[:9], y[:9]) == expected
    assert model.train_on_batch(x[:9], y[:9]) != expected


def test_counts_beyond_2_to_the_24_are_exact() -> None:
    """In float32, 2**24 + 1 is 2**24."""
    sums, one = Tracker(losses.get("mse"), [], Single("cpu")), torch.tensor(1.0)
    sums.add(one, one, None, 2**24)
    sums.add(one, one, None, 1)
    assert sums.samples == 2**24 + 1
    assert sums.result() == {"loss": 1.0}


# Logs.


@pytest.mark.parametrize("pending", [1, 3, 64])
def test_logs_keep_the_means_of_their_moment_even_if_read_later(pending, monkeypatch) -> None:
    monkeypatch.setattr(tracker, "MAX_PENDING", pending)
    model, keeper = classifier(metrics=["accuracy"]), KeepLogs()
    x, y, losses, right = classified(model)
    model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, callbacks=[keeper], verbose=0)
    assert len(keeper.kept) == 16
    for number in (7, 3, 0, 1, 2, 4, 5, 6):  # in any order
        for logs in (keeper.kept[8 + number], keeper.kept[number]):
            assert logs["loss"] == means_so_far(losses)[number]
            assert logs["accuracy"] == means_so_far(right)[number]


@pytest.mark.parametrize("pending", [1, 3, 64])
def test_logs_of_a_loss_without_masks_keep_their_moment(pending, monkeypatch) -> None:
    """It counts samples, of which the last batch has fewer, and the next epoch none yet."""
    monkeypatch.setattr(tracker, "MAX_PENDING", pending)
    net, keeper, x, y = nn.Linear(5, 1), KeepLogs(), torch.randn(SAMPLES, 5), torch.randn(SAMPLES, 1)
    model = kt.Model(net, backend="cpu").compile("sgd", "mse", lr=0.0)
    model.fit(x, y, batch_size=BATCH, shuffle=False, callbacks=[keeper], verbose=0)
    model.evaluate(x, y, verbose=0)
    assert [logs["loss"] for logs in keeper.kept] == means_so_far((net(x) - y).detach().square()[:, 0])


def test_logs_read_now_and_then_do_not_change_those_in_between() -> None:
    class ReadSome(KeepLogs):
        def on_test_batch_end(self, batch, logs=None):
            self.kept.append(logs if batch % 3 else dict(logs))

    model, keeper = classifier(), ReadSome()
    x, y, losses, _ = classified(model)
    loss = model.evaluate(x, y, batch_size=BATCH, callbacks=[keeper], verbose=0)
    assert [logs["loss"] for logs in keeper.kept] == means_so_far(losses)
    assert loss == means_so_far(losses)[-1]


def test_logs_of_several_outputs_keep_their_moment() -> None:
    net, keeper, x = TwoHeads(), KeepLogs(), torch.randn(SAMPLES, 5)
    y = {"kind": torch.arange(SAMPLES) % 3, "size": torch.randn(SAMPLES, 1)}
    kinds = F.cross_entropy(net(x)["kind"], y["kind"], reduction="none").detach()
    sizes = (net(x)["size"] - y["size"]).detach().square()[:, 0]
    model = kt.Model(net, backend="cpu").compile(loss=LOSSES)
    model.evaluate(x, y, batch_size=BATCH, callbacks=[keeper], verbose=0)
    assert [logs["kind_loss"] for logs in keeper.kept] == means_so_far(kinds)
    assert [logs["size_loss"] for logs in keeper.kept] == means_so_far(sizes)
    assert [logs["loss"] for logs in keeper.kept] == means_so_far(kinds + 0.5 * sizes)


def test_value_put_into_logs_stays_there() -> None:
    model, keeper = classifier(), KeepLogs()
    x, y, *_ = classified(model)
    model.fit(x, y, batch_size=BATCH, callbacks=[keeper], verbose=0)
    logs = keeper.kept[2]
    logs["lr"] = 0.5
    assert dict(logs) == {"loss": logs["loss"], "lr": 0.5}


# Reads.


def test_logs_or_nothing_reads_nothing(reads) -> None:
    class Polite(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.logs = logs or {}

    model, callback = classifier(metrics=["accuracy"]), Polite()
    x, y, *_ = classified(model)
    model.fit(x, y, batch_size=BATCH, epochs=3, callbacks=[callback], verbose=0)
    assert len(reads) == 3  # one for each epoch
    assert callback.logs["loss"] and callback.logs["accuracy"] is not None
    assert len(reads) == 4  # and one for the logs, however often they are asked


def test_epoch_without_batch_hooks_reads_the_device_once_for_training_and_once_for_validation(reads) -> None:
    model = classifier(metrics=["accuracy"])
    x, y, *_ = classified(model)
    model.fit(x, y, batch_size=BATCH, epochs=2, validation_data=(x, y), verbose=0)
    assert len(reads) == 4


# What is kept.


class Counted(nn.Module):
    """Returns zeros in memory of which it can tell whether it is still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = []

    def forward(self, x: Tensor) -> Tensor:
        array = np.zeros(x.shape, np.float32)
        self.outputs.append(weakref.ref(array))
        return torch.from_numpy(array)

    def kept(self) -> int:
        return sum(output() is not None for output in self.outputs)


@pytest.mark.parametrize(("values", "kept"), [(2**18, 64), (200, 10), (20, 1), (19, 1)])
def test_outputs_wait_up_to_so_many_values_and_large_ones_not_at_all(values, kept, monkeypatch) -> None:
    """Batches of four samples with five values each."""
    monkeypatch.setattr(tracker, "MAX_PENDING_VALUES", values)
    net, most = Counted(), []

    class Watch(kt.Callback):
        def on_test_batch_end(self, batch, logs=None):
            most.append(net.kept())

    model = kt.Model(net, backend="cpu").compile(loss="mse", metrics=["mae"])
    model.evaluate(torch.ones(800, 5), torch.ones(800, 5), batch_size=BATCH, callbacks=[Watch()], verbose=0)
    assert len(most) == 200
    # The last of them are summed when the next comes in; one more is the output that has just been made.
    assert kept - 1 <= max(most) <= kept
    assert net.kept() == 0


def graphs():
    """All tensors there are that were computed with a graph."""
    return [one for one in gc.get_objects() if type(one) is Tensor and one.grad_fn is not None]


@pytest.mark.parametrize("case", ["one output", "several outputs", "own loss"])
def test_nothing_of_the_graph_is_kept_after_a_step(case) -> None:
    class OwnLoss(nn.Linear):
        def forward(self, x, y):
            output = super().forward(x)
            return {"loss": F.cross_entropy(output, y), "logits": output}

    alive = []

    class Watch(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            alive.extend(one for one in graphs() if id(one) not in others)

    x, kinds = torch.randn(8, 5), torch.arange(8) % 3
    net, loss, y = {
        "one output": lambda: (nn.Linear(5, 3), "cross_entropy", kinds),
        "several outputs": lambda: (TwoHeads(), LOSSES, {"kind": kinds, "size": torch.randn(8, 1)}),
        "own loss": lambda: (OwnLoss(5, 3), None, kinds),
    }[case]()
    gc.collect()  # what errors in other tests have left in cycles
    others = {id(one): one for one in graphs()}  # what they have left elsewhere
    kt.Model(net, backend="cpu").compile("sgd", loss).fit(x, y, batch_size=4, callbacks=[Watch()], verbose=0)
    assert not alive
