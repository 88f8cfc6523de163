"""CSVLogger read back by `csv`, MLflowLogger by MLflow's own client, WandbLogger from the file that wandb writes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.callbacks import CSVLogger, MLflowLogger, WandbLogger
from kerastorch.callbacks.base import hooks_of
from kerastorch.history import Logs
from tests.reference import same_weights

# SQLAlchemy about MLflow.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
BATCH, STEPS = 32, 5


def compiled(optimizer="sgd", **options):
    torch.manual_seed(0)
    return kt.Model(nn.Linear(64, 10), backend="cpu").compile(
        optimizer, "cross_entropy", **{"lr": 0.1, "metrics": ["accuracy"]} | options
    )


def fit(data, *callbacks, model=None, **options):
    model = model or compiled()
    options = {"epochs": 3, "batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    return model.fit(*data, callbacks=list(callbacks), **options)


class At(kt.Callback):
    """Does something at a hook of epoch and batch."""

    def __init__(self, act, epoch=1, batch=None):
        self.act, self.epoch, self.batch = act, epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch
        if epoch == self.epoch and self.batch is None:
            self.act()

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == (self.epoch, self.batch):
            self.act()


class Adds(kt.Callback):
    """Puts values into the logs of epochs."""

    def __init__(self, **values):
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs.update({name: value[epoch] for name, value in self.values.items() if value[epoch] is not ...})


class Load(kt.Callback):
    """Goes on from a state, which went through a file."""

    def __init__(self, callback, state):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        callback.load_state_dict(torch.load(buffer, weights_only=True))

    def on_train_end(self, logs=None):
        """So that it is a callback."""


def fail():
    raise RuntimeError("broken")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def kill():
    raise KeyboardInterrupt  # outside of the batches, where it is not taken for a first Ctrl-C


# CSVLogger.


def read(path, separator=","):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file, delimiter=separator))


def epochs_in(path):
    return [int(row[0]) for row in read(path)[1:]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.csv"


def test_a_row_for_each_epoch_has_its_values_to_the_last_digit(digits, path):
    history = fit(digits, CSVLogger(path), validation_split=0.2).history
    header, *rows = read(path)
    assert header == ["epoch", "accuracy", "loss", "val_accuracy", "val_loss"]
    assert [[float(cell) for cell in row] for row in rows] == [
        [epoch, *(history[name][epoch] for name in header[1:])] for epoch in range(3)
    ]


def test_a_name_that_comes_later_gets_a_column_and_shifts_none(digits, path):
    history = fit(
        digits, Adds(gap=[..., 1, ..., 2]), CSVLogger(path), validation_data=digits, validation_freq=3, epochs=4
    )
    header, *rows = read(path)
    assert header == ["epoch", "accuracy", "loss", "gap", "val_accuracy", "val_loss"]
    assert [row[3:] for row in rows] == [
        ["NA"] * 3,
        ["1", "NA", "NA"],
        ["NA", str(history.history["val_accuracy"][0]), str(history.history["val_loss"][0])],
        ["2", "NA", "NA"],
    ]
    assert [float(row[2]) for row in rows] == history.history["loss"]


def test_without_validation_there_are_no_columns_of_it(digits, path):
    fit(digits, CSVLogger(path))
    assert read(path)[0] == ["epoch", "accuracy", "loss"]


def test_each_row_is_in_the_file_when_its_epoch_is_over(digits, path):
    seen = []

    class Look(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(epochs_in(path))

    fit(digits, CSVLogger(path), Look())
    assert seen == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2.5], '"[1, 2.5]"'),
        (np.array([1.5, 2.0]), '"[1.5, 2.0]"'),
        (torch.tensor([1.5, 2.0]), '"[1.5, 2.0]"'),
        (torch.tensor(0.5), "0.5"),
        (np.float64(0.5), "0.5"),
        (np.array(0.5), "0.5"),
        ("one, two", "one, two"),
        (None, ""),
        (math.nan, "nan"),
    ],
    ids=repr,
)
def test_values_of_any_kind_are_written(digits, path, value, text):
    fit(digits, Adds(value=[value]), CSVLogger(path), epochs=1)
    assert read(path)[1][-1] == text


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_columns_may_be_separated_by_something_else(digits, path, separator):
    log = CSVLogger(path, separator, append=True)
    for _ in range(2):
        fit(digits, Adds(note=[f"a{separator}b"]), log, epochs=1)
    assert [row[0] + row[-1] for row in read(path, separator)] == ["epochnote", *[f"0a{separator}b"] * 2]


def test_a_second_fit_replaces_the_rows_of_the_first(digits, path):
    log, model = CSVLogger(path), compiled()
    fit(digits, log, model=model, validation_data=digits)
    history = fit(digits, log, model=model, initial_epoch=3, epochs=5)
    header, *rows = read(path)
    assert header == ["epoch", "accuracy", "loss"]
    assert [(int(row[0]), float(row[2])) for row in rows] == list(zip([3, 4], history.history["loss"], strict=True))


@pytest.mark.parametrize("same", [True, False])
def test_append_goes_on_under_the_header_that_is_there(digits, path, same):
    log = CSVLogger(path, append=True)
    fit(digits, log, epochs=2, validation_data=digits)
    first = read(path)
    fit(digits, log if same else CSVLogger(path, append=True), Adds(extra=[7]), epochs=1)  # behind the logger
    fit(digits, Adds(extra=[8]), log if same else CSVLogger(path, append=True), epochs=1)
    header, *rows = read(path)
    assert header == [*first[0], "extra"] and rows[:2] == [row + ["NA"] for row in first[1:]]
    assert [row[0] for row in rows] == ["0", "1", "0", "0"]
    assert rows[2][3:] == ["NA"] * 3 and rows[3][3:] == ["NA", "NA", "8"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [["epoch", "accuracy", "loss"]]),
        ("\n", [["epoch", "accuracy", "loss"]]),
        ("loss,epoch,mae\n0.5,0,1\n\n0.4,1", [["loss", "epoch", "mae", "accuracy"], ["0.5", "0", "1", "NA"]]),
        ("\ufeffepoch,loss\r\n0,0.5\r\n", [["epoch", "loss", "accuracy"], ["0", "0.5", "NA"]]),
    ],
    ids=["empty", "blank", "others, a blank line, a torn row", "of a spreadsheet"],
)
def test_append_takes_a_file_as_it_finds_it(digits, path, text, expected):
    path.write_text(text, encoding="utf-8")
    fit(digits, CSVLogger(path, append=True), epochs=1)
    rows = read(path)
    assert rows[: len(expected)] == expected
    assert {len(row) for row in rows} == {len(rows[0])} and rows[-1][rows[0].index("epoch")] == "0"
    if "torn" in text or text.endswith("1"):
        assert rows[2] == ["0.4", "1", "NA", "NA"]


def test_append_makes_a_file_where_there_is_none(digits, tmp_path):
    fit(digits, CSVLogger(tmp_path / "new" / "deep" / "log.csv", append=True))
    assert epochs_in(tmp_path / "new" / "deep" / "log.csv") == [0, 1, 2]


def test_the_file_that_was_there_stays_until_there_is_a_row(digits, path):
    path.write_text("precious")
    with pytest.raises(RuntimeError, match="broken"):
        fit(digits, CSVLogger(path), At(fail, 0, 2))
    assert path.read_text() == "precious"
    fit(digits, CSVLogger(path), epochs=1)
    assert epochs_in(path) == [0]


def test_a_failure_to_replace_the_file_leaves_it_whole_and_nothing_beside_it(digits, path, monkeypatch):
    fit(digits, CSVLogger(path))
    before = path.read_bytes()

    def no(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", no)
    for log in (CSVLogger(path), CSVLogger(path, append=True)):
        with pytest.raises(OSError, match="no space left"):
            fit(digits, Adds(new=[1, 2, 3]), log)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["log.csv"]


@pytest.mark.parametrize(("act", "epochs"), [(fail, [0]), (interrupt, [0, 1])])
def test_rows_of_a_run_that_ends_early_are_there(digits, path, act, epochs):
    try:
        fit(digits, CSVLogger(path), At(act, 1, 2))
    except RuntimeError as error:
        assert act is fail and str(error).startswith("broken")
    assert epochs_in(path) == epochs


def test_a_file_that_somebody_removes_is_begun_anew_with_a_header(digits, path):
    fit(digits, CSVLogger(path), At(lambda: path.unlink(), 2))
    assert read(path)[0][0] == "epoch" and epochs_in(path) == [2]


def test_a_link_stays_one_and_the_file_keeps_its_mode(digits, tmp_path):
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    fit(digits, CSVLogger(link))
    assert link.is_symlink() and epochs_in(target) == [0, 1, 2]
    assert target.stat().st_mode & 0o777 == 0o640


def test_in_a_dry_run_the_file_is_elsewhere(digits, path, tmp_path):
    path.write_text("precious")
    model = compiled()
    model._dry_run_folder = tmp_path / "dry"
    fit(digits, CSVLogger(path), model=model)
    assert path.read_text() == "precious"
    assert epochs_in(model.path_for(path)) == [0, 1, 2] and model.path_for(path) != path


# CSVLogger, resumed.


class Save(kt.Callback):
    """Takes a callback's state after each epoch, as a checkpoint before or behind it would."""

    def __init__(self, callback):
        self.callback, self.states = callback, []

    def on_epoch_end(self, epoch, logs=None):
        self.states.append(self.callback.state_dict())


