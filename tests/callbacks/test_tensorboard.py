"""TensorBoard's event files, read back by tensorboard's own reader; and that writing them disturbs nothing."""

from __future__ import annotations

import copy
import io
import os
import random
import shutil
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import TensorBoard
from kerastorch.callbacks.base import hooks_of
from kerastorch.history import Logs
from tests.reference import same_weights

BATCH, STEPS = 32, 5


@pytest.fixture
def net():
    """With statistics, random numbers, and a part to freeze."""
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "logs"


def compiled(net, optimizer="sgd", **options):
    model = kt.Model(copy.deepcopy(net), backend="cpu")
    return model.compile(optimizer, "cross_entropy", **{"lr": 0.1, "metrics": ["accuracy"]} | options)


def fit(model, data, *callbacks, **options):
    options = {"epochs": 3, "batch_size": BATCH, "verbose": 0} | options
    return model.fit(*data, callbacks=list(callbacks), **options)


def reader(folder, run="train"):
    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder / run), size_guidance=everything).Reload()


def scalars(folder, run="train"):
    """`{tag: [(step, value)]}`."""
    events = reader(folder, run)
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def numbered(values, first=0):
    return [(number, pytest.approx(value)) for number, value in enumerate(values, first)]


# Scalars.


def test_training_and_validation_have_the_same_tags_in_folders_of_their_own(net, digits, folder):
    history = fit(compiled(net), digits, TensorBoard(folder), validation_data=digits).history
    assert scalars(folder) == {
        "epoch_loss": numbered(history["loss"]),
        "epoch_accuracy": numbered(history["accuracy"]),
        "epoch_learning_rate": numbered([0.1] * 3),
    }
    expected = {f"epoch_{name}": numbered(history[f"val_{name}"]) for name in ("loss", "accuracy")}
    for name in ("loss", "accuracy"):
        over_steps = [(STEPS * (epoch + 1), value) for epoch, value in expected[f"epoch_{name}"]]
        expected[f"evaluation_{name}_vs_iterations"] = over_steps
    assert scalars(folder, "validation") == expected


def test_without_validation_there_is_no_folder_for_it(net, digits, folder):
    fit(compiled(net), digits, TensorBoard(folder))
    assert sorted(name for name in os.listdir(folder) if "tfevents" not in name) == ["train"]


@pytest.mark.parametrize(("freq", "due"), [("batch", range(1, 11)), (1, range(1, 11)), (4, [4, 8])])
def test_batches_are_written_as_often_as_asked_for(net, digits, folder, freq, due):
    class Means(kt.Callback):
        seen = {}

        def on_train_batch_end(self, batch, logs=None):
            self.seen[len(self.seen) + 1] = logs["loss"]

    means = Means()
    means.seen = {}
    fit(compiled(net), digits, means, TensorBoard(folder, update_freq=freq), epochs=2)
    found = scalars(folder)
    assert found["batch_loss"] == [(number, pytest.approx(means.seen[number])) for number in due]
    assert [step for step, _ in found["batch_accuracy"]] == list(due) and "batch_learning_rate" not in found


@pytest.mark.parametrize(("options", "reads"), [({}, 0), ({"update_freq": 4}, 2), ({"histogram_freq": 1}, 0)])
def test_the_device_is_read_where_it_is_due_and_nowhere_else(net, digits, folder, monkeypatch, options, reads):
    seen, known = [], Logs._known

    def count(self):
        if self._values is None:
            seen.append(self)
        return known(self)

    monkeypatch.setattr(Logs, "_known", count)
    board = TensorBoard(folder, **options)
    fit(compiled(net), digits, board, epochs=2)
    assert len(seen) == reads
    hooks = hooks_of([board])
    assert bool(hooks.on_train_batch_end) == ("update_freq" in options)
    assert bool(hooks.on_before_optimizer_step) == ("histogram_freq" in options)
    assert not hooks.on_train_batch_begin and not hooks.on_test_batch_end


