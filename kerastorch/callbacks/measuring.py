"""What a run does and takes, beside its loss: norms of gradients, memory and load of the devices, time."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..durations import seconds
from .base import Callback

NORMS = {1: 1.0, 2: 2.0, math.inf: math.inf, "inf": math.inf}
STAGES = ("train", "validate", "test", "predict")


class GradNorm(Callback):
    """Puts the norm of the gradients into the logs of each epoch, as the mean over its optimizer steps.

    It is that of the gradients which a step has gathered, unscaled and before they are clipped, of all that have one:
    `grad_norm`, or `grad_norm_{optimizer}` of each of several optimizers. Steps that loss scaling leaves out, because a
    gradient is infinite, are left out here too; without loss scaling, an infinite norm makes the mean infinite. LBFGS
    computes its gradients within its step: there are none to measure before it.

    Args:
        norm: 1 (sum of absolute values), 2 (root of the sum of squares), or `math.inf` or `"inf"` (the largest
            absolute value). Default: 2.
        per_layer: Whether to log the norm of each parameter of the layers too, as `grad_norm/{name}`.
        every: Steps from one measurement to the next; the first of each epoch is measured. Default: 1.
    Raises:
        ValueError: another norm, or `every` below 1.
    Example:
        >>> import kerastorch as kt
        >>> model = kt.Model(torch.nn.Linear(2, 1, bias=False), backend="cpu").compile("sgd", "mse", lr=0.0)
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> history = model.fit(x, model.module(x).detach() - 1, callbacks=GradNorm(), verbose=0)
        >>> round(history.history["grad_norm"][0], 4)  # 2 * 1 * the norm of x
        10.0

    Source: the values are those of Lightning's `grad_norm`.
    """

    needs_all_parameters = True

    def __init__(self, norm: float | str = 2, *, per_layer: bool = False, every: int = 1) -> None:
        if isinstance(norm, bool) or not isinstance(norm, (Real, str)) or norm not in NORMS:
            raise ValueError(f"norm={norm!r} is not known. Give 1, 2, math.inf or 'inf'.")
        if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
            raise ValueError(f"every={every!r} is no number of steps. Give a whole number from 1 up.")
        self.norm, self.per_layer, self.every = NORMS[norm], per_layer, int(every)
        self._epoch: int | None = None  # the running one
        self._is_loaded = False
        self._forget()

    @property
    def adds_to_logs(self) -> tuple[str, ...] | None:
        """Names of the norms; `None` before the callback knows the model."""
        if self.model is None:
            return None
        names = [_norm_name(name) for name in self.model.updates]
        trained = {id(one) for update in self.model.updates.values() for one in update.in_groups() if one.requires_grad}
        return (*names, *(name for key, name in self._layer_names().items() if key in trained))

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        self._updates = {update.optimizer: (name, update) for name, update in self.model.updates.items()}
        self._layers = self._layer_names()

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        goes_on = self._is_loaded and self._epoch == epoch
        self._is_loaded, self._epoch = False, epoch
        if not goes_on:
            self._forget()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        name, update = self._updates[optimizer]
        self._steps[name] += 1
        if (self._steps[name] - 1) % self.every:
            return
        trained = [parameter for parameter in update.in_groups() if parameter.grad is not None]
        if not trained:
            return
        norms = _norms([parameter.grad for parameter in trained], self.norm)
        total = torch.linalg.vector_norm(norms, self.norm)
        is_taken = True if update.scaled_step is None else total.isfinite()
        names, measured = (_norm_name(name),), total[None]
        if self.per_layer:
            names += tuple(self._layers[id(parameter)] for parameter in trained)
            measured = torch.cat([measured, norms])
        self._add(names, measured, is_taken)

    def on_interval_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        logs.update(self._means())

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        logs.update(self._means())
        self._epoch = None

    def state_dict(self) -> dict[str, Any]:
        """The running epoch, and the sums of its norms."""
        sums = [[list(names), total, steps] for names, (total, steps) in self._sums.items()]
        return {"epoch": self._epoch, "steps": dict(self._steps), "sums": [] if self._epoch is None else sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on in the epoch of a state."""
        self._epoch, self._steps, self._is_loaded = state["epoch"], Counter(state["steps"]), True
        self._sums = {tuple(names): (total, steps) for names, total, steps in state["sums"]}

    def _forget(self) -> None:
        self._steps: Counter = Counter()
        self._sums: dict[tuple[str, ...], tuple[Tensor, Any]] = {}  # by the names of what was measured in a step

    def _add(self, names: tuple[str, ...], norms: Tensor, is_taken: bool | Tensor) -> None:
        if is_taken is not True:
            norms = torch.where(is_taken, norms, 0.0)
        norms = norms if norms.is_mps else norms.double()  # so that a sum of very many is one of the same digits
        total, steps = self._sums.get(names, (0.0, 0))
        if isinstance(total, Tensor):
            total = total.to(norms.device)  # of a file it is on the CPU
        if isinstance(steps, Tensor):
            steps = steps.to(norms.device)
        self._sums[names] = total + norms, steps + is_taken

    def _means(self) -> dict[str, float]:
        """The means so far, read from the device."""
        sums: dict[str, list[float]] = {}
        for names, (totals, steps) in self._sums.items():
            *values, number = torch.cat([totals, torch.as_tensor(steps).to(totals)[None]]).tolist()
            for name, value in zip(names, values, strict=True):
                before = sums.get(name, (0.0, 0.0))
                sums[name] = [before[0] + value, before[1] + number]
        return {name: total / steps if steps else math.nan for name, (total, steps) in sums.items()}

    def _layer_names(self) -> dict[int, str]:
        """What the norm of a parameter is called, by its id."""
        if not self.per_layer:
            return {}
        return {id(parameter): f"grad_norm/{name}" for name, parameter in self.model.module.named_parameters()}


