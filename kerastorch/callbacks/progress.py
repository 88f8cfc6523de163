"""ProgressBar: what a run prints, live on a terminal or in a notebook, plain lines everywhere else.

Decides when and how to print. The numbers are the loop's: they are read once for each refresh of the screen, and a step
between two refreshes costs one look at the clock.
"""

from __future__ import annotations

import math
import numbers
import os
import sys
import time
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, TextIO

from torch import Tensor

from ..directions import direction
from .base import Callback

HEARTBEAT_S = 60.0  # between two plain lines within one epoch

# Ten cells, so that on 100 columns a loss and two metrics fit beside the bar; in a notebook the width is the widget's.
KNOWN_LENGTH = "{desc}  {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}  {elapsed}<{remaining}{postfix}"
UNKNOWN_LENGTH = "{desc}  {n_fmt} steps  {elapsed}{postfix}"


def progress_for(verbose: int | str, callbacks: Iterable[Any] | None = ()) -> list[ProgressBar]:
    """The progress bar that a run gets by itself.

    Args:
        verbose: As in Keras: 0 = silent, 1 = a live line, 2 = a line for each epoch; `"auto"` = 1 on a terminal or in a
            notebook, 2 otherwise. `True` and `False` are 1 and 0.
        callbacks: The user's. Default: none.
    Returns:
        A `ProgressBar` in a list, which is empty with 0 and where the user gave one.
    Raises:
        ValueError: another value of `verbose`.
    """
    if _checked(verbose) == 0 or any(isinstance(callback, ProgressBar) for callback in callbacks or ()):
        return []
    return [ProgressBar(verbose=verbose)]