def test_steps_per_second_are_those_of_the_clock(net, digits, folder, monkeypatch):
    clock = iter(range(100))  # looked at when an epoch begins, after a batch that is due, and when an epoch ends
    monkeypatch.setattr(kt.callbacks.tensorboard.time, "monotonic", lambda: 0.5 * next(clock))
    board = TensorBoard(folder, write_graph=False, write_steps_per_second=True, update_freq=2)
    fit(compiled(net), digits, board, epochs=2)
    found = scalars(folder)
    # Epochs of 5 batches: due are 2, 4 of the first and 6, 8, 10; half a second lies between two looks.
    assert found["batch_steps_per_second"] == [(2, 4.0), (4, 4.0), (6, 2.0), (8, 4.0), (10, 4.0)]
    assert found["epoch_steps_per_second"] == numbered([5 / 1.5, 5 / 2.0])


def test_by_default_no_pace_is_written(net, digits, folder):
    fit(compiled(net), digits, TensorBoard(folder, update_freq=1))
    assert not [tag for tag in scalars(folder) if "per_second" in tag]


def test_each_epoch_is_in_the_file_when_it_is_over(net, digits, folder):
    seen = []

    class Look(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append([len(scalars(folder, run)["epoch_loss"]) for run in ("train", "validation")])

    fit(compiled(net), digits, TensorBoard(folder), Look(), validation_data=digits)
    assert seen == [[1, 1], [2, 2], [3, 3]]


def test_validations_within_an_epoch_are_in_the_file_at_once(net, digits, folder):
    seen = []

    class Interval(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            board.on_interval_end(0, {"loss": 2.0, "val_loss": 3.0})
            (values,) = scalars(folder, "validation").values()
            seen.append([step for step, _ in values])

    board = TensorBoard(folder)
    fit(compiled(net), digits, Interval(), board, epochs=1)
    assert seen == [list(range(1, count + 1)) for count in range(1, STEPS + 1)]
    assert scalars(folder, "validation") == {"evaluation_loss_vs_iterations": [(step, 3.0) for step in range(1, 6)]}
    assert "interval_loss" not in scalars(folder)


def test_evaluate_writes_over_the_steps_of_the_fit_before_it(net, digits, folder):
    model, board = compiled(net), TensorBoard(folder)
    fit(model, digits, board, epochs=2)
    loss, accuracy = model.evaluate(*digits, callbacks=[board], verbose=0)
    assert scalars(folder, "validation") == {
        "evaluation_loss_vs_iterations": [(10, pytest.approx(loss))],
        "evaluation_accuracy_vs_iterations": [(10, pytest.approx(accuracy))],
    }
    assert not board._writers


def test_values_that_are_no_numbers_are_left_out(net, digits, folder):
    class Adds(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs |= {"text": "a", "several": {"a": 1}, "tensor": torch.tensor(0.5), "nan": float("nan")}

    fit(compiled(net), digits, Adds(), TensorBoard(folder, write_images=True), epochs=1)
    found = scalars(folder)
    assert found["epoch_tensor"] == [(0, 0.5)] and "epoch_nan" in found
    assert not {"epoch_text", "epoch_several"} & set(found)


# Runs one after the other, and ways to end.


def test_a_second_fit_writes_beside_the_first(net, digits, folder):
    model, board = compiled(net), TensorBoard(folder, update_freq=5)
    first = fit(model, digits, board, epochs=2).history["loss"]
    second = fit(model, digits, board, initial_epoch=2, epochs=4).history["loss"]
    found = scalars(folder)
    assert found["epoch_loss"] == numbered(first + second)
    assert [step for step, _ in found["batch_loss"]] == [5, 10, 5, 10]
    assert len(os.listdir(folder / "train")) == 2


def test_a_second_fit_has_a_graph_too(net, digits, folder):
    model, board = compiled(net), TensorBoard(folder)
    fit(model, digits, board)
    shutil.rmtree(folder)
    fit(model, digits, board)
    assert nodes(folder)


def test_a_run_that_goes_on_from_a_state_counts_on(net, digits, folder):
    board = TensorBoard(folder, update_freq=5)
    fit(compiled(net), digits, board, epochs=2, validation_data=digits)
    buffer = io.BytesIO()
    torch.save(board.state_dict(), buffer)
    buffer.seek(0)
    other = TensorBoard(folder, update_freq=5)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.state_dict() == {"batches": 10, "steps": 10}
    model = compiled(net)
    fit(model, digits, other, initial_epoch=2, epochs=4, validation_data=digits)
    assert [step for step, _ in scalars(folder)["batch_loss"]] == [5, 10, 15, 20]
    assert [step for step, _ in scalars(folder, "validation")["evaluation_loss_vs_iterations"]] == [5, 10, 15, 20]
    fit(model, digits, other, epochs=1)
    assert other.state_dict() == {"batches": 5, "steps": 5}


def fail():
    raise RuntimeError("broken")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("act", "epochs"), [(fail, [0]), (interrupt, [0, 1])])
def test_a_run_that_ends_early_leaves_whole_files_and_nothing_open(net, digits, folder, act, epochs):
    class Act(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if (self.epoch, batch) == (1, 2):
                act()

    board, model, threads = TensorBoard(folder, histogram_freq=1), compiled(net), threading.active_count()
    try:
        fit(model, digits, board, Act(), validation_data=digits)
    except RuntimeError:
        assert act is fail
    found = [[epoch for epoch, _ in scalars(folder, run)["epoch_loss"]] for run in ("train", "validation")]
    assert found == [epochs, [0]]
    assert not board._writers and threading.active_count() == threads
    assert not model.module._forward_pre_hooks


def test_an_error_before_the_first_batch_leaves_no_hook_in_the_module(net, digits, folder):
    class Fails(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            fail()

    model = compiled(net)
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, digits, TensorBoard(folder), Fails())
    assert not model.module._forward_pre_hooks


def test_in_a_dry_run_the_files_are_elsewhere(net, digits, folder, tmp_path):
    model = compiled(net)
    model._dry_run_folder = tmp_path / "dry"
    fit(model, digits, TensorBoard(folder), validation_data=digits)
    assert not folder.exists() and len(scalars(model.path_for(folder))["epoch_loss"]) == 3


# Histograms.


def test_histograms_are_those_of_the_weights_after_and_the_gradients_in_the_epoch(net, digits, folder):
    gradients, weights = [], []

    class Look(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.is_first = True

        def on_before_optimizer_step(self, optimizer):
            if self.is_first:
                gradients.append({name: one.grad.clone() for name, one in self.model.module.named_parameters()})
            self.is_first = False

        def on_epoch_end(self, epoch, logs=None):
            weights.append({name: one.detach().clone() for name, one in self.model.module.named_parameters()})

    fit(compiled(net, clip=0.01), digits, TensorBoard(folder, histogram_freq=2), Look(), epochs=4)
    events = reader(folder)
    names = [name for name, _ in net.named_parameters()]
    assert set(events.Tags()["histograms"]) == {
        f"{name.replace('.', '/')}/{kind}" for name in names for kind in ("histogram", "gradient_histogram")
    }
    for kind, seen in (("histogram", weights), ("gradient_histogram", gradients)):
        for name in names:
            found = events.Histograms(f"{name.replace('.', '/')}/{kind}")
            assert [one.step for one in found] == [0, 2]
            for one in found:
                values, histogram = seen[one.step][name].double(), one.histogram_value
                assert histogram.num == values.numel() == sum(histogram.bucket)
                assert (histogram.min, histogram.max) == (values.min(), values.max())
                assert histogram.sum == pytest.approx(values.sum().item(), abs=1e-6)


def test_histograms_of_what_has_no_finite_values_none_or_others(digits, folder):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)
            self.table = nn.Embedding(4, 10, sparse=True)
            self.nan = nn.Parameter(torch.full((3,), torch.nan))
            self.mixed = nn.Parameter(torch.tensor([1.0, torch.inf]))
            self.empty = nn.Parameter(torch.empty(0))
            self.low = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
            self.complex = nn.Parameter(torch.tensor([1 + 2j]))

        def forward(self, x):
            return self.linear(x) + self.table(torch.zeros(len(x), dtype=torch.long, device=x.device))

    fit(compiled(Odd()), digits, TensorBoard(folder, histogram_freq=1), epochs=1)
    events = reader(folder)
    sizes = {tag: events.Histograms(tag)[0].histogram_value.num for tag in events.Tags()["histograms"]}
    assert sizes == {
        "linear/weight/histogram": 640, "linear/bias/histogram": 10, "table/weight/histogram": 40, "mixed/histogram": 1,
        "low/histogram": 5, "complex/histogram": 2, "linear/weight/gradient_histogram": 640,
        "linear/bias/gradient_histogram": 10, "table/weight/gradient_histogram": 10,
    }  # fmt: skip


def test_gradients_of_several_optimizers_are_all_there(digits, folder):
    class Twins(kt.Model):
        def train_step(self, batch):
            x, y = batch
            loss = nn.functional.cross_entropy(self.module["left"](x) + self.module["right"](x), y)
            self.backward(loss)
            self.optimizer_step("left")
            self.optimizer_step("right")
            self.log("loss", loss)

    net = nn.ModuleDict({"left": nn.Linear(64, 10), "right": nn.Linear(64, 10)})
    model = Twins(net, backend="cpu").compile({"left": "sgd", "right": "adam"}, "cross_entropy")
    with pytest.warns(UserWarning, match="no graph to write: in its first epoch the module itself was not called"):
        fit(model, digits, TensorBoard(folder, histogram_freq=1), epochs=2)
    events = reader(folder)
    for name in ("left/weight", "left/bias", "right/weight", "right/bias"):
        assert [one.step for one in events.Histograms(f"{name}/gradient_histogram")] == [0, 1]
    rates = [scalars(folder)[f"epoch_learning_rate_{name}"] for name in ("left", "right")]
    assert rates == [numbered([0.001] * 2), numbered([0.001] * 2)]
    assert not model.module._forward_pre_hooks


# The graph.


def nodes(folder):
    events = reader(folder)
    return [node.name for node in events.Graph().node] if events.Tags()["graph"] else None


def test_the_graph_has_the_parts_of_the_module(net, digits, folder):
    fit(compiled(net), digits, TensorBoard(folder))
    found = nodes(folder)
    for part in ("Linear[0]", "BatchNorm1d[1]", "ReLU[2]", "Linear[4]"):
        assert any(f"Sequential/{part}" in name for name in found)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("precision", ["32", "bf16", "64"])
def test_all_that_is_written_leaves_the_run_as_it_is_bit_for_bit(net, digits, folder, epochs, precision):
    def run(*callbacks):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        model = compiled(net, "adam", precision=precision).freeze("0", "1")
        history = fit(model, digits, *callbacks, epochs=epochs, validation_split=0.2)
        return model.module, history.history, torch.rand(3), np.random.rand(3), random.random()

    board = TensorBoard(folder, histogram_freq=1, write_images=True, write_steps_per_second=True, update_freq=1)
    (ours, history, *drawn), (theirs, plain, *expected) = run(board), run()
    assert same_weights(ours, theirs) and history == plain
    assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True))
    assert nodes(folder)


def test_tracing_leaves_modes_gradients_and_what_a_module_counts(digits, folder):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)
            self.register_buffer("seen", torch.zeros(()))
            self.calls, self.modes = 0, []

        def forward(self, x):
            self.calls += 1
            self.modes.append((self.training, self.norm.training))
            self.seen += len(x)
            torch.rand(())
            return self.head(self.norm(x))

    def run(*callbacks):
        torch.manual_seed(0)
        model = compiled(Counts().train()).freeze("norm")
        fit(model, digits, *callbacks, epochs=1)
        return model.module, torch.rand(())

    (ours, drawn), (theirs, expected) = run(TensorBoard(folder)), run()
    assert nodes(folder) and same_weights(ours, theirs) and drawn == expected
    assert ours.calls == theirs.calls == STEPS and ours.modes == theirs.modes == [(True, False)] * STEPS


