"""Logs of a run for others to read: `CSVLogger`, `WandbLogger` and `MLflowLogger`; `TensorBoard` builds on `Logger`.

They write what is in the logs, so that they belong behind the callbacks that add to these. Epochs are counted from 0,
as Keras's loggers do. When values are read from the device is decided in `Logger`: after each epoch, and after as many
batches as the user asked for.
"""

from __future__ import annotations

import csv
import errno
import os
import re
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from importlib.util import find_spec
from itertools import takewhile
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ..writing import replacing
from .base import Callback
from .files import make_folder

MISSING = "NA"  # Keras's


class CSVLogger(Callback):
    """Writes a row for each epoch into a CSV file, where it is to be read as soon as the epoch is over.

    The columns are `epoch`, counted from 0, and the names in the logs; where a name comes up later, as `val_loss` does
    with `validation_freq=2`, the header grows, and the rows before have `NA` there. A sequence is written as
    `"[1, 2]"`. The file that was there stays until the first row is written, and is then replaced in one go.

    A run that goes on from a state goes on in the file of that run too: rows of epochs that it will train again are
    dropped, and a last line that was cut off when the process was killed.

    Args:
        filename: Path of the file.
        separator: One character between two columns. Default: `","`.
        append: Whether to go on below the rows of a file that is there, under its header, instead of replacing it.
            Default: `False`.
    Raises:
        ValueError: an empty filename, or a separator that is not one character. Before training: a file to append to
            that has no column `epoch`.
        OSError: before training: a folder that cannot be written to, or a filename that is one.
    Example:
        >>> import tempfile, torch, kerastorch as kt
        >>> model, x = kt.Model(torch.nn.Linear(2, 1), backend="cpu").compile("sgd", "mse"), torch.rand(8, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = kt.callbacks.CSVLogger(f"{folder}/log.csv")
        ...     history = model.fit(x, x[:, :1], epochs=2, callbacks=log, verbose=0)
        ...     [line.split(",")[0] for line in open(f"{folder}/log.csv")]
        ['epoch', '0', '1']

    Source: Keras, `CSVLogger`, whose columns are those of the first epoch and its `val_`.
    """

    rank_zero_only = True

    adds_to_logs = ()

    def __init__(self, filename: str | os.PathLike, separator: str = ",", append: bool = False) -> None:
        if not os.fspath(filename):
            raise ValueError("CSVLogger was given an empty filename. Give the path of a file, e.g. 'logs/run.csv'.")
        if not isinstance(separator, str) or len(separator) != 1 or separator in '\r\n"':
            raise ValueError(f"separator={separator!r} is not one character that can stand between columns. Give ','.")
        self.filename, self.separator, self.append = filename, separator, append
        self._columns: list[str] = []
        self._kept: list[list[str]] | None = None  # rows to go on from, before the first one of a run is written
        self._rows_before = self._rows = 0  # of earlier runs, and of this one
        self._has_begun = self._is_loaded = False

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        # Where a link leads: the file shall be replaced, not the link.
        self._path = Path(os.path.realpath(self.model.path_for(self.filename)))
        make_folder(self._path.parent, "CSVLogger")
        if self._path.is_dir():
            reason = f"CSVLogger cannot write to {str(self._path)!r}: it is a folder. Give the path of a file in it."
            raise IsADirectoryError(errno.EISDIR, reason)
        self._has_begun = False

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        if not self._has_begun:
            self._begin(epoch)

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        row = {name: _cell(value) for name, value in (logs or {}).items()} | {"epoch": epoch}
        new = sorted(row.keys() - set(self._columns))
        self._columns += new
        cells = [row.get(name, MISSING) for name in self._columns]
        if self._kept is not None:
            self._replace([*self._kept, cells])
        elif new or not self._path.exists():
            self._replace([*self._read()[1], cells])
        else:
            with open(self._path, "a", newline="", encoding="utf-8") as file:
                self._write(file, [cells])
        self._kept, self._rows = None, self._rows + 1

    def state_dict(self) -> dict[str, Any]:
        """How many rows the file had before the run, and how many the run has written."""
        return {"rows_before": self._rows_before, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the file of the run that the state is from."""
        self._rows_before, self._rows, self._is_loaded = state["rows_before"], state["rows"], True

    def _begin(self, first_epoch: int) -> None:
        """Decides which rows stay, before the first epoch of a run; nothing is written yet."""
        self._columns, rows = self._read() if self.append or self._is_loaded else (["epoch"], [])
        if self._is_loaded:
            rows = self._before(first_epoch, rows)
        else:
            self._rows_before = len(rows)
        self._kept, self._rows = rows, len(rows) - self._rows_before
        self._has_begun, self._is_loaded = True, False

    def _before(self, first_epoch: int, rows: list[list[str]]) -> list[list[str]]:
        """Rows of earlier runs, and those of the run that goes on, up to the epoch that it goes on with."""
        known = self._rows_before + self._rows
        if len(rows) > known and self._is_cut_off():
            rows = rows[:-1]
        if len(rows) < known:
            self._rows_before = min(self._rows_before, len(rows))
            warnings.warn(
                f"CSVLogger goes on in {str(self._path)!r}, which has {len(rows)} rows where the state knows of "
                f"{known}: epochs will be missing from it.",
                stacklevel=2,
            )
        column = self._columns.index("epoch")
        own = takewhile(lambda row: float(row[column]) < first_epoch, rows[self._rows_before :])
        return [*rows[: self._rows_before], *own]

    def _read(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the file; a header without rows where there is none."""
        if not self._path.exists() or not self._path.stat().st_size:
            return ["epoch"], []
        with open(self._path, newline="", encoding="utf-8-sig") as file:
            header, *rows = list(filter(None, csv.reader(file, delimiter=self.separator))) or [["epoch"]]
        if "epoch" not in header:
            raise ValueError(
                f"CSVLogger was to go on in {str(self._path)!r}, whose header is {self.separator.join(header)!r}, with "
                f"no column 'epoch' between {self.separator!r}. Give the separator of the file, or append=False."
            )
        return header, rows

    def _is_cut_off(self) -> bool:
        """Whether the last line has no end: who wrote it was killed meanwhile."""
        with open(self._path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"

    def _replace(self, rows: list[list[Any]]) -> None:
        width = len(self._columns)
        lines = [self._columns, *(row + [MISSING] * (width - len(row)) for row in rows)]
        with replacing(self._path) as temporary, open(temporary, "x", newline="", encoding="utf-8") as file:
            self._write(file, lines)

    def _write(self, file: TextIO, rows: list[list[Any]]) -> None:
        csv.writer(file, delimiter=self.separator).writerows(rows)


def _cell(value: Any) -> Any:
    """A value as Keras's `CSVLogger` writes it; numbers in tensors as numbers."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Iterable) or getattr(value, "ndim", None) == 0:
        return value
    return f'"[{", ".join(map(str, value))}]"'


class Logger(Callback):
    """Hands the numbers in the logs on: of each epoch, of so many batches, and of validations within an epoch.

    Subclasses say where to: `_open`, `_log` and `_close`.

    Args:
        freq: `"epoch"`, `"batch"`, or after how many batches too.
        name: What the user called `freq`, for the error.
    """

    rank_zero_only = True

    adds_to_logs = ()

    def __init__(self, freq: str | int, name: str) -> None:
        self._batches_between = _batches_between(freq, name)
        self._batches = 0
        self._steps_before = 0  # optimizer steps before this run, in the one whose state was loaded
        self._is_loaded = False
        if self._batches_between is None:
            leave_out(self, Logger, "on_train_batch_end")

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        if not self._is_loaded:
            self._batches = self._steps_before = 0
        self._open()

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        if self._is_loaded:
            self._is_loaded = False
            self._steps_before -= self.model.steps_taken  # `fit(resume=...)` counts on; with `initial_epoch` it begins

    def on_train_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._batches += 1
        if self._batches_between and self._batches % self._batches_between == 0:
            self._log("batch", self._batches, numbers_in(logs))

    def on_interval_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._log("interval", self._steps, numbers_in(logs))

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._log("epoch", epoch, numbers_in(logs) | learning_rates(self.model, logs))

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        self._close()

    def on_exception(self, error: BaseException) -> None:
        self._close(error)

    def state_dict(self) -> dict[str, Any]:
        """How many batches and optimizer steps the run has had."""
        return {"batches": self._batches, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a state."""
        self._batches, self._steps_before, self._is_loaded = state["batches"], state["steps"], True

    @property
    def _steps(self) -> int:
        return self._steps_before + (0 if self.model is None or self._is_loaded else self.model.steps_taken)

    def _open(self) -> None:
        """Before the run."""
        raise NotImplementedError

    def _log(self, kind: str, number: int, values: dict[str, float]) -> None:
        """The values after an `"epoch"`, a `"batch"` or an `"interval"`, and its number: of an interval, its step."""
        raise NotImplementedError

    def _close(self, error: BaseException | None = None) -> None:
        """After the run, or an error, which may also be that of an evaluation outside of one."""
        raise NotImplementedError


class WandbLogger(Logger):
    """Logs a run to Weights & Biases.

    The names are those of W&B's own callback for Keras: `epoch/loss`, `epoch/val_loss`, `epoch/learning_rate` over
    `epoch/epoch`, counted from 0, and `batch/loss` over `batch/batch_step`, batches so far; validations within an epoch
    are `interval/val_loss` over `interval/step`, optimizer steps so far. The config gets optimizer, rate, epochs and
    steps, where it has nothing of that name.

    Where a run is active already, it is used and left open. A run of its own is finished with the fit: as failed after
    an error, as killed after a second Ctrl-C; the first ends a fit early, but well. A fit that goes on from a state
    goes on in its run. In a dry run nothing is logged.

    Args:
        project: Its name; `None` = what W&B is set to. Default: `None`.
        log_freq: `"epoch"`, `"batch"`, or a number of batches after which to log too; that reads the device. Default:
            `"epoch"`.
        init: More arguments of `wandb.init`: `name`, `tags`, `mode`, `dir`, `config`, ...
    Raises:
        ValueError: a `log_freq` that is none.
        ImportError: wandb is not installed.
    Example:
        >>> logger = WandbLogger("digits", mode="offline", tags=["baseline"])  # doctest: +SKIP

    Source: names, `wandb.integration.keras.WandbMetricsLogger`.
    """

    def __init__(self, project: str | None = None, *, log_freq: str | int = "epoch", **init: Any) -> None:
        super().__init__(log_freq, "log_freq")
        require("wandb", "wandb", "WandbLogger")
        self._init = {"project": project, **init} if project is not None else init
        self._run: Any = None
        self._run_id: str | None = None
        self._is_owner = False

    def state_dict(self) -> dict[str, Any]:
        """What `Logger` counts, and the id of the run."""
        return super().state_dict() | {"run_id": self._run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the run of a state."""
        super().load_state_dict(state)
        self._run_id = state["run_id"]

    def _open(self) -> None:
        if self.model.is_dry_run:
            return
        import wandb

        self._is_owner = wandb.run is None
        if self._is_owner:
            goes_on = self._is_loaded and self._run_id is not None
            same_run = {"id": self._run_id, "resume": "allow"} if goes_on else {}
            self._run = wandb.init(**self._init | same_run)
        else:
            _warn_of_unused("WandbLogger", f"run {wandb.run.name or wandb.run.id!r}", self._init)
            self._run = wandb.run
        self._run_id = self._run.id
        config = hyperparameters(self.model, self.params)
        self._run.config.update({name: value for name, value in config.items() if name not in self._run.config})
        for kind, axis in (("epoch", "epoch"), ("batch", "batch_step"), ("interval", "step")):
            self._run.define_metric(f"{kind}/{axis}")
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/{axis}")

    def _log(self, kind: str, number: int, values: dict[str, float]) -> None:
        if self._run is not None:
            axis = {"epoch": "epoch", "batch": "batch_step", "interval": "step"}[kind]
            self._run.log({f"{kind}/{name}": value for name, value in values.items()} | {f"{kind}/{axis}": number})

    def _close(self, error: BaseException | None = None) -> None:
        run, self._run = self._run, None
        if run is not None and self._is_owner:
            # 255 is what W&B's own hook gives to a Ctrl-C.
            run.finish(exit_code=0 if error is None else 255 if isinstance(error, KeyboardInterrupt) else 1)


class MLflowLogger(Logger):
    """Logs a run to MLflow.

    Metrics have the names in the logs, and `learning_rate`, over the epoch, counted from 0; within epochs they are
    `batch_loss` over the batches so far, and `interval_val_loss` over the optimizer steps so far. Characters that
    MLflow does not take become `_`. Parameters are optimizer, rate, epochs and steps, where the run has none of that
    name.

    Where a run is active already, it is used and left open. A run of its own is active meanwhile, so that
    `mlflow.log_artifact` in another callback goes there, and ends with the fit: FINISHED, FAILED after an error, KILLED
    after a second Ctrl-C; the first ends a fit early, but well. A fit that goes on from a state goes on in its run. In
    a dry run nothing is logged.

    Args:
        experiment: Name of the experiment, which is made where there is none; `None` = the active one.
        run_name: Name of the run; `None` = MLflow makes one up.
        tracking_uri: Where to, `"sqlite:///mlflow.db"` or the address of a server, for the whole process, as
            `mlflow.set_tracking_uri`; `None` = what MLflow is set to.
        log_freq: `"epoch"`, `"batch"`, or a number of batches after which to log too; that reads the device. Default:
            `"epoch"`.
        params: More parameters, by name.
        tags: Tags of the run, by name.
    Raises:
        ValueError: a `log_freq` that is none.
        TypeError: params or tags that are no dict.
        ImportError: mlflow is not installed.
    Example:
        >>> logger = MLflowLogger("digits", tracking_uri="sqlite:///runs.db", params={"width": 64})  # doctest: +SKIP
    """

    def __init__(
        self,
        experiment: str | None = None,
        run_name: str | None = None,
        tracking_uri: str | os.PathLike | None = None,
        *,
        log_freq: str | int = "epoch",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(log_freq, "log_freq")
        for name, given in (("params", params), ("tags", tags)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"{name}={given!r} is a {type(given).__name__}. Give a dict of names and values.")
        require("mlflow", "mlflow", "MLflowLogger")
        self.experiment, self.run_name, self.tracking_uri = experiment, run_name, tracking_uri
        self._given, self.tags = dict(params or {}), dict(tags or {})
        self._run_id: str | None = None
        self._is_open = self._is_owner = False

    def state_dict(self) -> dict[str, Any]:
        """What `Logger` counts, and the id of the run."""
        return super().state_dict() | {"run_id": self._run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the run of a state."""
        super().load_state_dict(state)
        self._run_id = state["run_id"]

    def _open(self) -> None:
        if self.model.is_dry_run:
            return
        import mlflow

        active = mlflow.active_run()
        self._is_owner = active is None
        run = self._started() if active is None else active
        if active is not None:
            places = {"experiment": self.experiment, "run_name": self.run_name, "tracking_uri": self.tracking_uri}
            _warn_of_unused("MLflowLogger", f"run {active.info.run_name!r}", places)
        self._run_id, self._is_open = run.info.run_id, True
        mlflow.set_tags(self.tags)
        # A parameter can be logged once; it may have been by a fit before this one.
        known = mlflow.get_run(self._run_id).data.params
        params = hyperparameters(self.model, self.params) | self._given
        mlflow.log_params({name: value for name, value in params.items() if name not in known})

    def _started(self) -> Any:
        import mlflow

        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        if self.experiment is not None:
            mlflow.set_experiment(self.experiment)
        return mlflow.start_run(run_id=self._run_id if self._is_loaded else None, run_name=self.run_name)

    def _log(self, kind: str, number: int, values: dict[str, float]) -> None:
        if not self._is_open:
            return
        import mlflow

        prefix = "" if kind == "epoch" else f"{kind}_"
        metrics = {re.sub(r"[^\w\-. /]", "_", prefix + name): value for name, value in values.items()}
        mlflow.log_metrics(metrics, step=number, run_id=self._run_id)

    def _close(self, error: BaseException | None = None) -> None:
        is_open, self._is_open = self._is_open, False
        if is_open and self._is_owner:
            import mlflow

            killed = isinstance(error, KeyboardInterrupt)
            mlflow.end_run("FINISHED" if error is None else "KILLED" if killed else "FAILED")


def _batches_between(freq: Any, name: str) -> int | None:
    """From one logged batch to the next; `None` = only epochs are."""
    if isinstance(freq, str) and freq in ("epoch", "batch"):
        return 1 if freq == "batch" else None
    if not isinstance(freq, Integral) or isinstance(freq, bool) or freq < 1:
        raise ValueError(f'{name}={freq!r} is not known. Give "epoch", "batch", or a number of batches from 1 up.')
    return int(freq)


def leave_out(callback: Callback, owner: type, *hooks: str) -> None:
    """Has hooks that have nothing to do not be called, so that they cost nothing; a subclass's own stay.

    Args:
        callback: Whose.
        owner: The class that has them.
        hooks: Their names.
    """
    for name in hooks:
        if getattr(type(callback), name) is getattr(owner, name):
            setattr(callback, name, getattr(Callback, name).__get__(callback))


def require(module: str, extra: str, owner: str) -> None:
    """Refuses to go on without an optional package; does not import it yet."""
    if find_spec(module) is None:
        raise ImportError(f"{owner} needs {module}, which is not installed: pip install kerastorch[{extra}]")


def numbers_in(logs: Mapping | None) -> dict[str, float]:
    """What of the logs is one number, as a Python number."""
    scalars = {n: value.item() if getattr(value, "ndim", None) == 0 else value for n, value in (logs or {}).items()}
    return {name: value for name, value in scalars.items() if isinstance(value, Real)}


def learning_rates(model: Any, logs: Mapping | None = None) -> dict[str, float]:
    """The rates of all optimizers: `learning_rate`, `learning_rate_group_1`, ...; of several `learning_rate_<name>`.

    Args:
        model: The `Model`.
        logs: Those of an epoch: where a schedule has moved the rate since its last step, the rate of that step is here.
    """
    rates = {}
    for name, update in model.updates.items():
        key = _named("learning_rate", name)
        rates |= _rates(key, update.optimizer.param_groups)
        if update.rate_name in (logs or {}):
            rates[key] = float(logs[update.rate_name])
    return rates


def hyperparameters(model: Any, params: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a run is made of, as far as it is known: optimizer, schedule, rates as compiled, epochs, steps in each."""
    values: dict[str, Any] = {}
    for name, update in model.updates.items():
        values[_named("optimizer", name)] = type(update.optimizer).__name__
        groups = update.optimizer.param_groups
        if update.schedule is not None:
            state = update.schedule.state_dict()
            values[_named("schedule", name)], groups = str(state["schedule"]), state["base"]
        values |= _rates(_named("learning_rate", name), groups)
    return values | {name: params[name] for name in ("epochs", "steps") if (params or {}).get(name) is not None}


def _named(kind: str, optimizer: str) -> str:
    return f"{kind}_{optimizer}" if optimizer else kind


def _rates(key: str, groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    named = ((f"{key}_group_{index}" if index else key, group) for index, group in enumerate(groups))
    return {name: float(group["lr"]) for name, group in named if "lr" in group}


def _warn_of_unused(owner: str, run: str, places: Mapping[str, Any]) -> None:
    unused = [f"{name}={value!r}" for name, value in places.items() if value is not None]
    if unused:
        warnings.warn(
            f"{owner} logs into the {run}, which is active already; {', '.join(unused)} has no effect. Leave it out, "
            f"or end that run before fit.",
            stacklevel=2,
        )