@pytest.mark.parametrize("saves_first", [True, False])
@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_a_run_that_goes_on_doubles_and_misses_no_epoch(digits, path, epoch, append, saves_first):
    fit(digits, CSVLogger(path), epochs=2)  # an earlier run
    log = CSVLogger(path, append=append)
    save = Save(log)
    fit(digits, *([save, log] if saves_first else [log, save]), epochs=5, validation_data=digits)
    whole = read(path)

    other = CSVLogger(path, append=append)
    fit(digits, Load(other, save.states[epoch]), other, initial_epoch=epoch + 1, epochs=5, validation_data=digits)
    resumed = read(path)
    assert resumed[0] == whole[0] and [row[0] for row in resumed] == [row[0] for row in whole]
    kept = (3 if append else 1) + epoch + 1
    assert resumed[:kept] == whole[:kept]


def test_a_run_that_goes_on_can_be_gone_on_with_again_and_the_next_one_starts_anew(digits, path):
    fit(digits, CSVLogger(path), epochs=1)
    log = CSVLogger(path, append=True)
    fit(digits, log, epochs=3)
    for first in (2, 1):
        other = CSVLogger(path, append=True)
        save = Save(other)
        fit(digits, Load(other, log.state_dict()), other, save, initial_epoch=first, epochs=4)
        assert epochs_in(path) == [0, 0, 1, 2, 3]
        assert save.states[-1] == {"rows_before": 1, "rows": 4}
        log = other
    fit(digits, log, epochs=2)
    assert epochs_in(path) == [0, 0, 1, 2, 3, 0, 1]


def test_going_on_in_a_file_that_has_lost_rows_is_said(digits, path):
    log = CSVLogger(path, append=True)
    fit(digits, log)
    path.unlink()
    other = CSVLogger(path)
    with pytest.warns(UserWarning, match="has 0 rows where the state knows of 3: epochs will be missing"):
        fit(digits, Load(other, log.state_dict()), other, initial_epoch=3, epochs=5)
    assert epochs_in(path) == [3, 4] and other.state_dict() == {"rows_before": 0, "rows": 2}


# CSVLogger, mistakes.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("",), ValueError, "was given an empty filename"),
        ((3,), TypeError, "int"),
        (("a", ""), ValueError, "separator='' is not one character"),
        (("a", ", "), ValueError, "separator=', ' is not one character"),
        (("a", "\n"), ValueError, "is not one character"),
        (("a", '"'), ValueError, "is not one character"),
        (("a", 3), ValueError, "separator=3 is not one character"),
    ],
)
def test_bad_values_of_the_csv_logger_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        CSVLogger(*arguments)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("file/log.csv", OSError, "CSVLogger cannot write to .*file"),
        ("folder", IsADirectoryError, "folder.*: it is a folder. Give the path of a file in it"),
        ("other.csv", ValueError, "whose header is 'epoch;loss', with no column 'epoch' between ','"),
    ],
)
def test_what_cannot_be_written_is_refused_before_training(digits, tmp_path, name, error, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.csv").write_text("epoch;loss\n0;1\n")
    model = compiled()
    before = nn.Linear(64, 10)
    before.load_state_dict(model.module.state_dict())
    with pytest.raises(error, match=message):
        fit(digits, CSVLogger(tmp_path / name, append=True), model=model)
    assert same_weights(model.module, before)


# What W&B and MLflow have in common.


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The folder of wandb, which looks into the environment once."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        for name, value in (
            ("MODE", "offline"),
            ("SILENT", "true"),
            ("DISABLE_GIT", "true"),
            ("ERROR_REPORTING", "false"),
        ):
            patch.setenv(f"WANDB_{name}", value)
        yield folder / "wandb"


@pytest.fixture
def wandb(offline):
    module = pytest.importorskip("wandb")
    yield module
    if module.run is not None:
        module.run.finish()


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'runs.db'}"


@pytest.fixture
def mlflow(database, monkeypatch, request, tmp_path):
    """The module, with a database of these tests and an experiment of this one."""
    monkeypatch.chdir(tmp_path)  # where it makes a folder for artifacts
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # before the import
    module = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    module.set_tracking_uri(database)
    module.set_experiment(request.node.name)
    yield module
    while module.active_run() is not None:
        module.end_run()
    module.set_tracking_uri(None)


@pytest.fixture(params=["wandb", "mlflow"])
def service(request):
    module = request.getfixturevalue(request.param)
    return MLflow(module) if request.param == "mlflow" else Wandb(module, request.getfixturevalue("offline"))


class Wandb:
    """What wandb has written: each run's config, history and exit code."""

    def __init__(self, module, folder):
        self.module, self.logger, self.folder = module, WandbLogger, folder
        self.before = set(self.files())

    def files(self):
        return list(self.folder.glob("offline-run-*/*.wandb"))

    def written(self):
        """The records of each new file, in the order of the runs."""
        files = [finished(file) for file in self.files() if file not in self.before]
        return sorted(files, key=lambda written: run_of(written).start_time.ToNanoseconds())

    def start(self):
        return self.module.init().id

    def active(self):
        return self.module.run and self.module.run.id

    def stop(self):
        self.module.run.finish()

    def runs(self):
        """By id: parameters, {name: [(step, value)]}, and the status."""
        found = {}
        for written in self.written():
            params, metrics, status = found.setdefault(run_of(written).run_id, ({}, {}, []))
            for record in written:
                params |= {keys(item): json.loads(item.value_json) for item in configured(record)}
                row = {keys(item): json.loads(item.value_json) for item in record.history.item}
                for name, value in row.items():
                    kind, _, short = name.partition("/")
                    axis = f"{kind}/{AXES.get(kind)}"
                    if axis in row and name != axis:
                        values = metrics.setdefault(short if kind == "epoch" else f"{kind}_{short}", [])
                        values.append((row[axis], value))
                if record.HasField("exit"):
                    status.append({0: "FINISHED", 1: "FAILED", 255: "KILLED"}[record.exit.exit_code])
        return {name: (params, metrics, status[-1]) for name, (params, metrics, status) in found.items()}


AXES = {"epoch": "epoch", "batch": "batch_step", "interval": "step"}