class ProgressBar(Callback):
    """Shows where a run is: a live line on a terminal or in a notebook, plain lines in a pipe, a file or CI.

    The line of an epoch has its time (validation included), the training samples per second of training, and all that
    is in its logs. `*` marks a value better than in all epochs of this `fit` before it, where the name tells which way
    is better. Plain lines have no `\\r` and no colours. `NO_COLOR` takes the colour from a terminal; `CI` and
    `TERM=dumb` make the lines plain.

    Args:
        refresh_s: Seconds between two refreshes of the live line; each reads the device once. Default: 0.1.
        verbose: 0 = silent, 1 = live where that is possible, else as 2; 2 = plain lines: one for each epoch, and one
            for each minute within it; `"auto"` = 1. Default: `"auto"`.
        stream: Where to print; `None` = `sys.stdout` at the moment of printing. Default: `None`.
    Example:
        >>> bar = ProgressBar(refresh_s=1.0)  # for a slow connection: fit(..., callbacks=[bar])
    """

    rank_zero_only = True

    adds_to_logs = ()

    def __init__(self, refresh_s: float = 0.1, *, verbose: int | str = "auto", stream: TextIO | None = None) -> None:
        if isinstance(refresh_s, bool) or not isinstance(refresh_s, numbers.Real) or not 0 <= refresh_s < math.inf:
            raise ValueError(f"refresh_s={refresh_s!r} is no time. Give seconds from 0 up, e.g. 0.1.")
        self.refresh_s, self.verbose, self.stream = refresh_s, _checked(verbose), stream
        self._is_live = self._is_fitting = False
        self._bar: Any = None
        self._best: dict[str, float] = {}

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        self._is_live = self._can_be_live()
        self._is_fitting, self._best = True, {}
        self._is_first_epoch = True

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        if self._is_first_epoch:
            self._is_first_epoch = False
            self._recall()
        epochs = self.params["epochs"]
        number = f"{epoch + 1}" if epochs is None else f"{epoch + 1}/{epochs}"
        self._epoch_name = f"Epoch {number}" if self._is_live else f"[{number}]"
        self._epoch_began, self._samples_per_s = time.monotonic(), None
        self._batches, self._samples_before, self._trained_s = 0, 0, 0.0
        self._open(self._epoch_name, self.params["steps"])

    def on_train_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        if batch and not self._batches:  # the first one of a run that goes on within the epoch
            self._skip(batch)
        self._batches = batch + 1
        if time.monotonic() >= self._due:
            self._refresh(batch + 1, logs)

    def on_validation_begin(self, logs: MutableMapping | None = None) -> None:
        # Now, while `samples_seen` is still that of training.
        self._trained_s += time.monotonic() - self._began
        self._samples_per_s = self._samples_trained() / max(self._trained_s, 1e-9)
        # A validation of a moment shall not flash up; half, so that the first refresh is past the delay.
        self._open(f"{self._epoch_name} validating", delay_s=self.refresh_s / 2)

    def on_validation_end(self, logs: MutableMapping | None = None) -> None:
        self._close()

    def on_interval_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._print(self._joined([self._epoch_name, _done(self._batches, self.params["steps"])], _numbers(logs)))
        self._open(self._epoch_name, self.params["steps"], shown=self._batches)
        self._samples_per_s = None

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        samples_per_s = self._samples_per_s
        if samples_per_s is None:
            self._trained_s += time.monotonic() - self._began
            samples_per_s = self._samples_trained() / max(self._trained_s, 1e-9)
        self._conclude(self._epoch_name, time.monotonic() - self._epoch_began, samples_per_s, _numbers(logs))

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        self._close()
        self._is_fitting = False

    def on_test_begin(self, logs: MutableMapping | None = None) -> None:
        if not self._is_fitting:
            self._is_live, self._best = self._can_be_live(), {}
            self._open("evaluate", self.params["steps"])

    def on_test_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        if time.monotonic() >= self._due:
            self._refresh(batch + 1, logs)

    def on_test_end(self, logs: MutableMapping | None = None) -> None:
        if not self._is_fitting:
            self._conclude("evaluate", time.monotonic() - self._began, self._measured_samples_per_s(), _numbers(logs))

    def on_predict_begin(self, logs: MutableMapping | None = None) -> None:
        self._is_live = self._can_be_live()
        self._open("predict", self.params["steps"])
        if not self._is_live:
            self._due = math.inf  # the prediction itself is what a script is after

    def on_predict_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        if time.monotonic() >= self._due:
            self._refresh(batch + 1, {})  # its logs are the outputs

    def on_predict_end(self, logs: MutableMapping | None = None) -> None:
        self._close()

    def on_exception(self, error: BaseException) -> None:
        """Clears the live line, so that the traceback starts on a line of its own."""
        self._close()
        self._is_fitting = False

    def _out(self) -> TextIO:
        return sys.stdout if self.stream is None else self.stream

    def _can_be_live(self) -> bool:
        out = self._out()
        return self.verbose == 1 and (_is_terminal(out) or (out is sys.stdout and is_notebook())) and not _is_ci()

    def _measured_samples_per_s(self) -> float:
        return self._of_all(self.model.samples_seen) / max(time.monotonic() - self._began, 1e-9)

    def _samples_trained(self) -> int:
        return self._of_all(self.model.samples_seen - self._samples_before)

    def _of_all(self, samples: int) -> float:
        """Of all processes, where each has its part."""
        return samples / self.model.backend.portion

    def _skip(self, batches: int) -> None:
        """What an earlier run has trained on of the epoch took no time here."""
        self._samples_before = self.model.samples_seen * batches // (batches + 1)
        self._steps_shown = batches
        if self._bar is not None:
            self._bar.update(batches)

    def _recall(self) -> None:
        """The best values of the epochs that an earlier run had."""
        for name, values in self.model.history.history.items():
            for value in values:
                self._improved(_numbers({name: value}))

    def _open(self, name: str, steps: int | None = None, delay_s: float = 0.0, shown: int = 0) -> None:
        """Begins a stretch of steps that is timed on its own, after those shown; `steps=None` = not known."""
        self._close()
        self._name, self._steps, self._steps_shown = name, steps, shown
        self._began = self._shown_at = time.monotonic()
        self._every_s = self.refresh_s if self._is_live else HEARTBEAT_S if self.verbose else math.inf
        self._due = self._began + self._every_s
        if self._is_live:
            self._bar = _open_bar(name, steps, self._out(), delay_s, shown)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _refresh(self, steps: int, logs: Mapping | None) -> None:
        values = _numbers(logs)  # waits for the device, so the clock is read after it
        now = time.monotonic()
        # Since the last refresh, not since the beginning: a first step that compiles would spoil the mean for long.
        pace = _pace((now - self._shown_at) / (steps - self._steps_shown))
        if self._is_live:
            self._bar.set_postfix_str(self._joined([pace], values), refresh=False)
            self._bar.update(steps - self._steps_shown)
        else:
            done = _done(steps, self._steps)
            self._print(self._joined([self._name, done, _duration(now - self._began), pace], values))
        self._steps_shown, self._shown_at, self._due = steps, now, now + self._every_s

    def _conclude(self, name: str, seconds: float, samples_per_s: float, values: dict[str, float]) -> None:
        """Replaces the live line by the one that stays."""
        self._close()
        marked = self._improved(values)
        self._print(self._joined([name, _duration(seconds), f"{_count(samples_per_s)} samples/s"], values, marked))

    def _improved(self, values: dict[str, float]) -> set[str]:
        """Names of the values that beat all earlier epochs; there is nothing to beat in the first."""
        scores = {
            name: direction(name) * value for name, value in values.items() if direction(name) and not math.isnan(value)
        }
        improved = {name for name, score in scores.items() if score > self._best.get(name, math.inf)}
        self._best |= {name: max(score, self._best.get(name, score)) for name, score in scores.items()}
        return improved

    def _joined(self, parts: list[str], values: dict[str, float], marked: Iterable[str] = ()) -> str:
        gap, link = ("  ", " ") if self._is_live else (" ", "=")
        marks = dict.fromkeys(marked, f" {_star(self._out())}") if self._is_live and marked else {}
        return gap.join([*parts, *(f"{name}{link}{_text(name, values[name])}{marks.get(name, '')}" for name in values)])

    def _print(self, line: str) -> None:
        if self._is_live:
            from tqdm import tqdm

            tqdm.write(line, file=self._out())  # goes above bars that the user has around `fit`
            self._out().flush()
        elif self.verbose:
            print(line, file=self._out(), flush=True)  # a pipe is buffered: nobody would see a heartbeat for hours