def _norm_name(optimizer: str) -> str:
    return f"grad_norm_{optimizer}" if optimizer else "grad_norm"


def _norms(gradients: list[Tensor], norm: float) -> Tensor:
    """The norm of each gradient: shape (gradients,), float32 or float64, so that none of half precision overflows."""
    values = [_values(gradient.detach()) for gradient in gradients]
    is_double = any(one.dtype == torch.float64 for one in values)
    norms = torch.stack(torch._foreach_norm(values, norm, torch.float64 if is_double else torch.float32))
    return norms.full_tensor() if hasattr(norms, "full_tensor") else norms  # of gradients in parts


def _values(gradient: Tensor) -> Tensor:
    """What a norm is taken of: a strided tensor of real numbers, one at least."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()  # a row that several samples looked up is one row
    if gradient.is_complex():
        gradient = gradient.abs()
    return gradient if gradient.numel() else gradient.new_zeros(1)


class DeviceStats(Callback):
    """Puts memory and load of the process and its GPU into the logs of each epoch.

    - `cpu_percent`: processor time of this process, validation included and a loader's worker processes not; 100 is one
      core that is busy all the time.
    - `cpu_memory_bytes`: memory of this process (resident set).
    - `gpu_memory_allocated_bytes`, `gpu_memory_reserved_bytes`: of torch's tensors, and what torch holds for more.
    - `gpu_memory_peak_bytes`: most that was ever allocated in this process (CUDA, XPU).
    - `gpu_utilization_percent`: share of the time in which the GPU did anything (CUDA, with `nvidia-ml-py` installed).

    Bytes are the most that was seen, percentages are means. A name that the device has no value for is left out.

    Args:
        every_s: Seconds between two looks while training; there is one more at the end of each epoch. Default: 1.
    Raises:
        ValueError: `every_s` is below 0, or no number.
    Example:
        >>> import kerastorch as kt
        >>> model = kt.Model(torch.nn.Linear(4, 1), backend="cpu").compile("sgd", "mse")
        >>> history = model.fit(torch.rand(8, 4), torch.rand(8, 1), callbacks=DeviceStats(), verbose=0)
        >>> [name for name in history.history if name.startswith("cpu")]
        ['cpu_percent', 'cpu_memory_bytes']
    """

    def __init__(self, every_s: float = 1.0) -> None:
        if isinstance(every_s, bool) or not isinstance(every_s, Real) or not 0 <= every_s < math.inf:
            raise ValueError(f"every_s={every_s!r} is no time. Give seconds from 0 up, e.g. 1.0.")
        self.every_s = float(every_s)

    @property
    def adds_to_logs(self) -> tuple[str, ...] | None:
        """The names that there are on the model's device; `None` before the callback knows the model."""
        return None if self.model is None else ("cpu_percent", *_gauges(self.model.backend.device))

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        self._gauges = _gauges(self.model.backend.device)

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._seen: dict[str, list[float]] = {name: [] for name in self._gauges}
        self._began, self._busy_s = time.monotonic(), time.process_time()
        self._due = self._began

    def on_train_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        if time.monotonic() >= self._due:
            self._look()

    def on_interval_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._report(logs)

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._report(logs)

    def _look(self) -> None:
        for name, read in self._gauges.items():
            self._seen[name].append(read())
        self._due = time.monotonic() + self.every_s

    def _report(self, logs: MutableMapping) -> None:
        self._look()
        elapsed_s = max(time.monotonic() - self._began, 1e-9)
        logs["cpu_percent"] = 100 * (time.process_time() - self._busy_s) / elapsed_s
        for name, values in self._seen.items():
            logs[name] = max(values) if name.endswith("_bytes") else sum(values) / len(values)


def _gauges(device: torch.device) -> dict[str, Callable[[], float]]:
    """What can be read off here: the name of each value, and the function that reads it. None waits for the device."""
    import psutil

    process = psutil.Process()
    gauges = {"cpu_memory_bytes": lambda: process.memory_info().rss}
    if device.type == "mps":
        gauges["gpu_memory_allocated_bytes"] = torch.mps.current_allocated_memory
        gauges["gpu_memory_reserved_bytes"] = torch.mps.driver_allocated_memory
    elif device.type in ("cuda", "xpu"):
        allocator = torch.get_device_module(device)
        gauges["gpu_memory_allocated_bytes"] = partial(allocator.memory_allocated, device)
        gauges["gpu_memory_reserved_bytes"] = partial(allocator.memory_reserved, device)
        gauges["gpu_memory_peak_bytes"] = partial(allocator.max_memory_allocated, device)
    if device.type == "cuda" and _has_utilization(device):
        gauges["gpu_utilization_percent"] = partial(torch.cuda.utilization, device)
    return gauges