def keys(item):
    return item.key or "/".join(item.nested_key)


def run_of(written):
    return next(record.run for record in written if record.HasField("run"))


def configured(record):
    return (*record.run.config.update, *record.config.update)


def finished(file):
    """The records in a file, once the last is there: wandb writes on when `finish` has returned."""
    found, until = [], time.monotonic() + 20
    while not any(record.HasField("exit") for record in found):
        assert time.monotonic() < until, f"{file} was never finished"
        time.sleep(0.01)
        found = list(records(file))
    return found


def records(file):
    """The records in a `.wandb` file, a log of LevelDB behind 7 bytes: chunks with headers in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    while len(data) - place >= 7:
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole, place = whole + data[place + 7 : place + 7 + size], place + 7 + size
        if kind in (1, 4):  # all of it, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


class MLflow:
    """What MLflow's client reads."""

    def __init__(self, module):
        self.module, self.logger = module, MLflowLogger

    def start(self):
        return self.module.start_run().info.run_id

    def active(self):
        run = self.module.active_run()
        return run and run.info.run_id

    def stop(self):
        self.module.end_run()

    def runs(self):
        from mlflow.tracking import MlflowClient, fluent

        client = MlflowClient()
        runs = client.search_runs([fluent._active_experiment_id], order_by=["attributes.start_time ASC"])
        return {
            run.info.run_id: (
                run.data.params,
                {
                    name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
                    for name in run.data.metrics
                },
                run.info.status,
            )
            for run in runs
        }


def only(service):
    (run,) = service.runs().values()
    return run


def test_a_service_gets_parameters_values_of_each_epoch_and_the_end(digits, service):
    history = fit(digits, service.logger(), validation_data=digits)
    params, metrics, status = only(service)
    expected = {name: list(enumerate(values)) for name, values in history.history.items()}
    expected["learning_rate"] = [(epoch, 0.1) for epoch in range(3)]
    assert metrics == expected
    assert {name: str(params[name]) for name in ("optimizer", "learning_rate", "epochs", "steps")} == {
        "optimizer": "SGD", "learning_rate": "0.1", "epochs": "3", "steps": "5"
    }  # fmt: skip
    assert status == "FINISHED" and service.active() is None


def test_a_service_gets_batches_as_often_as_asked_for(digits, service):
    class Means(kt.Callback):
        seen = {}

        def on_train_batch_end(self, batch, logs=None):
            self.seen[len(self.seen) + 1] = logs["loss"]

    means = Means()
    fit(digits, means, service.logger(log_freq=2), epochs=2)
    metrics = only(service)[1]
    assert metrics["batch_loss"] == [(number, pytest.approx(means.seen[number])) for number in (2, 4, 6, 8, 10)]
    assert len(metrics["batch_accuracy"]) == 5 and [step for step, _ in metrics["loss"]] == [0, 1]


def test_a_service_gets_what_callbacks_before_it_put_into_the_logs_but_for_what_is_no_number(digits, service):
    values = {"whole": [3], "tensor": [torch.tensor(0.5)], "numpy": [np.float32(0.25)], "text": ["a"], "list": [[1]]}
    fit(digits, Adds(**values), service.logger(), epochs=1)
    metrics = only(service)[1]
    assert [metrics[name] for name in ("whole", "tensor", "numpy")] == [[(0, 3)], [(0, 0.5)], [(0, 0.25)]]
    assert not {"text", "list"} & set(metrics)


