"""Throughput: how fast a run trains, in samples, tokens and FLOPs, and how much that is of what the device can do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, MutableMapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..flops import FlopMeter, peaks_of, seconds_at_peak
from ..structures import leaves
from .base import Callback


class Throughput(Callback):
    """Puts into the logs of each epoch how fast it was trained.

    - `samples_per_s`: samples of training, of all processes together, as tokens and FLOPs are.
    - `tokens_per_s`: where `tokens` is given.
    - `flops_per_s`: where `flops` is given.
    - `mfu`: share of each device's peak (model FLOPs utilization), where that is known or given.

    The time is that of training: waiting for data is in it, validation and the first steps of a run are not. The device
    is waited for where a stretch of training begins and ends, and not between. What cannot be known is left out: tokens
    where a sample does not go through the module exactly once a step (LBFGS, truncated backpropagation, a `train_step`
    that calls the module twice or only its parts) or goes through compiled code (`jit`), all of them in an epoch in
    which nothing was measured. Put it before callbacks that take long at the end of an epoch.

    Args:
        tokens: How many tokens the module is given: `"auto"` = the elements of its first input of whole numbers of
            shape (samples, time), padding included; or a function from what `forward` gets (a tensor, or a tuple or
            dict of its arguments) to their number, an int or a scalar tensor. Default: `None`, not counted.
        flops: FLOPs of training on one sample, forward and backward; `"auto"` = counted in the first step of the run,
            as if later samples took as many. Default: `None`, not known.
        peak_flops: FLOP/s that the device can do in the precision of the run. Default: `None` = by the GPU's name, for
            those in `kerastorch.flops`, with `flops="auto"`, which tells the precision.
        skip: First steps of a run that are not timed: they warm up, and the second one compiles with `jit`. Default: 2.
    Raises:
        ValueError, TypeError: an argument that is none of these; in the first step, `tokens` that returns no number.
    Example:
        >>> import kerastorch as kt
        >>> model = kt.Model(torch.nn.Linear(4, 1), backend="cpu").compile("sgd", "mse")
        >>> throughput = Throughput(flops="auto", peak_flops=1e12)
        >>> data = torch.rand(64, 4), torch.rand(64, 1)
        >>> history = model.fit(*data, batch_size=8, callbacks=throughput, verbose=0)
        >>> [*history.history], throughput.flops_per_sample
        (['loss', 'samples_per_s', 'flops_per_s', 'mfu'], 16.0)

    Source: MFU, Chowdhery et al. 2022, "PaLM", appendix B.
    """

    def __init__(
        self,
        tokens: str | Callable[[Any], int | Tensor] | None = None,
        flops: str | float | None = None,
        peak_flops: float | None = None,
        *,
        skip: int = 2,
    ) -> None:
        if tokens not in (None, "auto") and not callable(tokens):
            raise ValueError(f"tokens={tokens!r} is not known. Give 'auto', a function, or None.")
        if flops not in (None, "auto"):
            _refuse_nonpositive("flops", flops, "'auto', the FLOPs of one sample, or None")
        if peak_flops is not None:
            _refuse_nonpositive("peak_flops", peak_flops, "FLOP/s such as 312e12, or None")
        if isinstance(skip, bool) or not isinstance(skip, Integral) or skip < 1:
            raise ValueError(f"skip={skip!r} is no number of steps. Give a whole number from 1 up.")
        self.tokens, self.flops, self.peak_flops, self.skip = tokens, flops, peak_flops, int(skip)
        self.flops_per_sample: float | None = None
        self._peak_s_per_sample: float | None = None  # what these FLOPs take at the peak
        self._meter, self._hook = FlopMeter(), None

    @property
    def adds_to_logs(self) -> tuple[str, ...] | None:
        """The names that were asked for, as far as is known before the run; `None` before the model is."""
        if self.model is None:
            return None
        has_peak = self.peak_flops is not None or (self.flops == "auto" and bool(peaks_of(self.model.backend.device)))
        asked = {
            "samples_per_s": True,
            "tokens_per_s": self.tokens is not None,
            "flops_per_s": self.flops is not None,
            "mfu": self.flops is not None and has_peak,
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        self._left, self._is_in_step = self.skip, False
        self.flops_per_sample = None if self.flops == "auto" else self.flops
        self._zero()
        if self.tokens is not None:
            self._hook = self.model.module.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._zero()
        if self._left == 0:
            self._resume(0)

    def on_train_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._is_in_step, self._samples_before_step = True, self.model.samples_seen
        if self.flops == "auto" and self._left == self.skip:
            self._meter.start()

    def on_train_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._is_in_step = False
        if self._left == 0:
            return
        if self.flops == "auto" and self._left == self.skip:
            self._settle_flops()
        self._left -= 1
        if self._left == 0:
            self._zero()
            self._resume(self.model.samples_seen)

    def on_validation_begin(self, logs: MutableMapping | None = None) -> None:
        self._pause()

    def on_validation_end(self, logs: MutableMapping | None = None) -> None:
        if self._left == 0:
            self._resume(self.model.samples_seen)

    def on_interval_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        logs.update(self._rates())

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._pause()
        logs.update(self._rates())

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        self._leave()

    def on_exception(self, error: BaseException) -> None:
        self._leave()

    def _zero(self) -> None:
        """Begins to measure anew."""
        self._began: tuple[float, int] | None = None  # when, and after how many samples of the epoch
        self._elapsed_s, self._samples = 0.0, 0
        self._tokens: int | Tensor = 0
        self._samples_with_tokens = 0

    def _resume(self, samples: int) -> None:
        _wait_for(self.model.backend.device)
        self._began = time.perf_counter(), samples

    def _pause(self) -> None:
        self._meter.stop()  # an epoch may end before its first step does
        if self._began is None:
            return
        (began, samples_before), self._began = self._began, None
        samples = self.model.samples_seen - samples_before
        if samples:  # else this is no training, but what callbacks do after a validation
            _wait_for(self.model.backend.device)
            self._elapsed_s += time.perf_counter() - began
            self._samples += samples

    def _rates(self) -> dict[str, float]:
        if not self._samples:
            return {}
        own_per_s = self._samples / self._elapsed_s
        rates = {"samples_per_s": own_per_s}
        if self._samples_with_tokens == self._samples:
            rates["tokens_per_s"] = float(self._tokens) / self._elapsed_s
        if self.flops_per_sample is not None:
            rates["flops_per_s"] = own_per_s * self.flops_per_sample
        rates = {name: rate / self.model.backend.portion for name, rate in rates.items()}
        if self.flops_per_sample is not None and self.peak_flops is not None:
            rates["mfu"] = own_per_s * self.flops_per_sample / self.peak_flops
        elif self.flops_per_sample is not None and self._peak_s_per_sample is not None:
            rates["mfu"] = own_per_s * self._peak_s_per_sample
        return rates

    def _settle_flops(self) -> None:
        """What was counted in the first step, by sample."""
        self._meter.stop()
        samples, counted = self.model.samples_seen - self._samples_before_step, self._meter.flops
        if not counted:
            return
        self.flops_per_sample = counted.total() / samples
        peak_s = seconds_at_peak(counted, peaks_of(self.model.backend.device))
        self._peak_s_per_sample = None if peak_s is None else peak_s / samples

    def _count(self, module: torch.nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        """Before each forward pass: counts what it is given."""
        if torch.compiler.is_compiling() or not self._is_in_step:
            return
        inputs = _as_given(positional, named)
        tokens = _tokens_in(inputs) if self.tokens == "auto" else self.tokens(inputs)
        if tokens is None and self.tokens == "auto":
            return
        if not isinstance(tokens, (Real, Tensor)) or (isinstance(tokens, Tensor) and tokens.numel() != 1):
            raise TypeError(f"tokens returned {tokens!r}, expected their number. Return an int or a scalar tensor.")
        self._tokens = self._tokens + tokens
        self._samples_with_tokens += next((len(leaf) for leaf in leaves(inputs) if _is_batched(leaf)), 0)

    def _leave(self) -> None:
        self._meter.stop()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _refuse_nonpositive(name: str, value: Any, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} is not known. Give {expected}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not above 0 and finite. Give {expected}.")


def _as_given(positional: tuple, named: dict[str, Any]) -> Any:
    """What `forward` gets, in the form in which `fit` was given it."""
    if named:
        return (*positional, named) if positional else named
    return positional[0] if len(positional) == 1 else positional


def _is_batched(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _tokens_in(inputs: Any) -> int | None:
    """Elements of the first tensor that looks like tokens; `None` = there is none."""
    whole = (torch.int32, torch.int64)
    found = (leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor) and leaf.dtype in whole and leaf.ndim == 2)
    return next((leaf.numel() for leaf in found), None)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