def _has_utilization(device: torch.device) -> bool:
    try:
        torch.cuda.utilization(device)
    except Exception:  # no package, no driver that answers, no such counter on this GPU: each has a class of its own
        return False
    return True


class Timer(Callback):
    """Tells how long training, validation, evaluation and prediction take, and ends training when its time is over.

    Args:
        duration: Training time, validation included, after which `fit` ends: seconds, `"DD:HH:MM:SS"`, a `timedelta`
            or a dict of its keywords. A run that is resumed goes on from the time that it had. Default: `None`, no end.
        interval: `"step"` = looks at the clock after each batch, `"epoch"` = after each epoch. Default: `"step"`.
    Raises:
        ValueError, TypeError: a duration or an interval that is none of these.
    Example:
        >>> import kerastorch as kt
        >>> timer = Timer("00:12:00:00")
        >>> model = kt.Model(torch.nn.Linear(4, 1), backend="cpu").compile("sgd", "mse")
        >>> history = model.fit(torch.rand(8, 4), torch.rand(8, 1), callbacks=timer, verbose=0)
        >>> round(timer.time_elapsed() + timer.time_remaining()) == 12 * 3600
        True

    Source: Lightning, `Timer`, the names of its stages included.
    """

    adds_to_logs = ()

    def __init__(self, duration: Any = None, interval: str = "step") -> None:
        if interval not in ("step", "epoch"):
            raise ValueError(f"interval={interval!r} is not known. Give 'step' or 'epoch'.")
        self.duration_s = None if duration is None else seconds(duration, "duration")
        self.interval = interval
        self._began: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._before_s, self._is_loaded = 0.0, False  # training time of the runs that this one goes on from

    def start_time(self, stage: str = "train") -> float | None:
        """When a stage began, on the clock of `time.monotonic`; `None` = it never did.

        Args:
            stage: `"train"`, `"validate"` (within `fit`), `"test"` (`evaluate`) or `"predict"`; the latest of its kind.
        """
        return self._began.get(_checked(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When a stage ended; `None` = it has not. Argument as in `start_time`."""
        return self._ended.get(_checked(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds that a stage took, or has taken so far; of training, with the runs that it goes on from.

        Argument as in `start_time`.
        """
        before_s = self._before_s if _checked(stage) == "train" else 0.0
        if stage not in self._began:
            return before_s
        return before_s + self._ended.get(stage, time.monotonic()) - self._began[stage]

    def time_remaining(self) -> float | None:
        """Seconds of training that are left, below 0 where the last batch took longer; `None` = without end."""
        return None if self.duration_s is None else self.duration_s - self.time_elapsed()

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        if not self._is_loaded:
            self._before_s = 0.0
        self._is_loaded = False
        self._forget("validate")
        self._begin("train")
        self._stop_if_over()  # a run that is resumed may have no time left

    def on_train_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        if self.interval == "step":
            self._stop_if_over()

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._stop_if_over()

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        self._end("train")

    def on_validation_begin(self, logs: MutableMapping | None = None) -> None:
        self._begin("validate")

    def on_validation_end(self, logs: MutableMapping | None = None) -> None:
        self._end("validate")

    def on_test_begin(self, logs: MutableMapping | None = None) -> None:
        if not self._is_open("validate"):  # which is an evaluation too
            self._begin("test")

    def on_test_end(self, logs: MutableMapping | None = None) -> None:
        if self._is_open("test"):
            self._end("test")

    def on_predict_begin(self, logs: MutableMapping | None = None) -> None:
        self._begin("predict")

    def on_predict_end(self, logs: MutableMapping | None = None) -> None:
        self._end("predict")

    def on_exception(self, error: BaseException) -> None:
        for stage in filter(self._is_open, STAGES):
            self._end(stage)

    def state_dict(self) -> dict[str, Any]:
        """The training time so far."""
        return {"elapsed_s": self.time_elapsed()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from the time of a state in the next `fit`."""
        self._before_s, self._is_loaded = float(state["elapsed_s"]), True
        self._forget("train")

    def _begin(self, stage: str) -> None:
        self._forget(stage)
        self._began[stage] = time.monotonic()

    def _end(self, stage: str) -> None:
        self._ended[stage] = time.monotonic()

    def _is_open(self, stage: str) -> bool:
        return stage in self._began and stage not in self._ended

    def _forget(self, stage: str) -> None:
        self._began.pop(stage, None)
        self._ended.pop(stage, None)

    def _stop_if_over(self) -> None:
        if self.duration_s is not None and self.time_remaining() <= 0:
            self.model.stop_training = True


def _checked(stage: str) -> str:
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} is not known. Give one of {', '.join(map(repr, STAGES))}.")
    return stage