class Several(nn.Module):
    """Takes several inputs, of which some are no tensors; may return a dict."""

    def __init__(self, name=None):
        super().__init__()
        self.head, self.name = nn.Linear(64, 10), name

    def forward(self, a, b=None, scale=2.0):
        output = self.head(a if b is None else a + b) * scale
        return output if self.name is None else {self.name: output}


class Scaled(kt.Model):
    def compute_loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.module(scale=3.0, a=x, b=x), y)


@pytest.mark.parametrize(
    ("kind", "number"),
    [("dict", 2), ("tuple", 2), ("one", 1), ("generator", 1), ("named, not all tensors", 2), ("dict out", 1)],
)
def test_inputs_and_outputs_of_any_form_are_traced(digits, folder, kind, number):
    x, y = digits
    board, model = TensorBoard(folder), compiled(Several())
    if kind == "generator":
        model.fit(((x[:BATCH], y[:BATCH]) for _ in range(3)), callbacks=board, verbose=0)
    elif kind == "named, not all tensors":
        fit(Scaled(Several(), backend="cpu").compile("sgd", "cross_entropy"), digits, board, epochs=1)
    elif kind == "dict out":
        model = kt.Model(Several("out"), backend="cpu").compile("sgd", {"out": "cross_entropy"})
        fit(model, (x, {"out": y}), board, epochs=1)
    else:
        fit(model, ({"dict": {"b": x, "a": x}, "tuple": (x, x), "one": x}[kind], y), board, epochs=1)
    graph = reader(folder).Graph().node
    assert any("Linear[head]" in node.name for node in graph)
    assert sum(node.op == "IO Node" and node.name.startswith("input") for node in graph) == number
    assert any(node.op == "aten::add" for node in graph) == (number == 2)