def test_validations_within_an_epoch_go_over_the_optimizer_steps(digits, service):
    class Interval(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                logger.on_interval_end(0, {"loss": 2.0, "val_loss": 3.0})

    logger = service.logger()
    fit(digits, Interval(), logger, epochs=2)
    metrics = only(service)[1]
    assert metrics["interval_loss"] == [(3, 2.0), (8, 2.0)] and metrics["interval_val_loss"] == [(3, 3.0), (8, 3.0)]


@pytest.mark.parametrize(
    ("act", "batch", "status"), [(fail, 2, "FAILED"), (kill, None, "KILLED"), (interrupt, 2, "FINISHED")]
)
def test_a_service_is_told_how_the_run_ended(digits, service, act, batch, status):
    try:
        fit(digits, service.logger(), At(act, 1, batch))
    except (RuntimeError, KeyboardInterrupt):
        assert act is not interrupt
    _, metrics, found = only(service)
    assert found == status and service.active() is None
    assert [epoch for epoch, _ in metrics["loss"]] == ([0, 1] if act is interrupt else [0])


@pytest.mark.parametrize("act", [fail, lambda: None])
def test_a_run_that_is_active_already_is_used_and_left_open(digits, service, act):
    run, logger = service.start(), service.logger()
    for epochs in (2, 3):  # parameters differ: MLflow takes each once
        try:
            fit(digits, logger, At(act, 1, 4), epochs=epochs)
        except RuntimeError:
            assert act is fail
    assert service.active() == run
    service.stop()
    assert list(service.runs()) == [run]
    params, metrics, status = only(service)
    assert str(params["epochs"]) == "2" and status == "FINISHED"
    assert [epoch for epoch, _ in metrics["loss"]] == ([0, 0] if act is fail else [0, 1, 0, 1, 2])


def test_what_an_active_run_leaves_without_effect_is_said(digits, service):
    service.start()
    options = {"project": "x"} if service.logger is WandbLogger else {"experiment": "x"}
    name, value = next(iter(options.items()))
    with pytest.warns(UserWarning, match=f"which is active already; {name}='{value}' has no effect"):
        fit(digits, service.logger(**options), epochs=1)


def test_two_fits_of_one_logger_are_two_runs(digits, service):
    logger = service.logger(log_freq="batch")
    for _ in range(2):
        fit(digits, logger, epochs=1)
    assert [[step for step, _ in run[1]["batch_loss"]] for run in service.runs().values()] == [[1, 2, 3, 4, 5]] * 2


def test_a_fit_that_goes_on_from_a_state_goes_on_in_its_run(digits, service):
    logger = service.logger(log_freq=5)
    save = Save(logger)
    fit(digits, logger, save, epochs=2)
    other = service.logger(log_freq=5)
    fit(digits, Load(other, save.states[-1]), other, initial_epoch=2, epochs=4)
    assert list(service.runs()) == [save.states[0]["run_id"]]
    _, metrics, status = only(service)
    assert [epoch for epoch, _ in metrics["loss"]] == [0, 1, 2, 3] and status == "FINISHED"
    assert [step for step, _ in metrics["batch_loss"]] == [5, 10, 15, 20]
    assert other.state_dict()["steps"] == 20
    other.load_state_dict(save.states[0])
    assert other.state_dict() == save.states[0]
    fit(digits, service.logger(), epochs=1)
    fit(digits, logger, epochs=1)
    assert len(service.runs()) == 3


def test_a_dry_run_is_not_logged(digits, service, tmp_path):
    model = compiled()
    model._dry_run_folder = tmp_path / "dry"
    fit(digits, service.logger(log_freq=1), model=model)
    assert service.runs() == {} and service.active() is None


def test_an_evaluation_that_fails_ends_no_run_of_the_user(digits, service):
    logger = service.logger()
    for is_active in (False, True):
        run = service.start() if is_active else None
        fit(digits, logger, epochs=1)
        run = run or service.start()
        with pytest.raises(Exception, match="."):
            compiled().evaluate(digits[0][:, :3], digits[1], callbacks=[logger], verbose=0)
        assert service.active() == run
        service.stop()


# MLflow alone.


def test_mlflow_gets_experiment_name_tags_and_parameters(digits, mlflow, database):
    logger = MLflowLogger("mine", "first", database, params={"width": 64, "epochs": "many"}, tags={"kind": "test"})
    fit(digits, logger, epochs=1)
    (run,) = mlflow.search_runs(experiment_names=["mine"], output_format="list")
    assert run.info.run_name == "first" and run.data.tags["kind"] == "test"
    assert run.data.params["width"] == "64" and run.data.params["epochs"] == "many"


def test_mlflow_uses_the_store_that_it_is_given_for_the_process(digits, mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "runs").as_uri()
    fit(digits, MLflowLogger("there", tracking_uri=uri), epochs=1)
    assert mlflow.get_tracking_uri() == uri and list((tmp_path / "runs").glob("*/*/metrics/loss"))


def test_mlflow_has_the_run_active_meanwhile_for_what_else_is_logged(digits, mlflow):
    fit(digits, MLflowLogger(), At(lambda: mlflow.log_param("mine", 1)))
    assert only(MLflow(mlflow))[0]["mine"] == "1"


def test_names_that_mlflow_does_not_take_are_changed(digits, mlflow):
    fit(digits, Adds(**{"hits@5": [1.0], "a/b.c-d e": [2.0]}), MLflowLogger(), epochs=1)
    metrics = only(MLflow(mlflow))[1]
    assert metrics["hits_5"] == [(0, 1.0)] and metrics["a/b.c-d e"] == [(0, 2.0)]


@pytest.mark.parametrize("name", ["params", "tags"])
def test_parameters_and_tags_must_be_dicts(name):
    with pytest.raises(TypeError, match=rf"{name}=\['a'\] is a list. Give a dict"):
        MLflowLogger(**{name: ["a"]})


# W&B alone.


def test_wandb_gets_what_init_takes_and_axes(digits, wandb, offline):
    service, seen = Wandb(wandb, offline), []
    look = At(lambda: seen.append((wandb.run.project, wandb.run.name, wandb.run.tags, wandb.run.config["epochs"])))
    fit(digits, WandbLogger("digits", name="first", tags=["a"], config={"epochs": "many"}), look)
    assert seen == [("digits", "first", ("a",), "many")]
    (written,) = service.written()
    metrics = [record.metric for record in written if record.HasField("metric")]
    axes = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    assert axes == {"epoch/*": "epoch/epoch", "batch/*": "batch/batch_step", "interval/*": "interval/step"}


# What all loggers share.


@pytest.mark.parametrize("make", [WandbLogger, MLflowLogger])
@pytest.mark.parametrize("freq", [0, -1, 1.5, True, "hour", None])
def test_a_frequency_that_is_none_is_refused(make, freq):
    with pytest.raises(ValueError, match=f'log_freq={freq!r} is not known. Give "epoch", "batch", or a number'):
        make(log_freq=freq)


@pytest.mark.parametrize(("make", "package"), [(WandbLogger, "wandb"), (MLflowLogger, "mlflow")])
def test_a_package_that_is_missing_is_named(monkeypatch, make, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"needs {package}, which is not installed: pip install kerastorch\[{package}\]"
    ):
        make()


def test_making_a_logger_imports_no_package(monkeypatch):
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package)
        monkeypatch.delitem(sys.modules, package)
    WandbLogger(), MLflowLogger()
    assert not {"wandb", "mlflow"} & set(sys.modules)