def _done(steps: int, of: int | None) -> str:
    return f"step {steps}" if of is None else f"{steps}/{of}"


def _checked(verbose: Any) -> int:
    if isinstance(verbose, str) and verbose == "auto":
        return 1  # where nothing can be live, 1 is 2
    if isinstance(verbose, int) and verbose in (0, 1, 2):
        return int(verbose)
    raise ValueError(
        f'verbose={verbose!r} is not known, expected 0, 1, 2 or "auto". Give 0 for silence, 2 for a line an epoch.'
    )


def _is_terminal(stream: TextIO) -> bool:
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and isatty() and os.environ.get("TERM") != "dumb"


def _is_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def is_notebook() -> bool:
    """Whether IPython runs as a kernel; the test is tqdm's own, without an import."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def _open_bar(name: str, steps: int | None, stream: TextIO, delay_s: float, shown: int) -> Any:
    layout = UNKNOWN_LENGTH if steps is None else KNOWN_LENGTH
    if _has_widgets() and stream is sys.stdout:
        from tqdm.notebook import tqdm

        layout = layout.replace("{bar:10}", "{bar}")
    else:
        from tqdm import tqdm
    # Each update is a refresh that is due, so tqdm must not skip any by its own reckoning.
    always = {"mininterval": 0, "miniters": 1, "dynamic_ncols": True}
    always |= {"file": stream, "leave": False, "bar_format": layout}
    return tqdm(desc=name, total=steps, initial=shown, delay=delay_s, **always)


def _has_widgets() -> bool:
    if not is_notebook():
        return False
    from tqdm import notebook

    return notebook.IProgress is not None


def _star(stream: TextIO) -> str:
    if os.environ.get("NO_COLOR") or not _is_terminal(stream):
        return "*"
    from colorama import Fore, just_fix_windows_console

    just_fix_windows_console()
    return f"{Fore.GREEN}*{Fore.RESET}"


def _numbers(logs: Mapping | None) -> dict[str, float]:
    """What can be shown as one number."""
    scalars = {name: value.item() if _is_scalar(value) else value for name, value in (logs or {}).items()}
    return {name: value for name, value in scalars.items() if isinstance(value, numbers.Real)}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _text(name: str, value: float) -> str:
    """A value in four significant digits, without an exponent where the number is legible without.

    Example:
        >>> [_text("loss", value) for value in (0.975, 12.3456, 12345.6, 1e-7)], _text("lr", 0.001)
        (['0.9750', '12.35', '12346', '1.000e-07'], '1.00e-03')
    """
    if name in ("lr", "learning_rate"):
        return f"{value:.2e}"
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if abs(value) < 1e3:
        return f"{float(value):#.4g}".rstrip(".")
    return f"{float(value):.0f}" if abs(value) < 1e6 else f"{float(value):.3e}"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{_short(seconds)}s"
    minutes, rest_s = divmod(round(seconds), 60)
    return f"{minutes}m{rest_s:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def _pace(seconds: float) -> str:
    return f"{_short(1e3 * seconds)}ms/step" if seconds < 0.9995 else f"{_short(seconds)}s/step"


def _count(value: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= size), (1, ""))
    return f"{_short(value / size)}{unit}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"