def test_a_module_with_a_state_is_traced(folder):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x, state):
            output, state = self.rnn(x, state)
            return self.head(output), state

    model = kt.Model(Recurrent(), backend="cpu").compile("sgd", "mse", tbptt_steps=4)
    model.fit(torch.rand(8, 8, 3), torch.rand(8, 8, 1), callbacks=TensorBoard(folder), verbose=0)
    assert any("GRU[rnn]" in name for name in nodes(folder))


def test_a_module_that_cannot_be_traced_is_trained_all_the_same(digits, folder, capsys):
    class Refuses(nn.Linear):
        def forward(self, x):
            if torch.jit.is_tracing():
                raise RuntimeError("\nnot with me\nnor him")
            return super().forward(x)

    data, net = digits, Refuses(64, 10)
    with pytest.warns(UserWarning, match="could not trace the module, and goes on without its graph: not with me Give"):
        history = fit(compiled(net), data, TensorBoard(folder))
    assert history.history == fit(compiled(net), data).history
    assert nodes(folder) is None and len(scalars(folder)["epoch_loss"]) == 3
    assert capsys.readouterr().out == ""


def test_a_module_that_cannot_be_copied_is_trained_all_the_same(net, digits, folder):
    model = compiled(net)
    model.module.lock = threading.Lock()
    with pytest.warns(UserWarning, match="could not trace the module.*pickle.*lock"):
        fit(model, digits, TensorBoard(folder), epochs=1)
    assert nodes(folder) is None


