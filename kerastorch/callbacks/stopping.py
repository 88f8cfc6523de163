"""When a run ends early: `EarlyStopping` by a value of the logs, `TerminateOnNaN` by a loss that is no number.

Both only ask for the end (`model.stop_training`); where the run goes on over that, they go on looking.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from .base import Callback
from .messages import is_verbose, say
from .monitoring import Monitoring
from .values import count, number_or_none

READ_EVERY_S = 1.0  # between two looks at losses that are on another device
LOSSES_KEPT = 1024  # there, at most, between two looks


class EarlyStopping(Monitoring):
    """Ends the run when a value has stopped getting better.

    An epoch, or with several validations in an epoch each of them, waits for a value better than the best so far; a
    `baseline` has to be passed, too. After a wait of `patience` the run ends.

    A run that goes on from a state in which the end was asked for ends at once, unless what is given here now, such as
    a greater `patience`, would let it go on.

    With `restore_best_weights` the module has the best weights and buffers at the end, however the run ends but by an
    error; with `EMA` before this callback, and a name with "val_", the averages that the validation saw.

    Args:
        monitor: Name in the logs. Default: "val_loss".
        min_delta: What a value must be better by; exactly so much is not enough. Default: 0.
        patience: Epochs (or validations) without a better value that are waited for; 0 is as 1. Default: 0.
        verbose: 1 = say why the run ended and which weights it ends with; 0 = silent. Default: 0.
        mode: `"min"` = lower is better, `"max"` = higher is, `"auto"` = by the name. Default: `"auto"`.
        baseline: Value that has to be passed before patience runs out; `None` = any. Default: `None`.
        restore_best_weights: Whether the module gets the weights of the best value back; a copy of them is kept in CPU
            memory. Default: `False`.
        start_from_epoch: Epochs, from the first, 0, that are not judged. Default: 0.
        stopping_threshold: The run ends as soon as a value is better than this. Default: `None`.
        divergence_threshold: The run ends as soon as a value is worse than this. Default: `None`.
        check_finite: Whether it also ends as soon as a value is NaN or infinite, which then is not the best either.
            Default: `False`, as in Keras, where NaN is no better value and patience runs out (Lightning: `True`).
    Attributes:
        best: The best value; `None` before the first.
        best_epoch: Its epoch, 0-based.
        best_weights: The module's state then, with `restore_best_weights`; else `None`.
        wait: Values in a row that were not better.
        stopped_epoch: The epoch in which the end was asked for, 0-based; 0 before.
        reason: Why, as a sentence; `None` before.
    Raises:
        ValueError: a number outside of these ranges, an unknown mode, thresholds that no value is between.
        TypeError: no number where one is expected.
    Example:
        >>> import kerastorch as kt
        >>> model, x = kt.Model(torch.nn.Linear(2, 1), backend="cpu").compile("sgd", "mse", lr=0.0), torch.rand(8, 2)
        >>> stopping = EarlyStopping("loss", patience=2)
        >>> history = model.fit(x, 0 * x[:, :1], epochs=99, callbacks=stopping, shuffle=False, verbose=0)
        >>> len(history.epoch), stopping.best_epoch, stopping.stopped_epoch
        (3, 0, 2)

    Source: Keras, `EarlyStopping`; thresholds and `check_finite`: Lightning, `EarlyStopping`.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        verbose: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
        *,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.patience, self.start_from_epoch = count("patience", patience), count("start_from_epoch", start_from_epoch)
        self.baseline = number_or_none("baseline", baseline)
        self.stopping_threshold = number_or_none("stopping_threshold", stopping_threshold)
        self.divergence_threshold = number_or_none("divergence_threshold", divergence_threshold)
        self._refuse_crossed_thresholds()
        self.verbose = is_verbose(verbose)
        self.restore_best_weights, self.check_finite = restore_best_weights, check_finite
        self._take_back()
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.wait = self.best_epoch = 0
        self.best: float | None = None
        self.best_weights: dict[str, Any] | None = None
        self._value: float | None = None  # the latest

    def state_dict(self) -> dict[str, Any]:
        """The best so far, its weights where they are restored, and the wait since."""
        own = {name: getattr(self, name) for name in ("wait", "best", "best_epoch", "best_weights")}
        asked = {"stopped_epoch": self.stopped_epoch, "reason": self.reason, "value": self._value}
        return super().state_dict() | own | asked

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state: the next run does not start anew."""
        super().load_state_dict(state)
        self.wait, self.best, self.best_epoch = state["wait"], state["best"], state["best_epoch"]
        self.best_weights = state["best_weights"]
        self.stopped_epoch, self.reason = state.get("stopped_epoch", 0), state.get("reason")
        self._value = state.get("value")

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        super().on_train_begin(logs)
        epoch, asked = self.stopped_epoch, self._is_loaded and self.reason is not None
        self._take_back()
        if asked:
            self._stop_if(epoch, self._reason_to_stop(epoch, self._value, is_better=self.wait == 0))

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        super().on_train_end(logs)
        if self.reason is not None and self.verbose:
            say(f"Epoch {self.stopped_epoch + 1}: early stopping. {self.reason}")
        if self.best_weights is not None and self.restore_best_weights:
            if self.verbose:
                say(f"Restoring model weights from the end of the best epoch: {self.best_epoch + 1}.")
            self.model.backend.gather_state()
            self.model.module.load_state_dict(self.best_weights)

    def judge(self, epoch: int, logs: MutableMapping, value: float) -> None:
        if not self.model.stop_training:
            self._take_back()  # what was asked for before: the run went on over it
        if epoch < self.start_from_epoch:
            return
        self._value = value
        is_better = self._is_tolerable(value) and self._compare(epoch, value)
        self._stop_if(epoch, self._reason_to_stop(epoch, value, is_better))

    def _is_tolerable(self, value: float) -> bool:
        return not self.check_finite or math.isfinite(value)

    def _reason_to_stop(self, epoch: int, value: float, is_better: bool) -> str | None:
        if not self._is_tolerable(value):
            return f"{self.monitor} is {value}."
        return self._past_threshold(value) or (None if is_better else self._out_of_patience(epoch))

    def _compare(self, epoch: int, value: float) -> bool:
        """Whether the value is the best so far; then it, its epoch and its weights are remembered."""
        self.wait += 1
        is_better = self.is_better(value, self.best)
        # A state that was saved without weights says what the best value was, and not how to get back to it.
        if self.restore_best_weights and (is_better or self.best_weights is None):
            self.best_weights, self.best_epoch = self._weights(), epoch
        if is_better:
            self.best, self.best_epoch = value, epoch
            if self.baseline is None or self.is_better(value, self.baseline):
                self.wait = 0
        return is_better

    def _past_threshold(self, value: float) -> str | None:
        sign = 1 if self.mode == "max" else -1
        if self.stopping_threshold is not None and sign * value > sign * self.stopping_threshold:
            return f"{self.monitor} is {value:.6g}, better than stopping_threshold={self.stopping_threshold:g}."
        if self.divergence_threshold is not None and sign * value < sign * self.divergence_threshold:
            return f"{self.monitor} is {value:.6g}, worse than divergence_threshold={self.divergence_threshold:g}."
        return None

    def _out_of_patience(self, epoch: int) -> str | None:
        if self.wait < self.patience:
            return None
        best = f"{self.best:.6g} (epoch {self.best_epoch + 1})"
        if self.baseline is not None and not self.is_better(self.best, self.baseline):
            best = f"baseline={self.baseline:g}"
        unit = "validation" if self._judged_epoch == epoch else "epoch"
        return f"{self.monitor} was no better than {best} for {self.wait} {unit}{'s' * (self.wait != 1)}."

    def _stop_if(self, epoch: int, reason: str | None) -> None:
        if reason is not None:
            self.stopped_epoch, self.reason = epoch, reason
            self.model.stop_training = True

    def _take_back(self) -> None:
        self.stopped_epoch, self.reason = 0, None

    def _weights(self) -> dict[str, Any]:
        """A copy of the module's state in CPU memory: an accelerator's may be too small for a second one."""
        self.model.backend.gather_state()
        return {name: _copied(value) for name, value in self.model.module.state_dict().items()}

    def _refuse_crossed_thresholds(self) -> None:
        good, bad = self.stopping_threshold, self.divergence_threshold
        if good is None or bad is None or (good > bad if self.mode == "max" else good < bad):
            return
        raise ValueError(
            f"stopping_threshold={good:g} is no better than divergence_threshold={bad:g} with mode={self.mode!r}: any "
            f"value would end the run. Exchange them, or give another mode."
        )


class TerminateOnNaN(Callback):
    """Ends the run when the loss of a batch is NaN or infinite: after that batch, or with an error.

    On the CPU that is seen at once; an error comes before the batch can change the weights. Losses on another device
    are kept there and read about once a second and at the end of the epoch, so that no step waits for the device: the
    run ends that much later, and the message names the batch where it began.

    Every loss counts that gradients are computed of, of several optimizers too; in a `train_step` of your own those
    given to `self.backward`.

    Args:
        raise_error: Whether to raise an error; else the run ends as if its epochs were over. Default: `False`.
    Raises:
        RuntimeError: in a run, with `raise_error`: a loss is NaN or infinite.
    Example:
        >>> import kerastorch as kt
        >>> model, x = kt.Model(torch.nn.Linear(2, 1), backend="cpu").compile("sgd", "mse", lr=1e30), torch.ones(8, 2)
        >>> model.fit(x, x[:, :1], batch_size=4, callbacks=TerminateOnNaN(raise_error=True))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: NaN or Inf loss encountered at batch 2 of epoch 1, both counted from 1. Loss value: inf. Try ...

    Source: Keras, `TerminateOnNaN`.
    """

    adds_to_logs = ()

    def __init__(self, raise_error: bool = False) -> None:
        self.raise_error = raise_error
        self._epoch = self._batch = 0
        self._has_said = False
        self._slots: tuple[Tensor, ...] = ()  # on the device, for one loss each
        self._batches: list[int] = []  # of the losses in the slots
        self._due = 0.0

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        self._has_said = False

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._epoch, self._batches, self._due = epoch, [], time.monotonic() + READ_EVERY_S

    def on_train_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._batch = batch

    def on_before_backward(self, loss: Any) -> None:
        if _is_at_hand(loss):
            if not math.isfinite(value := loss.item()):
                self._end(self._batch, value)
            return
        if not self._slots:
            dtype = torch.float32 if loss.device.type == "mps" else torch.float64  # which MPS does not have
            self._slots = torch.zeros(LOSSES_KEPT, dtype=dtype, device=loss.device).unbind()
        # A copy: a captured graph writes its next loss into the same memory.
        self._slots[len(self._batches)].copy_(loss.detach().reshape(()))
        self._batches.append(self._batch)
        if len(self._batches) == LOSSES_KEPT or time.monotonic() >= self._due:
            self._read()

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        if self._batches:
            self._read()

    def _read(self) -> None:
        """Waits for the device."""
        batches, self._batches = self._batches, []
        self._due = time.monotonic() + READ_EVERY_S
        losses = torch.stack(self._slots[: len(batches)]).tolist()
        for batch, loss in zip(batches, losses, strict=True):
            if not math.isfinite(loss):
                self._end(batch, loss)

    def _end(self, batch: int, loss: float) -> None:
        if self.raise_error:
            raise RuntimeError(
                f"NaN or Inf loss encountered at batch {batch + 1} of epoch {self._epoch + 1}, both counted from 1. "
                f"Loss value: {loss}. Try a lower lr or clip=1.0 in compile, and look for NaN or very large values in "
                f"the data."
            )
        self.model.stop_training = True
        if not self._has_said:
            self._has_said = True
            say(f"Epoch {self._epoch + 1}: the loss of batch {batch + 1} is {loss}, the run ends.")


def _is_at_hand(loss: Tensor) -> bool:
    """Whether reading it waits for nothing."""
    return loss.device.type == "cpu"


def _copied(value: Any) -> Any:
    """A copy of a part of a module's state, which is a tensor unless the module has some extra state."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
