"""CSVLogger and TensorBoard beside Keras's: the same files of the same run, but where Keras's loses something.

Keras's TensorBoard writes with TensorFlow. Where that is not installed, `Summary` stands in for the few functions that
it calls.
"""

import csv
from contextlib import contextmanager
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from keras_twins import BATCH, CLOSE, MARKS, STEPS, mlp, regression
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

import kerastorch as kt

pytestmark = MARKS

FIT = {"batch_size": BATCH, "shuffle": False, "verbose": 0}


# CSVLogger.


class Adds(kt.Callback):
    """Puts values into the logs of epochs."""

    def __init__(self, **values):
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs.update({name: value[epoch] for name, value in self.values.items()})


def both(folder, *before, fits=1, append=False, separator=",", **options):
    """What both loggers write of the same fits: in one run, so that the numbers are the same too."""
    model = mlp().compile("mse", metrics=["mae"]).torch
    for _ in range(fits):
        loggers = [
            keras.callbacks.CSVLogger(str(folder / "theirs.csv"), separator, append),
            kt.callbacks.CSVLogger(folder / "ours.csv", separator, append),
        ]
        model.fit(*regression(), callbacks=[*before, *loggers], **FIT | {"epochs": 3} | options)
    return [(folder / name).read_bytes() for name in ("theirs.csv", "ours.csv")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"separator": ";"},
        {"validation_freq": 2, "epochs": 5},
        {"fits": 2},
        {"fits": 2, "append": True},
        {"initial_epoch": 1},
    ],
    ids=str,
)
def test_the_files_are_equal_byte_for_byte(tmp_path, options):
    theirs, ours = both(tmp_path, **{"validation_split": 0.2} | options)
    assert ours == theirs
    assert len(ours.splitlines()) == 1 + {"{'fits': 2, 'append': True}": 6, "{'initial_epoch': 1}": 2}.get(
        str(options), options.get("epochs", 3)
    )


@pytest.mark.parametrize(
    "value",
    [[1, 2.5], (1,), np.array([1.5, 2.0]), np.array([[1, 2], [3, 4]]), np.array(0.1, "float32"), np.float32(0.1), "a,b"]
    + ['say "x"', None, True, 3, 1e-30, float("inf"), {"a": 1}],
    ids=repr,
)
def test_values_are_written_as_keras_writes_them(tmp_path, value):
    theirs, ours = both(tmp_path, Adds(value=[value]), epochs=1, validation_split=0.2)
    assert ours == theirs


def test_what_keras_loses_we_keep(tmp_path):
    """Keras fixes its columns with the first epoch, and makes some for a validation that there may never be."""
    theirs, ours = both(tmp_path, Adds(value=[1, 2, 3]))
    header = b"epoch,loss,mae,value"
    assert theirs.splitlines()[0] == header + b",val_loss,val_mae,val_value" and ours.splitlines()[0] == header

    class Later(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs |= {"later": 7} if epoch else {}

    theirs, ours = both(tmp_path, Later(), validation_split=0.2)
    assert b"later" not in theirs
    assert [row["later"] for row in csv.DictReader(ours.decode().splitlines())] == ["NA", "7", "7"]


def test_keras_and_we_write_the_same_of_twins(tmp_path):
    pair = mlp().compile("mse", metrics=["mae"])
    for model, logger in (
        (pair.keras, keras.callbacks.CSVLogger(str(tmp_path / "theirs.csv"))),
        (pair.torch, kt.callbacks.CSVLogger(tmp_path / "ours.csv")),
    ):
        model.fit(*regression(), callbacks=[logger], epochs=3, validation_split=0.2, **FIT)
    theirs, ours = (list(csv.reader((tmp_path / name).open())) for name in ("theirs.csv", "ours.csv"))
    assert ours[0] == theirs[0]
    assert np.array(ours[1:], float) == pytest.approx(np.array(theirs[1:], float), **CLOSE)


# TensorBoard.


class Summary:
    """`tensorflow.summary`, as far as Keras calls it."""

    def __init__(self):
        self.default, self.conditions = [], []

    def create_file_writer(self, folder):
        return Writer(self, folder)

    @contextmanager
    def record_if(self, condition):
        self.conditions.append(condition)
        yield
        self.conditions.pop()

    def scalar(self, tag, value, step):
        if self.default and all(condition() for condition in self.conditions[-1:]):
            self.default[-1].add_scalar(tag, float(value), int(step))


class Writer:
    """A file writer of TensorFlow; without a file before there is something in it."""

    def __init__(self, summary, folder):
        self.summary, self.writer = summary, SummaryWriter(folder)
        self.flush, self.close = self.writer.flush, self.writer.close

    @contextmanager
    def as_default(self, step=None):
        self.summary.default.append(self.writer)
        yield
        self.summary.default.pop()


def keras_board(folder, **options):
    board = keras.callbacks.TensorBoard(str(folder), write_graph=False, **options)
    if find_spec("tensorflow") is None:
        board._summary_module = Summary()
    return board


def scalars(folder):
    """`{run: {tag: [(step, value)]}}`, without runs that have none."""
    found = {}
    for run in ("train", "validation"):
        events = EventAccumulator(str(folder / run), size_guidance={"scalars": 0, "tensors": 0})
        if not (folder / run).exists():
            continue
        tags = events.Reload().Tags()
        values = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in tags["scalars"]}
        for tag in tags["tensors"]:  # which TensorFlow writes
            values[tag] = [(one.step, float(make_ndarray(one.tensor_proto))) for one in events.Tensors(tag)]
        found |= {run: values} if values else {}
    return found