def test_without_a_graph_nothing_is_traced(net, digits, folder, monkeypatch):
    monkeypatch.setattr(torch.jit, "trace", lambda *_, **__: pytest.fail("traced"))
    fit(compiled(net), digits, TensorBoard(folder, write_graph=False))
    assert nodes(folder) is None


def test_the_module_may_be_copied_by_others_meanwhile(net, digits, folder):
    class Copies(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.copy = copy.deepcopy(self.model.module)

    copies = Copies()
    fit(compiled(net), digits, TensorBoard(folder), copies, epochs=1)
    copies.copy(digits[0])
    assert len(nodes(folder)) > 0


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that `torch.compile` was given."""
    torch._dynamo.reset()
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=backend, fullgraph=True))
    return graphs


def test_a_module_that_is_compiled_is_traced_and_compiled_as_without(net, digits, folder, graphs):
    def run(*callbacks):
        graphs.clear()
        torch.manual_seed(0)
        model = compiled(net, jit=True)
        for _ in range(2):
            fit(model, digits, *callbacks)
        return model.module, len(graphs)

    (ours, number), (theirs, expected) = run(TensorBoard(folder)), run()
    assert number == expected > 0 and same_weights(ours, theirs) and nodes(folder)


def test_a_module_that_the_user_has_compiled_is_written_as_what_it_is(digits, folder, graphs):
    net = torch.compile(nn.Sequential(nn.Linear(64, 10)))
    fit(kt.Model(net, backend="cpu").compile("sgd", "cross_entropy"), digits, TensorBoard(folder, 1))
    assert graphs and any("Sequential/Linear[0]" in name for name in nodes(folder))
    assert "0/weight/gradient_histogram" in reader(folder).Tags()["histograms"]


@pytest.mark.filterwarnings("error:jit")
def test_a_module_that_is_compiled_before_it_is_called_stays_so(digits, folder, graphs):
    class Own(nn.Linear):
        def forward(self, x, y):
            return nn.functional.cross_entropy(super().forward(x), y)

    model = kt.Model(Own(64, 10), backend="cpu").compile("sgd", None, jit=True)
    data = digits[0][:128], digits[1][:128]  # no shorter last batch, which would be called
    fit(model, data, batch_size=16)
    before = len(graphs)
    with pytest.warns(UserWarning, match="no graph to write"):
        fit(model, data, TensorBoard(folder), batch_size=32)  # compiled anew, with the hook in the module
    assert len(graphs) > before and nodes(folder) is None


# Hyperparameters and the picture.


def test_the_hyperparameters_are_there(net, digits, folder):
    fit(compiled(net, "adam"), digits, TensorBoard(folder))
    summary = reader(folder, "").SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    found = metadata.parse_session_start_info_plugin_data(summary.plugin_data.content).hparams
    assert found["optimizer"].string_value == "Adam" and found["learning_rate"].number_value == 0.1
    assert (found["epochs"].number_value, found["steps"].number_value) == (3, STEPS)


@pytest.mark.parametrize("is_written", [True, False])
def test_the_picture_of_the_history_is_written_at_the_end(net, digits, folder, is_written):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    fit(compiled(net), digits, TensorBoard(folder, write_images=is_written), validation_data=digits)
    events = reader(folder)
    assert events.Tags()["images"] == ["history"] * is_written
    if is_written:
        (image,) = events.Images("history")
        assert image.step == 2 and image.width > 2 * image.height > 200
        pixels = pyplot.imread(io.BytesIO(image.encoded_image_string))
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50
    assert pyplot.get_fignums() == before


def test_a_history_without_numbers_has_no_picture(digits, folder):
    class Silent(kt.Model):
        def train_step(self, batch):
            loss = nn.functional.cross_entropy(self.module(batch[0]), batch[1])
            self.backward(loss)
            self.optimizer_step()

    model = Silent(nn.Linear(64, 10), backend="cpu").compile("sgd", "cross_entropy")
    history = fit(model, digits, TensorBoard(folder, write_images=True))
    assert history.history == {} and reader(folder).Tags()["images"] == []


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_dir": ""}, "was given an empty log_dir"),
        ({"histogram_freq": -1}, "histogram_freq=-1 is no number of epochs"),
        ({"histogram_freq": True}, "histogram_freq=True is no number of epochs"),
        ({"histogram_freq": 0.5}, "histogram_freq=0.5 is no number of epochs"),
        ({"update_freq": 0}, "update_freq=0 is not known"),
        ({"update_freq": "hour"}, 'update_freq=\'hour\' is not known. Give "epoch", "batch", or a number'),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TensorBoard(**options)


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(net, digits, tmp_path):
    (tmp_path / "file").write_text("")
    model = compiled(net)
    with pytest.raises(OSError, match="TensorBoard cannot write to .*file.*Give a folder"):
        fit(model, digits, TensorBoard(tmp_path / "file" / "logs"))
    assert same_weights(model.module, net)


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [("tensorboard", {}, "tensorboard"), ("matplotlib", {"write_images": True}, "plot")],
)
def test_a_package_that_is_missing_is_named(monkeypatch, package, options, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"needs {package}, which is not installed: pip install kerastorch\[{extra}\]"
    ):
        TensorBoard(**options)
