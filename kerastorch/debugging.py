"""`debug_nan`: whether runs look for the origin of a NaN. What they do then, `callbacks/debugging.py` says."""

from __future__ import annotations

from typing import Any

_is_on = False


def is_on() -> bool:
    """Whether a `fit` that begins now looks for it."""
    return _is_on


class debug_nan:  # called like a function, as torch's switches are
    """Has every later `fit` find where a NaN or an infinity comes from, and raise an error that says it.

    That is the step and its batch, and which came first: data, a layer's result, the loss function, a gradient, or the
    parameters after an optimizer's step; and which samples of the batch. Each step waits for the device, and compiled
    functions run without compilation meanwhile: switch it on when the loss is NaN, and off again.

    As `torch.autograd.set_detect_anomaly`, it works at once, or as a context within a block alone.

    Args:
        mode: Whether to look. Default: `True`.
    Raises:
        TypeError: `mode` is no bool.
        FloatingPointError: (by `fit`) something is not finite.
    Example:
        >>> import torch, kerastorch as kt
        >>> x = torch.tensor([[1.0], [-1.0], [2.0]])
        >>> class Log(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.log()
        >>> model = kt.Model(torch.nn.Sequential(Log(), torch.nn.Linear(1, 1)), backend="cpu").compile("sgd", "mse")
        >>> with kt.debug_nan():  # doctest: +ELLIPSIS
        ...     history = model.fit(x, x, shuffle=False, verbose=0)
        Traceback (most recent call last):
        FloatingPointError: the loss of step 1 (epoch 1, batch 1, counted from 1) is nan. It began in '0' (Log), ...

    Source: the two ways to use it are those of `torch.autograd.set_detect_anomaly`.
    """

    def __init__(self, mode: bool = True) -> None:
        global _is_on
        if not isinstance(mode, bool):
            raise TypeError(f"mode={mode!r} is a {type(mode).__name__}, expected True or False.")
        self.mode, self._before = mode, _is_on
        _is_on = mode

    def __enter__(self) -> None:
        global _is_on
        _is_on = self.mode

    def __exit__(self, *error: Any) -> None:
        global _is_on
        _is_on = self._before