class Noted(kt.callbacks.loggers.Logger):
    """A logger into a list."""

    def __init__(self, freq="epoch"):
        super().__init__(freq, "freq")
        self.noted = []

    def _open(self):
        self.noted.clear()

    def _log(self, kind, number, values):
        self.noted.append((kind, number, values))

    def _close(self, error=None):
        self.noted.append(("end", error, None))


@pytest.mark.parametrize(("freq", "reads"), [("epoch", 0), (3, 3), ("batch", 10)])
def test_the_device_is_read_where_it_is_due_and_nowhere_else(digits, monkeypatch, freq, reads):
    seen, known = [], Logs._known

    def count(self):
        if self._values is None:
            seen.append(self)
        return known(self)

    monkeypatch.setattr(Logs, "_known", count)
    logger = Noted(freq)
    fit(digits, logger, epochs=2)
    assert len(seen) == reads and [number for kind, number, _ in logger.noted if kind == "epoch"] == [0, 1]
    assert bool(hooks_of([logger]).on_train_batch_end) == (freq != "epoch")


def test_a_hook_that_a_subclass_has_is_called_all_the_same(digits):
    class Mine(Noted):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            self.noted.append(("mine", batch, None))

    logger = Mine()
    fit(digits, logger, epochs=1)
    assert [number for kind, number, _ in logger.noted if kind == "mine"] == list(range(STEPS))
    assert not [kind for kind, *_ in logger.noted if kind == "batch"]