def boards(tmp_path, act, **options):
    """What both write while `act(model, board)` is done to twins."""
    pair = mlp().compile("mse", metrics=["mae"])
    for name, model, make in (("theirs", pair.keras, keras_board), ("ours", pair.torch, kt.callbacks.TensorBoard)):
        act(model, make(tmp_path / name, **options))
    return scalars(tmp_path / "theirs"), scalars(tmp_path / "ours")


def assert_same(theirs, ours):
    assert {run: set(values) for run, values in ours.items()} == {run: set(values) for run, values in theirs.items()}
    for run, values in theirs.items():
        for tag in values:
            close = [(step, pytest.approx(value, **CLOSE)) for step, value in values[tag]]
            assert ours[run][tag] == close, (run, tag)


@pytest.mark.parametrize("freq", ["epoch", "batch", 1, STEPS])
@pytest.mark.parametrize("options", [{}, {"validation_data": regression(1)}, {"initial_epoch": 2}], ids=list)
def test_scalars_have_the_tags_steps_and_values_of_keras(tmp_path, freq, options):
    def act(model, board):
        model.fit(*regression(), callbacks=[board], **FIT | {"epochs": 3} | options)

    theirs, ours = boards(tmp_path, act, update_freq=freq)
    assert_same(theirs, ours)
    epochs = 1 if "initial_epoch" in options else 3
    assert len(ours["train"]["epoch_loss"]) == epochs
    due = {"epoch": 0, STEPS: 1}.get(freq, STEPS)
    assert len(ours["train"].get("batch_loss", [])) == epochs * due
    assert ("validation" in ours) == ("validation_data" in options)


def test_evaluate_is_written_as_keras_writes_it(tmp_path):
    def act(model, board):
        model.fit(*regression(), epochs=2, **FIT)
        model.evaluate(*regression(1), callbacks=[board], verbose=0, batch_size=BATCH)

    theirs, ours = boards(tmp_path, act)
    assert_same(theirs, ours)
    assert [step for step, _ in ours["validation"]["evaluation_loss_vs_iterations"]] == [2 * STEPS]


def test_a_second_fit_with_the_same_board_writes_what_keras_writes(tmp_path):
    def act(model, board):
        for epochs in ((0, 2), (2, 3)):
            model.fit(*regression(), callbacks=[board], initial_epoch=epochs[0], epochs=epochs[1], **FIT)

    assert_same(*boards(tmp_path, act, update_freq=STEPS))


def test_epochs_that_keras_leaves_out_are_written(tmp_path):
    """With `update_freq=3` Keras writes only epochs whose last batch is a third one."""

    def act(model, board):
        model.fit(*regression(), validation_data=regression(1), callbacks=[board], epochs=3, **FIT)

    theirs, ours = boards(tmp_path, act, update_freq=3)
    for tag in ("batch_loss", "batch_mae"):
        assert ours["train"][tag] == [(step, pytest.approx(value, **CLOSE)) for step, value in theirs["train"][tag]]
        assert [step for step, _ in ours["train"][tag]] == [3, 6, 9, 12, 15]
    (last,) = theirs["train"]["epoch_loss"]
    assert last == (2, pytest.approx(ours["train"]["epoch_loss"][2][1], **CLOSE))
    assert [[epoch for epoch, _ in ours[run]["epoch_loss"]] for run in ("train", "validation")] == [[0, 1, 2]] * 2
