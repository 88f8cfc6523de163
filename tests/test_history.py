"""History: values by epoch, as a table, a frame and a picture; Logs: nothing is read before somebody looks."""

from __future__ import annotations

import math

import pytest

from kerastorch.history import History, Logs


@pytest.fixture
def history():
    history = History({"verbose": 0, "epochs": 3, "steps": 2})
    history.record(0, {"loss": 1.0})
    history.record(1, {"loss": 0.5, "val_loss": 0.7, "accuracy": 0.25})
    history.record(2, {"loss": 0.25, "accuracy": 0.5})
    return history


def test_values_are_lists_by_name(history):
    assert history.history == {"loss": [1.0, 0.5, 0.25], "val_loss": [0.7], "accuracy": [0.25, 0.5]}
    assert history.epoch == [0, 1, 2]


def test_a_frame_has_a_row_for_each_epoch(history):
    frame = history.to_pandas()
    assert list(frame.index) == [0, 1, 2] and list(frame.columns) == ["loss", "val_loss", "accuracy"]
    assert math.isnan(frame["val_loss"][0]) and frame["accuracy"][2] == 0.5


def test_its_repr_is_a_table(history):
    lines = repr(history).splitlines()
    assert lines[0] == "History of 3 epochs" and lines[1].split() == ["epoch", "loss", "val_loss", "accuracy"]
    assert lines[-1].split() == ["2", "0.25", "0.5"]
    assert repr(History()) == "History of 0 epochs"


def test_a_long_one_shows_its_beginning_and_end():
    history = History()
    for epoch in range(100):
        history.record(epoch, {"loss": 1.0})
    lines = repr(history).splitlines()
    assert len(lines) == 13 and lines[-1].split()[0] == "99" and lines[3].split()[0] == "0"


def test_a_plot_has_validation_beside_training_at_the_epochs_it_ran(history, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    figure = history.plot(path=str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy"]
    training, validation = figure.axes[0].lines
    assert list(training.get_xdata()) == [1, 2, 3] and list(validation.get_xdata()) == [2]
    assert list(figure.axes[1].lines[0].get_xdata()) == [2, 3]
    assert len(history.plot(["loss"]).axes) == 1
    with pytest.raises(ValueError, match="nothing to plot for \\['f1'\\]"):
        history.plot(["f1"])
    with pytest.raises(ValueError, match="no epochs"):
        History().plot()


def test_logs_are_read_once_and_only_when_looked_into():
    reads = []
    logs = Logs(lambda: reads.append(1) or {"loss": 0.5})
    assert logs and not reads, "`logs or {}` looks at nothing"
    assert logs["loss"] == 0.5 and logs.get("val_loss") is None and dict(logs) == {"loss": 0.5} and len(logs) == 1
    assert reads == [1]


def test_logs_take_new_values():
    logs = Logs(lambda: {"loss": 0.5})
    logs["lr"] = 0.1
    logs.update({"loss": 1.0})
    del logs["lr"]
    assert logs.copy() == {"loss": 1.0} and repr(logs) == "{'loss': 1.0}"


def test_what_is_no_number_is_not_drawn():
    history = History()
    history.record(0, {"loss": 1.0, "confusion": [[1, 0], [0, 1]]})
    assert [axes.get_title() for axes in history.plot().axes] == ["loss"]
