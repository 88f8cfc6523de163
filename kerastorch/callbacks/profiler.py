"""Profiler: where the time of a step goes, as a table; and torch's own traces of a few steps."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import MutableMapping
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch

from .base import Callback
from .files import make_folder

STAGES = ("data", "forward", "backward", "optimizer", "rest")
TRACE_WARMUP = 1  # steps in which torch's profiler runs and keeps nothing: its start costs time
MAX_MARKS = 4096  # read in between from here on, so that a long epoch does not gather them without end


class Profiler(Callback):
    """Measures how long each stage of a training step takes, and prints a table of it at the end of `fit`.

    - `data`: waiting for the next batch.
    - `forward`: the module and its loss.
    - `backward`: the gradients.
    - `optimizer`: clipping and the update of the parameters.
    - `rest`: metrics, other callbacks and the like.

    Validation and what comes between two epochs is not in it. On a CUDA GPU it is the GPU's time, on its own clock, so
    that nothing waits; `data` is then the time in which it had nothing to do. Put it last: what callbacks
    behind it do in a hook, the progress bar for one, counts to the stage that comes next.

    Args:
        skip: First steps of a run that are not measured: they warm up, and the second one compiles with `jit`.
            Default: 2.
        trace: File for a trace of every operation in a few steps, `.json` or `.json.gz`, for chrome://tracing or
            Perfetto. These steps follow on the skipped ones, and are not in the table. Default: `None`, no trace.
        trace_steps: How many steps to trace. Default: 3.
    Attributes:
        steps: Steps in the table.
        stages: For each stage its `"ms_per_step"`, `"percent"` of the total and `"total_s"`.
    Raises:
        ValueError: a number of steps that is none, or another kind of file.
        OSError: when training begins, a folder that cannot be written to.
    Example:
        >>> import kerastorch as kt
        >>> model = kt.Model(torch.nn.Linear(4, 1), backend="cpu").compile("sgd", "mse")
        >>> profiler, data = Profiler(), (torch.rand(64, 4), torch.rand(64, 1))
        >>> history = model.fit(*data, batch_size=8, epochs=2, callbacks=profiler, verbose=0)
        >>> profiler.steps, [*profiler.stages]
        (14, ['data', 'forward', 'backward', 'optimizer', 'rest'])
    """

    rank_zero_only = True

    def __init__(self, skip: int = 2, *, trace: str | os.PathLike | None = None, trace_steps: int = 3) -> None:
        for name, value, least in (("skip", skip, 0), ("trace_steps", trace_steps, 1)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}={value!r} is no number of steps. Give a whole number from {least} up.")
        if trace is not None and not os.fspath(trace).endswith((".json", ".json.gz")):
            raise ValueError(f"trace={os.fspath(trace)!r} is no file for a trace. Give one that ends in .json[.gz].")
        self.skip, self.trace, self.trace_steps = int(skip), trace, int(trace_steps)
        self._trace: Any = None
        self._forget()

    @property
    def stages(self) -> dict[str, dict[str, float]]:
        """The table as plain data."""
        total_s = sum(self._seconds.values())
        return {
            stage: {
                "ms_per_step": 1e3 * seconds / max(self.steps, 1),
                "percent": 100 * seconds / total_s if total_s else 0.0,
                "total_s": seconds,
            }
            for stage, seconds in self._seconds.items()
        }

    def table(self) -> str:
        """The stages and their sum, as text."""
        from tabulate import tabulate

        if not self.steps:
            return f"Profiler measured no step: the first {self._steps_before} of a run are not."
        columns = {"stage": [*self._seconds, "total"]}
        columns["ms/step"] = _with_sum([1e3 * seconds / self.steps for seconds in self._seconds.values()])
        columns["%"] = _with_sum(_percentages([*self._seconds.values()]))
        columns["total s"] = _with_sum([*self._seconds.values()])
        return f"Profile of {self.steps} steps\n" + tabulate(columns, "keys", floatfmt=("", ".3f", ".1f", ".3f"))

    __str__ = table

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        self._forget()
        device = self.model.backend.device
        self._clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
        if self.trace is not None:
            self._start_trace()

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._mark(None)

    def on_train_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._mark("data")

    def on_before_backward(self, loss: Any) -> None:
        self._mark("forward")

    def on_after_backward(self) -> None:
        self._mark("backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._mark("rest")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self._mark("optimizer")

    def on_train_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        if self._left == 0:
            self._mark("rest")
            self.steps += 1
            return
        self._left -= 1
        if self._trace is not None:
            self._trace.step()
        if self._left == 0:
            self._stop_trace()
            self._mark(None)

    def on_validation_end(self, logs: MutableMapping | None = None) -> None:
        self._mark(None)

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        if self._trace is not None and not self.model.is_dry_run:
            traced = max(0, self.trace_steps - self._left)
            warnings.warn(
                f"the run ended after {traced} of trace_steps={self.trace_steps} steps were traced. Train for more "
                f"than {self._steps_before} steps, or give a smaller skip.",
                stacklevel=2,
            )
        self._stop_trace()
        self._read()
        if self.params["verbose"] != 0:
            print(self.table())

    def on_exception(self, error: BaseException) -> None:
        self._stop_trace()

    @property
    def _steps_before(self) -> int:
        """Steps before those of the table."""
        return self.skip + (0 if self.trace is None else TRACE_WARMUP + self.trace_steps)

    def _forget(self) -> None:
        self.steps, self._left = 0, self._steps_before
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._marks: list[tuple[str | None, Any]] = []

    def _mark(self, stage: str | None) -> None:
        """A stage ends here; with `None`, what was since the last mark belongs to none."""
        if self._left:
            return
        self._marks.append((stage, self._clock.now()))
        if len(self._marks) > MAX_MARKS:
            self._read(leave=MAX_MARKS // 2)  # to which the device may not have come yet

    def _read(self, leave: int = 1) -> None:
        """Adds up the time between marks, but for that between the last ones."""
        end = len(self._marks) - leave
        if end < 1:
            return
        read, self._marks = self._marks[: end + 1], self._marks[end:]
        self._clock.wait(read[-1][1])
        for (_, before), (stage, moment) in pairwise(read):
            if stage is not None:
                self._seconds[stage] += self._clock.seconds(before, moment)

    def _start_trace(self) -> None:
        make_folder(self.model.path_for(self.trace).parent, "Profiler")
        schedule = torch.profiler.schedule(wait=self.skip, warmup=TRACE_WARMUP, active=self.trace_steps, repeat=1)
        self._trace = torch.profiler.profile(schedule=schedule, on_trace_ready=self._save_trace)
        self._trace.start()

    def _save_trace(self, trace: Any) -> None:
        trace.export_chrome_trace(os.fspath(self.model.path_for(self.trace)))

    def _stop_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.stop()


class _HostClock:
    """The host's: on a CPU an operation is done when its call is."""

    now = staticmethod(time.perf_counter)

    def wait(self, moment: float) -> None:
        """Until the device has come to a moment: it has."""

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _CudaClock:
    """The GPU's: moments are events in its queue, which it passes when what was queued before is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True))

    def wait(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


def _with_sum(values: list[float]) -> list[float]:
    return [*values, sum(values)]


def _percentages(values: list[float]) -> list[float]:
    """Shares in percent, rounded to tenths so that they add up to 100: the largest remainders are rounded up.

    Example:
        >>> _percentages([1, 1, 1])
        [33.4, 33.3, 33.3]
    """
    total = sum(values)
    exact = [1000 * value / total if total else 0.0 for value in values]
    tenths = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(values)), key=lambda index: tenths[index] - exact[index])
    for index in by_remainder[: round(sum(exact)) - sum(tenths)]:
        tenths[index] += 1
    return [share / 10 for share in tenths]