@pytest.mark.parametrize("logger", [CSVLogger("a"), Noted(), Noted(2)], ids=["csv", "epoch", "batch"])
def test_loggers_add_nothing_to_the_logs_and_have_a_plain_state(logger):
    assert logger.adds_to_logs == ()
    assert all(isinstance(value, int) for value in logger.state_dict().values())


def rates(logger, name="learning_rate"):
    return [values.get(name) for kind, _, values in logger.noted if kind == "epoch"]


def test_rates_are_logged_without_a_schedule_and_of_all_groups(digits):
    class Halve(kt.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            for group in self.model.optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"] / 2)

    logger = Noted()
    fit(digits, Halve(), logger, model=compiled(lr={"weight": 0.4, "*": 0.2}))
    assert rates(logger) == pytest.approx([0.2, 0.1, 0.05])
    assert rates(logger, "learning_rate_group_1") == pytest.approx([0.1, 0.05, 0.025])


@pytest.mark.parametrize(
    "schedule", ["cosine", lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)], ids=["step", "epoch"]
)
def test_under_a_schedule_the_rate_is_that_of_the_last_step_as_in_the_history(digits, schedule):
    logger, model = Noted(), compiled(schedule=schedule)
    history = fit(digits, logger, model=model)
    assert rates(logger) == history.history["lr"] and len(set(rates(logger))) == 3
    params = kt.callbacks.loggers.hyperparameters(model, None)
    assert params["learning_rate"] == 0.1 and (params["schedule"] == "cosine") == (schedule == "cosine")


def test_several_optimizers_have_rates_by_their_names(digits):
    class Twins(kt.Model):
        def train_step(self, batch):
            x, y = batch
            for name in ("left", "right"):
                loss = nn.functional.cross_entropy(self.module[name](x), y)
                self.backward(loss)
                self.optimizer_step(name)
                self.log("loss", loss)

    net = nn.ModuleDict({"left": nn.Linear(64, 10), "right": nn.Linear(64, 10)})
    model = Twins(net, backend="cpu").compile(
        {"left": "sgd", "right": "adam"}, "cross_entropy", lr={"left": 0.1, "right": 0.01}
    )
    logger = Noted()
    fit(digits, logger, model=model, epochs=1)
    assert (rates(logger, "learning_rate_left"), rates(logger, "learning_rate_right")) == ([0.1], [0.01])
    params = kt.callbacks.loggers.hyperparameters(model, {"epochs": 1, "steps": None})
    assert params == {
        "optimizer_left": "SGD", "optimizer_right": "Adam", "learning_rate_left": 0.1, "learning_rate_right": 0.01,
        "epochs": 1,
    }  # fmt: skip


def test_an_optimizer_without_a_rate_has_none_to_log(digits):
    class Fixed(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.1 * parameter.grad

    logger = Noted()
    fit(digits, logger, model=compiled(Fixed, lr=None), epochs=1)
    assert rates(logger) == [None]


def test_a_logger_hears_of_the_end_once(digits):
    logger = Noted()
    fit(digits, logger, epochs=1)
    assert [noted for noted in logger.noted if noted[0] == "end"] == [("end", None, None)]
    with pytest.raises(RuntimeError, match="broken"):
        fit(digits, logger, At(fail, 0, 1))
    ((_, error, _),) = logger.noted
    assert str(error).startswith("broken")
