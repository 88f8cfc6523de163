"""What a run leaves behind: `History`, and `Logs`, the mapping that callbacks get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from numbers import Real
from typing import Any


class Logs(MutableMapping):
    """Names and values at one moment of a run, read from the device when somebody looks and not before.

    Looked at later, means are still those of that moment; torchmetrics, which keep a state of their own, have moved on.

    Args:
        read: Returns the values; called at most once.
    """

    __slots__ = ("_read", "_values")

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read, self._values = read, None

    def _known(self) -> dict[str, Any]:
        if self._values is None:
            self._values = self._read()
        return self._values

    def __bool__(self) -> bool:
        return True  # so that `logs or {}`, Keras's idiom, reads nothing

    def __getitem__(self, name: str) -> Any:
        return self._known()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._known()[name] = value

    def __delitem__(self, name: str) -> None:
        del self._known()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def __repr__(self) -> str:
        return repr(self._known())

    def copy(self) -> dict[str, Any]:
        """A plain dict of the values."""
        return dict(self._known())


class History:
    """The values of each epoch of one `fit`.

    Attributes:
        history: Name -> values, one for each epoch that had it: `{"loss": [0.9, 0.5], "val_loss": [1.0, 0.7]}`.
        epoch: Numbers of the epochs, 0-based.
        params: What the run was asked for: `{"verbose": 1, "epochs": 2, "steps": 313}`.
        intervals: Where validation goes by batches, what was known after each: `{"epoch": 0, "batch": 99, "loss":
            0.4, "val_loss": 0.5}`, both 0-based. An epoch in `history` has the last one within it.
        stopped_by: What ended the run: `"stop_training"`, `"max_steps"`, `"max_time"`, `"interrupt"` (Ctrl-C),
            `"SIGTERM"` or `"SIGUSR1"`; `None` = the last epoch, or the data.
    """

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.history: dict[str, list] = {}
        self.epoch: list[int] = []
        self.params = params or {}
        self.intervals: list[dict[str, Any]] = []
        self.stopped_by: str | None = None
        self._epochs_of: dict[str, list[int]] = {}

    def record(self, epoch: int, logs: MutableMapping) -> None:
        """Adds the values of one epoch, or takes them in the place of those it was given before."""
        if epoch in self.epoch[-1:]:
            self._forget(epoch)
        self.epoch.append(epoch)
        for name, value in logs.items():
            self.history.setdefault(name, []).append(value)
            self._epochs_of.setdefault(name, []).append(epoch)

    def _forget(self, epoch: int) -> None:
        self.epoch.pop()
        for name, epochs in self._epochs_of.items():
            if epoch in epochs[-1:]:
                epochs.pop()
                self.history[name].pop()

    def go_on_from(self, earlier: History) -> None:
        """Takes over the epochs of the run that this one goes on with."""
        self.history, self.epoch, self._epochs_of = earlier.history, earlier.epoch, earlier._epochs_of
        self.intervals[:] = earlier.intervals

    def __repr__(self) -> str:
        if not self.epoch:
            return "History of 0 epochs"
        from tabulate import tabulate

        rows = list(self._rows())
        shown = rows if len(rows) <= 10 else [*rows[:3], ["..."] * len(rows[0]), *rows[-6:]]
        table = tabulate(shown, headers=["epoch", *self.history], floatfmt=".4g", missingval="")
        return f"History of {len(rows)} epoch{'s' * (len(rows) != 1)}\n{table}"

    def _rows(self) -> Iterator[list]:
        values = {name: dict(zip(self._epochs_of[name], self.history[name], strict=True)) for name in self.history}
        for epoch in self.epoch:
            yield [epoch, *(values[name].get(epoch) for name in self.history)]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each epoch and a column for each name; needs pandas."""
        import pandas

        frame = pandas.DataFrame(self._rows(), columns=["epoch", *self.history])
        return frame.set_index("epoch")

    def plot(self, names: list[str] | None = None, path: str | None = None) -> Any:
        """Draws each name over the epochs, validation beside training; needs matplotlib.

        Args:
            names: What to draw, without `val_`, each in a panel of its own; `None` = all that are numbers.
            path: File to save the picture in, `.png`, `.svg` or `.pdf`; `None` = it is not saved.
        Returns:
            The `matplotlib.figure.Figure`.
        Raises:
            ValueError: a name that no epoch has, or no epochs at all.
        """
        if names is None:
            numeric = (name for name, values in self.history.items() if all(isinstance(one, Real) for one in values))
            drawn = list(dict.fromkeys(name.removeprefix("val_") for name in numeric))
        else:
            drawn = names
        unknown = [name for name in drawn if name not in self.history and f"val_{name}" not in self.history]
        if unknown or not drawn:
            raise ValueError(f"there is nothing to plot for {unknown or 'no epochs'}; known are {list(self.history)}.")
        import matplotlib.pyplot as plt

        figure, panels = plt.subplots(
            1, len(drawn), figsize=(4.5 * len(drawn), 3.2), squeeze=False, layout="constrained"
        )
        for axes, name in zip(panels[0], drawn, strict=True):
            for key, label in ((name, "training"), (f"val_{name}", "validation")):
                if key in self.history:
                    axes.plot([epoch + 1 for epoch in self._epochs_of[key]], self.history[key], marker=".", label=label)
            axes.set(xlabel="epoch", title=name)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure
